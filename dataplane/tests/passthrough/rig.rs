//! A passthrough on a temporary directory, and the little that a dispatcher and a core add to it.
#![expect(unsafe_code, reason = "segments and plain system calls")]

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use ferry_dataplane::fsdev::passthrough::{Capacity, Passthrough};
use ferry_dataplane::fsdev::{Caller, DirSink, FsDev, Io, IoOp, Negotiated};
use ferry_dataplane::fuse::abi::*;
use ferry_dataplane::mem::{IoVec, Segments};
use ferry_dataplane::recovery::region::Region;
use ferry_shared::errno::Errno;
use ferry_shared::msg::{AioSpec, Placement};

pub(crate) const ROOT: u64 = FUSE_ROOT_ID;

/// A directory that is removed at the end.
pub(crate) struct TempDir(pub(crate) PathBuf);

impl TempDir {
    pub(crate) fn new(base: &str) -> TempDir {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(base).join(format!("ferry-pass-{}-{n}", std::process::id()));
        fs::create_dir(&path).unwrap();
        TempDir(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn spec(root: &Path) -> AioSpec {
    AioSpec {
        root_path: root.to_str().unwrap().to_owned(),
        enable_xattr: true,
        enable_writeback_cache: false,
        max_xfer_size: 131_072,
        max_readahead: 131_072,
        skip_rw: false,
        export: ferry_shared::export::ExportSpec::default(),
        metadata: Placement::Auto,
    }
}

pub(crate) fn as_user(uid: u32, gid: u32) -> Caller<'static> {
    Caller {
        unique: 1,
        uid,
        gid,
        pid: 100,
        supplementary_group: None,
        security_context: None,
        journal: Default::default(),
    }
}

pub(crate) fn root() -> Caller<'static> {
    as_user(0, 0)
}

pub(crate) fn name(s: &str) -> CString {
    CString::new(s).unwrap()
}

/// Mounts with everything that is offered and in `mask`.
pub(crate) fn mount(fs: &Passthrough, mask: u64) {
    let offer = fs.offer();
    let granted = Negotiated {
        minor: 45,
        flags: offer.flags & mask,
        max_write: offer.max_write,
    };
    fs.mount(granted).unwrap();
}

/// A mounted passthrough. Paths under `top` are the export's; `outside` is next to it.
pub(crate) struct Rig {
    pub(crate) fs: Passthrough,
    pub(crate) top: PathBuf,
    pub(crate) outside: PathBuf,
    _dir: TempDir,
}

impl Rig {
    pub(crate) fn new() -> Rig {
        Rig::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut AioSpec)) -> Rig {
        Rig::sized("/dev/shm", Capacity::default(), change)
    }

    pub(crate) fn on_disk() -> Rig {
        Rig::sized("/tmp", Capacity::default(), |_| {})
    }

    pub(crate) fn sized(base: &str, capacity: Capacity, change: impl FnOnce(&mut AioSpec)) -> Rig {
        let dir = TempDir::new(base);
        let top = dir.0.join("export");
        let outside = dir.0.join("outside");
        fs::create_dir(&top).unwrap();
        fs::create_dir(&outside).unwrap();
        let mut spec = spec(&top);
        change(&mut spec);
        let fs = Passthrough::with_capacity(&spec, capacity).unwrap();
        let rig = Rig {
            fs,
            top,
            outside,
            _dir: dir,
        };
        rig.mount(u64::MAX);
        rig
    }

    /// One whose tables outlive it, in the area `fs` of a region.
    pub(crate) fn lasting(region: &Region) -> Rig {
        let mut rig = Rig::sized("/dev/shm", Capacity::default(), |_| {});
        let len = Passthrough::area_len(&Capacity::default()).unwrap();
        let area = region.add_area("fs", len).unwrap();
        let spec = spec(&rig.top);
        rig.fs = Passthrough::in_area(&spec, Capacity::default(), &area, None).unwrap();
        rig.mount(u64::MAX);
        rig
    }

    /// Ends without tidying up, and starts again with what the region holds.
    pub(crate) fn crash(self, region: Region) -> (Rig, Region) {
        let (dead, next) = self.die(region);
        (dead.rise(&next), next)
    }

