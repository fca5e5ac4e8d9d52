//! One worker: moves requests from its `/dev/fuse` descriptor to its virtqueue, and replies back.
//!
//! A request is read straight into memory that the device sees, and its reply written straight from there: the kernel
//! copies each byte once. Nothing is allocated after [`Worker::new`]. The worker looks at both sides in turn, spins for a
//! while when a reply is due soon, and otherwise sleeps until one of them has something.

use std::hint::spin_loop;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ferry_dataplane::fuse::abi::{FUSE_DESTROY, fuse_in_header, fuse_out_header};
use ferry_dataplane::os::eventfd::EventFd;
use ferry_shared::errno::Errno as FuseErrno;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use zerocopy::{FromZeros, IntoBytes};

use super::hiprio::{self, Hiprio};
use super::request::{self, ForgetPieces, HEAD_LEN, OUT_HEADER, Route};
use super::slots::{Pending, SlotIdx, Slots};
use crate::driver::{Completion, DmaMemory, DriverError, Queue};

/// Requests that are read before replies get their turn again.
const BATCH: usize = 32;
const EVENT_FUSE: u64 = 0;
const EVENT_CALL: u64 = 1;
const EVENT_WAKE: u64 = 2;

/// Why a worker stopped before it was told to.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkerError {
    /// The device broke the rules, or does not listen any more.
    #[error(transparent)]
    Device(#[from] DriverError),
    /// The kernel refuses to go on.
    #[error("cannot {doing}: {errno}")]
    Kernel {
        /// What was being done.
        doing: &'static str,
        /// The kernel's reason.
        errno: Errno,
    },
}

fn kernel(doing: &'static str) -> impl FnOnce(Errno) -> WorkerError {
    move |errno| WorkerError::Kernel { doing, errno }
}

/// What all workers of a mount share.
#[derive(Debug)]
pub(super) struct Shared {
    /// Memory of all requests.
    pub(super) memory: Arc<DmaMemory>,
    /// The queue for FORGET and INTERRUPT.
    pub(super) hiprio: Hiprio,
    /// All workers are to return.
    pub(super) stop: AtomicBool,
    /// The kernel has sent DESTROY itself.
    pub(super) destroyed: AtomicBool,
    /// Longest time to spin for a reply.
    pub(super) spin: Duration,
}

/// A request for the high-priority queue that has found no room there.
#[derive(Debug)]
struct Parked {
    slot: SlotIdx,
    header: fuse_in_header,
    pieces: Option<ForgetPieces>,
}

