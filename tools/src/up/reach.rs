//! Files that an unprivileged process has to open although its user may not reach their paths: a program or a script
//! under somebody's home directory. This process opens them and hands the descriptor on.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use nix::unistd::{User, setfsgid, setfsuid};

/// How a process gets at a file.
#[derive(Debug)]
pub(super) enum Reach {
    /// By its path.
    Path(PathBuf),
    /// By a descriptor that it inherits.
    Descriptor(File),
}

impl Reach {
    /// Finds out how `user` can read a file; it must exist.
    pub(super) fn of(path: &Path, user: Option<&User>) -> io::Result<Reach> {
        let file = File::open(path)?;
        Ok(match user {
            Some(user) if !readable_by(path, user) => Reach::Descriptor(file),
            _ => Reach::Path(path.to_owned()),
        })
    }

    /// What the process has to open.
    pub(super) fn name(&self) -> PathBuf {
        match self {
            Reach::Path(path) => path.clone(),
            Reach::Descriptor(file) => PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())),
        }
    }

    /// The descriptor that the process has to inherit.
    pub(super) fn descriptor(&self) -> Option<RawFd> {
        match self {
            Reach::Path(_) => None,
            Reach::Descriptor(file) => Some(file.as_raw_fd()),
        }
    }
}

/// Whether `user` can look into a directory, or into the place where it will be created.
pub(super) fn searchable_by(dir: &Path, user: &User) -> bool {
    let place = dir.ancestors().find(|place| place.exists());
    place.is_none_or(|place| acting_as(user, || place.join(".").metadata()).is_ok())
}

fn readable_by(path: &Path, user: &User) -> bool {
    acting_as(user, || File::open(path)).is_ok()
}

/// Makes one call that the kernel judges by `user`'s rights. Only this thread changes its identity.
fn acting_as<T>(user: &User, call: impl FnOnce() -> T) -> T {
    let (gid, uid) = (setfsgid(user.gid), setfsuid(user.uid));
    let outcome = call();
    setfsuid(uid);
    setfsgid(gid);
    outcome
}
