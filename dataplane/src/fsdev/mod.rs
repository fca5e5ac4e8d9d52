//! File-system devices: what answers FUSE operations.
//!
//! The boundary speaks the FUSE ABI ([`crate::fuse::abi`]): one method per operation, each with an `ENOSYS` default, no
//! second vocabulary. One value that implements [`FsDev`] serves one device (one FUSE session at a time): node ids, handles
//! and lookup counts belong to it. It is called from several cores at once, so methods take `&self`.
//!
//! A method does its work and returns the answer; it runs on the core, or on the core's helper thread when
//! [`FsDev::may_block`] says so. Data operations return an [`Io`] that the core performs on its ring.

pub mod null;
#[cfg(feature = "std")]
pub mod passthrough;
#[cfg(feature = "std")]
pub mod registry;
pub mod table;

use core::ffi::CStr;

use ferry_shared::errno::Errno;

use crate::fuse::abi::*;
use crate::mem::Segments;
use crate::recovery::journal::Journal;

/// Who asks: what of the request's header a backend may use, and what came in its extensions.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    /// The request's number, to match INTERRUPT.
    pub unique: u64,
    /// The caller's file-system user id.
    pub uid: u32,
    /// The caller's file-system group id.
    pub gid: u32,
    /// The caller's process id in the guest.
    pub pid: u32,
    /// One supplementary group of the caller (`FUSE_EXT_GROUPS`), when the guest sent it.
    pub supplementary_group: Option<u32>,
    /// Security label for a new inode (`FUSE_SECURITY_CTX`): attribute name and value, when the guest sent it.
    pub security_context: Option<(&'a CStr, &'a [u8])>,
    /// Where the request notes what it is about to do, if it must not be done twice.
    pub journal: Journal<'a>,
}

/// What a mount agreed on, as far as a backend cares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// Protocol minor version.
    pub minor: u32,
    /// INIT flags in force, `flags2` in the upper half.
    pub flags: u64,
    /// Largest WRITE, in bytes.
    pub max_write: u32,
}

/// What a backend offers to a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// INIT flags that the backend can honour, `flags2` in the upper half; the session grants those that the guest asked
    /// for too.
    pub flags: u64,
    /// Largest data of one READ or WRITE, in bytes.
    pub max_write: u32,
    /// Largest read-ahead, in bytes.
    pub max_readahead: u32,
}

/// How a data operation is to be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// Nothing is left to do: this many bytes were transferred.
    Done(u32),
    /// The core submits this and answers when it completes; it calls [`FsDev::unpin`] with `pin` afterwards.
    Submit {
        /// What to submit.
        op: IoOp,
        /// Keeps the file open meanwhile.
        pin: Pin,
    },
}

