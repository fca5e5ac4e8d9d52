//! What an operator changes of a running service and sees of it: queues moved between cores under load, the dynamic
//! scheduler, pools, traces, claims on CPUs, context switches, and fsdevs that hand on.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::{Service, ServiceConfig, binary, can_mount, need, two_cpus, wait_until};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;

/// A service on two CPUs, with an fsdev on a fresh directory.
fn service(args: &[&str]) -> Result<(Service, [u32; 2])> {
    let cpus = two_cpus()?;
    let mut all = vec![format!("--cpumask=[{},{}]", cpus[0], cpus[1])];
    all.extend(args.iter().map(|arg| (*arg).to_owned()));
    let service = Service::start_with(&ServiceConfig {
        args: all,
        ..ServiceConfig::default()
    })?;
    let export = service.dir().make_dir("export");
    service.call(&format!("fsdev_aio_create aio0 {}", export.display()))?;
    Ok((service, cpus))
}

/// The queues that run, by the numbers of their threads, and the CPU of each.
fn queues(service: &Service) -> Result<Vec<(u64, u32)>> {
    let queues = service.queues()?.into_iter();
    Ok(queues.map(|queue| (queue.thread, queue.cpu)).collect())
}

/// Writes and reads a file of its own until told to stop; every block must come back as it was written.
fn verify(path: &Path, stop: &AtomicBool, done: &AtomicU64) -> Result<()> {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    let mut round = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let at = round % 64 * BLOCK as u64;
        let block = [(round % 251) as u8; BLOCK];
        file.write_all_at(&block, at).context("write")?;
        file.sync_data().context("sync")?;
        let mut back = [0; BLOCK];
        file.read_exact_at(&mut back, at).context("read")?;
        ensure!(back == block, "block {round} has come back otherwise");
        ensure!(
            fs::metadata(path).context("stat")?.len() > at,
            "the file is too short"
        );
        done.fetch_add(1, Ordering::Relaxed);
        round += 1;
    }
    Ok(())
}

fn move_under_load(start_device: fn(&Service) -> Result<PathBuf>) -> Result<()> {
    let (mut service, cpus) = service(&[])?;
    let socket = start_device(&service)?;
    let mount = service.mount(&socket)?;
    let (stop, done) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let workers: Vec<_> = (0..3)
        .map(|number| {
            let path = mount.path().join(format!("file{number}"));
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            std::thread::spawn(move || verify(&path, &stop, &done))
        })
        .collect();
    let moves = || -> Result<()> {
        for round in 0..12 {
            let cpu = cpus[round % 2];
            for (thread, _) in queues(&service)? {
                service.call(&format!("thread_set_cpumask -i {thread} -m [{cpu}]"))?;
            }
            let placed = queues(&service)?;
            ensure!(!placed.is_empty(), "no queue runs");
            let elsewhere = placed.iter().find(|(_, on)| *on != cpu);
            ensure!(elsewhere.is_none(), "{elsewhere:?} is not on CPU {cpu}");
            // The load goes on on the other core.
            let before = done.load(Ordering::Relaxed);
            wait_until("I/O goes on", LIMIT, || {
                let stuck = workers.iter().any(|worker| worker.is_finished());
                ensure!(!stuck, "a worker has ended");
                Ok(done.load(Ordering::Relaxed) > before + 10)
            })?;
        }
        Ok(())
    };
    let moved = moves();
    stop.store(true, Ordering::Relaxed);
    for worker in workers {
        worker
            .join()
            .map_err(|_| anyhow::anyhow!("a worker has panicked"))??;
    }
    moved.with_context(|| service.log())?;
    mount.unmount()?;
    service.stop()
}

/// A mount, and two CPUs to move its queues between.
fn can_move() -> Result<()> {
    can_mount()?;
    two_cpus().map(drop)
}

#[test]
fn queues_of_a_doca_function_move_between_cores_under_load() {
    need!(can_move());
    move_under_load(|service| service.start_doca_device("vfsdev0", "moved", "aio0")).unwrap();
}

