//! Linux guests: a kernel of Debian with its own virtio-fs driver, busybox, and nothing of Ferry.

mod console;

pub use console::Console;

use crate::initramfs::Initramfs;
use crate::process::{Process, wait_until};
use crate::rigs::{Rigs, build_checks};
use crate::{TempDir, repository};
use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::Signal;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// The kernels that guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The newest cloud kernel of Debian's suite forky, 7.2 or later.
    Forky,
    /// The cloud kernel of Debian 12, 6.1.
    Bookworm,
}

impl Kernel {
    fn part(self) -> &'static str {
        match self {
            Self::Forky => "kernel-forky",
            Self::Bookworm => "kernel-bookworm",
        }
    }
}

/// A virtio-fs device that a guest sees.
#[derive(Clone, Debug)]
pub enum Device {
    /// A PCIe function behind a vfio-user socket.
    VfioUser(PathBuf),
    /// A device behind a vhost-user socket. QEMU makes up the tag itself; User-Mode-Linux asks the device.
    VhostUser {
        /// The socket on which the device listens.
        socket: PathBuf,
        /// The tag that QEMU shows its guest.
        tag: String,
    },
}

#[derive(Clone, Copy, Debug)]
enum Machine {
    Qemu { kernel: Kernel, processors: u32 },
    UserMode,
}

/// A guest that is ready to boot.
#[derive(Debug)]
pub struct Guest {
    machine: Machine,
    rigs: Rigs,
    devices: Vec<Device>,
    memory_mib: u32,
    /// What follows the size in QEMU's option.
    memory_more: &'static str,
    files: Vec<(String, PathBuf)>,
    arguments: Vec<String>,
    reboots: bool,
}

/// A guest that runs.
#[derive(Debug)]
pub struct RunningGuest {
    process: Process,
    dir: TempDir,
    _alone: Option<MutexGuard<'static, ()>>,
}

/// What a guest left behind.
#[derive(Debug)]
pub struct Outcome {
    /// The exit status of the script.
    pub status: i32,
    /// What the script printed.
    pub output: String,
    /// What the guest's kernel logged.
    pub dmesg: String,
    /// Whatever the script put into `/results`, on the host.
    pub results: PathBuf,
    _dir: TempDir,
}

/// The kernel's command line under QEMU. On a busy host an emulated timer may come too late for the check of its wiring.
const QEMU_KERNEL: &str = "console=ttyS0 loglevel=4 panic=-1 no_timer_check";

/// How long a killed machine may take to disappear.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// Guests share the machine's few processors badly, so a test binary boots one at a time.
static ONE_GUEST: Mutex<()> = Mutex::new(());

