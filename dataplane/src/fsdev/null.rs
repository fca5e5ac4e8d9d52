//! The `null` backend: a fixed tree that stores nothing.
//!
//! For bring-up, fuzzing and measurement: the root directory holds a few large files that read as zeros and discard what is
//! written. It keeps no state at all, so every answer takes the same short time and no lookup count or handle can leak.
//! What would change the tree is refused as on a read-only file system.

use core::ffi::CStr;

use ferry_shared::errno::Errno;
use ferry_shared::limits::{MAX_DATA_BUFFER, NAME_MAX};

use super::{Caller, DirSink, FsDev, Io, IoResult, Negotiated, Offer};
use crate::fuse::abi::{
    FUSE_ATOMIC_O_TRUNC, FUSE_DONT_MASK, FUSE_HANDLE_KILLPRIV, FUSE_HANDLE_KILLPRIV_V2,
    FUSE_ROOT_ID, fuse_attr, fuse_attr_out, fuse_copy_file_range_in, fuse_create_in,
    fuse_entry_out, fuse_fallocate_in, fuse_flush_in, fuse_fsync_in, fuse_ioctl_in, fuse_ioctl_out,
    fuse_kstatfs, fuse_lseek_in, fuse_mkdir_in, fuse_mknod_in, fuse_open_in, fuse_open_out,
    fuse_poll_in, fuse_read_in, fuse_release_in, fuse_setattr_in, fuse_statx, fuse_statx_in,
    fuse_statx_out, fuse_write_in,
};
use crate::mem::Segments;

/// The files, in the order of their node ids, which follow the root's.
const FILES: [&CStr; 4] = [c"zero0", c"zero1", c"zero2", c"zero3"];
/// Length of each file, in bytes.
pub const FILE_SIZE: u64 = 1 << 30;
/// Blocks are counted in units of 512 bytes; nothing is allocated.
const BLOCK_SIZE: u32 = 4_096;
/// Nothing ever changes, so the guest may keep what it knows for an hour.
const VALID_SECONDS: u64 = 3_600;

const S_IFDIR: u32 = 0o40_000;
const S_IFREG: u32 = 0o100_000;
const DT_DIR: u32 = 4;
const DT_REG: u32 = 8;
const O_EXCL: u32 = 0o200;
const R_OK: u32 = 4;
const W_OK: u32 = 2;
const X_OK: u32 = 1;
const STATX_BASIC_STATS: u32 = 0x7ff;
const POLL_READY: u32 = 0x1 | 0x4 | 0x40 | 0x100;
const SEEK_SET: u32 = 0;
const SEEK_END: u32 = 2;
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

static ZEROS: [u8; 16 * 1024] = [0; 16 * 1024];

/// The `null` backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct Null;

/// What a node id stands for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Node {
    Root,
    File,
}

fn node(nodeid: u64) -> Result<Node, Errno> {
    const LAST: u64 = FUSE_ROOT_ID + FILES.len() as u64;
    match nodeid {
        FUSE_ROOT_ID => Ok(Node::Root),
        id if id > FUSE_ROOT_ID && id <= LAST => Ok(Node::File),
        _ => Err(Errno::ENOENT),
    }
}

fn directory(nodeid: u64) -> Result<(), Errno> {
    match node(nodeid)? {
        Node::Root => Ok(()),
        Node::File => Err(Errno::ENOTDIR),
    }
}

fn file(nodeid: u64) -> Result<(), Errno> {
    match node(nodeid)? {
        Node::Root => Err(Errno::EISDIR),
        Node::File => Ok(()),
    }
}

/// Handles are the node ids themselves.
fn opened(nodeid: u64, fh: u64) -> Result<Node, Errno> {
    let node = node(nodeid)?;
    if fh == nodeid {
        Ok(node)
    } else {
        Err(Errno::EBADF)
    }
}

fn find(dir: u64, name: &CStr) -> Result<Option<u64>, Errno> {
    directory(dir)?;
    let found = FILES.iter().zip(FUSE_ROOT_ID.saturating_add(1)..);
    Ok(found.filter(|(n, _)| **n == name).map(|(_, id)| id).next())
}

/// A new name is refused: because it exists, or because nothing can be created.
fn no_new_name(dir: u64, name: &CStr) -> Errno {
    match find(dir, name) {
        Ok(Some(_)) => Errno::EEXIST,
        Ok(None) => Errno::EROFS,
        Err(errno) => errno,
    }
}

