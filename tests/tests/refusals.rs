//! Wrong input is refused with the documented code and a message that names the culprit, and nothing has changed afterwards.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Process, Service, TempDir, binary, need, skip, wait_until};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

/// Everything that the service says about itself.
fn whole_state(service: &Service) -> Result<Value> {
    let mut state = json!({});
    for method in [
        "fsdev_get_fsdevs",
        "fsdev_get_opts",
        "virtio_fs_get_transports",
        "virtio_fs_get_devices",
        "virtio_fs_doca_get_managers",
        "virtio_fs_doca_get_functions",
    ] {
        state[method] = service.call(method)?;
    }
    Ok(state)
}

/// Runs a line that must be refused with one of `codes`, name each of `culprits`, and change nothing.
fn refused(service: &Service, line: &str, codes: &[i64], culprits: &[&str]) -> Result<()> {
    let before = whole_state(service)?;
    let reply = service.rpc(line)?;
    ensure!(!reply.ok, "'{line}' was accepted: {}", reply.out);
    let error = reply
        .error()
        .with_context(|| format!("'{line}' gave no error response: {}", reply.err))?;
    let code = error["code"]
        .as_i64()
        .with_context(|| format!("'{line}': no code in {error}"))?;
    let message = error["message"].as_str().unwrap_or_default();
    ensure!(
        codes.contains(&code),
        "'{line}' was refused with {code}, expected {codes:?}: {message}"
    );
    for culprit in culprits {
        ensure!(
            message.contains(culprit),
            "the refusal of '{line}' does not name {culprit}: {message}"
        );
    }
    let after = whole_state(service)?;
    ensure!(
        before == after,
        "'{line}' was refused but changed the state from {before:#} to {after:#}"
    );
    Ok(())
}

/// One export, a started DOCA transport, a running device `one` on the first function and an idle device `two`.
fn busy_service() -> Result<(Service, String)> {
    let service = Service::start()?;
    let export = service.dir().make_dir("export");
    service.call(&format!("fsdev_aio_create aio0 {}", export.display()))?;
    service.call("virtio_fs_transport_create -t DOCA")?;
    service.call("virtio_fs_doca_manager_create -m mlx5_0")?;
    service.call("virtio_fs_transport_start -t DOCA")?;
    let (vuid, _) = service.first_function()?;
    for device in ["one", "two"] {
        let create = "virtio_fs_device_create --transport-name DOCA --tag t --fsdev aio0 --num-request-queues 1 --dev-name";
        service.call(&format!("{create} {device}"))?;
        service.call(&format!(
            "virtio_fs_doca_device_modify --dev-name {device} --manager mlx5_0 --vuid {vuid}"
        ))?;
    }
    service.call("virtio_fs_device_start --dev-name one")?;
    Ok((service, vuid))
}

#[test]
fn duplicate_names_are_refused() {
    need!(binary("ferry"));
    let (service, _) = busy_service().unwrap();
    let export = service.dir().join("export");
    let path = export.display();
    refused(
        &service,
        &format!("fsdev_aio_create aio0 {path}"),
        &[-32603],
        &["File exists", "aio0"],
    )
    .unwrap();
    refused(
        &service,
        "virtio_fs_transport_create -t DOCA",
        &[-17],
        &["DOCA"],
    )
    .unwrap();
    refused(
        &service,
        "virtio_fs_doca_manager_create -m mlx5_0",
        &[-17],
        &["mlx5_0"],
    )
    .unwrap();
    refused(
        &service,
        "virtio_fs_device_create -t DOCA --dev-name one --tag t",
        &[-17],
        &["one"],
    )
    .unwrap();
}

#[test]
fn unknown_names_are_refused() {
    need!(binary("ferry"));
    let (service, _) = busy_service().unwrap();
    refused(
        &service,
        "virtio_fs_transport_create -t NOSUCH",
        &[-22],
        &["NOSUCH"],
    )
    .unwrap();
    refused(
        &service,
        "virtio_fs_transport_start -t NOSUCH",
        &[-19],
        &["NOSUCH"],
    )
    .unwrap();
    refused(
        &service,
        "virtio_fs_device_create -t NOSUCH --dev-name d",
        &[-19],
        &["NOSUCH"],
    )
    .unwrap();
    refused(
        &service,
        "virtio_fs_device_start --dev-name nosuch",
        &[-19],
        &["nosuch"],
    )
    .unwrap();
    refused(
        &service,
        "virtio_fs_device_destroy --dev-name nosuch",
        &[-19],
        &["nosuch"],
    )
    .unwrap();
    refused(
        &service,
        "virtio_fs_doca_manager_create -m mlx5_9",
        &[-19],
        &["mlx5_9"],
    )
    .unwrap();
    refused(&service, "fsdev_aio_delete nosuch", &[-19], &["nosuch"]).unwrap();
    refused(
        &service,
        "fsdev_get_fsdevs --name nosuch",
        &[-19],
        &["nosuch"],
    )
    .unwrap();
}

