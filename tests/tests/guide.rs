//! The command lines of the service's guide, run as they are printed there. Only the VUID is this machine's.
//!
//! The lines name `/etc/virtiofs` and, by saying nothing, the default RPC socket. Each test therefore runs the service in
//! a mount namespace of its own, with a throw-away layer over `/etc` and an empty `/var/tmp`.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Device, Guest, Kernel, Process, TempDir, binary, need, skip, wait_until};
use nix::sys::signal::Signal;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const GUEST_LIMIT: Duration = Duration::from_secs(900);

/// Makes the private layers, then becomes the service.
const ENTER: &str = "set -e
mount -t tmpfs private \"$1\"
mkdir \"$1/upper\" \"$1/work\"
mount -t overlay -o lowerdir=/etc,upperdir=\"$1/upper\",workdir=\"$1/work\" overlay /etc
mount -t tmpfs private /var/tmp
mkdir -p /etc/virtiofs/test
echo 'from the DPU' > /etc/virtiofs/greeting
echo 'from the DPU' > /etc/virtiofs/test/greeting
[ -z \"$2\" ] || cp \"$2\" /etc/virtiofs/spdk_rpc_init.conf
shift 2
exec \"$@\"";

/// A service on the default RPC socket of its own mount namespace.
struct Host {
    process: Process,
    dir: TempDir,
    path: String,
}

impl Host {
    fn start(init_conf: Option<&str>) -> Result<Self> {
        let dir = TempDir::new();
        let bin = dir.make_dir("bin");
        let ferry = binary("ferry")?;
        for name in ["rpc.py", "spdk_rpc.py"] {
            symlink(&ferry, bin.join(name))?;
        }
        let path = format!(
            "{}:{}",
            bin.display(),
            std::env::var("PATH").unwrap_or_default()
        );
        let conf = dir.join("init.conf");
        if let Some(text) = init_conf {
            std::fs::write(&conf, text)?;
        }
        let mut command = Command::new("unshare");
        command
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                ENTER,
                "enter",
            ])
            .arg(dir.make_dir("layers"))
            .arg(if init_conf.is_some() {
                conf.as_os_str()
            } else {
                "".as_ref()
            })
            .arg(&ferry)
            .args(["up", "--no-huge", "--run-dir"])
            .arg(dir.join("run"));
        if init_conf.is_some() {
            command.env("SPDK_RPC_INIT_CONF", "/etc/virtiofs/spdk_rpc_init.conf");
        }
        let process = Process::start(&command, &dir.join("log"))?;
        let mut host = Self { process, dir, path };
        let ready = wait_until("the service is ready", LIMIT, || {
            ensure!(host.process.running()?, "ferry up has ended");
            Ok(host
                .process
                .output()
                .lines()
                .any(|line| line.starts_with("READY ")))
        });
        ready.with_context(|| format!("log of the service:\n{}", host.process.output()))?;
        Ok(host)
    }

    /// Runs a line in the service's mount namespace, as an operator's shell would.
    fn run(&self, line: &str) -> Result<Output> {
        let id = self.process.id().to_string();
        let output = Command::new("nsenter")
            .args(["--mount", "--target", &id, "sh", "-c", line])
            .env("PATH", &self.path)
            .output();
        output.with_context(|| format!("run {line}"))
    }

    /// Runs a line that must succeed.
    fn line(&self, line: &str) -> Result<serde_json::Value> {
        let output = self.run(line)?;
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        ensure!(
            output.status.success(),
            "'{line}' failed:\n{out}{err}\nlog of the service:\n{}",
            self.process.output()
        );
        Ok(serde_json::from_str(&out).unwrap_or_else(|_| serde_json::Value::from(out.trim())))
    }

    fn socket(&self, vuid: &str) -> PathBuf {
        self.dir
            .join("run")
            .join("pci")
            .join(format!("{vuid}.sock"))
    }

    fn stop(mut self) -> Result<()> {
        let status = self.process.stop(Signal::SIGINT, LIMIT)?;
        ensure!(
            status.success(),
            "ferry up ended with {status}:\n{}",
            self.process.output()
        );
        ensure!(
            !self.dir.join("run/dataplane.sock").exists(),
            "the run directory still has a socket"
        );
        Ok(())
    }
}

fn can_run() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the guide's paths need root and a mount namespace"
    );
    binary("ferry").map(drop)
}

/// Mounts `tag` in a guest and reads the export's file.
fn mount_in_a_guest(guest: Guest, socket: &Path, tag: &str) -> Result<()> {
    let script = format!(
        "mkdir \"/tmp/test\"\nmount -t virtiofs {tag} /tmp/test && cat /tmp/test/greeting && umount /tmp/test\n"
    );
    let outcome = guest
        .device(Device::VfioUser(socket.to_path_buf()))
        .run(&script, GUEST_LIMIT)?;
    ensure!(
        outcome.status == 0 && outcome.output.contains("from the DPU"),
        "the guest says:\n{}",
        outcome.output
    );
    Ok(())
}

