use proptest::prelude::Just;
use proptest::prelude::Strategy;
use proptest::prelude::any;
use tokio::task::LocalSet;

use super::*;
use crate::app::Phase;
use crate::dataplane::Link;
use crate::dataplane::fake::FakeLink;
use crate::dataplane::fake::VUID;
use crate::test_dir;

/// Runs `work` with a running control plane on a fake data plane.
fn with_app<T>(work: impl AsyncFnOnce(Rc<App>, Rc<FakeLink>) -> T) -> T {
    with_new_app(async |app, link| {
        app.advance(Phase::Running);
        work(app, link).await
    })
}

/// The same with a control plane that waits for the start.
fn with_new_app<T>(work: impl AsyncFnOnce(Rc<App>, Rc<FakeLink>) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        let app = App::new(None);
        let link = FakeLink::new();
        app.connected(Rc::clone(&link) as Rc<dyn Link>)
            .await
            .unwrap();
        work(app, link).await
    })
}

/// The guide's init script, its printed line breaks undone, for the function of the fake platform.
fn init_script() -> String {
    format!(
        "fsdev_aio_create aio0 /etc/virtiofs/test\n\
         virtio_fs_transport_create -t DOCA\n\
         virtio_fs_transport_start -t DOCA\n\
         virtio_fs_device_create --transport-name DOCA --dev-name vfsdev0 --tag docatag --fsdev aio0 \
         --num-request-queues 1 --queue-size 32 --driver-platform x86_64\n\
         virtio_fs_doca_device_modify --dev-name vfsdev0 --manager mlx5_0 --vuid \"{VUID}\"\n\
         virtio_fs_device_start --dev-name vfsdev0\n"
    )
}

#[test]
fn a_configuration_that_was_saved_rebuilds_the_same_state() {
    let dir = test_dir("save");
    let file = dir.join("saved.json");
    let (saved, model) = with_app(async |app, _| {
        let script = format!("{}save_config -o {}\n", init_script(), file.display());
        run_script(&app, &script).await.unwrap();
        (read_file(&file).unwrap(), app.model().clone())
    });
    let methods: Vec<String> = parse(&saved)
        .unwrap()
        .into_iter()
        .map(|entry| entry.method)
        .collect();
    let expected = [
        "framework_set_scheduler",
        "fsdev_set_opts",
        "fsdev_aio_create",
        "virtio_fs_transport_create",
        "virtio_fs_doca_manager_create",
        "virtio_fs_transport_start",
        "virtio_fs_device_create",
        "virtio_fs_doca_device_modify",
        "virtio_fs_device_start",
    ];
    assert_eq!(methods, expected);
    assert_eq!(
        std::fs::read_dir(&*dir).unwrap().count(),
        1,
        "something besides the file is left"
    );
    with_app(async |app, link| {
        let entries = parse(&saved).unwrap();
        apply(&app, &entries, |_| true, false).await.unwrap();
        assert_eq!(link.commands.borrow().len(), 3);
        assert_eq!(app.model().devices(), model.devices());
        assert!(app.model().fsdevs().eq(model.fsdevs()));
        let params = Params::Object(vec![("name".to_owned(), json!("virtio_fs"))]);
        let again = app.call("framework_get_config", &params).await.unwrap();
        let saved: Value = serde_json::from_str(&saved).unwrap();
        assert_eq!(again, saved["subsystems"][3]["config"]);
    });
}

#[test]
fn applying_a_configuration_again_finds_everything_there() {
    with_app(async |app, link| {
        run_script(&app, &init_script()).await.unwrap();
        let sent = link.commands.borrow().len();
        run_script(&app, &init_script()).await.unwrap();
        assert_eq!(link.commands.borrow().len(), sent);
    });
}