fn only_guests() -> MutexGuard<'static, ()> {
    ONE_GUEST.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guest {
    /// A virtual machine under QEMU.
    ///
    /// # Errors
    /// When QEMU or the kernel has not been fetched.
    pub fn qemu(kernel: Kernel) -> Result<Self> {
        let rigs = Rigs::find(&["qemu", "busybox", kernel.part()])?;
        Ok(Self::new(
            Machine::Qemu {
                kernel,
                processors: 2,
            },
            rigs,
        ))
    }

    /// A User-Mode-Linux process, which speaks vhost-user only.
    ///
    /// # Errors
    /// When User-Mode-Linux has not been fetched.
    pub fn user_mode() -> Result<Self> {
        Ok(Self::new(
            Machine::UserMode,
            Rigs::find(&["uml-forky", "busybox"])?,
        ))
    }

    fn new(machine: Machine, rigs: Rigs) -> Self {
        Self {
            machine,
            rigs,
            devices: Vec::new(),
            memory_mib: 512,
            memory_more: "",
            files: Vec::new(),
            arguments: Vec::new(),
            reboots: false,
        }
    }

    /// Gives QEMU a machine protocol socket, and a slot for more memory.
    #[must_use]
    pub fn memory_slot(mut self, qmp: &Path) -> Self {
        self.memory_more = ",slots=1,maxmem=2G";
        self.arguments.extend([
            "-qmp".to_owned(),
            format!("unix:{},server=on,wait=off", qmp.display()),
        ]);
        self
    }

    /// Lets QEMU start the guest again when it reboots; the script then runs again, too.
    #[must_use]
    pub fn reboots(mut self) -> Self {
        self.reboots = true;
        self
    }

    /// Adds a device.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.devices.push(device);
        self
    }

    /// Gives QEMU a machine protocol socket, and root ports `port1`, `port2` and so on to plug functions into.
    #[must_use]
    pub fn hotplug(mut self, qmp: &Path, ports: u32) -> Self {
        self.arguments.extend([
            "-qmp".to_owned(),
            format!("unix:{},server=on,wait=off", qmp.display()),
        ]);
        for n in 1..=ports {
            let port = format!("pcie-root-port,id=port{n},chassis={n},slot={n}");
            self.arguments.extend(["-device".to_owned(), port]);
        }
        self
    }

    /// Adds a file of the host to the guest's root.
    #[must_use]
    pub fn file(mut self, name: &str, from: &Path) -> Self {
        self.files.push((name.to_owned(), from.to_path_buf()));
        self
    }

    /// Adds a program of the host to the guest's root, with the libraries that it is linked to.
    ///
    /// # Errors
    /// When the libraries cannot be found out.
    pub fn program(mut self, name: &str, from: &Path) -> Result<Self> {
        let output = Command::new("ldd").arg(from).output().context("run ldd")?;
        ensure!(
            output.status.success(),
            "ldd knows no libraries of {}",
            from.display()
        );
        for library in String::from_utf8_lossy(&output.stdout)
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
        {
            self = self.file(library.trim_start_matches('/'), Path::new(library));
        }
        Ok(self.file(name, from))
    }

    /// Boots, runs the project's check script on `tag`, and shuts down.
    ///
    /// # Errors
    /// As [`Guest::run`].
    pub fn run_checks(self, tag: &str, limit: Duration) -> Result<Outcome> {
        let build = TempDir::new();
        let checks = build_checks(build.path())?;
        let script = repository().join("tests/guest/check.sh");
        self.file("check.sh", &script)
            .file("checks", &checks)
            .run(&format!("sh /check.sh /checks /mnt {tag}\n"), limit)
    }

    /// Boots, runs `script` with busybox's shell, and shuts down.
    ///
    /// # Errors
    /// When the guest does not come up, or has not ended after `limit`. The message holds its console.
    pub fn run(&self, script: &str, limit: Duration) -> Result<Outcome> {
        self.start(script)?.wait(limit)
    }

    /// Boots and runs `script` as [`Guest::run`] does, while the caller does something else.
    ///
    /// # Errors
    /// When the guest cannot be started.
    pub fn start(&self, script: &str) -> Result<RunningGuest> {
        self.boot(script, Some(only_guests()))
    }

    /// Boots two guests at once, and runs a script in each.
    ///
    /// # Errors
    /// As [`Guest::run`], for the first that fails.
    pub fn run_two(guests: [(&Self, &str); 2], limit: Duration) -> Result<[Outcome; 2]> {
        let _two = only_guests();
        let [first, second] = guests;
        thread::scope(|scope| {
            let other = scope.spawn(|| second.0.boot(second.1, None)?.wait(limit));
            let one = first
                .0
                .boot(first.1, None)
                .and_then(|guest| guest.wait(limit));
            let other = other
                .join()
                .map_err(|_| anyhow!("a guest's thread panicked"))?;
            Ok([one?, other?])
        })
    }

    fn boot(&self, script: &str, alone: Option<MutexGuard<'static, ()>>) -> Result<RunningGuest> {
        let dir = TempDir::new();
        fs::create_dir(dir.join("results")).context("make the directory of results")?;
        self.write_initramfs(script, &dir.join("initrd"))?;
        let command = match self.machine {
            Machine::Qemu { kernel, processors } => {
                let mut command = self.qemu_command(kernel, processors)?;
                command.args(["-no-reboot", "-append", QEMU_KERNEL]);
                command.arg("-initrd").arg(dir.join("initrd")).args([
                    "-serial",
                    &format!("file:{}", dir.join("results.tar").display()),
                ]);
                command
            }
            Machine::UserMode => {
                let mut command = self.user_mode_command(&dir)?;
                command
                    .arg("con0=null,fd:1")
                    .arg(format!("initrd={}", dir.join("initrd").display()))
                    .arg(format!("results={}", dir.join("results").display()));
                command
            }
        };
        let console = dir.join("console");
        let process = Process::start_ending_by(Signal::SIGKILL, &command, &console)?;
        Ok(RunningGuest {
            process,
            dir,
            _alone: alone,
        })
    }

    fn write_initramfs(&self, script: &str, to: &Path) -> Result<()> {
        let mut archive = self.initramfs("init")?;
        archive.file("script", script.as_bytes())?;
        for (name, from) in &self.files {
            archive.copy(name, from)?;
        }
        archive.write(to)
    }

    /// An archive with busybox, the kernel's modules, and a script of `tests/guest` as the first program.
    fn initramfs(&self, init: &str) -> Result<Initramfs> {
        let part = match self.machine {
            Machine::Qemu { kernel, .. } => kernel.part(),
            Machine::UserMode => "uml-forky",
        };
        let mut archive = Initramfs::new()?;
        archive.copy("bin/busybox", &self.rigs.path("busybox/busybox"))?;
        archive.copy("init", &repository().join("tests/guest").join(init))?;
        let modules = self.rigs.modules(part)?;
        archive.file(
            "modules/order",
            modules
                .iter()
                .map(|name| format!("{name}\n"))
                .collect::<String>()
                .as_bytes(),
        )?;
        for name in modules {
            archive.copy(
                &format!("modules/{name}"),
                &self.rigs.path(&format!("{part}/modules/{name}")),
            )?;
        }
        Ok(archive)
    }

    /// All but the kernel's command line and its initramfs.
    fn qemu_command(&self, kernel: Kernel, processors: u32) -> Result<Command> {
        let mut command = Command::new(self.rigs.path("qemu/qemu-system-x86_64"));
        let memory = self.memory_mib;
        let more = self.memory_more;
        for firmware in ["qemu/usr/share/qemu", "qemu/usr/share/seabios"] {
            command.arg("-L").arg(self.rigs.path(firmware));
        }
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-cpu",
                "max",
            ])
            .args([
                "-machine",
                "q35,memory-backend=memory",
                "-accel",
                &accelerator(),
            ])
            .args([
                "-smp",
                &processors.to_string(),
                "-m",
                &format!("{memory}M{more}"),
            ])
            .args([
                "-object",
                &format!("memory-backend-memfd,id=memory,size={memory}M,share=on"),
            ])
            .args(["-serial", "stdio", "-kernel"])
            .arg(self.rigs.path(&format!("{}/vmlinuz", kernel.part())))
            .args(&self.arguments);
        if !self.reboots {
            command.arg("-no-reboot");
        }
        for (number, device) in self.devices.iter().enumerate() {
            match device {
                Device::VfioUser(socket) => {
                    let socket = serde_json::json!({ "type": "unix", "path": path_text(socket)? });
                    let device = serde_json::json!({ "driver": "vfio-user-pci", "socket": socket });
                    command.args(["-device", &device.to_string()]);
                }
                Device::VhostUser { socket, tag } => {
                    command
                        .args([
                            "-chardev",
                            &format!("socket,id=socket{number},path={}", path_text(socket)?),
                        ])
                        .args([
                            "-device",
                            &format!("vhost-user-fs-pci,chardev=socket{number},tag={tag}"),
                        ]);
                }
            }
        }
        Ok(command)
    }

    /// Guest memory is an unlinked file in `TMPDIR`, which must be able to hold it and be shared with the device.
    fn user_mode_command(&self, dir: &TempDir) -> Result<Command> {
        let mut command = Command::new(self.rigs.path("uml-forky/linux"));
        command
            .env("TMPDIR", "/dev/shm")
            .env("HOME", dir.path())
            .args([
                &format!("mem={}M", self.memory_mib),
                "seccomp=on",
                "con=null",
                "loglevel=4",
                "panic=-1",
            ])
            .arg(format!("umid=ferry-{}", std::process::id()));
        for device in &self.devices {
            match device {
                Device::VhostUser { socket, .. } => {
                    command.arg(format!("virtio_uml.device={}:26", path_text(socket)?))
                }
                Device::VfioUser(_) => bail!("User-Mode-Linux has no vfio-user"),
            };
        }
        Ok(command)
    }
}

