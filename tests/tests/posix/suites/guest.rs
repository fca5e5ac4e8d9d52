//! pjdfstest in Linux guests, which reach the device with their own virtio-fs driver: User-Mode-Linux over vhost-user, and,
//! when everything runs, a virtual machine over vfio-user.

use super::pjdfstest::{self, Pjdfstest};
use super::{installed, on_path};
use crate::disk::Backing;
use crate::matrix::{self, Export, Rig, Suite, Transport};
use crate::outcome::Outcomes;
use anyhow::{Result, ensure};
use ferry_tests::{Guest, Kernel, TempDir};
use std::fs;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(1800);
const PASSWD: &str =
    "root:x:0:0::/:/bin/sh\none:x:1001:1001::/:/bin/sh\ntwo:x:1002:1002::/:/bin/sh\n";
const GROUP: &str = "root:x:0:\none:x:1001:\ntwo:x:1002:\n";

/// The suite.
#[derive(Debug)]
pub(super) struct InGuests;

impl Suite for InGuests {
    fn name(&self) -> &'static str {
        "pjdfstest in Linux guests"
    }

    fn about(&self) -> String {
        "The same, in guests of Linux 7.2 with their own virtio-fs driver: User-Mode-Linux over vhost-user, QEMU over vfio-user."
            .to_owned()
    }

    fn exports(&self) -> Vec<Export> {
        Export::list(&[
            (Backing::Ext4, "always", true),
            (Backing::Tmpfs, "never", false),
        ])
    }

    fn must_pass_directly(&self) -> bool {
        false
    }

    fn ready(&self) -> Result<()> {
        Guest::user_mode()?;
        Pjdfstest.ready()
    }

    fn run(&self, dir: &Path) -> Result<Outcomes> {
        Pjdfstest.run(dir)
    }
}

pub(super) fn check() -> Result<()> {
    matrix::check_with(&InGuests, in_guest)
}

fn in_guest(rig: &Rig, transport: Transport) -> Result<Outcomes> {
    let guest = match transport {
        Transport::VfioUser => Guest::qemu(Kernel::Forky)?,
        Transport::VhostUser => Guest::user_mode()?,
    };
    let scratch = TempDir::new();
    let configuration = pjdfstest::configured("[\"one\", \"one\"]", "[\"two\", \"two\"]");
    for (name, text) in [
        ("passwd", PASSWD),
        ("group", GROUP),
        ("pjdfstest.toml", &configuration),
    ] {
        fs::write(scratch.join(name), text)?;
    }
    let (device, tag) = rig.device(transport);
    let script = format!(
        "mount -t virtiofs {tag} /mnt && mkdir /mnt/{tag} && \
         NO_COLOR=1 /bin/pjdfstest -c /pjdfstest.toml -p /mnt/{tag} {}\n\
         echo ended with $?\numount /mnt\n",
        pjdfstest::parts().join(" ")
    );
    let outcome = guest
        .device(device)
        .program("bin/pjdfstest", &installed("pjdfstest")?)?
        // It runs a copy of this under another name, which busybox would not know itself by.
        .program("bin/sleep", &on_path("sleep")?)?
        .file("etc/passwd", &scratch.join("passwd"))
        .file("etc/group", &scratch.join("group"))
        .file("pjdfstest.toml", &scratch.join("pjdfstest.toml"))
        .run(&script, LIMIT)?;
    let found = pjdfstest::outcomes(&outcome.output);
    ensure!(
        outcome.status == 0 && found.any_passed(),
        "pjdfstest did not run in the guest:\n{}\n{}\nlog of the service:\n{}",
        outcome.output,
        outcome.dmesg,
        rig.log()
    );
    Ok(found)
}
