//! Operations on open files.

use core::ffi::CStr;

use ferry_shared::errno::Errno;

use super::handle::{self, Handle, OpenFile};
use super::inode::{Inode, Node};
use super::lock;
use super::sys::{self, Fd, Stat};
use super::{Passthrough, once};
use crate::fsdev::table::Vacant;
use crate::fsdev::{Caller, Io, IoOp, IoResult, Pin};
use crate::fuse::abi::*;
use crate::mem::Segments;

/// Largest copy of one request, so that its length fits a reply of 32 bits.
const MAX_COPY: u64 = 0x7fff_f000;

/// The flags of a guest's open(2) that an open here may have.
const OPEN_FLAGS: i32 = libc::O_APPEND | libc::O_SYNC | libc::O_DSYNC | libc::O_NOATIME;

/// Why something that is not a regular file is not opened: guests open FIFOs, sockets and devices themselves.
fn expect_regular(kind: u32) -> Result<(), Errno> {
    match kind {
        libc::S_IFREG => Ok(()),
        libc::S_IFDIR => Err(Errno::EISDIR),
        libc::S_IFLNK => Err(Errno::ELOOP),
        _ => Err(Errno::ENXIO),
    }
}

/// The largest offset that the host's kernel takes.
pub(super) const MAX_OFFSET: u64 = i64::MAX as u64;

fn check_range(offset: u64, len: u64) -> Result<(), Errno> {
    match offset.checked_add(len) {
        Some(end) if end <= MAX_OFFSET => Ok(()),
        _ => Err(Errno::EINVAL),
    }
}

impl Passthrough {
    /// Removes set-user-ID and set-group-ID as a write by an unprivileged process does. The service itself has the
    /// capability that keeps them; file capabilities are removed by the kernel for everyone.
    ///
    /// A file that its group cannot execute loses set-group-ID only to who is not in the group. Nobody tells us the
    /// caller's groups, so whoever needs no group to write counts as outside, unless the file is of its first group.
    pub(super) fn strip_privileges(&self, caller: &Caller<'_>, fd: i32) -> Result<(), Errno> {
        let stat = sys::stat_fd(fd)?;
        let mode = u32::from(stat.stx_mode);
        let member = self.spec.export.map_gid.to_guest(stat.stx_gid) == caller.gid;
        let mut kill = mode & libc::S_ISUID;
        if mode & libc::S_IXGRP != 0 || (mode & libc::S_IWOTH != 0 && !member) {
            kill |= mode & libc::S_ISGID;
        }
        if kill != 0 && mode & libc::S_IFMT == libc::S_IFREG {
            sys::chmod(fd, mode & !kill)?;
        }
        Ok(())
    }

    /// The guest's flags as the host gets them.
    fn host_flags(&self, flags: i32) -> Result<i32, Errno> {
        let mut access = flags & libc::O_ACCMODE;
        let mut keep = flags & OPEN_FLAGS;
        if access == libc::O_ACCMODE {
            return Err(Errno::EINVAL);
        }
        if self.has(FUSE_WRITEBACK_CACHE) {
            // The guest fills the rest of a page before it writes it back, and knows where the end of the file is.
            if access == libc::O_WRONLY {
                access = libc::O_RDWR;
            }
            keep &= !libc::O_APPEND;
        }
        Ok(access | keep | self.untouched())
    }

    /// For opening what must not even get another access time.
    pub(super) fn untouched(&self) -> i32 {
        if self.spec.export.read_only {
            libc::O_NOATIME
        } else {
            0
        }
    }

    /// The host's flags of files that are only read; such descriptors are used again.
    fn plain_flags(&self) -> i32 {
        libc::O_RDONLY | self.untouched()
    }