/// An existing name stays: because it is missing, or because nothing can be removed.
fn no_removal(dir: u64, name: &CStr) -> Errno {
    match find(dir, name) {
        Ok(Some(_)) => Errno::EROFS,
        Ok(None) => Errno::ENOENT,
        Err(errno) => errno,
    }
}

fn attr(nodeid: u64) -> Result<fuse_attr, Errno> {
    let (mode, nlink, size) = match node(nodeid)? {
        Node::Root => (S_IFDIR | 0o755, 2, 0),
        Node::File => (S_IFREG | 0o666, 1, FILE_SIZE),
    };
    Ok(fuse_attr {
        ino: nodeid,
        size,
        mode,
        nlink,
        blksize: BLOCK_SIZE,
        ..fuse_attr::default()
    })
}

fn entry(nodeid: u64) -> Result<fuse_entry_out, Errno> {
    Ok(fuse_entry_out {
        nodeid,
        entry_valid: VALID_SECONDS,
        attr_valid: VALID_SECONDS,
        attr: attr(nodeid)?,
        ..fuse_entry_out::default()
    })
}

fn attr_out(nodeid: u64) -> Result<fuse_attr_out, Errno> {
    Ok(fuse_attr_out {
        attr_valid: VALID_SECONDS,
        attr: attr(nodeid)?,
        ..fuse_attr_out::default()
    })
}

fn open_out(nodeid: u64) -> fuse_open_out {
    fuse_open_out {
        fh: nodeid,
        ..fuse_open_out::default()
    }
}

fn fill_with_zeros(dst: Segments<'_>) {
    let mut rest = dst;
    while !rest.is_empty() {
        let written = rest.write(&ZEROS);
        rest = rest.after(written);
    }
}

impl FsDev for Null {
    fn offer(&self) -> Offer {
        Offer {
            // Nothing has modes to mask or privileges to drop, and no data to truncate.
            flags: FUSE_ATOMIC_O_TRUNC
                | FUSE_DONT_MASK
                | FUSE_HANDLE_KILLPRIV
                | FUSE_HANDLE_KILLPRIV_V2,
            max_write: MAX_DATA_BUFFER,
            max_readahead: MAX_DATA_BUFFER,
        }
    }

    fn mount(&self, _: Negotiated) -> Result<(), Errno> {
        Ok(())
    }

    fn unmount(&self) {}

    fn may_block(&self, _: u32) -> bool {
        false
    }

    fn lookup(&self, _: &Caller<'_>, id: u64, name: &CStr) -> Result<fuse_entry_out, Errno> {
        entry(find(id, name)?.ok_or(Errno::ENOENT)?)
    }

    fn getattr(&self, _: &Caller<'_>, id: u64, _: Option<u64>) -> Result<fuse_attr_out, Errno> {
        attr_out(id)
    }

    fn setattr(
        &self,
        _: &Caller<'_>,
        id: u64,
        _: &fuse_setattr_in,
    ) -> Result<fuse_attr_out, Errno> {
        attr_out(id)
    }

    fn statx(&self, _: &Caller<'_>, id: u64, _: &fuse_statx_in) -> Result<fuse_statx_out, Errno> {
        let attr = attr(id)?;
        let [m0, m1, ..] = attr.mode.to_le_bytes();
        Ok(fuse_statx_out {
            attr_valid: VALID_SECONDS,
            stat: fuse_statx {
                mask: STATX_BASIC_STATS,
                blksize: attr.blksize,
                nlink: attr.nlink,
                mode: u16::from_le_bytes([m0, m1]),
                ino: attr.ino,
                size: attr.size,
                ..fuse_statx::default()
            },
            ..fuse_statx_out::default()
        })
    }

    fn readlink(&self, _: &Caller<'_>, id: u64, _: &mut [u8]) -> Result<usize, Errno> {
        node(id)?;
        Err(Errno::EINVAL)
    }

    fn symlink(
        &self,
        _: &Caller<'_>,
        id: u64,
        name: &CStr,
        _: &CStr,
    ) -> Result<fuse_entry_out, Errno> {
        Err(no_new_name(id, name))
    }

    fn mknod(
        &self,
        _: &Caller<'_>,
        id: u64,
        name: &CStr,
        _: &fuse_mknod_in,
    ) -> Result<fuse_entry_out, Errno> {
        Err(no_new_name(id, name))
    }

