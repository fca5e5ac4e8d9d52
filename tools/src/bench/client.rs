//! A FUSE client over one virtqueue: requests of which one at a time is in flight, to set a run up and to clean up after it.

use std::ffi::CStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferry_dataplane::fuse::abi::*;
use zerocopy::{FromBytes, IntoBytes};

use super::slot::{Answer, Request, Slot};
use crate::driver::{DmaMemory, Queue};

/// How long a device may take for one request.
const PATIENCE: Duration = Duration::from_secs(30);
/// What a Linux guest of today offers that concerns the operations measured here.
const OFFERED: u64 = FUSE_ASYNC_READ
    | FUSE_POSIX_LOCKS
    | FUSE_ATOMIC_O_TRUNC
    | FUSE_BIG_WRITES
    | FUSE_DONT_MASK
    | FUSE_AUTO_INVAL_DATA
    | FUSE_DO_READDIRPLUS
    | FUSE_READDIRPLUS_AUTO
    | FUSE_ASYNC_DIO
    | FUSE_PARALLEL_DIROPS
    | FUSE_MAX_PAGES
    | FUSE_HANDLE_KILLPRIV_V2
    | FUSE_INIT_EXT;
const MINOR: u32 = 38;

/// What a device has answered, unless it has failed: an error number.
pub(super) type Reply<T> = std::result::Result<T, i32>;

/// A device that answers, and a slot for requests to it.
pub(super) struct Client<'a> {
    pub(super) memory: &'a Arc<DmaMemory>,
    pub(super) queue: &'a mut Queue,
    pub(super) slot: Slot,
}

