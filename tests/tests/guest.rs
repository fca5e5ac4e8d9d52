//! A Linux guest with its own, unmodified virtio-fs driver mounts what the two processes serve, over every transport.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Device, Guest, Kernel, Outcome, Service, need};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const TAG: &str = "checked";
const LIMIT: Duration = Duration::from_secs(1500);
const LEAST_CHECKS: u32 = 60;

fn start_doca_device(service: &Service) -> Result<Device> {
    Ok(Device::VfioUser(
        service.start_doca_device("vfsdev0", TAG, "aio0")?,
    ))
}

fn start_vhost_user_device(service: &Service) -> Result<Device> {
    let socket = service.start_vhost_user_device("vfsdev0", TAG, "aio0")?;
    Ok(Device::VhostUser {
        socket,
        tag: TAG.to_owned(),
    })
}

fn sha256(path: &Path) -> Result<String> {
    let output = Command::new("sha256sum")
        .arg(path)
        .output()
        .context("run sha256sum")?;
    ensure!(
        output.status.success(),
        "sha256sum {} failed",
        path.display()
    );
    Ok(String::from_utf8_lossy(&output.stdout)
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned())
}

/// What the guest left, seen from the host's side.
fn check_export(export: &Path) -> Result<()> {
    let kept = export.join("kept");
    let noted = fs::read_to_string(kept.join("big.sha256"))?;
    ensure!(
        sha256(&kept.join("big"))? == noted.trim(),
        "the host sees other bytes in the 64 MiB file than the guest wrote"
    );
    ensure!(
        fs::metadata(kept.join("big"))?.len() == 64 << 20,
        "the 64 MiB file has another size on the host"
    );
    let owned = fs::metadata(kept.join("owned"))?;
    ensure!(
        (owned.uid(), owned.gid()) == (1234, 4321),
        "the owner on the host is {}:{}",
        owned.uid(),
        owned.gid()
    );
    ensure!(
        owned.permissions().mode() & 0o7777 == 0o2640,
        "the mode on the host is {:o}",
        owned.mode()
    );
    let linked = fs::metadata(kept.join("linked"))?;
    ensure!(
        linked.nlink() == 3,
        "the link count on the host is {}",
        linked.nlink()
    );
    ensure!(
        linked.ino() == fs::metadata(kept.join("linked-3"))?.ino(),
        "the links are different files on the host"
    );
    ensure!(
        fs::read_link(kept.join("link"))? == Path::new("big"),
        "the symbolic link changed"
    );
    ensure!(
        fs::symlink_metadata(kept.join("fifo"))?
            .file_type()
            .is_fifo(),
        "the FIFO is none on the host"
    );
    ensure!(
        fs::metadata(kept.join("dated"))?.mtime() == 981_173_106,
        "the time changed on the host"
    );
    Ok(())
}

fn verdict(service: &Service, export: &Path, outcome: &Outcome) -> Result<()> {
    let counts = outcome.counts().with_context(|| {
        format!(
            "{}\n{}\nservice:\n{}",
            outcome.output,
            outcome.dmesg,
            service.log()
        )
    });
    let (passed, failed) = counts?;
    println!("{}", outcome.output);
    let log = service.log();
    ensure!(
        failed == 0 && outcome.status == 0,
        "{failed} checks failed in the guest\n{}\nservice:\n{log}",
        outcome.output
    );
    ensure!(
        passed >= LEAST_CHECKS,
        "only {passed} checks ran in the guest"
    );
    for bad in [
        "BUG:",
        "WARNING:",
        "Oops",
        "hung_task",
        "response too short",
    ] {
        ensure!(
            !outcome.dmesg.contains(bad),
            "the guest's kernel complains:\n{}",
            outcome.dmesg
        );
    }
    check_export(export)
}

fn check(guest: Guest, start_device: fn(&Service) -> Result<Device>) -> Result<()> {
    let (mut service, export) = Service::start_exporting("--enable-xattr")?;
    let device = start_device(&service)?;
    let outcome = guest
        .device(device)
        .run_checks(TAG, LIMIT)
        .with_context(|| format!("service:\n{}", service.log()))?;
    verdict(&service, &export, &outcome)?;
    service.call("virtio_fs_device_stop --dev-name vfsdev0")?;
    service.call("virtio_fs_device_destroy --dev-name vfsdev0")?;
    service.stop()
}

#[test]
fn linux_7_2_passes_every_check_over_vfio_user() {
    let guest = need!(Guest::qemu(Kernel::Forky));
    need!(ferry_tests::binary("ferry"));
    check(guest, start_doca_device).unwrap();
}

#[test]
fn linux_6_1_passes_every_check_over_vfio_user() {
    let guest = need!(Guest::qemu(Kernel::Bookworm));
    need!(ferry_tests::binary("ferry"));
    check(guest, start_doca_device).unwrap();
}

#[test]
fn user_mode_linux_passes_every_check_over_vhost_user() {
    let guest = need!(Guest::user_mode());
    need!(ferry_tests::binary("ferry"));
    check(guest, start_vhost_user_device).unwrap();
}

#[test]
fn linux_7_2_passes_every_check_over_vhost_user() {
    let guest = need!(Guest::qemu(Kernel::Forky));
    need!(ferry_tests::binary("ferry"));
    check(guest, start_vhost_user_device).unwrap();
}
