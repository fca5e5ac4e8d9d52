//! The original target's own client, unmodified: its `spdk-rpc` command and its Python library drive the service.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Rigs, Service, ServiceConfig, binary, need};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Runs a command line of the client that must succeed; gives what it prints.
fn spdk_rpc(socket: &Path, line: &str) -> Result<String> {
    let output = Command::new(Rigs::python_client("spdk-rpc")?)
        .arg("-s")
        .arg(socket)
        .args(line.split(' '))
        .output()
        .context("run spdk-rpc")?;
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr),
    );
    ensure!(output.status.success(), "spdk-rpc {line}: {out}{err}");
    Ok(out)
}

fn json_of(socket: &Path, line: &str) -> Result<Value> {
    let out = spdk_rpc(socket, line)?;
    serde_json::from_str(&out).with_context(|| format!("spdk-rpc {line}: {out}"))
}

fn clients_are_there() -> Result<()> {
    binary("ferry")?;
    Rigs::python_client("spdk-rpc").map(drop)
}

/// A service that waits for `framework_start_init`.
fn waiting_service() -> Result<Service> {
    Service::start_with(&ServiceConfig {
        args: vec!["--wait-for-rpc".to_owned()],
        ..ServiceConfig::default()
    })
}

/// What the library knows no command line for: any method, with its parameters by name.
const BRING_UP: &str = "
import json, sys
from spdk.rpc.client import JSONRPCClient, JSONRPCException
client = JSONRPCClient(sys.argv[1])
client.virtio_fs_transport_create(transport_name='DOCA')
manager = client.virtio_fs_doca_get_possible_managers()[0]['name']
client.virtio_fs_doca_manager_create(manager=manager)
client.virtio_fs_transport_start(transport_name='DOCA')
vuid = client.virtio_fs_doca_get_functions()[0]['Function List'][0]['vuid']
client.virtio_fs_device_create(transport_name='DOCA', dev_name='vfsdev0', tag='docatag', fsdev='aio0',
                               num_request_queues=8, queue_size=256, driver_platform='x86_64')
client.virtio_fs_doca_device_modify(dev_name='vfsdev0', manager=manager, vuid=vuid)
client.virtio_fs_device_start(dev_name='vfsdev0')
try:
    client.virtio_fs_device_start(dev_name='vfsdev0')
    sys.exit('started twice')
except JSONRPCException as refusal:
    assert 'vfsdev0' in refusal.message and '-114' in refusal.message, refusal.message
print(json.dumps(client.virtio_fs_get_devices()))
";

