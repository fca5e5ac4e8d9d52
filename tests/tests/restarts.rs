//! The control plane is killed, again and again, while it is being given work: what it has acknowledged is what the data
//! plane does and what it knows itself after the next start. Who reads from a device meanwhile notices nothing.
//!
//! `FERRY_KILLS=1000` kills it so often. The same holds where another version takes its place.

use anyhow::{Context, Result, ensure};
use ferry_tests::churn::{Churn, Client, Known, ask, connect, devices};
use ferry_tests::{Numbers, Process, TempDir, binary, can_mount, need, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How often it is killed, unless `FERRY_KILLS` says otherwise.
const KILLS: usize = 50;
const BLOCK: usize = 4096;
const BLOCKS: usize = 256;
const LIMIT: Duration = Duration::from_secs(30);

struct Rig {
    dir: TempDir,
    _dataplane: Process,
}

impl Rig {
    fn start() -> Result<Rig> {
        let dir = TempDir::new();
        let mut command = Command::new(binary("ferry-dataplane")?);
        command
            .arg("--no-huge")
            .arg("--run-dir")
            .arg(dir.join("run"));
        let dataplane = Process::start(&command, &dir.join("dataplane.log"))?;
        wait_until("the data plane is there", LIMIT, || {
            Ok(dir.join("run").join("dataplane.sock").exists())
        })?;
        Ok(Rig {
            dir,
            _dataplane: dataplane,
        })
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("rpc.sock")
    }

    fn controlplane(&self, state: &str) -> Result<Process> {
        self.controlplane_of(&binary("ferry-controlplane")?, state)
    }

    fn controlplane_of(&self, program: &Path, state: &str) -> Result<Process> {
        let mut command = Command::new(program);
        command
            .arg("--run-dir")
            .arg(self.dir.join("run"))
            .arg("-r")
            .arg(self.socket())
            .arg("--state-dir")
            .arg(self.dir.join(state))
            .env_remove("SPDK_RPC_INIT_CONF")
            .env_remove("SPDK_RPC_INIT_CONF_JSON");
        Process::start(&command, &self.dir.join("controlplane.log"))
    }

    /// A connection to a control plane that has seen the data plane.
    fn connect(&self) -> Result<Client> {
        connect(&self.socket()).with_context(|| {
            fs::read_to_string(self.dir.join("controlplane.log")).unwrap_or_default()
        })
    }
}

/// A device mounted on this host, and a thread that reads blocks of it, one after the other, past every cache.
struct Reading {
    mount: Process,
    dir: PathBuf,
    killing: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Result<[Vec<Duration>; 2]>>,
}

impl Reading {
    fn start(rig: &Rig, client: &mut Client) -> Result<Reading> {
        let export = rig.dir.make_dir("export");
        for (method, params) in [
            (
                "fsdev_aio_create",
                json!({"name": "aio0", "root_path": export}),
            ),
            (
                "virtio_fs_device_create",
                json!({"transport_name": "VHOST_USER", "dev_name": "read", "tag": "read", "fsdev": "aio0",
                    "num_request_queues": 1}),
            ),
            ("virtio_fs_device_start", json!({"dev_name": "read"})),
        ] {
            ask(client, method, &params)?;
        }
        let content: Vec<u8> = (0..BLOCKS).flat_map(|block| [block as u8; BLOCK]).collect();
        fs::write(export.join("file"), content)?;
        let dir = rig.dir.make_dir("mnt");
        let mut command = Command::new(binary("ferry")?);
        command
            .arg("mount")
            .arg(rig.dir.join("run/vhost/read.sock"))
            .arg(&dir);
        let mount = Process::start(&command, &rig.dir.join("mount.log"))?;
        let file = dir.join("file");
        wait_until("the device is mounted", LIMIT, || Ok(file.exists()))
            .with_context(|| mount.output())?;
        let (killing, ended) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicBool::new(false)),
        );
        let thread = {
            let (killing, ended) = (Arc::clone(&killing), Arc::clone(&ended));
            thread::spawn(move || read_blocks(&file, &killing, &ended))
        };
        Ok(Reading {
            mount,
            dir,
            killing,
            ended,
            thread,
        })
    }

    /// Ends it; gives how long each read took before and while the control plane was killed.
    fn end(mut self) -> Result<[Vec<Duration>; 2]> {
        self.ended.store(true, Ordering::Relaxed);
        let times = self.thread.join();
        let unmounted = Command::new("umount").arg(&self.dir).status()?;
        ensure!(unmounted.success(), "umount failed");
        self.mount.wait(LIMIT)?;
        times.map_err(|_| anyhow::anyhow!("the reader panicked"))?
    }
}

