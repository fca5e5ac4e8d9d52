//! The `aio` file-system device: a directory of this machine.
//!
//! Owns everything that a guest can name in the export: inodes (`inode`), open files (`handle`), lock owners
//! (`lock`). Called by the dispatcher from any core and from helper threads; nothing here allocates after
//! [`Passthrough::new`].
//!
//! # What keeps a guest inside
//!
//! A name is one component, resolved relative to a directory descriptor by `openat2` with `RESOLVE_BENEATH` and without
//! following links, or looked at with `AT_SYMLINK_NOFOLLOW`. An inode that is known is used through its own descriptor or
//! file handle, never by name again. Only regular files and directories are ever opened; guests handle FIFOs, sockets
//! and device nodes themselves.
//!
//! # Who acts
//!
//! The guest's kernel checks permissions (virtio-fs mounts have `default_permissions`), so most operations run as the
//! service. What creates an inode, and ACCESS, runs as the caller (`identity`), so that owner, group, mode and ACLs come
//! out as the host's kernel would make them.

mod attr;
mod deadlock;
mod dir;
mod fdinfo;
mod file;
mod handle;
mod home;
mod hot;
mod identity;
mod ids;
mod inode;
mod lock;
mod locking;
mod meta;
mod mounts;
mod names;
mod once;
mod sys;
mod vault;
mod xattr;

use alloc::ffi::CString;
use alloc::format;
use alloc::sync::Arc;
use core::ffi::CStr;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::fence;

use ferry_shared::errno::Errno;
use ferry_shared::export::{Cache, Squash};
use ferry_shared::msg::{AioSpec, Failure, Placement};

use self::handle::Handles;
use self::home::Home;
use self::hot::Hot;
use self::inode::{InodeHome, Inodes};
use self::lock::Locks;
use self::vault::{Kind, Vault};
use super::{Caller, DirSink, FsDev, IoOp, IoResult, Negotiated, Offer, Pin};
use crate::fuse::abi::*;
use crate::mem::Segments;
use crate::os::fdstore::FdStore;
use crate::recovery::region::Area;

/// Sizes of a device's tables. Unused entries cost address space only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Inodes that a guest can know at once.
    pub inodes: u32,
    /// Files and directories that it can have open at once.
    pub handles: u32,
    /// Pairs of inode and lock owner with POSIX locks.
    pub lock_owners: u32,
    /// Inodes that are held by a descriptor, where they can be reopened by file handle.
    pub hot_inodes: u32,
}

impl Default for Capacity {
    /// Raises the process's soft limit on open files to the hard one, and takes a quarter of it for hot inodes.
    fn default() -> Capacity {
        let limit = sys::raise_fd_limit(super::table::FD_LIMIT as u64);
        Capacity {
            inodes: 1 << 20,
            handles: 1 << 16,
            lock_owners: 1 << 13,
            hot_inodes: u32::try_from(limit / 4)
                .unwrap_or(u32::MAX)
                .clamp(64, 1 << 16),
        }
    }
}

/// A directory as a file-system device.
pub struct Passthrough {
    // Dropped in this order: locks and handles belong to inodes.
    locks: Arc<Locks>,
    handles: Handles,
    inodes: Arc<Inodes>,
    /// INIT flags of the mount.
    granted: AtomicU64,
    /// Odd while there is a mount; goes up when one begins or ends.
    session: AtomicU64,
    spec: AioSpec,
    /// The export is on a file system that can stall.
    remote: bool,
    hot: Hot,
    /// Where the tables lie, if they outlive the process.
    area: Option<Area>,
}

impl Passthrough {
    /// Opens the directory that `spec` names.
    pub fn new(spec: &AioSpec) -> Result<Passthrough, Failure> {
        Passthrough::with_capacity(spec, Capacity::default())
    }

    /// As [`Passthrough::new`], with tables of these sizes.
    pub fn with_capacity(spec: &AioSpec, capacity: Capacity) -> Result<Passthrough, Failure> {
        let home = Home::on_heap(&capacity).ok_or(Errno::ENOMEM);
        Passthrough::open(spec, capacity.hot_inodes, home, Vault::default())
    }

    /// Bytes of recovery memory for tables of these sizes.
    pub fn area_len(capacity: &Capacity) -> Option<u64> {
        home::area_len(capacity)
    }

