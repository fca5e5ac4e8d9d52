//! The high-priority queue: FORGET, BATCH_FORGET and INTERRUPT from all workers.
//!
//! These requests are short and rare against the others, so the workers share the queue behind a lock and copy their
//! requests to its own buffers. When it is full a worker keeps its request and is woken when there is room.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_dataplane::fuse::abi::{FUSE_INTERRUPT, fuse_in_header};
use ferry_dataplane::os::eventfd::EventFd;

use super::request::OUT_HEADER;
use crate::driver::{DmaMemory, DmaSlice, Queue, Result};

/// The longest request that goes here in one piece.
pub(super) const LONGEST: usize = 4096;
const SLOT_LEN: usize = LONGEST + OUT_HEADER;
const SLOT_ALIGN: usize = 64;
/// In a cookie: the request is an INTERRUPT, which may be answered.
const ANSWERED: u64 = 1 << 16;

/// The queue and its buffers.
#[derive(Debug)]
pub(super) struct Hiprio {
    call: OwnedFd,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    memory: Arc<DmaMemory>,
    /// For answers to INTERRUPT.
    fuse: OwnedFd,
    queue: Queue,
    slots: Box<[DmaSlice]>,
    free: Vec<u16>,
    /// Workers that wait for room.
    waiting: Vec<Arc<EventFd>>,
    /// INTERRUPTs in flight, whose answers should not lie about.
    answers: u16,
}

impl Hiprio {
    /// Bytes of memory that [`Hiprio::new`] takes for a queue of so many requests.
    pub(super) fn memory_needed(depth: usize) -> usize {
        (depth + 1) * SLOT_LEN.next_multiple_of(SLOT_ALIGN)
    }

    /// Takes the queue over; `workers` may wait for it. `None` when the memory is too small.
    pub(super) fn new(
        memory: &Arc<DmaMemory>,
        queue: Queue,
        fuse: OwnedFd,
        call: OwnedFd,
        workers: usize,
    ) -> Option<Hiprio> {
        let depth = queue.depth(2);
        let slots: Option<Box<[DmaSlice]>> = (0..depth)
            .map(|_| memory.alloc(SLOT_LEN, SLOT_ALIGN))
            .collect();
        let inner = Inner {
            memory: Arc::clone(memory),
            fuse,
            queue,
            slots: slots?,
            free: (0..depth).collect(),
            waiting: Vec::with_capacity(workers),
            answers: 0,
        };
        Some(Hiprio {
            call,
            inner: Mutex::new(inner),
        })
    }

    /// Sends a request that consists of `head` and the bytes of `rest`, together at most [`LONGEST`]. False: there is no
    /// room, and `wake` will be signalled when there is.
    pub(super) fn send(
        &self,
        header: &fuse_in_header,
        head: &[u8],
        rest: DmaSlice,
        wake: &Arc<EventFd>,
    ) -> Result<bool> {
        let mut inner = self.lock();
        inner.reap()?;
        if inner.free.is_empty() {
            if !inner.waiting.iter().any(|other| Arc::ptr_eq(other, wake)) {
                inner.waiting.push(Arc::clone(wake));
            }
            inner.listen()?;
            // If room has come meanwhile, `wake` has been signalled.
            return Ok(false);
        }
        inner.submit(header.opcode == FUSE_INTERRUPT, head, rest)?;
        Ok(true)
    }

    /// To be called when [`Hiprio::call_fd`] is readable.
    pub(super) fn interrupted(&self) -> Result<()> {
        let mut inner = self.lock();
        inner.queue.drain_interrupts();
        inner.queue.disable_interrupts();
        inner.reap()?;
        inner.listen()
    }

    /// Readable when finished requests are to be looked at.
    pub(super) fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn submit(&mut self, answered: bool, head: &[u8], rest: DmaSlice) -> Result<()> {
        let Some(slot) = self.free.pop() else {
            return Ok(());
        };
        let buffer = self.slots[usize::from(slot)];
        self.memory.write(buffer, head);
        self.memory.copy(rest, buffer.after(head.len()));
        let request = [buffer.part(0, head.len() + rest.len())];
        let answer = [buffer.after(LONGEST)];
        let (writable, mark) = if answered {
            (&answer[..], ANSWERED)
        } else {
            (&[][..], 0)
        };
        self.queue
            .submit(&request, writable, u64::from(slot) | mark)
            .expect("there are no more slots than the queue holds requests");
        self.queue.kick()?;
        if answered {
            self.answers += 1;
            self.listen()?;
        }
        Ok(())
    }

    /// Takes what is finished, and wakes the workers if there is room now.
    fn reap(&mut self) -> Result<()> {
        while let Some(done) = self.queue.pop()? {
            let slot = (done.cookie & !ANSWERED) as u16;
            if done.cookie & ANSWERED != 0 {
                self.answers -= 1;
                if done.len as usize == OUT_HEADER {
                    let answer = self.slots[usize::from(slot)].after(LONGEST);
                    // The request that was to be interrupted may have ended: then nobody wants to know.
                    let _ = self.memory.write_to(self.fuse.as_fd(), answer);
                }
            }
            self.free.push(slot);
        }
        if !self.free.is_empty() {
            for wake in self.waiting.drain(..) {
                wake.signal();
            }
        }
        Ok(())
    }

    /// Asks for interrupts if somebody waits for what is in flight.
    fn listen(&mut self) -> Result<()> {
        while (!self.waiting.is_empty() || self.answers > 0) && self.queue.enable_interrupts() {
            self.reap()?;
        }
        Ok(())
    }
}
