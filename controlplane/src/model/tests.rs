use ferry_shared::errno::Errno;
use ferry_shared::msg::AioSpec;
use ferry_shared::msg::Attach;
use ferry_shared::msg::Command;
use ferry_shared::msg::DeviceSnapshot;
use ferry_shared::msg::DeviceSpec;
use ferry_shared::msg::Event;
use ferry_shared::msg::Failure;
use ferry_shared::msg::FsdevKind;
use ferry_shared::msg::FsdevSpec;
use ferry_shared::msg::Function;
use ferry_shared::msg::Item;
use ferry_shared::msg::Manager as PlatformManager;
use ferry_shared::msg::Placement;
use ferry_shared::msg::Platform as Architecture;
use ferry_shared::msg::PlugState;
use ferry_shared::msg::Service;
use proptest::collection::vec;
use proptest::prelude::Just;
use proptest::prelude::Strategy;
use proptest::prelude::any;
use proptest::prop_oneof;
use proptest::proptest;

use super::Changes;
use super::DeviceState;
use super::FsdevOptions;
use super::Model;
use super::Step;

const VUIDS: [&str; 2] = ["MT2251XZ02WZVFSS0D0F2", "MT2251XZ02WZVFSS0D0F3"];

fn function(vuid: &str) -> Function {
    Function {
        manager: "mlx5_0".to_owned(),
        vuid: vuid.to_owned(),
        pci_address: "0000:29:00.2".to_owned(),
        port: None,
        plug: PlugState::PowerOn,
        socket: format!("/run/ferry/pci/{vuid}.sock"),
    }
}

pub(super) fn platform() -> Vec<Item> {
    let service = Service {
        version: "0.1.0".to_owned(),
        pid: 1,
        cores: vec![0, 1],
        run_dir: "/run/ferry".to_owned(),
    };
    vec![
        Item::Service(service),
        Item::Manager(PlatformManager {
            name: "mlx5_0".to_owned(),
            hotplug_ports: 0,
            host_link: None,
        }),
        Item::Manager(PlatformManager {
            name: "mlx5_1".to_owned(),
            hotplug_ports: 4,
            host_link: None,
        }),
        Item::Function(function(VUIDS[0])),
        Item::Function(function(VUIDS[1])),
    ]
}

fn aio(name: &str) -> FsdevSpec {
    let aio = AioSpec {
        root_path: "/etc/virtiofs/test".to_owned(),
        enable_xattr: false,
        enable_writeback_cache: false,
        max_xfer_size: 131_072,
        max_readahead: 131_072,
        skip_rw: false,
        export: ferry_shared::export::ExportSpec::default(),
        metadata: Placement::Auto,
    };
    FsdevSpec {
        name: name.to_owned(),
        kind: FsdevKind::Aio(aio),
    }
}

/// Carries a step out with a data plane that agrees to everything.
pub(super) fn done(model: &mut Model, step: Step) {
    if let Step::Send(ticket) = step {
        model.finish(*ticket, true);
    }
}

fn ready(tag: &str) -> Changes {
    Changes {
        tag: Some(tag.to_owned()),
        fsdev: Some("aio0".to_owned()),
        ..Changes::default()
    }
}

/// Both transports started, fsdev `aio0`, nothing else.
pub(super) fn started() -> Model {
    let mut model = Model::default();
    assert!(model.adopt(platform()).missing.is_empty());
    let step = model.fsdev_create(aio("aio0")).unwrap();
    done(&mut model, step);
    for transport in ["DOCA", "VHOST_USER"] {
        model.transport_create(transport).unwrap();
        model.transport_start(transport).unwrap();
    }
    model
}

/// The same with device `vfsdev0` running on the first function.
pub(super) fn running() -> Model {
    let mut model = started();
    model
        .device_create("DOCA", "vfsdev0", ready("docatag"))
        .unwrap();
    let vuid = Some(VUIDS[0].to_owned());
    model
        .doca_device_modify("vfsdev0", Some("mlx5_0".to_owned()), vuid)
        .unwrap();
    let step = model.device_start("vfsdev0").unwrap();
    done(&mut model, step);
    model
}

pub(super) fn stopped() -> Model {
    let mut model = running();
    let step = model.device_stop("vfsdev0").unwrap();
    done(&mut model, step);
    model
}

