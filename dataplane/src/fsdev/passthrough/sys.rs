//! Every system call of the passthrough, each behind a safe function.
//!
//! The functions take descriptors as plain numbers: who calls them has pinned the record that owns the descriptor, and a
//! wrong number could only give `EBADF`. Paths are one component relative to a directory descriptor, or
//! `/proc/self/fd/N`, which names exactly the object behind descriptor N. Nothing here allocates.
// UNSAFETY: calls into libc; each pointer passed is to a live, sufficiently long Rust object.
#![expect(unsafe_code, reason = "raw system calls")]

use core::ffi::CStr;
use core::mem::MaybeUninit;
use std::sync::OnceLock;

use ferry_shared::errno::Errno;

pub(super) type Stat = libc::statx;

/// What every `statx` here asks for.
pub(super) const STAT_MASK: u32 = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID;

const EMPTY: &CStr = c"";

/// The number of the last error.
pub(super) fn last_error() -> Errno {
    Errno::from_raw(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

fn check(ret: i32) -> Result<i32, Errno> {
    if ret < 0 { Err(last_error()) } else { Ok(ret) }
}

fn check_long(ret: i64) -> Result<u64, Errno> {
    u64::try_from(ret).map_err(|_| last_error())
}

fn check_size(ret: isize) -> Result<usize, Errno> {
    usize::try_from(ret).map_err(|_| last_error())
}

/// A descriptor that is closed when dropped.
#[derive(Debug)]
pub(super) struct Fd(i32);

impl Fd {
    /// Takes a descriptor over.
    pub(super) fn from_raw(fd: i32) -> Fd {
        Fd(fd)
    }

    pub(super) fn raw(&self) -> i32 {
        self.0
    }

    /// Gives the descriptor away.
    pub(super) fn into_raw(self) -> i32 {
        let fd = self.0;
        core::mem::forget(self);
        fd
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        close(self.0);
    }
}

/// Closes a descriptor that the caller owns.
pub(super) fn close(fd: i32) {
    // SAFETY: takes no pointer; the caller owns `fd`.
    unsafe { libc::close(fd) };
}

/// `/proc/self/fd/N`, assembled without allocating.
pub(super) struct ProcPath([u8; 32]);

impl ProcPath {
    pub(super) fn new(fd: i32) -> ProcPath {
        ProcPath::below(b"/proc/self/fd/", fd)
    }

    /// `/proc/self/fdinfo/N`: what the kernel tells about the descriptor.
    pub(super) fn info(fd: i32) -> ProcPath {
        ProcPath::below(b"/proc/self/fdinfo/", fd)
    }

    fn below(prefix: &[u8], fd: i32) -> ProcPath {
        let mut path = [0u8; 32];
        let mut digits = [0u8; 10];
        let mut first = digits.len();
        let mut rest = fd.unsigned_abs();
        while first > 0 {
            first -= 1;
            digits[first] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        let all = prefix.iter().chain(&digits[first..]);
        for (to, from) in path.iter_mut().zip(all) {
            *to = *from;
        }
        ProcPath(path)
    }

    pub(super) fn path(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or(EMPTY)
    }

    /// The last component.
    fn number(&self) -> &CStr {
        let path = self.path().to_bytes_with_nul();
        let at = path.iter().rposition(|&b| b == b'/');
        let name = at.and_then(|at| path.get(at + 1..)).unwrap_or_default();
        CStr::from_bytes_with_nul(name).unwrap_or(EMPTY)
    }
}

#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

/// Opens one component below a directory; never follows a link, never leaves the directory.
pub(super) fn open_beneath(dir: i32, name: &CStr, flags: i32, mode: u32) -> Result<Fd, Errno> {
    let how = OpenHow {
        flags: (flags | libc::O_CLOEXEC | libc::O_NOFOLLOW) as u64,
        mode: u64::from(mode & 0o7777),
        resolve: libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS | libc::RESOLVE_NO_SYMLINKS,
    };
    // SAFETY: `name` is NUL-terminated, `how` outlives the call and its size is passed.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            dir,
            name.as_ptr(),
            &raw const how,
            size_of::<OpenHow>(),
        )
    };
    check_long(ret).map(|fd| Fd(fd as i32))
}

/// Opens an absolute path, as the operator gave it.
pub(super) fn open_path(path: &CStr, flags: i32) -> Result<Fd, Errno> {
    // SAFETY: `path` is NUL-terminated.
    check(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) }).map(Fd)
}

