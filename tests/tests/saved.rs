//! Saved configurations through real processes: what is saved, loaded and saved again is the same to the byte, however it
//! was loaded; and the options and environment variables of the start do what they say.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::{Service, ServiceConfig, TempDir, wait_until};

const LIMIT: Duration = Duration::from_secs(60);

fn start(args: &[&str], env: &[(&str, &str)]) -> Result<Service> {
    Service::start_with(&ServiceConfig {
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        env: env
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
    })
}

/// What `save_config` prints.
fn saved(service: &Service) -> Result<String> {
    let reply = service.rpc("save_config")?;
    ensure!(reply.ok, "{}{}", reply.out, reply.err);
    Ok(reply.out)
}

fn refused(service: &Service, line: &str, code: &str) -> Result<()> {
    let reply = service.rpc(line)?;
    let text = format!("{}{}", reply.out, reply.err);
    ensure!(!reply.ok && text.contains(code), "{line}: {text}");
    Ok(())
}

/// A configuration with something of everything, made from a start that waits for RPCs.
fn configure(dir: &Path, vuid: &str) -> String {
    format!(
        "fsdev_set_opts 10000 100\n\
         fsdev_aio_create aio0 {} --enable-xattr --max-xfer-size 65536 --cache metadata --squash root\n\
         fsdev_null_create null0\n\
         fsdev_passthru_ext_create aio0 a_pt\n\
         fsdev_passthru_ext_create a_pt 0_pt\n\
         framework_set_scheduler dynamic -p 200000 --core-limit 70\n\
         virtio_fs_transport_create -t VHOST_USER\n\
         virtio_fs_transport_start -t VHOST_USER\n\
         virtio_fs_device_create --transport-name DOCA --dev-name d0 --tag tag0 --fsdev aio0 --num-request-queues 3\n\
         virtio_fs_doca_device_modify --dev-name d0 --manager mlx5_0 --vuid {vuid}\n\
         virtio_fs_device_start --dev-name d0\n\
         virtio_fs_device_create --transport-name VHOST_USER --dev-name d1 --tag tag1 --fsdev 0_pt --packed-vq\n\
         virtio_fs_device_start --dev-name d1\n\
         virtio_fs_device_create --transport-name VHOST_USER --dev-name d2 --queue-size 32\n\
         virtio_fs_doca_function_create --manager mlx5_0\n\
         virtio_fs_doca_function_create --manager mlx5_0\n\
         virtio_fs_doca_function_destroy --manager mlx5_0 --vuid MT2251XZ02WZVFSS1D0F0\n\
         virtio_fs_device_create --transport-name DOCA --dev-name d3 --tag tag3 --fsdev aio0\n\
         virtio_fs_doca_device_modify --dev-name d3 --manager mlx5_0 --vuid MT2251XZ02WZVFSS2D0F0\n\
         virtio_fs_device_start --dev-name d3\n",
        dir.display()
    )
}

#[test]
fn what_is_saved_and_loaded_is_saved_again_the_same_in_every_way_of_loading() {
    let check = || -> Result<()> {
        let dir = TempDir::new();
        let export = dir.make_dir("export");
        let mut first = start(&["--wait-for-rpc"], &[])?;
        first.call("iobuf_set_options --small-pool-count 300 --large-pool-count 40")?;
        first.call("framework_start_init")?;
        // Its manager comes with the start of the transport.
        first.call("virtio_fs_transport_create -t DOCA")?;
        first.call("virtio_fs_transport_start -t DOCA")?;
        let (vuid, _) = first.first_function()?;
        let reply = first.rpc_script(&configure(&export, &vuid))?;
        ensure!(reply.ok, "{}", reply.err);
        let expected = saved(&first)?;
        ensure!(expected.contains("VFSS2D0F0"), "no function: {expected}");
        first.stop()?;
        let file = dir.join("saved.json");
        fs::write(&file, &expected)?;
        let path = file.to_str().context("an odd path")?.to_owned();

        let mut by_option = start(&["-c", &path], &[])?;
        by_option.call("framework_wait_init")?;
        ensure!(
            saved(&by_option)? == expected,
            "by -c: {}",
            saved(&by_option)?
        );
        let stats = by_option.call("iobuf_get_stats")?;
        ensure!(stats[0]["small_pool"]["cache_size"] == 300, "{stats}");
        by_option.stop()?;

        let mut by_environment = start(&[], &[("SPDK_RPC_INIT_CONF_JSON", &path)])?;
        by_environment.call("framework_wait_init")?;
        ensure!(saved(&by_environment)? == expected, "by the environment");
        by_environment.stop()?;

        let mut by_client = start(&[], &[("APP_ARGS", "--wait-for-rpc")])?;
        by_client.call(&format!("load_config -j {path}"))?;
        ensure!(saved(&by_client)? == expected, "by load_config");
        by_client.stop()
    };
    check().unwrap();
}

