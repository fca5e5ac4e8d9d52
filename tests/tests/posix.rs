//! What a local file system does, the mount does: pjdfstest and fsx on a mount, compared with the directory behind it.
//!
//! By default a fixed part runs; `FERRY_POSIX_FULL=1` runs everything. The programs come from the Rust registry:
//! `tools/test posix` installs them into the cache of the rigs.

use anyhow::{Context, Result, bail, ensure};
use ferry_tests::{HostMount, Service, TempDir, binary, need, wait_until};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(30);

/// The parts of pjdfstest whose answers depend most on who asks, and which run in seconds.
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
const CACHES: [&str; 2] = ["auto", "never"];

fn full() -> bool {
    std::env::var_os("FERRY_POSIX_FULL").is_some()
}

/// A program that cargo has installed into the cache of the rigs.
fn installed(name: &str) -> Result<PathBuf> {
    let cache = match std::env::var_os("FERRY_RIG_CACHE") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?)
            .join(".cache/ferry/rigs"),
    };
    let root = cache.join("posix");
    let program = root.join("bin").join(name);
    ensure!(
        program.exists(),
        "no {}: run cargo install --locked --root {} {name}",
        program.display(),
        root.display()
    );
    Ok(program)
}

fn can_mount() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "mounting needs root");
    ensure!(
        Path::new("/dev/fuse").exists(),
        "this machine has no /dev/fuse"
    );
    binary("ferry").map(drop)
}

fn can_run(name: &str) -> Result<PathBuf> {
    can_mount()?;
    installed(name)
}

/// A new file system of type ext4 in a file, mounted.
struct Ext4 {
    dir: TempDir,
}

impl Ext4 {
    fn new() -> Result<Self> {
        let dir = TempDir::new();
        let image = dir.join("image");
        fs::File::create(&image)?.set_len(512 << 20)?;
        run(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
        let at = dir.make_dir("at");
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&at))?;
        Ok(Self { dir })
    }

    fn path(&self) -> PathBuf {
        self.dir.join("at")
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        // a lazy one, because a failed test may have left it in use
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("run {command:?}"))?;
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(output.status.success(), "{command:?} failed:\n{text}");
    Ok(text)
}

/// A service with one exported directory, seen through both transports. The supervisor is stopped when dropped.
struct Rig {
    service: Service,
    export: PathBuf,
}

impl Rig {
    fn new(base: &Path, parameters: &str) -> Result<Self> {
        let service = Service::start()?;
        let export = base.join(format!("export-{}", service.id()));
        fs::create_dir(&export)?;
        service.call(&format!(
            "fsdev_aio_create aio0 {} --enable-xattr {parameters}",
            export.display()
        ))?;
        Ok(Self { service, export })
    }

    /// Runs `check` on a mount over each transport.
    fn each(&self, check: impl Fn(&str, &Path) -> Result<()>) -> Result<()> {
        let vfio = self.service.start_doca_device("vfio", "vfio", "aio0")?;
        self.on(&vfio, |path| check("vfio-user", path))?;
        let vhost = self
            .service
            .start_vhost_user_device("vhost", "vhost", "aio0")?;
        self.on(&vhost, |path| check("vhost-user", path))
    }

    fn on(&self, socket: &Path, check: impl Fn(&Path) -> Result<()>) -> Result<()> {
        let mount: HostMount = self.service.mount(socket)?;
        check(mount.path())
            .with_context(|| format!("log of the service:\n{}", self.service.log()))?;
        mount.unmount()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.export);
    }
}

/// Users that pjdfstest acts as; any two that the machine has, each with a group.
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
    let text = format!(
        "[features]\nposix_fallocate = {{}}\nstat_st_birthtime = {{}}\nutimensat = {{}}\nutime_now = {{}}\n\
         [settings]\nnaptime = 0.02\nallow_remount = false\n\
         [dummy_auth]\nentries = [{first}, {second}]\n"
    );
    fs::write(&path, text)?;
    Ok(path)
}

