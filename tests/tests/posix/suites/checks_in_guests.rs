//! Our own checks in Linux guests, whose drivers reach the device without this machine's FUSE.

use super::checks::{self, Checks};
use crate::disk::Backing;
use crate::matrix::{self, Export, Rig, Suite, Transport};
use crate::outcome::{Outcome, Outcomes};
use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, Kernel, TempDir, build_checks};
use std::fs;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(1800);

/// The suite.
#[derive(Debug)]
pub(super) struct ChecksInGuests;

impl Suite for ChecksInGuests {
    fn name(&self) -> &'static str {
        "checks in Linux guests"
    }

    fn about(&self) -> String {
        "The same, in guests of Linux 7.2 with their own virtio-fs driver: User-Mode-Linux over vhost-user, QEMU over vfio-user. \
         What the guests' kernels lack is skipped."
            .to_owned()
    }

    fn exports(&self) -> Vec<Export> {
        Export::list(&[
            (Backing::Ext4, "always", true),
            (Backing::Tmpfs, "never", false),
        ])
    }

    fn agrees(&self, export: Export, test: &str, here: &Outcome, direct: Option<&Outcome>) -> bool {
        // The guest's kernel may have less than this machine's.
        *here == Outcome::Skipped || Checks.agrees(export, test, here, direct)
    }

    fn ready(&self) -> Result<()> {
        Guest::user_mode()?;
        Checks.ready()
    }

    fn run(&self, dir: &Path) -> Result<Outcomes> {
        Checks.run(dir)
    }
}

pub(super) fn check() -> Result<()> {
    matrix::check_with(&ChecksInGuests, in_guest)
}

fn in_guest(rig: &Rig, transport: Transport) -> Result<Outcomes> {
    let guest = match transport {
        Transport::VfioUser => Guest::qemu(Kernel::Forky)?,
        Transport::VhostUser => Guest::user_mode()?,
    };
    let scratch = TempDir::new();
    let program = build_checks(scratch.path())?;
    let names = checks::names(&program)?;
    fs::write(scratch.join("names"), names.join("\n") + "\n")?;
    // What the checks say is left in the export, because it is more than a console takes.
    let said = rig.export().join("said");
    fs::create_dir(&said)?;
    let (device, tag) = rig.device(transport);
    let script = format!(
        "mount -t virtiofs {tag} /mnt && mkdir /mnt/{tag}\n\
         number=0\n\
         while read -r name; do\n\
         /checks run \"$name\" /mnt/{tag} > /mnt/said/$number\n\
         echo $? > /mnt/said/$number.status\n\
         number=$((number + 1))\n\
         done < /names\n\
         umount /mnt\n"
    );
    let outcome = guest
        .device(device)
        .file("checks", &program)
        .file("names", &scratch.join("names"))
        .run(&script, LIMIT)?;
    ensure!(
        outcome.status == 0,
        "the checks did not run in the guest:\n{}\n{}\nlog of the service:\n{}",
        outcome.output,
        outcome.dmesg,
        rig.log()
    );
    let found = names
        .iter()
        .enumerate()
        .map(|(number, name)| Ok((name.clone(), said_of(&said, number, name)?)))
        .collect();
    fs::remove_dir_all(&said)?;
    found
}

fn said_of(said: &Path, number: usize, name: &str) -> Result<Outcome> {
    let status = fs::read_to_string(said.join(format!("{number}.status")))?;
    let status = status.trim().parse().context("the status of a check")?;
    let text = fs::read(said.join(number.to_string()))?;
    Ok(checks::outcome(name, Some(status), &text))
}