/// An operation on an open file for the core's ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoOp {
    /// Read into the reply's data segments, at most `len` bytes.
    Read {
        /// Operating-system file descriptor.
        fd: i32,
        /// File offset in bytes.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Write from the request's data segments.
    Write {
        /// Operating-system file descriptor.
        fd: i32,
        /// File offset in bytes; ignored by files opened with `O_APPEND`.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Flush a file to its device.
    Fsync {
        /// Operating-system file descriptor.
        fd: i32,
        /// Data only.
        datasync: bool,
    },
    /// Change the allocation of a file.
    Fallocate {
        /// Operating-system file descriptor.
        fd: i32,
        /// `FALLOC_FL_*`.
        mode: u32,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// Keeps an open file of the backend open while an [`IoOp`] uses it; meaning private to the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin(pub u64);

/// A directory listing being filled: knows the reply's size limit and packs entries.
pub trait DirSink {
    /// Adds a plain entry; `false` when it no longer fits, and nothing was added. `off` is the cookie that continues after
    /// this entry; `kind` is a `DT_*` value.
    fn entry(&mut self, name: &[u8], ino: u64, off: u64, kind: u32) -> bool;
    /// Whether an entry with a name of this length (READDIRPLUS form) would still fit; asked before looking it up, so that
    /// no lookup count is taken for an entry that the guest never sees.
    fn fits_plus(&self, name_len: usize) -> bool;
    /// Adds a READDIRPLUS entry. `entry.attr.ino` is listed; a node id of 0 means that the entry was not looked up, as
    /// for `.` and `..`.
    fn entry_plus(&mut self, name: &[u8], off: u64, kind: u32, entry: &fuse_entry_out) -> bool;
}

/// The answer to READ, WRITE and the other data operations.
pub type IoResult = Result<Io, Errno>;

/// A backend. Node ids and handles are its own: index and generation into its tables, never addresses; an invented or stale
/// one gets `ENOENT`/`ESTALE` (node id) or `EBADF` (handle).
///
/// `nodeid` is the header's node id. `&CStr` names are single components: the parser has refused empty names, names
/// with `/` and overlong ones; `.` and `..` reach `lookup` only.
///
/// `ENOSYS` says "never": Linux remembers it for the life of the mount and asks no more. It then does without FLUSH,
/// FSYNC, FSYNCDIR, ACCESS, the attribute operations, BMAP, LSEEK, POLL, FALLOCATE, COPY_FILE_RANGE, SYNCFS, STATX and
/// TMPFILE, fakes success for some of them, and falls back to MKNOD and OPEN for CREATE. A method that works for some
/// inodes only answers `EOPNOTSUPP` or what the system call gives; `ENOSYS` from a system call is not passed on.
#[expect(unused_variables, reason = "the defaults answer without looking")]
pub trait FsDev: Send + Sync {
    /// What can be offered to a mount; called at every INIT.
    ///
    /// A flag in the offer is a promise of the backend's; any other than these is disregarded
    /// ([`crate::fuse::session::BACKEND_FLAGS`]):
    ///
    /// | flag | promise |
    /// |---|---|
    /// | `POSIX_LOCKS`, `FLOCK_LOCKS` | `getlk` and `setlk` keep locks by owner, and drop them in `flush` and `release` |
    /// | `ATOMIC_O_TRUNC` | `open` truncates on `O_TRUNC`, and drops set-id bits on `FUSE_OPEN_KILL_SUIDGID` |
    /// | `EXPORT_SUPPORT` | `lookup` answers `.` and `..`; without it they are refused before they get there |
    /// | `NO_EXPORT_SUPPORT` | node ids are worthless to an NFS server in the guest |
    /// | `DONT_MASK` | `mknod`, `mkdir`, `create` and `tmpfile` apply the `umask` in their argument (or a default ACL) |
    /// | `AUTO_INVAL_DATA` | sizes and modification times are true, so the guest may judge its page cache by them |
    /// | `EXPLICIT_INVAL_DATA` | a change behind the guest's back is notified |
    /// | `WRITEBACK_CACHE` | any open file can be read, whatever its flags, and `O_APPEND` is left to the guest |
    /// | `HANDLE_KILLPRIV` | write, truncation and chown drop set-id bits and capabilities |
    /// | `HANDLE_KILLPRIV_V2` | the same, for write and truncation only where the `KILL_SUIDGID` bits ask for it |
    /// | `POSIX_ACL` | the ACL attributes are stored and take effect on modes; `SETXATTR_ACL_KILL_SGID` is obeyed |
    /// | `NO_OPENDIR_SUPPORT` | `opendir` answers `ENOSYS`, and `readdir` needs no handle |
    /// | `SUBMOUNTS` | attributes carry `FUSE_ATTR_SUBMOUNT` where another file system begins |
    /// | `SECURITY_CTX` | a new inode gets [`Caller::security_context`] |
    /// | `CREATE_SUPP_GROUP` | a new inode is created with [`Caller::supplementary_group`] among the caller's groups |
    /// | `DIRECT_IO_ALLOW_MMAP` | files opened with `FOPEN_DIRECT_IO` may be mapped shared |
    /// | `ALLOW_IDMAP` | a user or group id of `FUSE_INVALID_UIDGID` in a header is not taken for a user |
    fn offer(&self) -> Offer;

    /// A mount begins: the session has granted these. Called before any other operation of the mount.
    fn mount(&self, negotiated: Negotiated) -> Result<(), Errno>;

    /// Goes on with a mount that an earlier process has begun, and whose node ids and handles are still there. Called before
    /// any operation.
    fn resume(&self, negotiated: Negotiated) {}

    /// The mount ends (DESTROY, a second INIT, device reset): every node id and handle is dropped, locks are released.
    /// Pinned files stay open until they are unpinned. Other cores may still be inside an operation that began before: it may
    /// finish or fail, but must not touch what the next mount makes.
    fn unmount(&self);

    /// Whether the operation with this opcode should run on the helper thread because it may block for long.
    fn may_block(&self, opcode: u32) -> bool;

    /// Releases what [`Io::Submit`] held. `result` is what the operation gave: bytes, or a negative error number.
    fn unpin(&self, pin: Pin, op: IoOp, result: i32) {}

    /// Request `unique`, a SETLKW that was told to wait (`EAGAIN`), has been given up and will not be tried again.
    fn wait_ended(&self, unique: u64) {}

    /// Changes whenever a lock may have been released, so that waiting SETLKW requests are worth trying again.
    fn lock_epoch(&self) -> u64 {
        0
    }

    /// LOOKUP; counts one lookup on success.
    fn lookup(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
    ) -> Result<fuse_entry_out, Errno> {
        Err(Errno::ENOSYS)
    }
    /// FORGET and each element of BATCH_FORGET.
    fn forget(&self, nodeid: u64, nlookup: u64) {}
    /// GETATTR; `fh` when the guest named an open file.
    fn getattr(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        fh: Option<u64>,
    ) -> Result<fuse_attr_out, Errno> {
        Err(Errno::ENOSYS)
    }
    /// SETATTR.
    fn setattr(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_setattr_in,
    ) -> Result<fuse_attr_out, Errno> {
        Err(Errno::ENOSYS)
    }
    /// STATX.
    fn statx(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_statx_in,
    ) -> Result<fuse_statx_out, Errno> {
        Err(Errno::ENOSYS)
    }
    /// READLINK; returns the length written to `out`, without a NUL.
    fn readlink(&self, caller: &Caller<'_>, nodeid: u64, out: &mut [u8]) -> Result<usize, Errno> {
        Err(Errno::ENOSYS)
    }
    /// SYMLINK.
    fn symlink(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        target: &CStr,
    ) -> Result<fuse_entry_out, Errno> {
        Err(Errno::ENOSYS)
    }
    /// MKNOD.
    fn mknod(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        arg: &fuse_mknod_in,
    ) -> Result<fuse_entry_out, Errno> {
        Err(Errno::ENOSYS)
    }
    /// MKDIR.
    fn mkdir(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        arg: &fuse_mkdir_in,
    ) -> Result<fuse_entry_out, Errno> {
        Err(Errno::ENOSYS)
    }
    /// UNLINK.
    fn unlink(&self, caller: &Caller<'_>, nodeid: u64, name: &CStr) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }
    /// RMDIR.
    fn rmdir(&self, caller: &Caller<'_>, nodeid: u64, name: &CStr) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }
    /// RENAME and RENAME2; `flags` are `RENAME_*` and 0 for RENAME.
    fn rename(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }
    /// LINK: a new name `name` in directory `nodeid` for `oldnodeid`.
    fn link(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        oldnodeid: u64,
        name: &CStr,
    ) -> Result<fuse_entry_out, Errno> {
        Err(Errno::ENOSYS)
    }
    /// OPEN; `arg.flags` are in this machine's ABI already.
    fn open(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_open_in,
    ) -> Result<fuse_open_out, Errno> {
        Err(Errno::ENOSYS)
    }
    /// CREATE.
    fn create(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        arg: &fuse_create_in,
    ) -> Result<(fuse_entry_out, fuse_open_out), Errno> {
        Err(Errno::ENOSYS)
    }
    /// TMPFILE: an unnamed file in directory `nodeid`.
    fn tmpfile(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_create_in,
    ) -> Result<(fuse_entry_out, fuse_open_out), Errno> {
        Err(Errno::ENOSYS)
    }
    /// READ. A backend that does not submit writes to `dst` itself.
    fn read(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_read_in,
        dst: Segments<'_>,
    ) -> IoResult {
        Err(Errno::ENOSYS)
    }
    /// WRITE. `src` holds `arg.size` bytes.
    fn write(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_write_in,
        src: Segments<'_>,
    ) -> IoResult {
        Err(Errno::ENOSYS)
    }
    /// FLUSH.
    fn flush(&self, caller: &Caller<'_>, nodeid: u64, arg: &fuse_flush_in) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }
    /// RELEASE.
    fn release(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_release_in,
    ) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }
    /// FSYNC.
    fn fsync(&self, caller: &Caller<'_>, nodeid: u64, arg: &fuse_fsync_in) -> IoResult {
        Err(Errno::ENOSYS)
    }
    /// STATFS.
    fn statfs(&self, caller: &Caller<'_>, nodeid: u64) -> Result<fuse_kstatfs, Errno> {
        Err(Errno::ENOSYS)
    }
    /// SETXATTR. `setxattr_flags` is 0 where the guest did not negotiate `FUSE_SETXATTR_EXT`.
    fn setxattr(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        setxattr_flags: u32,
    ) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }
    /// GETXATTR. An empty `out` asks for the length only. Returns the length; `ERANGE` when `out` is too short.
    fn getxattr(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        out: &mut [u8],
    ) -> Result<usize, Errno> {
        Err(Errno::ENOSYS)
    }
    /// LISTXATTR, as GETXATTR.
    fn listxattr(&self, caller: &Caller<'_>, nodeid: u64, out: &mut [u8]) -> Result<usize, Errno> {
        Err(Errno::ENOSYS)
    }
    /// REMOVEXATTR.
    fn removexattr(&self, caller: &Caller<'_>, nodeid: u64, name: &CStr) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }
    /// OPENDIR; `arg.flags` are in this machine's ABI already.
    fn opendir(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_open_in,
    ) -> Result<fuse_open_out, Errno> {
        Err(Errno::ENOSYS)
    }
    /// READDIR and (`plus`) READDIRPLUS: fills `out` from the cookie `arg.offset` on.
    fn readdir(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_read_in,
        plus: bool,
        out: &mut dyn DirSink,
    ) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }
    /// RELEASEDIR.
    fn releasedir(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_release_in,
    ) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }
    /// FSYNCDIR.
    fn fsyncdir(&self, caller: &Caller<'_>, nodeid: u64, arg: &fuse_fsync_in) -> IoResult {
        Err(Errno::ENOSYS)
    }
    /// GETLK.
    fn getlk(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_lk_in,
    ) -> Result<fuse_file_lock, Errno> {
        Err(Errno::ENOSYS)
    }
    /// SETLK, and one attempt of SETLKW; never waits. A conflict is `EAGAIN`; for SETLKW (`wait`) the caller then tries again
    /// when a lock may have been released, until it succeeds or the request is interrupted.
    fn setlk(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_lk_in,
        wait: bool,
    ) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }
    /// ACCESS.
    fn access(&self, caller: &Caller<'_>, nodeid: u64, mask: u32) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }
    /// BMAP; returns the block number.
    fn bmap(&self, caller: &Caller<'_>, nodeid: u64, arg: &fuse_bmap_in) -> Result<u64, Errno> {
        Err(Errno::ENOSYS)
    }
    /// IOCTL: `input` are the argument's bytes; fills `out` and returns the header and how many bytes of `out` follow it.
    fn ioctl(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_ioctl_in,
        input: &[u8],
        out: &mut [u8],
    ) -> Result<(fuse_ioctl_out, usize), Errno> {
        Err(Errno::ENOSYS)
    }
    /// POLL; returns the events that are ready.
    fn poll(&self, caller: &Caller<'_>, nodeid: u64, arg: &fuse_poll_in) -> Result<u32, Errno> {
        Err(Errno::ENOSYS)
    }
    /// FALLOCATE.
    fn fallocate(&self, caller: &Caller<'_>, nodeid: u64, arg: &fuse_fallocate_in) -> IoResult {
        Err(Errno::ENOSYS)
    }
    /// LSEEK; returns the new offset.
    fn lseek(&self, caller: &Caller<'_>, nodeid: u64, arg: &fuse_lseek_in) -> Result<u64, Errno> {
        Err(Errno::ENOSYS)
    }
    /// COPY_FILE_RANGE and COPY_FILE_RANGE_64; returns the bytes copied.
    fn copy_file_range(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_copy_file_range_in,
    ) -> Result<u64, Errno> {
        Err(Errno::ENOSYS)
    }
    /// SYNCFS.
    fn syncfs(&self, caller: &Caller<'_>, nodeid: u64) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }
}
