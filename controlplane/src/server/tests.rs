use std::io::ErrorKind;

use ferry_shared::msg::Command;
use ferry_shared::msg::Event;
use ferry_shared::msg::PoolSpec;
use ferry_shared::msg::Scheduler;
use serde_json::Value;
use tokio::io::AsyncBufReadExt;
use tokio::io::AsyncWriteExt;
use tokio::io::BufReader;
use tokio::task::LocalSet;

use super::*;
use crate::app::Phase;
use crate::dataplane::fake::FakeLink;
use crate::dataplane::fake::VUID;
use crate::test_dir;

type Client = BufReader<UnixStream>;

async fn client(path: &Path) -> Client {
    BufReader::new(UnixStream::connect(path).await.unwrap())
}

async fn send(client: &mut Client, text: &str) {
    client.get_mut().write_all(text.as_bytes()).await.unwrap();
}

async fn response(client: &mut Client) -> Value {
    let mut line = String::new();
    client.read_line(&mut line).await.unwrap();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
}

async fn ask(client: &mut Client, method: &str, params: &str) -> Value {
    send(
        client,
        &format!("{{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"{method}\",\"params\":{params}}}"),
    )
    .await;
    response(client).await
}

/// Runs `work` against a server with a fake data plane.
fn with_server<T>(name: &str, work: impl AsyncFnOnce(Rc<App>, Rc<FakeLink>, &Path) -> T) -> T {
    with_app(name, App::new(None), work)
}

fn with_app<T>(
    name: &str,
    app: Rc<App>,
    work: impl AsyncFnOnce(Rc<App>, Rc<FakeLink>, &Path) -> T,
) -> T {
    let dir = test_dir(name);
    let path = dir.join("rpc.sock");
    let endpoint = Endpoint::bind(&path, 0o600, None).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        let link = FakeLink::new();
        app.connected(Rc::clone(&link) as Rc<dyn crate::dataplane::Link>)
            .await
            .unwrap();
        tokio::select! {
            served = endpoint.serve(Rc::clone(&app), &[]) => panic!("{served:?}"),
            result = work(Rc::clone(&app), link, &path) => result,
        }
    })
}

#[test]
fn pipelined_and_fragmented_requests_are_answered_in_their_order() {
    with_server("pipeline", async |app, _, path| {
        app.advance(Phase::Running);
        let mut client = client(path).await;
        let requests = r#"{"id":1,"method":"virtio_fs_transport_create","params":{"transport_name":"DOCA"}}
            {"id":2,"method":"virtio_fs_transport_start","params":{"transport_name":"DOCA"}}{"id":3,"method":"virtio_fs_get_transports"}"#;
        for piece in requests.as_bytes().chunks(7) {
            client.get_mut().write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
        }
        for id in 1..=2 {
            let response = response(&mut client).await;
            assert_eq!(
                (&response["id"], &response["result"]),
                (&Value::from(id), &Value::from(true))
            );
        }
        let listed = response(&mut client).await;
        assert_eq!(listed["result"][0]["state"], "started");
        assert_eq!(listed["result"][0]["managers"][0]["name"], "mlx5_0");
    });
}

#[test]
fn malformed_json_is_answered_and_ends_the_connection() {
    with_server("malformed", async |_, _, path| {
        let mut client = client(path).await;
        send(&mut client, "{\"id\":1,\"method\":5}{\"id\":1,}").await;
        assert_eq!(response(&mut client).await["error"]["code"], -32600);
        assert_eq!(response(&mut client).await["error"]["code"], -32700);
        let mut rest = String::new();
        assert_eq!(client.read_line(&mut rest).await.unwrap(), 0, "{rest}");
    });
}