    /// Ends without tidying up: the descriptors are gone, the region is as it was. What is left serves nothing.
    pub(crate) fn die(mut self, region: Region) -> (Rig, Region) {
        let unused = Passthrough::new(&spec(self._dir.0.parent().unwrap())).unwrap();
        std::mem::forget(std::mem::replace(&mut self.fs, unused));
        for fd in self.open_fds() {
            // SAFETY: nobody uses the descriptors of what was forgotten.
            unsafe { libc::close(fd) };
        }
        let file = region.fd().try_clone_to_owned().unwrap();
        (self, Region::adopt(file).unwrap())
    }

    /// Starts again after [`Rig::die`].
    pub(crate) fn rise(self, region: &Region) -> Rig {
        let area = region.area("fs").unwrap().unwrap();
        let fs = Passthrough::in_area(&spec(&self.top), Capacity::default(), &area, None).unwrap();
        fs.resume(Negotiated {
            minor: 45,
            flags: fs.offer().flags,
            max_write: fs.offer().max_write,
        });
        Rig { fs, ..self }
    }

    /// Mounts with everything that is offered and in `mask`.
    pub(crate) fn mount(&self, mask: u64) {
        mount(&self.fs, mask);
    }

    pub(crate) fn look(&self, dir: u64, n: &str) -> Result<fuse_entry_out, Errno> {
        self.fs.lookup(&root(), dir, &name(n))
    }

    pub(crate) fn forget(&self, nodeid: u64) {
        self.fs.forget(nodeid, 1);
    }

    pub(crate) fn open(&self, nodeid: u64, flags: i32) -> Result<u64, Errno> {
        let arg = fuse_open_in {
            flags: flags as u32,
            open_flags: 0,
        };
        self.fs.open(&root(), nodeid, &arg).map(|o| o.fh)
    }

    pub(crate) fn create(&self, dir: u64, n: &str) -> (fuse_entry_out, u64) {
        let (entry, open) = self
            .create_with(&root(), dir, n, libc::O_RDWR, 0o644, 0)
            .unwrap();
        (entry, open.fh)
    }

    pub(crate) fn create_with(
        &self,
        caller: &Caller<'_>,
        dir: u64,
        n: &str,
        flags: i32,
        mode: u32,
        umask: u32,
    ) -> Result<(fuse_entry_out, fuse_open_out), Errno> {
        let mode = mode | libc::S_IFREG;
        let arg = fuse_create_in {
            flags: flags as u32,
            mode,
            umask,
            open_flags: 0,
        };
        self.fs.create(caller, dir, &name(n), &arg)
    }

    pub(crate) fn mkdir(&self, dir: u64, n: &str) -> Result<fuse_entry_out, Errno> {
        let arg = fuse_mkdir_in {
            mode: 0o755,
            umask: 0,
        };
        self.fs.mkdir(&root(), dir, &name(n), &arg)
    }

    pub(crate) fn release(&self, nodeid: u64, fh: u64) {
        let arg = fuse_release_in {
            fh,
            ..Default::default()
        };
        self.fs.release(&root(), nodeid, &arg).unwrap();
    }

    /// READ, with the part of the core that performs it.
    pub(crate) fn read(
        &self,
        nodeid: u64,
        fh: u64,
        offset: u64,
        size: u32,
    ) -> Result<Vec<u8>, Errno> {
        let arg = fuse_read_in {
            fh,
            offset,
            size,
            ..Default::default()
        };
        let mut data = vec![0u8; size as usize];
        let pieces = [piece(&mut data)];
        // SAFETY: the piece is `data`, which is not touched while the segments exist.
        let segments = unsafe { Segments::new(&pieces) };
        let done = self.perform(self.fs.read(&root(), nodeid, &arg, segments)?, &pieces[0])?;
        data.truncate(done as usize);
        Ok(data)
    }

    pub(crate) fn write(
        &self,
        nodeid: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
    ) -> Result<u32, Errno> {
        self.write_as(&root(), nodeid, fh, offset, data, 0)
    }

    pub(crate) fn write_as(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
        write_flags: u32,
    ) -> Result<u32, Errno> {
        let size = data.len() as u32;
        let arg = fuse_write_in {
            fh,
            offset,
            size,
            write_flags,
            ..Default::default()
        };
        let mut data = data.to_vec();
        let pieces = [piece(&mut data)];
        // SAFETY: as in `read`.
        let segments = unsafe { Segments::new(&pieces) };
        self.perform(self.fs.write(caller, nodeid, &arg, segments)?, &pieces[0])
    }

