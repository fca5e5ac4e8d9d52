//! A Debian guest lives on Ferry: its root file system is a tag. It boots to a login, installs packages with apt, reboots, and
//! has them still; and this machine sees in the exported directory what the guest did.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Console, Device, Guest, Kernel, Rigs, Service, binary, need};
use std::env;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const TAG: &str = "rootfs";
const BOOT: Duration = Duration::from_secs(900);
const COMMAND: Duration = Duration::from_secs(600);
/// How dpkg says that the configuration file of our package has been edited.
const EDITED: &str = "??5?????? c /etc/kinds.conf";

/// Runs a program of this machine.
fn on_host(program: &str, arguments: &[&Path]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {arguments:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

fn replace_in(path: &Path, edit: impl FnOnce(String) -> String) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    Ok(fs::write(path, edit(text))?)
}

/// Unpacks the root file system into the export, and makes it what an installer would: one terminal to log in at, and a root
/// user, here without a password.
fn install_debian(root: &Path, terminal: &str) -> Result<()> {
    let rigs = Rigs::find(&["root-bookworm"])?;
    let archive = rigs.path("root-bookworm/root.tar");
    on_host(
        "tar",
        &[
            Path::new("--numeric-owner"),
            Path::new("--xattrs"),
            Path::new("--xattrs-include=*"),
            Path::new("-xpf"),
            &archive,
            Path::new("-C"),
            root,
        ],
    )?;
    replace_in(&root.join("etc/inittab"), |text| {
        let mut text: String = text
            .lines()
            .filter(|line| !line.contains("/sbin/getty"))
            .map(|line| format!("{line}\n"))
            .collect();
        text.push_str(&format!(
            "c:2345:respawn:/sbin/getty 38400 {terminal} dumb\n"
        ));
        text
    })?;
    replace_in(&root.join("etc/shadow"), |text| {
        text.replacen("root:*:", "root::", 1)
    })?;
    fs::copy(
        rigs.path("root-bookworm/iputils-ping.deb"),
        root.join("srv/iputils-ping.deb"),
    )?;
    Ok(())
}

/// A package with one of every kind of file that a package may hold, and a script that runs when it is installed.
fn build_package(work: &Path, to: &Path, version: u32) -> Result<()> {
    let tree = work.join(format!("kinds-{version}"));
    let kinds = tree.join("usr/lib/kinds");
    fs::create_dir_all(tree.join("DEBIAN"))?;
    fs::create_dir_all(tree.join("usr/bin"))?;
    fs::create_dir_all(tree.join("etc"))?;
    fs::create_dir_all(&kinds)?;
    fs::write(
        tree.join("DEBIAN/control"),
        format!(
            "Package: kinds\nVersion: {version}\nArchitecture: amd64\nMaintainer: Nobody <nobody@example.org>\n\
             Depends: libcap2-bin\nDescription: one of every kind of file\n"
        ),
    )?;
    fs::write(tree.join("DEBIAN/conffiles"), "/etc/kinds.conf\n")?;
    fs::write(
        tree.join("DEBIAN/postinst"),
        "#!/bin/sh\nset -e\ninstall -m 755 /usr/bin/id /usr/lib/kinds/capable\n\
         setcap cap_net_raw,cap_sys_nice+ep /usr/lib/kinds/capable\n\
         install -m 4755 /usr/bin/id /usr/lib/kinds/installed-setuid\n",
    )?;
    fs::write(
        tree.join("DEBIAN/prerm"),
        "#!/bin/sh\nset -e\nrm -f /usr/lib/kinds/capable /usr/lib/kinds/installed-setuid\n",
    )?;
    for script in ["DEBIAN/postinst", "DEBIAN/prerm"] {
        set_mode(&tree.join(script), 0o755)?;
    }
    fs::write(tree.join("etc/kinds.conf"), "setting=default\n")?;
    let program = tree.join("usr/bin/kinds");
    fs::write(&program, format!("#!/bin/sh\necho \"kinds {version}\"\n"))?;
    set_mode(&program, 0o755)?;
    fs::copy("/usr/bin/id", kinds.join("setuid"))?;
    set_mode(&kinds.join("setuid"), 0o4755)?;
    fs::write(kinds.join("linked"), "three names\n")?;
    fs::hard_link(kinds.join("linked"), kinds.join("linked-2"))?;
    fs::hard_link(kinds.join("linked"), kinds.join("linked-3"))?;
    std::os::unix::fs::symlink("linked", kinds.join("link"))?;
    on_host("mkfifo", &[&kinds.join("fifo")])?;
    let [character, major, minor] = ["c", "1", "3"].map(Path::new);
    on_host("mknod", &[&kinds.join("null"), character, major, minor])?;
    fs::write(kinds.join("owned"), "owned\n")?;
    chown(kinds.join("owned"), Some(1234), Some(4321))?;
    set_mode(&kinds.join("owned"), 0o2640)?;
    fs::create_dir(kinds.join("shared"))?;
    chown(kinds.join("shared"), None, Some(4321))?;
    set_mode(&kinds.join("shared"), 0o3775)?;
    let package = to.join(format!("kinds_{version}.deb"));
    on_host(
        "dpkg-deb",
        &[Path::new("-Zgzip"), Path::new("--build"), &tree, &package],
    )
    .map(drop)
}

/// A line of the shell that fails unless `command` prints `expected`.
fn prints(command: &str, expected: &str) -> String {
    format!(
        "printed=$({command}); [ \"$printed\" = '{expected}' ] || {{ echo \"not '{expected}' but '$printed'\"; false; }}"
    )
}

/// Everything that the packages have, at a version of ours, checked where it is installed; `changed` is what dpkg finds changed.
fn check_in_guest(guest: &mut Console, version: u32, changed: &str) -> Result<()> {
    let at = "/usr/lib/kinds";
    let nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups";
    for line in [
        prints("kinds", &format!("kinds {version}")),
        prints(
            "dpkg-query -W -f '${Status} ${Version}' kinds",
            &format!("install ok installed {version}"),
        ),
        prints("dpkg --audit; dpkg --verify kinds iputils-ping", changed),
        prints(
            &format!("cd {at}; stat -c '%h' linked linked-2 linked-3 | xargs"),
            "3 3 3",
        ),
        prints(&format!("cat {at}/link"), "three names"),
        prints(
            &format!("cd {at}; stat -c '%u %g %a' setuid owned shared | xargs"),
            "0 0 4755 1234 4321 2640 0 4321 3775",
        ),
        prints(&format!("cd {at}; stat -c '%F' fifo"), "fifo"),
        prints(
            &format!("cd {at}; stat -c '%F %t %T' null; echo x > null; cat null"),
            "character special file 1 3",
        ),
        prints(
            &format!("{nobody} {at}/setuid -u; {nobody} {at}/setuid -ru"),
            "0\n65534",
        ),
        prints(&format!("{nobody} {at}/installed-setuid -u"), "0"),
        prints(
            &format!("getcap {at}/capable"),
            &format!("{at}/capable cap_net_raw,cap_sys_nice=ep"),
        ),
        "ip link set lo up".to_owned(),
        format!("{nobody} ping -q -c 1 127.0.0.1 > /dev/null"),
    ] {
        guest.run(&line, COMMAND)?;
    }
    Ok(())
}

/// The same, seen in the exported directory.
fn check_on_host(root: &Path) -> Result<()> {
    let status = fs::read_to_string(root.join("var/lib/dpkg/status"))?;
    ensure!(
        status.contains("Package: kinds\nStatus: install ok installed\n"),
        "dpkg's status in the export does not know the package"
    );
    ensure!(
        !status.contains("Package: iputils-ping\nStatus: install ok"),
        "dpkg's status in the export has a package that was removed"
    );
    ensure!(!root.join("bin/ping").exists(), "a removed file is there");
    let kinds = root.join("usr/lib/kinds");
    let of = |name: &str| fs::symlink_metadata(kinds.join(name)).with_context(|| name.to_owned());
    let linked = of("linked")?;
    ensure!(
        linked.nlink() == 3 && linked.ino() == of("linked-3")?.ino(),
        "the hard links are {} on the host",
        linked.nlink()
    );
    for (name, uid, gid, mode) in [
        ("setuid", 0, 0, 0o4755),
        ("installed-setuid", 0, 0, 0o4755),
        ("owned", 1234, 4321, 0o2640),
        ("shared", 0, 4321, 0o3775),
    ] {
        let seen = of(name)?;
        ensure!(
            (seen.uid(), seen.gid(), seen.mode() & 0o7777) == (uid, gid, mode),
            "{name} on the host: {}:{} {:o}",
            seen.uid(),
            seen.gid(),
            seen.mode()
        );
    }
    let null = of("null")?;
    ensure!(
        null.file_type().is_char_device() && null.rdev() == nix::sys::stat::makedev(1, 3),
        "the device node on the host is {:x}",
        null.rdev()
    );
    ensure!(of("fifo")?.file_type().is_fifo(), "the FIFO is none");
    ensure!(
        fs::read_link(kinds.join("link"))? == Path::new("linked"),
        "the symbolic link changed"
    );
    let capability = on_host(
        "getfattr",
        &[
            Path::new("-e"),
            Path::new("hex"),
            Path::new("-n"),
            Path::new("security.capability"),
            Path::new("--absolute-names"),
            &kinds.join("capable"),
        ],
    )?;
    // version 2, effective; permitted CAP_NET_RAW (13) and CAP_SYS_NICE (23)
    ensure!(
        capability.contains("=0x0100000200208000"),
        "the capability on the host is {capability}"
    );
    let edited = fs::read_to_string(root.join("etc/kinds.conf"))?;
    ensure!(
        edited == "setting=mine\n",
        "an edited configuration file is '{edited}' after the upgrade"
    );
    Ok(())
}

fn live(guest: &Guest, tag: &str, root: &Path, work: &Path) -> Result<()> {
    install_debian(root, guest.terminal())?;
    for version in [1, 2] {
        build_package(work, &root.join("srv"), version)?;
    }
    let mut console = guest.boot_root(tag)?;
    console.log_in(BOOT)?;
    console.run(
        "apt-get install -y -q /srv/kinds_1.deb /srv/iputils-ping.deb",
        COMMAND,
    )?;
    check_in_guest(&mut console, 1, "")?;
    console.run("echo setting=mine > /etc/kinds.conf", COMMAND)?;
    console.type_line("reboot")?;

    console.log_in(BOOT)?;
    check_in_guest(&mut console, 1, EDITED)?;
    console.run("apt-get install -y -q /srv/kinds_2.deb", COMMAND)?;
    check_in_guest(&mut console, 2, EDITED)?;
    console.run("apt-get purge -y -q iputils-ping", COMMAND)?;
    console.type_line("poweroff")?;
    console.wait(BOOT)?;
    check_on_host(root)
}

fn debian_lives_on(guest: Guest, device: impl FnOnce(&Service) -> Result<Device>) -> Result<()> {
    let (mut service, root) = Service::start_exporting("--enable-xattr")?;
    let device = device(&service)?;
    let work: PathBuf = service.dir().make_dir("work");
    live(&guest.device(device), TAG, &root, &work)
        .with_context(|| format!("service:\n{}", service.log()))?;
    service.call("virtio_fs_device_stop --dev-name vfsdev0")?;
    service.call("virtio_fs_device_destroy --dev-name vfsdev0")?;
    service.stop()
}

#[test]
fn debian_lives_on_a_vhost_user_device_in_a_linux_guest() {
    let guest = need!(Guest::user_mode());
    need!(Rigs::find(&["root-bookworm"]));
    need!(binary("ferry"));
    debian_lives_on(guest, |service| {
        Ok(Device::VhostUser {
            socket: service.start_vhost_user_device("vfsdev0", TAG, "aio0")?,
            tag: TAG.to_owned(),
        })
    })
    .unwrap();
}

/// Emulated processors take their time.
#[test]
fn debian_lives_on_a_vfio_user_function_in_a_linux_guest() {
    if env::var_os("FERRY_POSIX_FULL").is_none() {
        return;
    }
    let guest = need!(Guest::qemu(Kernel::Forky));
    need!(Rigs::find(&["root-bookworm"]));
    need!(binary("ferry"));
    debian_lives_on(guest, |service| {
        Ok(Device::VfioUser(
            service.start_doca_device("vfsdev0", TAG, "aio0")?,
        ))
    })
    .unwrap();
}