#[test]
fn an_unknown_vuid_is_refused_at_start() {
    need!(binary("ferry"));
    let (service, _) = busy_service().unwrap();
    service.call("virtio_fs_doca_device_modify --dev-name two --manager mlx5_0 --vuid MT0000XZ00000VFSS0D0F2").unwrap();
    refused(
        &service,
        "virtio_fs_device_start --dev-name two",
        &[-19],
        &["MT0000XZ00000VFSS0D0F2"],
    )
    .unwrap();
}

#[test]
fn a_busy_function_is_refused_and_so_is_whatever_would_pull_it_away() {
    need!(binary("ferry"));
    let (service, vuid) = busy_service().unwrap();
    refused(
        &service,
        "virtio_fs_device_start --dev-name two",
        &[-16],
        &[&vuid, "one"],
    )
    .unwrap();
    refused(
        &service,
        "virtio_fs_device_start --dev-name one",
        &[-114],
        &["one"],
    )
    .unwrap();
    refused(
        &service,
        "virtio_fs_device_destroy --dev-name one",
        &[-16],
        &["one"],
    )
    .unwrap();
    refused(
        &service,
        "virtio_fs_device_modify --dev-name one --tag other",
        &[-16],
        &["one"],
    )
    .unwrap();
    let move_away = "virtio_fs_doca_device_modify --dev-name one --manager mlx5_0 --vuid X";
    refused(&service, move_away, &[-16], &["one"]).unwrap();
    refused(
        &service,
        "virtio_fs_doca_manager_destroy -m mlx5_0",
        &[-16],
        &["mlx5_0"],
    )
    .unwrap();
    refused(
        &service,
        "virtio_fs_transport_stop -t DOCA",
        &[-16],
        &["DOCA"],
    )
    .unwrap();
    refused(
        &service,
        "virtio_fs_transport_destroy -t DOCA",
        &[-16],
        &["DOCA"],
    )
    .unwrap();
    refused(
        &service,
        "virtio_fs_transport_start -t DOCA",
        &[-114],
        &["DOCA"],
    )
    .unwrap();
}

#[test]
fn starting_without_tag_fsdev_or_function_is_refused() {
    need!(binary("ferry"));
    let (service, _) = busy_service().unwrap();
    let vuid = second_vuid(&service).unwrap();
    service
        .call("virtio_fs_device_create -t DOCA --dev-name three --fsdev aio0")
        .unwrap();
    service
        .call(&format!(
            "virtio_fs_doca_device_modify --dev-name three --manager mlx5_0 --vuid {vuid}"
        ))
        .unwrap();
    refused(
        &service,
        "virtio_fs_device_start --dev-name three",
        &[-22],
        &["three", "tag"],
    )
    .unwrap();
    service
        .call("virtio_fs_device_destroy --dev-name three")
        .unwrap();
    service
        .call("virtio_fs_device_create -t DOCA --dev-name three --tag t")
        .unwrap();
    service
        .call(&format!(
            "virtio_fs_doca_device_modify --dev-name three --manager mlx5_0 --vuid {vuid}"
        ))
        .unwrap();
    refused(
        &service,
        "virtio_fs_device_start --dev-name three",
        &[-22],
        &["three", "fsdev"],
    )
    .unwrap();
    service
        .call("virtio_fs_device_create -t DOCA --dev-name four --tag t --fsdev aio0")
        .unwrap();
    refused(
        &service,
        "virtio_fs_device_start --dev-name four",
        &[-22],
        &["four"],
    )
    .unwrap();
}

fn second_vuid(service: &Service) -> Result<String> {
    let functions = service.call("virtio_fs_doca_get_functions")?;
    Ok(functions[0]["Function List"][1]["vuid"]
        .as_str()
        .context("no second function")?
        .to_owned())
}

#[test]
fn values_outside_their_range_are_refused() {
    need!(binary("ferry"));
    let (service, _) = busy_service().unwrap();
    let export = service.dir().join("export");
    let too_large = format!(
        "fsdev_aio_create big {} --max-xfer-size 261121",
        export.display()
    );
    refused(
        &service,
        &too_large,
        &[-32602, -32603],
        &["max_xfer_size", "261121"],
    )
    .unwrap();
    for queues in ["0", "255"] {
        let create = format!(
            "virtio_fs_device_create -t DOCA --dev-name q --tag t --num-request-queues {queues}"
        );
        refused(&service, &create, &[-22], &["num_request_queues", queues]).unwrap();
        let modify =
            format!("virtio_fs_device_modify --dev-name two --num-request-queues {queues}");
        refused(&service, &modify, &[-22], &["num_request_queues", queues]).unwrap();
    }
    for size in ["7", "9", "512"] {
        let create =
            format!("virtio_fs_device_create -t DOCA --dev-name q --tag t --queue-size {size}");
        refused(&service, &create, &[-22], &["queue_size", size]).unwrap();
    }
    let long = "a-tag-of-21-bytes-xxx";
    let create = format!("virtio_fs_device_create -t DOCA --dev-name q --tag {long}");
    refused(&service, &create, &[-22], &["tag", long]).unwrap();
}