    /// Reads two pages into memory of which the second cannot be written to.
    pub(crate) fn read_into_a_hole(&self, nodeid: u64, fh: u64) -> Result<Io, Errno> {
        const PAGE: usize = 4096;
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping, of which only the kernel touches anything.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), 2 * PAGE, prot, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        let base = NonNull::new(base.cast::<u8>()).unwrap();
        // SAFETY: the second page of the mapping.
        let second = unsafe { base.add(PAGE) };
        // SAFETY: as above.
        let closed = unsafe { libc::mprotect(second.as_ptr().cast(), PAGE, libc::PROT_NONE) };
        assert_eq!(closed, 0);
        let pieces = [IoVec::new(base, PAGE), IoVec::new(second, PAGE)];
        // SAFETY: what must not be written to is checked by the kernel, which is the point.
        let segments = unsafe { Segments::new(&pieces) };
        let arg = fuse_read_in {
            fh,
            size: 2 * PAGE as u32,
            ..Default::default()
        };
        let done = self.fs.read(&root(), nodeid, &arg, segments);
        // SAFETY: nothing refers to the mapping any more.
        unsafe { libc::munmap(base.as_ptr().cast(), 2 * PAGE) };
        done
    }

    /// Performs what a method left to the core.
    pub(crate) fn perform(&self, io: Io, data: &IoVec) -> Result<u32, Errno> {
        let (op, pin) = match io {
            Io::Done(n) => return Ok(n),
            Io::Submit { op, pin } => (op, pin),
        };
        let iov = std::ptr::from_ref(data).cast::<libc::iovec>();
        // SAFETY: an `IoVec` has the layout of an `iovec` and its memory is alive; the descriptors are pinned.
        let ret = unsafe {
            match op {
                IoOp::Read { fd, offset, .. } => libc::preadv(fd, iov, 1, offset as i64),
                IoOp::Write { fd, offset, .. } => libc::pwritev(fd, iov, 1, offset as i64),
                IoOp::Fsync { fd, datasync: true } => libc::fdatasync(fd) as isize,
                IoOp::Fsync { fd, .. } => libc::fsync(fd) as isize,
                IoOp::Fallocate {
                    fd,
                    mode,
                    offset,
                    len,
                } => libc::fallocate(fd, mode as i32, offset as i64, len as i64) as isize,
            }
        };
        let raw = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        self.fs
            .unpin(pin, op, if ret < 0 { -raw } else { ret as i32 });
        u32::try_from(ret).map_err(|_| Errno::from_raw(raw))
    }

    pub(crate) fn opendir(&self, nodeid: u64) -> Result<u64, Errno> {
        self.fs
            .opendir(&root(), nodeid, &fuse_open_in::default())
            .map(|o| o.fh)
    }

    /// One READDIR or READDIRPLUS.
    pub(crate) fn readdir(
        &self,
        nodeid: u64,
        fh: u64,
        at: u64,
        size: u32,
        plus: bool,
    ) -> Vec<Entry> {
        let mut sink = Sink {
            room: size as usize,
            entries: Vec::new(),
        };
        let arg = fuse_read_in {
            fh,
            offset: at,
            size,
            ..Default::default()
        };
        self.fs
            .readdir(&root(), nodeid, &arg, plus, &mut sink)
            .unwrap();
        sink.entries
    }

    /// A whole listing, in replies of `size` bytes.
    pub(crate) fn list(&self, nodeid: u64, size: u32, plus: bool) -> Vec<Entry> {
        let fh = self.opendir(nodeid).unwrap();
        let mut all: Vec<Entry> = Vec::new();
        loop {
            let at = all.last().map_or(0, |e| e.off);
            let some = self.readdir(nodeid, fh, at, size, plus);
            if some.is_empty() {
                break;
            }
            all.extend(some);
        }
        let arg = fuse_release_in {
            fh,
            ..Default::default()
        };
        self.fs.releasedir(&root(), nodeid, &arg).unwrap();
        all
    }

    /// How many of this process's descriptors are on objects below this rig's directory.
    pub(crate) fn fds(&self) -> usize {
        self.open_fds().len()
    }

    fn open_fds(&self) -> Vec<i32> {
        let above = self.top.parent().unwrap().as_os_str().as_bytes();
        let list = fs::read_dir("/proc/self/fd").unwrap();
        list.filter_map(|e| {
            let path = e.ok()?.path();
            let target = fs::read_link(&path).ok()?;
            let below = target.as_os_str().as_bytes().starts_with(above);
            below.then(|| path.file_name()?.to_str()?.parse().ok())?
        })
        .collect()
    }
}