    /// Opens the regular file behind a node as the guest wants it; gives the host's flags too.
    fn open_regular(
        &self,
        caller: &Caller<'_>,
        node: &Node<'_>,
        flags: u32,
        open_flags: u32,
    ) -> Result<(Fd, i32), Errno> {
        let guest = flags as i32;
        let mut host = self.host_flags(guest)?;
        if host == self.plain_flags()
            && guest & (libc::O_TRUNC | libc::O_DIRECT) == 0
            && let Some(fd) = node.take_spare()
        {
            return Ok((fd, host));
        }
        let fd = node.fd();
        if guest & libc::O_TRUNC != 0 {
            host |= libc::O_TRUNC;
            if open_flags & FUSE_OPEN_KILL_SUIDGID != 0 {
                self.strip_privileges(caller, fd)?;
            }
        }
        let opened = match self.inodes.with_fds(|| sys::reopen(fd, host)) {
            // Only the promotion to reading is at fault if the server of the export refuses.
            Err(Errno::EACCES) if host & libc::O_ACCMODE != guest & libc::O_ACCMODE => {
                host = (host & !libc::O_ACCMODE) | libc::O_WRONLY;
                self.inodes.with_fds(|| sys::reopen(fd, host))
            }
            // Only appending is allowed; `publish` keeps the guest from caching what it writes.
            Err(Errno::EPERM) if guest & !host & libc::O_APPEND != 0 => {
                let access = libc::O_ACCMODE | libc::O_APPEND;
                host = (host & !libc::O_ACCMODE) | (guest & access);
                self.inodes.with_fds(|| sys::reopen(fd, host))
            }
            other => other,
        };
        opened.map(|fd| (fd, host))
    }

