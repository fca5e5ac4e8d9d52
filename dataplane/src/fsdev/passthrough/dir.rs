//! Directory listings.
//!
//! Cookies are the host's own (`d_off`), so a listing can be continued anywhere, also after the directory has changed.

use core::ffi::CStr;

use ferry_shared::errno::Errno;

use super::Passthrough;
use super::handle;
use super::sys::{self, DirBuffer, DirEntry};
use crate::fsdev::{Caller, DirSink};
use crate::fuse::abi::{FUSE_ROOT_ID, fuse_attr, fuse_entry_out, fuse_open_out, fuse_read_in};

/// What a listing needs to know about its directory.
struct Dir<'a> {
    fd: i32,
    mnt: u64,
    /// For the root: its own inode number, which stands for `..` too.
    root_ino: Option<u64>,
    plus: bool,
    /// The caller may look the entries up.
    look: bool,
    out: &'a mut dyn DirSink,
}

fn is_dot(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

/// An entry that tells nothing but the inode number and type; the guest looks it up itself when it wants more.
fn bare_entry(ino: u64, kind: u8) -> fuse_entry_out {
    let mode = u32::from(kind) << 12;
    fuse_entry_out {
        attr: fuse_attr {
            ino,
            mode,
            ..Default::default()
        },
        ..Default::default()
    }
}

impl Passthrough {
    pub(super) fn do_opendir(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
    ) -> Result<fuse_open_out, Errno> {
        let session = self.session()?;
        let node = self.inodes.get(nodeid)?;
        node.expect_dir()?;
        self.demand(caller, node.fd(), libc::R_OK)?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | self.untouched();
        let fd = self.inodes.with_fds(|| sys::reopen(node.fd(), flags))?;
        let place = self.handles.reserve()?;
        let fh = self
            .handles
            .add_at(place, (fd, flags), nodeid, handle::DIR, 1);
        self.opened(fh, nodeid, self.dir_flags(), session)
    }

    pub(super) fn do_readdir(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_read_in,
        plus: bool,
        out: &mut dyn DirSink,
    ) -> Result<(), Errno> {
        let file = self.handles.dir(arg.fh, nodeid)?;
        let stat = sys::stat_fd(file.fd())?;
        let root_ino = (nodeid == FUSE_ROOT_ID).then_some(stat.stx_ino);
        let mut dir = Dir {
            fd: file.fd(),
            mnt: stat.stx_mnt_id,
            root_ino,
            plus,
            look: plus && self.demand(caller, file.fd(), libc::X_OK).is_ok(),
            out,
        };
        // An entry takes about as much room here as in a reply, and several times as much with attributes.
        let want = if plus { arg.size / 4 } else { arg.size } as usize;
        let mut listing = file.list();
        listing.seek(arg.offset)?;
        let mut buffer = DirBuffer::new();
        let mut last = None;
        loop {
            let mut entries = match buffer.fill(dir.fd, want) {
                Ok(entries) => entries,
                Err(_) if last.is_some() => return Ok(()),
                Err(errno) => return Err(errno),
            };
            if entries.is_empty() {
                return Ok(());
            }
            while let Some(entry) = sys::next_entry(&mut entries) {
                if !self.emit(&mut dir, &entry) {
                    listing.stands_at(None);
                    // A reply without entries would mean the end.
                    return last.map(drop).ok_or(Errno::EINVAL);
                }
                last = Some(entry.off);
            }
            listing.stands_at(last);
        }
    }

    /// Adds an entry; `false` when there is no room for it.
    fn emit(&self, dir: &mut Dir<'_>, entry: &DirEntry<'_>) -> bool {
        let name = entry.name.to_bytes();
        let kind = u32::from(entry.kind);
        let ino = match dir.root_ino {
            Some(ino) if name == b".." => ino,
            _ => entry.ino,
        };
        if !dir.plus {
            return dir.out.entry(name, ino, entry.off, kind);
        }
        if !dir.out.fits_plus(name.len()) {
            return false;
        }
        let bare = bare_entry(ino, entry.kind);
        if is_dot(entry.name) || !dir.look {
            return dir.out.entry_plus(name, entry.off, kind, &bare);
        }
        // One that is gone by now, or cannot be looked at, is listed without attributes.
        let found = self.lookup_in(dir.fd, dir.mnt, entry.name).unwrap_or(bare);
        let added = dir.out.entry_plus(name, entry.off, kind, &found);
        if !added && found.nodeid != 0 {
            self.do_forget(found.nodeid, 1);
        }
        added
    }
}
