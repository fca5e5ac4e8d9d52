//! stress-ng: its file-system class, each stressor with its own checks of what it reads back.

use super::on_path;
use crate::disk::Backing;
use crate::matrix::{Export, Suite, full};
use crate::outcome::{Outcome, Outcomes, output_of};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Do nothing to the file system that they are pointed at: one mounts file systems of the kernel's own, the other fills the
/// machine's table of mounts until it hangs.
const ELSEWHERE: [&str; 2] = ["bind-mount", "binderfs"];
/// Take seconds for one round.
const SLOW: [&str; 6] = [
    "chdir",
    "fallocate",
    "fpunch",
    "inode-flags",
    "inotify",
    "symlink",
];
/// Runs once and not twice: both would use one directory, which the first to end removes, on any file system.
const ALONE: &str = "fcntl";
/// Stressors that would write a gigabyte each.
const SMALLER: [&str; 8] = [
    "--fallocate-bytes",
    "16m",
    "--hdd-bytes",
    "16m",
    "--iomix-bytes",
    "16m",
    "--sync-file-bytes",
    "16m",
];

/// The suite.
#[derive(Debug)]
pub(super) struct Stress;

impl Suite for Stress {
    fn name(&self) -> &'static str {
        "stress-ng"
    }

    fn about(&self) -> String {
        format!(
            "Each stressor of the class `filesystem` with `--verify`, but for `{}`, which stress nothing of the file system that \
             they are pointed at. Skipped are those that find no support on the export either.",
            ELSEWHERE.join("` and `")
        )
    }

    fn exports(&self) -> Vec<Export> {
        Export::list(&[
            (Backing::Ext4, "auto", false),
            (Backing::Ext4, "always", true),
            (Backing::Tmpfs, "never", false),
        ])
    }

    fn must_pass_directly(&self) -> bool {
        false
    }

    fn ready(&self) -> Result<()> {
        on_path("stress-ng").map(drop)
    }

    fn run(&self, dir: &Path) -> Result<Outcomes> {
        let mut outcomes = Outcomes::default();
        for stressor in stressors()? {
            let at = dir.join(&stressor);
            fs::create_dir(&at)?;
            outcomes.add(&*stressor, stress(&stressor, &at)?);
            fs::remove_dir_all(&at).with_context(|| format!("remove what {stressor} left"))?;
        }
        Ok(outcomes)
    }
}

/// The names that the program itself gives.
fn stressors() -> Result<Vec<String>> {
    let text = output_of(Command::new("stress-ng").args(["--class", "filesystem?"]))?;
    let Some((_, names)) = text.split_once("stressors:") else {
        bail!("stress-ng does not list its class filesystem: {text}");
    };
    let wanted = |name: &str| !ELSEWHERE.contains(&name) && (full() || !SLOW.contains(&name));
    Ok(names
        .split_whitespace()
        .filter(|name| wanted(name))
        .map(str::to_owned)
        .collect())
}

fn stress(stressor: &str, at: &Path) -> Result<Outcome> {
    let instances = if stressor == ALONE { "1" } else { "2" };
    let mut command = Command::new("stress-ng");
    command
        .arg("--temp-path")
        .arg(at)
        .args([&format!("--{stressor}"), instances])
        .args(["--verify", "--timeout", "2"])
        .args(SMALLER);
    if !full() {
        command.args([&format!("--{stressor}-ops"), "5"]);
    }
    let output = command.output().context("run stress-ng")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout);
    Ok(if !output.status.success() {
        Outcome::Failed(format!("{}: {said}", output.status))
    } else if said.contains("skipping stress test") {
        Outcome::Skipped
    } else {
        Outcome::Passed(String::new())
    })
}