#[test]
fn a_failing_entry_stops_unless_failures_are_ignored() {
    let text = r#"{"subsystems": [ // comments are fine
        {"subsystem": "virtio_fs", "config": [
            {"method": "nosuch", "params": {}},
            {"method": "virtio_fs_transport_create", "params": {"transport_name": "DOCA"}} /* here too */
        ]},
        {"subsystem": "off", "config": {"method": "spdk_get_version"}},
        {"subsystem": "none", "config": null}
    ]}"#;
    let entries = parse(text).unwrap();
    assert_eq!(entries.len(), 3);
    with_app(async |app, _| {
        let error = apply(&app, &entries, |when| when == When::Runtime, false)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("nosuch"), "{error}");
        assert!(app.model().transports().is_empty());
        apply(&app, &entries, |when| when == When::Runtime, true)
            .await
            .unwrap();
        assert_eq!(app.model().transports().len(), 1);
    });
}

#[test]
fn configurations_of_another_form_are_refused_with_the_place() {
    for (text, says) in [
        ("{", "JSON"),
        ("{}", "subsystems"),
        (r#"{"subsystems":[{"config":[{"params":{}}]}]}"#, "params"),
        (
            r#"{"subsystems":[{"config":[{"method":"m","params":[]}]}]}"#,
            "object",
        ),
        (r#"{"subsystems":[{"config":5}]}"#, "5"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(says), "{text}: {error}");
    }
    let one =
        parse_subsystem(r#"{"subsystem":"fsdev","config":[{"method":"fsdev_get_opts"}]}"#).unwrap();
    assert_eq!(one.len(), 1);
}

#[test]
fn comments_are_blanked_out_but_not_inside_strings() {
    let text = "{\"a\": \"// \\\" /* x */\", // gone\n\"b\": /* gone */ 1}";
    let value: Value = serde_json::from_str(&without_comments(text)).unwrap();
    assert_eq!(value, json!({"a": "// \" /* x */", "b": 1}));
}

#[test]
fn a_file_is_replaced_whole_or_not_at_all() {
    let dir = test_dir("write");
    let file = dir.join("c.json");
    write_file(&file, "one").unwrap();
    write_file(&file, "two").unwrap();
    assert_eq!(read_file(&file).unwrap(), "two");
    let error = write_file(&dir.join("no/such/dir.json"), "x").unwrap_err();
    assert!(error.to_string().contains("no/such/dir.json"), "{error}");
    assert_eq!(std::fs::read_dir(&*dir).unwrap().count(), 1);
}

#[test]
fn the_script_stops_at_the_first_failure() {
    with_app(async |app, _| {
        let script = "virtio_fs_transport_create -t DOCA\nvirtio_fs_device_start -d d\nvirtio_fs_transport_start -t DOCA\n";
        let error = run_script(&app, script).await.unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("virtio_fs_device_start: No such device"),
            "{error}"
        );
        assert!(!app.model().transports()[0].started);
    });
}

type Request = (&'static str, Value);

fn requests() -> impl Strategy<Value = Vec<Request>> {
    let name = |names: &'static [&'static str]| proptest::sample::select(names);
    let fsdev = move || name(&["f0", "f1", "f2"]);
    let device = move || name(&["d0", "d1", "d2"]);
    let transport = move || name(&["DOCA", "VHOST_USER"]);
    let aio = (fsdev(), any::<bool>(), 4096..262_144u32, any::<u32>(), name(&["inline", "offload", "auto"])).prop_map(
        |(name, flag, size, number, metadata)| {
            let mut params = json!({"name": name, "root_path": "/srv/\"ä b\"", "enable_xattr": flag, "skip_rw": !flag,
                "max_xfer_size": size, "max_readahead": number, "metadata": metadata, "read_only": flag});
            if flag {
                params["cache"] = json!("always");
                params["map_uid"] = json!("0:100000:65536,70000:5:1");
                params["squash"] = json!("root");
                params["anon_uid"] = json!(number / 2);
                params["xattr_map"] = json!("trusted.=user.g.trusted.,security.=!");
            } else {
                params["attr_valid_ms"] = json!(number);
            }
            ("fsdev_aio_create", params)
        },
    );
    let create = (transport(), device(), any::<bool>(), 1..255u32, 3..9u32).prop_map(
        |(transport, device, flag, queues, size)| {
            let mut params = json!({"transport_name": transport, "dev_name": device, "packed_vq": flag,
                "notification_vq": !flag, "num_request_queues": queues, "queue_size": 1 << size,
                "driver_platform": if flag { "aarch64" } else { "native" }});
            if flag {
                params["tag"] = json!(format!("tag {device}"));
                params["fsdev"] = json!("f0");
            }
            ("virtio_fs_device_create", params)
        },
    );
    let modify = (
        device(),
        proptest::option::of(name(&["mlx5_0", "mlx5_7"])),
        any::<bool>(),
    )
        .prop_map(|(device, manager, known)| {
            let mut params = json!({"dev_name": device, "vuid": if known { VUID } else { "MT0" }});
            if let Some(manager) = manager {
                params["manager"] = json!(manager);
            }
            ("virtio_fs_doca_device_modify", params)
        });
    let with =
        |method: &'static str, key: &'static str| move |name: &str| (method, json!({key: name}));
    let one = proptest::prop_oneof![
        3 => aio,
         1 => fsdev().prop_map(with("fsdev_null_create", "name")),
         1 => fsdev().prop_map(with("fsdev_aio_delete", "name")),
         2 => (fsdev(), fsdev()).prop_map(|(name, base)| ("fsdev_passthru_ext_create",
            json!({"name": name, "base_fsdev_name": base}))),
         1 => fsdev().prop_map(with("fsdev_passthru_ext_delete", "name")),
         1 => Just(("framework_set_scheduler", json!({"name": "static"}))),
         1 => (10_000..2_000_000u64, 0..101u8).prop_map(|(period, limit)| ("framework_set_scheduler",
            json!({"name": "dynamic", "period": period, "core_limit": limit}))),
         1 => (1..1000u32).prop_map(|cache| ("fsdev_set_opts",
            json!({"fsdev_io_pool_size": cache * 2, "fsdev_io_cache_size": cache}))),
        4 => transport().prop_map(with("virtio_fs_transport_create", "transport_name")),
        4 => transport().prop_map(with("virtio_fs_transport_start", "transport_name")),
         1 => transport().prop_map(with("virtio_fs_transport_stop", "transport_name")),
         1 => transport().prop_map(with("virtio_fs_transport_destroy", "transport_name")),
         1 => Just(("virtio_fs_doca_manager_create", json!({"manager": "mlx5_0"}))),
         1 => Just(("virtio_fs_doca_manager_destroy", json!({"manager": "mlx5_0"}))),
        5 => create,
        3 => modify,
        4 => device().prop_map(with("virtio_fs_device_start", "dev_name")),
         1 => device().prop_map(with("virtio_fs_device_stop", "dev_name")),
         1 => device().prop_map(with("virtio_fs_device_destroy", "dev_name")),
    ];
    proptest::collection::vec(one, 0..50)
}

/// What can be asked for before the start only.
fn early_requests() -> impl Strategy<Value = Vec<Request>> {
    let pools = (60..100_000u64, 1..100_000u64).prop_map(|(slots, buffers)| {
        (
            "iobuf_set_options",
            json!({"small_pool_count": slots, "large_pool_count": buffers}),
        )
    });
    proptest::collection::vec(pools, 0..2)
}

/// Makes requests; refusals are part of the game.
async fn play(app: &Rc<App>, requests: Vec<Request>) {
    for (method, params) in requests {
        let Value::Object(params) = params else {
            unreachable!("all are objects")
        };
        let _ = app.call(method, &Params::from(params)).await;
    }
}

proptest::proptest! {
    #[test]
    fn saving_loading_and_saving_again_gives_the_same_text(early in early_requests(), requests in requests()) {
        let saved = with_new_app(async |app, _| {
            play(&app, early).await;
            app.start_init().await.unwrap();
            play(&app, requests).await;
            render(&collect(&app).await.unwrap(), 2)
        });
        let again = with_new_app(async |app, _| {
            let entries = parse(&saved).unwrap();
            apply(&app, &entries, |when| when != When::Runtime, false).await.unwrap();
            app.start_init().await.unwrap();
            apply(&app, &entries, |when| when == When::Runtime, false).await.unwrap();
            render(&collect(&app).await.unwrap(), 2)
        });
        assert_eq!(again, saved);
    }
}
