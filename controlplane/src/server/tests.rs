use std::io::ErrorKind;

use ferry_shared::msg::Command;
use ferry_shared::msg::Event;
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
        app.start_init();
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
fn unknown_forbidden_and_disabled_methods_do_not_exist() {
    let app = App::new(Some(
        ["rpc_get_methods", "virtio_fs_get_devices"]
            .map(str::to_owned)
            .to_vec(),
    ));
    with_app("allowed", app, async |app, _, path| {
        app.start_init();
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
        app.start_init();
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
        app.start_init();
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
        app.start_init();
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
        app.start_init();
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
