//! What the DPF client does with the service, step by step, for static functions and for functions that it plugs into the
//! host: it looks before it acts, so that any step may be repeated, and takes transport and manager down with the last device.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Service, ServiceConfig, TempDir, binary, need, wait_until};
use ferry_tools::driver::{Device, DmaMemory, Pages, Protocol, Queues, Setup};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

const TRANSPORT: &str = "DOCA";
const LIMIT: Duration = Duration::from_secs(30);

/// One connection for each request, as that client has.
struct Client<'a> {
    service: &'a Service,
}

impl Client<'_> {
    fn ask(&self, method: &str, params: Value) -> Result<Value> {
        let mut stream = BufReader::new(UnixStream::connect(self.service.rpc_socket())?);
        let request = json!({"jsonrpc": "2.0", "id": 7, "method": method, "params": params});
        stream.get_mut().write_all(request.to_string().as_bytes())?;
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let answer: Value =
            serde_json::from_str(&line).with_context(|| format!("{method}: {line}"))?;
        // That client takes the mere presence of the key for a failure.
        ensure!(answer.get("error").is_none(), "{method} {params}: {answer}");
        ensure!(answer["id"] == 7, "{method}: {answer}");
        answer
            .get("result")
            .cloned()
            .with_context(|| format!("{method}: {answer}"))
    }

    fn list(&self, method: &str) -> Result<Vec<Value>> {
        let answer = self.ask(method, json!({}))?;
        answer
            .as_array()
            .cloned()
            .with_context(|| format!("{method}: {answer}"))
    }

    /// The first of a list whose key has this value.
    fn find(&self, method: &str, key: &str, value: &str) -> Result<Option<Value>> {
        Ok(self.list(method)?.into_iter().find(|one| one[key] == value))
    }

    fn function(&self, vuid: &str) -> Result<Option<Value>> {
        let all = self.list("virtio_fs_doca_get_functions")?;
        let lists = all
            .iter()
            .filter_map(|manager| manager["Function List"].as_array());
        Ok(lists
            .flatten()
            .find(|function| function["vuid"] == vuid)
            .cloned())
    }

    /// Transport and manager, as far as they are not there; gives the manager's name.
    fn prepare(&self) -> Result<String> {
        if self
            .find("virtio_fs_get_transports", "name", TRANSPORT)?
            .is_none()
        {
            self.ask(
                "virtio_fs_transport_create",
                json!({"transport_name": TRANSPORT}),
            )?;
        }
        let possible = self.list("virtio_fs_doca_get_possible_managers")?;
        let manager = possible[0]["name"]
            .as_str()
            .context("no manager")?
            .to_owned();
        if self
            .find("virtio_fs_doca_get_managers", "name", &manager)?
            .is_none()
        {
            self.ask("virtio_fs_doca_manager_create", json!({"manager": manager}))?;
        }
        let transport = self.find("virtio_fs_get_transports", "name", TRANSPORT)?;
        if transport.context("no transport")?["state"] != "started" {
            self.ask(
                "virtio_fs_transport_start",
                json!({"transport_name": TRANSPORT}),
            )?;
        }
        Ok(manager)
    }

    /// Starts a device on a function that is known.
    fn start(&self, manager: &str, name: &str, vuid: &str) -> Result<()> {
        let device = format!("dev_{name}");
        if self
            .find("virtio_fs_get_devices", "name", &device)?
            .is_none()
        {
            let create = json!({"transport_name": TRANSPORT, "dev_name": device, "tag": format!("{name}tag"),
                "fsdev": name, "num_request_queues": 8, "queue_size": 256, "driver_platform": "x86_64"});
            self.ask("virtio_fs_device_create", create)?;
            let modify = json!({"dev_name": device, "manager": manager, "vuid": vuid});
            self.ask("virtio_fs_doca_device_modify", modify)?;
        }
        let listed = self.find("virtio_fs_get_devices", "name", &device)?;
        if listed.context("the device is not listed")?["state"] != "running" {
            self.ask("virtio_fs_device_start", json!({"dev_name": device}))?;
        }
        Ok(())
    }

    /// The PCI address of a function.
    fn address(&self, vuid: &str) -> Result<String> {
        let function = self.function(vuid)?.context("the function is not listed")?;
        let address = function["pci_address"]
            .as_str()
            .context("no PCI address")?
            .to_owned();
        // dddd:bb:dd.f
        ensure!(
            address.len() == 12 && address.matches(':').count() == 2,
            "{function}"
        );
        Ok(address)
    }

    /// Exposes an fsdev on a static function; gives its PCI address.
    fn expose(&self, manager: &str, name: &str, vuid: &str) -> Result<String> {
        self.start(manager, name, vuid)?;
        self.address(vuid)
    }

    /// Exposes an fsdev on a function that is made for it and plugged into the host, which takes it meanwhile; gives the
    /// function's VUID and PCI address, and what the host has of it.
    fn plug(&self, manager: &str, name: &str) -> Result<(String, String, Host)> {
        let vuid = self.ask(
            "virtio_fs_doca_function_create",
            json!({"manager": manager}),
        )?;
        let vuid = vuid.as_str().context("no VUID")?.to_owned();
        self.start(manager, name, &vuid)?;
        let socket = self
            .service
            .run_dir()
            .join("pci")
            .join(format!("{vuid}.sock"));
        let plug = json!({"dev_name": format!("dev_{name}"), "wait_for_done": true});
        let host = thread::scope(|scope| -> Result<Host> {
            let plugged = scope.spawn(|| self.ask("virtio_fs_doca_device_hotplug", plug));
            let host = Host::take(&socket);
            plugged
                .join()
                .map_err(|_| anyhow::anyhow!("the client has panicked"))??;
            host
        })?;
        Ok((vuid.clone(), self.address(&vuid)?, host))
    }

    /// Takes the device of a static function down, and the rest with the last one.
    fn withdraw(&self, manager: &str, name: &str) -> Result<()> {
        // That client unplugs static functions too, and goes on when it is told that they stay.
        ensure!(self.unplug(name).is_err(), "a static function is unplugged");
        self.take_down(manager, name, None)
    }

    /// Has the host let go of a device.
    fn unplug(&self, name: &str) -> Result<()> {
        let unplug = json!({"dev_name": format!("dev_{name}"), "wait_for_done": true});
        self.ask("virtio_fs_doca_device_hotunplug", unplug)
            .map(drop)
    }

    /// The same for a host that has a driver, and lets go when it is asked to.
    fn unplug_from(&self, name: &str, host: Host) -> Result<()> {
        thread::scope(|scope| {
            let unplugged = scope.spawn(|| self.unplug(name));
            wait_until("the host is asked", LIMIT, || {
                let device = self.find("virtio_fs_get_devices", "name", &format!("dev_{name}"))?;
                Ok(device.context("no device")?["hotplug_state"] == "UNPLUG_IN_PROGRESS")
            })?;
            drop(host);
            let ended = unplugged.join();
            ended.map_err(|_| anyhow::anyhow!("the client has panicked"))?
        })
    }

    /// Takes a device down, its function if it is one of its own, and the rest with the last device.
    fn take_down(&self, manager: &str, name: &str, vuid: Option<&str>) -> Result<()> {
        let device = json!({"dev_name": format!("dev_{name}")});
        self.ask("virtio_fs_device_stop", device.clone())?;
        self.ask("virtio_fs_device_destroy", device)?;
        if let Some(vuid) = vuid {
            let function = json!({"manager": manager, "vuid": vuid});
            self.ask("virtio_fs_doca_function_destroy", function)?;
        }
        if self.list("virtio_fs_get_devices")?.is_empty() {
            self.ask(
                "virtio_fs_transport_stop",
                json!({"transport_name": TRANSPORT}),
            )?;
            self.ask(
                "virtio_fs_doca_manager_destroy",
                json!({"manager": manager}),
            )?;
            self.ask(
                "virtio_fs_transport_destroy",
                json!({"transport_name": TRANSPORT}),
            )?;
        }
        Ok(())
    }

    /// Everything that was made has gone again.
    fn has_nothing(&self) -> Result<()> {
        for method in [
            "virtio_fs_get_transports",
            "virtio_fs_doca_get_managers",
            "virtio_fs_get_devices",
        ] {
            ensure!(
                self.list(method)?.is_empty(),
                "{method} still has something"
            );
        }
        Ok(())
    }
}