fn piece(data: &mut [u8]) -> IoVec {
    let len = data.len();
    IoVec::new(NonNull::from(data).cast(), len)
}

/// One entry of a listing.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) ino: u64,
    pub(crate) off: u64,
    pub(crate) kind: u32,
    pub(crate) entry: Option<fuse_entry_out>,
}

pub(crate) struct Sink {
    pub(crate) room: usize,
    pub(crate) entries: Vec<Entry>,
}

impl Sink {
    fn take(&mut self, size: usize) -> bool {
        let fits = size <= self.room;
        if fits {
            self.room -= size;
        }
        fits
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

impl DirSink for Sink {
    fn entry(&mut self, name: &[u8], ino: u64, off: u64, kind: u32) -> bool {
        let fits = self.take((24 + name.len()).next_multiple_of(8));
        if fits {
            self.entries.push(Entry {
                name: text(name),
                ino,
                off,
                kind,
                entry: None,
            });
        }
        fits
    }

    fn fits_plus(&self, name_len: usize) -> bool {
        (152 + name_len).next_multiple_of(8) <= self.room
    }

    fn entry_plus(&mut self, name: &[u8], off: u64, kind: u32, entry: &fuse_entry_out) -> bool {
        let fits = self.take((152 + name.len()).next_multiple_of(8));
        if fits {
            let ino = entry.attr.ino;
            let entry = Some(*entry);
            self.entries.push(Entry {
                name: text(name),
                ino,
                off,
                kind,
                entry,
            });
        }
        fits
    }
}

/// Makes a FIFO, or with a device number a character device.
pub(crate) fn make_node(path: &Path, mode: u32, dev: u64) {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the path is NUL-terminated.
    assert_eq!(unsafe { libc::mknod(path.as_ptr(), mode, dev) }, 0);
}

/// Tells other threads to end, also when this one panics.
pub(crate) struct SetOnDrop<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Reads a mode with its upper bits.
pub(crate) fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::MetadataExt as _;
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

pub(crate) fn chmod(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Locks the whole file through a description of its own, without waiting; the file keeps the lock while open.
pub(crate) fn host_lock(file: &fs::File, kind: i32) -> bool {
    use std::os::fd::AsRawFd as _;
    // SAFETY: all-zero is a valid `flock`.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as i16;
    // SAFETY: `lock` outlives the call.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) == 0 }
}

pub(crate) fn host_flock(file: &fs::File, operation: i32) -> bool {
    use std::os::fd::AsRawFd as _;
    // SAFETY: takes no pointer.
    unsafe { libc::flock(file.as_raw_fd(), operation | libc::LOCK_NB) == 0 }
}

/// A small file system on a directory, unmounted at the end.
pub(crate) struct Mounted(CString);

impl Mounted {
    /// `None`, with a word about it, where this process may not mount.
    pub(crate) fn tmpfs(at: &Path) -> Option<Mounted> {
        let path = CString::new(at.as_os_str().as_bytes()).unwrap();
        let (kind, options) = (c"tmpfs".as_ptr(), c"size=1m".as_ptr());
        // SAFETY: all strings are NUL-terminated.
        let ret = unsafe { libc::mount(kind, path.as_ptr(), kind, 0, options.cast()) };
        if ret != 0 {
            let error = std::io::Error::last_os_error();
            assert!(std::env::var_os("REQUIRE_ALL").is_none(), "{error}");
            eprintln!("SKIP cannot mount: {error}");
            return None;
        }
        Some(Mounted(path))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // SAFETY: the path is NUL-terminated.
        unsafe { libc::umount2(self.0.as_ptr(), libc::MNT_DETACH) };
    }
}
