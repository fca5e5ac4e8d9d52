//! Requests that must not be executed twice: what an earlier execution has left is taken back, or not done again.

use ferry_shared::errno::Errno;

use super::{Call, Outcome};
use crate::fsdev::{DirSink, FsDev};
use crate::fuse::abi::{
    FUSE_BATCH_FORGET, FUSE_CREATE, FUSE_FORGET, FUSE_LINK, FUSE_LOOKUP, FUSE_MKDIR, FUSE_MKNOD,
    FUSE_OPEN, FUSE_OPENDIR, FUSE_READDIRPLUS, FUSE_RELEASE, FUSE_RELEASEDIR, FUSE_REMOVEXATTR,
    FUSE_RENAME, FUSE_RENAME2, FUSE_RMDIR, FUSE_SETXATTR, FUSE_SYMLINK, FUSE_TMPFILE, FUSE_UNLINK,
    FUSE_WRITE, fuse_direntplus, fuse_entry_out, fuse_forget_one, fuse_in_header, fuse_open_out,
    fuse_release_in,
};
use crate::fuse::parse::BatchForget;
use crate::fuse::reply::Listing;
use crate::fuse::session::Session;
use crate::mem::Segments;
use crate::recovery::journal::{Journal, Place};
use zerocopy::{FromBytes, IntoBytes};

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
            | FUSE_READDIRPLUS
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
        let counts = !matches!(opcode, FUSE_FORGET | FUSE_BATCH_FORGET | FUSE_READDIRPLUS);
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

    /// Lists a directory with its lookups. Those that an earlier execution has counted for the entries with which this listing
    /// begins are taken back; for others, because the directory has changed meanwhile, they stay until the mount ends.
    pub(super) fn list(
        &self,
        mut listing: Listing<'_>,
        fill: impl FnOnce(&mut dyn DirSink) -> Result<(), Errno>,
    ) -> Result<u32, Errno> {
        let journal = &self.caller.journal;
        let before = Tally(match journal.is_resumed() {
            true => journal.steps(),
            false => 0,
        });
        if before != Tally(0) {
            journal.set_steps(0);
        }
        let mut sink = Counted {
            listing: &mut listing,
            journal,
            before,
            now: Tally(0),
            met: false,
        };
        fill(&mut sink)?;
        let (now, met) = (sink.now, sink.met);
        let bytes = listing.finish()?;
        if met {
            self.forget_listed(bytes, before.count());
            journal.set_steps(now.0);
        }
        Ok(self.reply.bytes(bytes))
    }

    fn forget_listed(&self, listed: &[u8], count: u64) {
        let (mut rest, mut left) = (listed, count);
        while let Ok((record, _)) = fuse_direntplus::read_from_prefix(rest) {
            if left == 0 {
                break;
            }
            if record.entry_out.nodeid != 0 {
                self.fs.forget(record.entry_out.nodeid, 1);
                left = left.saturating_sub(1);
            }
            let len = size_of::<fuse_direntplus>()
                .saturating_add(record.dirent.namelen as usize)
                .next_multiple_of(8);
            rest = rest.get(len..).unwrap_or_default();
        }
    }
}

/// How many nodes a listing has counted, and a hash of which, in one word that is noted with one store.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Tally(u64);

impl Tally {
    const COUNT: u64 = 0xffff;

    fn count(self) -> u64 {
        self.0 & Tally::COUNT
    }

    fn and(self, nodeid: u64) -> Tally {
        let count = self.count().saturating_add(1).min(Tally::COUNT);
        let hash = (self.0 ^ nodeid).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Tally(hash & !Tally::COUNT | count)
    }
}

/// A listing whose lookups are noted one by one.
struct Counted<'a, 'l> {
    listing: &'a mut Listing<'l>,
    journal: &'a Journal<'a>,
    /// What an earlier execution has counted, and what this one has.
    before: Tally,
    now: Tally,
    /// This one has been where that one ended.
    met: bool,
}

impl DirSink for Counted<'_, '_> {
    fn entry(&mut self, name: &[u8], ino: u64, off: u64, kind: u32) -> bool {
        self.listing.entry(name, ino, off, kind)
    }

    fn fits_plus(&self, name_len: usize) -> bool {
        self.listing.fits_plus(name_len)
    }

    fn entry_plus(&mut self, name: &[u8], off: u64, kind: u32, entry: &fuse_entry_out) -> bool {
        let added = self.listing.entry_plus(name, off, kind, entry);
        if added && entry.nodeid != 0 {
            self.now = self.now.and(entry.nodeid);
            self.met |= self.now == self.before;
            if self.before == Tally(0) {
                self.journal.set_steps(self.now.0);
            }
        }
        added
    }
}
