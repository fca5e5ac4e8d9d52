//! The same operations straight on the export's directory, by system calls of one thread: what a server is measured against.
// UNSAFETY: system calls that no safe wrapper has (statx by descriptor and by name), and io_uring, with buffers of its own.
#![expect(
    unsafe_code,
    reason = "statx, getdents64 and io_uring take raw addresses"
)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use io_uring::{IoUring, opcode, types::Fd};
use nix::time::{ClockId, clock_gettime};

use super::drive::{Random, Sample};
use super::pin;
use super::target::{DIR, LIST_DIR, Layout};
use super::work::{Kind, Work};

/// How data operations are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// One system call each.
    Calls,
    /// As many at a time as the depth says, through io_uring.
    Ring,
}

/// A directory that a run has prepared through a device.
pub(super) struct RawTarget {
    path: PathBuf,
    layout: Layout,
    way: Way,
    /// Where the server runs.
    cpu: Option<usize>,
}

impl RawTarget {
    pub(super) fn new(path: &Path, layout: Layout, way: Way, cpu: Option<usize>) -> RawTarget {
        RawTarget {
            path: path.to_owned(),
            layout,
            way,
            cpu,
        }
    }

    /// Whether it has something to say about this work.
    pub(super) fn can(&self, work: &Work) -> bool {
        match work.kind {
            Kind::Mixed => false,
            kind => self.way == Way::Calls || kind.moves_data(),
        }
    }

    /// Runs on the server's processor.
    pub(super) fn run(&self, work: Work, warm: Duration, run: Duration) -> Result<Sample> {
        let worker = std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                pin(self.cpu)
                    .and_then(|()| Runner::open(&self.path, &self.layout, work))
                    .and_then(|mut runner| runner.run(self.way, warm, run))
            });
            worker.join()
        });
        worker.unwrap_or_else(|_| bail!("the baseline's thread has panicked"))
    }
}

/// Open files and buffers.
struct Runner {
    work: Work,
    dir: OwnedFd,
    list: OwnedFd,
    files: Vec<OwnedFd>,
    names: Vec<CString>,
    file_size: u64,
    buffers: Vec<Vec<u8>>,
    random: Random,
    cursor: u64,
    turn: usize,
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn open_at(dir: RawFd, name: &CStr, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: `name` ends with NUL; the kernel reads nothing else.
    let fd = unsafe { libc::openat(dir, name.as_ptr(), flags | libc::O_CLOEXEC, 0o644) };
    check(fd.into())?;
    // SAFETY: the descriptor is new, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn statx(dir: RawFd, name: &CStr, flags: i32) -> io::Result<()> {
    let mut out = std::mem::MaybeUninit::<libc::statx>::uninit();
    let mask = libc::STATX_BASIC_STATS;
    // SAFETY: `name` ends with NUL, and `out` has room for what the kernel writes.
    let done = unsafe { libc::statx(dir, name.as_ptr(), flags, mask, out.as_mut_ptr()) };
    check(done.into()).map(|_| ())
}

impl Runner {
    fn open(path: &Path, layout: &Layout, work: Work) -> Result<Runner> {
        let path = CString::new(path.as_os_str().as_encoded_bytes())?;
        let root = open_at(libc::AT_FDCWD, &path, libc::O_RDONLY | libc::O_DIRECTORY)?;
        let dir = open_at(root.as_raw_fd(), DIR, libc::O_RDONLY | libc::O_DIRECTORY)
            .context("the directory has not been prepared through a device")?;
        let list = open_at(
            dir.as_raw_fd(),
            LIST_DIR,
            libc::O_RDONLY | libc::O_DIRECTORY,
        )?;
        let names: Vec<_> = (0..layout.files).map(Layout::file_name).collect();
        let open = |name: &CString| open_at(dir.as_raw_fd(), name, libc::O_RDWR);
        Ok(Runner {
            files: names.iter().map(open).collect::<io::Result<_>>()?,
            work,
            dir,
            list,
            names,
            file_size: layout.file_size,
            buffers: vec![vec![0; work.block as usize]; work.depth.into()],
            random: Random::default(),
            cursor: 0,
            turn: 0,
        })
    }

    fn run(&mut self, way: Way, warm: Duration, run: Duration) -> Result<Sample> {
        let mut ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(self.work.depth.into())?;
        let mut latency = Histogram::new_with_bounds(1, 60_000_000_000, 3)?;
        // Of the whole process: the kernel's own threads may work for the ring, and the generator's thread waits.
        let cpu_now = || clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from);
        let origin = Instant::now();
        let mut before = origin;
        let mut start = None;
        let mut ops = 0;
        loop {
            let now = Instant::now();
            match start {
                None if now.duration_since(origin) >= warm => {
                    start = Some((now, cpu_now()?));
                    before = now;
                }
                None => before = now,
                Some((began, cpu)) => {
                    latency.saturating_record(now.duration_since(before).as_nanos() as u64);
                    before = now;
                    if now.duration_since(began) >= run {
                        return Ok(Sample {
                            ops,
                            wall: now.duration_since(began),
                            cpu: Some(cpu_now()?.saturating_sub(cpu)),
                            latency,
                        });
                    }
                }
            }
            let done = match way {
                Way::Calls => self.call().map(|()| 1)?,
                Way::Ring => self.batch(&mut ring)?,
            };
            ops += if start.is_some() { done } else { 0 };
        }
    }

