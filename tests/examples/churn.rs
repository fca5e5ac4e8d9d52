//! Kills the control plane of a running `ferry up` at random moments while it is given work, and compares what the next one
//! knows with what was acknowledged, until SIGTERM:
//!
//!     churn RPC_SOCKET PID_OF_FERRY_UP

use anyhow::{Context, Result};
use ferry_tests::churn::{Churn, ask, connect};
use ferry_tests::{child_of, wait_until};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde_json::json;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);
const NAME: &str = "ferry-controlplane";

fn main() -> Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.thread_block()?;
    let asked = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let mut args = std::env::args().skip(1);
    let (Some(socket), Some(supervisor)) = (args.next(), args.next()) else {
        anyhow::bail!("churn RPC_SOCKET PID_OF_FERRY_UP");
    };
    let socket = Path::new(&socket);
    let supervisor = supervisor.parse().context("the process id")?;

    let mut churn = Churn::new(connect(socket)?)?;
    let mut kills = 0;
    while asked.read_signal()?.is_none() {
        let victim = child_of(supervisor, NAME)?;
        churn.until_killed(|| Ok(kill(victim, Signal::SIGKILL)?))?;
        kills += 1;
        wait_until("the next control plane runs", LIMIT, || {
            Ok(child_of(supervisor, NAME).is_ok_and(|pid| pid != victim))
        })?;
        churn
            .go_on(connect(socket)?)
            .with_context(|| format!("after {kills} kills"))?;
    }
    // Nothing of it is left, so that another one can begin.
    let mut client = connect(socket)?;
    for (name, known) in churn.known() {
        let device = json!({"dev_name": name});
        if known.as_ref().is_some_and(|(_, state)| state == "running") {
            ask(&mut client, "virtio_fs_device_stop", &device)?;
        }
        ask(&mut client, "virtio_fs_device_destroy", &device)?;
    }
    ask(&mut client, "fsdev_null_delete", &json!({"name": "null0"}))?;
    println!(
        "{kills} kills; devices and stored configuration were what was acknowledged after each"
    );
    Ok(())
}
