//! Attributes in the kernel's form turned into FUSE's.

use super::sys::Stat;
use crate::fuse::abi::{fuse_attr, fuse_kstatfs, fuse_statx, fuse_sx_time};

/// `S_IFMT` part of a mode.
pub(super) fn kind(stat: &Stat) -> u32 {
    u32::from(stat.stx_mode) & libc::S_IFMT
}

/// A device number in the 32 bits that Linux puts on the wire.
fn encode_dev(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
}

/// The counterpart of [`encode_dev`], as mknod(2) wants it.
pub(super) fn decode_dev(dev: u32) -> u64 {
    let major = (dev >> 8) & 0xfff;
    let minor = (dev & 0xff) | ((dev >> 12) & 0xf_ff00);
    libc::makedev(major, minor)
}

pub(super) fn from_stat(stat: &Stat) -> fuse_attr {
    fuse_attr {
        ino: stat.stx_ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: stat.stx_atime.tv_sec as u64,
        mtime: stat.stx_mtime.tv_sec as u64,
        ctime: stat.stx_ctime.tv_sec as u64,
        atimensec: stat.stx_atime.tv_nsec,
        mtimensec: stat.stx_mtime.tv_nsec,
        ctimensec: stat.stx_ctime.tv_nsec,
        mode: u32::from(stat.stx_mode),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: encode_dev(stat.stx_rdev_major, stat.stx_rdev_minor),
        blksize: stat.stx_blksize,
        flags: 0,
    }
}

fn time(time: &libc::statx_timestamp) -> fuse_sx_time {
    fuse_sx_time {
        tv_sec: time.tv_sec,
        tv_nsec: time.tv_nsec,
        reserved: 0,
    }
}

pub(super) fn statx(stat: &Stat) -> fuse_statx {
    fuse_statx {
        mask: stat.stx_mask & (libc::STATX_BASIC_STATS | libc::STATX_BTIME),
        blksize: stat.stx_blksize,
        attributes: stat.stx_attributes,
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        mode: stat.stx_mode,
        spare0: [0],
        ino: stat.stx_ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        attributes_mask: stat.stx_attributes_mask,
        atime: time(&stat.stx_atime),
        btime: time(&stat.stx_btime),
        ctime: time(&stat.stx_ctime),
        mtime: time(&stat.stx_mtime),
        rdev_major: stat.stx_rdev_major,
        rdev_minor: stat.stx_rdev_minor,
        dev_major: stat.stx_dev_major,
        dev_minor: stat.stx_dev_minor,
        spare2: [0; 14],
    }
}

pub(super) fn statfs(stat: &libc::statfs) -> fuse_kstatfs {
    fuse_kstatfs {
        blocks: stat.f_blocks,
        bfree: stat.f_bfree,
        bavail: stat.f_bavail,
        files: stat.f_files,
        ffree: stat.f_ffree,
        bsize: stat.f_bsize as u32,
        namelen: stat.f_namelen as u32,
        frsize: stat.f_frsize as u32,
        padding: 0,
        spare: [0; 6],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_the_wire() {
        for (major, minor) in [(0, 0), (8, 1), (259, 300), (0xfff, 0xf_ffff)] {
            let dev = decode_dev(encode_dev(major, minor));
            assert_eq!((libc::major(dev), libc::minor(dev)), (major, minor));
        }
    }
}
