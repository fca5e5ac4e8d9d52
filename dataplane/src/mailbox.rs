//! Messages to a core, and the core's answers to the management thread.
//!
//! Senders post and wake; the receiver takes all at once. A mailbox has room for everything that can be under way, so it
//! does not grow while serving.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

use nix::errno::Errno;

use crate::os::eventfd::EventFd;

/// A queue of messages with one receiver.
#[derive(Debug)]
pub struct Mailbox<M> {
    messages: Mutex<VecDeque<M>>,
    count: AtomicUsize,
    asleep: AtomicBool,
    wake: EventFd,
}

impl<M> Mailbox<M> {
    /// An empty mailbox with room for `capacity` messages.
    pub fn new(capacity: usize) -> Result<Mailbox<M>, Errno> {
        Ok(Mailbox {
            messages: Mutex::new(VecDeque::with_capacity(capacity)),
            count: AtomicUsize::new(0),
            asleep: AtomicBool::new(false),
            wake: EventFd::new()?,
        })
    }

    fn messages(&self) -> std::sync::MutexGuard<'_, VecDeque<M>> {
        // A poisoned lock means that a sender panicked between two pushes; the queue itself is whole.
        self.messages
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Posts a message, and wakes the receiver if it sleeps.
    pub fn post(&self, message: M) {
        {
            let mut messages = self.messages();
            messages.push_back(message);
            self.count.store(messages.len(), Ordering::Relaxed);
        }
        // Pairs with the fence in `prepare_sleep`: either this thread sees `asleep`, or the receiver sees the count.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) {
            self.wake.signal();
        }
    }

    /// Whether there may be messages; costs one load.
    pub fn has_messages(&self) -> bool {
        self.count.load(Ordering::Relaxed) != 0
    }

    /// Takes the oldest message.
    pub fn take(&self) -> Option<M> {
        if !self.has_messages() {
            return None;
        }
        let mut messages = self.messages();
        let message = messages.pop_front();
        self.count.store(messages.len(), Ordering::Relaxed);
        message
    }

    /// The receiver is about to sleep on [`Mailbox::as_raw_fd`]; `false` when it must not, because there are messages.
    pub fn prepare_sleep(&self) -> bool {
        self.asleep.store(true, Ordering::Relaxed);
        // Pairs with the fence in `post`.
        fence(Ordering::SeqCst);
        if self.has_messages() {
            self.asleep.store(false, Ordering::Relaxed);
            return false;
        }
        true
    }

    /// The receiver is awake again.
    pub fn awake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Takes the wake-ups, after the descriptor has been readable.
    pub fn drain(&self) {
        self.wake.drain();
    }
}

impl<M> AsFd for Mailbox<M> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl<M> AsRawFd for Mailbox<M> {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}