/// The parent of a directory.
pub(super) fn open_parent(dir: i32) -> Result<Fd, Errno> {
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: the path is NUL-terminated.
    check(unsafe { libc::openat(dir, c"..".as_ptr(), flags) }).map(Fd)
}

/// Opens the very object behind `fd` again, with other flags. The caller knows its type: opening a FIFO would wait.
pub(super) fn reopen(fd: i32, flags: i32) -> Result<Fd, Errno> {
    /// `/proc/self/fd`, held open: from there it is one step instead of four.
    static DESCRIPTORS: OnceLock<Option<Fd>> = OnceLock::new();
    let path = ProcPath::new(fd);
    let flags = flags | libc::O_CLOEXEC | libc::O_NOCTTY;
    let held = DESCRIPTORS
        .get_or_init(|| open_path(c"/proc/self/fd", libc::O_PATH | libc::O_DIRECTORY).ok());
    let (dir, name) = match held {
        Some(dir) => (dir.raw(), path.number()),
        None => (libc::AT_FDCWD, path.path()),
    };
    // SAFETY: the name is NUL-terminated.
    check(unsafe { libc::openat(dir, name.as_ptr(), flags) }).map(Fd)
}

/// Reads from a file at an offset.
pub(super) fn read_at(fd: i32, out: &mut [u8], at: u64) -> Result<usize, Errno> {
    let at = i64::try_from(at).map_err(|_| Errno::EINVAL)?;
    // SAFETY: `out` has room for `out.len()` bytes.
    check_size(unsafe { libc::pread(fd, out.as_mut_ptr().cast(), out.len(), at) })
}

/// An unnamed file in a directory.
pub(super) fn open_unnamed(dir: i32, flags: i32, mode: u32) -> Result<Fd, Errno> {
    open_beneath(dir, c".", (flags & !libc::O_CREAT) | libc::O_TMPFILE, mode)
}

fn statx(dir: i32, name: &CStr, flags: i32, mask: u32) -> Result<Stat, Errno> {
    let mut stat = MaybeUninit::<Stat>::zeroed();
    // SAFETY: `name` is NUL-terminated and `stat` has room for the result.
    check(unsafe { libc::statx(dir, name.as_ptr(), flags, mask, stat.as_mut_ptr()) })?;
    // SAFETY: all integers, zeroed before the call.
    Ok(unsafe { stat.assume_init() })
}

/// Attributes of one component below a directory, not following a link.
pub(super) fn stat_at(dir: i32, name: &CStr) -> Result<Stat, Errno> {
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
    statx(dir, name, flags, STAT_MASK)
}

/// Attributes of the object behind a descriptor.
pub(super) fn stat_fd(fd: i32) -> Result<Stat, Errno> {
    statx(fd, EMPTY, libc::AT_EMPTY_PATH, STAT_MASK)
}

/// As [`stat_fd`], with more wishes: a mask, and the `AT_STATX_*` flags that say how fresh they must be.
pub(super) fn stat_fd_with(fd: i32, sync: u32, mask: u32) -> Result<Stat, Errno> {
    let sync = sync as i32 & (libc::AT_STATX_FORCE_SYNC | libc::AT_STATX_DONT_SYNC);
    statx(fd, EMPTY, libc::AT_EMPTY_PATH | sync, mask)
}

/// What tells a file of this machine from any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId {
    dev: (u32, u32),
    ino: u64,
}

impl FileId {
    pub(super) fn of(fd: i32) -> Result<FileId, Errno> {
        let stat = stat_fd(fd)?;
        Ok(FileId {
            dev: (stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
        })
    }
}

/// A kernel file handle.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileHandle {
    pub(super) bytes: u32,
    pub(super) kind: i32,
    pub(super) data: [u8; FileHandle::MAX],
}

impl FileHandle {
    /// The longest one (`MAX_HANDLE_SZ`).
    pub(super) const MAX: usize = 128;
}

