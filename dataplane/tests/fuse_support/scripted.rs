//! A backend that writes down what it is asked and answers with fixed values.

use std::borrow::Cow;
use std::ffi::CStr;
use std::sync::Mutex;

use ferry_dataplane::fsdev::{Caller, DirSink, FsDev, Io, IoOp, IoResult, Negotiated, Offer, Pin};
use ferry_dataplane::fuse::abi::*;
use ferry_dataplane::fuse::session::BACKEND_FLAGS;
use ferry_dataplane::mem::Segments;
use ferry_shared::errno::Errno;

/// A handle whose data operations are submitted.
pub(crate) const SUBMITTED: u64 = 0x52;
/// A lock owner whose locks conflict.
pub(crate) const CONFLICTING: u64 = 0xc0;
/// A node that gives `Errno(512)`, which no guest may see.
pub(crate) const INTERNAL: u64 = 0x512;

pub(crate) struct Scripted {
    pub(crate) calls: Mutex<Vec<String>>,
    pub(crate) offer: Offer,
    pub(crate) mount_error: Option<Errno>,
    /// Length that READLINK, GETXATTR, LISTXATTR and IOCTL claim to have filled, instead of the true one.
    pub(crate) claimed: Option<usize>,
}

impl Default for Scripted {
    fn default() -> Scripted {
        Scripted {
            calls: Mutex::default(),
            offer: Offer {
                flags: BACKEND_FLAGS,
                max_write: 128 * 1024,
                max_readahead: 64 * 1024,
            },
            mount_error: None,
            claimed: None,
        }
    }
}

impl Scripted {
    fn call(&self, text: String) {
        self.calls.lock().expect("no test panics here").push(text);
    }

    /// What was asked since the last time.
    pub(crate) fn taken(&self) -> Vec<String> {
        std::mem::take(&mut *self.calls.lock().expect("no test panics here"))
    }

    fn fill(&self, out: &mut [u8], with: &[u8]) -> Result<usize, Errno> {
        if let Some(room) = out.get_mut(..with.len()) {
            room.copy_from_slice(with);
        } else if !out.is_empty() {
            return Err(Errno::ERANGE);
        }
        Ok(self.claimed.unwrap_or(with.len()))
    }
}

fn attr() -> fuse_attr {
    fuse_attr {
        ino: 1,
        size: 2,
        blocks: 3,
        atime: 4,
        mtime: 5,
        ctime: 6,
        atimensec: 7,
        mtimensec: 8,
        ctimensec: 9,
        mode: 10,
        nlink: 11,
        uid: 12,
        gid: 13,
        rdev: 14,
        blksize: 15,
        flags: 16,
    }
}

fn entry(nodeid: u64) -> fuse_entry_out {
    fuse_entry_out {
        nodeid,
        generation: 21,
        entry_valid: 22,
        attr_valid: 23,
        entry_valid_nsec: 24,
        attr_valid_nsec: 25,
        attr: attr(),
    }
}

fn attr_out() -> fuse_attr_out {
    fuse_attr_out {
        attr_valid: 31,
        attr_valid_nsec: 32,
        dummy: 0,
        attr: attr(),
    }
}

fn open(fh: u64) -> fuse_open_out {
    fuse_open_out {
        fh,
        open_flags: 4,
        backing_id: 0,
    }
}

fn text(name: &CStr) -> Cow<'_, str> {
    name.to_string_lossy()
}

fn who(caller: &Caller<'_>) -> String {
    let Caller { uid, gid, pid, .. } = caller;
    let mut who = format!("{uid}/{gid}/{pid}");
    if let Some(group) = caller.supplementary_group {
        who += &format!(" group {group}");
    }
    if let Some((name, value)) = caller.security_context {
        who += &format!(" label {}={}", text(name), String::from_utf8_lossy(value));
    }
    who
}

impl FsDev for Scripted {
    fn offer(&self) -> Offer {
        self.offer
    }

