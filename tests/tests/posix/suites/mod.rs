//! The suites, and where their programs come from.

mod checks;
mod fio;
mod fsx;
mod guest;
mod pjdfstest;
mod programs;
mod stress;

use crate::matrix::{self, Suite};
use anyhow::{Context, Result, ensure};
use ferry_tests::{can_mount, need};
use std::env;
use std::path::PathBuf;

/// All of them, in the order of the table.
pub(crate) const SUITES: [&dyn Suite; 7] = [
    &checks::Checks,
    &pjdfstest::Pjdfstest,
    &guest::InGuests,
    &fsx::Fsx,
    &fio::Fio,
    &stress::Stress,
    &programs::Programs,
];

/// A program that cargo has installed into the cache of the rigs.
fn installed(name: &str) -> Result<PathBuf> {
    let cache = match env::var_os("FERRY_RIG_CACHE") {
        Some(path) => PathBuf::from(path),
        None => {
            PathBuf::from(env::var_os("HOME").context("HOME is not set")?).join(".cache/ferry/rigs")
        }
    };
    let root = cache.join("posix");
    let program = root.join("bin").join(name);
    ensure!(
        program.exists(),
        "no {}: run cargo install --locked --root {} {name}",
        program.display(),
        root.display()
    );
    Ok(program)
}

/// A program of this machine.
fn on_path(name: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|program| program.exists())
        .with_context(|| format!("no {name} on this machine; tools/test posix installs it"))
}

fn check(suite: &dyn Suite) {
    need!(can_mount());
    need!(suite.ready());
    matrix::check(suite).unwrap();
}

#[test]
fn every_answer_of_a_mount_is_that_of_the_export() {
    check(&checks::Checks);
}

#[test]
fn a_mount_passes_every_test_of_pjdfstest_that_the_export_passes() {
    check(&pjdfstest::Pjdfstest);
}

#[test]
fn a_guest_passes_every_test_of_pjdfstest_that_the_export_passes() {
    need!(can_mount());
    need!(guest::InGuests.ready());
    guest::check().unwrap();
}

#[test]
fn random_operations_on_one_file_never_diverge() {
    check(&fsx::Fsx);
}

#[test]
fn what_eight_jobs_write_with_checksums_is_read_back_with_every_engine() {
    check(&fio::Fio);
}

#[test]
fn every_file_system_stressor_ends_as_on_the_export() {
    check(&stress::Stress);
}

#[test]
fn programs_find_on_a_mount_what_they_find_on_the_export() {
    check(&programs::Programs);
}