/// The file handle of a component (or, with an empty name, of `fd` itself).
pub(super) fn file_handle(fd: i32, name: &CStr) -> Result<FileHandle, Errno> {
    let mut handle = FileHandle {
        bytes: FileHandle::MAX as u32,
        kind: 0,
        data: [0; FileHandle::MAX],
    };
    let mut mount = 0i32;
    let flags = if name.is_empty() {
        libc::AT_EMPTY_PATH
    } else {
        0
    };
    // SAFETY: `handle` says how many bytes it has room for; `name` is NUL-terminated.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            fd,
            name.as_ptr(),
            &raw mut handle,
            &raw mut mount,
            flags,
        )
    };
    check_long(ret)?;
    Ok(handle)
}

/// Opens the object of a file handle on the mount that `mount` lies on.
pub(super) fn open_handle(mount: i32, handle: &FileHandle) -> Result<Fd, Errno> {
    // ext4 answers so too while somebody makes a file that gets the number of the one asked for, which is then gone.
    const ATTEMPTS: u32 = 16;
    let mut opened = try_open_handle(mount, handle);
    for _ in 1..ATTEMPTS {
        if opened.as_ref().err() != Some(&Errno::ENOMEM) {
            break;
        }
        std::thread::yield_now();
        opened = try_open_handle(mount, handle);
    }
    opened
}

fn try_open_handle(mount: i32, handle: &FileHandle) -> Result<Fd, Errno> {
    let mut copy = *handle;
    let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: `copy` holds at least `copy.bytes` bytes of data: nobody but `file_handle` makes one.
    let ret = unsafe { libc::syscall(libc::SYS_open_by_handle_at, mount, &raw mut copy, flags) };
    check_long(ret).map(|fd| Fd(fd as i32))
}

pub(super) fn mkdir(dir: i32, name: &CStr, mode: u32) -> Result<(), Errno> {
    // SAFETY: `name` is NUL-terminated.
    check(unsafe { libc::mkdirat(dir, name.as_ptr(), mode) }).map(drop)
}

pub(super) fn mknod(dir: i32, name: &CStr, mode: u32, rdev: u64) -> Result<(), Errno> {
    // SAFETY: `name` is NUL-terminated.
    check(unsafe { libc::mknodat(dir, name.as_ptr(), mode, rdev) }).map(drop)
}

pub(super) fn symlink(target: &CStr, dir: i32, name: &CStr) -> Result<(), Errno> {
    // SAFETY: both strings are NUL-terminated.
    check(unsafe { libc::symlinkat(target.as_ptr(), dir, name.as_ptr()) }).map(drop)
}

pub(super) fn unlink(dir: i32, name: &CStr, flags: i32) -> Result<(), Errno> {
    // SAFETY: `name` is NUL-terminated.
    check(unsafe { libc::unlinkat(dir, name.as_ptr(), flags) }).map(drop)
}

pub(super) fn rename(
    dir: i32,
    name: &CStr,
    new_dir: i32,
    new_name: &CStr,
    flags: u32,
) -> Result<(), Errno> {
    // SAFETY: both names are NUL-terminated.
    check(unsafe { libc::renameat2(dir, name.as_ptr(), new_dir, new_name.as_ptr(), flags) })
        .map(drop)
}

/// A new name for the object behind `fd`.
pub(super) fn link(fd: i32, dir: i32, name: &CStr) -> Result<(), Errno> {
    let old = ProcPath::new(fd);
    let flags = libc::AT_SYMLINK_FOLLOW;
    // SAFETY: both paths are NUL-terminated.
    let ret = unsafe {
        libc::linkat(
            libc::AT_FDCWD,
            old.path().as_ptr(),
            dir,
            name.as_ptr(),
            flags,
        )
    };
    check(ret).map(drop)
}

pub(super) fn readlink(fd: i32, out: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: `out` has room for `out.len()` bytes; the path is NUL-terminated.
    check_size(unsafe { libc::readlinkat(fd, EMPTY.as_ptr(), out.as_mut_ptr().cast(), out.len()) })
}

/// Changes the mode of the object behind any descriptor.
pub(super) fn chmod(fd: i32, mode: u32) -> Result<(), Errno> {
    let path = ProcPath::new(fd);
    // SAFETY: the path is NUL-terminated.
    check(unsafe { libc::chmod(path.path().as_ptr(), mode & 0o7777) }).map(drop)
}

