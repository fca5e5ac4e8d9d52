//! Attributes, permissions, and what ioctl(2) can ask of an inode.

use ferry_shared::errno::Errno;

use super::sys;
use super::{Passthrough, attr, valid_for};
use crate::fsdev::Caller;
use crate::fuse::abi::*;

const FS_IOC_GETFLAGS: u32 = 0x8008_6601;
const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
const FS_IOC_GETVERSION: u32 = 0x8008_7601;
const FS_IOC32_GETFLAGS: u32 = 0x8004_6601;
const FS_IOC32_SETFLAGS: u32 = 0x4004_6602;
const FS_IOC32_GETVERSION: u32 = 0x8004_7601;
const FS_IOC_FSGETXATTR: u32 = 0x801c_581f;
const FS_IOC_FSSETXATTR: u32 = 0x401c_5820;
const FS_IOC_FIEMAP: u32 = 0xc020_660b;
const FIBMAP: u32 = 1;
const FIGETBSZ: u32 = 2;

/// What SETATTR can be asked to change.
const CHANGES: u32 = FATTR_MODE
    | FATTR_UID
    | FATTR_GID
    | FATTR_SIZE
    | FATTR_ATIME
    | FATTR_MTIME
    | FATTR_ATIME_NOW
    | FATTR_MTIME_NOW;

/// What an ioctl moves.
struct Ioctl {
    /// As the host's kernel knows it.
    host: u32,
    /// It changes the inode.
    changes: bool,
    /// Bytes that the kernel reads.
    input: usize,
    /// Bytes that it gives back.
    output: usize,
}

/// The commands that are passed on. The kernel moves 4 bytes for flags and versions, whatever the encoded size says.
fn known_ioctl(command: u32) -> Option<Ioctl> {
    let changes = matches!(
        command,
        FS_IOC_SETFLAGS | FS_IOC32_SETFLAGS | FS_IOC_FSSETXATTR
    );
    let (host, input, output) = match command {
        FS_IOC_GETFLAGS | FS_IOC32_GETFLAGS => (FS_IOC_GETFLAGS, 0, 4),
        FS_IOC_SETFLAGS | FS_IOC32_SETFLAGS => (FS_IOC_SETFLAGS, 4, 0),
        FS_IOC_GETVERSION | FS_IOC32_GETVERSION => (FS_IOC_GETVERSION, 0, 4),
        FS_IOC_FSGETXATTR => (command, 0, 28),
        FS_IOC_FSSETXATTR => (command, 28, 0),
        FS_IOC_FIEMAP => (command, 32, 32),
        _ => return None,
    };
    Some(Ioctl {
        host,
        changes,
        input,
        output,
    })
}

fn time(secs: u64, nsecs: u32) -> libc::timespec {
    libc::timespec {
        tv_sec: secs as i64,
        tv_nsec: i64::from(nsecs),
    }
}

fn time_to_set(valid: u32, set: u32, now: u32, secs: u64, nsecs: u32) -> libc::timespec {
    if valid & now != 0 {
        time(0, libc::UTIME_NOW as u32)
    } else if valid & set != 0 {
        time(secs, nsecs)
    } else {
        time(0, libc::UTIME_OMIT as u32)
    }
}