    /// As [`Passthrough::new`], with tables in recovery memory, which they must fit; `store` keeps what cannot be opened
    /// again. Goes on with what an earlier process has left in the area, until [`FsDev::mount`] or [`FsDev::unmount`] ends it.
    pub fn in_area(
        spec: &AioSpec,
        capacity: Capacity,
        area: &Area,
        store: Option<Arc<FdStore>>,
    ) -> Result<Passthrough, Failure> {
        let vault = Vault::new(store, area.name());
        let home = Home::in_area(area, &capacity);
        let device = Passthrough::open(spec, capacity.hot_inodes, home, vault)?;
        Ok(Passthrough {
            area: Some(area.clone()),
            ..device
        })
    }

    /// Nobody needs the tables any more: their memory goes with them.
    pub fn discard(&self) {
        if let Some(area) = &self.area {
            area.discard();
        }
    }

    fn open(
        spec: &AioSpec,
        hot: u32,
        home: Result<Home, Errno>,
        vault: Vault,
    ) -> Result<Passthrough, Failure> {
        let path = &spec.root_path;
        let c_path = CString::new(path.as_str()).map_err(|_| {
            Failure::new(
                Errno::EINVAL,
                format!("root_path {path:?} contains a NUL byte"),
            )
        })?;
        let open_root = || sys::open_path(&c_path, libc::O_PATH | libc::O_DIRECTORY);
        let root = open_root().map_err(|errno| {
            let detail = match errno {
                Errno::ENOENT => format!("root_path {path:?} does not exist; create it first"),
                Errno::ENOTDIR => format!("root_path {path:?} is not a directory"),
                _ => format!("root_path {path:?} cannot be opened by the data plane"),
            };
            Failure::new(errno, detail)
        })?;
        let kind = sys::statfs(root.raw()).map_or(0, |s| s.f_type);
        let remote = is_remote(kind);
        let transfers = Hot::new(root.raw(), kind, remote, spec.metadata);
        let failed = |errno| {
            let detail = match errno {
                Errno::ESTALE => format!(
                    "root_path {path:?} is not the directory that it was before the restart; put that one back, or have the \
                     guest unmount and delete the fsdev"
                ),
                _ => format!("cannot set up the inode tables for root_path {path:?}"),
            };
            Failure::new(errno, detail)
        };
        let home = home.map_err(failed)?;
        let inode_home = InodeHome {
            slots: home.inodes,
            tails: home.tails,
            lasting: home.lasting,
        };
        let inodes = Inodes::new(root, inode_home, hot, vault.clone()).map_err(failed)?;
        let inodes = Arc::new(inodes);
        let locks = Arc::new(Locks::new(home.owners, vault.clone()).map_err(failed)?);
        deadlock::enlist(&locks);
        let device = Passthrough {
            locks,
            handles: Handles::new(home.handles, &inodes, vault.clone()).map_err(failed)?,
            inodes,
            granted: AtomicU64::new(0),
            session: AtomicU64::new(0),
            spec: spec.clone(),
            remote,
            hot: transfers,
            area: None,
        };
        if !device.inodes.has_root() {
            let taken = open_root().and_then(|root| device.inodes.take_over(root, path));
            if let Err(errno) = taken {
                // Not dropped, which would forget what may still be taken over once the directory is back.
                core::mem::forget(device);
                return Err(failed(errno));
            }
            for (kind, id, fd) in vault.take_all() {
                let known = match kind {
                    Kind::Inode => device.inodes.take_back(id, fd),
                    Kind::Handle => device.handles.take_back(id, fd),
                    Kind::Owner => device.locks.take_back(id, fd),
                };
                if !known {
                    vault.remove(kind, id);
                }
            }
            device.inodes.sweep();
            device.handles.take_over();
            device.locks.take_over();
        }
        Ok(device)
    }

    /// How many inodes (the root included), open files and lock owners there are.
    pub fn usage(&self) -> (u32, u32, u32) {
        (self.inodes.live(), self.handles.live(), self.locks.live())
    }

    /// Whether the mount has this INIT flag.
    fn has(&self, flag: u64) -> bool {
        self.granted.load(Relaxed) & flag != 0
    }

    /// The mount that an operation belongs to, to ask [`Passthrough::has_ended`] later. Whatever adds to a table begins with
    /// this.
    fn session(&self) -> Result<u64, Errno> {
        match self.session.load(Acquire) {
            session if session & 1 != 0 => Ok(session),
            _ => Err(Errno::ENOTCONN),
        }
    }