/// A worker.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    fuse: OwnedFd,
    queue: Queue,
    slots: Slots,
    wake: Arc<EventFd>,
    epoll: Epoll,
    parked: Option<Parked>,
    /// Requests of the kernel wake this worker.
    listening: bool,
    /// The kernel has ended the connection.
    ended: bool,
    spin: Spin,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        fuse: OwnedFd,
        queue: Queue,
        slots: Slots,
        wake: Arc<EventFd>,
    ) -> Result<Worker, WorkerError> {
        let doing = "make a worker's epoll";
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(kernel(doing))?;
        // Each interrupt is one event, so the counter need not be read.
        let call = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        for (fd, flags, event) in [
            (queue.call_fd(), call, EVENT_CALL),
            (wake.as_fd(), EpollFlags::EPOLLIN, EVENT_WAKE),
        ] {
            epoll
                .add(fd, EpollEvent::new(flags, event))
                .map_err(kernel(doing))?;
        }
        let spin = Spin::new(shared.spin);
        Ok(Worker {
            shared,
            fuse,
            queue,
            slots,
            wake,
            epoll,
            parked: None,
            listening: false,
            ended: false,
            spin,
        })
    }

    /// Works until the kernel ends the connection, or until it is told to stop and woken.
    pub(super) fn run(&mut self) -> Result<(), WorkerError> {
        while !self.ended && !self.shared.stop.load(Ordering::Acquire) {
            self.reply_all()?;
            let all_taken = self.take_requests()?;
            self.queue.kick()?;
            if all_taken && !self.ended {
                self.wait()?;
            }
        }
        Ok(())
    }

    /// What is left when the work is over. Requests may still be in flight.
    pub(super) fn into_parts(self) -> (Queue, Slots) {
        (self.queue, self.slots)
    }

    /// Gives finished requests back to the kernel; true if there were any.
    fn reply_all(&mut self) -> Result<bool, WorkerError> {
        let mut any = false;
        while let Some(done) = self.queue.pop()? {
            any = true;
            self.reply(done)?;
        }
        Ok(any)
    }

    fn reply(&mut self, done: Completion) -> Result<(), WorkerError> {
        let (slot, pending) = self.slots.finished(done.cookie);
        if let Some(reply) = pending.reply {
            let mut header = fuse_out_header::new_zeroed();
            self.shared.memory.read(reply, header.as_mut_bytes());
            let len = header.len as usize;
            let sound =
                (OUT_HEADER..=done.len as usize).contains(&len) && header.unique == pending.unique;
            let memory = &self.shared.memory;
            let written = match sound {
                true => memory.write_to(self.fuse.as_fd(), reply.part(0, len)),
                false => Err(Errno::EINVAL),
            };
            match written {
                Ok(_) => {}
                // The kernel does not take this reply, and still waits for one.
                Err(Errno::EINVAL) => self.answer(pending.unique, FuseErrno::EIO)?,
                Err(e) => self.write_failed(e)?,
            }
        }
        self.slots.give(slot);
        Ok(())
    }

    /// Answers a request with an error of the bridge's own.
    fn answer(&mut self, unique: u64, errno: FuseErrno) -> Result<(), WorkerError> {
        let reply = request::error_reply(unique, errno.raw());
        match nix::unistd::write(&self.fuse, reply.as_bytes()) {
            Ok(_) => Ok(()),
            Err(e) => self.write_failed(e),
        }
    }

    fn write_failed(&mut self, errno: Errno) -> Result<(), WorkerError> {
        match errno {
            // The request was interrupted, or its connection is gone: nobody waits for the reply.
            Errno::ENOENT | Errno::EINTR | Errno::EAGAIN => Ok(()),
            Errno::ENODEV | Errno::ECONNABORTED | Errno::EPERM => {
                self.ended = true;
                Ok(())
            }
            errno => Err(kernel("write a reply to /dev/fuse")(errno)),
        }
    }

    /// Reads what the kernel asks for and submits it; true if no more can be taken now.
    fn take_requests(&mut self) -> Result<bool, WorkerError> {
        if let Some(parked) = self.parked.take()
            && !self.forward_hiprio(parked)?
        {
            return Ok(true);
        }
        for _ in 0..BATCH {
            if self.parked.is_some() {
                return Ok(true);
            }
            let Some(slot) = self.slots.take() else {
                return Ok(true);
            };
            let Some(len) = self.read(slot)? else {
                self.slots.give(slot);
                return Ok(true);
            };
            self.forward(slot, len)?;
            // The device may see it while the next one is read; it is kicked at the end.
            self.queue.publish();
        }
        Ok(false)
    }

    /// Reads one request into a slot; `None`: there is none now.
    fn read(&mut self, slot: SlotIdx) -> Result<Option<usize>, WorkerError> {
        let target = self.slots.request(slot);
        loop {
            match self.shared.memory.read_from(self.fuse.as_fd(), target) {
                Ok(len) => return Ok(Some(len)),
                // ENOENT: the request was interrupted before it was read.
                Err(Errno::EINTR | Errno::ENOENT) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::ENODEV | Errno::ECONNABORTED) => {
                    self.ended = true;
                    return Ok(None);
                }
                Err(errno) => return Err(kernel("read a request from /dev/fuse")(errno)),
            }
        }
    }

    /// Sends the request of `len` bytes in `slot` where it belongs.
    fn forward(&mut self, slot: SlotIdx, len: usize) -> Result<(), WorkerError> {
        let request = self.slots.request(slot).part(0, len);
        let mut head = [0u8; HEAD_LEN];
        self.shared.memory.read(request, &mut head);
        let head = &head[..len.min(HEAD_LEN)];
        let Some(header) = request::header(head) else {
            self.slots.give(slot);
            return Ok(());
        };
        let room = match request::route(&header, head) {
            Route::Hiprio => {
                let pieces = ForgetPieces::new(&header, hiprio::LONGEST);
                let parked = Parked {
                    slot,
                    header,
                    pieces,
                };
                return self.forward_hiprio(parked).map(|_| ());
            }
            Route::Silent => 0,
            Route::Request(room) => room,
        };
        if header.opcode == FUSE_DESTROY {
            self.shared.destroyed.store(true, Ordering::Relaxed);
        }
        let Some(reply) = self.slots.reply(slot, len, room) else {
            self.slots.give(slot);
            return self.answer(header.unique, FuseErrno::EIO);
        };
        let writable = [reply];
        let writable = if room > 0 { &writable[..] } else { &[] };
        self.slots.expect(
            slot,
            Pending {
                unique: header.unique,
                reply: writable.first().copied(),
            },
        );
        self.queue
            .submit(&[request], writable, slot.cookie())
            .expect("there are no more slots than the queue holds requests");
        Ok(())
    }

    /// Sends a request to the high-priority queue and frees its slot; false: it has to wait, and is parked.
    fn forward_hiprio(&mut self, mut parked: Parked) -> Result<bool, WorkerError> {
        let request = self.slots.request(parked.slot);
        let shared = &self.shared;
        let sent = match &mut parked.pieces {
            None => {
                let whole = request.part(0, parked.header.len as usize);
                shared.hiprio.send(&parked.header, &[], whole, &self.wake)?
            }
            Some(pieces) => loop {
                let Some((head, at, bytes)) = pieces.piece() else {
                    break true;
                };
                let entries = request.part(at, bytes);
                let header = &parked.header;
                if !shared.hiprio.send(header, &head, entries, &self.wake)? {
                    break false;
                }
                pieces.advance();
            },
        };
        if sent {
            self.slots.give(parked.slot);
        } else {
            self.parked = Some(parked);
        }
        Ok(sent)
    }

    /// Nothing to do at the moment: spins if a reply is due, then sleeps.
    fn wait(&mut self) -> Result<(), WorkerError> {
        let started = Instant::now();
        if self.queue.in_flight() > 0 && !self.spin.budget.is_zero() {
            loop {
                if self.reply_all()? {
                    return Ok(());
                }
                if started.elapsed() >= self.spin.budget {
                    break;
                }
                spin_loop();
            }
        }
        self.listen_for_requests(self.parked.is_none() && self.slots.has_free())?;
        if self.queue.in_flight() > 0 && self.queue.enable_interrupts() {
            self.queue.disable_interrupts();
            return Ok(());
        }
        let mut events = [EpollEvent::empty(); 3];
        let found = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(found) => found,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(kernel("wait for requests")(errno)),
        };
        self.queue.disable_interrupts();
        for event in &events[..found] {
            match event.data() {
                EVENT_CALL => self.spin.slept(started.elapsed()),
                EVENT_WAKE => self.wake.drain(),
                _ => {}
            }
        }
        Ok(())
    }

    /// Requests wake one of the workers that listen. One that has no room for a request must not be that one.
    fn listen_for_requests(&mut self, on: bool) -> Result<(), WorkerError> {
        if on == self.listening {
            return Ok(());
        }
        let doing = "watch /dev/fuse";
        if on {
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
            self.epoll
                .add(&self.fuse, EpollEvent::new(flags, EVENT_FUSE))
                .map_err(kernel(doing))?;
        } else {
            self.epoll.delete(&self.fuse).map_err(kernel(doing))?;
        }
        self.listening = on;
        Ok(())
    }
}