#[test]
fn queues_of_a_vhost_user_device_move_between_cores_under_load() {
    need!(can_move());
    move_under_load(|service| service.start_vhost_user_device("vfsdev0", "moved", "aio0")).unwrap();
}

#[test]
fn a_thread_that_cannot_move_is_refused_and_stays() {
    need!(can_move());
    let check = || -> Result<()> {
        let (mut service, cpus) = service(&[])?;
        let socket = service.start_vhost_user_device("vfsdev0", "stays", "aio0")?;
        let mount = service.mount(&socket)?;
        let before = queues(&service)?;
        let thread = before[0].0;
        for (line, code, says) in [
            (
                format!("thread_set_cpumask -i 4000 -m [{}]", cpus[0]),
                "-32602",
                "Thread 4000",
            ),
            (
                format!("thread_set_cpumask -i {thread} -m zz"),
                "-32603",
                "Invalid cpumask zz",
            ),
            (
                format!("thread_set_cpumask -i {thread} -m [1000]"),
                "-32603",
                "No CPU is selected",
            ),
            (
                format!("thread_set_cpumask -i 1 -m [{}]", cpus[1]),
                "-32603",
                "stays there",
            ),
        ] {
            let reply = service.rpc(&line)?;
            let text = format!("{}{}", reply.out, reply.err);
            ensure!(
                !reply.ok && text.contains(code) && text.contains(says),
                "{line}: {text}"
            );
        }
        ensure!(
            queues(&service)? == before,
            "a refused move has moved something"
        );
        service.call(&format!("thread_set_cpumask -i 1 -m [{}]", cpus[0]))?;
        mount.unmount()?;
        service.stop()
    };
    check().unwrap();
}

