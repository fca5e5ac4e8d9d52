//! One virtqueue as its user sees it: a ring, the way to kick the device, and the counter of its interrupts.
//!
//! A queue belongs to one thread at a time and can move between threads.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use ferry_dataplane::os::eventfd::EventFd;

use super::error::{DriverError, Result};
use super::memory::DmaSlice;
use super::ring::{Completion, Ring, SubmitError};
use super::vfio_user::Doorbell;

/// How the device is told of new requests.
#[derive(Debug)]
pub(super) enum Kick {
    /// By an event counter.
    Event(EventFd),
    /// By a message that writes to the device's notification area.
    Doorbell(Doorbell),
}

/// A running virtqueue.
#[derive(Debug)]
pub struct Queue {
    index: u16,
    ring: Ring,
    kick: Kick,
    call: Arc<EventFd>,
}

impl Queue {
    pub(super) fn new(index: u16, ring: Ring, kick: Kick, call: Arc<EventFd>) -> Queue {
        Queue {
            index,
            ring,
            kick,
            call,
        }
    }

    /// Its number in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Requests that have been submitted and not yet taken back.
    pub fn in_flight(&self) -> u16 {
        self.ring.in_flight()
    }

    /// How many requests of `pieces` pieces it can hold.
    pub fn depth(&self, pieces: u16) -> u16 {
        self.ring.depth(pieces)
    }

    /// Puts a request into the ring. The pieces must stay untouched until its completion, which carries `cookie`. The
    /// device is not told before [`Queue::publish`] or [`Queue::kick`], so that several requests can go in one batch.
    pub fn submit(
        &mut self,
        readable: &[DmaSlice],
        writable: &[DmaSlice],
        cookie: u64,
    ) -> std::result::Result<(), SubmitError> {
        self.ring.submit(readable, writable, cookie)
    }

    /// Lets a device that polls see what was submitted.
    pub fn publish(&mut self) {
        self.ring.publish();
    }

    /// Publishes what was submitted and kicks the device, unless it does not want that.
    pub fn kick(&mut self) -> Result<()> {
        self.ring.publish();
        if !self.ring.needs_kick() {
            return Ok(());
        }
        match &self.kick {
            Kick::Event(event) => {
                event.signal();
                Ok(())
            }
            Kick::Doorbell(doorbell) => doorbell.ring(self.ring.position()),
        }
    }

    /// Takes the next finished request, if there is one.
    pub fn pop(&mut self) -> Result<Option<Completion>> {
        self.ring.pop().map_err(|broken| DriverError::Ring {
            queue: self.index,
            broken,
        })
    }

    /// Asks for an interrupt at the next completion, to be found as [`Queue::call_fd`] becoming readable. True: there is
    /// a completion already; do not wait.
    pub fn enable_interrupts(&mut self) -> bool {
        self.ring.enable_interrupts()
    }

    /// Undoes [`Queue::enable_interrupts`]; one more interrupt may come.
    pub fn disable_interrupts(&mut self) {
        self.ring.disable_interrupts();
    }

    /// Takes the interrupts that have come.
    pub fn drain_interrupts(&mut self) {
        self.call.drain();
    }

    /// Readable after an interrupt.
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }
}
