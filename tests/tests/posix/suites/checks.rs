//! Our own checks of what file systems do (`tests/guest`), and their answers, which say what system calls come to for every
//! kind of file and argument, each compared as a whole.
//!
//! They cover what the `generic` group of xfstests looks at: [`FEATURES`] says which check covers what. The rest of the group
//! has no counterpart on a mount, because the file system of the export answers for it:
//!
//! | features | why not here |
//! |---|---|
//! | log, shutdown, recoveryloop, replay, freeze, thin, blockdev, eio, volume, union | need the block device below a file system |
//! | quota, project ids as quota | a FUSE mount has none; `no quota` checks the refusal |
//! | encrypt, casefold, verity, label, fsmap, trim, FIBMAP, fiemap | FUSE has none; the ioctls give `ENOTTY` or `EOPNOTSUPP` |
//! | clone, dedupe, swapext | a FUSE driver refuses them before it asks; `answers of ioctl` |
//! | collapse, insert, unshare | a FUSE driver refuses the modes; `fallocate modes and errors` |
//! | dax, atomic writes, pnfs, richacl | offered by no device of ours |
//! | atime, bigtime | `access times`; the options of a mount count on the host, where the reads are |
//! | stress, fsstress, fsx | stress-ng and fsx are suites of their own |
//!
//! What Linux's driver makes of it differs from a local file system in these ways, which no server can change:
//!
//! * With write-back the driver answers for size and modification time until it writes back, whatever the host can take; it
//!   shows no holes, because a server does not know what is still dirty; blocks are those of the last attributes; and what
//!   it has not written back when an inode becomes immutable is lost. `truncate` to the size that a file has leaves its time.
//! * With mapped ids (Linux 6.12 and later) few requests say who asks. `trusted.*` names are then listed for everybody (the
//!   values are not), and `chown(-1, -1)` clears set-id bits only of what is open for writing.
//! * A server hears that something is to be cleared, not what: set-group-ID on a file that its group cannot execute, and
//!   set-id bits on a file that also has capabilities, may go where a local file system keeps them. A page that is written
//!   back is a write, which takes capabilities away.
//! * `RWF_NOAPPEND` is not passed on, nor are the attributes of statx(2), and a guest's `/proc/locks` does not list locks that
//!   the server keeps.

use crate::matrix::{Export, Suite, full};
use crate::outcome::{Outcome, Outcomes, output_of};
use anyhow::{Context, Result};
use ferry_tests::{TempDir, build_checks};
use std::path::Path;
use std::process::Command;

