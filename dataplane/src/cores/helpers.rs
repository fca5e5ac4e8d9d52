//! The helper threads: run requests that may block, so that a core never does.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::{CoreMailbox, CoreMessage};
use crate::reactor::{Backend, Job};

/// A job and where its outcome goes.
pub(super) struct HelperJob<B> {
    pub(super) slot: u32,
    pub(super) job: Job<B>,
    pub(super) core: Arc<CoreMailbox<B>>,
}

/// The helper threads' common queue.
pub(super) struct Helpers<B> {
    jobs: Mutex<(VecDeque<HelperJob<B>>, bool)>,
    wake: Condvar,
}

impl<B: Backend> Helpers<B> {
    pub(super) fn new(capacity: usize) -> Helpers<B> {
        let jobs = VecDeque::with_capacity(capacity);
        Helpers {
            jobs: Mutex::new((jobs, false)),
            wake: Condvar::new(),
        }
    }

    pub(super) fn post(&self, job: HelperJob<B>) {
        self.jobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .push_back(job);
        self.wake.notify_one();
    }

    pub(super) fn close(&self) {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.wake.notify_all();
    }

    pub(super) fn work(&self) {
        loop {
            let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            let next = loop {
                if let Some(job) = jobs.0.pop_front() {
                    break job;
                }
                if jobs.1 {
                    return;
                }
                jobs = self.wake.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            };
            drop(jobs);
            let outcome = next.job.run();
            next.core.post(CoreMessage::Offloaded {
                slot: next.slot,
                outcome,
            });
        }
    }
}