/// Changes owner and group; `u32::MAX` leaves one as it is.
pub(super) fn chown(fd: i32, uid: u32, gid: u32) -> Result<(), Errno> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: the path is NUL-terminated.
    check(unsafe { libc::fchownat(fd, EMPTY.as_ptr(), uid, gid, flags) }).map(drop)
}

pub(super) fn set_times(fd: i32, times: &[libc::timespec; 2]) -> Result<(), Errno> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: the path is NUL-terminated, `times` has the two elements that the call reads.
    check(unsafe { libc::utimensat(fd, EMPTY.as_ptr(), times.as_ptr(), flags) }).map(drop)
}

pub(super) fn truncate(fd: i32, size: u64) -> Result<(), Errno> {
    let size = i64::try_from(size).map_err(|_| Errno::EFBIG)?;
    // SAFETY: takes no pointer.
    check(unsafe { libc::ftruncate(fd, size) }).map(drop)
}

pub(super) fn statfs(fd: i32) -> Result<libc::statfs, Errno> {
    let mut stat = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `stat` has room for the result.
    check(unsafe { libc::fstatfs(fd, stat.as_mut_ptr()) })?;
    // SAFETY: all integers, zeroed before the call.
    Ok(unsafe { stat.assume_init() })
}

pub(super) fn set_xattr(path: &CStr, name: &CStr, value: &[u8], flags: u32) -> Result<(), Errno> {
    let (data, len) = (value.as_ptr().cast(), value.len());
    // SAFETY: the strings are NUL-terminated and `value` has `len` bytes.
    check(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), data, len, flags as i32) })
        .map(drop)
}

pub(super) fn get_xattr(path: &CStr, name: &CStr, out: &mut [u8]) -> Result<usize, Errno> {
    let (data, len) = (out.as_mut_ptr().cast(), out.len());
    // SAFETY: the strings are NUL-terminated and `out` has room for `len` bytes.
    check_size(unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), data, len) })
}

pub(super) fn list_xattr(path: &CStr, out: &mut [u8]) -> Result<usize, Errno> {
    let (data, len) = (out.as_mut_ptr().cast(), out.len());
    // SAFETY: the path is NUL-terminated and `out` has room for `len` bytes.
    check_size(unsafe { libc::listxattr(path.as_ptr(), data, len) })
}

pub(super) fn remove_xattr(path: &CStr, name: &CStr) -> Result<(), Errno> {
    // SAFETY: both strings are NUL-terminated.
    check(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) }).map(drop)
}

/// What close(2) of a duplicate gives: errors of writes that the file system has put off.
pub(super) fn flush(fd: i32) -> Result<(), Errno> {
    // SAFETY: takes no pointer.
    let copy = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) })?;
    // SAFETY: takes no pointer; `copy` was made above.
    check(unsafe { libc::close(copy) }).map(drop)
}

/// Sets `O_DIRECT` of an open file if its file system says what alignment that needs; gives the alignment.
pub(super) fn make_direct(fd: i32) -> Option<u32> {
    let stat = statx(fd, EMPTY, libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN).ok()?;
    let align = stat.stx_dio_mem_align.max(stat.stx_dio_offset_align);
    if stat.stx_mask & libc::STATX_DIOALIGN == 0 || !align.is_power_of_two() {
        return None;
    }
    // SAFETY: takes no pointer.
    let flags = check(unsafe { libc::fcntl(fd, libc::F_GETFL) }).ok()?;
    // SAFETY: takes no pointer.
    let set = check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_DIRECT) });
    set.ok().map(|_| align)
}

/// Clears `O_DIRECT` of an open file.
pub(super) fn make_buffered(fd: i32) -> Result<(), Errno> {
    change_flags(fd, 0, libc::O_DIRECT)
}

/// Whether what is written goes to the end of the file.
pub(super) fn set_append(fd: i32, on: bool) -> Result<(), Errno> {
    let (add, remove) = if on {
        (libc::O_APPEND, 0)
    } else {
        (0, libc::O_APPEND)
    };
    change_flags(fd, add, remove)
}

fn change_flags(fd: i32, add: i32, remove: i32) -> Result<(), Errno> {
    // SAFETY: takes no pointer.
    let now = check(unsafe { libc::fcntl(fd, libc::F_GETFL) })?;
    let flags = (now | add) & !remove;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags) }).map(drop)
}