    /// Whether the mount has ended, so that what was just added to a table may have been missed by the sweep.
    fn has_ended(&self, session: u64) -> bool {
        // Pairs with the fence in `unmount`: either the sweep sees the addition, or we see that there was one.
        fence(SeqCst);
        self.session.load(Relaxed) != session
    }

    /// What the guest may do with its page cache for a file that it opens.
    fn file_flags(&self) -> u32 {
        let cached = match self.spec.export.cache {
            Cache::Never => FOPEN_DIRECT_IO,
            Cache::Auto | Cache::Metadata => 0,
            Cache::Always => FOPEN_KEEP_CACHE,
        };
        FOPEN_PARALLEL_DIRECT_WRITES | cached
    }

    /// The same for the listing of a directory.
    fn dir_flags(&self) -> u32 {
        match self.spec.export.cache {
            Cache::Always => FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE,
            _ => 0,
        }
    }
}

/// Milliseconds as seconds and nanoseconds.
fn valid_for(ms: u32) -> (u64, u32) {
    (u64::from(ms / 1000), (ms % 1000) * 1_000_000)
}

/// File systems that wait for somebody else: by the magic numbers of statfs(2).
fn is_remote(kind: i64) -> bool {
    const REMOTE: [u32; 11] = [
        0x6969,      // NFS
        0x517b,      // SMB
        0xfe53_4d42, // SMB2
        0xff53_4d42, // CIFS
        0x00c3_6400, // CEPH
        0x6573_5546, // FUSE
        0x0102_1997, // 9P
        0x5346_414f, // AFS
        0x7375_7245, // CODA
        0x0116_1970, // GFS2
        0x7461_636f, // OCFS2
    ];
    REMOTE.contains(&(kind as u32))
}

impl FsDev for Passthrough {
    /// Not with `ATOMIC_O_TRUNC`: an OPEN comes before the guest's kernel refuses to write to a program that runs, and
    /// would have emptied it.
    fn offer(&self) -> Offer {
        let mut flags = FUSE_POSIX_LOCKS
            | FUSE_FLOCK_LOCKS
            | FUSE_EXPORT_SUPPORT
            | FUSE_DONT_MASK
            | FUSE_AUTO_INVAL_DATA
            | FUSE_HANDLE_KILLPRIV
            | FUSE_HANDLE_KILLPRIV_V2
            | FUSE_SUBMOUNTS
            | FUSE_CREATE_SUPP_GROUP
            | FUSE_DIRECT_IO_ALLOW_MMAP;
        if self.spec.enable_xattr {
            flags |= FUSE_POSIX_ACL | FUSE_SECURITY_CTX;
        }
        if self.spec.enable_writeback_cache {
            flags |= FUSE_WRITEBACK_CACHE;
        }
        // With it, most requests do not say who asks, so nobody could be squashed.
        if self.spec.export.squash == Squash::None {
            flags |= FUSE_ALLOW_IDMAP;
        }
        Offer {
            flags,
            max_write: self.spec.max_xfer_size,
            max_readahead: self.spec.max_readahead,
        }
    }

    fn mount(&self, negotiated: Negotiated) -> Result<(), Errno> {
        self.unmount();
        if negotiated.flags & FUSE_EXPORT_SUPPORT == 0 {
            self.inodes.forget_all(false);
        }
        self.granted.store(negotiated.flags, Relaxed);
        self.session.fetch_or(1, Release);
        Ok(())
    }

    fn resume(&self, negotiated: Negotiated) {
        self.granted.store(negotiated.flags, Relaxed);
        self.session.fetch_or(1, Release);
    }

    fn unmount(&self) {
        let next = |session: u64| (session | 1).wrapping_add(1);
        self.session.update(Relaxed, Relaxed, next);
        // Pairs with the fence in `has_ended`.
        fence(SeqCst);
        deadlock::end_all(&self.locks);
        self.locks.clear();
        self.handles.clear();
        // The next mount of this device may be asked for by a handle that an NFS server took in this one.
        self.inodes.forget_all(self.has(FUSE_EXPORT_SUPPORT));
    }

