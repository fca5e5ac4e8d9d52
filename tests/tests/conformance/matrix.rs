//! Every combination of what a driver may choose.

use super::requests::{Choice, Started};
use super::rig::{Place, Rig, VECTORS};
use anyhow::{Context, Result};
use ferry_tests::{binary, need};
use ferry_tools::driver::{Device, Features};

const QUEUES: [u16; 3] = [1, 8, 254];
/// The last one is more than an operator can give a PCI function; vhost-user front ends choose for themselves.
const SIZES: [u16; 4] = [8, 64, 256, 1024];
/// Packed or split, with and without the others.
const FEATURES: [Features; 4] = [
    Features::RING_PACKED,
    Features::INDIRECT_DESC,
    Features::EVENT_IDX,
    Features::NOTIFICATION_DATA,
];

fn full() -> bool {
    std::env::var_os("FERRY_CONFORMANCE_FULL").is_some()
}

fn features(bits: usize) -> Features {
    let chosen = FEATURES
        .iter()
        .enumerate()
        .filter(|(n, _)| bits >> n & 1 == 1);
    chosen.fold(Features::RING_RESET, |all, (_, one)| all | *one)
}

/// The sets of features and sizes for one device: all, or a few that make, over the devices of one transport, each meet
/// each. `turn` numbers the devices.
fn choices(sizes: &[u16], sets: usize, turn: usize) -> Vec<(Features, u16)> {
    let all = sizes.iter().enumerate();
    let all = all.flat_map(|(n, size)| (0..sets).map(move |set| (n, set, *size)));
    let chosen = all.filter(|(n, set, _)| full() || (n + set + turn).is_multiple_of(sets / 2));
    chosen.map(|(_, set, size)| (features(set), size)).collect()
}

/// Puts a device that was started as chosen through its paces, and gives it back reset.
fn exercise(device: Device, choice: Choice) -> Result<Device> {
    let mut started = Started::new(device, choice)?;
    let last = usize::from(choice.queues) - 1;
    let size = usize::from(choice.size);
    // Round the ring more than twice on some queues, a little on all.
    for at in [0, last / 2, last] {
        started.work(at, 2 * size + 3)?;
    }
    started.work_on_all()?;
    started.forget()?;
    started.quiet(last)?;
    started.restart(last / 2)?;
    started.work_on_all()?;
    // A reset does not wait for the driver to take its answers.
    started.leave_in_flight(last)?;
    let mut device = started.device;
    device.reset()?;
    Ok(device)
}

/// All choices on one device, over one connection.
fn run(rig: &Rig, place: Place, queues: u16, choices: &[(Features, u16)]) -> Result<usize> {
    let socket = rig.start("vfsdev0", place, queues)?;
    let mut device = Device::connect(&socket, None)?;
    for &(features, size) in choices {
        let vectors = match place {
            Place::Pci(vectors) => Some(vectors),
            Place::VhostUser => None,
        };
        let choice = Choice {
            features,
            queues,
            size,
            vectors,
        };
        device = exercise(device, choice)
            .with_context(|| format!("{place:?}: {choice:?}\nservice:\n{}", rig.service.log()))?;
    }
    drop(device);
    rig.end("vfsdev0")?;
    Ok(choices.len())
}

#[test]
fn every_ring_works_over_vfio_user_with_any_number_of_queues_and_vectors() {
    need!(binary("ferry"));
    let mut rig = Rig::new().unwrap();
    let mut done = 0;
    for (n, queues) in QUEUES.into_iter().enumerate() {
        for (m, vectors) in VECTORS.into_iter().enumerate() {
            let chosen = choices(&SIZES[..3], 16, 3 * n + m);
            done += run(&rig, Place::Pci(vectors), queues, &chosen).unwrap();
        }
    }
    rig.check().unwrap();
    println!("{done} combinations passed");
}

#[test]
fn every_ring_works_over_vhost_user_with_any_number_of_queues() {
    need!(binary("ferry"));
    let mut rig = Rig::new().unwrap();
    let mut done = 0;
    for (n, queues) in QUEUES.into_iter().enumerate() {
        // Notifications have no data here: kicks are event counters.
        let chosen = choices(&SIZES, 8, n);
        done += run(&rig, Place::VhostUser, queues, &chosen).unwrap();
    }
    rig.check().unwrap();
    println!("{done} combinations passed");
}

#[test]
fn a_queue_larger_than_the_limit_is_refused_by_name() {
    need!(binary("ferry"));
    let rig = Rig::new().unwrap();
    for (number, limit) in [
        ("--queue-size 1024", "256"),
        ("--num-request-queues 255", "254"),
    ] {
        let reply = rig
            .service
            .rpc(&format!(
                "virtio_fs_device_create --transport-name DOCA --dev-name d --tag t --fsdev aio0 {number}"
            ))
            .unwrap();
        assert!(!reply.ok && reply.err.contains(limit), "{reply:?}");
    }
}
