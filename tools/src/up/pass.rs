//! Stored descriptors on their way into a new process: at the numbers and with the environment that sd_listen_fds(3)
//! expects.
#![expect(
    unsafe_code,
    reason = "descriptors change their numbers in the new process"
)]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use anyhow::Context;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::fdstore::{FIRST, FdStore, ROOM};

/// What a new process is passed.
pub(super) struct Passed {
    fds: Vec<RawFd>,
    names: String,
    address: String,
    /// Occupy every number below the last that is passed, so that the pipes of the new process are not in the way.
    _fill: Vec<OwnedFd>,
}

impl Passed {
    /// Everything that is stored.
    pub(super) fn new(store: &FdStore) -> anyhow::Result<Passed> {
        let fds: Vec<RawFd> = store.descriptors().collect();
        let floor = floor(fds.len());
        let null = File::open("/dev/null").context("cannot open /dev/null")?;
        let mut fill = Vec::new();
        loop {
            let fd = null.try_clone().context("cannot pass descriptors on")?;
            if fd.as_raw_fd() >= floor {
                break;
            }
            fill.push(fd.into());
        }
        Ok(Passed {
            fds,
            names: store.names(),
            address: store.address()?,
            _fill: fill,
        })
    }

    /// Runs in the new process, before its program.
    pub(super) fn install(&mut self) -> io::Result<()> {
        let floor = floor(self.fds.len());
        for fd in &mut self.fds {
            // SAFETY: a number of a descriptor that the store holds in this copy of its process as well.
            let old = unsafe { BorrowedFd::borrow_raw(*fd) };
            *fd = fcntl(old, FcntlArg::F_DUPFD_CLOEXEC(floor))?;
        }
        for (to, from) in (FIRST..).zip(&self.fds) {
            // SAFETY: both are numbers. What `to` was is not used in this process any more: the store's descriptors have
            // been copied, and the fill keeps anything else away from there.
            Errno::result(unsafe { libc::dup2(*from, to) })?;
        }
        set(c"LISTEN_FDS", &self.fds.len().to_string())?;
        set(c"LISTEN_FDNAMES", &self.names)?;
        set(c"LISTEN_PID", &std::process::id().to_string())?;
        set(c"FDSTORE", &ROOM.to_string())?;
        set(c"NOTIFY_SOCKET", &self.address)
    }
}

/// Sets a variable in the environment of the new program.
fn set(name: &CStr, value: &str) -> io::Result<()> {
    let value = CString::new(value)?;
    // Not by the standard library, which holds its lock on the environment while it starts a process.
    // SAFETY: this process has one thread, and both strings are terminated.
    Errno::result(unsafe { libc::setenv(name.as_ptr(), value.as_ptr(), 1) })?;
    Ok(())
}

fn floor(count: usize) -> RawFd {
    FIRST.saturating_add(RawFd::try_from(count).unwrap_or(RawFd::MAX))
}