    fn may_block(&self, opcode: u32) -> bool {
        let everything = match self.spec.metadata {
            Placement::Inline => false,
            Placement::Offload => true,
            Placement::Auto => self.remote,
        };
        match opcode {
            // No system call in these, or none that waits.
            FUSE_FORGET | FUSE_BATCH_FORGET | FUSE_READ | FUSE_POLL => false,
            FUSE_SYNCFS | FUSE_COPY_FILE_RANGE | FUSE_COPY_FILE_RANGE_64 => true,
            _ => everything,
        }
    }

    fn lock_epoch(&self) -> u64 {
        lock::epoch()
    }

    fn wait_ended(&self, unique: u64) {
        deadlock::end(&self.locks, unique);
    }

    fn unpin(&self, pin: Pin, _op: IoOp, _result: i32) {
        self.handles.unpin(pin.0);
    }

    fn lookup(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
    ) -> Result<fuse_entry_out, Errno> {
        self.do_lookup(caller, nodeid, name)
    }

    fn forget(&self, nodeid: u64, nlookup: u64) {
        self.do_forget(nodeid, nlookup);
    }

    fn getattr(
        &self,
        _: &Caller<'_>,
        nodeid: u64,
        fh: Option<u64>,
    ) -> Result<fuse_attr_out, Errno> {
        self.do_getattr(nodeid, fh)
    }

    fn setattr(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_setattr_in,
    ) -> Result<fuse_attr_out, Errno> {
        self.do_setattr(caller, nodeid, arg)
    }

    fn statx(
        &self,
        _: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_statx_in,
    ) -> Result<fuse_statx_out, Errno> {
        self.do_statx(nodeid, arg)
    }

    fn readlink(&self, _: &Caller<'_>, nodeid: u64, out: &mut [u8]) -> Result<usize, Errno> {
        self.do_readlink(nodeid, out)
    }

    fn symlink(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        target: &CStr,
    ) -> Result<fuse_entry_out, Errno> {
        self.make(caller, nodeid, name, 0, |dir| {
            sys::symlink(target, dir, name)
        })
    }

    fn mknod(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        arg: &fuse_mknod_in,
    ) -> Result<fuse_entry_out, Errno> {
        let rdev = attr::decode_dev(arg.rdev);
        self.make(caller, nodeid, name, arg.umask, |dir| {
            sys::mknod(dir, name, arg.mode, rdev)
        })
    }

    fn mkdir(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        arg: &fuse_mkdir_in,
    ) -> Result<fuse_entry_out, Errno> {
        self.make(caller, nodeid, name, arg.umask, |dir| {
            sys::mkdir(dir, name, arg.mode)
        })
    }

    fn unlink(&self, caller: &Caller<'_>, nodeid: u64, name: &CStr) -> Result<(), Errno> {
        self.do_unlink(caller, nodeid, name, 0)
    }

    fn rmdir(&self, caller: &Caller<'_>, nodeid: u64, name: &CStr) -> Result<(), Errno> {
        self.do_unlink(caller, nodeid, name, libc::AT_REMOVEDIR)
    }