    fn mount(&self, negotiated: Negotiated) -> Result<(), Errno> {
        let Negotiated {
            minor,
            flags,
            max_write,
        } = negotiated;
        self.call(format!("mount {minor} {flags:#x} {max_write}"));
        self.mount_error.map_or(Ok(()), Err)
    }

    fn unmount(&self) {
        self.call("unmount".into());
    }

    fn may_block(&self, _: u32) -> bool {
        false
    }

    fn unpin(&self, pin: Pin, op: IoOp, result: i32) {
        self.call(format!("unpin {} {op:?} {result}", pin.0));
    }

    fn lookup(&self, c: &Caller<'_>, id: u64, name: &CStr) -> Result<fuse_entry_out, Errno> {
        self.call(format!("lookup {id} {} by {}", text(name), who(c)));
        match id {
            INTERNAL => Err(Errno::from_raw(512)),
            _ => Ok(entry(77)),
        }
    }

    fn forget(&self, id: u64, nlookup: u64) {
        self.call(format!("forget {id} {nlookup}"));
    }

    fn getattr(&self, _: &Caller<'_>, id: u64, fh: Option<u64>) -> Result<fuse_attr_out, Errno> {
        self.call(format!("getattr {id} {fh:?}"));
        Ok(attr_out())
    }

    fn setattr(
        &self,
        _: &Caller<'_>,
        id: u64,
        a: &fuse_setattr_in,
    ) -> Result<fuse_attr_out, Errno> {
        self.call(format!(
            "setattr {id} {:#x} {} {} {} {} {} {} {} {} {} {:o} {} {}",
            a.valid,
            a.fh,
            a.size,
            a.lock_owner,
            a.atime,
            a.mtime,
            a.ctime,
            a.atimensec,
            a.mtimensec,
            a.ctimensec,
            a.mode,
            a.uid,
            a.gid
        ));
        Ok(attr_out())
    }

    fn statx(&self, _: &Caller<'_>, id: u64, a: &fuse_statx_in) -> Result<fuse_statx_out, Errno> {
        self.call(format!(
            "statx {id} {} {} {} {}",
            a.getattr_flags, a.fh, a.sx_flags, a.sx_mask
        ));
        let time = |tv_sec, tv_nsec| fuse_sx_time {
            tv_sec,
            tv_nsec,
            reserved: 0,
        };
        Ok(fuse_statx_out {
            attr_valid: 1,
            attr_valid_nsec: 2,
            stat: fuse_statx {
                mask: 3,
                blksize: 4,
                attributes: 5,
                nlink: 6,
                uid: 7,
                gid: 8,
                mode: 9,
                ino: 10,
                size: 11,
                blocks: 12,
                attributes_mask: 13,
                atime: time(14, 15),
                btime: time(16, 17),
                ctime: time(18, 19),
                mtime: time(20, 21),
                rdev_major: 22,
                rdev_minor: 23,
                dev_major: 24,
                dev_minor: 25,
                ..fuse_statx::default()
            },
            ..fuse_statx_out::default()
        })
    }

    fn readlink(&self, _: &Caller<'_>, id: u64, out: &mut [u8]) -> Result<usize, Errno> {
        self.call(format!("readlink {id}"));
        let target = b"../elsewhere";
        let len = target.len().min(out.len());
        out[..len].copy_from_slice(&target[..len]);
        Ok(self.claimed.unwrap_or(len))
    }

    fn symlink(
        &self,
        c: &Caller<'_>,
        id: u64,
        name: &CStr,
        target: &CStr,
    ) -> Result<fuse_entry_out, Errno> {
        let (name, target) = (text(name), text(target));
        self.call(format!("symlink {id} {name} {target} by {}", who(c)));
        Ok(entry(78))
    }

    fn mknod(
        &self,
        c: &Caller<'_>,
        id: u64,
        name: &CStr,
        a: &fuse_mknod_in,
    ) -> Result<fuse_entry_out, Errno> {
        self.call(format!(
            "mknod {id} {} {:o} {} {:o} by {}",
            text(name),
            a.mode,
            a.rdev,
            a.umask,
            who(c)
        ));
        Ok(entry(79))
    }