/// How long to spin for a reply: as long as replies tend to take, if that is short.
#[derive(Clone, Copy, Debug)]
struct Spin {
    budget: Duration,
    max: Duration,
}

impl Spin {
    const FIRST: Duration = Duration::from_micros(5);

    fn new(max: Duration) -> Spin {
        Spin {
            budget: max.min(Spin::FIRST),
            max,
        }
    }

    /// A reply came only after the worker had gone to sleep, so long after it began to wait.
    fn slept(&mut self, waited: Duration) {
        self.budget = if waited <= self.max {
            (self.budget * 2).max(Spin::FIRST).min(self.max)
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use super::Spin;
    use std::time::Duration;

    #[test]
    fn spinning_grows_while_replies_are_quick_and_stops_when_they_are_not() {
        let max = Duration::from_micros(50);
        let mut spin = Spin::new(max);
        for _ in 0..10 {
            spin.slept(Duration::from_micros(30));
        }
        assert_eq!(spin.budget, max);
        spin.slept(Duration::from_millis(2));
        assert_eq!(spin.budget, Duration::ZERO);
        spin.slept(Duration::from_micros(30));
        assert_eq!(spin.budget, Spin::FIRST);
    }

    #[test]
    fn no_time_to_spin_means_never() {
        let mut spin = Spin::new(Duration::ZERO);
        spin.slept(Duration::from_nanos(1));
        assert_eq!(spin.budget, Duration::ZERO);
    }
}