/// A process that is killed with the value.
struct Load(Child);

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_dynamic_scheduler_moves_queues_from_a_busy_core_to_an_idle_one() {
    need!(two_cpus());
    let check = || -> Result<()> {
        let (mut service, cpus) = service(&[])?;
        service.call("virtio_fs_transport_create -t VHOST_USER")?;
        service.call("virtio_fs_transport_start -t VHOST_USER")?;
        service.call(
            "virtio_fs_device_create --transport-name VHOST_USER --dev-name vfsdev0 --tag load --fsdev aio0 \
             --num-request-queues 4 --queue-size 128",
        )?;
        service.call("virtio_fs_device_start --dev-name vfsdev0")?;
        let socket = service.run_dir().join("vhost/vfsdev0.sock");
        let mut load = Command::new(binary("ferry")?)
            .arg("bench")
            .arg(&socket)
            .args([
                "--work",
                "randread:4k:8:4",
                "--files",
                "4",
                "--file-size",
                "64k",
            ])
            .args(["--seconds", "60"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map(Load)?;
        wait_until("all queues run", LIMIT, || Ok(queues(&service)?.len() >= 5))?;
        let cpus_of = |service: &Service| -> Result<BTreeSet<u32>> {
            Ok(queues(service)?.into_iter().map(|(_, cpu)| cpu).collect())
        };
        let (first, both) = (cpus[0], format!("[{},{}]", cpus[0], cpus[1]));
        for mask in [format!("[{first}]"), both] {
            for (thread, _) in queues(&service)? {
                service.call(&format!("thread_set_cpumask -i {thread} -m {mask}"))?;
            }
        }
        ensure!(
            cpus_of(&service)? == BTreeSet::from([first]),
            "they are not together"
        );
        let scheduler = service.call("framework_get_scheduler")?;
        ensure!(scheduler["scheduler_name"] == "static", "{scheduler}");
        // Low limits, since this machine does other things too.
        service.call("framework_set_scheduler dynamic -p 50000 --load-limit 1 --core-limit 5")?;
        wait_until("queues are on both cores", LIMIT, || {
            ensure!(load.0.try_wait()?.is_none(), "the load has ended");
            Ok(cpus_of(&service)?.len() == 2)
        })?;
        let scheduler = service.call("framework_get_scheduler")?;
        ensure!(scheduler["scheduler_name"] == "dynamic", "{scheduler}");
        ensure!(scheduler["scheduler_period"] == 50_000, "{scheduler}");
        drop(load);
        service.stop()
    };
    check().unwrap();
}

/// Changes where queues are served, and what is traced.
fn disturb(service: &Service, cpus: [u32; 2], round: usize) -> Result<()> {
    let mask = match round % 3 {
        2 => format!("[{},{}]", cpus[0], cpus[1]),
        one => format!("[{}]", cpus[one]),
    };
    for (thread, _) in queues(service)? {
        // It may have ended since.
        service.rpc(&format!("thread_set_cpumask -i {thread} -m {mask}"))?;
    }
    service.call(match round % 3 {
        2 => "framework_set_scheduler dynamic -p 20000 --load-limit 1 --core-limit 5",
        _ => "framework_set_scheduler static",
    })?;
    service.call(match round % 2 {
        0 => "trace_enable_tpoint_group all",
        _ => "trace_disable_tpoint_group all",
    })?;
    Ok(())
}

/// The load's driver fails when a request is answered twice, wrongly or not at all.
#[test]
fn every_request_is_answered_once_while_queues_are_moved_scheduled_and_traced() {
    need!(two_cpus());
    let check = || -> Result<()> {
        let (mut service, cpus) = service(&[])?;
        let socket = service.start_doca_device("vfsdev0", "moved", "aio0")?;
        let log = service.dir().join("load.log");
        let output = fs::File::create(&log)?;
        let mut load = Command::new(binary("ferry")?)
            .arg("bench")
            .arg(&socket)
            .args(["--work", "mixed:4k:8:4,open:4k:8:4,create:4k:4:2"])
            .args(["--files", "4", "--file-size", "64k", "--entries", "0"])
            .args(["--seconds", "1.5"])
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .map(Load)?;
        let mut rounds = 0;
        let status = loop {
            if let Some(status) = load.0.try_wait()? {
                break status;
            }
            disturb(&service, cpus, rounds)?;
            rounds += 1;
        };
        let said = fs::read_to_string(&log)?;
        ensure!(status.success(), "{said}");
        ensure!(said.lines().count() == 3, "{said}");
        ensure!(rounds > 0, "the load had ended before anything was moved");
        service.stop()
    };
    check().unwrap();
}

#[test]
fn pools_are_sized_before_the_start_and_shown() {
    let check = || -> Result<()> {
        let mut service = Service::start_with(&ServiceConfig {
            args: vec!["--wait-for-rpc".to_owned()],
            ..ServiceConfig::default()
        })?;
        service.call("iobuf_set_options --small-pool-count 512 --large-pool-count 16")?;
        let refused = service.rpc("iobuf_set_options --large-pool-count 400000000")?;
        let text = format!("{}{}", refused.out, refused.err);
        ensure!(
            !refused.ok && text.contains("-12") && text.contains("MiB"),
            "{text}"
        );
        service.call("framework_start_init")?;
        let stats = service.call("iobuf_get_stats")?;
        ensure!(stats[0]["small_pool"]["cache_size"] == 512, "{stats}");
        ensure!(stats[0]["large_pool"]["cache_size"] == 16, "{stats}");
        let late = service.rpc("iobuf_set_options --small-pool-count 1024")?;
        ensure!(
            !late.ok && format!("{}{}", late.out, late.err).contains("-1"),
            "{late:?}"
        );
        let dump = service.call("env_dpdk_get_mem_stats")?;
        let path = PathBuf::from(dump["filename"].as_str().context("no file name")?);
        let report = fs::read_to_string(&path)?;
        fs::remove_file(&path)?;
        for line in [
            "Request slots: 512 of 8192 bytes",
            "Data buffers: 16 of 261120 bytes",
            "0 in use, 512 free",
        ] {
            ensure!(report.contains(line), "{line} is missing in: {report}");
        }
        let saved = service.call("framework_get_config iobuf")?;
        ensure!(saved[0]["params"]["small_pool_count"] == 512, "{saved}");
        service.stop()
    };
    check().unwrap();
}

/// What `ferry trace` prints.
fn traced(file: &str) -> Result<String> {
    let output = Command::new(binary("ferry")?)
        .args(["trace", file])
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn trace_points_that_are_on_are_written_and_others_are_not() {
    need!(can_move());
    let check = || -> Result<()> {
        let (mut service, _) = service(&[])?;
        let socket = service.start_doca_device("vfsdev0", "traced", "aio0")?;
        let mount = service.mount(&socket)?;
        let info = service.call("trace_get_info")?;
        let file = info["tpoint_shm_path"]
            .as_str()
            .context("no file")?
            .to_owned();
        fs::write(mount.path().join("untraced"), "x")?;
        ensure!(
            traced(&file)?.is_empty(),
            "something is traced while all is off"
        );
        service.call("trace_enable_tpoint_group fuse")?;
        service.call("trace_set_tpoint_mask virtio 0x3")?;
        fs::write(mount.path().join("traced"), "x")?;
        service.call("trace_disable_tpoint_group all")?;
        let text = traced(&file)?;
        for point in [
            "FUSE_REQUEST_START",
            "FUSE_REQUEST_DONE",
            "VIRTIO_REQUEST_TAKEN",
            "VIRTIO_REQUEST_RETURNED",
        ] {
            ensure!(text.contains(point), "{point} is missing in: {text}");
        }
        for point in ["REACTOR_", "FSDEV_", "VIRTIO_INTERRUPT"] {
            ensure!(!text.contains(point), "{point} is off: {text}");
        }
        // Opcode 16 is WRITE, 35 is CREATE.
        for what in ["opcode 16", "opcode 35"] {
            ensure!(text.contains(what), "{what} is missing in: {text}");
        }
        fs::write(mount.path().join("untraced"), "y")?;
        ensure!(
            traced(&file)? == text,
            "something is traced after all is off"
        );
        mount.unmount()?;
        service.stop()
    };
    check().unwrap();
}

#[test]
fn services_that_claim_the_same_cpu_exclude_each_other() {
    let check = || -> Result<()> {
        let locks = ferry_tests::TempDir::new();
        let dir = format!("--cpumask-locks-dir={}", locks.path().display());
        let start = |mode: &str| {
            Service::start_with(&ServiceConfig {
                args: vec![dir.clone(), format!("--cpumask-locks={mode}")],
                ..ServiceConfig::default()
            })
        };
        let files = || -> Result<usize> { Ok(fs::read_dir(locks.path())?.count()) };
        let mut first = start("on")?;
        ensure!(files()? == 1, "there is no lock file");
        let refused = start("on").err().context("a second claim was granted")?;
        let text = format!("{refused:?}");
        ensure!(text.contains("Failed to claim CPU core: "), "{text}");
        let mut second = start("off")?;
        let refused = second.rpc("framework_enable_cpumask_locks")?;
        let text = format!("{}{}", refused.out, refused.err);
        ensure!(!refused.ok && text.contains("-32603"), "{text}");
        ensure!(text.contains("Failed to claim CPU core: "), "{text}");
        first.call("framework_disable_cpumask_locks")?;
        ensure!(files()? == 0, "the lock file is still there");
        second.call("framework_enable_cpumask_locks")?;
        ensure!(
            !first.rpc("framework_enable_cpumask_locks")?.ok,
            "both have claimed it"
        );
        second.stop()?;
        first.call("framework_enable_cpumask_locks")?;
        first.stop()?;
        ensure!(files()? == 0, "a lock file has outlived its service");
        Ok(())
    };
    check().unwrap();
}

#[test]
fn context_switches_and_pci_functions_are_shown() {
    let check = || -> Result<()> {
        let mut service = Service::start()?;
        let export = service.dir().make_dir("export");
        service.call(&format!("fsdev_aio_create aio0 {}", export.display()))?;
        let none = service.call("framework_get_pci_devices")?;
        ensure!(none.as_array().is_some_and(Vec::is_empty), "{none}");
        service.start_doca_device("vfsdev0", "shown", "aio0")?;
        let devices = service.call("framework_get_pci_devices")?;
        let config = devices[0]["config_space"]
            .as_str()
            .context("no configuration space")?;
        // Vendor 1af4, device 1040 + 26, low byte first.
        ensure!(
            config.len() == 512 && config.starts_with("f41a5a10"),
            "{devices}"
        );
        let (vuid, _) = service.first_function()?;
        ensure!(devices[0]["vuid"] == vuid.as_str(), "{devices}");
        let state = service.call("framework_monitor_context_switch")?;
        ensure!(state["enabled"] == false, "{state}");
        let reactors = service.call("framework_get_reactors")?;
        ensure!(
            reactors["reactors"][0].get("context_switches").is_none(),
            "{reactors}"
        );
        let state = service.call("framework_monitor_context_switch --enable")?;
        ensure!(state["enabled"] == true, "{state}");
        wait_until("context switches are counted", LIMIT, || {
            let reactors: Value = service.call("framework_get_reactors")?;
            let counted = &reactors["reactors"][0]["context_switches"]["voluntary"];
            Ok(counted.as_u64().is_some_and(|count| count > 0))
        })?;
        let state = service.call("framework_monitor_context_switch --disable")?;
        ensure!(state["enabled"] == false, "{state}");
        service.stop()
    };
    check().unwrap();
}

#[test]
fn an_fsdev_that_hands_on_serves_what_is_below_it() {
    need!(can_move());
    let check = || -> Result<()> {
        let (mut service, _) = service(&[])?;
        let missing = service.rpc("fsdev_passthru_ext_create nosuch pt0")?;
        ensure!(
            !missing.ok && format!("{}{}", missing.out, missing.err).contains("-19"),
            "{missing:?}"
        );
        service.call("fsdev_passthru_ext_create aio0 pt0")?;
        let busy = service.rpc("fsdev_aio_delete aio0")?;
        ensure!(
            !busy.ok && format!("{}{}", busy.out, busy.err).contains("-16"),
            "{busy:?}"
        );
        let socket = service.start_vhost_user_device("vfsdev0", "handed", "pt0")?;
        let mount = service.mount(&socket)?;
        fs::write(mount.path().join("file"), "through two")?;
        let export = service.dir().join("export/file");
        ensure!(
            fs::read_to_string(export)? == "through two",
            "it has not arrived"
        );
        mount.unmount()?;
        service.stop()
    };
    check().unwrap();
}

#[test]
fn every_device_of_many_is_counted() {
    let check = || -> Result<()> {
        const DEVICES: usize = 140;
        let mut service = Service::start()?;
        let mut script = String::from(
            "fsdev_null_create null0\nvirtio_fs_transport_create -t VHOST_USER\nvirtio_fs_transport_start -t VHOST_USER\n",
        );
        for number in 0..DEVICES {
            script += &format!(
                "virtio_fs_device_create --transport-name VHOST_USER --dev-name d{number} --tag t{number} --fsdev null0 \
                 --num-request-queues 1\nvirtio_fs_device_start --dev-name d{number}\n"
            );
        }
        let reply = service.rpc_script(&script)?;
        ensure!(reply.ok, "{}", reply.err);
        let counters = service.call("ferry_get_counters")?;
        let counted = counters["devices"].as_array().map_or(0, Vec::len);
        ensure!(counted == DEVICES, "{counted} devices are counted");
        service.stop()
    };
    check().unwrap();
}
