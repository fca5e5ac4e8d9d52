//! The systemd units: how exposed each service is, as systemd itself judges it.

use anyhow::{Context, Result, ensure};
use ferry_tests::need;
use std::path::Path;
use std::process::Command;

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