/// What each test of pjdfstest came to.
fn pjdfstest(program: &Path, at: &Path) -> Result<BTreeMap<String, String>> {
    let dir = TempDir::new();
    let mut command = Command::new(program);
    command
        .env("NO_COLOR", "1")
        .arg("-c")
        .arg(configuration(&dir)?)
        .arg("-p")
        .arg(at);
    if !full() {
        command.args(PARTS);
    }
    let output = command.output().context("run pjdfstest")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let results: BTreeMap<String, String> = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| name.contains("::"))
        .map(|(name, result)| (name.to_owned(), result.trim().to_owned()))
        .collect();
    let count = |wanted: &str| results.values().filter(|result| *result == wanted).count();
    ensure!(
        count("ok") > 0,
        "pjdfstest passed nothing:\n{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    println!(
        "{}: {} ok, {} failed, {} skipped",
        at.display(),
        count("ok"),
        count("FAILED"),
        count("skipped")
    );
    Ok(results)
}

fn compare(program: &Path, base: &Path) -> Result<()> {
    for cache in CACHES {
        let rig = Rig::new(base, &format!("--cache {cache}"))?;
        let local = pjdfstest(program, &rig.export)?;
        rig.each(|transport, mount| {
            println!("{transport}, cache {cache}:");
            let differ: Vec<String> = pjdfstest(program, mount)?
                .into_iter()
                .filter(|(name, result)| {
                    let here = local.get(name).map_or("missing", String::as_str);
                    result != here && result != "ok" && name != NOT_ON_A_MOUNT
                })
                .map(|(name, result)| format!("{name} {result}"))
                .collect();
            ensure!(
                differ.is_empty(),
                "the export itself has no such failure: {differ:#?}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_mount_of_tmpfs_passes_every_posix_test_that_the_export_passes() {
    let program = need!(can_run("pjdfstest"));
    compare(&program, Path::new("/dev/shm")).unwrap();
}

#[test]
fn a_mount_of_ext4_passes_every_posix_test_that_the_export_passes() {
    let program = need!(can_run("pjdfstest"));
    let disk = need!(Ext4::new());
    compare(&program, &disk.path()).unwrap();
}

/// Operations that every file system has, and what fsx leaves out by default.
const OPERATIONS: &str = "flen = 262144\n[opsize]\nmax = 65536\n\
    [weights]\nclose_open = 1\ninvalidate = 1\nmapread = 10\nmapwrite = 10\nread = 10\nwrite = 10\ntruncate = 3\n\
    fsync = 1\nfdatasync = 1\nposix_fallocate = 1\npunch_hole = 2\ncopy_file_range = 3\n";

fn fsx(program: &Path, parameters: &str) -> Result<()> {
    let (seeds, operations) = if full() { (10, 200_000) } else { (2, 4_000) };
    let rig = Rig::new(Path::new("/dev/shm"), parameters)?;
    let dir = TempDir::new();
    let config = dir.join("fsx.toml");
    fs::write(&config, OPERATIONS)?;
    rig.each(|_, mount| {
        for seed in 1..=seeds {
            run(Command::new(program)
                .args(["-N", &operations.to_string(), "-S", &seed.to_string(), "-f"])
                .arg(&config)
                .arg("-P")
                .arg(dir.path())
                .arg(mount.join(format!("file-{seed}"))))?;
        }
        Ok(())
    })
    .with_context(|| format!("with {parameters}"))
}

#[test]
fn random_posix_operations_on_one_file_never_diverge_with_any_cache() {
    let program = need!(can_run("fsx"));
    for parameters in [
        "--cache never",
        "--cache auto",
        "--cache always",
        "--cache auto --enable-writeback-cache",
    ] {
        fsx(&program, parameters).unwrap();
    }
}

#[test]
fn a_read_only_export_lets_its_host_write_and_its_guest_read() {
    need!(can_mount());
    let rig = Rig::new(Path::new("/dev/shm"), "--read-only").unwrap();
    let file = rig.export.join("f");
    fs::write(&file, "old").unwrap();
    rig.each(|transport, mount| {
        let seen = mount.join("f");
        let refused = fs::write(&seen, "x").unwrap_err();
        ensure!(refused.raw_os_error() == Some(30), "{transport}: {refused}");
        fs::write(&file, transport)?;
        wait_until("the guest sees the new content", LIMIT, || {
            Ok(fs::read_to_string(&seen)? == transport)
        })
    })
    .unwrap();
}
