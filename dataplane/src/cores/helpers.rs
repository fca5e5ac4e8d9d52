//! The helper threads: run requests that may block, so that a core never does.
//!
//! Threads come with devices: each device brings some of its own, and every core brings some that all devices share. A
//! device whose export never answers holds its own and at most all the shared ones; those of other devices are never its to
//! take, so it stops nobody else.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::{CoreMailbox, CoreMessage};
use crate::id::DeviceId;
use crate::reactor::{Backend, Job};

/// Threads that a device brings.
const OWN: usize = 4;

/// A job and where its outcome goes.
pub(super) struct HelperJob<B> {
    pub(super) slot: u32,
    pub(super) job: Job<B>,
    pub(super) core: Arc<CoreMailbox<B>>,
}

/// What a device may use.
struct Share {
    device: DeviceId,
    /// Threads that it has brought.
    own: usize,
    running: usize,
}

impl Share {
    /// Threads beyond its own that it uses.
    fn borrowed(&self) -> usize {
        self.running.saturating_sub(self.own)
    }
}

/// The jobs of all devices, oldest first, and who may have how many run.
struct Line<J> {
    jobs: VecDeque<(DeviceId, J)>,
    shares: Vec<Share>,
    shared: usize,
    borrowed: usize,
}

impl<J> Line<J> {
    fn new(capacity: usize) -> Line<J> {
        Line {
            jobs: VecDeque::with_capacity(capacity),
            shares: Vec::new(),
            shared: 0,
            borrowed: 0,
        }
    }

    fn add(&mut self, device: DeviceId, own: usize) {
        self.shares.push(Share {
            device,
            own,
            running: 0,
        });
    }

    /// Forgets a device without jobs; gives the number of threads that it had brought.
    fn remove(&mut self, device: DeviceId) -> usize {
        let at = self.shares.iter().position(|share| share.device == device);
        at.map_or(0, |at| self.shares.swap_remove(at).own)
    }

    fn push(&mut self, device: DeviceId, job: J) {
        self.jobs.push_back((device, job));
    }

    fn share(&mut self, device: DeviceId) -> Option<&mut Share> {
        self.shares.iter_mut().find(|share| share.device == device)
    }

    /// The oldest job that may run; [`Line::done`] must follow.
    fn take(&mut self) -> Option<(DeviceId, J)> {
        let may_borrow = self.borrowed < self.shared;
        let at = self.jobs.iter().position(|(device, _)| {
            let share = self.shares.iter().find(|share| share.device == *device);
            may_borrow || share.is_some_and(|share| share.running < share.own)
        })?;
        let (device, job) = self.jobs.remove(at)?;
        self.count(device, |running| running + 1);
        Some((device, job))
    }

    fn done(&mut self, device: DeviceId) {
        self.count(device, |running| running.saturating_sub(1));
    }

    fn count(&mut self, device: DeviceId, change: impl FnOnce(usize) -> usize) {
        let Some(share) = self.share(device) else {
            return;
        };
        let before = share.borrowed();
        share.running = change(share.running);
        let after = share.borrowed();
        self.borrowed = self.borrowed + after - before;
    }
}

struct State<B> {
    line: Line<HelperJob<B>>,
    /// Threads that there are, and that there should be.
    threads: usize,
    wanted: usize,
    handles: Vec<JoinHandle<()>>,
    closed: bool,
}

/// The helper threads and their common queue.
pub(super) struct Helpers<B> {
    state: Mutex<State<B>>,
    wake: Condvar,
}

impl<B: Backend> Helpers<B> {
    /// A queue with room for `capacity` jobs, and `shared` threads.
    pub(super) fn start(capacity: usize, shared: usize) -> io::Result<Arc<Helpers<B>>> {
        let helpers = Arc::new(Helpers {
            state: Mutex::new(State {
                line: Line::new(capacity),
                threads: 0,
                wanted: 0,
                handles: Vec::new(),
                closed: false,
            }),
            wake: Condvar::new(),
        });
        for _ in 0..shared {
            helpers.spawn()?;
        }
        helpers.state().line.shared = shared;
        Ok(helpers)
    }

