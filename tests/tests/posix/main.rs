//! What a local file system does, the mount does: suites and programs that nobody here wrote run on a mount and on the
//! directory behind it, and each of their tests must come to the same.
//!
//! [`matrix`] says on which exports, with which caches and over which transports; [`suites`] are what runs there; [`table`]
//! is `tests/POSIX.md`, which shows what came of it. By default a fixed part runs; `FERRY_POSIX_FULL=1` runs everything,
//! with `FERRY_POSIX_TABLE=1` rewrites the sections of the table, and with `FERRY_POSIX_ONLY=TEXT` runs only configurations
//! whose name has TEXT in it. `tools/test posix` installs the programs.

mod disk;
mod matrix;
mod outcome;
mod suites;
mod table;

use anyhow::ensure;
use disk::{Backing, Disk};
use ferry_tests::can_mount;
use ferry_tests::{need, wait_until};
use matrix::Rig;
use std::fs;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_read_only_export_lets_its_host_write_and_its_guest_read() {
    need!(can_mount());
    let disk = need!(Disk::new(Backing::Tmpfs));
    let rig = Rig::new(disk.path(), "--read-only").unwrap();
    let file = rig.export().join("f");
    fs::write(&file, "old").unwrap();
    for transport in matrix::TRANSPORTS {
        rig.on(transport, |mount| {
            let seen = mount.join("f");
            let refused = fs::write(&seen, "x").unwrap_err();
            ensure!(refused.raw_os_error() == Some(30), "{transport}: {refused}");
            fs::write(&file, transport.to_string())?;
            wait_until("the guest sees the new content", LIMIT, || {
                Ok(fs::read_to_string(&seen)? == transport.to_string())
            })
        })
        .unwrap();
    }
}
