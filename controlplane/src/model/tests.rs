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

mod hotplug;
pub(super) mod random;
mod sync;

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
