//! Programs that people run on file systems. What each finds must be the same on a mount and on the export itself.

mod archives;
mod cargo;
mod git;
mod postgres;
mod sqlite;

use super::on_path;
use crate::disk::Backing;
use crate::matrix::{Export, Suite};
use crate::outcome::{Outcome, Outcomes};
use anyhow::Result;
use ferry_tests::TempDir;
use std::fs;
use std::path::Path;

/// Where a program may work.
struct Places<'a> {
    /// Its directory on the file system under test.
    dir: &'a Path,
    /// A directory of this machine's own.
    scratch: &'a TempDir,
}

/// A program, what it is told to do, and what it found.
type Program = (&'static str, fn(&Places<'_>) -> Result<String>);

const PROGRAMS: [Program; 7] = [
    (
        "git clones this repository, packs and checks it",
        git::clone_pack_check,
    ),
    (
        "sqlite runs a mix of statements with each journal",
        sqlite::mix,
    ),
    (
        "sqlite keeps what it committed when it is killed",
        sqlite::killed,
    ),
    (
        "cargo builds a crate, and again only what changed",
        cargo::build,
    ),
    (
        "rsync -aAXH takes a tree there and back",
        archives::rsync_both_ways,
    ),
    (
        "tar packs and unpacks a tree of every kind of file",
        archives::tar_both_ways,
    ),
    (
        "PostgreSQL runs pgbench, is killed, and recovers",
        postgres::bench_and_recover,
    ),
];

/// The suite.
#[derive(Debug)]
pub(super) struct Programs;

impl Suite for Programs {
    fn name(&self) -> &'static str {
        "programs"
    }

    fn about(&self) -> String {
        let list: Vec<String> = PROGRAMS
            .iter()
            .map(|(name, _)| format!("* {name}\n"))
            .collect();
        format!(
            "What each of these finds is the same on the mount as on the export:\n\n{}",
            list.concat().trim_end()
        )
    }

    fn exports(&self) -> Vec<Export> {
        Export::all_on(Backing::Ext4).collect()
    }

    fn ready(&self) -> Result<()> {
        for command in [
            "git", "sqlite3", "stdbuf", "rsync", "tar", "setfacl", "getfattr", "setpriv",
        ] {
            on_path(command)?;
        }
        postgres::programs().map(drop)
    }

    fn run(&self, dir: &Path) -> Result<Outcomes> {
        let mut outcomes = Outcomes::default();
        for (number, (name, program)) in PROGRAMS.into_iter().enumerate() {
            let scratch = TempDir::new();
            let dir = dir.join(number.to_string());
            fs::create_dir(&dir)?;
            let places = Places {
                dir: &dir,
                scratch: &scratch,
            };
            outcomes.add(name, Outcome::of(program(&places)));
            fs::remove_dir_all(&dir)?;
        }
        Ok(outcomes)
    }
}