/// A device `other` that wants the function `vuid` of `manager`.
fn with_other(mut model: Model, manager: Option<&str>, vuid: Option<&str>) -> Model {
    model.device_create("DOCA", "other", ready("tag")).unwrap();
    model
        .doca_device_modify("other", manager.map(str::to_owned), vuid.map(str::to_owned))
        .unwrap();
    model
}

/// Asserts that a request is refused so, names these culprits and changes nothing.
#[track_caller]
fn refused<T>(
    model: &Model,
    request: impl FnOnce(&mut Model) -> Result<T, Failure>,
    errno: Errno,
    culprits: &[&str],
) {
    let mut after = model.clone();
    let Err(failure) = request(&mut after) else {
        panic!("accepted instead of {errno:?}")
    };
    assert_eq!(failure.errno, errno, "{}", failure.detail);
    for culprit in culprits {
        assert!(
            failure.detail.contains(culprit),
            "{culprit} is missing in: {}",
            failure.detail
        );
    }
    assert_eq!(after, *model, "the refusal has changed something");
}

#[test]
fn transports_are_refused_in_the_wrong_order() {
    let none = Model::default();
    refused(
        &none,
        |m| m.transport_create("doca"),
        Errno::EINVAL,
        &["doca", "VHOST_USER"],
    );
    refused(
        &none,
        |m| m.transport_start("DOCA"),
        Errno::ENODEV,
        &["DOCA", "virtio_fs_transport_create"],
    );
    refused(
        &none,
        |m| m.transport_stop("DOCA"),
        Errno::ENODEV,
        &["DOCA"],
    );
    refused(
        &none,
        |m| m.transport_destroy("DOCA"),
        Errno::ENODEV,
        &["DOCA"],
    );
    refused(
        &started(),
        |m| m.transport_create("DOCA"),
        Errno::EEXIST,
        &["DOCA"],
    );
    refused(
        &started(),
        |m| m.transport_start("DOCA"),
        Errno::EALREADY,
        &["DOCA"],
    );
    refused(
        &started(),
        |m| m.transport_destroy("DOCA"),
        Errno::EBUSY,
        &["DOCA", "virtio_fs_transport_stop"],
    );
    refused(
        &running(),
        |m| m.transport_stop("DOCA"),
        Errno::EBUSY,
        &["DOCA", "vfsdev0"],
    );

    let mut created = Model::default();
    created.transport_create("DOCA").unwrap();
    refused(
        &created,
        |m| m.transport_stop("DOCA"),
        Errno::EALREADY,
        &["DOCA"],
    );
    refused(
        &created,
        |m| m.transport_start("DOCA"),
        Errno::ENODEV,
        &["no emulation manager"],
    );
}

#[test]
fn a_transport_keeps_the_managers_that_were_asked_for_and_drops_the_others() {
    let mut model = started();
    assert_eq!(model.managers()[0].name, "mlx5_0");
    model.transport_stop("DOCA").unwrap();
    model.transport_destroy("DOCA").unwrap();
    assert!(model.managers().is_empty());

    model.transport_create("DOCA").unwrap();
    model.manager_create("mlx5_0").unwrap();
    refused(
        &model,
        |m| m.transport_destroy("DOCA"),
        Errno::EBUSY,
        &["mlx5_0", "virtio_fs_doca_manager_destroy"],
    );
    model.manager_destroy("mlx5_0").unwrap();
    model.transport_destroy("DOCA").unwrap();
}

#[test]
fn managers_are_refused_when_unknown_or_busy() {
    refused(
        &started(),
        |m| m.manager_create("mlx5_0"),
        Errno::EEXIST,
        &["mlx5_0"],
    );
    refused(
        &started(),
        |m| m.manager_create("mlx5_9"),
        Errno::ENODEV,
        &["mlx5_9", "mlx5_0, mlx5_1"],
    );
    refused(
        &started(),
        |m| m.manager_destroy("mlx5_1"),
        Errno::ENODEV,
        &["mlx5_1"],
    );
    refused(
        &running(),
        |m| m.manager_destroy("mlx5_0"),
        Errno::EBUSY,
        &["mlx5_0", "vfsdev0"],
    );
    refused(
        &stopped(),
        |m| m.manager_destroy("mlx5_0"),
        Errno::EBUSY,
        &["mlx5_0", "vfsdev0"],
    );
    let mut none = Model::default();
    let _ = none.adopt(platform());
    refused(
        &none,
        |m| m.manager_create("mlx5_0"),
        Errno::ENODEV,
        &["DOCA", "virtio_fs_transport_create"],
    );
}