/// A lock of an open file description on a range of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RangeLock {
    /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    pub(super) kind: i32,
    pub(super) start: i64,
    /// 0 means to the end of the file, however far it grows.
    pub(super) len: i64,
    /// Process that holds it, -1 for a description.
    pub(super) pid: i32,
}

impl RangeLock {
    /// The last byte of it.
    fn last(&self) -> i64 {
        match self.len {
            0 => i64::MAX,
            len => self.start.saturating_add(len).saturating_sub(1),
        }
    }

    /// Whether two owners cannot have these at once.
    pub(super) fn conflicts(&self, other: &RangeLock) -> bool {
        let meet = self.start <= other.last() && other.start <= self.last();
        meet && (self.kind == libc::F_WRLCK || other.kind == libc::F_WRLCK)
    }
}

fn range_lock(fd: i32, command: i32, lock: RangeLock) -> Result<RangeLock, Errno> {
    let mut raw = libc::flock {
        l_type: lock.kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: lock.start,
        l_len: lock.len,
        l_pid: 0,
    };
    // SAFETY: both commands take a `struct flock`, which outlives the call.
    check(unsafe { libc::fcntl(fd, command, &raw mut raw) })?;
    Ok(RangeLock {
        kind: i32::from(raw.l_type),
        start: raw.l_start,
        len: raw.l_len,
        pid: raw.l_pid,
    })
}

/// Takes or drops a lock without waiting.
pub(super) fn set_range_lock(fd: i32, lock: RangeLock) -> Result<(), Errno> {
    match range_lock(fd, libc::F_OFD_SETLK, lock) {
        Err(Errno::EACCES) => Err(Errno::EAGAIN),
        other => other.map(drop),
    }
}

/// The lock that stands in the way of `lock`, or one with `F_UNLCK`.
pub(super) fn get_range_lock(fd: i32, lock: RangeLock) -> Result<RangeLock, Errno> {
    range_lock(fd, libc::F_OFD_GETLK, lock)
}

/// Takes or drops a lock on the whole file without waiting.
pub(super) fn flock(fd: i32, operation: i32) -> Result<(), Errno> {
    // SAFETY: takes no pointer.
    check(unsafe { libc::flock(fd, operation | libc::LOCK_NB) }).map(drop)
}

/// Asks whether this thread's file-system user may do what `mask` says.
pub(super) fn access(fd: i32, mask: u32) -> Result<(), Errno> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_EACCESS | libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: the path is NUL-terminated.
    let ret = unsafe { libc::syscall(libc::SYS_faccessat2, fd, EMPTY.as_ptr(), mask, flags) };
    check_long(ret).map(drop)
}

/// An ioctl whose argument is at most `data.len()` bytes that the kernel reads, writes or both.
pub(super) fn ioctl(fd: i32, command: u32, data: &mut [u8; 32]) -> Result<i32, Errno> {
    // SAFETY: the callers pass commands whose argument is at most 32 bytes long, by their own table.
    check(unsafe { libc::ioctl(fd, command as libc::Ioctl, data.as_mut_ptr()) })
}

pub(super) fn seek(fd: i32, offset: u64, whence: u32) -> Result<u64, Errno> {
    // SAFETY: takes no pointer.
    check_long(unsafe { libc::lseek(fd, offset as i64, whence as i32) })
}

pub(super) fn copy_range(
    from: i32,
    from_offset: u64,
    to: i32,
    to_offset: u64,
    len: usize,
) -> Result<u64, Errno> {
    let mut from_offset = i64::try_from(from_offset).map_err(|_| Errno::EINVAL)?;
    let mut to_offset = i64::try_from(to_offset).map_err(|_| Errno::EINVAL)?;
    let (a, b) = (&raw mut from_offset, &raw mut to_offset);
    // SAFETY: both offsets outlive the call.
    check_long(unsafe { libc::copy_file_range(from, a, to, b, len, 0) } as i64)
}

pub(super) fn syncfs(fd: i32) -> Result<(), Errno> {
    // SAFETY: takes no pointer.
    check(unsafe { libc::syncfs(fd) }).map(drop)
}