/// The features of xfstests' generic group, each with the beginnings of the names of checks that cover it.
const FEATURES: [(&str, &[&str]); 40] = [
    (
        "rw",
        &[
            "read back",
            "write at odd",
            "vectored",
            "bad addresses",
            "end of file",
        ],
    ),
    ("aio", &["asynchronous", "io_uring"]),
    (
        "direct I/O",
        &["direct", "readers of a growing", "reads into"],
    ),
    (
        "append",
        &[
            "append",
            "concurrent appenders",
            "direct append",
            "long appends",
            "mappings of appended",
            "flags of one write",
        ],
    ),
    ("mmap", &["mmap", "mappings", "answers of mmap"]),
    (
        "zeroes behind the end",
        &["no stale bytes", "what lies behind"],
    ),
    (
        "mremap and mprotect",
        &["mappings follow", "answers of mmap"],
    ),
    (
        "truncation",
        &["truncate", "open with truncation", "mappings follow"],
    ),
    (
        "size limits",
        &["file size limit", "beyond 4 GiB", "answers of sizes"],
    ),
    (
        "prealloc and preallocrw",
        &["fallocate", "answers of fallocate"],
    ),
    ("punch", &["fallocate with PUNCH"]),
    ("zero", &["fallocate with ZERO"]),
    ("seek", &["holes are", "seek beyond", "answers of lseek"]),
    (
        "copy_range",
        &["copy_file_range", "answers of copy_file_range"],
    ),
    ("splice", &["splice", "sendfile", "pipes of pages"]),
    ("ioctl", &["ioctls that", "answers of ioctl"]),
    ("swap", &["swapping"]),
    ("rename", &["rename", "answers of rename"]),
    (
        "hardlink",
        &["hard links", "thousands of links", "links of"],
    ),
    ("symlink", &["symbolic"]),
    (
        "unlink",
        &["unlinked", "many unlinked", "removing", "work in a removed"],
    ),
    ("tmpfile", &["nameless", "many unlinked", "answers of open"]),
    (
        "names",
        &[
            "longest name",
            "unusual names",
            "names that are",
            "answers of operations",
        ],
    ),
    ("mknod", &["device nodes", "fifo", "unix sockets"]),
    (
        "dir",
        &[
            "list",
            "telldir",
            "delete while",
            "positions",
            "lists are whole",
            "types and",
        ],
    ),
    ("getcwd", &["the working directory", "removed working"]),
    (
        "perms",
        &[
            "permission",
            "owners",
            "modes",
            "umask",
            "sticky",
            "answers about new",
        ],
    ),
    (
        "set-id bits",
        &[
            "changes of content",
            "chown to nobody",
            "strangers",
            "answers about set-id",
        ],
    ),
    ("capabilities", &["answers about set-id"]),
    ("acl", &["access control", "answers about access"]),
    ("attr", &["xattr", "answers about attributes"]),
    ("idmapped", &["mount with mapped"]),
    (
        "times",
        &[
            "times",
            "changes of an inode",
            "answers about changed",
            "answers of times",
        ],
    ),
    ("statx", &["statx", "answers of statx"]),
    (
        "locks",
        &["record lock", "open file description", "flock", "deadlock"],
    ),
    ("leases", &["leases"]),
    ("exportfs", &["file handles"]),
    ("mount", &["read-only mount", "mounts without", "no quota"]),
    ("overlay", &["layers"]),
    (
        "immutable and watches",
        &["immutable", "answers about watches"],
    ),
];
const SKIPPED: i32 = 77;
/// Take seconds, and run in other tests too.
const SLOW: [&str; 4] = [
    "deep directories",
    "delete while listing",
    "list ten thousand entries",
    "telldir and seekdir",
];
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
        (export.writeback && OF_THE_GUEST.contains(&test)) || here.agrees_with(direct)
    }

    fn ready(&self) -> Result<()> {
        build_checks(TempDir::new().path()).map(drop)
    }

    fn run(&self, dir: &Path) -> Result<Outcomes> {
        let scratch = TempDir::new();
        let program = build_checks(scratch.path())?;
        names(&program)?
            .into_iter()
            .map(|name| {
                let outcome = run(&program, &name, dir)?;
                Ok((name, outcome))
            })
            .collect()
    }
}

/// The names of the checks that run.
pub(super) fn names(program: &Path) -> Result<Vec<String>> {
    let names = output_of(Command::new(program).arg("list"))?;
    let wanted = |name: &&str| full() || !SLOW.contains(name);
    Ok(names.lines().filter(wanted).map(str::to_owned).collect())
}

fn run(program: &Path, name: &str, dir: &Path) -> Result<Outcome> {
    let output = Command::new(program)
        .args(["run", name])
        .arg(dir)
        .output()
        .with_context(|| format!("run the check {name}"))?;
    Ok(outcome(name, output.status.code(), &output.stdout))
}

/// What a check came to that ended with this status and said this.
pub(super) fn outcome(name: &str, status: Option<i32>, said: &[u8]) -> Outcome {
    let text = String::from_utf8_lossy(said).into_owned();
    match status {
        Some(0) if name.starts_with("answers") => Outcome::Passed(text),
        Some(0) => Outcome::Passed(String::new()),
        Some(SKIPPED) => Outcome::Skipped,
        _ => Outcome::Failed(text),
    }
}

#[test]
fn every_feature_is_covered_by_a_check() {
    let dir = TempDir::new();
    let program = ferry_tests::need!(build_checks(dir.path()));
    let names = output_of(Command::new(program).arg("list")).unwrap();
    for (feature, checks) in FEATURES {
        for start in checks {
            assert!(
                names.lines().any(|name| name.starts_with(start)),
                "no check of {feature} is called '{start}...'"
            );
        }
    }
}