fn bring_up(socket: &Path) -> Result<Value> {
    let output = Command::new(Rigs::python_client("python3")?)
        .args(["-c", BRING_UP])
        .arg(socket)
        .output()?;
    let err = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "the bring-up failed: {err}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

#[test]
fn the_originals_client_brings_a_device_up_saves_it_and_loads_it_elsewhere() {
    need!(clients_are_there());
    if let Err(error) = save_and_load() {
        panic!("{error:#}");
    }
}

fn save_and_load() -> Result<()> {
    let mut first = waiting_service()?;
    let export = first.dir().make_dir("export");
    let socket = first.rpc_socket().to_owned();
    spdk_rpc(&socket, "fsdev_set_opts 4096 128")?;
    spdk_rpc(&socket, "framework_start_init")?;
    spdk_rpc(&socket, "framework_wait_init")?;
    let create = format!(
        "fsdev_aio_create aio0 {} --xattr --no-writeback-cache -w 65536",
        export.display()
    );
    ensure!(
        spdk_rpc(&socket, &create)?.trim().trim_matches('"') == "aio0",
        "no name"
    );
    let opts = json_of(&socket, "fsdev_get_opts")?;
    ensure!(
        opts == json!({"fsdev_io_pool_size": 4096, "fsdev_io_cache_size": 128}),
        "{opts}"
    );
    let devices = bring_up(&socket)?;
    ensure!(devices[0]["state"] == "running", "{devices}");

    let saved = spdk_rpc(&socket, "save_config")?;
    let ours = first.rpc("save_config")?;
    ensure!(ours.out == saved, "{}\nis not\n{saved}", ours.out);
    let file = first.dir().join("saved.json");
    fs::write(&file, &saved)?;
    let one = json_of(&socket, "save_subsystem_config -n fsdev")?;
    ensure!(
        one["subsystem"] == "fsdev" && one["config"][0]["method"] == "fsdev_set_opts",
        "{one}"
    );
    // What the other service is to have, this one must have given back.
    for line in [
        "virtio_fs_device_stop -d vfsdev0",
        "virtio_fs_device_destroy -d vfsdev0",
    ] {
        first.call(line)?;
    }

    let second = waiting_service()?;
    let line = format!("load_config -j {}", file.display());
    spdk_rpc(second.rpc_socket(), &line)?;
    ensure!(
        spdk_rpc(second.rpc_socket(), "save_config")? == saved,
        "another configuration"
    );
    let mut loaded = second.call("virtio_fs_get_devices")?;
    ensure!(
        loaded[0]["socket"] != devices[0]["socket"],
        "one socket for two services"
    );
    loaded[0]["socket"] = devices[0]["socket"].clone();
    ensure!(loaded == devices, "{loaded:#} is not {devices:#}");
    first.stop()
}

#[test]
fn the_originals_client_reads_and_sets_what_it_knows_of_framework_log_and_threads() {
    need!(clients_are_there());
    if let Err(error) = look_around() {
        panic!("{error:#}");
    }
}

fn look_around() -> Result<()> {
    let service = Service::start()?;
    let socket = service.rpc_socket();
    let get = |line: &str| json_of(socket, line);
    let methods = get("rpc_get_methods --include-aliases")?;
    let methods: Vec<&str> = methods
        .as_array()
        .context("no list")?
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let (version, pointer) = (get("spdk_get_version")?, "/version");
    ensure!(
        version.pointer(pointer).is_some_and(Value::is_string),
        "{version}"
    );
    // A key of each answer that the client's users read.
    for (line, pointer) in [
        ("framework_get_subsystems", "/0/subsystem"),
        ("framework_get_reactors", "/reactors/0/lcore"),
        ("framework_get_scheduler", "/scheduler_name"),
        ("thread_get_stats", "/threads/0/busy"),
        ("thread_get_pollers", "/threads/0/active_pollers"),
        ("thread_get_io_channels", "/threads"),
        ("log_get_flags", ""),
        ("notify_get_types", ""),
        ("notify_get_notifications", ""),
        ("iobuf_get_stats", "/0/small_pool"),
    ] {
        ensure!(methods.contains(&line), "the service does not list {line}");
        let answer = get(line)?;
        ensure!(
            answer.pointer(pointer).is_some(),
            "{line}: no {pointer} in {answer:#}"
        );
    }
    for (set, get_line, expected) in [
        ("log_set_level INFO", "log_get_level", "INFO"),
        (
            "log_set_print_level WARNING",
            "log_get_print_level",
            "WARNING",
        ),
        (
            "log_enable_timestamps --no-timestamps",
            "log_get_level",
            "INFO",
        ),
        ("framework_set_scheduler static", "log_get_level", "INFO"),
    ] {
        spdk_rpc(socket, set)?;
        let found = spdk_rpc(socket, get_line)?;
        ensure!(found.contains(expected), "{set}: {found}");
    }
    let flags = get("log_get_flags")?;
    let flag = flags
        .as_object()
        .and_then(|flags| flags.keys().next())
        .context("no flags")?;
    spdk_rpc(socket, &format!("log_set_flag {flag}"))?;
    ensure!(get("log_get_flags")?[flag] == true, "{flag} is not set");
    spdk_rpc(socket, &format!("log_clear_flag {flag}"))?;
    ensure!(
        get("log_get_flags")?[flag] == false,
        "{flag} is not cleared"
    );
    // A mistake is the client's own error, with our code and message.
    let error = spdk_rpc(socket, "fsdev_aio_delete nosuch")
        .unwrap_err()
        .to_string();
    ensure!(
        error.contains("Got JSON-RPC error response") && error.contains("nosuch"),
        "{error}"
    );
    Ok(())
}