#[test]
fn the_65th_connection_waits_until_another_one_ends() {
    with_server("connections", async |_, _, path| {
        let mut clients = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            let mut client = client(path).await;
            assert!(ask(&mut client, "spdk_get_version", "null").await["error"].is_null());
            clients.push(client);
        }
        let mut waiting = client(path).await;
        send(&mut waiting, "{\"id\":1,\"method\":\"spdk_get_version\"}").await;
        // A whole exchange on another connection leaves it time enough, if it were served.
        ask(&mut clients[0], "rpc_get_methods", "null").await;
        let mut byte = [0];
        let early = waiting.get_ref().try_read(&mut byte);
        assert_eq!(early.unwrap_err().kind(), ErrorKind::WouldBlock);
        clients.pop();
        assert_eq!(response(&mut waiting).await["id"], 1);
    });
}

#[test]
fn states_are_kept_apart_and_waiting_for_the_start_is_overtaken() {
    with_server("states", async |app, _, path| {
        let mut client = client(path).await;
        let early = ask(&mut client, "virtio_fs_get_devices", "null").await;
        let text = "Method may only be called after framework is initialized using framework_start_init RPC.";
        assert_eq!(early["error"]["code"], -1);
        assert_eq!(early["error"]["message"], text);
        send(&mut client, "{\"id\":7,\"method\":\"framework_wait_init\"}").await;
        assert_eq!(
            ask(&mut client, "framework_start_init", "null").await["result"],
            true
        );
        app.advance(Phase::Ready);
        assert_eq!(response(&mut client).await["id"], 7);
        let late = ask(&mut client, "framework_start_init", "null").await;
        assert!(
            late["error"]["message"]
                .as_str()
                .unwrap()
                .starts_with("Method may only be called before framework")
        );
    });
}

#[test]
fn a_client_that_writes_no_more_still_gets_what_it_waits_for() {
    with_server("half", async |app, _, path| {
        let mut client = client(path).await;
        send(&mut client, "{\"id\":7,\"method\":\"framework_wait_init\"}").await;
        client.get_mut().shutdown().await.unwrap();
        // The server has seen the end when a later client has been answered.
        let mut other = self::client(path).await;
        ask(&mut other, "spdk_get_version", "null").await;
        app.advance(Phase::Ready);
        assert_eq!(response(&mut client).await["id"], 7);
        assert_eq!(client.read_line(&mut String::new()).await.unwrap(), 0);
    });
}

/// A control plane that has a state and waits for the start.
fn restored() -> Rc<App> {
    let app = App::new(None);
    let state = serde_json::json!({
        "options": {"fsdev_io_pool_size": 1000, "fsdev_io_cache_size": 10},
        "fsdevs": [{"name": "f", "kind": {"null": {}}}],
        "transports": [{"name": "VHOST_USER", "started": true}],
        "managers": [],
        "devices": [{"name": "d", "transport": "VHOST_USER", "state": "running", "tag": "t", "fsdev": "f",
            "num_request_queues": 1, "queue_size": 64, "packed_vq": false, "notification_vq": false,
            "driver_platform": "native", "manager": null, "vuid": null}],
        "wishes": {"small_pool_count": 4096, "scheduler": {"dynamic":
            {"period_us": 100000, "load_limit": 20, "core_limit": 80, "core_busy": 95}}},
    });
    app.restore(serde_json::from_value(state).unwrap()).unwrap();
    app
}

#[test]
fn nothing_that_is_kept_is_issued_before_the_start_and_everything_before_its_answer() {
    with_app("held", restored(), async |_, link, path| {
        assert_eq!(*link.commands.borrow(), []);
        let mut client = client(path).await;
        let started = ask(&mut client, "framework_start_init", "null").await;
        assert_eq!(started["result"], true);
        let issued = link.commands.borrow().clone();
        let [pools, scheduler, fsdev, device] = issued.as_slice() else {
            panic!("{issued:?}")
        };
        let wanted = PoolSpec {
            slots: 4096,
            buffers: 32,
        };
        assert_eq!(*pools, Command::SetPools(wanted));
        let Command::SetScheduler(Scheduler::Dynamic(balance)) = scheduler else {
            panic!("{scheduler:?}")
        };
        assert_eq!(balance.period_us, 100_000);
        assert!(matches!(fsdev, Command::FsdevCreate(spec) if spec.name == "f"));
        assert!(matches!(device, Command::DeviceStart(spec) if spec.name == "d"));
        let devices = ask(&mut client, "virtio_fs_get_devices", "null").await;
        assert_eq!(devices["result"][0]["state"], "running");
    });
}

