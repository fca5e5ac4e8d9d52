//! What the control plane may do, and what happens to who reads and writes while it does nothing or is another one.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Service, binary, can_mount, need, skip, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;

fn mounted() -> Result<(Service, ferry_tests::HostMount)> {
    let service = Service::start()?;
    let export = service.dir().make_dir("export");
    service.call(&format!("fsdev_aio_create aio0 {}", export.display()))?;
    let socket = service.start_vhost_user_device("vfsdev0", "t", "aio0")?;
    let mount = service.mount(&socket)?;
    Ok((service, mount))
}

/// A field of a process's status.
fn status(pid: Pid, field: &str) -> Result<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    Ok(line
        .with_context(|| format!("no {field}"))?
        .trim()
        .to_owned())
}

/// The shared memory that a process has mapped or holds open, by inode.
fn shared_memory(pid: Pid) -> Result<BTreeSet<String>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mapped = maps.lines().filter(|line| line.contains("/memfd:"));
    let mut all: BTreeSet<String> = mapped
        .filter_map(|line| line.split_whitespace().nth(4).map(str::to_owned))
        .collect();
    for fd in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = fd?.path();
        // One may be closed while they are looked at.
        let target = fs::read_link(&path).unwrap_or_default();
        if target.to_string_lossy().starts_with("/memfd:")
            && let Ok(metadata) = fs::metadata(&path)
        {
            all.insert(std::os::unix::fs::MetadataExt::ino(&metadata).to_string());
        }
    }
    Ok(all)
}

fn without_privileges() -> Result<()> {
    let (service, mount) = mounted()?;
    fs::write(mount.path().join("file"), "content")?;
    let controlplane = service.child("ferry-controlplane")?;
    let users = status(controlplane, "Uid:")?;
    ensure!(
        users.split_whitespace().all(|user| user != "0"),
        "it is {users}"
    );
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        let capabilities = status(controlplane, set)?;
        ensure!(
            capabilities.bytes().all(|digit| digit == b'0'),
            "{set} {capabilities}"
        );
    }
    // What the driver shares with the data plane, the guest's memory, does not get any further.
    let dataplane = shared_memory(service.child("ferry-dataplane")?)?;
    let driver = shared_memory(mount.pid()?)?;
    let guest: BTreeSet<_> = dataplane.intersection(&driver).cloned().collect();
    ensure!(
        !guest.is_empty(),
        "no guest memory in {dataplane:?} and {driver:?}"
    );
    let seen = shared_memory(controlplane)?;
    ensure!(!seen.is_empty(), "it has no rings");
    ensure!(
        seen.is_disjoint(&guest),
        "guest memory {guest:?} is in {seen:?}"
    );
    mount.unmount()
}

#[test]
fn the_control_plane_has_no_privilege_and_no_guest_memory() {
    need!(binary("ferry"));
    if !nix::unistd::geteuid().is_root() {
        return skip("without root there is nothing to give up");
    }
    if let Err(error) = without_privileges() {
        panic!("{error:#}");
    }
}

/// CPUs that a process's first thread may use.
fn cpus(pid: Pid) -> Result<Vec<u32>> {
    let list = status(pid, "Cpus_allowed_list:")?;
    let mask: ferry_shared::cpumask::CpuMask =
        format!("[{list}]").parse().map_err(anyhow::Error::msg)?;
    Ok(mask.cpus())
}

fn out_of_the_way() -> Result<()> {
    let (service, mount) = mounted()?;
    let core = 0;
    let rest: Vec<u32> = cpus(Pid::this())?
        .into_iter()
        .filter(|cpu| *cpu != core)
        .collect();
    let (dataplane, controlplane) = (
        service.child("ferry-dataplane")?,
        service.child("ferry-controlplane")?,
    );
    let supervisor = Pid::from_raw(i32::try_from(service.id())?);
    for (who, pid) in [
        ("the supervisor", supervisor),
        ("the control plane", controlplane),
        ("the management thread", dataplane),
    ] {
        ensure!(cpus(pid)? == rest, "{who} may use {:?}", cpus(pid)?);
    }
    let threads = fs::read_dir(format!("/proc/{dataplane}/task"))?;
    let mut cores = 0;
    for thread in threads {
        let thread = Pid::from_raw(thread?.file_name().to_string_lossy().parse()?);
        if status(thread, "Name:")?.starts_with("ferry-core-") {
            ensure!(
                cpus(thread)? == [core],
                "a core may use {:?}",
                cpus(thread)?
            );
            cores += 1;
        }
    }
    ensure!(cores == 1, "{cores} cores");
    mount.unmount()
}

#[test]
fn everything_that_has_to_do_with_control_keeps_off_the_cpus_of_cores() {
    need!(can_mount());
    if cpus(Pid::this()).is_ok_and(|cpus| cpus.len() < 2 || cpus[0] != 0) {
        return skip("there is no CPU beside the core's");
    }
    if let Err(error) = out_of_the_way() {
        panic!("{error:#}");
    }
}

/// Creates, writes, reads and removes files, past the caches of the mount.
fn use_files(dir: &Path, rounds: usize) -> Result<()> {
    for round in 0..rounds {
        let path = dir.join(format!("file{round}"));
        let content = vec![round as u8; BLOCK];
        let mut file = fs::File::create(&path)?;
        file.write_all(&content)?;
        file.sync_all()?;
        ensure!(fs::read(&path)? == content, "round {round}");
        fs::remove_file(&path)?;
    }
    Ok(())
}

fn stopped_and_restarted() -> Result<()> {
    let (service, mount) = mounted()?;
    let mut before = service.call("virtio_fs_get_devices")?;
    wait_until("the control plane knows of the mount", LIMIT, || {
        before = service.call("virtio_fs_get_devices")?;
        Ok(before[0]["mounted"] == true)
    })?;
    let controlplane = service.child("ferry-controlplane")?;
    kill(controlplane, Signal::SIGSTOP)?;
    // A client of it waits, and nobody else does.
    let mut waiting = UnixStream::connect(service.rpc_socket())?;
    waiting.write_all(b"{\"id\": 1, \"method\": \"spdk_get_version\"}")?;
    use_files(mount.path(), 200)?;
    waiting.set_nonblocking(true)?;
    ensure!(waiting.read(&mut [0]).is_err(), "it has answered");
    ensure!(
        status(controlplane, "State:")?.starts_with('T'),
        "it is not stopped"
    );
    kill(controlplane, Signal::SIGCONT)?;
    waiting.set_nonblocking(false)?;
    ensure!(waiting.read(&mut [0])? == 1, "no answer");

    for _ in 0..5 {
        let last = service.child("ferry-controlplane")?;
        kill(last, Signal::SIGKILL)?;
        use_files(mount.path(), 20)?;
        wait_until("the next one runs", LIMIT, || {
            Ok(service
                .child("ferry-controlplane")
                .is_ok_and(|pid| pid != last))
        })?;
    }
    wait_until("the last one has learnt what there is", LIMIT, || {
        let listed = service.rpc("virtio_fs_get_devices")?;
        Ok(listed.ok && listed.json() == before)
    })?;
    use_files(mount.path(), 20)?;
    mount.unmount()
}

#[test]
fn files_are_served_while_the_control_plane_is_stopped_and_restarted_in_a_loop() {
    need!(binary("ferry"));
    if let Err(error) = stopped_and_restarted() {
        panic!("{error:#}");
    }
}
