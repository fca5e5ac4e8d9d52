//! Boots a guest on a running device and runs the check script, or a script of your own, in it:
//!
//! ```text
//! cargo run -p ferry-tests --example guest -- qemu|qemu-6.1|uml vfio-user|vhost-user SOCKET TAG [SCRIPT]
//! ```

use anyhow::{Result, bail};
use ferry_tests::{Device, Guest, Kernel};
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(900);

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [machine, transport, socket, tag, script @ ..] = args.as_slice() else {
        bail!("usage: guest qemu|qemu-6.1|uml vfio-user|vhost-user SOCKET TAG [SCRIPT]");
    };
    let guest = match machine.as_str() {
        "qemu" => Guest::qemu(Kernel::Forky)?,
        "qemu-6.1" => Guest::qemu(Kernel::Bookworm)?,
        "uml" => Guest::user_mode()?,
        other => bail!("unknown machine {other}"),
    };
    let socket = PathBuf::from(socket);
    let guest = guest.device(match transport.as_str() {
        "vfio-user" => Device::VfioUser(socket),
        "vhost-user" => Device::VhostUser {
            socket,
            tag: tag.clone(),
        },
        other => bail!("unknown transport {other}"),
    });
    let outcome = match script {
        [] => guest.run_checks(tag, LIMIT)?,
        [script, ..] => guest.run(&fs::read_to_string(script)?, LIMIT)?,
    };
    print!("{}", outcome.output);
    Ok(if outcome.status == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
