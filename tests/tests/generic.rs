//! The features that a generic suite of file-system tests looks at, each covered by checks of our own, on an export and on a
//! mount of it: both must come to the same, and nothing may fail on the mount.
//!
//! | feature | checks (`tests/guest/*.c`) |
//! |---|---|
//! | reading and writing, odd sizes and offsets | [`FEATURES`] `rw` |
//! | asynchronous and direct I/O, and agreement with buffered | `aio`, `direct` |
//! | mappings, also beyond the end and against truncation | `mmap` |
//! | allocation, holes, seeking for data | `prealloc`, `punch`, `zero`, `seek` |
//! | copies inside the kernel | `copy`, `clone`, `splice` |
//! | names, links, renames, removals | `rename`, `link`, `unlink`, `names`, `special` |
//! | directories, positions in them, change under a listing | `dir` |
//! | modes, owners, groups, set-id bits, sticky directories | `perms`, `setid` |
//! | access control lists and other attributes | `acl`, `xattr` |
//! | mapped ids | `idmapped` |
//! | times, birth time, change time | `times` |
//! | locks, their owners, deadlock | `locks` |
//! | file handles | `handles` |
//! | inode flags and other ioctls, polling | `ioctl`, `poll` |
//! | a full file system | [`a_full_export_says_so_and_recovers`] |
//! | two clients | `tests/coherence.rs` |
//!
//! What needs the block device below a file system (its log, its quota, its check program, freezing, encryption) has no
//! counterpart on a mount: the file system of the export answers for it.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Service, TempDir, build_checks, can_mount, need};
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The checks of each feature, by the beginnings of their names.
const FEATURES: &[(&str, &[&str])] = &[
    (
        "rw",
        &[
            "read back",
            "write at odd",
            "vectored",
            "append",
            "open with truncation",
            "truncate up",
            "end of file",
            "beyond 4 GiB",
            "concurrent",
            "small writes",
            "file size limit",
        ],
    ),
    ("aio", &["asynchronous"]),
    ("direct", &["direct"]),
    ("mmap", &["mmap", "mappings", "no stale bytes"]),
    ("prealloc", &["fallocate"]),
    ("punch", &["punch"]),
    ("zero", &["fallocate with ZERO_RANGE"]),
    ("seek", &["holes", "seek beyond"]),
    ("copy", &["copy_file_range"]),
    ("clone", &["ioctls that files"]),
    ("splice", &["splice", "sendfile"]),
    ("rename", &["rename"]),
    ("link", &["hard links", "symbolic link", "links of"]),
    ("unlink", &["unlinked", "nameless", "removed"]),
    ("names", &["names that", "longest name", "unusual names"]),
    ("special", &["FIFO", "device nodes", "Unix sockets"]),
    (
        "dir",
        &[
            "list ten",
            "telldir",
            "delete while",
            "types and",
            "new entries",
            "list through",
        ],
    ),
    (
        "perms",
        &[
            "modes",
            "owners",
            "permission of",
            "new files",
            "supplementary",
            "umask",
            "sticky",
            "immutable",
        ],
    ),
    (
        "setid",
        &[
            "changes of content",
            "chown to nobody",
            "set-group-ID",
            "a write clears",
        ],
    ),
    ("acl", &["access control list"]),
    ("xattr", &["xattr"]),
    ("idmapped", &["mount with mapped"]),
    (
        "times",
        &[
            "times",
            "access times",
            "statx birth",
            "changes of an inode",
        ],
    ),
    (
        "locks",
        &[
            "record lock",
            "open file description",
            "flock",
            "blocking",
            "locks of",
            "deadlock",
            "the holder",
        ],
    ),
    ("handles", &["file handles"]),
    ("ioctl", &["ioctls", "immutable"]),
    ("poll", &["files are always ready"]),
];

fn names(program: &Path) -> Result<Vec<String>> {
    let output = Command::new(program).arg("list").output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().map(str::to_owned).collect())
}

