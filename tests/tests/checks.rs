//! The guest's checks, proved on a local file system of this machine: what fails there says nothing about Ferry.

use anyhow::{Context, Result, ensure};
use ferry_tests::{TempDir, need, repository, skip};
use std::path::Path;
use std::process::Command;

fn run_checks_on(dir: &Path, program: &Path) -> Result<String> {
    let script = repository().join("tests/guest/check.sh");
    let output = Command::new("sh")
        .arg(script)
        .arg(program)
        .arg(dir)
        .output()
        .context("run check.sh")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "checks failed on {}:\n{text}",
        dir.display()
    );
    Ok(text)
}

#[test]
fn every_guest_check_passes_on_a_local_file_system() {
    if !nix::unistd::geteuid().is_root() {
        return skip("the checks need root");
    }
    let dir = TempDir::new();
    let program = need!(ferry_tests::build_checks(dir.path()));
    let output = run_checks_on(&dir.make_dir("local"), &program).unwrap();
    let passed = output
        .lines()
        .filter(|line| line.starts_with("ok ") && !line.contains("# skipped"))
        .count();
    assert!(passed >= 60, "only {passed} checks ran:\n{output}");
}

#[test]
fn a_check_that_fails_is_reported() {
    let dir = TempDir::new();
    let program = need!(ferry_tests::build_checks(dir.path()));
    // a directory below /proc takes no files, so nothing can pass there
    let output = Command::new(&program)
        .args(["run", "append"])
        .arg("/proc")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(!output.stdout.is_empty(), "a failed check must say why");
}