impl RunningGuest {
    /// What the guest has printed so far.
    #[must_use]
    pub fn console(&self) -> String {
        self.process.output()
    }

    /// Waits until the guest has printed `line`, alone on a line.
    ///
    /// # Errors
    /// When it ends or `limit` passes first. The message holds its console.
    pub fn wait_for(&mut self, line: &str, limit: Duration) -> Result<()> {
        let said = wait_until(&format!("the guest says '{line}'"), limit, || {
            let said = self.console().lines().any(|l| l.trim_end() == line);
            ensure!(said || self.process.running()?, "the guest has ended");
            Ok(said)
        });
        said.with_context(|| format!("console of the guest:\n{}", self.console()))
    }

    /// Ends the machine at once, as a crash of the VMM does.
    ///
    /// # Errors
    /// When it does not end.
    pub fn kill(mut self) -> Result<()> {
        self.process.stop(Signal::SIGKILL, KILL_LIMIT).map(drop)
    }

    /// Waits for the end of the script and the guest.
    ///
    /// # Errors
    /// When it has not ended after `limit`. The message holds its console.
    pub fn wait(mut self, limit: Duration) -> Result<Outcome> {
        let ended = self.process.wait(limit);
        let console = self.console();
        let RunningGuest { dir, .. } = self;
        let results = dir.join("results");
        let archive = dir.join("results.tar");
        if archive.exists() {
            let status = Command::new("tar")
                .arg("-xf")
                .arg(&archive)
                .arg("-C")
                .arg(&results)
                .status()
                .context("run tar")?;
            ensure!(
                status.success() || ended.is_err(),
                "the guest's results are no tar archive\n{console}"
            );
        }
        ended.with_context(|| format!("console of the guest:\n{console}"))?;
        let Ok(status) = text(&results.join("status")).trim().parse() else {
            bail!("the guest left no exit status; its console:\n{console}");
        };
        let (output, dmesg) = (text(&results.join("output")), text(&results.join("dmesg")));
        Ok(Outcome {
            status,
            output,
            dmesg,
            results,
            _dir: dir,
        })
    }
}

impl Outcome {
    /// The verdict of the check script: how many passed and how many failed.
    ///
    /// # Errors
    /// When its last line is missing.
    pub fn counts(&self) -> Result<(u32, u32)> {
        let last = self
            .output
            .lines()
            .rev()
            .find(|line| line.contains(" passed, "))
            .context("the script printed no result")?;
        let numbers: Vec<u32> = last
            .split(' ')
            .filter_map(|word| word.parse().ok())
            .collect();
        match numbers[..] {
            [passed, failed] => Ok((passed, failed)),
            _ => bail!("cannot read the result '{last}'"),
        }
    }
}

/// Emulation works everywhere, also where `/dev/kvm` is there but incomplete; `FERRY_GUEST_ACCEL=kvm` asks for more speed.
fn accelerator() -> String {
    std::env::var("FERRY_GUEST_ACCEL").unwrap_or_else(|_| "tcg".to_owned())
}

fn text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn path_text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}
