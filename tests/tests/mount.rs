//! A function mounted on this host through `ferry mount`: the same checks as in a guest, at full speed, and what happens to
//! requests while the control plane dies.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Service, build_checks, can_mount, need, repository, wait_until};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

fn run_checks(start_device: fn(&Service) -> Result<PathBuf>) -> Result<()> {
    let (mut service, _) = Service::start_exporting("--enable-xattr")?;
    let socket = start_device(&service)?;
    let mount = service.mount(&socket)?;
    let program = build_checks(service.dir().path())?;
    let script = repository().join("tests/guest/check.sh");
    let output = Command::new("sh")
        .arg(script)
        .arg(&program)
        .arg(mount.path())
        .output()
        .context("run check.sh")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "checks failed:\n{text}\nlog of the service:\n{}",
        service.log()
    );
    mount.unmount()?;
    service.stop()
}

#[test]
fn the_host_passes_every_check_on_a_doca_function() {
    need!(can_mount());
    run_checks(|service| service.start_doca_device("vfsdev0", "checked", "aio0")).unwrap();
}

#[test]
fn the_host_passes_every_check_on_a_vhost_user_device() {
    need!(can_mount());
    run_checks(|service| service.start_vhost_user_device("vfsdev0", "checked", "aio0")).unwrap();
}

/// The child of the supervisor that runs this program.
fn child_of(supervisor: u32, program: &str) -> Result<u32> {
    for entry in fs::read_dir("/proc")? {
        let Some(id) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        // a process may end while it is looked at
        let Ok(status) = fs::read_to_string(format!("/proc/{id}/status")) else {
            continue;
        };
        let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        let is_child = status
            .lines()
            .any(|line| line == format!("PPid:\t{supervisor}"));
        if is_child && String::from_utf8_lossy(&line).contains(program) {
            return Ok(id);
        }
    }
    anyhow::bail!("{supervisor} has no child {program}")
}

fn kill(id: u32) -> Result<()> {
    let id = nix::unistd::Pid::from_raw(i32::try_from(id)?);
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGKILL).context("kill")
}

#[test]
fn requests_go_on_while_the_control_plane_is_killed_and_comes_back() {
    need!(can_mount());
    let (service, export) = Service::start_exporting("--enable-xattr").unwrap();
    let socket = service
        .start_doca_device("vfsdev0", "steady", "aio0")
        .unwrap();
    let mount = service.mount(&socket).unwrap();
    let file = fs::File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(mount.path().join("f"))
        .unwrap();
    let before = service.call("virtio_fs_get_devices").unwrap();
    let first = child_of(service.id(), "ferry-controlplane").unwrap();
    kill(first).unwrap();
    let mut rounds = 0_u64;
    wait_until("the control plane answers again", LIMIT, || {
        // every round is a request that must be served, whether there is a control plane or not
        file.write_all_at(&rounds.to_le_bytes(), 0)?;
        fs::write(
            mount.path().join(format!("file-{}", rounds % 16)),
            rounds.to_le_bytes(),
        )?;
        rounds += 1;
        let devices = service.rpc("virtio_fs_get_devices")?;
        Ok(devices.ok
            && devices.json() == before
            && child_of(service.id(), "ferry-controlplane").is_ok_and(|id| id != first))
    })
    .with_context(|| service.log())
    .unwrap();
    drop(file);
    assert_eq!(
        fs::read(export.join("f")).unwrap(),
        (rounds - 1).to_le_bytes()
    );
    mount.unmount().unwrap();
}

#[test]
fn a_device_can_be_stopped_and_started_again_after_an_unmount() {
    need!(can_mount());
    let (service, export) = Service::start_exporting("--enable-xattr").unwrap();
    let socket = service
        .start_doca_device("vfsdev0", "again", "aio0")
        .unwrap();
    for round in 0..3 {
        let mount = service.mount(&socket).unwrap();
        let name = format!("round-{round}");
        fs::write(mount.path().join(&name), &name).unwrap();
        mount.unmount().unwrap();
        assert_eq!(fs::read_to_string(export.join(&name)).unwrap(), name);
        service
            .call("virtio_fs_device_stop --dev-name vfsdev0")
            .unwrap();
        service
            .call("virtio_fs_device_start --dev-name vfsdev0")
            .unwrap();
    }
}
