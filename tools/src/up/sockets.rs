//! Sockets that a killed process has left behind. Nothing is removed that somebody may still serve: the run directory
//! and the RPC socket each have a lock that their owner holds.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use ferry_shared::handshake::SOCKET_NAME;
use nix::fcntl::{Flock, FlockArg};

use super::probe::dial;
use super::upgrade;

/// Removes what both processes may have left.
pub(super) fn clean(run_dir: &Path, rpc: &Path) {
    clean_rpc(rpc);
    let Some(_lock) = File::open(run_dir).ok().and_then(lock) else {
        return;
    };
    for name in [SOCKET_NAME, upgrade::SOCKET] {
        remove_socket(&run_dir.join(name));
    }
    for dir in ["pci", "vhost"].map(|name| run_dir.join(name)) {
        let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.path())
            .filter(|path| is_named_socket(path))
            .for_each(|path| remove_socket(&path));
    }
}

/// Removes an RPC socket, and its lock file, that nobody serves.
pub(super) fn clean_rpc(rpc: &Path) {
    let mut lock_name = rpc.as_os_str().to_owned();
    lock_name.push(".lock");
    let lock_path = PathBuf::from(lock_name);
    let lock = match File::open(&lock_path) {
        Ok(file) => match lock(file) {
            Some(lock) => Some(lock),
            None => return,
        },
        Err(_) => None,
    };
    if dial(rpc).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
        remove_socket(rpc);
    }
    if lock.is_some() && !rpc.exists() {
        // Left by a process that is gone; one that runs would hold it.
        let _ = fs::remove_file(&lock_path);
    }
}

fn lock(file: File) -> Option<Flock<File>> {
    Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()
}

fn is_named_socket(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension == "sock")
}

fn remove_socket(path: &Path) {
    if fs::symlink_metadata(path).is_ok_and(|facts| facts.file_type().is_socket()) {
        // Whoever needs the name next will say so if it cannot be had.
        let _ = fs::remove_file(path);
    }
}
