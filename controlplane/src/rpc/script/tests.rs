use serde_json::Value;
use serde_json::json;

use super::super::cli::Invocation;
use super::*;

fn calls(text: &str) -> Vec<(&'static str, Value)> {
    Script::new(text)
        .map(
            |line| match line.unwrap_or_else(|error| panic!("{error}")).parsed {
                Parsed::Call(Invocation { method, params }) => (method.name, Value::Object(params)),
                Parsed::Help(_) => panic!("help"),
            },
        )
        .collect()
}

fn expected_bring_up(
    vuid: &str,
    tag: &str,
    queue_size: u32,
    root: &str,
) -> Vec<(&'static str, Value)> {
    vec![
        (
            "fsdev_aio_create",
            json!({"name": "aio0", "root_path": root}),
        ),
        (
            "virtio_fs_transport_create",
            json!({"transport_name": "DOCA"}),
        ),
        (
            "virtio_fs_transport_start",
            json!({"transport_name": "DOCA"}),
        ),
        (
            "virtio_fs_device_create",
            json!({
                "transport_name": "DOCA", "dev_name": "vfsdev0", "tag": tag, "fsdev": "aio0",
                "num_request_queues": 1, "queue_size": queue_size, "driver_platform": "x86_64",
            }),
        ),
        (
            "virtio_fs_doca_device_modify",
            json!({"dev_name": "vfsdev0", "manager": "mlx5_0", "vuid": vuid}),
        ),
        ("virtio_fs_device_start", json!({"dev_name": "vfsdev0"})),
    ]
}

#[test]
fn the_guides_init_script_means_the_same_with_and_without_its_broken_lines() {
    let printed = r#"fsdev_aio_create aio0 /etc/virtiofs/test
virtio_fs_transport_create -t DOCA
virtio_fs_transport_start -t DOCA
virtio_fs_device_create --transport-name DOCA --dev-name
vfsdev0 --tag docatag --fsdev aio0 --num-request-queues
1 --queue-size 32 --driver-platform x86_64
virtio_fs_doca_device_modify --dev-name vfsdev0 --
manager mlx5_0 --vuid "MT2251XZ02WZVFSS0D0F3"
virtio_fs_device_start --dev-name vfsdev0
"#;
    let meant = printed
        .replace("--dev-name\nvfsdev0", "--dev-name vfsdev0")
        .replace("-queues\n1", "-queues 1")
        .replace("--\nmanager", "--manager");
    let expected = expected_bring_up("MT2251XZ02WZVFSS0D0F3", "docatag", 32, "/etc/virtiofs/test");
    assert_eq!(calls(printed), expected);
    assert_eq!(calls(&meant), expected);
    assert_eq!(calls(&printed.replace('\n', "\r\n")), expected);
}

#[test]
fn the_guides_configuration_script_means_the_same_with_its_broken_lines() {
    let printed = "\
--plugin rpc_virtio_fs_tgt -v fsdev_aio_create
aio0 /tmp/fsdev-test
--plugin rpc_virtio_fs_tgt -v
virtio_fs_transport_create -t DOCA
--plugin rpc_virtio_fs_tgt -v
virtio_fs_transport_start -t DOCA
--plugin rpc_virtio_fs_tgt -v
virtio_fs_device_create --transport-name DOCA --
dev-name vfsdev0 --tag docatest --fsdev aio0 --
num-request-queues 1 --queue-size 256 --driver-
platform x86_64
--plugin rpc_virtio_fs_tgt -v
virtio_fs_doca_device_modify --dev-name vfsdev0 -
-manager mlx5_0 --vuid MT2306XZ00HKVFSS0D0F4
--plugin rpc_virtio_fs_tgt -v
virtio_fs_device_start --dev-name vfsdev0
save_config -o config.json
";
    let mut expected =
        expected_bring_up("MT2306XZ00HKVFSS0D0F4", "docatest", 256, "/tmp/fsdev-test");
    expected.push(("save_config", json!({"output": "config.json"})));
    assert_eq!(calls(printed), expected);
    let verbose: Vec<bool> = Script::new(printed)
        .map(|line| line.unwrap().verbose)
        .collect();
    assert_eq!(verbose, [true, true, true, true, true, true, false]);
}

#[test]
fn blank_lines_comments_and_quotes_are_those_of_a_shell() {
    let text = "\n# comment\n  \nfsdev_aio_create 'a b' \"/srv/\\\"x\\\"\" # the rest\n";
    assert_eq!(
        calls(text),
        [(
            "fsdev_aio_create",
            json!({"name": "a b", "root_path": "/srv/\"x\""})
        )]
    );
    assert_eq!(
        split(r"a\ b '' c#d"),
        Some(vec!["a b".to_owned(), String::new(), "c#d".to_owned()])
    );
    assert_eq!(split("'open"), None);
    assert_eq!(split("end\\"), None);
}

#[test]
fn a_mistake_is_reported_with_the_line_where_its_command_begins() {
    let mut script =
        Script::new("virtio_fs_get_devices\n\nvirtio_fs_device_start\nvirtio_fs_get_devices\n");
    assert!(script.next().unwrap().is_ok());
    let error = script.next().unwrap().err().unwrap();
    assert_eq!(
        error.to_string(),
        "line 3: virtio_fs_device_start: --dev-name must be given"
    );
    for (text, says) in [
        ("nosuch a b", "nosuch"),
        ("fsdev_aio_create 'x", "quote"),
        ("--plugin x -v", "no method"),
    ] {
        let error = Script::new(text).next().unwrap().err().unwrap();
        assert!(error.to_string().contains(says), "{error}");
    }
}