#[test]
fn what_is_kept_of_a_disabled_subsystem_is_not_issued() {
    with_app("disabled", restored(), async |app, link, path| {
        let mut client = client(path).await;
        let disable = r#"{"name":"virtio_fs"}"#;
        let disabled = ask(&mut client, "framework_disable_subsystem", disable).await;
        assert_eq!(disabled["result"], true);
        ask(&mut client, "framework_start_init", "null").await;
        let device = |command: &Command| matches!(command, Command::DeviceStart(_));
        assert!(!link.commands.borrow().iter().any(device));
        let unknown = ask(&mut client, "virtio_fs_get_devices", "null").await;
        assert_eq!(unknown["error"]["code"], -32601);
        // It is kept all the same, for a start with the subsystem.
        assert_eq!(app.model().stored().devices.len(), 1);
    });
}

#[test]
fn a_start_while_there_is_no_data_plane_leaves_everything_to_its_coming() {
    with_app("late", restored(), async |app, link, path| {
        app.disconnected("gone".to_owned());
        let mut client = client(path).await;
        let started = ask(&mut client, "framework_start_init", "null").await;
        assert_eq!(started["result"], true);
        assert_eq!(*link.commands.borrow(), []);
        app.connected(Rc::clone(&link) as Rc<dyn crate::dataplane::Link>)
            .await
            .unwrap();
        assert_eq!(link.commands.borrow().len(), 4);
    });
}

