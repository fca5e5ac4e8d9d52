//! Watches over a mount from the main thread: signals, the device's connection, the workers, and the end of all of them.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};
use ferry_dataplane::os::eventfd::EventFd;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::kernel::{self, Mount};
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
    notes: Notes,
    received: Receiver<Note>,
    workers: Vec<(JoinHandle<Finished>, Arc<EventFd>)>,
    unmounting: bool,
}

/// What a thread has to say before it ends.
enum Note {
    /// A worker works no more.
    WorkerEnded,
    /// The outcome of [`Mount::unmount`].
    Unmounted(Result<bool>),
}

/// How a thread says it.
#[derive(Clone)]
struct Notes {
    sender: Sender<Note>,
    /// Signalled after each note.
    event: Arc<EventFd>,
}

impl Notes {
    fn send(&self, note: Note) {
        // Without a receiver the program is ending anyway.
        let _ = self.sender.send(note);
        self.event.signal();
    }
}

impl Supervisor {
    pub(super) fn new(
        shared: Arc<Shared>,
        mount: Mount,
        signals: SignalFd,
        device: Device,
    ) -> Result<Supervisor> {
        let (sender, received) = channel();
        let event = Arc::new(EventFd::new().context("cannot make an event counter")?);
        Ok(Supervisor {
            shared,
            mount: Arc::new(mount),
            signals,
            device,
            notes: Notes { sender, event },
            received,
            workers: Vec::new(),
            unmounting: false,
        })
    }

    /// Starts a worker.
    pub(super) fn spawn(&mut self, mut worker: Worker, wake: Arc<EventFd>) -> Result<()> {
        let notes = self.notes.clone();
        let thread = thread::Builder::new()
            .name(format!("mount/{}", self.workers.len() + 1))
            .spawn(move || {
                kernel::become_io_flusher();
                let outcome = worker.run();
                notes.send(Note::WorkerEnded);
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
        let (worker_failure, last) = self.stop_workers();
        let shown = self.mount.dir().display().to_string();
        let (failure, busy) = match end {
            End::Failed(error) => (worker_failure.or(Some(error)), false),
            End::Stopped(busy) => (worker_failure, busy),
            End::Unmounted => (worker_failure, false),
        };
        if let Some(error) = failure {
            self.mount.abort();
            // The device learns of it when the connection closes; it might not answer a reset.
            return Err(error.context(format!(
                "the mount at {shown} has ended and was removed; its pending requests have failed"
            )));
        }
        if busy {
            eprintln!(
                "ferry: {shown} was in use: it is unmounted, and its open files fail from now on"
            );
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
                if self.unmounting {
                    return Ok(End::Failed(anyhow!(
                        "stopped by a second signal before it was unmounted"
                    )));
                }
                self.begin_unmount()?;
            }
            if ready.note
                && let Some(end) = self.read_notes()?
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
            PollFd::new(self.notes.event.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("cannot wait for events"),
        }
        let [signal, device, hiprio, note] =
            fds.map(|fd| fd.revents().is_none_or(|r| !r.is_empty()));
        Ok(Ready {
            signal,
            device,
            hiprio,
            note,
        })
    }

    /// Unmounts in a thread of its own, as this takes the workers' help and may take long.
    fn begin_unmount(&mut self) -> Result<()> {
        let mount = Arc::clone(&self.mount);
        let notes = self.notes.clone();
        thread::Builder::new()
            .name("unmount".into())
            .spawn(move || notes.send(Note::Unmounted(mount.unmount())))
            .context("cannot start the thread that unmounts")?;
        self.unmounting = true;
        Ok(())
    }

    /// What the threads have said, if it means the end.
    fn read_notes(&mut self) -> Result<Option<End>> {
        self.notes.event.drain();
        while let Ok(note) = self.received.try_recv() {
            match note {
                Note::Unmounted(outcome) => return Ok(Some(End::Stopped(!outcome?))),
                // While this side unmounts, the workers' end is a part of that.
                Note::WorkerEnded if self.unmounting => {}
                Note::WorkerEnded => return Ok(Some(End::Unmounted)),
            }
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
    note: bool,
}