    fn rename(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> Result<(), Errno> {
        self.do_rename(caller, nodeid, name, newdir, newname, flags)
    }

    fn link(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        oldnodeid: u64,
        name: &CStr,
    ) -> Result<fuse_entry_out, Errno> {
        self.do_link(caller, nodeid, oldnodeid, name)
    }

    fn open(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_open_in,
    ) -> Result<fuse_open_out, Errno> {
        // The guest's kernel sets the size itself, once it knows that nobody runs the file: see `offer`.
        let flags = arg.flags & !(libc::O_TRUNC as u32);
        self.do_open(caller, nodeid, flags, arg.open_flags)
    }

    fn create(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        arg: &fuse_create_in,
    ) -> Result<(fuse_entry_out, fuse_open_out), Errno> {
        self.do_create(caller, nodeid, name, arg)
    }

    fn tmpfile(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_create_in,
    ) -> Result<(fuse_entry_out, fuse_open_out), Errno> {
        self.do_tmpfile(caller, nodeid, arg)
    }

    fn read(&self, _: &Caller<'_>, nodeid: u64, arg: &fuse_read_in, dst: Segments<'_>) -> IoResult {
        self.do_read(nodeid, arg, dst)
    }

    fn write(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_write_in,
        src: Segments<'_>,
    ) -> IoResult {
        self.do_write(caller, nodeid, arg, src)
    }

    fn flush(&self, _: &Caller<'_>, nodeid: u64, arg: &fuse_flush_in) -> Result<(), Errno> {
        self.do_flush(nodeid, arg)
    }

    fn release(&self, _: &Caller<'_>, nodeid: u64, arg: &fuse_release_in) -> Result<(), Errno> {
        self.do_release(nodeid, arg)
    }

    fn fsync(&self, _: &Caller<'_>, nodeid: u64, arg: &fuse_fsync_in) -> IoResult {
        self.do_fsync(self.handles.file(arg.fh, nodeid)?, arg)
    }

    fn statfs(&self, _: &Caller<'_>, nodeid: u64) -> Result<fuse_kstatfs, Errno> {
        let node = self.inodes.get(nodeid)?;
        Ok(attr::statfs(&sys::statfs(node.fd())?))
    }

    fn setxattr(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        setxattr_flags: u32,
    ) -> Result<(), Errno> {
        self.do_setxattr(caller, nodeid, name, value, flags, setxattr_flags)
    }

    fn getxattr(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        out: &mut [u8],
    ) -> Result<usize, Errno> {
        self.do_getxattr(caller, nodeid, name, out)
    }

    fn listxattr(&self, _: &Caller<'_>, nodeid: u64, out: &mut [u8]) -> Result<usize, Errno> {
        self.do_listxattr(nodeid, out)
    }

    fn removexattr(&self, caller: &Caller<'_>, nodeid: u64, name: &CStr) -> Result<(), Errno> {
        self.do_removexattr(caller, nodeid, name)
    }

    fn opendir(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        _arg: &fuse_open_in,
    ) -> Result<fuse_open_out, Errno> {
        self.do_opendir(caller, nodeid)
    }

    fn readdir(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_read_in,
        plus: bool,
        out: &mut dyn DirSink,
    ) -> Result<(), Errno> {
        self.do_readdir(caller, nodeid, arg, plus, out)
    }

    fn releasedir(&self, _: &Caller<'_>, nodeid: u64, arg: &fuse_release_in) -> Result<(), Errno> {
        self.handles.dir(arg.fh, nodeid)?.close();
        Ok(())
    }

    fn fsyncdir(&self, _: &Caller<'_>, nodeid: u64, arg: &fuse_fsync_in) -> IoResult {
        self.do_fsync(self.handles.dir(arg.fh, nodeid)?, arg)
    }

    fn getlk(
        &self,
        _: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_lk_in,
    ) -> Result<fuse_file_lock, Errno> {
        self.do_getlk(nodeid, arg)
    }

    fn setlk(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_lk_in,
        wait: bool,
    ) -> Result<(), Errno> {
        self.do_setlk(caller, nodeid, arg, wait)
    }

    fn access(&self, caller: &Caller<'_>, nodeid: u64, mask: u32) -> Result<(), Errno> {
        self.do_access(caller, nodeid, mask)
    }

    fn bmap(&self, caller: &Caller<'_>, nodeid: u64, arg: &fuse_bmap_in) -> Result<u64, Errno> {
        self.do_bmap(caller, nodeid, arg)
    }

    fn ioctl(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_ioctl_in,
        input: &[u8],
        out: &mut [u8],
    ) -> Result<(fuse_ioctl_out, usize), Errno> {
        self.do_ioctl(caller, nodeid, arg, input, out)
    }

    fn poll(&self, _: &Caller<'_>, nodeid: u64, arg: &fuse_poll_in) -> Result<u32, Errno> {
        self.do_poll(nodeid, arg)
    }

    fn fallocate(&self, caller: &Caller<'_>, nodeid: u64, arg: &fuse_fallocate_in) -> IoResult {
        self.do_fallocate(caller, nodeid, arg)
    }

    fn lseek(&self, _: &Caller<'_>, nodeid: u64, arg: &fuse_lseek_in) -> Result<u64, Errno> {
        self.do_lseek(nodeid, arg)
    }

    fn copy_file_range(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_copy_file_range_in,
    ) -> Result<u64, Errno> {
        self.do_copy_file_range(caller, nodeid, arg)
    }

    fn syncfs(&self, _: &Caller<'_>, nodeid: u64) -> Result<(), Errno> {
        self.do_syncfs(nodeid)
    }
}