impl Client<'_> {
    /// Sends one request and waits; the bytes after the reply's header are then in the slot.
    pub(super) fn call(&mut self, request: &Request<'_>) -> Result<Reply<u32>> {
        self.slot.send(self.memory, self.queue, request, 0)?;
        self.queue.kick()?;
        let deadline = Instant::now() + PATIENCE;
        let done = loop {
            if let Some(done) = self.queue.pop()? {
                break done;
            }
            if Instant::now() > deadline {
                bail!("the device has not answered for {} s", PATIENCE.as_secs());
            }
            std::thread::yield_now();
        };
        // Nothing is expected, or a device is as silent at DESTROY as virtiofsd is.
        if matches!(request.answer, Answer::None) || done.len == 0 && request.opcode == FUSE_DESTROY
        {
            return Ok(Ok(0));
        }
        let header = self.slot.header(self.memory);
        ensure!(header.len == done.len, "a reply of the wrong length");
        Ok(match header.error {
            0 => Ok(header.len - size_of::<fuse_out_header>() as u32),
            error => Err(-error),
        })
    }

    /// As [`Client::call`], for what must succeed and is answered with a `T`.
    fn must<T: FromBytes + IntoBytes>(&mut self, what: &str, request: &Request<'_>) -> Result<T> {
        match self.call(request)? {
            Ok(_) => Ok(self.slot.payload(self.memory)),
            Err(errno) => Err(std::io::Error::from_raw_os_error(errno))
                .with_context(|| format!("the device refuses {what}")),
        }
    }

    /// Begins the session; returns the largest WRITE that it allows.
    pub(super) fn init(&mut self) -> Result<u32> {
        let arg = fuse_init_in {
            major: FUSE_KERNEL_VERSION,
            minor: MINOR,
            max_readahead: 1 << 20,
            flags: OFFERED as u32,
            flags2: (OFFERED >> 32) as u32,
            unused: [0; 11],
        };
        let request = Request::new(FUSE_INIT, 0, arg.as_bytes()).answered::<fuse_init_out>();
        let out: fuse_init_out = self.must("INIT", &request)?;
        ensure!(
            out.major == FUSE_KERNEL_VERSION,
            "it speaks FUSE {}",
            out.major
        );
        Ok(out.max_write)
    }

    /// Ends the session.
    pub(super) fn destroy(&mut self) -> Result<()> {
        let request = Request::new(FUSE_DESTROY, 0, &[]).answered::<()>();
        self.must("DESTROY", &request)
    }

    pub(super) fn lookup(&mut self, dir: u64, name: &CStr) -> Result<Reply<fuse_entry_out>> {
        let request =
            Request::new(FUSE_LOOKUP, dir, name.to_bytes_with_nul()).answered::<fuse_entry_out>();
        let found = self.call(&request)?;
        Ok(found.map(|_| self.slot.payload(self.memory)))
    }

    /// The directory of that name, made if it is missing; `None` where nothing can be made.
    pub(super) fn directory(&mut self, dir: u64, name: &CStr) -> Result<Option<u64>> {
        match self.lookup(dir, name)? {
            Ok(entry) if entry.nodeid != 0 => return Ok(Some(entry.nodeid)),
            Ok(_) | Err(libc::ENOENT) => {}
            Err(errno) => bail!("LOOKUP fails with error number {errno}"),
        }
        let arg = fuse_mkdir_in {
            mode: 0o755,
            umask: 0o022,
        };
        let args = [arg.as_bytes(), name.to_bytes_with_nul()].concat();
        let request = Request::new(FUSE_MKDIR, dir, &args).answered::<fuse_entry_out>();
        match self.call(&request)? {
            Ok(_) => {
                let entry: fuse_entry_out = self.slot.payload(self.memory);
                Ok(Some(entry.nodeid))
            }
            Err(libc::EROFS) => Ok(None),
            Err(errno) => bail!("MKDIR fails with error number {errno}"),
        }
    }

    /// The file of that name, made with `size` bytes if it is missing or shorter.
    pub(super) fn file(&mut self, dir: u64, name: &CStr, size: u64) -> Result<u64> {
        match self.lookup(dir, name)? {
            Ok(entry) if entry.nodeid != 0 && entry.attr.size >= size => return Ok(entry.nodeid),
            Ok(_) | Err(libc::ENOENT) => {}
            Err(errno) => bail!("LOOKUP fails with error number {errno}"),
        }
        let arg = fuse_create_in {
            flags: libc::O_RDWR as u32,
            mode: libc::S_IFREG | 0o644,
            umask: 0o022,
            open_flags: 0,
        };
        let args = [arg.as_bytes(), name.to_bytes_with_nul()].concat();
        let request = Request::new(FUSE_CREATE, dir, &args).answered::<Created>();
        let created: Created = self.must("CREATE", &request)?;
        let (nodeid, fh) = (created.entry.nodeid, created.open.fh);
        let block = u64::from(self.slot.data_len());
        for offset in (0..size).step_by(block.max(1) as usize) {
            let len = block.min(size - offset) as u32;
            let arg = write_in(fh, offset, len);
            let mut request = Request::new(FUSE_WRITE, nodeid, arg.as_bytes());
            request.data = len;
            let out: fuse_write_out = self.must("WRITE", &request.answered::<fuse_write_out>())?;
            ensure!(out.size == len, "a short WRITE");
        }
        self.release(FUSE_RELEASE, nodeid, fh)?;
        Ok(nodeid)
    }

    /// OPEN or OPENDIR; gives the handle.
    pub(super) fn open(&mut self, opcode: u32, nodeid: u64, flags: i32) -> Result<u64> {
        let arg = fuse_open_in {
            flags: flags as u32,
            open_flags: 0,
        };
        let request = Request::new(opcode, nodeid, arg.as_bytes()).answered::<fuse_open_out>();
        let out: fuse_open_out = self.must("OPEN", &request)?;
        Ok(out.fh)
    }

    /// RELEASE or RELEASEDIR.
    pub(super) fn release(&mut self, opcode: u32, nodeid: u64, fh: u64) -> Result<()> {
        let arg = release_in(fh);
        self.must(
            "RELEASE",
            &Request::new(opcode, nodeid, arg.as_bytes()).answered::<()>(),
        )
    }

    pub(super) fn forget(&mut self, nodeid: u64, nlookup: u64) -> Result<()> {
        let arg = fuse_forget_in { nlookup };
        let done = self.call(&Request::new(FUSE_FORGET, nodeid, arg.as_bytes()))?;
        done.map(|_| ())
            .map_err(|errno| anyhow::anyhow!("FORGET fails with error number {errno}"))
    }
}

/// The reply to CREATE.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, zerocopy::Immutable)]
#[repr(C)]
pub(super) struct Created {
    pub(super) entry: fuse_entry_out,
    pub(super) open: fuse_open_out,
}

pub(super) fn write_in(fh: u64, offset: u64, size: u32) -> fuse_write_in {
    fuse_write_in {
        fh,
        offset,
        size,
        flags: libc::O_RDWR as u32,
        ..fuse_write_in::default()
    }
}

pub(super) fn read_in(fh: u64, offset: u64, size: u32) -> fuse_read_in {
    fuse_read_in {
        fh,
        offset,
        size,
        flags: libc::O_RDWR as u32,
        ..fuse_read_in::default()
    }
}

pub(super) fn release_in(fh: u64) -> fuse_release_in {
    fuse_release_in {
        fh,
        flags: libc::O_RDWR as u32,
        ..fuse_release_in::default()
    }
}
