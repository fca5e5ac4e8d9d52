//! The control plane is killed, again and again, while it is being given work: what it has acknowledged is what the data
//! plane does and what it knows itself after the next start. Who reads from a device meanwhile notices nothing.
//!
//! `FERRY_KILLS=1000` kills it so often.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Numbers, Process, TempDir, binary, need, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How often it is killed, unless `FERRY_KILLS` says otherwise.
const KILLS: usize = 50;
/// Requests between two kills, on the average.
const REQUESTS: usize = 20;
const DEVICES: usize = 4;
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
        let mut command = Command::new(binary("ferry-controlplane")?);
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
    fn connect(&self) -> Result<BufReader<UnixStream>> {
        let mut connected = None;
        wait_until("the control plane answers", LIMIT, || {
            connected = UnixStream::connect(self.socket()).ok();
            Ok(connected.is_some())
        })
        .with_context(|| {
            fs::read_to_string(self.dir.join("controlplane.log")).unwrap_or_default()
        })?;
        Ok(BufReader::new(connected.context("no connection")?))
    }
}

/// Sends a request, does something, and waits for the answer; `None` when the control plane died first.
fn ask_and(
    client: &mut BufReader<UnixStream>,
    method: &str,
    params: &Value,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<Option<Value>> {
    let request = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
    let mut line = String::new();
    let sent = client.get_mut().write_all(request.to_string().as_bytes());
    meanwhile()?;
    match sent.and_then(|()| client.read_line(&mut line)) {
        Ok(_) if !line.ends_with('\n') => Ok(None),
        Ok(_) => Ok(Some(serde_json::from_str(&line)?)),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn ask(client: &mut BufReader<UnixStream>, method: &str, params: &Value) -> Result<Option<Value>> {
    ask_and(client, method, params, || Ok(()))
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
    fn start(rig: &Rig, client: &mut BufReader<UnixStream>) -> Result<Reading> {
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
            let answer = ask(client, method, &params)?.context("no answer")?;
            ensure!(answer.get("result").is_some(), "{method}: {answer}");
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

/// What is known of one device: absent, or its tag and state.
type Known = Option<(String, String)>;

/// What the last request that got no answer may have done besides nothing.
struct Unknown {
    device: String,
    after: Known,
}

/// Chooses what to do with a device, and what it is afterwards.
fn choose(numbers: &mut Numbers, name: &str, known: &Known) -> (&'static str, Value, Known) {
    let state = |tag: &str, state: &str| Some((tag.to_owned(), state.to_owned()));
    match known {
        None => {
            let tag = format!("t{}", numbers.below(1000));
            let params = json!({"transport_name": "VHOST_USER", "dev_name": name, "tag": tag,
                "fsdev": "null0", "num_request_queues": 1});
            ("virtio_fs_device_create", params, state(&tag, "idle"))
        }
        Some((tag, now)) if now == "running" => (
            "virtio_fs_device_stop",
            json!({"dev_name": name}),
            state(tag, "stopped"),
        ),
        Some((tag, now)) => match numbers.below(3) {
            0 => {
                let tag = format!("t{}", numbers.below(1000));
                let params = json!({"dev_name": name, "tag": tag});
                ("virtio_fs_device_modify", params, state(&tag, now))
            }
            1 => ("virtio_fs_device_destroy", json!({"dev_name": name}), None),
            _ => (
                "virtio_fs_device_start",
                json!({"dev_name": name}),
                state(tag, "running"),
            ),
        },
    }
}

/// Sends work that is all answered.
fn work(
    client: &mut BufReader<UnixStream>,
    numbers: &mut Numbers,
    known: &mut BTreeMap<String, Known>,
    requests: usize,
) -> Result<()> {
    for _ in 0..requests {
        let name = format!("d{}", numbers.below(DEVICES));
        let before = known.get(&name).cloned().flatten();
        let (method, params, after) = choose(numbers, &name, &before);
        let answer = ask(client, method, &params)?.context("it has ended")?;
        ensure!(answer["result"] == true, "{method} {params}: {answer}");
        known.insert(name, after);
    }
    Ok(())
}

/// Sends work without an end; the last request is the one without an answer.
fn churn(
    client: &mut BufReader<UnixStream>,
    numbers: &mut Numbers,
    known: &mut BTreeMap<String, Known>,
    patience: usize,
    victim: &Process,
) -> Result<Unknown> {
    let pid = Pid::from_raw(i32::try_from(victim.id())?);
    for count in 0.. {
        let name = format!("d{}", numbers.below(DEVICES));
        let before = known.get(&name).cloned().flatten();
        let (method, params, after) = choose(numbers, &name, &before);
        let spins = numbers.below(200_000);
        let strike = || {
            if count == patience {
                // Some requests have gone a part of their way, some have not begun, and some are done.
                (0..spins).for_each(|_| core::hint::spin_loop());
                kill(pid, Signal::SIGKILL)?;
            }
            Ok(())
        };
        match ask_and(client, method, &params, strike)? {
            None => {
                return Ok(Unknown {
                    device: name,
                    after,
                });
            }
            Some(answer) => {
                ensure!(answer["result"] == true, "{method} {params}: {answer}");
                known.insert(name, after);
            }
        }
    }
    unreachable!("counting does not end")
}

fn devices(client: &mut BufReader<UnixStream>) -> Result<BTreeMap<String, Known>> {
    let answer = ask(client, "virtio_fs_get_devices", &json!({}))?.context("no answer")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let listed = answer["result"].as_array().context("not a list")?;
    let churned = |device: &&Value| device["name"] != "read";
    Ok(listed
        .iter()
        .filter(churned)
        .map(|device| {
            let known = (text(&device["tag"]), text(&device["state"]));
            (text(&device["name"]), Some(known))
        })
        .collect())
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
    let mut numbers = Numbers(0x5eed);
    let mut known: BTreeMap<String, Known> = BTreeMap::new();
    let mut controlplane = rig.controlplane("state")?;
    let mut client = rig.connect()?;
    for (method, params) in [
        ("fsdev_null_create", json!({"name": "null0"})),
        (
            "virtio_fs_transport_create",
            json!({"transport_name": "VHOST_USER"}),
        ),
        (
            "virtio_fs_transport_start",
            json!({"transport_name": "VHOST_USER"}),
        ),
    ] {
        let answer = ask(&mut client, method, &params)?.context("no answer")?;
        ensure!(answer.get("result").is_some(), "{method}: {answer}");
    }
    let kills = match std::env::var("FERRY_KILLS") {
        Ok(kills) => kills.parse()?,
        Err(_) => KILLS,
    };
    let reading = Reading::start(&rig, &mut client)?;
    work(&mut client, &mut numbers, &mut known, kills * REQUESTS)?;
    reading.killing.store(true, Ordering::Relaxed);
    for round in 0..kills {
        let patience = numbers.below(2 * REQUESTS);
        let unknown = churn(
            &mut client,
            &mut numbers,
            &mut known,
            patience,
            &controlplane,
        )?;
        controlplane.wait(LIMIT)?;
        // The next one is paused for a moment before anybody needs it, which is no matter either.
        controlplane = rig.controlplane("state")?;
        client = rig.connect()?;
        let pid = Pid::from_raw(i32::try_from(controlplane.id())?);
        kill(pid, Signal::SIGSTOP)?;
        kill(pid, Signal::SIGCONT)?;

        let now = devices(&mut client)?;
        known.retain(|_, known| known.is_some());
        let seen = now.get(&unknown.device).cloned().flatten();
        // A destruction begins in the data plane, so half of one leaves the device configured and not started.
        let halfway = |(_, state): &(String, String)| unknown.after.is_none() && state == "idle";
        if seen == unknown.after || seen.as_ref().is_some_and(halfway) {
            known.insert(unknown.device.clone(), seen);
            known.retain(|_, known| known.is_some());
        }
        ensure!(
            now == known,
            "round {round}: {now:?} where {known:?} was acknowledged"
        );
    }

    report(&reading.end()?, kills)?;

    // A control plane that knows nothing learns from the data plane the same about every started device.
    drop(client);
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
