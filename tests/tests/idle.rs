//! A service with nothing to do leaves the processor alone.

use anyhow::{Context, Result};
use ferry_tests::{Service, binary, need};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{SysconfVar, sysconf};
use std::fs;
use std::time::Duration;

/// A share of one core.
const MOST: f64 = 0.01;
/// This test measures a rate, so it needs a span of time; nothing is waited for.
const WINDOW: Duration = Duration::from_secs(3);

/// The processes of a process group.
fn group_members(group: u32) -> Result<Vec<u32>> {
    let mut members = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(id) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        // a process may end while it is looked at
        let Ok(stat) = fs::read_to_string(format!("/proc/{id}/stat")) else {
            continue;
        };
        let fields = fields_after_name(&stat);
        let (parent, own_group) = (fields.get(1), fields.get(2));
        if [parent, own_group]
            .into_iter()
            .flatten()
            .any(|field| field.parse() == Ok(group))
        {
            members.push(id);
        }
    }
    Ok(members)
}

fn fields_after_name(stat: &str) -> Vec<&str> {
    stat.rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().collect())
        .unwrap_or_default()
}

/// Processor time of a process so far, user and system, in clock ticks.
fn ticks(id: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat"))
        .with_context(|| format!("process {id} has ended"))?;
    let fields = fields_after_name(&stat);
    let field = |index: usize| {
        fields
            .get(index)
            .and_then(|field| field.parse::<u64>().ok())
            .context("cannot read stat")
    };
    Ok(field(11)? + field(12)?)
}

fn now() -> Result<Duration> {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(Duration::new(
        time.tv_sec().try_into()?,
        time.tv_nsec().try_into()?,
    ))
}

fn total_ticks(ids: &[u32]) -> Result<u64> {
    ids.iter().map(|&id| ticks(id)).sum()
}

fn share_of_a_core(ids: &[u32]) -> Result<f64> {
    let (before, start) = (total_ticks(ids)?, now()?);
    while now()? < start + WINDOW {
        std::thread::park_timeout(start + WINDOW - now()?);
    }
    let (after, end) = (total_ticks(ids)?, now()?);
    let per_second = u32::try_from(sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")?)?;
    let used = u32::try_from(after - before)?;
    Ok(f64::from(used) / f64::from(per_second) / (end - start).as_secs_f64())
}

#[test]
fn an_idle_service_uses_less_than_one_percent_of_a_core() {
    need!(binary("ferry"));
    let service = Service::start().unwrap();
    let export = service.dir().make_dir("export");
    service
        .call(&format!("fsdev_aio_create aio0 {}", export.display()))
        .unwrap();
    for transport in ["DOCA", "VHOST_USER"] {
        service
            .call(&format!("virtio_fs_transport_create -t {transport}"))
            .unwrap();
        service
            .call(&format!("virtio_fs_transport_start -t {transport}"))
            .unwrap();
    }
    let (vuid, _) = service.first_function().unwrap();
    service
        .call(
            "virtio_fs_device_create --transport-name DOCA --dev-name pci0 --tag idle --fsdev aio0",
        )
        .unwrap();
    service
        .call(&format!(
            "virtio_fs_doca_device_modify --dev-name pci0 --manager mlx5_0 --vuid {vuid}"
        ))
        .unwrap();
    service.call("virtio_fs_device_create --transport-name VHOST_USER --dev-name vhost0 --tag idle --fsdev aio0").unwrap();
    for device in ["pci0", "vhost0"] {
        service
            .call(&format!("virtio_fs_device_start --dev-name {device}"))
            .unwrap();
    }
    let processes = group_members(service.id()).unwrap();
    assert!(
        processes.len() >= 3,
        "the supervisor and its two processes, found {processes:?}"
    );
    let share = share_of_a_core(&processes).unwrap();
    assert!(
        share < MOST,
        "an idle service uses {:.1} % of a core",
        share * 100.0
    );
}