/// Sets this thread's file-system user id; returns the one before. Raw, so that no other thread is touched.
/// Gives this thread back the capabilities about files that it lost with the file-system user id 0, as far as the process
/// may have them; they are lost again with the next change to an id other than 0.
pub(super) fn raise_capabilities() -> Result<(), Errno> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Set {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    // CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, LINUX_IMMUTABLE and MKNOD.
    const FILES: u32 = 0x1f | 1 << 9 | 1 << 27;
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut sets = [Set::default(); 2];
    // SAFETY: version 3 reads and fills two sets.
    let got = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
    check_long(got)?;
    let [low, _] = &mut sets;
    low.effective |= FILES & low.permitted;
    // SAFETY: version 3 reads two sets.
    let set = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) };
    check_long(set).map(drop)
}

pub(super) fn set_fs_uid(uid: u32) -> u32 {
    // SAFETY: takes no pointer.
    unsafe { libc::syscall(libc::SYS_setfsuid, uid) as u32 }
}

/// Sets this thread's file-system group id; returns the one before.
pub(super) fn set_fs_gid(gid: u32) -> u32 {
    // SAFETY: takes no pointer.
    unsafe { libc::syscall(libc::SYS_setfsgid, gid) as u32 }
}

/// Sets this thread's supplementary groups.
pub(super) fn set_groups(groups: &[u32]) -> Result<(), Errno> {
    // SAFETY: `groups` has as many elements as said. The raw call is for this thread only.
    let ret = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    check_long(ret).map(drop)
}

/// Gives this thread a file mode mask (and working directory) of its own.
pub(super) fn unshare_fs() -> Result<(), Errno> {
    // SAFETY: takes no pointer.
    check(unsafe { libc::unshare(libc::CLONE_FS) }).map(drop)
}

pub(super) fn set_umask(mask: u32) {
    // SAFETY: takes no pointer.
    unsafe { libc::umask(mask & 0o777) };
}

/// Raises the soft limit on open files to the hard one, but not above `cap`; returns the soft limit then.
pub(super) fn raise_fd_limit(cap: u64) -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` has room for the result.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return 1024;
    }
    let wanted = limit.rlim_max.min(cap);
    if wanted > limit.rlim_cur {
        let raised = libc::rlimit {
            rlim_cur: wanted,
            ..limit
        };
        // SAFETY: `raised` outlives the call.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } == 0 {
            return wanted;
        }
    }
    limit.rlim_cur
}

/// Room for one piece of a directory listing.
pub(super) struct DirBuffer {
    bytes: MaybeUninit<[u8; DirBuffer::SIZE]>,
}

/// One entry of a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct DirEntry<'a> {
    pub(super) ino: u64,
    /// Cookie of the position after it.
    pub(super) off: u64,
    pub(super) kind: u8,
    pub(super) name: &'a CStr,
}

impl DirBuffer {
    pub(super) const SIZE: usize = 32 * 1024;
    /// Enough for the longest entry.
    pub(super) const MIN: usize = 1024;

    pub(super) fn new() -> DirBuffer {
        DirBuffer {
            bytes: MaybeUninit::uninit(),
        }
    }

    /// Reads on from the directory's position, about `want` bytes of entries; the result is empty at the end.
    pub(super) fn fill(&mut self, fd: i32, want: usize) -> Result<&[u8], Errno> {
        let want = want.clamp(DirBuffer::MIN, DirBuffer::SIZE);
        let start = self.bytes.as_mut_ptr().cast::<u8>();
        // SAFETY: the buffer has `SIZE` bytes, and `want` is not more.
        let ret = unsafe { libc::syscall(libc::SYS_getdents64, fd, start, want) };
        let got = (check_long(ret)? as usize).min(want);
        // SAFETY: the kernel has written `got` bytes.
        Ok(unsafe { core::slice::from_raw_parts(start, got) })
    }
}

/// Takes the next entry off a listing; `None` at its end.
pub(super) fn next_entry<'a>(listing: &mut &'a [u8]) -> Option<DirEntry<'a>> {
    let entry = *listing;
    let ino = u64::from_ne_bytes(*entry.first_chunk()?);
    let off = u64::from_ne_bytes(*entry.get(8..)?.first_chunk()?);
    let len = usize::from(u16::from_ne_bytes(*entry.get(16..)?.first_chunk()?));
    let kind = *entry.get(18)?;
    let name = CStr::from_bytes_until_nul(entry.get(19..len)?).ok()?;
    *listing = entry.get(len..)?;
    Some(DirEntry {
        ino,
        off,
        kind,
        name,
    })
}
