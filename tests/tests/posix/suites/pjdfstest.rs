//! pjdfstest: what POSIX says about each system call on files, asked as root and as two users.

use super::installed;
use crate::matrix::{Suite, full};
use crate::outcome::{Outcome, Outcomes};
use anyhow::{Context, Result, bail, ensure};
use ferry_tests::TempDir;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The parts whose answers depend most on who asks, and which run in seconds.
const PARTS: [&str; 8] = [
    "chown",
    "chmod",
    "ftruncate",
    "link",
    "mkdir",
    "open",
    "rename",
    "utimensat",
];
/// Cannot run on a mount: the C library tells how many links a file can have only for file systems that it knows.
const NOT_ON_A_MOUNT: &str = "link::link_count_max";

/// The suite.
#[derive(Debug)]
pub(super) struct Pjdfstest;

impl Suite for Pjdfstest {
    fn name(&self) -> &'static str {
        "pjdfstest"
    }

    fn about(&self) -> String {
        format!(
            "All of pjdfstest as root, but for `{NOT_ON_A_MOUNT}`: the C library knows the limit of file systems by name only."
        )
    }

    fn must_pass_directly(&self) -> bool {
        false
    }

    fn ready(&self) -> Result<()> {
        installed("pjdfstest").map(drop)
    }

    fn run(&self, dir: &Path) -> Result<Outcomes> {
        let scratch = TempDir::new();
        let mut command = Command::new(installed("pjdfstest")?);
        command
            .env("NO_COLOR", "1")
            .arg("-c")
            .arg(configuration(&scratch)?)
            .arg("-p")
            .arg(dir);
        command.args(parts());
        let output = command.output().context("run pjdfstest")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let outcomes = outcomes(&text);
        ensure!(
            outcomes != Outcomes::default(),
            "pjdfstest ran nothing:\n{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(outcomes)
    }
}

/// What it is to run; nothing means everything.
pub(super) fn parts() -> &'static [&'static str] {
    if full() { &[] } else { &PARTS }
}

/// What pjdfstest prints, a line for each test.
pub(super) fn outcomes(text: &str) -> Outcomes {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(test, _)| test.contains("::") && *test != NOT_ON_A_MOUNT)
        .map(|(test, result)| {
            let outcome = match result.trim() {
                "ok" => Outcome::Passed(String::new()),
                "skipped" => Outcome::Skipped,
                other => Outcome::Failed(other.to_owned()),
            };
            (test.to_owned(), outcome)
        })
        .collect()
}

/// Users that it acts as; any two that the machine has, each with a group.
fn configuration(dir: &TempDir) -> Result<PathBuf> {
    let groups = fs::read_to_string("/etc/group")?;
    let group = |id: &str| {
        let mut lines = groups.lines().map(|line| line.split(':'));
        lines.find_map(|mut line| {
            let name = line.next()?;
            (line.nth(1)? == id).then(|| name.to_owned())
        })
    };
    let users = fs::read_to_string("/etc/passwd")?;
    let entries: Vec<String> = users
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let (name, id, gid) = (fields.next()?, fields.nth(1)?, fields.next()?);
            let group = group(gid)?;
            (id != "0").then(|| format!("[\"{name}\", \"{group}\"]"))
        })
        .take(2)
        .collect();
    let [first, second] = &entries[..] else {
        bail!("this machine has fewer than two users besides root");
    };
    let path = dir.join("pjdfstest.toml");
    fs::write(&path, configured(first, second))?;
    Ok(path)
}

/// The text of a configuration.
pub(super) fn configured(first: &str, second: &str) -> String {
    format!(
        "[features]\nposix_fallocate = {{}}\nstat_st_birthtime = {{}}\nutimensat = {{}}\nutime_now = {{}}\n\
         [settings]\nnaptime = 0.02\nallow_remount = false\n\
         [dummy_auth]\nentries = [{first}, {second}]\n"
    )
}
