//! Where a simulated process dies, and which bug it has.
//!
//! Code whose stores outlive the process tells [`store`] of each one beforehand. When the process is to die there, it unwinds;
//! whoever simulates it drops what it had, and starts another one on what is left.

use core::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Mistakes that a process can be given, to see that the simulation finds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// A request's facts are noted after the phase that says that they are there.
    FactsLate,
    /// A request is dropped from the in-flight record before its answer is shown.
    ClearedEarly,
    /// Some requests that are popped do not get into the in-flight record.
    EntrySkipped,
    /// A FORGET does not note that it is done.
    ForgetDoubled,
    /// What an earlier execution has left is not looked at.
    IntentIgnored,
}

/// What a process unwinds with.
struct Died;

std::thread_local! {
    static LEFT: Cell<u64> = const { Cell::new(0) };
    static BUG: Cell<Option<Bug>> = const { Cell::new(None) };
    static SKIPS: Cell<u32> = const { Cell::new(0) };
}

/// The process dies before so many more stores; 0: it lives.
pub(crate) fn arm(stores: u64) {
    LEFT.set(stores);
}

/// Gives the processes of this thread a bug.
pub(crate) fn give(bug: Option<Bug>) {
    BUG.set(bug);
}

/// Whether they have this bug.
pub(crate) fn has(bug: Bug) -> bool {
    BUG.get() == Some(bug)
}

/// As [`has`], one time in eight.
pub(crate) fn has_rarely(bug: Bug) -> bool {
    if !has(bug) {
        return false;
    }
    SKIPS.set(SKIPS.get().wrapping_add(1));
    SKIPS.get().is_multiple_of(8)
}

/// The next thing is a store that outlives the process.
pub(crate) fn store() {
    match LEFT.get() {
        0 => {}
        1 => {
            LEFT.set(0);
            resume_unwind(Box::new(Died));
        }
        left => LEFT.set(left - 1),
    }
}

/// Runs what may die; `None` if it did.
pub(super) fn survive<R>(what: impl FnOnce() -> R) -> Option<R> {
    match catch_unwind(AssertUnwindSafe(what)) {
        Ok(done) => Some(done),
        Err(cause) if cause.is::<Died>() => None,
        Err(cause) => resume_unwind(cause),
    }
}
