//! Watches over a mount from the main thread: signals, the device's connection, the workers, and the end of all of them.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};
use ferry_dataplane::os::eventfd::EventFd;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::kernel::Mount;
use super::session::{self, Watch};
use super::slots::Slots;
use super::worker::{Shared, Worker, WorkerError};
use crate::driver::{Device, Queue};

/// Takes SIGINT, SIGTERM and SIGHUP away from all threads, to be read from the returned descriptor.
pub(super) fn take_signals() -> Result<SignalFd> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
        .into_iter()
        .collect();
    signals.thread_block().context("cannot block signals")?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    SignalFd::with_flags(&signals, flags).context("cannot make a signal descriptor")
}

type Finished = (Worker, Result<(), WorkerError>);

/// Why the mount ends.
enum End {
    /// Somebody has unmounted it.
    Unmounted,
    /// A signal; the mount is gone. True: it was in use.
    Stopped(bool),
    /// The device, or a worker, cannot go on.
    Failed(anyhow::Error),
}

/// A mount that is served.
pub(super) struct Supervisor {
    shared: Arc<Shared>,
    mount: Arc<Mount>,
    signals: SignalFd,
    device: Device,
    /// Signalled when a worker or the unmounting thread has finished.
    finished: Arc<EventFd>,
    workers: Vec<(JoinHandle<Finished>, Arc<EventFd>)>,
    unmounting: Option<JoinHandle<Result<bool>>>,
}

impl Supervisor {
    pub(super) fn new(
        shared: Arc<Shared>,
        mount: Mount,
        signals: SignalFd,
        device: Device,
    ) -> Result<Supervisor> {
        Ok(Supervisor {
            shared,
            mount: Arc::new(mount),
            signals,
            device,
            finished: Arc::new(EventFd::new().context("cannot make an event counter")?),
            workers: Vec::new(),
            unmounting: None,
        })
    }

    /// Starts a worker.
    pub(super) fn spawn(&mut self, mut worker: Worker, wake: Arc<EventFd>) -> Result<()> {
        let finished = Arc::clone(&self.finished);
        let thread = thread::Builder::new()
            .name(format!("mount/{}", self.workers.len() + 1))
            .spawn(move || {
                let outcome = worker.run();
                finished.signal();
                (worker, outcome)
            })
            .context("cannot start a worker thread")?;
        self.workers.push((thread, wake));
        Ok(())
    }

    /// Serves until the end, and cleans up.
    pub(super) fn run(mut self) -> Result<()> {
        let end = self.watch().unwrap_or_else(End::Failed);
        if matches!(end, End::Failed(_)) {
            self.mount.abort();
        }
        let (worker_error, last) = self.stop_workers();
        let shown = self.mount.dir().display().to_string();
        match end {
            End::Failed(error) => {
                // The device learns of it when the connection closes; it might not answer a reset.
                let error = worker_error.unwrap_or(error);
                return Err(error.context(format!(
                    "the mount at {shown} has ended and was removed; its pending requests have failed"
                )));
            }
            End::Stopped(true) => {
                eprintln!(
                    "ferry: {shown} was in use: it is unmounted, and its open files fail from now on"
                );
            }
            End::Stopped(false) | End::Unmounted => {}
        }
        if let Some((queue, slots)) = last {
            self.say_goodbye(queue, slots);
        }
        self.device
            .reset()
            .context("the mount has ended, but the device could not be reset")
    }

    /// Waits for whatever ends the mount.
    fn watch(&mut self) -> Result<End> {
        loop {
            let ready = self.wait()?;
            if ready.device && self.device.is_gone() {
                return Ok(End::Failed(anyhow!(
                    "the device has gone away; start the service again, then mount again"
                )));
            }
            if ready.hiprio {
                self.shared.hiprio.interrupted()?;
            }
            if ready.signal && self.signals.read_signal()?.is_some() {
                if self.unmounting.is_some() {
                    return Ok(End::Failed(anyhow!(
                        "stopped by a second signal before it was unmounted"
                    )));
                }
                self.begin_unmount()?;
            }
            if ready.finished
                && let Some(end) = self.look_at_threads()?
            {
                return Ok(end);
            }
        }
    }

    fn wait(&self) -> Result<Ready> {
        let mut fds = [
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.device.hangup_fd(), PollFlags::POLLIN),
            PollFd::new(self.shared.hiprio.call_fd(), PollFlags::POLLIN),
            PollFd::new(self.finished.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("cannot wait for events"),
        }
        let [signal, device, hiprio, finished] =
            fds.map(|fd| fd.revents().is_none_or(|r| !r.is_empty()));
        Ok(Ready {
            signal,
            device,
            hiprio,
            finished,
        })
    }

    /// Unmounts in a thread of its own, as this takes the workers' help and may take long.
    fn begin_unmount(&mut self) -> Result<()> {
        let mount = Arc::clone(&self.mount);
        let finished = Arc::clone(&self.finished);
        let thread = thread::Builder::new()
            .name("unmount".into())
            .spawn(move || {
                let outcome = mount.unmount();
                finished.signal();
                outcome
            })
            .context("cannot start the thread that unmounts")?;
        self.unmounting = Some(thread);
        Ok(())
    }

    /// A thread has finished: what does that mean?
    fn look_at_threads(&mut self) -> Result<Option<End>> {
        self.finished.drain();
        if let Some(thread) = self.unmounting.take_if(|thread| thread.is_finished()) {
            let clean = thread
                .join()
                .map_err(|_| anyhow!("the unmounting thread panicked"))??;
            return Ok(Some(End::Stopped(!clean)));
        }
        let ended = self.workers.iter().any(|(thread, _)| thread.is_finished());
        // While this side unmounts, the workers' end is a part of that.
        if ended && self.unmounting.is_none() {
            return Ok(Some(End::Unmounted));
        }
        Ok(None)
    }

    /// Lets all workers return. Gives the first failure, and the queue and slots of one that has ended well.
    fn stop_workers(&mut self) -> (Option<anyhow::Error>, Option<(Queue, Slots)>) {
        self.shared.stop.store(true, Ordering::Release);
        for (_, wake) in &self.workers {
            wake.signal();
        }
        let mut failure = None;
        let mut last = None;
        for (thread, _) in self.workers.drain(..) {
            match thread.join() {
                Ok((worker, Ok(()))) => last = Some(worker.into_parts()),
                Ok((_, Err(e))) => failure = failure.or(Some(anyhow::Error::new(e))),
                Err(_) => failure = failure.or(Some(anyhow!("a worker panicked"))),
            }
        }
        (failure, last)
    }

    /// Ends the session, if the kernel has not done that. The reset that follows does the same, only less gently.
    fn say_goodbye(&self, mut queue: Queue, mut slots: Slots) {
        if self.shared.destroyed.load(Ordering::Relaxed) {
            return;
        }
        let watch = Watch {
            signals: &self.signals,
            device: &self.device,
        };
        let memory = &self.shared.memory;
        if let Err(e) = session::destroy(&mut queue, &mut slots, memory, &watch) {
            eprintln!("ferry: the device did not end the session by itself, and is reset: {e:#}");
        }
    }
}

/// Which descriptors have something.
#[derive(Clone, Copy)]
struct Ready {
    signal: bool,
    device: bool,
    hiprio: bool,
    finished: bool,
}