#[test]
fn devices_are_refused_at_creation() {
    let model = running();
    let create = |name: &'static str, changes: Changes| {
        move |m: &mut Model| m.device_create("DOCA", name, changes)
    };
    refused(
        &model,
        create("vfsdev0", ready("t")),
        Errno::EEXIST,
        &["vfsdev0"],
    );
    refused(
        &model,
        |m| m.device_create("TCP", "d", ready("t")),
        Errno::ENODEV,
        &["TCP"],
    );
    refused(&model, create("a/b", ready("t")), Errno::EINVAL, &["a/b"]);
    refused(&model, create("", ready("t")), Errno::EINVAL, &["device"]);
    refused(
        &model,
        create("d", ready(&"t".repeat(21))),
        Errno::EINVAL,
        &["tag", "20"],
    );
    refused(&model, create("d", ready("")), Errno::EINVAL, &["tag"]);
    for queues in [0, 255] {
        let changes = Changes {
            num_request_queues: Some(queues),
            ..ready("t")
        };
        refused(
            &model,
            create("d", changes),
            Errno::EINVAL,
            &["num_request_queues", &queues.to_string(), "254"],
        );
    }
    for size in [0, 7, 9, 512] {
        let changes = Changes {
            queue_size: Some(size),
            ..ready("t")
        };
        refused(
            &model,
            create("d", changes),
            Errno::EINVAL,
            &["queue_size", &size.to_string()],
        );
    }
    let changes = Changes {
        driver_platform: Some("sparc".to_owned()),
        ..ready("t")
    };
    refused(
        &model,
        create("d", changes),
        Errno::EINVAL,
        &["driver_platform", "sparc", "aarch64"],
    );

    let mut created = Model::default();
    created.transport_create("VHOST_USER").unwrap();
    refused(
        &created,
        |m| m.device_create("VHOST_USER", "d", ready("t")),
        Errno::EINVAL,
        &["virtio_fs_transport_start"],
    );
    created.transport_start("VHOST_USER").unwrap();
    refused(
        &created,
        |m| m.device_create("VHOST_USER", "d", ready(&"t".repeat(37))),
        Errno::EINVAL,
        &["36"],
    );
    created
        .device_create("VHOST_USER", "d", ready(&"t".repeat(36)))
        .unwrap();
}

#[test]
fn the_service_has_two_thousand_virtqueues_of_every_kind() {
    let mut model = started();
    let most = Changes {
        num_request_queues: Some(254),
        notification_vq: Some(true),
        ..ready("t")
    };
    for number in 0..7 {
        model
            .device_create("DOCA", &format!("d{number}"), most.clone())
            .unwrap();
    }
    // 7 x 256 are 1,792; 207 + 1 are the rest.
    let rest = Changes {
        num_request_queues: Some(207),
        ..ready("t")
    };
    model.device_create("DOCA", "rest", rest).unwrap();
    let one = Changes {
        num_request_queues: Some(1),
        ..ready("t")
    };
    refused(
        &model,
        |m| m.device_create("DOCA", "one", one),
        Errno::ENOSPC,
        &["one", "2000"],
    );
    let more = Changes {
        notification_vq: Some(true),
        ..Changes::default()
    };
    refused(
        &model,
        |m| m.device_modify("rest", more),
        Errno::ENOSPC,
        &["rest", "2000"],
    );
}