/// Reads until it is to end; every block has to be what was written.
fn read_blocks(
    path: &Path,
    killing: &AtomicBool,
    ended: &AtomicBool,
) -> Result<[Vec<Duration>; 2]> {
    let direct = nix::fcntl::OFlag::O_DIRECT.bits();
    let file = fs::File::options()
        .read(true)
        .custom_flags(direct)
        .open(path)?;
    let mut memory = vec![0; 2 * BLOCK];
    let from = memory.as_ptr().align_offset(BLOCK);
    let buffer = &mut memory[from..from + BLOCK];
    let mut numbers = Numbers(0xb10c);
    let mut times = [Vec::new(), Vec::new()];
    while !ended.load(Ordering::Relaxed) {
        let block = numbers.below(BLOCKS);
        let began = Instant::now();
        file.read_exact_at(buffer, (block * BLOCK) as u64)?;
        times[usize::from(killing.load(Ordering::Relaxed))].push(began.elapsed());
        ensure!(
            buffer.iter().all(|byte| usize::from(*byte) == block),
            "block {block} has another's content"
        );
    }
    Ok(times)
}

/// The time that so many per mille did not exceed.
fn per_mille(times: &[Duration], part: usize) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len() * part).div_ceil(1000).saturating_sub(1);
    sorted.get(at).copied().unwrap_or_default()
}

fn report([calm, killing]: &[Vec<Duration>; 2], kills: usize) -> Result<()> {
    ensure!(!calm.is_empty() && !killing.is_empty(), "nothing was read");
    let (usual, usual_most) = (per_mille(calm, 999), per_mille(calm, 1000));
    let (then, most) = (per_mille(killing, 999), per_mille(killing, 1000));
    let ratio = |time: Duration| time.as_secs_f64() / usual.as_secs_f64();
    println!(
        "{kills} kills; {} reads of 4 KiB without them: p99.9 {usual:?}, most {usual_most:?}; {} with them: p99.9 {then:?} \
         ({:.2} of the former), most {most:?} ({:.2})",
        calm.len(),
        killing.len(),
        ratio(then),
        ratio(most)
    );
    Ok(())
}

#[test]
fn what_was_acknowledged_survives_kills_of_the_control_plane() {
    need!(binary("ferry-dataplane"));
    need!(binary("ferry-controlplane"));
    if let Err(error) = kill_and_compare() {
        panic!("{error:#}");
    }
}

fn kill_and_compare() -> Result<()> {
    let rig = Rig::start()?;
    let mut controlplane = rig.controlplane("state")?;
    let mut client = rig.connect()?;
    let transport = json!({"transport_name": "VHOST_USER"});
    ask(&mut client, "virtio_fs_transport_create", &transport)?;
    ask(&mut client, "virtio_fs_transport_start", &transport)?;
    let kills = match std::env::var("FERRY_KILLS") {
        Ok(kills) => kills.parse()?,
        Err(_) => KILLS,
    };
    let reading = Reading::start(&rig, &mut client)?;
    let mut churn = Churn::new(client)?;
    churn.work(kills)?;
    reading.killing.store(true, Ordering::Relaxed);
    for round in 0..kills {
        let pid = Pid::from_raw(i32::try_from(controlplane.id())?);
        churn.until_killed(|| Ok(kill(pid, Signal::SIGKILL)?))?;
        controlplane.wait(LIMIT)?;
        // The next one is paused for a moment before anybody needs it, which is no matter either.
        controlplane = rig.controlplane("state")?;
        let client = rig.connect()?;
        let pid = Pid::from_raw(i32::try_from(controlplane.id())?);
        kill(pid, Signal::SIGSTOP)?;
        kill(pid, Signal::SIGCONT)?;
        churn
            .go_on(client)
            .with_context(|| format!("round {round}"))?;
    }
    report(&reading.end()?, kills)?;

    // A control plane that knows nothing learns from the data plane the same about every started device.
    let known = churn.known().clone();
    drop(churn);
    controlplane.stop(Signal::SIGTERM, LIMIT)?;
    let _other = rig.controlplane("empty")?;
    let mut client = rig.connect()?;
    let running = |all: BTreeMap<String, Known>| -> BTreeMap<String, Known> {
        let runs = |known: &Known| known.as_ref().is_some_and(|(_, state)| state == "running");
        all.into_iter().filter(|(_, known)| runs(known)).collect()
    };
    let live = devices(&mut client)?;
    let stopped = |known: &Known| known.as_ref().is_some_and(|(_, state)| state == "stopped");
    let names = |all: &BTreeMap<String, Known>| -> Vec<String> {
        all.iter()
            .filter(|(_, known)| stopped(known))
            .map(|(name, _)| name.clone())
            .collect()
    };
    assert_eq!(names(&live), names(&known));
    assert_eq!(running(live), running(known));
    Ok(())
}

