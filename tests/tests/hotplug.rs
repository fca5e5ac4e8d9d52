//! Functions come to a Linux guest and go, while it runs: the guide's hot-plug sections over a QEMU whose machine protocol
//! socket is the host link, and again and again with work in between.

use anyhow::{Context, Result, ensure};
use ferry_tests::{
    Guest, Kernel, RunningGuest, Service, ServiceConfig, TempDir, binary, need, wait_until,
};
use nix::sys::signal::{Signal, kill};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(180);

/// Cycles of plug, work and unplug; a number in `FERRY_HOTPLUG_CYCLES` asks for more.
fn cycles() -> u32 {
    let asked = std::env::var("FERRY_HOTPLUG_CYCLES").ok();
    asked.and_then(|n| n.parse().ok()).unwrap_or(4)
}

/// What every guest script begins with. `lspci` is what its namesake prints with `-n`; `there` tells whether there is a
/// virtio-fs function; `settle yes` waits until it can be mounted, which is a little after the driver has begun with it.
const PRELUDE: &str = "
lspci() {
    for f in /sys/bus/pci/devices/*; do
        read -r class < $f/class && read -r vendor < $f/vendor && read -r device < $f/device || continue
        echo ${f##*/} $class ${vendor#0x}:${device#0x}
    done 2>/dev/null
}
there() { lspci | grep -q '1af4:105a'; }
bound() { set -- /sys/fs/virtiofs/*/tag; [ -e \"$1\" ]; }
settle() { [ $1 = no ] || until bound; do usleep 20000; done; until [ \"$(there && echo yes || echo no)\" = \"$1\" ]; do usleep 20000; done; }
";

/// A service whose manager's host is a QEMU with a QMP socket, and that QEMU.
struct Rig {
    service: Service,
    qmp: PathBuf,
    export: PathBuf,
    _dir: TempDir,
}

impl Rig {
    /// With four hot-plug ports; `linked`: that the platform file names the QMP socket.
    fn new(linked: bool) -> Result<Rig> {
        let dir = TempDir::new();
        let open = dir.make_dir("host");
        fs::set_permissions(&open, fs::Permissions::from_mode(0o755))?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
        let qmp = open.join("qmp");
        let link = format!(
            "[manager.host_link]\nqmp = \"{}\"\nbuses = [\"port1\", \"port2\", \"port3\", \"port4\"]\n",
            qmp.display()
        );
        let platform = dir.join("platform.toml");
        fs::write(
            &platform,
            format!(
                "[[manager]]\nname = \"mlx5_0\"\nserial = \"MT2333XZ0VJQ\"\nbus = 0x29\n{}[manager.firmware]\n\
                 VIRTIO_FS_EMULATION_ENABLE = 1\nVIRTIO_FS_EMULATION_NUM_MSIX = 8\nPCI_SWITCH_EMULATION_ENABLE = 1\n\
                 PCI_SWITCH_EMULATION_NUM_PORT = 5\n",
                if linked { &link } else { "" }
            ),
        )?;
        let service = Service::start_with(&ServiceConfig {
            args: vec!["--platform".to_owned(), platform.display().to_string()],
            ..ServiceConfig::default()
        })?;
        let export = service.dir().make_dir("export");
        fs::write(export.join("greeting"), "from the DPU\n")?;
        Ok(Rig {
            service,
            qmp,
            export,
            _dir: dir,
        })
    }

    /// A line of the guide.
    fn line(&self, line: &str) -> Result<serde_json::Value> {
        self.service
            .call(&format!("--plugin rpc_virtio_fs_tgt -v {line}"))
    }

    /// Boots the guest; the control plane may use its QMP socket.
    fn boot(&self, script: &str) -> Result<RunningGuest> {
        let guest = Guest::qemu(Kernel::Forky)?.hotplug(&self.qmp, 4);
        let mut guest = guest.start(&format!("{PRELUDE}{script}"))?;
        wait_until("QEMU listens", LIMIT, || Ok(self.qmp.exists()))?;
        fs::set_permissions(&self.qmp, fs::Permissions::from_mode(0o666))?;
        guest.wait_for("READY", LIMIT)?;
        Ok(guest)
    }

    /// Steps 1 to 12 of the guide's flow; gives the VUID.
    fn bring_up(&self) -> Result<String> {
        let export = self.export.display();
        self.service
            .call(&format!("fsdev_aio_create aio0 {export}"))?;
        self.line("virtio_fs_doca_get_possible_managers")?;
        self.line("virtio_fs_transport_create -t DOCA")?;
        self.line("virtio_fs_doca_manager_create -m mlx5_0")?;
        self.line("virtio_fs_transport_start -t DOCA")?;
        self.line("virtio_fs_get_transports")?;
        let managers = self.line("virtio_fs_doca_get_managers")?;
        ensure!(
            managers[0]["hotplug_supported"] == true,
            "managers: {managers}"
        );
        let functions = self.line("virtio_fs_doca_get_functions")?;
        ensure!(
            functions[0]["Function List"] == serde_json::json!([]),
            "functions: {functions}"
        );
        let vuid = self.line("virtio_fs_doca_function_create --manager mlx5_0")?;
        let vuid = vuid.as_str().context("no VUID")?.to_owned();
        self.check_function(&vuid, "POWER_OFF", "")?;
        self.line(
            "virtio_fs_device_create --transport-name DOCA --dev-name vfsdev0 --tag docatag --fsdev aio0 \
             --num-request-queues 8 --queue-size 256 --driver-platform x86_64",
        )?;
        self.line(&format!(
            "virtio_fs_doca_device_modify --dev-name vfsdev0 --manager mlx5_0 --vuid {vuid}"
        ))?;
        self.line("virtio_fs_device_start --dev-name vfsdev0")?;
        self.check_device("POWER_OFF")?;
        Ok(vuid)
    }

    fn check_function(&self, vuid: &str, state: &str, address: &str) -> Result<()> {
        let functions = self.line("virtio_fs_doca_get_functions")?;
        let function = &functions[0]["Function List"][0];
        ensure!(
            function["vuid"] == vuid
                && function["hot pluggable"] == "true"
                && function["hotplug_state"] == state
                && function["pci_address"] == address,
            "functions: {functions}"
        );
        Ok(())
    }

    fn check_device(&self, state: &str) -> Result<()> {
        let devices = self.line("virtio_fs_get_devices")?;
        ensure!(devices[0]["hotplug_state"] == state, "devices: {devices}");
        Ok(())
    }

    fn plug(&self) -> Result<()> {
        self.line("virtio_fs_doca_device_hotplug --dev-name vfsdev0 --wait-for-done")?;
        Ok(())
    }

    fn unplug(&self) -> Result<()> {
        self.line("virtio_fs_doca_device_hotunplug --dev-name vfsdev0 --wait-for-done")?;
        Ok(())
    }

    /// A second device, on a function of its own that is not plugged; gives the VUID.
    fn add_unplugged(&self) -> Result<String> {
        let vuid = self.line("virtio_fs_doca_function_create --manager mlx5_0")?;
        let vuid = vuid.as_str().context("no VUID")?.to_owned();
        self.line(
            "virtio_fs_device_create --transport-name DOCA --dev-name vfsdev1 --tag other --fsdev aio0 \
             --num-request-queues 2 --queue-size 64",
        )?;
        self.line(&format!(
            "virtio_fs_doca_device_modify --dev-name vfsdev1 --manager mlx5_0 --vuid {vuid}"
        ))?;
        self.line("virtio_fs_device_start --dev-name vfsdev1")?;
        Ok(vuid)
    }

    /// Kills the data plane, and waits until the control plane talks to the next one.
    fn kill_dataplane(&self) -> Result<()> {
        let former = self.service.child("ferry-dataplane")?;
        kill(former, Signal::SIGKILL)?;
        wait_until("another data plane runs", LIMIT, || {
            let now = self.service.child("ferry-dataplane");
            Ok(now.is_ok_and(|pid| pid != former))
        })?;
        wait_until("the data plane is asked", LIMIT, || {
            Ok(self.service.rpc("framework_get_pci_devices")?.ok)
        })
    }

    fn log(&self) -> String {
        self.service.log()
    }
}

/// Runs `body` and adds the service's log to what it complains about.
fn with_log(rig: &Rig, body: impl FnOnce() -> Result<()>) {
    let result = body().with_context(|| format!("log of the service:\n{}", rig.log()));
    if let Err(error) = result {
        panic!("{error:?}");
    }
}

fn verdict(guest: RunningGuest) -> Result<()> {
    let outcome = guest.wait(LIMIT)?;
    ensure!(
        outcome.status == 0,
        "the guest says:\n{}\n{}",
        outcome.output,
        outcome.dmesg
    );
    for bad in ["BUG:", "WARNING:", "Oops", "hung_task"] {
        ensure!(
            !outcome.dmesg.contains(bad),
            "the guest's kernel complains:\n{}",
            outcome.dmesg
        );
    }
    Ok(())
}

#[test]
fn the_guides_hotplug_and_hot_unplug_run_as_printed_in_a_linux_guest() {
    need!(binary("ferry"));
    need!(Guest::qemu(Kernel::Forky));
    let rig = Rig::new(true).unwrap();
    with_log(&rig, || {
        let vuid = rig.bring_up()?;
        let mut guest = rig.boot(
            "lspci > /results/before; echo READY; settle yes; lspci > /results/plugged
             mkdir \"/tmp/test\"
             mount -t virtiofs docatag /tmp/test && cat /tmp/test/greeting && echo written > /tmp/test/answer || exit 1
             umount /tmp/test || exit 1
             echo UNMOUNTED; settle no; lspci > /results/after
             cmp /results/before /results/after || exit 1
             ! cmp -s /results/before /results/plugged\n",
        )?;
        rig.plug()?;
        rig.check_function(&vuid, "POWER_ON", "0000:2a:00.0")?;
        rig.check_device("POWER_ON")?;
        guest.wait_for("UNMOUNTED", LIMIT)?;
        rig.unplug()?;
        rig.check_device("POWER_OFF")?;
        rig.line("virtio_fs_device_stop --dev-name vfsdev0")?;
        rig.line("virtio_fs_device_destroy --dev-name vfsdev0")?;
        rig.line(&format!(
            "virtio_fs_doca_function_destroy --manager mlx5_0 --vuid {vuid}"
        ))?;
        rig.line("virtio_fs_transport_stop -t DOCA")?;
        rig.line("virtio_fs_doca_manager_destroy -m mlx5_0")?;
        rig.line("virtio_fs_transport_destroy -t DOCA")?;
        let answer = fs::read_to_string(rig.export.join("answer"))?;
        ensure!(answer == "written\n", "the guest wrote {answer:?}");
        verdict(guest)
    });
}

#[test]
fn a_function_comes_and_goes_during_io_in_a_linux_guest() {
    need!(binary("ferry"));
    need!(Guest::qemu(Kernel::Forky));
    let rig = Rig::new(true).unwrap();
    with_log(&rig, || {
        rig.bring_up()?;
        let n = cycles();
        let mut guest = rig.boot(&format!(
            "mkdir /tmp/test; echo READY
             for n in $(seq {n}); do
                 settle yes
                 mount -t virtiofs docatag /tmp/test || exit 1
                 dd if=/dev/urandom of=/tmp/test/data bs=64k count=16 2>/dev/null || exit 1
                 sum=$(sha256sum < /tmp/test/data); echo 3 > /proc/sys/vm/drop_caches
                 [ \"$sum\" = \"$(sha256sum < /tmp/test/data)\" ] || exit 1
                 if [ $((n % 2)) = 0 ]; then
                     (while dd if=/dev/zero of=/tmp/test/busy bs=4k count=64 conv=fsync; do :; done) 2>/dev/null &
                     echo BUSY $n; settle no; wait
                     umount /tmp/test || umount -l /tmp/test || exit 1
                 else
                     umount /tmp/test || exit 1
                     echo BUSY $n; settle no
                 fi
                 echo GONE $n
             done\n"
        ))?;
        for n in 1..=n {
            rig.plug().with_context(|| format!("cycle {n}"))?;
            guest.wait_for(&format!("BUSY {n}"), LIMIT)?;
            if n % 4 == 0 {
                // The next data plane goes on with the guest, and takes the function away from it.
                rig.kill_dataplane()?;
                rig.check_device("POWER_ON")?;
            }
            rig.unplug()
                .with_context(|| format!("cycle {n}; the guest says:\n{}", guest.console()))?;
            guest.wait_for(&format!("GONE {n}"), LIMIT)?;
        }
        verdict(guest)
    });
}

#[test]
fn a_function_outlives_the_vmm_that_had_it_in_a_linux_guest() {
    need!(binary("ferry"));
    need!(Guest::qemu(Kernel::Forky));
    let rig = Rig::new(true).unwrap();
    with_log(&rig, || {
        let vuid = rig.bring_up()?;
        let script = "mkdir /tmp/test; echo READY; settle yes
             mount -t virtiofs docatag /tmp/test || exit 1
             [ -e /tmp/test/again ] && { umount /tmp/test && echo UNMOUNTED && settle no; exit; }
             touch /tmp/test/again; echo MOUNTED
             while cat /tmp/test/greeting; do :; done\n";
        let mut guest = rig.boot(script)?;
        rig.plug()?;
        guest.wait_for("MOUNTED", LIMIT)?;
        guest.kill()?;
        wait_until("the function is free", LIMIT, || {
            Ok(rig.check_function(&vuid, "POWER_OFF", "").is_ok())
        })?;
        // Another machine takes it, as new.
        fs::remove_file(&rig.qmp).context("remove what the dead VMM has left")?;
        let mut guest = rig.boot(script)?;
        rig.plug()?;
        guest.wait_for("UNMOUNTED", LIMIT)?;
        rig.unplug()?;
        verdict(guest)
    });
}

/// The error number of a command that must fail.
fn refused(rig: &Rig, line: &str) -> Result<(i64, String)> {
    let reply = rig.service.rpc(line)?;
    let error = reply
        .error()
        .with_context(|| format!("{line}: {reply:?}"))?;
    let code = error["code"].as_i64().context("no code")?;
    Ok((
        code,
        error["message"].as_str().unwrap_or_default().to_owned(),
    ))
}

fn exists(path: &Path) -> bool {
    path.exists()
}

#[test]
fn without_a_vmm_behind_its_link_a_function_is_taken_back() {
    need!(binary("ferry"));
    let rig = Rig::new(true).unwrap();
    with_log(&rig, || {
        let vuid = rig.bring_up()?;
        let (code, message) = refused(
            &rig,
            "virtio_fs_doca_device_hotplug --dev-name vfsdev0 --wait-for-done",
        )?;
        ensure!(
            code == -2 && message.contains("cannot talk to the VMM"),
            "{code} {message}"
        );
        rig.check_function(&vuid, "POWER_OFF", "")
    });
}

#[test]
fn without_a_link_a_plugged_function_waits_at_its_socket() {
    need!(binary("ferry"));
    let rig = Rig::new(false).unwrap();
    with_log(&rig, || {
        let vuid = rig.bring_up()?;
        let socket = rig.service.run_dir().join(format!("pci/{vuid}.sock"));
        ensure!(!exists(&socket), "an unplugged function has a socket");
        rig.line("virtio_fs_doca_device_hotplug --dev-name vfsdev0")?;
        ensure!(exists(&socket), "a plugged function has no socket");
        rig.check_function(&vuid, "PLUG_IN_PROGRESS", "")?;
        let mount = rig.service.mount(&socket)?;
        let greeting = fs::read_to_string(mount.path().join("greeting"))?;
        ensure!(greeting == "from the DPU\n", "{greeting:?}");
        rig.check_function(&vuid, "POWER_ON", "0000:2a:00.0")?;
        let (code, message) = refused(&rig, "virtio_fs_doca_device_hotplug --dev-name vfsdev0")?;
        ensure!(code == -114, "{code} {message}");
        mount.unmount()?;
        // Its host has gone, so it is off.
        wait_until("the function is off", LIMIT, || {
            Ok(rig.check_function(&vuid, "POWER_OFF", "").is_ok())
        })?;
        ensure!(!exists(&socket), "a function that is off has a socket");
        let (code, message) = refused(&rig, "virtio_fs_doca_device_hotunplug --dev-name vfsdev0")?;
        ensure!(code == -22, "{code} {message}");
        rig.line("virtio_fs_doca_device_hotplug --dev-name vfsdev0")?;
        rig.unplug()?;
        rig.check_function(&vuid, "POWER_OFF", "")
    });
}

#[test]
fn the_ports_of_the_switch_are_as_many_as_its_functions() {
    need!(binary("ferry"));
    let rig = Rig::new(false).unwrap();
    with_log(&rig, || {
        rig.line("virtio_fs_transport_create -t DOCA")?;
        rig.line("virtio_fs_doca_manager_create -m mlx5_0")?;
        for n in 1..=4 {
            let vuid = rig.line("virtio_fs_doca_function_create --manager mlx5_0")?;
            ensure!(vuid == format!("MT2333XZ0VJQVFSS{n}D0F0"), "{vuid}");
        }
        let (code, message) = refused(&rig, "virtio_fs_doca_function_create --manager mlx5_0")?;
        ensure!(
            code == -28 && message.contains("all 4 hot-plug ports"),
            "{code} {message}"
        );
        // A port that is free again is taken again.
        rig.line("virtio_fs_doca_function_destroy --manager mlx5_0 --vuid MT2333XZ0VJQVFSS2D0F0")?;
        let vuid = rig.line("virtio_fs_doca_function_create --manager mlx5_0")?;
        ensure!(vuid == "MT2333XZ0VJQVFSS2D0F0", "{vuid}");
        Ok(())
    });
}

#[test]
fn what_is_plugged_stays_so_when_the_data_plane_is_killed_and_what_is_not_does_not_get_so() {
    need!(binary("ferry"));
    let rig = Rig::new(false).unwrap();
    with_log(&rig, || {
        let vuid = rig.bring_up()?;
        let other = rig.add_unplugged()?;
        let at = |vuid: &str| rig.service.run_dir().join(format!("pci/{vuid}.sock"));
        let (socket, other_socket) = (at(&vuid), at(&other));
        rig.kill_dataplane()?;
        rig.check_function(&vuid, "POWER_OFF", "")?;
        ensure!(!exists(&socket), "it was offered without being plugged");

        rig.line("virtio_fs_doca_device_hotplug --dev-name vfsdev0")?;
        let file = fs::metadata(&socket)?.ino();
        rig.kill_dataplane()?;
        rig.check_function(&vuid, "PLUG_IN_PROGRESS", "")?;
        ensure!(fs::metadata(&socket)?.ino() == file, "another socket");

        let mount = rig.service.mount(&socket)?;
        rig.check_function(&vuid, "POWER_ON", "0000:2a:00.0")?;
        rig.kill_dataplane()?;
        rig.check_function(&vuid, "POWER_ON", "0000:2a:00.0")?;
        fs::write(mount.path().join("answer"), "written\n")?;
        let answer = fs::read_to_string(rig.export.join("answer"))?;
        ensure!(answer == "written\n", "the mount wrote {answer:?}");
        ensure!(!exists(&other_socket), "the other one is offered");

        mount.unmount()?;
        wait_until("the function is off", LIMIT, || {
            Ok(rig.check_function(&vuid, "POWER_OFF", "").is_ok())
        })?;
        rig.kill_dataplane()?;
        rig.check_function(&vuid, "POWER_OFF", "")?;
        ensure!(!exists(&socket), "a function that is off has a socket");

        rig.line("virtio_fs_doca_device_hotplug --dev-name vfsdev0")?;
        let mount = rig.service.mount(&socket)?;
        let greeting = fs::read_to_string(mount.path().join("greeting"))?;
        ensure!(greeting == "from the DPU\n", "{greeting:?}");
        // This host does not let go of it when it is asked.
        rig.line("virtio_fs_doca_device_hotunplug --dev-name vfsdev0")?;
        rig.check_function(&vuid, "UNPLUG_IN_PROGRESS", "0000:2a:00.0")?;
        rig.kill_dataplane()?;
        rig.check_function(&vuid, "UNPLUG_IN_PROGRESS", "0000:2a:00.0")?;
        ensure!(!exists(&socket), "it is offered while it is unplugged");
        fs::write(mount.path().join("answer"), "later\n")?;
        mount.unmount()?;
        wait_until("the function is off", LIMIT, || {
            Ok(rig.check_function(&vuid, "POWER_OFF", "").is_ok())
        })
    });
}

#[test]
fn a_function_that_was_destroyed_does_not_come_back_when_the_data_plane_is_killed() {
    need!(binary("ferry"));
    let rig = Rig::new(false).unwrap();
    with_log(&rig, || {
        rig.bring_up()?;
        let gone = "MT2333XZ0VJQVFSS2D0F0";
        ensure!(rig.line("virtio_fs_doca_function_create --manager mlx5_0")? == gone);
        rig.line(&format!(
            "virtio_fs_doca_function_destroy --manager mlx5_0 --vuid {gone}"
        ))?;
        rig.kill_dataplane()?;
        let functions = rig.line("virtio_fs_doca_get_functions")?;
        let list = functions[0]["Function List"].as_array();
        ensure!(list.is_some_and(|list| list.len() == 1), "{functions}");
        Ok(())
    });
}

#[test]
fn changed_firmware_settings_wait_for_a_new_start_and_not_for_a_crash() {
    need!(binary("ferry"));
    let rig = Rig::new(false).unwrap();
    with_log(&rig, || {
        rig.bring_up()?;
        let fwconfig = |action: &[&str]| -> Result<String> {
            let output = Command::new(binary("ferry")?)
                .args(["fwconfig", "-d", "mlx5_0", "--run-dir"])
                .arg(rig.service.run_dir())
                .args(action)
                .output()?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            ensure!(output.status.success(), "{action:?}: {said} {output:?}");
            Ok(said)
        };
        let name = "PCI_SWITCH_EMULATION_NUM_PORT";
        fwconfig(&["set", &format!("{name}=2")])?;
        let before = fwconfig(&["query", name])?;
        rig.kill_dataplane()?;
        let after = fwconfig(&["query", name])?;
        ensure!(before == after, "before: {before}\nafter: {after}");
        // With the new setting there would be one port.
        for n in 2..=4 {
            let vuid = rig.line("virtio_fs_doca_function_create --manager mlx5_0")?;
            ensure!(vuid == format!("MT2333XZ0VJQVFSS{n}D0F0"), "{vuid}");
        }
        Ok(())
    });
}