    fn mkdir(
        &self,
        _: &Caller<'_>,
        id: u64,
        name: &CStr,
        _: &fuse_mkdir_in,
    ) -> Result<fuse_entry_out, Errno> {
        Err(no_new_name(id, name))
    }

    fn unlink(&self, _: &Caller<'_>, id: u64, name: &CStr) -> Result<(), Errno> {
        Err(no_removal(id, name))
    }

    fn rmdir(&self, _: &Caller<'_>, id: u64, name: &CStr) -> Result<(), Errno> {
        Err(match find(id, name)? {
            Some(_) => Errno::ENOTDIR,
            None => Errno::ENOENT,
        })
    }

    fn rename(
        &self,
        _: &Caller<'_>,
        id: u64,
        name: &CStr,
        newdir: u64,
        _: &CStr,
        _: u32,
    ) -> Result<(), Errno> {
        directory(newdir)?;
        Err(no_removal(id, name))
    }

    fn link(
        &self,
        _: &Caller<'_>,
        id: u64,
        old: u64,
        name: &CStr,
    ) -> Result<fuse_entry_out, Errno> {
        node(old)?;
        Err(no_new_name(id, name))
    }

    fn open(&self, _: &Caller<'_>, id: u64, _: &fuse_open_in) -> Result<fuse_open_out, Errno> {
        file(id)?;
        Ok(open_out(id))
    }

    fn create(
        &self,
        _: &Caller<'_>,
        id: u64,
        name: &CStr,
        arg: &fuse_create_in,
    ) -> Result<(fuse_entry_out, fuse_open_out), Errno> {
        match find(id, name)? {
            Some(_) if arg.flags & O_EXCL != 0 => Err(Errno::EEXIST),
            Some(found) => Ok((entry(found)?, open_out(found))),
            None => Err(Errno::EROFS),
        }
    }

    fn tmpfile(
        &self,
        _: &Caller<'_>,
        id: u64,
        _: &fuse_create_in,
    ) -> Result<(fuse_entry_out, fuse_open_out), Errno> {
        directory(id)?;
        Err(Errno::EROFS)
    }

    fn read(&self, _: &Caller<'_>, id: u64, arg: &fuse_read_in, dst: Segments<'_>) -> IoResult {
        if opened(id, arg.fh)? == Node::Root {
            return Err(Errno::EISDIR);
        }
        let left = FILE_SIZE.saturating_sub(arg.offset);
        let left = u32::try_from(left).unwrap_or(u32::MAX).min(arg.size);
        let dst = dst.first(left as usize);
        fill_with_zeros(dst);
        Ok(Io::Done(u32::try_from(dst.len()).unwrap_or(left)))
    }

    fn write(&self, _: &Caller<'_>, id: u64, arg: &fuse_write_in, _: Segments<'_>) -> IoResult {
        match opened(id, arg.fh)? {
            Node::Root => Err(Errno::EISDIR),
            Node::File => Ok(Io::Done(arg.size)),
        }
    }

    fn flush(&self, _: &Caller<'_>, id: u64, arg: &fuse_flush_in) -> Result<(), Errno> {
        opened(id, arg.fh).map(drop)
    }

    fn release(&self, _: &Caller<'_>, id: u64, arg: &fuse_release_in) -> Result<(), Errno> {
        opened(id, arg.fh).map(drop)
    }

    fn fsync(&self, _: &Caller<'_>, id: u64, arg: &fuse_fsync_in) -> IoResult {
        opened(id, arg.fh).map(|_| Io::Done(0))
    }

    fn statfs(&self, _: &Caller<'_>, id: u64) -> Result<fuse_kstatfs, Errno> {
        node(id)?;
        Ok(fuse_kstatfs {
            files: FILES.len() as u64,
            bsize: BLOCK_SIZE,
            frsize: BLOCK_SIZE,
            namelen: NAME_MAX as u32,
            ..fuse_kstatfs::default()
        })
    }

    fn setxattr(
        &self,
        _: &Caller<'_>,
        id: u64,
        _: &CStr,
        _: &[u8],
        _: u32,
        _: u32,
    ) -> Result<(), Errno> {
        node(id)?;
        Err(Errno::EROFS)
    }

    fn getxattr(&self, _: &Caller<'_>, id: u64, _: &CStr, _: &mut [u8]) -> Result<usize, Errno> {
        node(id)?;
        Err(Errno::ENODATA)
    }

    fn listxattr(&self, _: &Caller<'_>, id: u64, _: &mut [u8]) -> Result<usize, Errno> {
        node(id)?;
        Ok(0)
    }