#[test]
fn options_of_the_pools_are_refused_with_the_codes_of_the_original() {
    with_server("iobuf", async |app, link, path| {
        let mut client = client(path).await;
        for (params, code) in [
            (r#"{"small_pool_count":1}"#, -22),
            (r#"{"large_pool_count":7}"#, -22),
            (r#"{"large_pool_count":4294967296}"#, -22),
            (r#"{"small_bufsize":16384}"#, -22),
            (r#"{"large_bufsize":262144}"#, -22),
            (r#"{"enable_numa":true}"#, -95),
            (r#"{"bogus":1}"#, -32602),
        ] {
            let refused = ask(&mut client, "iobuf_set_options", params).await;
            assert_eq!(refused["error"]["code"], code, "{params}: {refused}");
        }
        let refusal = Failure::new(FailureCode::ENOMEM, "too much");
        *link.refusal.borrow_mut() = Some(refusal);
        let refused = ask(
            &mut client,
            "iobuf_set_options",
            r#"{"large_pool_count":8}"#,
        )
        .await;
        assert_eq!(refused["error"]["code"], -12);
        assert_eq!(app.model().wishes(), crate::model::Wishes::default());
        link.commands.borrow_mut().clear();
        let all = r#"{"small_pool_count":8192,"large_pool_count":1024,"small_bufsize":8192,"large_bufsize":135168}"#;
        assert_eq!(
            ask(&mut client, "iobuf_set_options", all).await["result"],
            true
        );
        let pools = PoolSpec {
            slots: 8192,
            buffers: 1024,
        };
        assert_eq!(*link.commands.borrow(), [Command::SetPools(pools)]);
        app.advance(Phase::Running);
        let late = ask(&mut client, "iobuf_set_options", all).await;
        assert_eq!(late["error"]["code"], -1);
        let config = ask(&mut client, "framework_get_config", r#"{"name":"iobuf"}"#).await;
        assert_eq!(config["result"][0]["params"]["large_pool_count"], 1024);
    });
}

#[test]
fn a_scheduler_is_refused_by_its_name_and_its_numbers_and_the_old_one_stays() {
    with_server("scheduler", async |app, link, path| {
        let mut client = client(path).await;
        for (params, code) in [
            (r#"{"name":"gscheduler"}"#, -32603),
            (r#"{"name":"dynamic","load_limit":101}"#, -32602),
            (r#"{"name":"dynamic","core_limit":300}"#, -32602),
            (r#"{"name":"dynamic","period":1}"#, -32602),
            (r#"{"period":1000000}"#, -32602),
        ] {
            let refused = ask(&mut client, "framework_set_scheduler", params).await;
            assert_eq!(refused["error"]["code"], code, "{params}: {refused}");
        }
        assert_eq!(*link.commands.borrow(), []);
        assert_eq!(app.model().wishes(), crate::model::Wishes::default());
        let dynamic = r#"{"name":"dynamic","period":50000}"#;
        assert_eq!(
            ask(&mut client, "framework_set_scheduler", dynamic).await["result"],
            true
        );
        assert!(
            matches!(*link.commands.borrow(), ref sent if matches!(sent[..], [Command::SetScheduler(_)]))
        );
    });
}

#[test]
fn trace_points_are_turned_on_and_off_by_group_and_by_mask() {
    with_server("trace", async |_, link, path| {
        let mut client = client(path).await;
        let group = |number| ferry_shared::trace::group_mask(number);
        for (method, params, on) in [
            ("trace_enable_tpoint_group", r#"{"name":"fuse"}"#, group(1)),
            (
                "trace_set_tpoint_mask",
                r#"{"name":"virtio","tpoint_mask":3}"#,
                group(1) | 3,
            ),
            (
                "trace_clear_tpoint_mask",
                r#"{"name":"virtio","tpoint_mask":1}"#,
                group(1) | 2,
            ),
            (
                "trace_set_tpoint_mask",
                r#"{"name":"reactor"}"#,
                group(1) | 2 | group(3),
            ),
            (
                "trace_disable_tpoint_group",
                r#"{"name":"fuse"}"#,
                2 | group(3),
            ),
        ] {
            assert_eq!(
                ask(&mut client, method, params).await["result"],
                true,
                "{method}"
            );
            assert_eq!(link.traced.get(), on, "{method} {params}");
        }
        let masks = ask(&mut client, "trace_get_tpoint_group_mask", "null").await;
        assert_eq!(masks["result"]["tpoint_group_mask"], "0x9");
        assert_eq!(masks["result"]["virtio"]["tpoint_mask"], "0x2");
        assert_eq!(masks["result"]["fuse"]["enabled"], false);
        for (method, params) in [
            ("trace_enable_tpoint_group", r#"{"name":"nosuch"}"#),
            (
                "trace_set_tpoint_mask",
                r#"{"name":"fuse","tpoint_mask":32}"#,
            ),
            ("trace_get_info", "{}"),
        ] {
            let refused = ask(&mut client, method, params).await;
            assert_eq!(refused["error"]["code"], -32602, "{method}: {refused}");
            assert_eq!(link.traced.get(), 2 | group(3));
        }
        ask(
            &mut client,
            "trace_disable_tpoint_group",
            r#"{"name":"all"}"#,
        )
        .await;
        assert_eq!(link.traced.get(), 0);
    });
}

#[test]
fn an_fsdev_that_hands_on_keeps_the_one_below_it() {
    with_server("passthru", async |app, _, path| {
        app.advance(Phase::Running);
        let mut client = client(path).await;
        let create = r#"{"name":"p","base_fsdev_name":"f"}"#;
        let early = ask(&mut client, "fsdev_passthru_ext_create", create).await;
        assert_eq!(early["error"]["code"], -19);
        ask(&mut client, "fsdev_null_create", r#"{"name":"f"}"#).await;
        let created = ask(&mut client, "fsdev_passthru_ext_create", create).await;
        assert_eq!(created["result"], "p");
        let again = ask(&mut client, "fsdev_passthru_ext_create", create).await;
        assert_eq!(again["error"]["code"], -17);
        let listed = ask(&mut client, "fsdev_get_fsdevs", r#"{"name":"p"}"#).await;
        assert_eq!(listed["result"]["module_name"], "passthru_external");
        let specific = &listed["result"]["module_specific"]["passthru_external"];
        assert_eq!(specific["base_fsdev_name"], "f");
        let busy = ask(&mut client, "fsdev_null_delete", r#"{"name":"f"}"#).await;
        assert_eq!(busy["error"]["code"], -16);
        for (method, params) in [
            ("fsdev_passthru_ext_delete", r#"{"name":"p"}"#),
            ("fsdev_null_delete", r#"{"name":"f"}"#),
        ] {
            assert_eq!(
                ask(&mut client, method, params).await["result"],
                true,
                "{method}"
            );
        }
    });
}

#[test]
fn unknown_forbidden_and_disabled_methods_do_not_exist() {
    let app = App::new(Some(
        ["rpc_get_methods", "virtio_fs_get_devices"]
            .map(str::to_owned)
            .to_vec(),
    ));
    with_app("allowed", app, async |app, _, path| {
        app.advance(Phase::Running);
        let mut client = client(path).await;
        for method in ["nosuch", "save_config", "spdk_get_version"] {
            let response = ask(&mut client, method, "null").await;
            assert_eq!(response["error"]["code"], -32601, "{method}");
            let message = response["error"]["message"].as_str().unwrap();
            assert!(
                message.starts_with("Method not found") && message.contains(method),
                "{message}"
            );
        }
        let listed = ask(&mut client, "rpc_get_methods", "null").await;
        assert_eq!(
            listed["result"],
            serde_json::json!(["rpc_get_methods", "virtio_fs_get_devices"])
        );
    });
    with_server("disabled", async |app, _, path| {
        let mut client = client(path).await;
        let parent = ask(
            &mut client,
            "framework_disable_subsystem",
            r#"{"name":"fsdev"}"#,
        )
        .await;
        assert_eq!(
            parent["error"]["message"],
            "Subsystem Parent 'virtio_fs' is enabled"
        );
        assert_eq!(
            ask(
                &mut client,
                "framework_disable_subsystem",
                r#"{"name":"virtio_fs"}"#
            )
            .await["result"],
            true
        );
        app.advance(Phase::Running);
        assert_eq!(
            ask(&mut client, "virtio_fs_get_devices", "null").await["error"]["code"],
            -32601
        );
        assert_eq!(
            ask(&mut client, "fsdev_get_fsdevs", "null").await["result"],
            serde_json::json!([])
        );
        let config = ask(
            &mut client,
            "framework_get_config",
            r#"{"name":"virtio_fs"}"#,
        )
        .await;
        assert_eq!(config["result"][0]["method"], "framework_disable_subsystem");
    });
}

#[test]
fn the_guides_bring_up_and_tear_down_reach_the_data_plane() {
    with_server("bringup", async |app, link, path| {
        app.advance(Phase::Running);
        let mut client = client(path).await;
        let create = r#"{"transport_name":"DOCA","dev_name":"vfsdev0","tag":"docatag","fsdev":"aio0",
            "num_request_queues":8,"queue_size":256,"driver_platform":"x86_64"}"#;
        let function = format!(r#"{{"dev_name":"vfsdev0","manager":"mlx5_0","vuid":"{VUID}"}}"#);
        let steps = [
            (
                "fsdev_aio_create",
                r#"{"name":"aio0","root_path":"/etc/virtiofs"}"#,
            ),
            ("virtio_fs_transport_create", r#"{"transport_name":"DOCA"}"#),
            ("virtio_fs_doca_manager_create", r#"{"manager":"mlx5_0"}"#),
            ("virtio_fs_transport_start", r#"{"transport_name":"DOCA"}"#),
            ("virtio_fs_device_create", create),
            ("virtio_fs_doca_device_modify", &function),
            ("virtio_fs_device_start", r#"{"dev_name":"vfsdev0"}"#),
        ];
        for (method, params) in steps {
            let response = ask(&mut client, method, params).await;
            assert!(response.get("error").is_none(), "{method}: {response}");
        }
        let device = ask(&mut client, "virtio_fs_get_devices", "null").await["result"][0].take();
        let expected = serde_json::json!({
            "name": "vfsdev0", "transport_name": "DOCA", "state": "running", "fsdev": "aio0", "tag": "docatag",
            "queue_size": 256, "num_request_queues": 8, "packed_ring": false, "notification_vq": false,
            "driver_platform": "x86_64", "manager": "mlx5_0", "vuid": VUID,
            "socket": format!("/run/ferry/pci/{VUID}.sock"), "connected": false, "mounted": false,
        });
        assert_eq!(device, expected);
        let functions =
            ask(&mut client, "virtio_fs_doca_get_functions", "null").await["result"][0].take();
        let expected = serde_json::json!({"manager": "mlx5_0", "Function List": [{
            "hot pluggable": "false", "pci_address": "0000:29:00.2", "vuid": VUID, "function_type": "PF",
            "socket": format!("/run/ferry/pci/{VUID}.sock"), "device": "vfsdev0",
        }]});
        assert_eq!(functions, expected);
        for (method, params) in [
            ("virtio_fs_device_stop", r#"{"dev_name":"vfsdev0"}"#),
            ("virtio_fs_device_destroy", r#"{"dev_name":"vfsdev0"}"#),
            ("virtio_fs_transport_stop", r#"{"transport_name":"DOCA"}"#),
            ("virtio_fs_doca_manager_destroy", r#"{"manager":"mlx5_0"}"#),
            (
                "virtio_fs_transport_destroy",
                r#"{"transport_name":"DOCA"}"#,
            ),
            ("fsdev_aio_delete", r#"{"name":"aio0"}"#),
        ] {
            assert_eq!(
                ask(&mut client, method, params).await["result"],
                true,
                "{method}"
            );
        }
        assert_eq!(link.commands.borrow().len(), 5);
    });
}

#[test]
fn refusals_of_the_data_plane_reach_the_client_with_the_codes_of_their_methods() {
    use ferry_shared::errno::Errno as E;
    use ferry_shared::msg::Failure;
    with_server("refusals", async |app, link, path| {
        app.advance(Phase::Running);
        let mut client = client(path).await;
        link.refusal.replace(Some(Failure::new(
            E::ENOENT,
            "root_path /nosuch of fsdev a",
        )));
        let refused = ask(
            &mut client,
            "fsdev_aio_create",
            r#"{"name":"a","root_path":"/nosuch"}"#,
        )
        .await;
        assert_eq!(refused["error"]["code"], -32603);
        assert_eq!(
            refused["error"]["message"],
            "No such file or directory: root_path /nosuch of fsdev a"
        );
        ask(
            &mut client,
            "fsdev_aio_create",
            r#"{"name":"a","root_path":"/"}"#,
        )
        .await;
        let again = ask(
            &mut client,
            "fsdev_aio_create",
            r#"{"name":"a","root_path":"/"}"#,
        )
        .await;
        assert_eq!(again["error"]["code"], -32603);
        assert_eq!(
            again["error"]["message"],
            "File exists: fsdev a already exists"
        );
        link.refusal.replace(Some(Failure::new(
            E::EBUSY,
            "fsdev a is mounted by device d",
        )));
        let refused = ask(&mut client, "fsdev_aio_delete", r#"{"name":"a"}"#).await;
        assert_eq!(refused["error"]["code"], -16);
        assert_eq!(
            refused["error"]["message"],
            "Device or resource busy: fsdev a is mounted by device d"
        );
        let unknown = ask(&mut client, "fsdev_get_fsdevs", r#"{"name":"b"}"#).await;
        assert_eq!(unknown["error"]["code"], -19);
        let one = ask(&mut client, "fsdev_get_fsdevs", r#"{"name":"a"}"#).await;
        assert_eq!(
            one["result"]["module_specific"]["enable_writeback_cache"],
            false
        );
    });
}

#[test]
fn a_socket_in_use_is_refused_and_a_stale_one_is_replaced() {
    let dir = test_dir("socket");
    let path = dir.join("rpc.sock");
    let first = Endpoint::bind(&path, 0o640, None).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o640);
    assert_eq!(mode(&dir.join("rpc.sock.lock")), 0o600);
    let refused = Endpoint::bind(&path, 0o600, None).unwrap_err();
    assert!(matches!(refused, BindError::Locked(..)), "{refused}");
    assert!(
        refused.to_string().contains(path.to_str().unwrap()),
        "{refused}"
    );
    drop(first);
    assert!(!path.exists() && !dir.join("rpc.sock.lock").exists());

    // Left behind by a process that was killed.
    drop(StdListener::bind(&path).unwrap());
    drop(Endpoint::bind(&path, 0o600, None).unwrap());

    let foreign = StdListener::bind(&path).unwrap();
    let refused = Endpoint::bind(&path, 0o600, None).unwrap_err();
    assert!(matches!(refused, BindError::InUse(_)), "{refused}");
    drop(foreign);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    let refused = Endpoint::bind(&path, 0o600, None).unwrap_err();
    assert!(matches!(refused, BindError::NotASocket(_)), "{refused}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn the_log_is_set_in_both_processes_and_again_in_a_data_plane_that_comes_later() {
    with_server("log", async |app, link, path| {
        let mut client = client(path).await;
        let level = ask(&mut client, "log_get_level", "null").await;
        assert_eq!(level["result"], "NOTICE");
        let set = ask(&mut client, "log_set_level", r#"{"level":"info"}"#).await;
        assert_eq!(set["result"], true);
        let set = ask(&mut client, "log_set_flag", r#"{"flag":"v*"}"#).await;
        assert_eq!(set["result"], true);
        let flags = ask(&mut client, "log_get_flags", "null").await;
        assert_eq!(flags["result"]["virtio_fs"], true);
        assert_eq!(flags["result"]["fsdev"], false);
        let last = link.commands.borrow().last().cloned();
        let Some(Command::SetLog(spec)) = &last else {
            panic!("{last:?}")
        };
        assert_eq!(spec.flags, ["vfio_user", "vhost_user", "virtio_fs"]);
        let later = FakeLink::new();
        app.connected(Rc::clone(&later) as Rc<dyn crate::dataplane::Link>)
            .await
            .unwrap();
        assert_eq!(later.commands.borrow().last().cloned(), last);
        for (method, params, code) in [
            ("log_set_level", r#"{"level":"LOUD"}"#, -32602),
            ("log_set_level", "{}", -32603),
            ("log_set_flag", r#"{"flag":"nosuch"}"#, -32602),
        ] {
            let refused = ask(&mut client, method, params).await;
            assert_eq!(
                refused["error"]["code"], code,
                "{method} {params}: {refused}"
            );
        }
    });
}

#[test]
fn what_happens_is_notified() {
    with_server("notify", async |app, _, path| {
        app.advance(Phase::Running);
        let mut client = client(path).await;
        for (method, params) in [
            ("fsdev_null_create", r#"{"name":"f"}"#),
            (
                "virtio_fs_transport_create",
                r#"{"transport_name":"VHOST_USER"}"#,
            ),
            (
                "virtio_fs_transport_start",
                r#"{"transport_name":"VHOST_USER"}"#,
            ),
            (
                "virtio_fs_device_create",
                r#"{"transport_name":"VHOST_USER","dev_name":"d","tag":"t","fsdev":"f"}"#,
            ),
            ("virtio_fs_device_start", r#"{"dev_name":"d"}"#),
        ] {
            let done = ask(&mut client, method, params).await;
            assert!(done.get("result").is_some(), "{done}");
        }
        app.event(Event::Mounted {
            device: "d".to_owned(),
            mounted: true,
        });
        let listed = ask(&mut client, "notify_get_notifications", r#"{"id":1}"#).await;
        let types = ask(&mut client, "notify_get_types", "null").await;
        let listed: Vec<(&str, &str)> = listed["result"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| {
                let types = types["result"].as_array().unwrap();
                assert!(types.contains(&one["type"]), "{one}");
                (one["type"].as_str().unwrap(), one["ctx"].as_str().unwrap())
            })
            .collect();
        let expected = [
            ("fsdev_register", "f"),
            ("virtio_fs_device_start", "d"),
            ("virtio_fs_mount", "d"),
        ];
        assert_eq!(listed, expected);
    });
}