#[test]
fn a_disabled_subsystem_stays_disabled_through_a_saved_configuration() {
    let check = || -> Result<()> {
        let dir = TempDir::new();
        let mut service = start(&["--wait-for-rpc"], &[])?;
        refused(&service, "virtio_fs_get_devices", "-1")?;
        refused(&service, "framework_disable_subsystem nosuch", "-32602")?;
        refused(&service, "framework_disable_subsystem fsdev", "-32602")?;
        service.call("framework_disable_subsystem virtio_fs")?;
        service.call("framework_start_init")?;
        refused(&service, "framework_start_init", "-1")?;
        refused(&service, "framework_disable_subsystem virtio_fs", "-1")?;
        refused(&service, "virtio_fs_get_devices", "-32601")?;
        refused(
            &service,
            "bdev_null_create Null0 100 512",
            "bdev_null_create",
        )?;
        let expected = saved(&service)?;
        ensure!(
            expected.contains("framework_disable_subsystem"),
            "{expected}"
        );
        service.stop()?;
        let file = dir.join("saved.json");
        fs::write(&file, &expected)?;
        let mut again = start(&["-c", file.to_str().context("an odd path")?], &[])?;
        again.call("framework_wait_init")?;
        ensure!(saved(&again)? == expected, "{}", saved(&again)?);
        refused(&again, "virtio_fs_get_devices", "-32601")?;
        again.stop()
    };
    check().unwrap();
}

#[test]
fn devices_of_the_state_directory_wait_for_the_start() {
    let check = || -> Result<()> {
        let dir = TempDir::new();
        let (export, state) = (dir.make_dir("export"), dir.make_dir("state"));
        // For the user of the control plane.
        std::os::unix::fs::chown(&state, Some(65534), Some(65534))?;
        let state = state.to_str().context("an odd path")?.to_owned();
        let mut first = start(&["--state-dir", &state], &[])?;
        first.call(&format!("fsdev_aio_create aio0 {}", export.display()))?;
        first.start_vhost_user_device("d0", "tag0", "aio0")?;
        first.stop()?;
        let mut second = start(&["--state-dir", &state, "--wait-for-rpc"], &[])?;
        let socket = second.run_dir().join("vhost/d0.sock");
        ensure!(!socket.exists(), "a device was started before the start");
        second.call("framework_start_init")?;
        ensure!(socket.exists(), "the device is not there after the start");
        let devices = second.call("virtio_fs_get_devices")?;
        ensure!(devices[0]["state"] == "running", "{devices}");
        second.stop()
    };
    check().unwrap();
}

#[test]
fn only_the_methods_that_are_allowed_exist() {
    let check = || -> Result<()> {
        // `ferry up` asks for the version and waits for the initialisation.
        let allowed = "--rpcs-allowed=spdk_get_version,framework_wait_init,rpc_get_methods";
        let mut service = start(&[], &[("APP_ARGS", allowed)])?;
        let methods = service.call("rpc_get_methods")?;
        ensure!(
            methods.as_array().is_some_and(|all| all.len() == 3),
            "{methods}"
        );
        refused(&service, "virtio_fs_get_devices", "-32601")?;
        service.stop()
    };
    check().unwrap();
}

#[test]
fn a_request_for_the_end_ends_the_whole_service_and_a_crash_does_not() {
    let check = || -> Result<()> {
        let mut service = start(&[], &[])?;
        let before = service.child("ferry-controlplane")?;
        // It may not live to answer.
        service.rpc("spdk_kill_instance SIGKILL")?;
        wait_until("the control plane is back", LIMIT, || {
            Ok(service
                .child("ferry-controlplane")
                .is_ok_and(|pid| pid != before)
                && service.rpc("spdk_get_version")?.ok)
        })?;
        service.call("spdk_kill_instance SIGTERM")?;
        wait_until("the service has ended", LIMIT, || Ok(!service.running()?))
    };
    check().unwrap();
}