/// What the version of this build is called.
const VERSION: &str = concat!("Ferry v", env!("CARGO_PKG_VERSION"));
/// How often one of two versions takes the other's place.
const SWAPS: usize = 10;

/// Another version, of the same length.
fn other_version() -> String {
    VERSION.replace(|c: char| c.is_ascii_digit(), "9")
}

/// A control plane of that version: this build, with the other version written into it.
fn other_build(rig: &Rig) -> Result<PathBuf> {
    let mut program = fs::read(binary("ferry-controlplane")?)?;
    let (own, other) = (VERSION.as_bytes(), other_version());
    let found = |program: &[u8]| program.windows(own.len()).position(|part| part == own);
    let mut count = 0;
    while let Some(at) = found(&program) {
        program[at..at + own.len()].copy_from_slice(other.as_bytes());
        count += 1;
    }
    ensure!(count > 0, "the program does not contain its version");
    let path = rig.dir.join("ferry-controlplane-other");
    fs::write(&path, program)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// All that a control plane would save, and the devices with their states.
fn configuration(client: &mut Client) -> Result<Vec<Value>> {
    let mut all = vec![ask(client, "virtio_fs_get_devices", &json!({}))?];
    for name in ["scheduler", "iobuf", "fsdev", "virtio_fs"] {
        all.push(ask(client, "framework_get_config", &json!({"name": name}))?);
    }
    Ok(all)
}

fn version_of(client: &mut Client) -> Result<Value> {
    let answer = ask(client, "spdk_get_version", &json!(null))?;
    Ok(answer["version"].clone())
}

#[test]
fn another_version_takes_over_during_io_and_one_that_cannot_read_the_state_leaves_it_alone() {
    need!(can_mount());
    if let Err(error) = swap_versions() {
        panic!("{error:#}");
    }
}

/// Has the one that runs accept something, and another program take its place.
fn swap(
    rig: &Rig,
    controlplane: &mut Process,
    client: &mut Client,
    number: usize,
    program: &Path,
) -> Result<()> {
    let name = format!("d{number}");
    let device = json!({"transport_name": "VHOST_USER", "dev_name": name, "tag": name, "fsdev": "aio0",
        "num_request_queues": 1});
    ask(client, "virtio_fs_device_create", &device)?;
    if number.is_multiple_of(2) {
        ask(client, "virtio_fs_device_start", &json!({"dev_name": name}))?;
    }
    let before = configuration(client)?;
    controlplane.stop([Signal::SIGTERM, Signal::SIGKILL][number / 2 % 2], LIMIT)?;
    *controlplane = rig.controlplane_of(program, "state")?;
    *client = rig.connect()?;
    let after = configuration(client)?;
    ensure!(before == after, "{after:?} in the place of {before:?}");
    Ok(())
}

fn swap_versions() -> Result<()> {
    let rig = Rig::start()?;
    let versions = [VERSION.to_owned(), other_version()];
    let programs = [binary("ferry-controlplane")?, other_build(&rig)?];
    let mut controlplane = rig.controlplane("state")?;
    let mut client = rig.connect()?;
    let transport = json!({"transport_name": "VHOST_USER"});
    ask(&mut client, "virtio_fs_transport_create", &transport)?;
    ask(&mut client, "virtio_fs_transport_start", &transport)?;
    let reading = Reading::start(&rig, &mut client)?;
    ensure!(version_of(&mut client)? == VERSION, "not this version");
    for number in 1..=SWAPS {
        let (program, version) = (&programs[number % 2], &versions[number % 2]);
        swap(&rig, &mut controlplane, &mut client, number, program)
            .with_context(|| format!("swap {number}"))?;
        ensure!(version_of(&mut client)? == *version, "not {version}");
    }
    let before = configuration(&mut client)?;
    controlplane.stop(Signal::SIGTERM, LIMIT)?;

    // As if a later version had been here.
    let file = rig.dir.join("state/state");
    let own = fs::read_to_string(&file)?;
    let newer = own.replacen("ferry-state 1 ", "ferry-state 2 ", 1);
    ensure!(newer != own, "not a file of the first form: {own}");
    fs::write(&file, &newer)?;
    let mut refusing = rig.controlplane("state")?;
    let status = refusing.wait(LIMIT)?;
    ensure!(!status.success(), "a newer state was accepted");
    let said = refusing.output();
    for part in ["has form 2", "another version", "move it away"] {
        ensure!(said.contains(part), "{part} is not in: {said}");
    }
    ensure!(fs::read_to_string(&file)? == newer, "the file was changed");
    fs::write(&file, &own)?;
    let _controlplane = rig.controlplane("state")?;
    let after = configuration(&mut rig.connect()?)?;
    ensure!(before == after, "{after:?} in the place of {before:?}");
    reading.end().map(drop)
}
