//! Our own checks of what file systems do (`tests/guest`), which cover what the generic group of xfstests looks at; and
//! their answers, which say what system calls come to for every kind of file and argument, each compared as a whole.

use crate::matrix::{Export, Suite};
use crate::outcome::{Outcome, Outcomes, output_of};
use anyhow::{Context, Result};
use ferry_tests::{TempDir, build_checks};
use std::path::Path;
use std::process::Command;

const SKIPPED: i32 = 77;
/// Where a guest that caches writes answers by itself: it takes any size and any time until it writes back, shows no holes,
/// and learns of blocks when its attributes expire.
const OF_THE_GUEST: [&str; 6] = [
    "answers of lseek",
    "answers of sizes and positions",
    "answers of times",
    "fallocate with PUNCH_HOLE",
    "holes are found",
    "sparse files take little space",
];

/// The suite.
#[derive(Debug)]
pub(super) struct Checks;

impl Suite for Checks {
    fn name(&self) -> &'static str {
        "checks"
    }

    fn about(&self) -> String {
        format!(
            "The checks of `tests/guest`, one test each. What an `answers of ...` test says must be the same to the letter. With \
             write-back these may differ, because the driver answers: `{}`.",
            OF_THE_GUEST.join("`, `")
        )
    }

    fn agrees(&self, export: Export, test: &str, here: &Outcome, direct: Option<&Outcome>) -> bool {
        export.writeback && OF_THE_GUEST.contains(&test) || here.agrees_with(direct)
    }

    fn ready(&self) -> Result<()> {
        build_checks(TempDir::new().path()).map(drop)
    }

    fn run(&self, dir: &Path) -> Result<Outcomes> {
        let scratch = TempDir::new();
        let program = build_checks(scratch.path())?;
        let names = output_of(Command::new(&program).arg("list"))?;
        names
            .lines()
            .map(|name| Ok((name.to_owned(), run(&program, name, dir)?)))
            .collect()
    }
}

fn run(program: &Path, name: &str, dir: &Path) -> Result<Outcome> {
    let output = Command::new(program)
        .args(["run", name])
        .arg(dir)
        .output()
        .with_context(|| format!("run the check {name}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(match output.status.code() {
        Some(0) => Outcome::Passed(text),
        Some(SKIPPED) => Outcome::Skipped,
        _ => Outcome::Failed(text),
    })
}
