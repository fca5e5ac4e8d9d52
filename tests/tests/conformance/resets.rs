//! Resets of a function while it works, and functions that come and go beside others.

use super::requests::{Choice, Started};
use super::rig::{Place, Rig};
use anyhow::{Context, Result, ensure};
use ferry_tests::{binary, need};
use ferry_tools::driver::{Device, DmaMemory, DriverError, Features, Pages, Setup};
use std::sync::Arc;

const CHOICE: Choice = Choice {
    features: Features::INDIRECT_DESC
        .union(Features::EVENT_IDX)
        .union(Features::RING_RESET),
    queues: 4,
    size: 64,
    vectors: Some(3),
};

#[test]
fn a_function_works_after_a_function_level_reset_with_requests_in_flight() {
    need!(binary("ferry"));
    let mut rig = Rig::new().unwrap();
    let socket = rig.start("vfsdev0", Place::Pci(3), 4).unwrap();
    let mut device = Device::connect(&socket, None).unwrap();
    for packed in [false, true, false] {
        let mut choice = CHOICE;
        choice.features.set(Features::RING_PACKED, packed);
        let mut started = Started::new(device, choice).unwrap();
        for at in 0..4 {
            started.work(at, 10).unwrap();
            started.leave_in_flight(at).unwrap();
        }
        device = started.device.reset_function().unwrap();
    }
    let mut started = Started::new(device, CHOICE).unwrap();
    started.work_on_all().unwrap();
    rig.check().unwrap();
}

#[test]
fn a_reset_and_a_disconnection_with_requests_in_flight_leave_a_device_that_works() {
    need!(binary("ferry"));
    let mut rig = Rig::new().unwrap();
    for place in [Place::Pci(63), Place::VhostUser] {
        let socket = rig.start("vfsdev0", place, 4).unwrap();
        for turn in 0..20 {
            let connected = Device::connect(&socket, None).unwrap();
            let mut started = Started::new(connected, CHOICE).unwrap();
            for at in 0..4 {
                started.leave_in_flight(at).unwrap();
            }
            if turn % 2 == 0 {
                started.device.reset().unwrap();
                let mut again = Started::new(started.device, CHOICE).unwrap();
                again.work_on_all().unwrap();
            }
        }
        rig.end("vfsdev0").unwrap();
    }
    rig.check().unwrap();
}

/// Section 2.6.1: only with `VIRTIO_F_RING_RESET`.
#[test]
fn a_queue_reset_that_was_not_negotiated_does_not_happen() {
    need!(binary("ferry"));
    let rig = Rig::new().unwrap();
    let socket = rig.start("vfsdev0", Place::Pci(3), 2).unwrap();
    let choice = Choice {
        features: Features::empty(),
        queues: 2,
        ..CHOICE
    };
    let device = Device::connect(&socket, None).unwrap();
    assert!(device.features().contains(
        Features::VERSION_1
            | Features::ACCESS_PLATFORM
            | Features::RING_PACKED
            | Features::RING_RESET
            | Features::NOTIFICATION_DATA
            | Features::NOTIF_CONFIG_DATA
    ));
    let mut started = Started::new(device, choice).unwrap();
    started.work(1, 100).unwrap();
    assert!(matches!(
        started.restart(1),
        Err(error) if error.downcast_ref::<DriverError>().is_some()
    ));
}

/// 254 request queues on each of seven devices and 214 on another are 2,000 virtqueues with the high-priority ones.
#[test]
fn two_thousand_virtqueues_work_at_once_and_the_next_one_is_refused_by_its_limit() {
    need!(binary("ferry"));
    let mut rig = Rig::new().unwrap();
    scale(&rig).with_context(|| rig.service.log()).unwrap();
    rig.check().unwrap();
}

fn scale(rig: &Rig) -> Result<()> {
    let mut left: u16 = 2000;
    let mut running = Vec::new();
    for n in 0.. {
        let queues = 254.min(left - 1);
        let socket = rig.start(&format!("many{n}"), Place::VhostUser, queues)?;
        let choice = Choice {
            queues,
            vectors: None,
            size: 8,
            ..CHOICE
        };
        let device = Device::connect(&socket, None)?;
        running.push(Started::new(device, choice)?);
        left -= queues + 1;
        if left == 0 {
            break;
        }
        // One queue is no device: at least two are left.
        ensure!(left > 1);
    }
    for started in &mut running {
        started.work_on_all()?;
    }
    let create = "virtio_fs_device_create --transport-name VHOST_USER --dev-name more --tag more --fsdev aio0 --num-request-queues 1";
    let created = rig.service.rpc(create)?;
    let refused = match created.ok {
        true => rig.service.rpc("virtio_fs_device_start --dev-name more")?,
        false => created,
    };
    let said = format!("{}{}", refused.out, refused.err);
    ensure!(!refused.ok && said.contains("2000"), "{said}");
    // One goes, and nothing happens to the others; then there is room again.
    drop(running.pop());
    let last = running.len();
    rig.end(&format!("many{last}"))?;
    for started in &mut running {
        started.work_on_all()?;
    }
    rig.start("again", Place::VhostUser, 2)?;
    Ok(())
}

#[test]
fn queues_share_vectors_only_if_the_driver_asks_for_that() {
    need!(binary("ferry"));
    let rig = Rig::new().unwrap();
    let socket = rig.start("vfsdev0", Place::Pci(3), 8).unwrap();
    let mut device = Device::connect(&socket, None).unwrap();
    assert_eq!(device.max_request_queues(), 2);
    let setup = Setup {
        request_queues: 8,
        ..Setup::default()
    };
    let memory = DmaMemory::new(1 << 22, Pages::Normal);
    let refused = device.start(&setup, &Arc::new(memory.unwrap()));
    assert!(matches!(refused, Err(DriverError::TooMany { has: 2, .. })));
}