/// How each check ended in a directory: its exit status and what it said.
fn run_all(program: &Path, at: &Path) -> Result<BTreeMap<String, (Option<i32>, String)>> {
    names(program)?
        .into_iter()
        .map(|name| {
            let output = Command::new(program)
                .args(["run", &name])
                .arg(at)
                .output()
                .with_context(|| format!("run the check {name}"))?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            Ok((name, (output.status.code(), text)))
        })
        .collect()
}

/// Exports `export` and compares all checks there and on a mount of it.
fn compare(export: &Path, parameters: &str) -> Result<()> {
    let service = Service::start()?;
    service.call(&format!(
        "fsdev_aio_create aio0 {} --enable-xattr {parameters}",
        export.display()
    ))?;
    let socket = service.start_vhost_user_device("vfsdev0", "tag", "aio0")?;
    let mount = service.mount(&socket)?;
    let program = build_checks(service.dir().path())?;
    let here = run_all(&program, export)?;
    let there = run_all(&program, mount.path())?;
    let differ: Vec<_> = there
        .iter()
        .filter(|(name, (status, _))| {
            let same = here.get(*name).is_some_and(|(local, _)| local == status);
            // what the export cannot do is skipped there; a mount may do more, never less
            !(same || *status == Some(0)) || *status == Some(1)
        })
        .collect();
    ensure!(
        differ.is_empty(),
        "with {parameters}: {differ:#?}\nlog of the service:\n{}",
        service.log()
    );
    mount.unmount()
}

#[test]
fn every_feature_is_covered_by_a_check() {
    let dir = TempDir::new();
    let program = need!(build_checks(dir.path()));
    let names = names(&program).unwrap();
    for (feature, checks) in FEATURES {
        for start in *checks {
            assert!(
                names.iter().any(|name| name.contains(start)),
                "no check of {feature} is called '{start}...'"
            );
        }
    }
}

#[test]
fn a_mount_of_a_disk_comes_to_what_the_disk_comes_to() {
    need!(can_mount());
    let dir = TempDir::new();
    compare(&dir.make_dir("export"), "").unwrap();
}

#[test]
fn a_mount_of_memory_comes_to_what_memory_comes_to_with_any_cache() {
    need!(can_mount());
    let memory = need!(Memory::new("size=3g"));
    for parameters in ["--cache never", "--cache auto --enable-writeback-cache"] {
        compare(&memory.path(), parameters).unwrap();
    }
}

/// A file system in memory of its own.
struct Memory(TempDir);

impl Memory {
    fn new(options: &str) -> Result<Self> {
        let dir = TempDir::new();
        let at = dir.make_dir("at");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&at)
            .status()?;
        ensure!(status.success(), "cannot mount a tmpfs");
        Ok(Self(dir))
    }

    fn path(&self) -> PathBuf {
        self.0.join("at")
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // a lazy one, because a failed test may have left it in use
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

#[test]
fn a_full_export_says_so_and_recovers() {
    need!(can_mount());
    let memory = need!(Memory::new("size=4m,nr_inodes=64"));
    let service = Service::start().unwrap();
    let line = format!("fsdev_aio_create aio0 {}", memory.path().display());
    service.call(&line).unwrap();
    let socket = service
        .start_vhost_user_device("vfsdev0", "tag", "aio0")
        .unwrap();
    let mount = service.mount(&socket).unwrap();
    let full = |result: std::io::Result<()>| {
        result.map_err(|error| error.kind()) == Err(ErrorKind::StorageFull)
    };
    let at = |name: &str| mount.path().join(name);
    assert!(full(fs::write(at("big"), vec![1; 8 << 20])));
    fs::remove_file(at("big")).unwrap();
    fs::write(at("fits"), vec![2; 2 << 20]).unwrap();
    assert!(fs::read(at("fits")).unwrap().iter().all(|byte| *byte == 2));
    let made = (0..100)
        .map(|number| fs::create_dir(at(&format!("d{number}"))))
        .take_while(Result::is_ok)
        .count();
    assert!((1..64).contains(&made), "{made} directories were made");
    assert!(full(fs::create_dir(at("one-more"))));
    fs::remove_dir(at("d0")).unwrap();
    fs::create_dir(at("one-more")).unwrap();
    mount.unmount().unwrap();
}