#[test]
fn exports_that_are_no_directory_are_refused() {
    need!(binary("ferry"));
    let service = Service::start().unwrap();
    let missing = service.dir().join("missing");
    let line = format!("fsdev_aio_create a {}", missing.display());
    refused(
        &service,
        &line,
        &[-32603],
        &["No such file or directory", missing.to_str().unwrap()],
    )
    .unwrap();
    let file = service.dir().join("file");
    fs::write(&file, "").unwrap();
    let line = format!("fsdev_aio_create a {}", file.display());
    refused(
        &service,
        &line,
        &[-32603],
        &["Not a directory", file.to_str().unwrap()],
    )
    .unwrap();
}

#[test]
fn an_unknown_fsdev_is_accepted_at_start_and_refused_at_mount() {
    need!(binary("ferry"));
    let (service, _) = busy_service().unwrap();
    let vuid = second_vuid(&service).unwrap();
    service
        .call("virtio_fs_device_create -t DOCA --dev-name three --tag t --fsdev nosuch")
        .unwrap();
    service
        .call(&format!(
            "virtio_fs_doca_device_modify --dev-name three --manager mlx5_0 --vuid {vuid}"
        ))
        .unwrap();
    service
        .call("virtio_fs_device_start --dev-name three")
        .unwrap();
    let before = whole_state(&service).unwrap();
    let mount_point = service.dir().make_dir("mnt");
    let socket = service.run_dir().join(format!("pci/{vuid}.sock"));
    let output = run_to_end(
        Command::new(binary("ferry").unwrap())
            .arg("mount")
            .arg(&socket)
            .arg(&mount_point),
    )
    .unwrap();
    assert!(
        !output.status.success(),
        "a device whose fsdev does not exist was mounted"
    );
    assert_eq!(before, whole_state(&service).unwrap());
    assert!(
        service.log().contains("nosuch"),
        "the log does not name the missing fsdev:\n{}",
        service.log()
    );
}

/// Runs a program that must end by itself.
fn run_to_end(command: &mut Command) -> Result<Output> {
    let dir = TempDir::new();
    let log = dir.join("log");
    let mut process = Process::start(command, &log)?;
    let status = process.wait(LIMIT).with_context(|| process.output())?;
    Ok(Output {
        status,
        stdout: Vec::new(),
        stderr: fs::read(log)?,
    })
}

fn says(output: &Output, culprit: &Path) -> bool {
    String::from_utf8_lossy(&output.stderr).contains(&*culprit.to_string_lossy())
}

#[test]
fn a_run_directory_of_someone_else_is_refused() {
    let program = need!(binary("ferry-dataplane"));
    if !nix::unistd::geteuid().is_root() {
        return skip("giving a directory away needs root");
    }
    let dir = TempDir::new();
    let run = dir.make_dir("run");
    chown(&run, Some(1234), Some(1234)).unwrap();
    let output = run_to_end(
        Command::new(program)
            .arg("--no-huge")
            .arg("--run-dir")
            .arg(&run),
    )
    .unwrap();
    assert!(
        !output.status.success(),
        "a run directory of another user was accepted"
    );
    assert!(
        says(&output, &run),
        "the error does not name the directory: {output:?}"
    );
    assert_eq!(
        fs::read_dir(&run).unwrap().count(),
        0,
        "something was left in the directory"
    );
}

#[test]
fn an_rpc_socket_in_use_is_refused() {
    let program = need!(binary("ferry-controlplane"));
    let service = Service::start().unwrap();
    let mut command = Command::new(program);
    command
        .arg("--rpc-socket")
        .arg(service.rpc_socket())
        .arg("--run-dir")
        .arg(service.run_dir());
    let output = run_to_end(&mut command).unwrap();
    assert!(
        !output.status.success(),
        "two control planes share one socket"
    );
    assert!(
        says(&output, service.rpc_socket()),
        "the error does not name the socket: {output:?}"
    );
    service.call("spdk_get_version").unwrap();
}

#[test]
fn a_missing_data_plane_is_named() {
    let program = need!(binary("ferry-controlplane"));
    let ferry = need!(binary("ferry"));
    let dir = TempDir::new();
    let (socket, run) = (dir.join("rpc.sock"), dir.make_dir("run"));
    let mut command = Command::new(program);
    command
        .arg("--rpc-socket")
        .arg(&socket)
        .arg("--run-dir")
        .arg(&run);
    let mut process = Process::start(&command, &dir.join("log")).unwrap();
    let rpc = |line: &str| -> Result<Output> {
        Ok(Command::new(&ferry)
            .args(["rpc", "-s"])
            .arg(&socket)
            .args(line.split_whitespace())
            .output()?)
    };
    wait_until("the control plane answers", LIMIT, || {
        ensure!(process.running()?, "it has ended:\n{}", process.output());
        Ok(rpc("spdk_get_version")?.status.success())
    })
    .unwrap();
    let output = rpc(&format!("fsdev_aio_create aio0 {}", dir.path().display())).unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && text.contains("data plane"),
        "no word of the missing data plane: {text}"
    );
    let fsdevs = rpc("fsdev_get_fsdevs").unwrap();
    assert_eq!(String::from_utf8_lossy(&fsdevs.stdout).trim(), "[]");
}
