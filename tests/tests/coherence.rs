//! Two clients of one directory see what the other does: two guests, and a client next to a process of this machine. They
//! run the script of `tests/guest/pair.c`: create, see, append, rename, map, list, lock.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Device, Guest, Kernel, Outcome, Service, binary, build_checks, need};
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(600);

/// What one side does in a guest.
fn script(side: u32, tag: &str) -> String {
    format!(
        "mkdir -p /mnt && mount -t virtiofs {tag} /mnt && /checks pair {side} /mnt && umount /mnt\n"
    )
}

/// One exported directory and the program that both sides run.
struct Pair {
    service: Service,
    export: PathBuf,
    checks: PathBuf,
}

impl Pair {
    /// `fsdevs` file-system devices on the same directory.
    fn new(fsdevs: usize, parameters: &str) -> Result<Self> {
        let service = Service::start()?;
        let export = service.dir().make_dir("export");
        for number in 0..fsdevs {
            service.call(&format!(
                "fsdev_aio_create aio{number} {} --enable-xattr {parameters}",
                export.display()
            ))?;
        }
        let checks = build_checks(service.dir().path())?;
        Ok(Self {
            service,
            export,
            checks,
        })
    }

    fn vhost_user(&self, name: &str, fsdev: &str) -> Result<Device> {
        Ok(Device::VhostUser {
            socket: self.service.add_vhost_user_device(name, name, fsdev)?,
            tag: name.to_owned(),
        })
    }

    fn two_guests(&self, guests: [Guest; 2]) -> Result<()> {
        let [first, second] = guests.map(|guest| guest.file("checks", &self.checks));
        let scripts = [script(0, "one"), script(1, "two")];
        let outcomes = Guest::run_two([(&first, &scripts[0]), (&second, &scripts[1])], LIMIT)
            .with_context(|| format!("service:\n{}", self.service.log()))?;
        outcomes.iter().try_for_each(done)
    }
}

fn done(outcome: &Outcome) -> Result<()> {
    ensure!(
        outcome.status == 0 && outcome.output.contains("is done"),
        "a side failed:\n{}\n{}",
        outcome.output,
        outcome.dmesg
    );
    Ok(())
}

/// The guests have a device each; the devices share `fsdevs` file-system devices.
fn two_user_mode_guests(fsdevs: [&str; 2], parameters: &str) -> Result<()> {
    let pair = Pair::new(2, parameters)?;
    pair.service
        .call("virtio_fs_transport_create -t VHOST_USER")?;
    pair.service
        .call("virtio_fs_transport_start -t VHOST_USER")?;
    let one = Guest::user_mode()?.device(pair.vhost_user("one", fsdevs[0])?);
    let two = Guest::user_mode()?.device(pair.vhost_user("two", fsdevs[1])?);
    pair.two_guests([one, two])
}

#[test]
fn two_guests_on_one_fsdev_agree() {
    need!(Guest::user_mode());
    need!(binary("ferry"));
    two_user_mode_guests(["aio0", "aio0"], "").unwrap();
}

#[test]
fn two_guests_on_two_fsdevs_of_one_directory_agree_without_any_cache() {
    need!(Guest::user_mode());
    need!(binary("ferry"));
    two_user_mode_guests(["aio0", "aio1"], "--cache never").unwrap();
}

/// Two kernels, two transports. Emulated processors take their time.
#[test]
fn guests_on_both_transports_agree() {
    if env::var_os("FERRY_POSIX_FULL").is_none() {
        return;
    }
    let user_mode = need!(Guest::user_mode());
    let qemu = need!(Guest::qemu(Kernel::Forky));
    need!(binary("ferry"));
    let pair = Pair::new(1, "").unwrap();
    let socket = pair
        .service
        .start_doca_device("pci", "one", "aio0")
        .unwrap();
    pair.service
        .call("virtio_fs_transport_create -t VHOST_USER")
        .unwrap();
    pair.service
        .call("virtio_fs_transport_start -t VHOST_USER")
        .unwrap();
    let one = qemu.device(Device::VfioUser(socket));
    let two = user_mode.device(pair.vhost_user("two", "aio0").unwrap());
    pair.two_guests([one, two]).unwrap();
}

/// One side on a mount, the other one on the export itself.
fn with_a_local_process(mount_side: u32) -> Result<()> {
    let pair = Pair::new(1, "")?;
    let socket = pair
        .service
        .start_vhost_user_device("vfsdev0", "tag", "aio0")?;
    let mount = pair.service.mount(&socket)?;
    let side = |side: u32, at: &Path| {
        let mut command = Command::new(&pair.checks);
        command
            .args(["pair", &side.to_string()])
            .arg(at)
            .arg("local");
        command
    };
    let mut local = side(1 - mount_side, &pair.export).spawn()?;
    let remote = side(mount_side, mount.path()).output()?;
    let local = local.wait()?;
    ensure!(
        local.success() && remote.status.success(),
        "the process on the export: {local}; the one on the mount: {}",
        String::from_utf8_lossy(&remote.stdout)
    );
    mount.unmount()
}

#[test]
fn a_mount_and_a_process_on_the_export_agree() {
    need!(ferry_tests::can_mount());
    need!(binary("ferry"));
    for side in [0, 1] {
        with_a_local_process(side).unwrap();
    }
}
