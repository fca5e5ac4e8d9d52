//! The data plane is killed, again and again, under a mount in use: nobody there sees more than a pause.

use anyhow::{Context, Result, bail, ensure};
use ferry_tests::{HostMount, Numbers, Service, binary, can_mount, need, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::sys::statvfs::statvfs;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::times;

/// How often the data plane is killed in each test, unless `FERRY_KILLS` says otherwise.
const KILLS: usize = 20;
/// How often it is handed over or stopped in each test, unless `FERRY_KILLS` says otherwise.
const HANDOVERS: usize = 10;
/// The directory with the files that are opened, and their number.
const NAMES: &str = "names";
const FILES: usize = 40;
const LIMIT: Duration = Duration::from_secs(60);

/// Something that goes on on the mount until it is told to stop.
struct Load {
    threads: Vec<(&'static str, JoinHandle<Result<()>>)>,
    stop: Arc<AtomicBool>,
    /// Requests of the probe that have been answered.
    answered: Arc<AtomicU64>,
    /// The longest time that one of them took since this was last looked at.
    longest: Arc<Mutex<Duration>>,
}

impl Load {
    fn start(mount: &Path) -> Result<Load> {
        prepare(mount)?;
        let mut load = Load {
            threads: Vec::new(),
            stop: Arc::default(),
            answered: Arc::default(),
            longest: Arc::default(),
        };
        load.run("probe", mount, {
            let (answered, longest) = (Arc::clone(&load.answered), Arc::clone(&load.longest));
            move |dir, stop| probe(&dir, &stop, &answered, &longest)
        });
        let files = (new_file(mount, "written")?, new_file(mount, "hidden")?);
        files.1.write_all_at(b"held open", 0)?;
        fs::remove_file(mount.join("hidden"))?;
        load.run("writer", mount, |_, stop| writer(files, &stop));
        load.run("opener", mount, |dir, stop| opener(&dir, &stop));
        Ok(load)
    }

    fn run(
        &mut self,
        name: &'static str,
        mount: &Path,
        what: impl FnOnce(PathBuf, Arc<AtomicBool>) -> Result<()> + Send + 'static,
    ) {
        let (mount, stop) = (mount.to_owned(), Arc::clone(&self.stop));
        let thread = std::thread::spawn(move || {
            let ended = what(mount, Arc::clone(&stop));
            if ended.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            ended
        });
        self.threads.push((name, thread));
    }

    /// Waits for `more` answers, which is how the test knows that the service goes on.
    fn await_answers(&self, more: u64) -> Result<()> {
        let before = self.answered.load(Ordering::Relaxed);
        wait_until("requests are answered", LIMIT, || {
            let now = self.answered.load(Ordering::Relaxed);
            Ok(now >= before + more || self.stop.load(Ordering::Relaxed))
        })
    }

    fn failed(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for (name, thread) in self.threads {
            match thread.join() {
                Ok(ended) => ended.with_context(|| format!("the {name} has failed"))?,
                Err(_) => bail!("the {name} has panicked"),
            }
        }
        Ok(())
    }
}

/// What the load finds on the mount.
fn prepare(mount: &Path) -> Result<()> {
    let dir = mount.join(NAMES);
    fs::create_dir(&dir)?;
    for n in 0..FILES {
        File::create(dir.join(format!("n{n}")))?;
    }
    Ok(())
}

/// Asks for something that no cache answers.
fn probe(
    dir: &Path,
    stop: &AtomicBool,
    answered: &AtomicU64,
    longest: &Mutex<Duration>,
) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        statvfs(dir).context("statvfs")?;
        let took = began.elapsed();
        if let Ok(mut longest) = longest.lock() {
            *longest = took.max(*longest);
        }
        answered.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

fn new_file(mount: &Path, name: &str) -> Result<File> {
    let mut how = OpenOptions::new();
    how.create_new(true).read(true).write(true);
    how.open(mount.join(name))
        .with_context(|| format!("create {name}"))
}

/// Appends, flushes, and reads everything back, also through a file without a name.
fn writer((mut log, nameless): (File, File), stop: &AtomicBool) -> Result<()> {
    let mut numbers = Numbers(0x77);
    let mut expected = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let line = format!("{:08x}\n", numbers.below(1 << 30));
        log.seek(SeekFrom::End(0)).context("seek")?;
        log.write_all(line.as_bytes()).context("append")?;
        expected.extend_from_slice(line.as_bytes());
        log.sync_all().context("fsync")?;
        let mut found = Vec::new();
        log.seek(SeekFrom::Start(0))?;
        log.read_to_end(&mut found).context("read back")?;
        ensure!(
            found == expected,
            "{} bytes where {} were appended",
            found.len(),
            expected.len()
        );
        let mut held = [0; 9];
        nameless
            .read_exact_at(&mut held, 0)
            .context("read a file without a name")?;
        ensure!(&held == b"held open", "another content: {held:?}");
        if expected.len() > 32 * 1024 {
            log.set_len(0).context("truncate")?;
            expected.clear();
        }
    }
    Ok(())
}

/// Opens files that no cache remembers, changes what is in them, and lists their directory.
fn opener(dir: &Path, stop: &AtomicBool) -> Result<()> {
    let dir = dir.join(NAMES);
    let mut numbers = Numbers(0x1234);
    let mut lengths = [0; FILES];
    while !stop.load(Ordering::Relaxed) {
        let n = numbers.below(FILES);
        let path = dir.join(format!("n{n}"));
        let length = numbers.below(9000);
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.with_context(|| format!("open n{n}"))?;
        let found = file.metadata().context("stat")?.len();
        let expected = lengths[n];
        ensure!(
            found == expected,
            "n{n} has {found} bytes where it was given {expected}"
        );
        lengths[n] = length as u64;
        file.set_len(lengths[n]).context("truncate")?;
        drop(file);
        let mut listed = BTreeSet::new();
        for entry in fs::read_dir(&dir).context("list")? {
            let name = entry.context("list")?.file_name();
            ensure!(listed.insert(name.clone()), "{name:?} is listed twice");
        }
        ensure!(
            listed.len() == FILES,
            "{} names of {FILES} are listed",
            listed.len()
        );
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Over {
    VfioUser,
    VhostUser,
}

struct Rig {
    service: Service,
    mount: HostMount,
}

impl Rig {
    fn start(over: Over) -> Result<Rig> {
        let (service, _) = Service::start_exporting("")?;
        let socket = match over {
            Over::VfioUser => service.start_doca_device("vfsdev0", "docatag", "aio0")?,
            Over::VhostUser => service.start_vhost_user_device("vfsdev0", "docatag", "aio0")?,
        };
        let mount = service.mount(&socket)?;
        Ok(Rig { service, mount })
    }

    /// Runs `disturb` under load, again and again, and says how long the mount stood still, from the shortest to the longest.
    fn disturb(
        &self,
        times: usize,
        mut disturb: impl FnMut(&mut Numbers) -> Result<()>,
    ) -> Result<Vec<Duration>> {
        let load = Load::start(self.mount.path())?;
        let mut numbers = Numbers(0xfe44);
        let mut pauses = Vec::new();
        for _ in 0..times {
            load.await_answers(1 + numbers.below(4000) as u64)?;
            if load.failed() {
                break;
            }
            let _ = load
                .longest
                .lock()
                .map(|mut longest| *longest = Duration::ZERO);
            disturb(&mut numbers)?;
            // Two, for the first may have been answered before.
            load.await_answers(2)?;
            pauses.extend(load.longest.lock().map(|longest| *longest));
        }
        load.end().with_context(|| self.service.log())?;
        pauses.sort_unstable();
        Ok(pauses)
    }
}

fn report(what: &str, pauses: &[Duration]) {
    let at = |n: usize| pauses.get(n).map_or(0, Duration::as_millis);
    let (median, last) = (at(pauses.len() / 2), at(pauses.len().saturating_sub(1)));
    println!(
        "{what}: {} times, paused for {median} ms (median), {last} ms at most",
        pauses.len()
    );
}

fn survives_kills(over: Over, what: &str) -> Result<()> {
    let rig = Rig::start(over)?;
    let mut pid = rig.service.next_child("ferry-dataplane", None)?;
    let pauses = rig.disturb(times(KILLS)?, |numbers| {
        kill(pid, Signal::SIGKILL)?;
        pid = rig.service.next_child("ferry-dataplane", Some(pid))?;
        if numbers.below(4) == 0 {
            // While it takes over.
            (0..numbers.below(2_000_000)).for_each(|_| core::hint::spin_loop());
            kill(pid, Signal::SIGKILL)?;
            pid = rig.service.next_child("ferry-dataplane", Some(pid))?;
        }
        Ok(())
    })?;
    report(what, &pauses);
    rig.mount.unmount()
}

#[test]
fn a_mount_over_vhost_user_survives_kills_of_the_data_plane() {
    need!(can_mount());
    survives_kills(Over::VhostUser, "vhost-user").unwrap_or_else(|error| panic!("{error:#}"));
}

#[test]
fn a_mount_over_vfio_user_survives_kills_of_the_data_plane() {
    need!(can_mount());
    survives_kills(Over::VfioUser, "vfio-user").unwrap_or_else(|error| panic!("{error:#}"));
}

#[test]
fn a_mount_survives_kills_of_both_processes_together() {
    need!(can_mount());
    let run = || -> Result<()> {
        let rig = Rig::start(Over::VhostUser)?;
        let mut pids = ["ferry-dataplane", "ferry-controlplane"].map(|name| (name, None));
        let pauses = rig.disturb(times(KILLS)?, |_| {
            for (name, former) in &mut pids {
                *former = Some(rig.service.next_child(name, *former)?);
            }
            for (_, pid) in &pids {
                kill(pid.context("no process")?, Signal::SIGKILL)?;
            }
            Ok(())
        })?;
        report("both", &pauses);
        rig.mount.unmount()
    };
    run().unwrap_or_else(|error| panic!("{error:#}"));
}

/// Asks the running `ferry up` for an upgrade; gives what it says, and whether it was done.
fn upgrade(service: &Service, to: &Path) -> Result<(bool, String)> {
    let mut command = Command::new(binary("ferry")?);
    command.args(["up", "--run-dir"]).arg(service.run_dir());
    let output = command.arg("--upgrade").arg(to).output()?;
    let said = [output.stdout, output.stderr].concat();
    Ok((
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    ))
}

#[test]
fn a_mount_survives_upgrades_and_refused_ones_change_nothing() {
    need!(can_mount());
    let run = || -> Result<()> {
        let rig = Rig::start(Over::VfioUser)?;
        let mut pid = rig.service.next_child("ferry-dataplane", None)?;
        // Two builds that are the same but for their place.
        let builds = ["one", "other"].map(|name| rig.service.dir().make_dir(name));
        for build in &builds {
            fs::copy(binary("ferry-dataplane")?, build.join("ferry-dataplane"))?;
        }
        let older = rig.service.dir().join("older");
        fs::write(
            &older,
            "#!/bin/sh\necho this version is too old >&2\nexit 1\n",
        )?;
        fs::set_permissions(&older, fs::Permissions::from_mode(0o755))?;
        let mut turn = 0;
        let pauses = rig.disturb(times(HANDOVERS)?, |_| {
            let (done, said) = upgrade(&rig.service, &older)?;
            ensure!(!done && said.contains("this version is too old"), "{said}");
            ensure!(
                rig.service.next_child("ferry-dataplane", None)? == pid,
                "it was replaced"
            );
            turn = 1 - turn;
            let (done, said) = upgrade(&rig.service, &builds[turn])?;
            ensure!(done && said.contains("paused for"), "{said}");
            pid = rig.service.next_child("ferry-dataplane", Some(pid))?;
            Ok(())
        })?;
        report("upgrades", &pauses);
        rig.mount.unmount()
    };
    run().unwrap_or_else(|error| panic!("{error:#}"));
}

/// Sends a request from here: a new process would, before it becomes another program, close files on a mount that stands
/// still.
fn ask(service: &Service, method: &str, params: &Value) -> Result<()> {
    let request = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
    let mut link = UnixStream::connect(service.rpc_socket())?;
    link.write_all(request.to_string().as_bytes())?;
    let mut answer = String::new();
    BufReader::new(link).read_line(&mut answer)?;
    let answer: Value = serde_json::from_str(&answer)?;
    ensure!(answer["result"] == true, "{method}: {answer}");
    Ok(())
}

fn survives_stops(over: Over, what: &str) -> Result<()> {
    let rig = Rig::start(over)?;
    let pauses = rig.disturb(times(HANDOVERS)?, |_| {
        for method in ["virtio_fs_device_stop", "virtio_fs_device_start"] {
            ask(&rig.service, method, &json!({"dev_name": "vfsdev0"}))?;
        }
        Ok(())
    })?;
    report(what, &pauses);
    rig.mount.unmount()
}

#[test]
fn a_mount_survives_stops_and_starts_of_its_device() {
    need!(can_mount());
    for (over, what) in [
        (Over::VhostUser, "stops, vhost-user"),
        (Over::VfioUser, "stops, vfio-user"),
    ] {
        survives_stops(over, what).unwrap_or_else(|error| panic!("{what}: {error:#}"));
    }
}
