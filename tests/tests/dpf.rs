//! What the DPF client does with the service for a static function, step by step: it looks before it acts, so that any step
//! may be repeated, and takes transport and manager down with the last device.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Service, binary, need};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

const TRANSPORT: &str = "DOCA";

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

    /// Exposes an fsdev on a function; gives its PCI address.
    fn expose(&self, manager: &str, name: &str, vuid: &str) -> Result<String> {
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

    /// Takes a device down, and the rest with the last one.
    fn withdraw(&self, manager: &str, name: &str) -> Result<()> {
        let device = json!({"dev_name": format!("dev_{name}")});
        // That client unplugs static functions too, and goes on when it is told that they stay.
        let unplug = json!({"dev_name": device["dev_name"], "wait_for_done": true});
        let refused = self.ask("virtio_fs_doca_device_hotunplug", unplug);
        ensure!(refused.is_err(), "a static function has been unplugged");
        self.ask("virtio_fs_device_stop", device.clone())?;
        self.ask("virtio_fs_device_destroy", device)?;
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
    std::fs::write(export.join("greeting"), "hello")?;
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
        std::fs::read(mount.path().join("greeting"))? == b"hello",
        "not what is exported"
    );
    mount.unmount()?;

    client.withdraw(&manager, "two")?;
    ensure!(
        client.list("virtio_fs_get_devices")?.len() == 1,
        "the other device is gone too"
    );
    client.withdraw(&manager, "one")?;
    for method in [
        "virtio_fs_get_transports",
        "virtio_fs_doca_get_managers",
        "virtio_fs_get_devices",
    ] {
        ensure!(
            client.list(method)?.is_empty(),
            "{method} still has something"
        );
    }
    Ok(())
}
