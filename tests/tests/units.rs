//! The systemd units: how exposed each service is, as systemd itself judges it, and whether they do under a real systemd,
//! which runs in a guest so that nothing of this machine is in its reach.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, Kernel, Rigs, TempDir, binary, need, repository};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// How long an emulated machine may take to boot and work through its check.
const LIMIT: Duration = Duration::from_secs(900);

/// Units, and the exposure of each in tenths: 0 is none, 100 is a service without any protection.
const UNITS: [(&str, u32); 2] = [
    ("ferry-dataplane.service", 32),
    ("ferry-controlplane.service", 4),
];

fn analyze(args: &[&str]) -> Result<std::process::Output> {
    Command::new("systemd-analyze")
        .args(args)
        .output()
        .context("run systemd-analyze, of Debian's package systemd")
}

#[test]
fn no_unit_is_more_exposed_than_it_was() {
    need!(analyze(&["--version"]));
    for (unit, exposure) in UNITS {
        if let Err(error) = check(unit, exposure) {
            panic!("{unit}: {error:#}");
        }
    }
}

fn check(unit: &str, exposure: u32) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/deploy");
    let path = path.join(unit);
    let path = path.to_str().context("not UTF-8")?;
    let threshold = format!("--threshold={exposure}");
    let args = ["security", "--offline=true", "--no-pager", &threshold, path];
    let output = analyze(&args)?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{text}");
    ensure!(text.contains("Overall exposure level"), "{text}");
    Ok(())
}

/// Without what only a debugger reads, three programs fit into a small guest.
fn strip(program: &str, to: &Path) -> Result<()> {
    let mut command = Command::new("strip");
    command.arg("-o").arg(to).arg(binary(program)?);
    let status = command.status().context("run strip, of binutils")?;
    ensure!(status.success(), "strip {program}");
    Ok(())
}

fn run_in_a_guest(guest: Guest) -> Result<()> {
    let root = Rigs::find(&["systemd"])?.path("systemd/root.tar");
    let scripts = repository().join("tests/guest/units");
    let scratch = TempDir::new();
    let mut guest = guest
        .file("root.tar", &root)
        .file("check.sh", &scripts.join("check.sh"));
    for program in ["ferry", "ferry-dataplane", "ferry-controlplane"] {
        let stripped = scratch.join(program);
        strip(program, &stripped)?;
        guest = guest.file(&format!("programs/{program}"), &stripped);
    }
    for (unit, _) in UNITS {
        let path = repository().join("tools/deploy").join(unit);
        guest = guest.file(&format!("units/{unit}"), &path);
    }
    let script = fs::read_to_string(scripts.join("start.sh"))?;
    let outcome = guest.run(&script, LIMIT)?;
    println!("{}", outcome.output);
    ensure!(outcome.status == 0, "{}\n{}", outcome.output, outcome.dmesg);
    Ok(())
}

#[test]
fn both_units_keep_what_guests_have_under_systemd_in_a_linux_guest() {
    let guest = need!(Guest::qemu(Kernel::Forky));
    need!(binary("ferry"));
    need!(Rigs::find(&["systemd"]));
    run_in_a_guest(guest).unwrap_or_else(|error| panic!("{error:#}"));
}
