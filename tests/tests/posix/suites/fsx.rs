//! fsx: random operations on one file, each read compared with what was written.

use super::installed;
use crate::disk::Backing;
use crate::matrix::{Export, Suite, full};
use crate::outcome::{Outcome, Outcomes, output_of};
use anyhow::Result;
use ferry_tests::{TempDir, repository};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const SEEDS: u32 = 10;
const OPERATIONS: u32 = 200_000;
const FEW_SEEDS: u32 = 2;
const FEW_OPERATIONS: u32 = 3_000;

/// How the file is reached.
#[derive(Clone, Copy)]
struct Variant {
    mapped: bool,
    direct: bool,
}

const VARIANTS: [(Variant, &str); 4] = [
    (
        Variant {
            mapped: false,
            direct: false,
        },
        "read and write",
    ),
    (
        Variant {
            mapped: true,
            direct: false,
        },
        "and mmap",
    ),
    (
        Variant {
            mapped: false,
            direct: true,
        },
        "O_DIRECT",
    ),
    (
        Variant {
            mapped: true,
            direct: true,
        },
        "O_DIRECT and mmap",
    ),
];

impl Variant {
    /// Operations that every file system has, and what fsx leaves out by default. What is direct is aligned to sectors.
    /// Every other seed leaves to the kernel when to write back what was mapped.
    fn configuration(self, seed: u32) -> String {
        let mapped = if self.mapped { 10 } else { 0 };
        // of aligned ones, fsx makes calls of posix_fallocate with no length
        let (align, buffered) = if self.direct { (512, 0) } else { (1, 2) };
        format!(
            "flen = 262144\nnomsyncafterwrite = {}\n[opsize]\nmax = 65536\nalign = {align}\n\
             [weights]\nclose_open = 1\ninvalidate = 1\nmapread = {mapped}\nmapwrite = {mapped}\nread = 10\nwrite = 10\n\
             truncate = 3\nfsync = 1\nfdatasync = 1\nposix_fallocate = {buffered}\npunch_hole = 2\ncopy_file_range = 3\n\
             sendfile = {buffered}\nposix_fadvise = 1\n",
            seed.is_multiple_of(2)
        )
    }
}

/// The suite.
#[derive(Debug)]
pub(super) struct Fsx;

impl Suite for Fsx {
    fn name(&self) -> &'static str {
        "fsx"
    }

    fn about(&self) -> String {
        format!(
            "{SEEDS} seeds of {OPERATIONS} operations each, with and without mmap, with and without `O_DIRECT`; a run with one \
             seed and one variant is a test."
        )
    }

    /// What differs from cache to cache, and nothing that waits for a disk. `metadata` keeps data as `auto` does.
    fn exports(&self) -> Vec<Export> {
        Export::all_on(Backing::Tmpfs)
            .filter(|export| export.cache != "metadata")
            .collect()
    }

    fn ready(&self) -> Result<()> {
        installed("fsx").map(drop)
    }

    fn run(&self, dir: &Path) -> Result<Outcomes> {
        let program = installed("fsx")?;
        let scratch = TempDir::new();
        let preload = build_preload(&scratch)?;
        let (seeds, operations) = if full() {
            (SEEDS, OPERATIONS)
        } else {
            (FEW_SEEDS, FEW_OPERATIONS)
        };
        let mut outcomes = Outcomes::default();
        for (variant, name) in VARIANTS {
            let config = scratch.join("fsx.toml");
            for seed in 1..=seeds {
                fs::write(&config, variant.configuration(seed))?;
                let file = dir.join(format!("file-{seed}"));
                let mut command = Command::new(&program);
                command
                    .args(["-N", &operations.to_string(), "-S", &seed.to_string(), "-f"])
                    .arg(&config)
                    .arg("-P")
                    .arg(scratch.path())
                    .arg(&file)
                    .env("LD_PRELOAD", &preload);
                if variant.direct {
                    command.env("DIRECT", "1");
                }
                let result = output_of(&mut command).map(|_| String::new());
                outcomes.add(format!("{name}, seed {seed}"), Outcome::of(result));
                fs::remove_file(&file)?;
            }
        }
        Ok(outcomes)
    }
}

/// What makes fsx use `O_DIRECT`, which it does not know itself, and unmap what it maps.
fn build_preload(dir: &TempDir) -> Result<PathBuf> {
    let library = dir.join("preload.so");
    output_of(
        Command::new("cc")
            .args([
                "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o",
            ])
            .arg(&library)
            .arg(repository().join("tests/tests/posix/suites/preload.c")),
    )?;
    Ok(library)
}