    /// Makes a file known to the guest that was opened with these flags of the host.
    fn publish(
        &self,
        (fd, mut host_flags): (Fd, i32),
        nodeid: u64,
        guest_flags: u32,
        session: u64,
        (place, mnt): (Vacant<'_, Handle>, u64),
    ) -> Result<fuse_open_out, Errno> {
        let mut flags = self.hot.flags(mnt, guest_flags);
        let mut alignment = 1;
        if guest_flags as i32 & libc::O_DIRECT != 0
            && let Some(found) = sys::make_direct(fd.raw())
        {
            flags |= handle::DIRECT;
            host_flags |= libc::O_DIRECT;
            alignment = found;
        }
        let mut open_flags = self.file_flags();
        if guest_flags as i32 & host_flags & libc::O_APPEND != 0 && self.has(FUSE_WRITEBACK_CACHE) {
            open_flags = FOPEN_DIRECT_IO;
        }
        let opened = (fd, host_flags);
        let fh = self.handles.add_at(place, opened, nodeid, flags, alignment);
        self.opened(fh, nodeid, open_flags, session)
    }

    /// The reply for a new handle; takes it back when the mount has ended meanwhile.
    pub(super) fn opened(
        &self,
        fh: u64,
        nodeid: u64,
        open_flags: u32,
        session: u64,
    ) -> Result<fuse_open_out, Errno> {
        if self.has_ended(session) {
            if let Ok(file) = self.handles.any(fh, nodeid) {
                file.close();
            }
            return Err(Errno::ENOTCONN);
        }
        Ok(fuse_open_out {
            fh,
            open_flags,
            backing_id: 0,
        })
    }

    pub(super) fn do_open(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        flags: u32,
        open_flags: u32,
    ) -> Result<fuse_open_out, Errno> {
        let session = self.session()?;
        let node = self.inodes.get(nodeid)?;
        expect_regular(node.kind())?;
        let guest = flags as i32;
        let truncates = guest & libc::O_TRUNC != 0;
        let wanted = match guest & libc::O_ACCMODE {
            libc::O_RDONLY if truncates => libc::R_OK | libc::W_OK,
            libc::O_RDONLY => libc::R_OK,
            libc::O_WRONLY => libc::W_OK,
            _ => libc::R_OK | libc::W_OK,
        };
        if wanted & libc::W_OK != 0 {
            self.expect_writable()?;
        }
        self.demand(caller, node.fd(), wanted)?;
        // A truncated file must not be left behind with an error.
        let place = self.handles.reserve()?;
        let file = self.open_regular(caller, &node, flags, open_flags)?;
        self.publish(file, nodeid, flags, session, (place, node.mnt()))
    }

    pub(super) fn do_create(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        arg: &fuse_create_in,
    ) -> Result<(fuse_entry_out, fuse_open_out), Errno> {
        let session = self.session()?;
        let dir = self.inodes.get(nodeid)?;
        dir.expect_dir()?;
        for _ in 0..16 {
            match self.create_new(caller, &dir, name, arg, session) {
                Err(Errno::EEXIST) if arg.flags as i32 & libc::O_EXCL == 0 => {}
                other => return other,
            }
            // It is there already. The guest takes it for a new one and will not truncate it itself.
            let entry = match self.lookup_in(dir.fd(), dir.mnt(), name) {
                Err(Errno::ENOENT) => continue,
                other => other?,
            };
            return match self.do_open(caller, entry.nodeid, arg.flags, arg.open_flags) {
                Ok(open) => Ok((self.refreshed(entry), open)),
                Err(errno) => {
                    self.do_forget(entry.nodeid, 1);
                    Err(errno)
                }
            };
        }
        Err(Errno::ESTALE)
    }

    /// Creates a file that must not exist yet.
    fn create_new(
        &self,
        caller: &Caller<'_>,
        dir: &Node<'_>,
        name: &CStr,
        arg: &fuse_create_in,
        session: u64,
    ) -> Result<(fuse_entry_out, fuse_open_out), Errno> {
        if self.spec.export.read_only {
            return match sys::stat_at(dir.fd(), name) {
                Ok(_) => Err(Errno::EEXIST),
                Err(Errno::ENOENT) => Err(Errno::EROFS),
                Err(errno) => Err(errno),
            };
        }
        let flags = self.host_flags(arg.flags as i32)? | libc::O_CREAT | libc::O_EXCL;
        // Before the file exists, so that full tables leave none behind.
        let place = (self.inodes.reserve()?, self.handles.reserve()?);
        let fd = if once::is_made(caller, dir.fd(), name, None)? {
            let flags = flags & !(libc::O_CREAT | libc::O_EXCL);
            self.inodes
                .with_fds(|| sys::open_beneath(dir.fd(), name, flags | libc::O_NONBLOCK, 0))?
        } else {
            let _caller = self.act_as(caller, arg.umask)?;
            self.inodes
                .with_fds(|| sys::open_beneath(dir.fd(), name, flags, arg.mode))?
        };
        self.label(caller, fd.raw())
            .and_then(|()| self.created((fd, flags), dir.mnt(), arg.flags, session, place))
            .inspect_err(|_| {
                // The error that counts is the first one.
                let _ = sys::unlink(dir.fd(), name, 0);
            })
    }

    /// The entry with the attributes that the file has after it was opened, which may have truncated it.
    fn refreshed(&self, mut entry: fuse_entry_out) -> fuse_entry_out {
        if let Ok(now) = self.do_getattr(entry.nodeid, None) {
            entry.attr = fuse_attr {
                flags: entry.attr.flags,
                ..now.attr
            };
        }
        entry
    }

    /// The reply for a new file in a directory on mount `mnt`.
    fn created(
        &self,
        (fd, host_flags): (Fd, i32),
        mnt: u64,
        flags: u32,
        session: u64,
        (inode, handle): (Vacant<'_, Inode>, Vacant<'_, Handle>),
    ) -> Result<(fuse_entry_out, fuse_open_out), Errno> {
        let stat: Stat = sys::stat_fd(fd.raw())?;
        let path = self
            .inodes
            .with_fds(|| sys::reopen(fd.raw(), libc::O_PATH))?;
        let nodeid = self.inodes.intern_at(path, &stat, Some(inode))?;
        if stat.stx_nlink == 0 {
            self.inodes.keep_nameless(nodeid);
        }
        match self.publish((fd, host_flags), nodeid, flags, session, (handle, mnt)) {
            Ok(open) => Ok((self.entry(nodeid, &stat, mnt), open)),
            Err(errno) => {
                self.do_forget(nodeid, 1);
                Err(errno)
            }
        }
    }

    pub(super) fn do_tmpfile(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_create_in,
    ) -> Result<(fuse_entry_out, fuse_open_out), Errno> {
        self.expect_writable()?;
        let session = self.session()?;
        let dir = self.inodes.get(nodeid)?;
        dir.expect_dir()?;
        let guest = arg.flags as i32;
        // O_EXCL here means that the file must never get a name.
        let flags = self.host_flags(guest)? | (guest & libc::O_EXCL);
        let place = (self.inodes.reserve()?, self.handles.reserve()?);
        let fd = {
            let _caller = self.act_as(caller, arg.umask)?;
            self.inodes
                .with_fds(|| sys::open_unnamed(dir.fd(), flags, arg.mode))?
        };
        self.label(caller, fd.raw())?;
        self.created((fd, flags), dir.mnt(), arg.flags, session, place)
    }

    /// Lets a transfer go past `O_DIRECT` when it does not have the alignment that the file needs, and from then on.
    fn settle_direct(
        &self,
        file: &OpenFile<'_>,
        offset: u64,
        data: Segments<'_>,
        buffered: bool,
    ) -> Result<(), Errno> {
        let handle = file.handle();
        if !handle.has(handle::DIRECT) {
            return Ok(());
        }
        let mask = handle.alignment() as usize;
        let aligned = offset as usize & mask == 0
            && data
                .iter()
                .all(|(base, len)| (base.addr().get() | len) & mask == 0);
        if buffered || !aligned {
            sys::make_buffered(file.fd())?;
            handle.clear(handle::DIRECT);
        }
        Ok(())
    }

    pub(super) fn do_read(&self, nodeid: u64, arg: &fuse_read_in, dst: Segments<'_>) -> IoResult {
        let file = self.handles.file(arg.fh, nodeid)?;
        let len = arg.size.min(u32::try_from(dst.len()).unwrap_or(u32::MAX));
        check_range(arg.offset, u64::from(len))?;
        if self.spec.skip_rw {
            let left = sys::stat_fd(file.fd())?.stx_size.saturating_sub(arg.offset);
            let given = u32::try_from(left).unwrap_or(u32::MAX).min(len);
            return Ok(Io::Done(given));
        }
        self.settle_direct(&file, arg.offset, dst.first(len as usize), false)?;
        if let Some(done) = self.hot.read(&file, arg.offset, dst.first(len as usize)) {
            return done.map(Io::Done);
        }
        let op = IoOp::Read {
            fd: file.fd(),
            offset: arg.offset,
            len,
        };
        Ok(Io::Submit {
            op,
            pin: Pin(file.keep()),
        })
    }

    pub(super) fn do_write(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_write_in,
        src: Segments<'_>,
    ) -> IoResult {
        self.expect_writable()?;
        let file = self.handles.file(arg.fh, nodeid)?;
        if u64::from(arg.size) > src.len() as u64 {
            return Err(Errno::EINVAL);
        }
        check_range(arg.offset, u64::from(arg.size)).map_err(|_| Errno::EFBIG)?;
        if self.spec.skip_rw {
            return Ok(Io::Done(arg.size));
        }
        let data = src.first(arg.size as usize);
        let appends = file.handle().appends();
        let cached = arg.write_flags & FUSE_WRITE_CACHE != 0;
        if appends && !cached && once::is_appended(caller, file.fd(), data)? {
            return Ok(Io::Done(arg.size));
        }
        // The first version of the agreement leaves it to us for every write.
        let always = self.has(FUSE_HANDLE_KILLPRIV) && !self.has(FUSE_HANDLE_KILLPRIV_V2);
        let agreed = self.has(FUSE_HANDLE_KILLPRIV | FUSE_HANDLE_KILLPRIV_V2);
        let unasked = agreed && self.is_squashed(caller);
        if always || unasked || arg.write_flags & FUSE_WRITE_KILL_SUIDGID != 0 {
            self.strip_privileges(caller, file.fd())?;
        }
        self.settle_direct(&file, arg.offset, data, cached || appends)?;
        if appends && let Some(done) = self.appends.write(&self.hot, &file, arg, data) {
            return done.map(Io::Done);
        }
        if let Some(done) = self
            .hot
            .write(&file, arg.offset, src.first(arg.size as usize))
        {
            return done.map(Io::Done);
        }
        let op = IoOp::Write {
            fd: file.fd(),
            offset: arg.offset,
            len: arg.size,
        };
        Ok(Io::Submit {
            op,
            pin: Pin(file.keep()),
        })
    }

    pub(super) fn do_flush(&self, nodeid: u64, arg: &fuse_flush_in) -> Result<(), Errno> {
        let file = self.handles.file(arg.fh, nodeid)?;
        self.locks.drop_owner(nodeid, arg.lock_owner);
        self.inodes.with_fds(|| sys::flush(file.fd()))
    }

    pub(super) fn do_release(&self, nodeid: u64, arg: &fuse_release_in) -> Result<(), Errno> {
        let file = self.handles.file(arg.fh, nodeid)?;
        if arg.release_flags & FUSE_RELEASE_FLUSH != 0 {
            self.locks.drop_owner(nodeid, arg.lock_owner);
        }
        if file.handle().has(handle::LOCKED) {
            self.locks.drop_handle(nodeid, arg.fh);
        }
        if arg.release_flags & FUSE_RELEASE_FLOCK_UNLOCK != 0 && file.handle().has(handle::FLOCKED)
        {
            // At the latest the close below does it.
            let _ = sys::flock(file.fd(), libc::LOCK_UN);
            lock::released();
        }
        file.close_to_reuse(self.plain_flags());
        Ok(())
    }

    pub(super) fn do_fsync(&self, file: OpenFile<'_>, arg: &fuse_fsync_in) -> IoResult {
        let datasync = arg.fsync_flags & FUSE_FSYNC_FDATASYNC != 0;
        let op = IoOp::Fsync {
            fd: file.fd(),
            datasync,
        };
        Ok(Io::Submit {
            op,
            pin: Pin(file.keep()),
        })
    }

    pub(super) fn do_fallocate(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_fallocate_in,
    ) -> IoResult {
        self.expect_writable()?;
        let file = self.handles.file(arg.fh, nodeid)?;
        check_range(arg.offset, arg.length)?;
        self.strip_for(caller, &file)?;
        let op = IoOp::Fallocate {
            fd: file.fd(),
            mode: arg.mode,
            offset: arg.offset,
            len: arg.length,
        };
        Ok(Io::Submit {
            op,
            pin: Pin(file.keep()),
        })
    }

    /// For operations that change a file's content and have no flag for this: FUSE leaves the decision to the server. A
    /// guest that does not say who asks has asked for it before, with a SETATTR of nothing.
    fn strip_for(&self, caller: &Caller<'_>, file: &OpenFile<'_>) -> Result<(), Errno> {
        let may_keep = self.is_untold(caller) || caller.uid == 0 && !self.is_squashed(caller);
        if !may_keep && self.has(FUSE_HANDLE_KILLPRIV | FUSE_HANDLE_KILLPRIV_V2) {
            self.strip_privileges(caller, file.fd())?;
        }
        Ok(())
    }

    pub(super) fn do_copy_file_range(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_copy_file_range_in,
    ) -> Result<u64, Errno> {
        if arg.flags != 0 {
            return Err(Errno::EINVAL);
        }
        self.expect_writable()?;
        let from = self.handles.file(arg.fh_in, nodeid)?;
        let to = self.handles.file(arg.fh_out, arg.nodeid_out)?;
        self.strip_for(caller, &to)?;
        // The host copies through its page cache, in pieces of its own choice.
        self.settle_direct(&from, 0, Segments::empty(), true)?;
        self.settle_direct(&to, 0, Segments::empty(), true)?;
        let len = arg.len.min(MAX_COPY) as usize;
        sys::copy_range(from.fd(), arg.off_in, to.fd(), arg.off_out, len)
    }

    pub(super) fn do_lseek(&self, nodeid: u64, arg: &fuse_lseek_in) -> Result<u64, Errno> {
        let file = self.handles.file(arg.fh, nodeid)?;
        let data_or_hole = [libc::SEEK_DATA as u32, libc::SEEK_HOLE as u32];
        if data_or_hole.contains(&arg.whence) && self.has(FUSE_WRITEBACK_CACHE) {
            // What the guest has not written back yet would look like a hole, and a copy would lose it. Linux answers by
            // itself after this.
            return Err(Errno::ENOSYS);
        }
        sys::seek(file.fd(), arg.offset, arg.whence)
    }

    pub(super) fn do_poll(&self, nodeid: u64, arg: &fuse_poll_in) -> Result<u32, Errno> {
        self.handles.any(arg.fh, nodeid)?;
        let ready = libc::POLLIN | libc::POLLOUT | libc::POLLRDNORM | libc::POLLWRNORM;
        Ok(arg.events & ready as u32)
    }

    pub(super) fn do_getattr(&self, nodeid: u64, fh: Option<u64>) -> Result<fuse_attr_out, Errno> {
        let stat = match fh {
            Some(fh) => sys::stat_fd(self.handles.any(fh, nodeid)?.fd())?,
            None => sys::stat_fd(self.inodes.get(nodeid)?.fd())?,
        };
        Ok(self.attr_out(&stat))
    }

    /// Gives a truncated file its new size through the guest's handle, or through one of our own.
    pub(super) fn resize(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        fh: Option<u64>,
        arg: &fuse_setattr_in,
    ) -> Result<(), Errno> {
        let opened;
        let file;
        let fd = if let Some(fh) = fh {
            file = self.handles.file(fh, nodeid)?;
            file.fd()
        } else {
            let node = self.inodes.get(nodeid)?;
            expect_regular(node.kind()).map_err(|errno| match errno {
                Errno::EISDIR => errno,
                _ => Errno::EINVAL,
            })?;
            opened = self
                .inodes
                .with_fds(|| sys::reopen(node.fd(), libc::O_WRONLY))?;
            opened.raw()
        };
        if arg.valid & FATTR_KILL_SUIDGID != 0 {
            self.strip_privileges(caller, fd)?;
        }
        sys::truncate(fd, arg.size)
    }
}
