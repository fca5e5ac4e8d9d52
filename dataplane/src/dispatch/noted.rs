//! Requests that must not be executed twice: what an earlier execution has left is taken back, or not done again.

use ferry_shared::errno::Errno;

use super::{Call, Outcome};
use crate::fsdev::FsDev;
use crate::fuse::abi::{
    FUSE_BATCH_FORGET, FUSE_CREATE, FUSE_FORGET, FUSE_LINK, FUSE_LOOKUP, FUSE_MKDIR, FUSE_MKNOD,
    FUSE_OPEN, FUSE_OPENDIR, FUSE_RELEASE, FUSE_RELEASEDIR, FUSE_REMOVEXATTR, FUSE_RENAME,
    FUSE_RENAME2, FUSE_RMDIR, FUSE_SETXATTR, FUSE_SYMLINK, FUSE_TMPFILE, FUSE_UNLINK, FUSE_WRITE,
    fuse_entry_out, fuse_forget_one, fuse_in_header, fuse_open_out, fuse_release_in,
};
use crate::fuse::parse::BatchForget;
use crate::fuse::session::Session;
use crate::mem::Segments;
use crate::recovery::journal::{Journal, Place};
use zerocopy::IntoBytes;

/// Whether an operation notes what it does.
fn is_noted(opcode: u32) -> bool {
    matches!(
        opcode,
        FUSE_LOOKUP
            | FUSE_FORGET
            | FUSE_BATCH_FORGET
            | FUSE_SYMLINK
            | FUSE_MKNOD
            | FUSE_MKDIR
            | FUSE_UNLINK
            | FUSE_RMDIR
            | FUSE_RENAME
            | FUSE_RENAME2
            | FUSE_LINK
            | FUSE_OPEN
            | FUSE_CREATE
            | FUSE_TMPFILE
            | FUSE_WRITE
            | FUSE_RELEASE
            | FUSE_OPENDIR
            | FUSE_RELEASEDIR
            | FUSE_SETXATTR
            | FUSE_REMOVEXATTR
    )
}

/// The notes of a request.
pub(super) fn journal<'a>(
    session: &Session,
    header: &fuse_in_header,
    line: Option<Place<'a>>,
) -> Journal<'a> {
    let line = line.filter(|_| is_noted(header.opcode));
    Journal::new(line, session.epoch(), header.unique, header.opcode)
}

impl<F: FsDev> Call<'_, F> {
    /// Takes back the lookup and the handle that an earlier execution got for a reply that the guest has not seen.
    pub(super) fn take_back(&self, opcode: u32) {
        let journal = &self.caller.journal;
        let counts = !matches!(opcode, FUSE_FORGET | FUSE_BATCH_FORGET);
        if !journal.is_on() || !counts || !journal.is_resumed() {
            return;
        }
        let node = journal.take_counted();
        if let Some(fh) = journal.take_opened() {
            let arg = fuse_release_in {
                fh,
                ..Default::default()
            };
            // It may be gone already, if that crash came in the middle of this.
            let _ = match opcode {
                FUSE_OPENDIR => self.fs.releasedir(&self.caller, self.nodeid, &arg),
                FUSE_OPEN => self.fs.release(&self.caller, self.nodeid, &arg),
                _ => self.fs.release(&self.caller, node.unwrap_or(0), &arg),
            };
        }
        if let Some(node) = node {
            self.fs.forget(node, 1);
        }
    }

    pub(super) fn entry(&self, entry: fuse_entry_out) -> fuse_entry_out {
        self.caller.journal.counted(entry.nodeid);
        entry
    }

    pub(super) fn opened(&self, open: fuse_open_out) -> fuse_open_out {
        self.caller.journal.opened(open.fh);
        open
    }

    pub(super) fn both(
        &self,
        (entry, open): (fuse_entry_out, fuse_open_out),
    ) -> (fuse_entry_out, fuse_open_out) {
        (self.entry(entry), self.opened(open))
    }

    /// Ends a handle; one that an earlier execution has ended is ended.
    pub(super) fn end(&self, release: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        let journal = &self.caller.journal;
        let again = journal.is_resumed();
        journal.begin([0; _]);
        match release() {
            Err(Errno::EBADF) if again => Ok(()),
            other => other,
        }
    }

    pub(super) fn forget(&self, nlookup: u64) -> Outcome {
        let journal = &self.caller.journal;
        if journal.steps() == 0 {
            journal.set_steps(1);
            self.fs.forget(self.nodeid, nlookup);
        }
        Outcome::Done(0)
    }

    pub(super) fn batch_forget(&self, batch: BatchForget, data: Segments<'_>) -> Outcome {
        const STEP: usize = size_of::<fuse_forget_one>();
        let journal = &self.caller.journal;
        let done = journal.steps();
        let mut data = data;
        for number in 0..u64::from(batch.count) {
            let mut one = fuse_forget_one::default();
            if data.read(one.as_mut_bytes()) < STEP {
                break;
            }
            data = data.after(STEP);
            if number >= done {
                journal.set_steps(number.saturating_add(1));
                self.fs.forget(one.nodeid, one.nlookup);
            }
        }
        Outcome::Done(0)
    }
}