#[test]
fn devices_are_refused_what_their_state_does_not_allow() {
    let none = started();
    refused(&none, |m| m.device_start("d"), Errno::ENODEV, &["d"]);
    refused(&none, |m| m.device_stop("d"), Errno::ENODEV, &["d"]);
    refused(&none, |m| m.device_destroy("d"), Errno::ENODEV, &["d"]);
    refused(
        &none,
        |m| m.device_modify("d", ready("t")),
        Errno::ENODEV,
        &["d"],
    );
    refused(
        &none,
        |m| m.doca_device_modify("d", None, None),
        Errno::ENODEV,
        &["d"],
    );
    refused(&none, |m| m.device_hotplug("d"), Errno::ENODEV, &["d"]);

    let running = running();
    refused(
        &running,
        |m| m.device_start("vfsdev0"),
        Errno::EALREADY,
        &["vfsdev0"],
    );
    refused(
        &running,
        |m| m.device_modify("vfsdev0", ready("t")),
        Errno::EBUSY,
        &["vfsdev0", "virtio_fs_device_stop"],
    );
    refused(
        &running,
        |m| m.doca_device_modify("vfsdev0", None, Some("V".to_owned())),
        Errno::EBUSY,
        &["vfsdev0"],
    );
    refused(
        &running,
        |m| m.device_destroy("vfsdev0"),
        Errno::EBUSY,
        &["vfsdev0", "virtio_fs_device_stop"],
    );
    refused(
        &stopped(),
        |m| m.device_stop("vfsdev0"),
        Errno::EALREADY,
        &["vfsdev0", "stopped"],
    );
}

#[test]
fn devices_are_refused_at_the_start_until_they_are_configured() {
    let mut model = started();
    model
        .device_create("DOCA", "d", Changes::default())
        .unwrap();
    refused(
        &model,
        |m| m.device_start("d"),
        Errno::EINVAL,
        &["d", "tag"],
    );
    model
        .device_modify(
            "d",
            Changes {
                tag: Some("t".to_owned()),
                ..Changes::default()
            },
        )
        .unwrap();
    refused(
        &model,
        |m| m.device_start("d"),
        Errno::EINVAL,
        &["d", "fsdev"],
    );
    model
        .device_modify(
            "d",
            Changes {
                fsdev: Some("nosuch".to_owned()),
                ..Changes::default()
            },
        )
        .unwrap();
    refused(
        &model,
        |m| m.device_start("d"),
        Errno::EINVAL,
        &["d", "manager"],
    );
    model
        .doca_device_modify("d", Some("mlx5_0".to_owned()), None)
        .unwrap();
    refused(
        &model,
        |m| m.device_start("d"),
        Errno::EINVAL,
        &["d", "vuid"],
    );

    let unknown = with_other(started(), Some("mlx5_0"), Some("MT0"));
    refused(
        &unknown,
        |m| m.device_start("other"),
        Errno::ENODEV,
        &["mlx5_0", "MT0"],
    );
    let unknown = with_other(started(), Some("mlx5_9"), Some(VUIDS[0]));
    refused(
        &unknown,
        |m| m.device_start("other"),
        Errno::ENODEV,
        &["mlx5_9"],
    );
}

#[test]
fn one_function_carries_one_device() {
    for model in [running(), stopped()] {
        let model = with_other(model, Some("mlx5_0"), Some(VUIDS[0]));
        refused(
            &model,
            |m| m.device_start("other"),
            Errno::EBUSY,
            &[VUIDS[0], "vfsdev0"],
        );
    }
    let mut model = with_other(stopped(), Some("mlx5_0"), Some(VUIDS[0]));
    let step = model.device_destroy("vfsdev0").unwrap();
    done(&mut model, step);
    let step = model.device_start("other").unwrap();
    done(&mut model, step);
    assert_eq!(model.device("other").unwrap().state(), DeviceState::Running);
}

#[test]
fn a_function_is_taken_from_the_moment_a_start_is_sent() {
    let mut model = with_other(with_first(), Some("mlx5_0"), Some(VUIDS[0]));
    let Step::Send(ticket) = model.device_start("first").unwrap() else {
        panic!("nothing sent")
    };
    refused(
        &model,
        |m| m.device_start("other"),
        Errno::EBUSY,
        &["first"],
    );
    for result in [model.device_start("first"), model.device_destroy("first")] {
        assert_eq!(result.unwrap_err().errno, Errno::EALREADY);
    }
    model.finish(*ticket, false);
    assert_eq!(model.device("first").unwrap().state(), DeviceState::Idle);
    assert!(model.device_start("other").is_ok());
}

fn with_first() -> Model {
    let mut model = started();
    model.device_create("DOCA", "first", ready("t")).unwrap();
    model
        .doca_device_modify(
            "first",
            Some("mlx5_0".to_owned()),
            Some(VUIDS[0].to_owned()),
        )
        .unwrap();
    model
}

