//! Functions on hot-plug ports: made, plugged, unplugged, destroyed.

use super::*;

/// A function on the first hot-plug port of `mlx5_1`.
fn on_port() -> Function {
    Function {
        manager: "mlx5_1".to_owned(),
        vuid: "MT2VFSS1D0F0".to_owned(),
        port: Some(0),
        plug: PlugState::PowerOff,
        ..function("MT2VFSS1D0F0")
    }
}

fn plug_event(state: PlugState) -> Event {
    Event::Plug {
        manager: "mlx5_1".to_owned(),
        vuid: "MT2VFSS1D0F0".to_owned(),
        state,
    }
}

/// Device `hot` running on that function.
fn hot() -> Model {
    let mut model = started();
    model.manager_create("mlx5_1").unwrap();
    model.function_created(on_port());
    model.device_create("DOCA", "hot", ready("t")).unwrap();
    let (manager, vuid) = ("mlx5_1".to_owned(), "MT2VFSS1D0F0".to_owned());
    model
        .doca_device_modify("hot", Some(manager), Some(vuid))
        .unwrap();
    let step = model.device_start("hot").unwrap();
    done(&mut model, step);
    model
}

#[test]
fn what_has_no_hotplug_port_cannot_be_made_or_plugged() {
    let model = running();
    refused(
        &model,
        |m| m.function_create("mlx5_0", None),
        Errno::EOPNOTSUPP,
        &["mlx5_0", "PCI_SWITCH_EMULATION_ENABLE"],
    );
    refused(
        &model,
        |m| m.function_create("mlx5_9", None),
        Errno::ENODEV,
        &["mlx5_9"],
    );
    for vuid in VUIDS {
        refused(
            &model,
            |m| m.function_destroy("mlx5_0", vuid),
            Errno::EINVAL,
            &[vuid, "static"],
        );
    }
    refused(
        &model,
        |m| m.function_destroy("mlx5_0", "MT0"),
        Errno::ENODEV,
        &["MT0"],
    );
    refused(
        &model,
        |m| m.device_hotplug("vfsdev0"),
        Errno::EINVAL,
        &["vfsdev0", "static", VUIDS[0]],
    );
    refused(
        &stopped(),
        |m| m.device_hotplug("vfsdev0"),
        Errno::EINVAL,
        &["vfsdev0", "not started"],
    );
    let mut model = started();
    model.device_create("VHOST_USER", "v", ready("t")).unwrap();
    refused(
        &model,
        |m| m.device_hotplug("v"),
        Errno::EINVAL,
        &["v", "VHOST_USER"],
    );
    refused(
        &model,
        |m| m.doca_device_modify("v", None, None),
        Errno::EINVAL,
        &["v", "VHOST_USER"],
    );
}

#[test]
fn a_function_on_a_port_lives_from_creation_to_destruction() {
    let mut model = started();
    model.manager_create("mlx5_1").unwrap();
    let Step::Send(ticket) = model.function_create("mlx5_1", None).unwrap() else {
        panic!("nothing sent")
    };
    let create = Command::FunctionCreate {
        manager: "mlx5_1".to_owned(),
        vuid: None,
    };
    assert_eq!(ticket.command, create);
    model.function_created(on_port());
    model.finish(*ticket, true);
    assert_eq!(model.functions("mlx5_1").count(), 1);
    refused(
        &model,
        |m| m.function_create("mlx5_1", Some("MT2VFSS1D0F0")),
        Errno::EEXIST,
        &["MT2VFSS1D0F0 already"],
    );
    for n in 2..=4 {
        let vuid = format!("MT2VFSS{n}D0F0");
        model.function_created(Function { vuid, ..on_port() });
    }
    refused(
        &model,
        |m| m.function_create("mlx5_1", None),
        Errno::ENOSPC,
        &["all 4 hot-plug ports"],
    );
    let step = model.function_destroy("mlx5_1", "MT2VFSS1D0F0").unwrap();
    done(&mut model, step);
    assert_eq!(model.functions("mlx5_1").count(), 3);
    let busy = hot();
    refused(
        &busy,
        |m| m.function_destroy("mlx5_1", "MT2VFSS1D0F0"),
        Errno::EBUSY,
        &["hot"],
    );
}

#[test]
fn plugging_follows_what_the_data_plane_reports() {
    let mut model = hot();
    assert_eq!(model.plug_state("hot"), Some(PlugState::PowerOff));
    refused(
        &model,
        |m| m.device_hotunplug("hot", false),
        Errno::EINVAL,
        &["hot", "not plugged"],
    );
    let (plugged, step) = model.device_hotplug("hot").unwrap();
    assert_eq!((plugged.link, plugged.function.port), (None, Some(0)));
    done(&mut model, step);
    assert_eq!(model.plug_state("hot"), Some(PlugState::PowerOff));
    for (state, words) in [
        (PlugState::PlugInProgress, "not taken it yet"),
        (PlugState::PowerOn, "plugged already"),
        (PlugState::UnplugInProgress, "being unplugged"),
    ] {
        model.event(plug_event(state));
        assert_eq!(model.plug_state("hot"), Some(state));
        refused(
            &model,
            |m| m.device_hotplug("hot"),
            Errno::EALREADY,
            &["hot", words],
        );
        let (_, step) = model.device_hotunplug("hot", true).unwrap();
        let Step::Send(ticket) = step else {
            panic!("nothing sent")
        };
        let unplug = Command::DeviceUnplug {
            name: "hot".to_owned(),
            ask: true,
        };
        assert_eq!(ticket.command, unplug);
    }
}

#[test]
fn a_data_plane_that_starts_anew_gets_its_functions_before_the_devices_on_them() {
    let model = hot();
    let mut kept = Model::restore(model.stored()).unwrap();
    let missing = kept.adopt(platform()).missing;
    let [_, function, device] = &missing[..] else {
        panic!("{missing:?}")
    };
    let create = Command::FunctionCreate {
        manager: "mlx5_1".to_owned(),
        vuid: Some("MT2VFSS1D0F0".to_owned()),
    };
    assert_eq!(function.command, create);
    assert!(matches!(&device.command, Command::DeviceStart(spec) if spec.name == "hot"));
    kept.function_created(on_port());
    for ticket in missing {
        kept.finish_missing(ticket, true);
    }
    assert_eq!(kept.stored(), model.stored());
}