impl Passthrough {
    pub(super) fn do_setattr(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_setattr_in,
    ) -> Result<fuse_attr_out, Errno> {
        self.expect_writable()?;
        let node = self.inodes.get(nodeid)?;
        let fh = (arg.valid & FATTR_FH != 0).then_some(arg.fh);
        if arg.valid & FATTR_SIZE != 0 && fh.is_none() {
            self.demand(caller, node.fd(), libc::W_OK)?;
        }
        let squashed = self.act_if_squashed(caller)?;
        // What is left of a change that clears set-user-ID and no more: before a guest's process without the right to keep
        // it changes the content, and for a chown to nobody in particular.
        let asked = arg.valid & CHANGES == 0;
        if asked
            && self.has(FUSE_HANDLE_KILLPRIV | FUSE_HANDLE_KILLPRIV_V2)
            && self.may_strip(caller, nodeid, node.fd())?
        {
            self.strip_privileges(caller, node.fd())?;
        }
        if arg.valid & (FATTR_UID | FATTR_GID) != 0 {
            let given = |flag: u32, id: u32| (arg.valid & flag != 0).then_some(id);
            let (uid, gid) =
                self.owner_in_host(given(FATTR_UID, arg.uid), given(FATTR_GID, arg.gid))?;
            sys::chown(node.fd(), uid, gid)?;
        }
        // After the owner, whose change takes set-user-ID away; the mode in the same request counts.
        if arg.valid & FATTR_MODE != 0 {
            sys::chmod(node.fd(), arg.mode)?;
        }
        if arg.valid & FATTR_SIZE != 0 {
            // Its right to do so has been looked at; taking set-user-ID away needs more than that.
            drop(squashed);
            self.resize(caller, nodeid, fh, arg)?;
        }
        // A guest that caches writes also reports its change time, which is the host's to keep.
        if arg.valid & (FATTR_ATIME | FATTR_MTIME | FATTR_ATIME_NOW | FATTR_MTIME_NOW) != 0 {
            if arg.atimensec > 999_999_999 || arg.mtimensec > 999_999_999 {
                return Err(Errno::EINVAL);
            }
            let (valid, at, mt) = (arg.valid, arg.atimensec, arg.mtimensec);
            let times = [
                time_to_set(valid, FATTR_ATIME, FATTR_ATIME_NOW, arg.atime, at),
                time_to_set(valid, FATTR_MTIME, FATTR_MTIME_NOW, arg.mtime, mt),
            ];
            sys::set_times(node.fd(), &times)?;
        }
        Ok(self.attr_out(&sys::stat_fd(node.fd())?))
    }

    /// Whether a SETATTR of nothing may take set-user-ID away. A guest sends one for the chown of a stranger too, without
    /// having looked at its rights; who may change the content has the file open for writing.
    fn may_strip(&self, caller: &Caller<'_>, nodeid: u64, fd: i32) -> Result<bool, Errno> {
        if self.handles.is_written(nodeid) {
            return Ok(true);
        }
        let told = !self.is_untold(caller);
        let owner = self.spec.export.map_uid.to_guest(sys::stat_fd(fd)?.stx_uid);
        Ok(told && (caller.uid == 0 || caller.uid == owner))
    }

    pub(super) fn do_statx(
        &self,
        nodeid: u64,
        arg: &fuse_statx_in,
    ) -> Result<fuse_statx_out, Errno> {
        let mask = (arg.sx_mask & sys::STAT_MASK) | libc::STATX_BASIC_STATS;
        let stat = if arg.getattr_flags & FUSE_GETATTR_FH != 0 {
            let file = self.handles.any(arg.fh, nodeid)?;
            sys::stat_fd_with(file.fd(), arg.sx_flags, mask)?
        } else {
            let node = self.inodes.get(nodeid)?;
            sys::stat_fd_with(node.fd(), arg.sx_flags, mask)?
        };
        let (attr_valid, attr_valid_nsec) = valid_for(self.spec.export.attr_ms());
        let export = &self.spec.export;
        let stat = attr::statx(&stat);
        Ok(fuse_statx_out {
            attr_valid,
            attr_valid_nsec,
            flags: 0,
            spare: [0; 2],
            stat: fuse_statx {
                uid: export.map_uid.to_guest(stat.uid),
                gid: export.map_gid.to_guest(stat.gid),
                ..stat
            },
        })
    }

