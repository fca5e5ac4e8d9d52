//! The harness of Ferry's integration tests: temporary run directories, the service as child processes, `ferry rpc` lines, and
//! Linux guests whose own, unmodified virtio-fs driver mounts what the service exports.
//!
//! A test owns everything that it starts: dropping a [`Service`], a [`Guest`]'s process or a [`TempDir`] ends processes with
//! their whole group and removes files, also when the test panics. Nothing here waits for a fixed time: every wait polls a
//! condition against a deadline.
//!
//! What a machine lacks (binaries that are not built, rigs that are not fetched) skips a test loudly; with
//! `FERRY_REQUIRE_ALL=1` in the environment, as `tools/test` sets it, it fails instead.

pub mod churn;
mod guest;
mod initramfs;
mod numbers;
mod process;
mod queues;
mod rigs;
mod service;
mod temp;

pub use guest::{Console, Device, Guest, Kernel, Outcome, RunningGuest};
pub use numbers::Numbers;
pub use process::{Process, wait_until};
pub use queues::{ServedQueue, two_cpus};
pub use rigs::{Rigs, build_checks};
pub use service::{HostMount, Reply, Service, ServiceConfig, binary, can_mount, child_of};
pub use temp::TempDir;

use std::io::Write;
use std::path::{Path, PathBuf};

/// The root of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(Path::to_path_buf)
        .unwrap_or_default()
}

/// Says why a test cannot run here. Panics where everything is required to run.
pub fn skip(why: &str) {
    assert!(
        std::env::var_os("FERRY_REQUIRE_ALL").is_none(),
        "cannot run, and FERRY_REQUIRE_ALL is set: {why}"
    );
    // not through eprintln: the test runner would keep that to itself
    if let Err(error) = writeln!(std::io::stderr(), "SKIP {why}") {
        panic!("cannot even say that a test is skipped: {error}");
    }
}

/// The value of a `Result`, or a skipped test: returns from the calling test function.
#[macro_export]
macro_rules! need {
    ($value:expr) => {
        match $value {
            Ok(value) => value,
            Err(why) => return $crate::skip(&format!("{why:#}")),
        }
    };
}