#[test]
fn a_start_without_a_manager_creates_the_one_that_the_platform_offers() {
    let mut model = with_first();
    model.manager_destroy("mlx5_0").unwrap_err();
    let mut model = {
        model.devices.clear();
        model.manager_destroy("mlx5_0").unwrap();
        model.device_create("DOCA", "d", ready("t")).unwrap();
        model
    };
    assert!(model.managers().is_empty());
    model
        .doca_device_modify("d", Some("mlx5_0".to_owned()), Some(VUIDS[1].to_owned()))
        .unwrap();
    assert_eq!(model.managers()[0].name, "mlx5_0");
}

#[test]
fn fsdevs_are_refused_by_name_path_and_size() {
    let model = started();
    refused(
        &model,
        |m| m.fsdev_create(aio("aio0")),
        Errno::EEXIST,
        &["aio0"],
    );
    refused(
        &model,
        |m| m.fsdev_create(aio("a b")),
        Errno::EINVAL,
        &["a b"],
    );
    let with = |change: fn(&mut AioSpec)| {
        let mut spec = aio("new");
        if let FsdevKind::Aio(aio) = &mut spec.kind {
            change(aio);
        }
        move |m: &mut Model| m.fsdev_create(spec)
    };
    refused(
        &model,
        with(|aio| aio.root_path = "relative".to_owned()),
        Errno::EINVAL,
        &["relative", "new"],
    );
    refused(
        &model,
        with(|aio| aio.max_xfer_size = 261_121),
        Errno::EINVAL,
        &["max_xfer_size", "261120"],
    );
    refused(
        &model,
        with(|aio| {
            aio.enable_writeback_cache = true;
            aio.export.read_only = true;
        }),
        Errno::EINVAL,
        &["enable_writeback_cache", "read_only"],
    );
    refused(
        &model,
        |m| m.fsdev_delete("none", "aio"),
        Errno::ENODEV,
        &["none"],
    );
    refused(
        &model,
        |m| m.fsdev_delete("aio0", "null"),
        Errno::ENODEV,
        &["aio0", "fsdev_aio_delete"],
    );

    let mut deleting = started();
    let Step::Send(ticket) = deleting.fsdev_delete("aio0", "aio").unwrap() else {
        panic!("nothing sent")
    };
    refused(
        &deleting,
        |m| m.fsdev_delete("aio0", "aio"),
        Errno::EBUSY,
        &["aio0"],
    );
    deleting.finish(*ticket, false);
    assert!(deleting.fsdev("aio0").is_ok());
}

#[test]
fn a_failed_creation_leaves_no_fsdev() {
    let mut model = started();
    let Step::Send(ticket) = model.fsdev_create(aio("new")).unwrap() else {
        panic!("nothing sent")
    };
    assert!(model.fsdev("new").is_err(), "visible before it exists");
    model.finish(*ticket, false);
    assert_eq!(model, started());
}

#[test]
fn the_pool_must_fill_every_cache() {
    let refuse = |pool, cache| {
        let options = FsdevOptions {
            io_pool_size: pool,
            io_cache_size: cache,
        };
        refused(
            &started(),
            |m| m.set_options(options),
            Errno::EINVAL,
            &["fsdev_io_pool_size", &pool.to_string()],
        );
    };
    // Two cores and the management thread.
    refuse(767, 256);
    refuse(0, 0);
    let options = FsdevOptions {
        io_pool_size: 768,
        io_cache_size: 256,
    };
    let mut model = started();
    model.set_options(options).unwrap();
    assert_eq!(model.options(), options);
}

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

#[test]
fn a_stopped_device_resumes_with_what_it_was_given_meanwhile() {
    let mut model = stopped();
    model.device_modify("vfsdev0", ready("newtag")).unwrap();
    let Step::Send(ticket) = model.device_start("vfsdev0").unwrap() else {
        panic!("nothing sent")
    };
    let Command::DeviceStart(spec) = ticket.command.clone() else {
        panic!("not a start")
    };
    assert_eq!(spec.tag, "newtag");
    model.finish(*ticket, true);
    assert_eq!(
        model.device("vfsdev0").unwrap().live.as_ref().unwrap().spec,
        spec
    );
}

#[test]
fn sockets_are_named_where_a_vmm_finds_them() {
    let mut model = running();
    model.device_create("VHOST_USER", "v", ready("t")).unwrap();
    let socket = |name: &str| model.device_socket(model.device(name).unwrap());
    assert_eq!(
        socket("vfsdev0"),
        Some(format!("/run/ferry/pci/{}.sock", VUIDS[0]))
    );
    assert_eq!(socket("v").as_deref(), Some("/run/ferry/vhost/v.sock"));
}