/// The driver of a host that has taken a function.
struct Host {
    _device: Device,
    _queues: Queues,
}

impl Host {
    /// Waits until the function is there, and starts its queues.
    fn take(socket: &Path) -> Result<Host> {
        wait_until("the function is offered", LIMIT, || Ok(socket.exists()))?;
        let mut device = Device::connect(socket, Some(Protocol::VfioUser))?;
        let setup = Setup::default();
        let memory = DmaMemory::new(device.memory_needed(&setup), Pages::Normal)?;
        let queues = device.start(&setup, &Arc::new(memory))?;
        Ok(Host {
            _device: device,
            _queues: queues,
        })
    }
}

/// A switch with hot-plug ports, and no way to tell a VMM of them.
const PORTS: &str = "[[manager]]\nname = \"mlx5_0\"\nserial = \"MT2333XZ0VJQ\"\nbus = 0x29\n[manager.firmware]\n\
    VIRTIO_FS_EMULATION_ENABLE = 1\nVIRTIO_FS_EMULATION_NUM_MSIX = 8\nPCI_SWITCH_EMULATION_ENABLE = 1\n\
    PCI_SWITCH_EMULATION_NUM_PORT = 3\n";

#[test]
fn the_clients_steps_plug_functions_into_the_host_and_unplug_them() {
    need!(binary("ferry"));
    if let Err(error) = hotplug_workflow() {
        panic!("{error:#}");
    }
}