    fn mkdir(
        &self,
        c: &Caller<'_>,
        id: u64,
        name: &CStr,
        a: &fuse_mkdir_in,
    ) -> Result<fuse_entry_out, Errno> {
        let name = text(name);
        self.call(format!(
            "mkdir {id} {name} {:o} {:o} by {}",
            a.mode,
            a.umask,
            who(c)
        ));
        Ok(entry(80))
    }

    fn unlink(&self, _: &Caller<'_>, id: u64, name: &CStr) -> Result<(), Errno> {
        self.call(format!("unlink {id} {}", text(name)));
        Ok(())
    }

    fn rmdir(&self, _: &Caller<'_>, id: u64, name: &CStr) -> Result<(), Errno> {
        self.call(format!("rmdir {id} {}", text(name)));
        Ok(())
    }

    fn rename(
        &self,
        _: &Caller<'_>,
        id: u64,
        name: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> Result<(), Errno> {
        let (name, newname) = (text(name), text(newname));
        self.call(format!("rename {id} {name} {newdir} {newname} {flags}"));
        Ok(())
    }

    fn link(
        &self,
        _: &Caller<'_>,
        id: u64,
        old: u64,
        name: &CStr,
    ) -> Result<fuse_entry_out, Errno> {
        self.call(format!("link {id} {old} {}", text(name)));
        Ok(entry(81))
    }

    fn open(&self, _: &Caller<'_>, id: u64, a: &fuse_open_in) -> Result<fuse_open_out, Errno> {
        self.call(format!("open {id} {:o} {}", a.flags, a.open_flags));
        Ok(open(0xf1))
    }

    fn create(
        &self,
        c: &Caller<'_>,
        id: u64,
        name: &CStr,
        a: &fuse_create_in,
    ) -> Result<(fuse_entry_out, fuse_open_out), Errno> {
        self.call(format!(
            "create {id} {} {:o} {:o} {:o} {} by {}",
            text(name),
            a.flags,
            a.mode,
            a.umask,
            a.open_flags,
            who(c)
        ));
        Ok((entry(82), open(0xf2)))
    }

    fn tmpfile(
        &self,
        c: &Caller<'_>,
        id: u64,
        a: &fuse_create_in,
    ) -> Result<(fuse_entry_out, fuse_open_out), Errno> {
        self.call(format!(
            "tmpfile {id} {:o} {:o} {:o} {} by {}",
            a.flags,
            a.mode,
            a.umask,
            a.open_flags,
            who(c)
        ));
        Ok((entry(83), open(0xf3)))
    }

    fn read(&self, _: &Caller<'_>, id: u64, a: &fuse_read_in, dst: Segments<'_>) -> IoResult {
        self.call(format!(
            "read {id} {} {} {} {} {} {:o} into {}",
            a.fh,
            a.offset,
            a.size,
            a.read_flags,
            a.lock_owner,
            a.flags,
            dst.len()
        ));
        if a.fh == SUBMITTED {
            return Ok(Io::Submit {
                op: IoOp::Read {
                    fd: 9,
                    offset: a.offset,
                    // More than asked, as a careless module might.
                    len: u32::MAX,
                },
                pin: Pin(3),
            });
        }
        Ok(Io::Done(dst.write(b"hello") as u32))
    }

    fn write(&self, _: &Caller<'_>, id: u64, a: &fuse_write_in, src: Segments<'_>) -> IoResult {
        let mut data = vec![0; src.len()];
        src.read(&mut data);
        self.call(format!(
            "write {id} {} {} {} {} {} {:o} {}",
            a.fh,
            a.offset,
            a.size,
            a.write_flags,
            a.lock_owner,
            a.flags,
            String::from_utf8_lossy(&data)
        ));
        if a.fh == SUBMITTED {
            return Ok(Io::Submit {
                op: IoOp::Write {
                    fd: 9,
                    offset: a.offset,
                    len: u32::MAX,
                },
                pin: Pin(4),
            });
        }
        Ok(Io::Done(u32::MAX))
    }

    fn flush(&self, _: &Caller<'_>, id: u64, a: &fuse_flush_in) -> Result<(), Errno> {
        self.call(format!("flush {id} {} {}", a.fh, a.lock_owner));
        Ok(())
    }

    fn release(&self, _: &Caller<'_>, id: u64, a: &fuse_release_in) -> Result<(), Errno> {
        self.call(format!(
            "release {id} {} {:o} {} {}",
            a.fh, a.flags, a.release_flags, a.lock_owner
        ));
        Ok(())
    }

    fn fsync(&self, _: &Caller<'_>, id: u64, a: &fuse_fsync_in) -> IoResult {
        self.call(format!("fsync {id} {} {}", a.fh, a.fsync_flags));
        if a.fh == SUBMITTED {
            return Ok(Io::Submit {
                op: IoOp::Fsync {
                    fd: 9,
                    datasync: a.fsync_flags & 1 != 0,
                },
                pin: Pin(5),
            });
        }
        Ok(Io::Done(0))
    }

    fn statfs(&self, _: &Caller<'_>, id: u64) -> Result<fuse_kstatfs, Errno> {
        self.call(format!("statfs {id}"));
        Ok(fuse_kstatfs {
            blocks: 1,
            bfree: 2,
            bavail: 3,
            files: 4,
            ffree: 5,
            bsize: 6,
            namelen: 7,
            frsize: 8,
            ..fuse_kstatfs::default()
        })
    }

    fn setxattr(
        &self,
        _: &Caller<'_>,
        id: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        setxattr_flags: u32,
    ) -> Result<(), Errno> {
        let (name, value) = (text(name), String::from_utf8_lossy(value));
        self.call(format!(
            "setxattr {id} {name} {value} {flags} {setxattr_flags}"
        ));
        Ok(())
    }

    fn getxattr(
        &self,
        _: &Caller<'_>,
        id: u64,
        name: &CStr,
        out: &mut [u8],
    ) -> Result<usize, Errno> {
        self.call(format!("getxattr {id} {} {}", text(name), out.len()));
        self.fill(out, b"value of it")
    }

    fn listxattr(&self, _: &Caller<'_>, id: u64, out: &mut [u8]) -> Result<usize, Errno> {
        self.call(format!("listxattr {id} {}", out.len()));
        self.fill(out, b"user.a\0user.b\0")
    }

    fn removexattr(&self, _: &Caller<'_>, id: u64, name: &CStr) -> Result<(), Errno> {
        self.call(format!("removexattr {id} {}", text(name)));
        Ok(())
    }

    fn opendir(&self, _: &Caller<'_>, id: u64, a: &fuse_open_in) -> Result<fuse_open_out, Errno> {
        self.call(format!("opendir {id} {:o}", a.flags));
        Ok(open(0xf4))
    }

    fn readdir(
        &self,
        _: &Caller<'_>,
        id: u64,
        a: &fuse_read_in,
        plus: bool,
        out: &mut dyn DirSink,
    ) -> Result<(), Errno> {
        self.call(format!("readdir {id} {} {} {plus}", a.fh, a.offset));
        let names: [&[u8]; 3] = [b".", b"eleven_long", b"exactly8"];
        for (name, off) in names.into_iter().zip(1u64..).skip(a.offset as usize) {
            let added = if plus {
                out.fits_plus(name.len()) && out.entry_plus(name, off, 8, &entry(90))
            } else {
                out.entry(name, 0x1_0000_0000 + off, off, 8)
            };
            if !added {
                break;
            }
        }
        Ok(())
    }

    fn releasedir(&self, _: &Caller<'_>, id: u64, a: &fuse_release_in) -> Result<(), Errno> {
        self.call(format!("releasedir {id} {} {:o}", a.fh, a.flags));
        Ok(())
    }

    fn fsyncdir(&self, _: &Caller<'_>, id: u64, a: &fuse_fsync_in) -> IoResult {
        self.call(format!("fsyncdir {id} {} {}", a.fh, a.fsync_flags));
        Ok(Io::Done(0))
    }

    fn getlk(&self, _: &Caller<'_>, id: u64, a: &fuse_lk_in) -> Result<fuse_file_lock, Errno> {
        let lk = a.lk;
        self.call(format!(
            "getlk {id} {} {} {} {} {} {} {}",
            a.fh, a.owner, lk.start, lk.end, lk.type_, lk.pid, a.lk_flags
        ));
        Ok(fuse_file_lock {
            start: 1,
            end: 2,
            type_: 3,
            pid: 4,
        })
    }

    fn setlk(&self, _: &Caller<'_>, id: u64, a: &fuse_lk_in, wait: bool) -> Result<(), Errno> {
        self.call(format!("setlk {id} {} {} {wait}", a.fh, a.lk_flags));
        match a.owner {
            CONFLICTING => Err(Errno::EAGAIN),
            _ => Ok(()),
        }
    }

    fn access(&self, _: &Caller<'_>, id: u64, mask: u32) -> Result<(), Errno> {
        self.call(format!("access {id} {mask}"));
        Ok(())
    }

    fn bmap(&self, _: &Caller<'_>, id: u64, a: &fuse_bmap_in) -> Result<u64, Errno> {
        self.call(format!("bmap {id} {} {}", a.block, a.blocksize));
        Ok(0x1234_5678_9abc)
    }

    fn ioctl(
        &self,
        _: &Caller<'_>,
        id: u64,
        a: &fuse_ioctl_in,
        input: &[u8],
        out: &mut [u8],
    ) -> Result<(fuse_ioctl_out, usize), Errno> {
        self.call(format!(
            "ioctl {id} {} {} {:#x} {} {} {}",
            a.fh,
            a.flags,
            a.cmd,
            a.arg,
            String::from_utf8_lossy(input),
            out.len()
        ));
        let len = self.fill(out, b"got")?;
        let head = fuse_ioctl_out {
            result: -7,
            // What an unrestricted server would ask for.
            flags: FUSE_IOCTL_RETRY,
            in_iovs: 1,
            out_iovs: 1,
        };
        Ok((head, len))
    }

    fn poll(&self, _: &Caller<'_>, id: u64, a: &fuse_poll_in) -> Result<u32, Errno> {
        self.call(format!(
            "poll {id} {} {} {} {}",
            a.fh, a.kh, a.flags, a.events
        ));
        Ok(5)
    }

    fn fallocate(&self, _: &Caller<'_>, id: u64, a: &fuse_fallocate_in) -> IoResult {
        self.call(format!(
            "fallocate {id} {} {} {} {}",
            a.fh, a.offset, a.length, a.mode
        ));
        if a.fh == SUBMITTED {
            return Ok(Io::Submit {
                op: IoOp::Fallocate {
                    fd: 9,
                    mode: a.mode,
                    offset: a.offset,
                    len: a.length,
                },
                pin: Pin(6),
            });
        }
        Ok(Io::Done(0))
    }

    fn lseek(&self, _: &Caller<'_>, id: u64, a: &fuse_lseek_in) -> Result<u64, Errno> {
        self.call(format!("lseek {id} {} {} {}", a.fh, a.offset, a.whence));
        Ok(4096)
    }

    fn copy_file_range(
        &self,
        _: &Caller<'_>,
        id: u64,
        a: &fuse_copy_file_range_in,
    ) -> Result<u64, Errno> {
        self.call(format!(
            "copy_file_range {id} {} {} {} {} {} {} {}",
            a.fh_in, a.off_in, a.nodeid_out, a.fh_out, a.off_out, a.len, a.flags
        ));
        Ok(a.len)
    }

    fn syncfs(&self, _: &Caller<'_>, id: u64) -> Result<(), Errno> {
        self.call(format!("syncfs {id}"));
        Ok(())
    }
}
