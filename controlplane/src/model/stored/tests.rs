use ferry_shared::msg::DeviceSnapshot;
use ferry_shared::msg::Item;
use proptest::collection::vec;
use proptest::proptest;

use super::*;
use crate::model::Step;
use crate::model::tests::done;
use crate::model::tests::platform;
use crate::model::tests::random::apply;
use crate::model::tests::random::op;
use crate::model::tests::running;
use crate::model::tests::started;
use crate::model::tests::stopped;

/// Through the form on disk and back.
fn reread(model: &Model) -> Model {
    let text = serde_json::to_string(&model.stored()).unwrap();
    Model::restore(serde_json::from_str(&text).unwrap()).unwrap()
}

/// What a data plane has after everything that the model was told had happened.
fn snapshot(model: &Model) -> Vec<Item> {
    let mut items = platform();
    items.extend(model.fsdevs().map(|fsdev| Item::Fsdev(fsdev.spec.clone())));
    items.extend(model.devices().iter().filter_map(|device| {
        let live = device.live.clone()?;
        Some(Item::Device(DeviceSnapshot {
            spec: live.spec,
            paused: live.paused,
            connected: live.connected,
            mounted: live.mounted,
        }))
    }));
    items
}

proptest! {
    #[test]
    fn a_restarted_control_plane_knows_what_the_one_before_knew(ops in vec(op(), 0..60)) {
        let mut model = started();
        for op in ops {
            let _ = apply(&mut model, op);
        }
        let mut again = reread(&model);
        assert_eq!(again.stored(), model.stored());
        let adopted = again.adopt(snapshot(&model));
        assert_eq!(adopted.missing, []);
        assert_eq!(adopted.impossible, []);
        assert_eq!(again, model);
    }
}

#[test]
fn what_is_wanted_of_the_data_plane_itself_is_kept_and_checked() {
    let mut model = running();
    let wishes = Wishes {
        slots: Some(4096),
        buffers: None,
        scheduler: Some(Scheduler::Dynamic(Balance::default())),
    };
    model.wish(wishes);
    assert_eq!(reread(&model).wishes(), wishes);
    let mut stored = model.stored();
    stored.wishes.scheduler = Some(SchedulerV1::Dynamic {
        period_us: 1,
        load_limit: 0,
        core_limit: 0,
        core_busy: 0,
    });
    assert!(Model::restore(stored).is_err());
}

#[test]
fn an_fsdev_that_hands_on_is_issued_after_the_one_below_it() {
    let passthru = |name: &str, base: &str| FsdevSpec {
        name: name.to_owned(),
        kind: FsdevKind::Passthru {
            base: base.to_owned(),
        },
    };
    let null = FsdevSpec {
        name: "z".to_owned(),
        kind: FsdevKind::Null,
    };
    // The data plane tells of them by their names.
    let items = [passthru("a", "m"), passthru("m", "z"), null];
    let mut model = Model::default();
    model.adopt(items.into_iter().map(Item::Fsdev).collect());
    let names: Vec<&str> = model
        .fsdevs()
        .map(|fsdev| fsdev.spec.name.as_str())
        .collect();
    assert_eq!(names, ["z", "m", "a"]);
    assert_eq!(reread(&model).stored(), model.stored());
}

#[test]
fn requests_under_way_are_not_kept() {
    let mut model = running();
    let before = model.stored();
    let stop = model.device_stop("vfsdev0").unwrap();
    assert_eq!(model.stored(), before);
    done(&mut model, stop);
    assert_ne!(model.stored(), before);
    let before = model.stored();
    let destroy = model.device_destroy("vfsdev0").unwrap();
    assert_eq!(model.stored(), before);
    done(&mut model, destroy);
    assert!(model.stored().devices.is_empty());
}

#[test]
fn nothing_is_destroyed_before_the_data_plane_has_been_seen() {
    let mut model = reread(&stopped());
    assert!(matches!(model.device_destroy("vfsdev0"), Ok(Step::Send(_))));
    let mut model = reread(&stopped());
    assert!(matches!(
        model.fsdev_delete("aio0", "aio"),
        Ok(Step::Send(_))
    ));
}

#[test]
fn what_a_stopped_device_was_changed_to_outlives_a_restart() {
    let mut model = stopped();
    let items = snapshot(&model);
    let changes = Changes {
        tag: Some("other".to_owned()),
        ..Changes::default()
    };
    model.device_modify("vfsdev0", changes).unwrap();
    let mut again = reread(&model);
    let _ = again.adopt(items);
    assert_eq!(again, model);
    assert_eq!(
        again.device("vfsdev0").unwrap().tag.as_deref(),
        Some("other")
    );
}

#[test]
fn a_device_that_could_not_be_started_again_is_tried_at_the_next_restart_until_it_is_stopped() {
    let mut model = reread(&running());
    for ticket in model.adopt(platform()).missing {
        model.finish_missing(ticket, false);
    }
    assert_eq!(model.device("vfsdev0").unwrap().state(), DeviceState::Idle);
    let mut again = reread(&model);
    let missing = again.adopt(platform()).missing;
    assert_eq!(missing.len(), 2, "{missing:?}");
    for ticket in missing {
        again.finish_missing(ticket, false);
    }
    assert_eq!(again.device_stop("vfsdev0"), Ok(Step::Done));
    assert_eq!(again.adopt(platform()).missing.len(), 1, "only the fsdev");
    assert!(again.device_stop("vfsdev0").is_err());
}

#[test]
fn a_function_that_the_platform_no_longer_has_is_reported() {
    let mut model = running();
    for ticket in model.adopt(platform()).missing {
        model.finish_missing(ticket, false);
    }
    let adopted = model.adopt(Vec::new());
    assert_eq!(adopted.impossible.len(), 1, "{adopted:?}");
    assert!(adopted.impossible[0].detail.contains("mlx5_0"));
    assert!(model.device("vfsdev0").unwrap().wanted);
}

#[test]
fn a_state_that_breaks_the_rules_is_refused() {
    let good = running().stored();
    let mut cases = Vec::new();
    let mut case = |name: &'static str, spoil: fn(&mut StateV1)| {
        let mut state = good.clone();
        spoil(&mut state);
        cases.push((name, state));
    };
    case("aio0", |state| state.fsdevs.push(state.fsdevs[0].clone()));
    case("vfsdev0", |state| {
        state.devices.push(state.devices[0].clone())
    });
    case("mlx5_0", |state| {
        state.managers.push(state.managers[0].clone())
    });
    case("DOCA", |state| {
        state.transports.push(state.transports[0].clone())
    });
    case("DOCA", |state| state.transports.clear());
    case("tag", |state| state.devices[0].tag = None);
    case("vuid", |state| state.devices[0].vuid = None);
    case("queue_size", |state| state.devices[0].queue_size = 7);
    case("pdp11", |state| {
        state.devices[0].driver_platform = "pdp11".to_owned()
    });
    case("TCP", |state| state.transports[0].name = "TCP".to_owned());
    for (culprit, state) in cases {
        let failure = Model::restore(state).unwrap_err();
        assert!(
            failure.detail.contains(culprit),
            "{culprit}: {}",
            failure.detail
        );
    }
}