    /// Which file, and where in it.
    fn place(&mut self) -> (usize, u64) {
        let block = u64::from(self.work.block);
        let blocks = (self.file_size / block).max(1);
        let files = self.files.len() as u64;
        if matches!(self.work.kind, Kind::SeqRead | Kind::SeqWrite) {
            let at = self.cursor;
            self.cursor = at.wrapping_add(1);
            return ((at / blocks % files) as usize, at % blocks * block);
        }
        (
            self.random.below(files) as usize,
            self.random.below(blocks) * block,
        )
    }

    /// One operation by system calls.
    fn call(&mut self) -> Result<()> {
        let (file, offset) = self.place();
        self.turn = (self.turn + 1) % self.buffers.len();
        let dir = self.dir.as_raw_fd();
        match self.work.kind {
            Kind::RandRead | Kind::SeqRead => {
                let buffer = &mut self.buffers[self.turn];
                let read = nix::sys::uio::pread(&self.files[file], buffer, offset as i64)?;
                anyhow::ensure!(read == buffer.len(), "a short read");
            }
            Kind::RandWrite | Kind::SeqWrite => {
                let buffer = &self.buffers[self.turn];
                nix::sys::uio::pwrite(&self.files[file], buffer, offset as i64)?;
            }
            Kind::Getattr => statx(self.files[file].as_raw_fd(), c"", libc::AT_EMPTY_PATH)?,
            Kind::Lookup => statx(dir, &self.names[file], libc::AT_SYMLINK_NOFOLLOW)?,
            Kind::Open => drop(open_at(dir, &self.names[file], libc::O_RDONLY)?),
            Kind::Create => {
                let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
                drop(open_at(dir, c"new-raw", flags)?);
                nix::unistd::unlinkat(
                    &self.dir,
                    c"new-raw",
                    nix::unistd::UnlinkatFlags::NoRemoveDir,
                )?;
            }
            Kind::Readdirplus => self.scan()?,
            Kind::Mixed => bail!("the baseline does not mix"),
        }
        Ok(())
    }

    /// getdents64, and statx of every name.
    fn scan(&mut self) -> Result<()> {
        /// Of `struct linux_dirent64`.
        const RECLEN_AT: usize = 16;
        const NAME_AT: usize = 19;
        let list = self.list.as_raw_fd();
        nix::unistd::lseek(&self.list, 0, nix::unistd::Whence::SeekSet)?;
        loop {
            let buffer = &mut self.buffers[0];
            let room = buffer.len();
            // SAFETY: the kernel writes at most `room` bytes to the buffer.
            let got =
                unsafe { libc::syscall(libc::SYS_getdents64, list, buffer.as_mut_ptr(), room) };
            let got = check(got)? as usize;
            if got == 0 {
                return Ok(());
            }
            let mut rest = buffer.get(..got).context("too many bytes")?;
            while let Some(reclen) = rest.get(RECLEN_AT..RECLEN_AT + 2) {
                let reclen = usize::from(u16::from_ne_bytes([reclen[0], reclen[1]]));
                let (entry, after) = rest.split_at_checked(reclen).context("a cut entry")?;
                rest = after;
                let name = entry.get(NAME_AT..).context("a cut entry")?;
                statx(
                    list,
                    CStr::from_bytes_until_nul(name)?,
                    libc::AT_SYMLINK_NOFOLLOW,
                )?;
            }
        }
    }

    /// As many transfers as the depth says, with one `io_uring_enter`.
    fn batch(&mut self, ring: &mut IoUring) -> Result<u64> {
        let depth = self.buffers.len();
        for number in 0..depth {
            let (file, offset) = self.place();
            let fd = Fd(self.files[file].as_raw_fd());
            let buffer = &mut self.buffers[number];
            let (base, len) = (buffer.as_mut_ptr(), buffer.len() as u32);
            let read = match self.work.kind {
                Kind::RandRead | Kind::SeqRead => true,
                Kind::RandWrite | Kind::SeqWrite => false,
                _ => bail!("only transfers go through the ring"),
            };
            let entry = if read {
                opcode::Read::new(fd, base, len).offset(offset).build()
            } else {
                opcode::Write::new(fd, base, len).offset(offset).build()
            };
            // SAFETY: the buffer stays in place and unused until the completions have been seen below.
            unsafe { ring.submission().push(&entry) }.context("the ring is full")?;
        }
        ring.submit_and_wait(depth)?;
        let mut done = 0;
        for entry in ring.completion() {
            anyhow::ensure!(entry.result() == self.work.block as i32, "a short transfer");
            done += 1;
        }
        anyhow::ensure!(done == depth as u64, "transfers are missing");
        Ok(done)
    }
}
