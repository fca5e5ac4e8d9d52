//! git: clone, checkout, gc and fsck.

use super::Places;
use crate::outcome::output_of;
use anyhow::{Result, ensure};
use ferry_tests::repository;
use std::fs;
use std::path::Path;
use std::process::Command;

pub(super) fn clone_pack_check(places: &Places<'_>) -> Result<String> {
    let configuration = places.scratch.join("gitconfig");
    // the repository may belong to somebody else than root
    fs::write(
        &configuration,
        "[safe]\ndirectory = *\n[user]\nname = nobody\nemail = nobody@localhost\n[advice]\ndetachedHead = false\n",
    )?;
    let clone = places.dir.join("clone");
    let git = |dir: &Path, args: &[&str]| {
        output_of(
            Command::new("git")
                .env("GIT_CONFIG_GLOBAL", &configuration)
                .arg("-C")
                .arg(dir)
                .args(args),
        )
    };
    let (from, to) = (repository(), clone.to_string_lossy().into_owned());
    git(
        places.scratch.path(),
        &[
            "clone",
            "--quiet",
            "--no-local",
            &from.to_string_lossy(),
            &to,
        ],
    )?;
    let first = git(&clone, &["rev-list", "--max-parents=0", "HEAD"])?;
    let first = first.lines().next().unwrap_or_default();
    let head = git(&clone, &["rev-parse", "HEAD"])?;
    git(&clone, &["checkout", "--quiet", first])?;
    git(&clone, &["checkout", "--quiet", head.trim()])?;
    git(
        &clone,
        &["commit", "--quiet", "--allow-empty", "-m", "empty"],
    )?;
    git(&clone, &["gc", "--quiet", "--prune=now"])?;
    git(&clone, &["fsck", "--full", "--strict"])?;
    let changed = git(&clone, &["status", "--porcelain"])?;
    ensure!(
        changed.is_empty(),
        "files changed by themselves:\n{changed}"
    );
    // every file is read again, and its hash compared with what the index says
    let objects = git(&clone, &["ls-files", "--stage"])?;
    git(&clone, &["update-index", "--really-refresh"])?;
    let tree = git(&clone, &["rev-parse", "HEAD^{tree}"])?;
    Ok(format!(
        "{} files of tree {}",
        objects.lines().count(),
        tree.trim()
    ))
}
