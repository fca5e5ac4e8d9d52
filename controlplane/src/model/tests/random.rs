//! Random requests: refused ones change nothing, and the invariants hold.

use super::*;

#[derive(Clone, Debug)]
pub(in crate::model) enum Op {
    TransportCreate(&'static str),
    TransportStart(&'static str),
    TransportStop(&'static str),
    TransportDestroy(&'static str),
    ManagerCreate(&'static str),
    ManagerDestroy(&'static str),
    Create(&'static str, &'static str, Changes),
    Modify(&'static str, Changes),
    Function(&'static str, Option<&'static str>, Option<&'static str>),
    Start(&'static str, bool),
    Stop(&'static str, bool),
    Destroy(&'static str, bool),
    FsdevCreate(&'static str, bool),
    FsdevDelete(&'static str, bool),
    Restart,
}

fn pick(names: &'static [&'static str]) -> impl Strategy<Value = &'static str> + Clone {
    proptest::sample::select(names)
}

fn changes() -> impl Strategy<Value = Changes> {
    let number = || {
        proptest::option::of(prop_oneof![
            Just(0u32),
            Just(1),
            Just(8),
            Just(9),
            Just(254),
            Just(255),
            Just(512)
        ])
    };
    let tag = proptest::option::of(pick(&["", "t", "a-tag-of-more-than-20-bytes"]));
    let fsdev = proptest::option::of(pick(&["f0", "f1"]));
    (tag, fsdev, number(), number(), any::<bool>()).prop_map(
        |(tag, fsdev, queues, size, notification)| Changes {
            tag: tag.map(str::to_owned),
            fsdev: fsdev.map(str::to_owned),
            num_request_queues: queues,
            queue_size: size,
            notification_vq: Some(notification),
            ..Changes::default()
        },
    )
}

pub(in crate::model) fn op() -> impl Strategy<Value = Op> {
    let transport = || pick(&["DOCA", "VHOST_USER", "TCP"]);
    let manager = || pick(&["mlx5_0", "mlx5_1", "mlx5_9"]);
    let device = || pick(&["d0", "d1", "d2"]);
    let fsdev = || pick(&["f0", "f1", "bad name"]);
    let vuid = proptest::option::of(pick(&[
        "MT2251XZ02WZVFSS0D0F2",
        "MT2251XZ02WZVFSS0D0F3",
        "MT0",
        "",
    ]));
    prop_oneof![
        transport().prop_map(Op::TransportCreate),
        transport().prop_map(Op::TransportStart),
        transport().prop_map(Op::TransportStop),
        transport().prop_map(Op::TransportDestroy),
        manager().prop_map(Op::ManagerCreate),
        manager().prop_map(Op::ManagerDestroy),
        (transport(), device(), changes()).prop_map(|(t, d, c)| Op::Create(t, d, c)),
        (device(), changes()).prop_map(|(d, c)| Op::Modify(d, c)),
        (device(), proptest::option::of(manager()), vuid)
            .prop_map(|(d, m, v)| Op::Function(d, m, v)),
        (device(), any::<bool>()).prop_map(|(d, ok)| Op::Start(d, ok)),
        (device(), any::<bool>()).prop_map(|(d, ok)| Op::Stop(d, ok)),
        (device(), any::<bool>()).prop_map(|(d, ok)| Op::Destroy(d, ok)),
        (fsdev(), any::<bool>()).prop_map(|(f, ok)| Op::FsdevCreate(f, ok)),
        (fsdev(), any::<bool>()).prop_map(|(f, ok)| Op::FsdevDelete(f, ok)),
        Just(Op::Restart),
    ]
}

fn finish(model: &mut Model, step: Result<Step, Failure>, ok: bool) -> Result<(), Failure> {
    if let Step::Send(ticket) = step? {
        model.finish(*ticket, ok);
    }
    Ok(())
}

pub(in crate::model) fn apply(model: &mut Model, op: Op) -> Result<(), Failure> {
    match op {
        Op::TransportCreate(name) => model.transport_create(name),
        Op::TransportStart(name) => model.transport_start(name),
        Op::TransportStop(name) => model.transport_stop(name),
        Op::TransportDestroy(name) => model.transport_destroy(name),
        Op::ManagerCreate(name) => model.manager_create(name),
        Op::ManagerDestroy(name) => model.manager_destroy(name),
        Op::Create(transport, name, changes) => model.device_create(transport, name, changes),
        Op::Modify(name, changes) => model.device_modify(name, changes),
        Op::Function(name, manager, vuid) => {
            model.doca_device_modify(name, manager.map(str::to_owned), vuid.map(str::to_owned))
        }
        Op::Start(name, ok) => {
            let step = model.device_start(name);
            finish(model, step, ok)
        }
        Op::Stop(name, ok) => {
            let step = model.device_stop(name);
            finish(model, step, ok)
        }
        Op::Destroy(name, ok) => {
            let step = model.device_destroy(name);
            finish(model, step, ok)
        }
        Op::FsdevCreate(name, ok) => {
            let step = model.fsdev_create(aio(name));
            finish(model, step, ok)
        }
        Op::FsdevDelete(name, ok) => {
            let step = model.fsdev_delete(name, "aio");
            finish(model, step, ok)
        }
        Op::Restart => {
            for ticket in model.adopt(platform()).missing {
                model.finish_missing(ticket, true);
            }
            Ok(())
        }
    }
}

fn check_invariants(model: &Model) {
    let queues: u32 = model
        .devices()
        .iter()
        .map(crate::model::Device::queues)
        .sum();
    assert!(queues <= 2_000);
    let mut occupied = Vec::new();
    for device in model.devices() {
        assert!(
            model.transport(device.transport.name()).unwrap().started,
            "a device without a started transport"
        );
        assert!(device.pending.is_none());
        let Some(live) = &device.live else { continue };
        live.spec.check().unwrap();
        if let Attach::Doca { manager, vuid } = &live.spec.attach {
            assert!(
                model.manager(manager).is_ok(),
                "a started device without its manager"
            );
            assert!(!occupied.contains(vuid), "{vuid} carries two devices");
            occupied.push(vuid.clone());
        }
    }
    let names = model
        .devices()
        .iter()
        .filter(|device| model.device(&device.name) != Ok(device))
        .count();
    assert_eq!(names, 0, "two devices of one name");
}

proptest! {
    #[test]
    fn refusals_change_nothing_and_the_rules_always_hold(ops in vec(op(), 0..60)) {
        let mut model = started();
        for op in ops {
            let before = model.clone();
            if apply(&mut model, op).is_err() {
                assert_eq!(model, before);
            }
            check_invariants(&model);
        }
    }
}
