//! GETLK, SETLK and SETLKW.

use ferry_shared::errno::Errno;

use super::Passthrough;
use super::file::MAX_OFFSET;
use super::handle::{self, OpenFile};
use super::sys::{self, FileId};
use super::{deadlock, lock};
use crate::fsdev::Caller;
use crate::fuse::abi::*;

impl Passthrough {
    pub(super) fn do_getlk(&self, nodeid: u64, arg: &fuse_lk_in) -> Result<fuse_file_lock, Errno> {
        let file = self.handles.file(arg.fh, nodeid)?;
        let wanted = lock::to_range(&arg.lk)?;
        if wanted.kind == libc::F_UNLCK {
            return Err(Errno::EINVAL);
        }
        let found = self.locks.get(nodeid, arg.owner, wanted, file.fd())?;
        if found.kind == libc::F_UNLCK {
            return Ok(fuse_file_lock {
                type_: libc::F_UNLCK as u32,
                ..arg.lk
            });
        }
        let end = match found.len {
            0 => MAX_OFFSET,
            len => found.start.saturating_add(len).saturating_sub(1) as u64,
        };
        Ok(fuse_file_lock {
            start: found.start as u64,
            end,
            type_: found.kind as u32,
            pid: found.pid.max(0) as u32,
        })
    }

    pub(super) fn do_setlk(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_lk_in,
        wait: bool,
    ) -> Result<(), Errno> {
        let session = self.session()?;
        let file = self.handles.any(arg.fh, nodeid)?;
        let wanted = lock::to_range(&arg.lk)?;
        if arg.lk_flags & FUSE_LK_FLOCK != 0 {
            return self.do_flock(&file, wanted.kind);
        }
        if file.handle().has(handle::DIR) {
            return Err(Errno::EBADF);
        }
        let open = || {
            let node = self.inodes.get(nodeid)?;
            match self
                .inodes
                .with_fds(|| sys::reopen(node.fd(), libc::O_RDWR))
            {
                // A read-only export, or a program that is running: reading is enough for a read lock.
                Err(_) => self
                    .inodes
                    .with_fds(|| sys::reopen(node.fd(), libc::O_RDONLY)),
                opened => opened,
            }
        };
        if wanted.kind != libc::F_UNLCK {
            file.handle().set(handle::LOCKED);
        }
        let answer = self.locks.set(nodeid, arg, wanted, open);
        if wait {
            if answer == Err(Errno::EAGAIN) {
                let id = FileId::of(file.fd())?;
                deadlock::wait(&self.locks, arg.owner, caller.unique, id, wanted)?;
            } else {
                deadlock::end(&self.locks, caller.unique);
            }
        }
        answer?;
        if self.has_ended(session) {
            self.locks.drop_owner(nodeid, arg.owner);
            return Err(Errno::ENOTCONN);
        }
        Ok(())
    }

    fn do_flock(&self, file: &OpenFile<'_>, kind: i32) -> Result<(), Errno> {
        match kind {
            libc::F_UNLCK => {
                sys::flock(file.fd(), libc::LOCK_UN)?;
                lock::released();
                Ok(())
            }
            kind => {
                file.handle().set(handle::FLOCKED);
                let exclusive = kind == libc::F_WRLCK;
                // Converting a lock drops the old one first, even when the new one is refused.
                let done = sys::flock(
                    file.fd(),
                    if exclusive {
                        libc::LOCK_EX
                    } else {
                        libc::LOCK_SH
                    },
                );
                lock::released();
                if done.is_ok() {
                    file.keep_locked();
                }
                done
            }
        }
    }
}
