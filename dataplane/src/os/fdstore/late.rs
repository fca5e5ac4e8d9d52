//! Messages that the service manager did not take at once, for a thread that can wait.
//!
//! A core hands them over here and goes on. While there are any, all that come after them join them, for what is said of a
//! name must arrive in order.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex};

use super::{Manager, lock};

type Message = (String, Option<OwnedFd>);

/// The messages, the one that is being sent first.
#[derive(Debug, Default)]
pub(super) struct Late {
    messages: Mutex<VecDeque<Arc<Message>>>,
    more: Condvar,
}

impl Late {
    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        lock(&self.messages).is_empty()
    }

    pub(super) fn add(&self, message: Message) {
        lock(&self.messages).push_back(Arc::new(message));
        self.more.notify_one();
    }

    /// Starts the thread that sends them. It ends with the process; without it they are lost, as is said.
    pub(super) fn start(self: &Arc<Self>, manager: &Arc<Manager>) {
        let (late, manager) = (Arc::clone(self), Arc::clone(manager));
        let thread = std::thread::Builder::new().name("ferry-fdstore".to_owned());
        if let Err(error) = thread.spawn(move || late.send_all(&manager)) {
            tracing::warn!(%error, "no thread to wait for the service manager: a crash may lose connections");
        }
    }

    fn send_all(&self, manager: &Manager) {
        let mut messages = lock(&self.messages);
        loop {
            let Some(message) = messages.front().map(Arc::clone) else {
                messages = self
                    .more
                    .wait(messages)
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                continue;
            };
            drop(messages);
            let (text, fd) = &*message;
            let fd = fd.as_ref().map(AsFd::as_fd);
            let sent = manager.send(text, fd, true);
            messages = lock(&self.messages);
            // What will never be taken must not keep back the rest.
            if !matches!(sent, Err(nix::errno::Errno::EAGAIN)) {
                messages.pop_front();
            }
        }
    }
}