fn snapshot(name: &str, paused: bool) -> DeviceSnapshot {
    let spec = DeviceSpec {
        name: name.to_owned(),
        attach: Attach::Doca {
            manager: "mlx5_0".to_owned(),
            vuid: VUIDS[0].to_owned(),
        },
        tag: "docatag".to_owned(),
        num_request_queues: 8,
        queue_size: 256,
        fsdev: "aio0".to_owned(),
        packed_vq: false,
        notification_vq: false,
        driver_platform: Architecture::X86_64,
    };
    DeviceSnapshot {
        spec,
        paused,
        connected: true,
        mounted: true,
    }
}

#[test]
fn what_the_data_plane_has_is_taken_over_with_all_that_it_implies() {
    let mut items = platform();
    items.push(Item::Fsdev(aio("aio0")));
    items.push(Item::Device(snapshot("vfsdev0", true)));
    let mut model = Model::default();
    let adopted = model.adopt(items);
    assert_eq!(adopted.objects, ["fsdev aio0", "device vfsdev0"]);
    assert!(adopted.missing.is_empty());
    let device = model.device("vfsdev0").unwrap();
    assert_eq!(
        (
            device.state(),
            device.num_request_queues,
            device.platform_name()
        ),
        (DeviceState::Stopped, 8, "x86_64")
    );
    assert!(device.live.as_ref().unwrap().mounted);
    assert!(model.transport("DOCA").unwrap().started);
    assert!(model.manager("mlx5_0").is_ok());
    let step = model.device_start("vfsdev0").unwrap();
    done(&mut model, step);
    assert_eq!(
        model.device("vfsdev0").unwrap().state(),
        DeviceState::Running
    );
}

#[test]
fn what_a_restarted_data_plane_lacks_is_listed_fsdevs_first() {
    let mut model = running();
    let adopted = model.adopt(platform());
    let commands: Vec<Command> = adopted
        .missing
        .iter()
        .map(|ticket| ticket.command.clone())
        .collect();
    assert!(
        matches!(&commands[..], [Command::FsdevCreate(fsdev), Command::DeviceStart(device)]
        if fsdev.name == "aio0" && device.name == "vfsdev0")
    );
    for ticket in adopted.missing {
        model.finish_missing(ticket, true);
    }
    assert_eq!(model, running());
}

#[test]
fn an_fsdev_that_cannot_be_made_again_stays_wanted_and_can_be_deleted() {
    let mut model = started();
    for ticket in model.adopt(platform()).missing {
        model.finish_missing(ticket, false);
    }
    assert_eq!(model.adopt(platform()).missing.len(), 1, "not tried again");
    assert_eq!(model.fsdev_delete("aio0", "aio"), Ok(Step::Done));
    assert!(model.adopt(platform()).missing.is_empty());
}

#[test]
fn a_stopped_device_that_a_restarted_data_plane_lacks_is_idle() {
    let mut model = stopped();
    let missing = model.adopt(platform()).missing;
    assert_eq!(missing.len(), 1, "only the fsdev");
    assert_eq!(model.device("vfsdev0").unwrap().state(), DeviceState::Idle);
    assert_eq!(model.device_destroy("vfsdev0"), Ok(Step::Done));
}

#[test]
fn reports_of_the_data_plane_change_what_is_shown() {
    let mut model = running();
    model.event(Event::Connected {
        device: "vfsdev0".to_owned(),
        connected: true,
    });
    model.event(Event::Mounted {
        device: "vfsdev0".to_owned(),
        mounted: true,
    });
    model.event(Event::Mounted {
        device: "unknown".to_owned(),
        mounted: true,
    });
    let live = model.device("vfsdev0").unwrap().live.clone().unwrap();
    assert!(live.connected && live.mounted);
}

#[derive(Clone, Debug)]
pub(super) enum Op {
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

pub(super) fn op() -> impl Strategy<Value = Op> {
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

pub(super) fn apply(model: &mut Model, op: Op) -> Result<(), Failure> {
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
    let queues: u32 = model.devices().iter().map(super::Device::queues).sum();
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
