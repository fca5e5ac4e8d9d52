//! The file systems that are exported, each new and for one test.

use crate::outcome::output_of;
use anyhow::Result;
use ferry_tests::TempDir;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What lies behind an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Backing {
    Ext4,
    Tmpfs,
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ext4 => "ext4",
            Self::Tmpfs => "tmpfs",
        })
    }
}

/// A new file system, mounted until this value goes.
#[derive(Debug)]
pub(crate) struct Disk {
    path: PathBuf,
    _dir: TempDir,
}

impl Disk {
    pub(crate) fn new(backing: Backing) -> Result<Self> {
        let dir = TempDir::new();
        let path = dir.make_dir("at");
        let mut mount = Command::new("mount");
        match backing {
            Backing::Ext4 => {
                let image = dir.join("image");
                fs::File::create(&image)?.set_len(4 << 30)?;
                output_of(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
                // no power is cut here: a file that is synced need not have reached the machine's own disk
                mount.args(["-o", "loop,nobarrier"]).arg(&image)
            }
            Backing::Tmpfs => mount.args(["-t", "tmpfs", "-o", "size=4g", "tmpfs"]),
        };
        output_of(mount.arg(&path))?;
        Ok(Self { path, _dir: dir })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // a lazy one, because a failed test may have left it in use
        if let Err(error) = Command::new("umount").arg("-l").arg(&self.path).status() {
            eprintln!("cannot unmount {}: {error}", self.path.display());
        }
    }
}