fn hotplug_workflow() -> Result<()> {
    let dir = TempDir::new();
    let platform = dir.join("platform.toml");
    fs::write(&platform, PORTS)?;
    let service = Service::start_with(&ServiceConfig {
        args: vec!["--platform".to_owned(), platform.display().to_string()],
        ..ServiceConfig::default()
    })?;
    let client = Client { service: &service };
    let export = service.dir().make_dir("export");
    for name in ["one", "two"] {
        let create = json!({"name": name, "root_path": export});
        client.ask("fsdev_aio_create", create)?;
    }
    let manager = client.prepare()?;
    let (one, first, host_of_one) = client.plug(&manager, "one")?;
    let (two, second, host_of_two) = client.plug(&manager, "two")?;
    ensure!(one != two, "one function for both");
    ensure!(first != second, "two functions at {first}");
    for name in ["one", "two"] {
        let device = client.find("virtio_fs_get_devices", "name", &format!("dev_{name}"))?;
        let device = device.context("no device")?;
        ensure!(device["hotplug_state"] == "POWER_ON", "{device}");
    }

    client.unplug_from("one", host_of_one)?;
    client.take_down(&manager, "one", Some(&one))?;
    ensure!(client.function(&one)?.is_none(), "{one} is still there");
    ensure!(client.address(&two)? == second, "{two} has moved");
    client.unplug_from("two", host_of_two)?;
    client.take_down(&manager, "two", Some(&two))?;
    client.has_nothing()
}

#[test]
fn the_clients_steps_expose_static_functions_and_withdraw_them() {
    need!(binary("ferry"));
    if let Err(error) = workflow() {
        panic!("{error:#}");
    }
}

fn workflow() -> Result<()> {
    let service = Service::start()?;
    let client = Client { service: &service };
    let export = service.dir().make_dir("export");
    fs::write(export.join("greeting"), "hello")?;
    for name in ["one", "two"] {
        client.ask(
            "fsdev_aio_create",
            json!({"name": name, "root_path": export}),
        )?;
    }

    let manager = client.prepare()?;
    let functions = client.list("virtio_fs_doca_get_functions")?;
    let vuid = |at: usize| {
        functions[0]["Function List"][at]["vuid"]
            .as_str()
            .context("no function")
    };
    let one = client.expose(&manager, "one", vuid(0)?)?;
    let two = client.expose(&manager, "two", vuid(1)?)?;
    ensure!(one != two, "two functions at {one}");

    // Everything again changes nothing: the client has been restarted.
    ensure!(client.prepare()? == manager, "another manager");
    ensure!(
        client.expose(&manager, "one", vuid(0)?)? == one,
        "another function"
    );

    let socket = service
        .run_dir()
        .join("pci")
        .join(format!("{}.sock", vuid(0)?));
    let mount = service.mount(&socket)?;
    ensure!(
        fs::read(mount.path().join("greeting"))? == b"hello",
        "not what is exported"
    );
    mount.unmount()?;

    client.withdraw(&manager, "two")?;
    ensure!(
        client.list("virtio_fs_get_devices")?.len() == 1,
        "the other device is gone too"
    );
    client.withdraw(&manager, "one")?;
    client.has_nothing()
}
