//! fio: eight jobs at once write every block of a file in random order, each with a checksum, and read all of it back.

use super::on_path;
use crate::matrix::{Suite, full};
use crate::outcome::{Outcome, Outcomes, output_of};
use anyhow::Result;
use ferry_tests::TempDir;
use std::fs;
use std::path::Path;
use std::process::Command;

const ENGINES: [&str; 8] = [
    "sync", "psync", "vsync", "pvsync2", "libaio", "io_uring", "mmap", "posixaio",
];
const MAPPING: &str = "mmap";
/// 512 bytes to 1 MiB.
const BLOCK_SHIFTS: std::ops::RangeInclusive<u32> = 9..=20;
/// The part that runs always: each engine once, with a size that is not its neighbour's.
const FEW_BLOCK_SHIFTS: [u32; 4] = [9, 18, 12, 20];
const JOBS: u32 = 8;

/// The suite.
#[derive(Debug)]
pub(super) struct Fio;

impl Suite for Fio {
    fn name(&self) -> &'static str {
        "fio"
    }

    fn about(&self) -> String {
        format!(
            "fio with `verify=crc32c`, {JOBS} jobs, blocks of 512 bytes to 1 MiB; an engine ({}) with all block sizes is a test, \
             and each but {MAPPING} once more with `O_DIRECT`.",
            ENGINES.join(", ")
        )
    }

    fn ready(&self) -> Result<()> {
        on_path("fio").map(drop)
    }

    fn run(&self, dir: &Path) -> Result<Outcomes> {
        let scratch = TempDir::new();
        let mut outcomes = Outcomes::default();
        for (number, engine) in ENGINES.into_iter().enumerate() {
            for direct in [false, true] {
                let of_the_part = direct == (number % 3 == 1);
                if (direct && engine == MAPPING) || !(full() || of_the_part) {
                    continue;
                }
                let shifts: Vec<u32> = if full() {
                    BLOCK_SHIFTS.collect()
                } else {
                    vec![FEW_BLOCK_SHIFTS[number % FEW_BLOCK_SHIFTS.len()]]
                };
                let jobs = scratch.join("jobs.fio");
                fs::write(&jobs, job_file(engine, direct, &shifts, dir))?;
                let mut command = Command::new("fio");
                command.arg("--output-format=terse").arg(&jobs);
                let result = output_of(command.current_dir(scratch.path()));
                let direct = if direct { ", O_DIRECT" } else { "" };
                outcomes.add(
                    format!("{engine}{direct}"),
                    Outcome::of(result.map(|_| String::new())),
                );
            }
        }
        Ok(outcomes)
    }
}

/// One job for each block size, one after another.
fn job_file(engine: &str, direct: bool, shifts: &[u32], dir: &Path) -> String {
    let mut text = format!(
        "[global]\ndirectory={}\nioengine={engine}\ndirect={}\nrw=randwrite\nverify=crc32c\nverify_fatal=1\nnumjobs={JOBS}\n\
         iodepth=8\nunlink=1\ngroup_reporting\n",
        dir.display(),
        u8::from(direct)
    );
    for shift in shifts {
        let block = 1_u64 << shift;
        let size = (4 * block).max(128 << 10);
        text.push_str(&format!(
            "[blocks-{block}]\nstonewall\nbs={block}\nsize={size}\n"
        ));
    }
    text
}