    fn state(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(self: &Arc<Self>) -> io::Result<()> {
        let mut state = self.state();
        state.handles.retain(|handle| !handle.is_finished());
        let helpers = Arc::clone(self);
        let builder = std::thread::Builder::new().name(format!("ferry-help-{}", state.threads));
        let handle = builder.spawn(move || helpers.work())?;
        state.handles.push(handle);
        state.threads += 1;
        state.wanted += 1;
        Ok(())
    }

    /// A device that may have jobs from now on brings its threads.
    pub(super) fn attach(self: &Arc<Self>, device: DeviceId) {
        let brought = (0..OWN).take_while(|_| match self.spawn() {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(device = device.0, %error, "no helper thread for the device; it shares those of others");
                false
            }
        });
        let brought = brought.count();
        self.state().line.add(device, brought);
    }

    /// A device without jobs goes, and its threads with it.
    pub(super) fn detach(&self, device: DeviceId) {
        let mut state = self.state();
        state.wanted -= state.line.remove(device);
        drop(state);
        self.wake.notify_all();
    }

    pub(super) fn post(&self, job: HelperJob<B>) {
        self.state().line.push(job.job.device(), job);
        self.wake.notify_one();
    }

    /// Ends all threads, after the jobs that there are.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        let handles = std::mem::take(&mut state.handles);
        drop(state);
        self.wake.notify_all();
        for handle in handles {
            let _ = handle.join();
        }
    }

    fn work(&self) {
        while let Some((device, next)) = self.next() {
            let outcome = next.job.run();
            next.core.post(CoreMessage::Offloaded {
                slot: next.slot,
                outcome,
            });
            self.state().line.done(device);
        }
    }

    /// The next job, once there is one; `None` when this thread is one too many.
    fn next(&self) -> Option<(DeviceId, HelperJob<B>)> {
        let mut state = self.state();
        loop {
            if let Some(next) = state.line.take() {
                return Some(next);
            }
            if state.closed || state.threads > state.wanted {
                state.threads -= 1;
                return None;
            }
            state = self
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENT: DeviceId = DeviceId(1);
    const OTHER: DeviceId = DeviceId(2);

    fn line() -> Line<u32> {
        let mut line = Line::new(16);
        line.shared = 3;
        line.add(SILENT, 2);
        line.add(OTHER, 2);
        line
    }

    #[test]
    fn a_device_that_never_answers_leaves_the_others_their_threads() {
        let mut line = line();
        for n in 0..10 {
            line.push(SILENT, n);
        }
        line.push(OTHER, 10);
        line.push(OTHER, 11);
        line.push(OTHER, 12);
        let taken: Vec<u32> = std::iter::from_fn(|| line.take().map(|(_, job)| job)).collect();
        assert_eq!(taken, [0, 1, 2, 3, 4, 10, 11]);
        line.done(OTHER);
        assert_eq!(line.take(), Some((OTHER, 12)));
        assert_eq!(line.take(), None);
        line.done(SILENT);
        assert_eq!(line.take(), Some((SILENT, 5)), "its share is free again");
        assert_eq!(line.take(), None);
    }

    #[test]
    fn jobs_run_in_the_order_in_which_they_came() {
        let mut line = line();
        line.push(OTHER, 1);
        line.push(SILENT, 2);
        line.push(OTHER, 3);
        for wanted in [1, 2, 3] {
            assert_eq!(line.take().map(|(_, job)| job), Some(wanted));
        }
    }

    #[test]
    fn a_device_that_goes_takes_its_share_along() {
        let mut line = line();
        line.push(SILENT, 1);
        assert_eq!(line.take(), Some((SILENT, 1)));
        line.done(SILENT);
        assert_eq!(line.remove(SILENT), 2);
        assert_eq!(line.remove(SILENT), 0);
        assert_eq!(line.borrowed, 0);
    }
}
