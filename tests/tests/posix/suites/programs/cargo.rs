//! cargo: source and target of a build on the file system, which must see what changed and what did not.

use super::Places;
use crate::outcome::output_of;
use anyhow::{Context, Result, ensure};
use ferry_tests::repository;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

const CRATE: &str = "ferry-shared";
const CHANGED: &str = "shared/src/lib.rs";

fn copy_sources(to: &Path) -> Result<()> {
    let from = repository();
    let list = output_of(
        Command::new("git")
            .args(["-c", "safe.directory=*", "-C"])
            .arg(&from)
            .args(["ls-files", "-z"]),
    )?;
    for name in list.split('\0').filter(|name| !name.is_empty()) {
        let source = from.join(name);
        // one that is deleted and not yet committed so
        if !source.is_file() {
            continue;
        }
        let target = to.join(name);
        fs::create_dir_all(target.parent().unwrap_or(to))?;
        fs::copy(&source, &target).with_context(|| format!("copy {name}"))?;
    }
    Ok(())
}

/// Builds, and gives the names of the crates that were compiled for it.
fn compiled(at: &Path) -> Result<BTreeSet<String>> {
    let mut command = Command::new(env!("CARGO"));
    command
        .args(["build", "--offline", "--locked", "--package", CRATE])
        .env("CARGO_TERM_COLOR", "never")
        .env("CARGO_TARGET_DIR", at.join("target"))
        .env_remove("RUSTFLAGS")
        .current_dir(at);
    let output = command.output().context("run cargo")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cargo build failed:\n{said}");
    Ok(said
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Compiling "))
        .filter_map(|line| line.split(' ').next())
        .map(str::to_owned)
        .collect())
}

pub(super) fn build(places: &Places<'_>) -> Result<String> {
    let at = places.dir.join("sources");
    copy_sources(&at)?;
    let all = compiled(&at)?;
    ensure!(all.contains(CRATE), "it compiled {all:?} only");
    let none = compiled(&at)?;
    ensure!(
        none.is_empty(),
        "nothing had changed, but it compiled {none:?}"
    );
    let changed = at.join(CHANGED);
    let text = fs::read_to_string(&changed)?;
    fs::write(&changed, text + "\n// changed\n")?;
    let one = compiled(&at)?;
    ensure!(
        one == BTreeSet::from([CRATE.to_owned()]),
        "{CHANGED} had changed, and it compiled {one:?}"
    );
    Ok(format!("{all:?}"))
}