    fn removexattr(&self, _: &Caller<'_>, id: u64, _: &CStr) -> Result<(), Errno> {
        node(id)?;
        Err(Errno::ENODATA)
    }

    fn opendir(&self, _: &Caller<'_>, id: u64, _: &fuse_open_in) -> Result<fuse_open_out, Errno> {
        directory(id)?;
        Ok(open_out(id))
    }

    fn readdir(
        &self,
        _: &Caller<'_>,
        id: u64,
        arg: &fuse_read_in,
        plus: bool,
        out: &mut dyn DirSink,
    ) -> Result<(), Errno> {
        if opened(id, arg.fh)? == Node::File {
            return Err(Errno::ENOTDIR);
        }
        let dots = [c".", c".."].into_iter().map(|name| (name, id, DT_DIR));
        let files = FILES.into_iter().zip(FUSE_ROOT_ID.saturating_add(1)..);
        let all = dots.chain(files.map(|(name, id)| (name, id, DT_REG)));
        let skip = usize::try_from(arg.offset).unwrap_or(usize::MAX);
        for ((name, id, kind), off) in all.zip(1u64..).skip(skip) {
            let name = name.to_bytes();
            let added = if plus {
                let mut entry = entry(id)?;
                if kind == DT_DIR {
                    // The dots are listed without being looked up.
                    entry.nodeid = 0;
                }
                out.entry_plus(name, off, kind, &entry)
            } else {
                out.entry(name, id, off, kind)
            };
            if !added {
                break;
            }
        }
        Ok(())
    }

    fn releasedir(&self, _: &Caller<'_>, id: u64, arg: &fuse_release_in) -> Result<(), Errno> {
        opened(id, arg.fh).map(drop)
    }

    fn fsyncdir(&self, _: &Caller<'_>, id: u64, arg: &fuse_fsync_in) -> IoResult {
        opened(id, arg.fh).map(|_| Io::Done(0))
    }

    fn access(&self, _: &Caller<'_>, id: u64, mask: u32) -> Result<(), Errno> {
        let allowed = match node(id)? {
            Node::Root => R_OK | X_OK,
            Node::File => R_OK | W_OK,
        };
        if mask & !allowed == 0 {
            Ok(())
        } else {
            Err(Errno::EACCES)
        }
    }

    fn ioctl(
        &self,
        _: &Caller<'_>,
        id: u64,
        arg: &fuse_ioctl_in,
        _: &[u8],
        _: &mut [u8],
    ) -> Result<(fuse_ioctl_out, usize), Errno> {
        opened(id, arg.fh)?;
        Err(Errno::ENOTTY)
    }

    fn poll(&self, _: &Caller<'_>, id: u64, arg: &fuse_poll_in) -> Result<u32, Errno> {
        opened(id, arg.fh)?;
        Ok(arg.events & POLL_READY)
    }

    fn fallocate(&self, _: &Caller<'_>, id: u64, arg: &fuse_fallocate_in) -> IoResult {
        opened(id, arg.fh)?;
        Ok(Io::Done(0))
    }

    fn lseek(&self, _: &Caller<'_>, id: u64, arg: &fuse_lseek_in) -> Result<u64, Errno> {
        opened(id, arg.fh)?;
        match arg.whence {
            SEEK_SET => Ok(arg.offset),
            SEEK_END => FILE_SIZE
                .checked_add_signed(arg.offset.cast_signed())
                .ok_or(Errno::EINVAL),
            // All of a file counts as data, and a hole follows its end.
            SEEK_DATA | SEEK_HOLE if arg.offset >= FILE_SIZE => Err(Errno::ENXIO),
            SEEK_DATA => Ok(arg.offset),
            SEEK_HOLE => Ok(FILE_SIZE),
            _ => Err(Errno::EINVAL),
        }
    }

    fn copy_file_range(
        &self,
        _: &Caller<'_>,
        id: u64,
        arg: &fuse_copy_file_range_in,
    ) -> Result<u64, Errno> {
        opened(id, arg.fh_in)?;
        opened(arg.nodeid_out, arg.fh_out)?;
        let left = FILE_SIZE.saturating_sub(arg.off_in);
        Ok(left.min(arg.len).min(u64::from(MAX_DATA_BUFFER)))
    }

    fn syncfs(&self, _: &Caller<'_>, id: u64) -> Result<(), Errno> {
        node(id).map(drop)
    }
}