    pub(super) fn do_access(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        mask: u32,
    ) -> Result<(), Errno> {
        if mask & !0o7 != 0 {
            return Err(Errno::EINVAL);
        }
        let node = self.inodes.get(nodeid)?;
        let inodes = [libc::S_IFREG, libc::S_IFDIR, libc::S_IFLNK];
        if mask & libc::W_OK as u32 != 0 && inodes.contains(&node.kind()) {
            self.expect_writable()?;
        }
        if self.is_untold(caller) {
            return sys::access(node.fd(), mask);
        }
        let _caller = self.act_as(caller, 0)?;
        sys::access(node.fd(), mask)
    }

    pub(super) fn do_bmap(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_bmap_in,
    ) -> Result<u64, Errno> {
        if self.is_squashed(caller) {
            return Err(Errno::EPERM);
        }
        let node = self.inodes.get(nodeid)?;
        if node.kind() != libc::S_IFREG || arg.blocksize == 0 {
            return Err(Errno::EINVAL);
        }
        let file = self
            .inodes
            .with_fds(|| sys::reopen(node.fd(), libc::O_RDONLY))?;
        let mut data = [0u8; 32];
        sys::ioctl(file.raw(), FIGETBSZ, &mut data)?;
        let host_size = u64::from(first_u32(&data));
        let size = u64::from(arg.blocksize);
        let offset = arg.block.checked_mul(size).ok_or(Errno::EINVAL)?;
        let block = offset.checked_div(host_size).ok_or(Errno::EIO)?;
        let within = offset.checked_rem(host_size).ok_or(Errno::EIO)?;
        let block = u32::try_from(block).map_err(|_| Errno::EOVERFLOW)?;
        data = [0u8; 32];
        put_u32(&mut data, block);
        sys::ioctl(file.raw(), FIBMAP, &mut data)?;
        // A hole is block 0.
        match u64::from(first_u32(&data)) {
            0 => Ok(0),
            found => found
                .checked_mul(host_size)
                .and_then(|at| at.checked_add(within))
                .and_then(|at| at.checked_div(size))
                .ok_or(Errno::EOVERFLOW),
        }
    }

    pub(super) fn do_ioctl(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_ioctl_in,
        input: &[u8],
        out: &mut [u8],
    ) -> Result<(fuse_ioctl_out, usize), Errno> {
        let known = known_ioctl(arg.cmd).ok_or(Errno::ENOTTY)?;
        if known.changes {
            self.expect_writable()?;
        }
        let file = self.handles.any(arg.fh, nodeid)?;
        let mut data = [0u8; 32];
        let given = input.get(..known.input).ok_or(Errno::EINVAL)?;
        for (to, from) in data.iter_mut().zip(given) {
            *to = *from;
        }
        // A guest gives room for what the command's number says, and for no list of extents behind it.
        if known.host == FS_IOC_FIEMAP && data.get(24..28) != Some(&[0; 4]) {
            return Err(Errno::EOPNOTSUPP);
        }
        let out = out.get_mut(..known.output).ok_or(Errno::EINVAL)?;
        let _caller = self.act_if_squashed(caller)?;
        let result = sys::ioctl(file.fd(), known.host, &mut data)?;
        for (to, from) in out.iter_mut().zip(&data) {
            *to = *from;
        }
        let reply = fuse_ioctl_out {
            result,
            flags: 0,
            in_iovs: 0,
            out_iovs: 0,
        };
        Ok((reply, known.output))
    }

    pub(super) fn do_syncfs(&self, nodeid: u64) -> Result<(), Errno> {
        let node = self.inodes.get(nodeid)?;
        match self.inodes.mount_of(&node) {
            Some(mount) => sys::syncfs(mount.fd),
            None => Err(Errno::EOPNOTSUPP),
        }
    }
}

fn first_u32(data: &[u8; 32]) -> u32 {
    data.first_chunk()
        .map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

fn put_u32(data: &mut [u8; 32], value: u32) {
    if let Some(bytes) = data.first_chunk_mut() {
        *bytes = value.to_ne_bytes();
    }
}
