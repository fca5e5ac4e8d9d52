//! Functions on all hot-plug ports at once: each comes and goes without the others noticing.

use super::requests::{Choice, Started};
use anyhow::{Context, Result, ensure};
use ferry_tests::{Service, binary, need, wait_until};
use ferry_tools::driver::{Device, Features};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const PORTS: usize = 31;
const LIMIT: Duration = Duration::from_secs(60);
const CHOICE: Choice = Choice {
    features: Features::INDIRECT_DESC.union(Features::EVENT_IDX),
    queues: 2,
    size: 64,
    vectors: None,
};

/// Has a device on a function of its own, which is plugged, and a driver that uses it.
fn plug(service: &Service, n: usize) -> Result<Started> {
    let vuid = service.call("virtio_fs_doca_function_create -m mlx5_0")?;
    let vuid = vuid.as_str().context("no VUID")?.to_owned();
    service.call(&format!(
        "virtio_fs_device_create --transport-name DOCA --dev-name dev{n} --tag tag{n} --fsdev aio0 \
         --num-request-queues 2 --queue-size 64"
    ))?;
    service.call(&format!(
        "virtio_fs_doca_device_modify --dev-name dev{n} --manager mlx5_0 --vuid {vuid}"
    ))?;
    service.call(&format!("virtio_fs_device_start --dev-name dev{n}"))?;
    service.call(&format!("virtio_fs_doca_device_hotplug --dev-name dev{n}"))?;
    let socket = service.run_dir().join("pci").join(format!("{vuid}.sock"));
    Started::new(Device::connect(&socket, None)?, CHOICE)
}

fn state(service: &Service, n: usize) -> Result<String> {
    let devices = service.call("virtio_fs_get_devices")?;
    let devices = devices.as_array().context("no list of devices")?;
    let name = format!("dev{n}");
    let device = devices
        .iter()
        .find(|d| d["name"] == name || d["dev_name"] == name);
    let state = device.and_then(|d| d["hotplug_state"].as_str());
    Ok(state.with_context(|| format!("{devices:?}"))?.to_owned())
}

fn reaches(service: &Service, n: usize, wanted: &str) -> Result<()> {
    wait_until(&format!("device {n} is {wanted}"), LIMIT, || {
        Ok(state(service, n)? == wanted)
    })
}

/// Works on every device until `stop`, each of whose answers is checked; gives how often each was worked on.
fn keep_busy(devices: &mut [Started], stop: &AtomicBool) -> Result<usize> {
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        for started in &mut *devices {
            started.work_on_all()?;
        }
        rounds += 1;
    }
    Ok(rounds)
}

fn all_ports(service: &Service) -> Result<()> {
    let mut devices = Vec::new();
    for n in 0..PORTS {
        devices.push(plug(service, n)?);
        reaches(service, n, "POWER_ON")?;
    }
    let more = service.rpc("virtio_fs_doca_function_create -m mlx5_0")?;
    ensure!(!more.ok && more.err.contains("31"), "{more:?}");
    // The last one goes and comes while the others work.
    let stop = AtomicBool::new(false);
    let mut last = devices.pop();
    let rounds = thread::scope(|scope| {
        let busy = scope.spawn(|| keep_busy(&mut devices, &stop));
        let result = (0..5).try_for_each(|_| {
            let n = PORTS - 1;
            service.call(&format!(
                "virtio_fs_doca_device_hotunplug --dev-name dev{n}"
            ))?;
            drop(last.take());
            reaches(service, n, "POWER_OFF")?;
            service.call(&format!("virtio_fs_device_stop --dev-name dev{n}"))?;
            service.call(&format!("virtio_fs_device_destroy --dev-name dev{n}"))?;
            let functions = service.call("virtio_fs_doca_get_functions")?;
            let vuid = functions[0]["Function List"]
                .as_array()
                .and_then(|f| f.iter().find(|f| f["hotplug_state"] == "POWER_OFF"))
                .and_then(|f| f["vuid"].as_str());
            let vuid = vuid.with_context(|| format!("{functions}"))?;
            service.call(&format!(
                "virtio_fs_doca_function_destroy -m mlx5_0 --vuid {vuid}"
            ))?;
            last = Some(plug(service, n)?);
            reaches(service, n, "POWER_ON")
        });
        stop.store(true, Ordering::Relaxed);
        let rounds = busy.join().map_err(|_| anyhow::anyhow!("panicked"));
        result.and_then(|()| rounds?)
    })?;
    ensure!(rounds > 0, "the others had nothing to do");
    Ok(())
}

#[test]
fn thirty_one_functions_come_and_go_without_disturbing_each_other() {
    need!(binary("ferry"));
    let (service, _export) = Service::start_exporting("").unwrap();
    service.call("virtio_fs_transport_create -t DOCA").unwrap();
    service
        .call("virtio_fs_doca_manager_create -m mlx5_0")
        .unwrap();
    service.call("virtio_fs_transport_start -t DOCA").unwrap();
    all_ports(&service).with_context(|| service.log()).unwrap();
}