fn bring_up(host: &Host) -> Result<String> {
    host.line("rpc.py fsdev_aio_create aio0 /etc/virtiofs")?;
    let possible =
        host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_doca_get_possible_managers")?;
    ensure!(
        possible[0]["name"] == "mlx5_0",
        "possible managers: {possible}"
    );
    host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_transport_create -t DOCA")?;
    host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_doca_manager_create -m mlx5_0")?;
    host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_transport_start -t DOCA")?;
    let transports = host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_get_transports")?;
    ensure!(
        transports[0]["name"] == "DOCA" && transports[0]["state"] == "started",
        "transports: {transports}"
    );
    let managers = host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_doca_get_managers")?;
    ensure!(managers[0]["name"] == "mlx5_0", "managers: {managers}");
    let functions =
        host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_doca_get_functions")?;
    let function = &functions[0]["Function List"][0];
    ensure!(
        function["hot pluggable"] == "false" && function["function_type"] == "PF",
        "functions: {functions}"
    );
    let vuid = function["vuid"]
        .as_str()
        .context("the function has no VUID")?;
    host.line(
        "rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_device_create --transport-name DOCA --dev-name vfsdev0 \
         --tag doca_test --fsdev aio0 --num-request-queues 8 --queue-size 256 --driver-platform x86_64",
    )?;
    host.line(&format!(
        "rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_doca_device_modify --dev-name vfsdev0 --manager mlx5_0 --vuid {vuid}"
    ))?;
    host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_device_start --dev-name vfsdev0")?;
    let devices = host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_get_devices")?;
    let device = &devices[0];
    ensure!(
        device["name"] == "vfsdev0" && device["state"] == "running",
        "devices: {devices}"
    );
    ensure!(
        device["tag"] == "doca_test"
            && device["fsdev"] == "aio0"
            && device["transport_name"] == "DOCA",
        "{devices}"
    );
    ensure!(
        device["queue_size"] == 256 && device["num_request_queues"] == 8,
        "devices: {devices}"
    );
    Ok(vuid.to_owned())
}

fn tear_down(host: &Host) -> Result<()> {
    host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_get_devices")?;
    host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_device_stop --dev-name vfsdev0")?;
    host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_device_destroy --dev-name vfsdev0")?;
    host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_transport_stop -t DOCA")?;
    host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_doca_manager_destroy -m mlx5_0")?;
    host.line("rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_transport_destroy -t DOCA")?;
    for (line, empty) in [
        (
            "rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_get_devices",
            "devices",
        ),
        (
            "rpc.py --plugin rpc_virtio_fs_tgt -v virtio_fs_get_transports",
            "transports",
        ),
    ] {
        let left = host.line(line)?;
        ensure!(
            left.as_array().is_some_and(Vec::is_empty),
            "{empty} after the tear-down: {left}"
        );
    }
    Ok(())
}

#[test]
fn the_static_bring_up_and_tear_down_run_as_printed() {
    need!(can_run());
    let host = Host::start(None).unwrap();
    let vuid = bring_up(&host).unwrap();
    match Guest::qemu(Kernel::Forky) {
        Ok(guest) => mount_in_a_guest(guest, &host.socket(&vuid), "doca_test").unwrap(),
        Err(why) => skip(&format!("the guest's half of the bring-up: {why:#}")),
    }
    tear_down(&host).unwrap();
    assert!(
        !host.socket(&vuid).exists(),
        "the function's socket is still there"
    );
    host.stop().unwrap();
}

/// As printed, with the lines broken where the page breaks them.
const INIT_CONF: &str = "fsdev_aio_create aio0 /etc/virtiofs/test
virtio_fs_transport_create -t DOCA
virtio_fs_transport_start -t DOCA
virtio_fs_device_create --transport-name DOCA --dev-name
vfsdev0 --tag docatag --fsdev aio0 --num-request-queues
1 --queue-size 32 --driver-platform x86_64
virtio_fs_doca_device_modify --dev-name vfsdev0 --
manager mlx5_0 --vuid \"MT2251XZ02WZVFSS0D0F3\"
virtio_fs_device_start --dev-name vfsdev0
";

#[test]
fn the_init_conf_example_runs_verbatim() {
    need!(can_run());
    let host = Host::start(Some(INIT_CONF)).unwrap();
    wait_until("the init script has started the device", LIMIT, || {
        Ok(host.line("spdk_rpc.py virtio_fs_get_devices")?[0]["state"] == "running")
    })
    .with_context(|| format!("log of the service:\n{}", host.process.output()))
    .unwrap();
    let devices = host.line("spdk_rpc.py virtio_fs_get_devices").unwrap();
    assert_eq!(devices[0]["tag"], "docatag");
    assert_eq!(devices[0]["queue_size"], 32);
    assert_eq!(devices[0]["num_request_queues"], 1);
    match Guest::qemu(Kernel::Forky) {
        Ok(guest) => {
            mount_in_a_guest(guest, &host.socket("MT2251XZ02WZVFSS0D0F3"), "docatag").unwrap()
        }
        Err(why) => skip(&format!("the guest's half of the init script: {why:#}")),
    }
    host.stop().unwrap();
}
