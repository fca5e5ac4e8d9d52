//! The mounts that make up an export, and a descriptor on each to reopen its inodes by file handle.

use alloc::ffi::CString;
use alloc::format;
use alloc::vec::Vec;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::AtomicI32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use ferry_shared::errno::Errno;
use spin::mutex::SpinMutex;

use super::sys::{self, Fd};

/// Mounts that are remembered; inodes on further ones keep their descriptors.
const MOUNTS: usize = 64;

#[derive(Default)]
struct Mount {
    /// Mount id plus one; 0 while unused.
    id: AtomicU64,
    fd: AtomicI32,
    handles: AtomicBool,
}

/// What is known of a mount.
#[derive(Clone, Copy, Debug)]
pub(super) struct MountFd {
    /// A descriptor on it that is not `O_PATH`.
    pub(super) fd: i32,
    /// Whether its inodes can be reopened by file handle.
    pub(super) handles: bool,
}

/// The mounts met so far. Grows only, so reading takes no lock; a mount id is not reused while we hold a descriptor on it.
pub(super) struct Mounts {
    list: [Mount; MOUNTS],
    adding: SpinMutex<()>,
}

impl Mounts {
    pub(super) fn new() -> Mounts {
        Mounts {
            list: core::array::from_fn(|_| Mount::default()),
            adding: SpinMutex::new(()),
        }
    }

    /// What is known of mount `id`.
    pub(super) fn get(&self, id: u64) -> Option<MountFd> {
        let wanted = id.wrapping_add(1);
        for mount in &self.list {
            match mount.id.load(Acquire) {
                0 => return None,
                found if found == wanted => {
                    return Some(MountFd {
                        fd: mount.fd.load(Relaxed),
                        handles: mount.handles.load(Relaxed),
                    });
                }
                _ => {}
            }
        }
        None
    }

    /// Remembers mount `id`, on which the object behind `fd` of type `kind` lies.
    pub(super) fn meet(&self, id: u64, fd: i32, kind: u32) {
        if self.get(id).is_some() {
            return;
        }
        let flags = match kind {
            libc::S_IFDIR => libc::O_RDONLY | libc::O_DIRECTORY,
            libc::S_IFREG => libc::O_RDONLY | libc::O_NONBLOCK,
            _ => return,
        };
        let Ok(open) = sys::reopen(fd, flags) else {
            return;
        };
        let handles = sys::file_handle(open.raw(), c"")
            .and_then(|handle| sys::open_handle(open.raw(), &handle))
            .is_ok();
        let adding = self.adding.lock();
        if self.get(id).is_none()
            && let Some(free) = self.list.iter().find(|m| m.id.load(Relaxed) == 0)
        {
            free.fd.store(open.into_raw(), Relaxed);
            free.handles.store(handles, Relaxed);
            // Pairs with the acquire in `get`.
            free.id.store(id.wrapping_add(1), Release);
        }
        drop(adding);
    }
}

/// A mount of this process's namespace.
pub(super) struct Present {
    /// Its number.
    pub(super) id: u64,
    /// Its device.
    pub(super) dev: u64,
    /// Its root directory.
    pub(super) root: Fd,
}

/// The mounts below a directory. Allocates; only for the start.
pub(super) fn below(path: &str) -> Result<Vec<Present>, Errno> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")
        .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
    let prefix = format!("{}/", path.trim_end_matches('/'));
    // The fifth field is the mount point; the kernel writes blanks in it as octal numbers.
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    let points = points.map(|point| point.replace("\\040", " ").replace("\\134", "\\"));
    let below = points.filter(|point| point.starts_with(&prefix));
    Ok(below
        .filter_map(|point| {
            let point = CString::new(point).ok()?;
            let root = sys::open_path(&point, libc::O_PATH | libc::O_DIRECTORY).ok()?;
            let stat = sys::stat_fd(root.raw()).ok()?;
            Some(Present {
                id: stat.stx_mnt_id,
                dev: super::inode::device(&stat),
                root,
            })
        })
        .collect())
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for mount in &self.list {
            if mount.id.load(Relaxed) != 0 {
                sys::close(mount.fd.load(Relaxed));
            }
        }
    }
}
