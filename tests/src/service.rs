//! The service under test: `ferry up` with its two children, and `ferry rpc` against it.

use crate::process::{Process, wait_until};
use crate::temp::TempDir;
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;
use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const START_LIMIT: Duration = Duration::from_secs(120);
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// A binary of the workspace: from `FERRY_BIN_DIR`, or from the directory that holds the running test's build.
///
/// # Errors
/// When it has not been built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let dir = match env::var_os("FERRY_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let test = env::current_exe().context("find the running test")?;
            test.parent()
                .and_then(Path::parent)
                .context("the test lies at no depth")?
                .to_path_buf()
        }
    };
    let path = dir.join(name);
    if !path.exists() {
        bail!(
            "{} is not built: run cargo build, or set FERRY_BIN_DIR",
            path.display()
        );
    }
    Ok(path)
}

/// The process of one of the programs of a supervisor, `ferry up`, as it runs now.
///
/// # Errors
/// When it does not run.
pub fn child_of(supervisor: u32, name: &str) -> Result<Pid> {
    let children = fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"))
        .context("list the supervisor's children")?;
    for child in children.split_whitespace() {
        // One that has ended meanwhile is not the one.
        let program = fs::read_link(format!("/proc/{child}/exe")).unwrap_or_default();
        if program.file_name().is_some_and(|file| file == name) {
            return Ok(Pid::from_raw(child.parse()?));
        }
    }
    bail!("{name} does not run")
}

/// A directory in which the unprivileged control plane may create its socket.
fn open_directory(dir: &TempDir) -> Result<PathBuf> {
    let path = dir.make_dir("rpc");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o1777))
        .context("open the socket's directory to everyone")?;
    Ok(path)
}

/// Whether a function can be mounted on this machine.
///
/// # Errors
/// When something that `ferry mount` needs is missing.
pub fn can_mount() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "mounting needs root");
    ensure!(
        Path::new("/dev/fuse").exists(),
        "this machine has no /dev/fuse"
    );
    binary("ferry").map(drop)
}

/// How to start a service.
#[derive(Clone, Debug, Default)]
pub struct ServiceConfig {
    /// More arguments for `ferry up`.
    pub args: Vec<String>,
    /// More environment for `ferry up`.
    pub env: Vec<(String, String)>,
}

/// A running service with a run directory of its own.
#[derive(Debug)]
pub struct Service {
    process: Process,
    dir: TempDir,
    rpc_socket: PathBuf,
}

/// A function mounted on this host by `ferry mount`; dropping it unmounts.
#[derive(Debug)]
pub struct HostMount {
    process: Process,
    dir: PathBuf,
}

/// What one `ferry rpc` command did.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Whether it succeeded.
    pub ok: bool,
    /// What it printed on standard output.
    pub out: String,
    /// What it printed on standard error.
    pub err: String,
}

impl Service {
    /// Starts a service with defaults and waits until it answers.
    ///
    /// # Errors
    /// When a binary is missing or the service does not come up.
    pub fn start() -> Result<Self> {
        Self::start_with(&ServiceConfig::default())
    }

    /// Starts a service with defaults that exports a fresh directory as `aio0`, with these parameters; gives the directory too.
    ///
    /// # Errors
    /// As [`Service::start`], or when the fsdev is refused.
    pub fn start_exporting(parameters: &str) -> Result<(Self, PathBuf)> {
        let service = Self::start()?;
        let export = service.dir().make_dir("export");
        service.call(&format!(
            "fsdev_aio_create aio0 {} {parameters}",
            export.display()
        ))?;
        Ok((service, export))
    }

    /// Starts a service and waits until it answers.
    ///
    /// # Errors
    /// When a binary is missing or the service does not come up; the message holds its log.
    pub fn start_with(config: &ServiceConfig) -> Result<Self> {
        for name in ["ferry-dataplane", "ferry-controlplane"] {
            binary(name)?;
        }
        let dir = TempDir::new();
        let rpc_socket = open_directory(&dir)?.join("rpc.sock");
        let mut command = Command::new(binary("ferry")?);
        command
            .arg("up")
            .arg("--run-dir")
            .arg(dir.join("run"))
            .arg("--rpc-socket")
            .arg(&rpc_socket)
            .arg("--no-huge")
            .arg("--firmware")
            .arg(dir.join("firmware.toml"))
            .args(&config.args)
            .envs(config.env.iter().map(|(name, value)| (name, value)));
        let process = Process::start(&command, &dir.join("log"))?;
        let mut service = Self {
            process,
            dir,
            rpc_socket,
        };
        let ready = wait_until("the service is ready", START_LIMIT, || {
            ensure!(service.process.running()?, "ferry up has ended");
            Ok(service.log().lines().any(|line| line.starts_with("READY ")))
        });
        ready.with_context(|| format!("log of the service:\n{}", service.log()))?;
        Ok(service)
    }

    /// Runs one `ferry rpc` command line, split at white space.
    ///
    /// # Errors
    /// When the tool cannot be run.
    pub fn rpc(&self, line: &str) -> Result<Reply> {
        let output = self
            .rpc_command()?
            .args(line.split_whitespace())
            .stdin(Stdio::null())
            .output();
        Ok(Reply::new(&output.context("run ferry rpc")?))
    }

    /// Runs command lines from standard input, as `cat FILE | spdk_rpc.py` does.
    ///
    /// # Errors
    /// When the tool cannot be run.
    pub fn rpc_script(&self, script: &str) -> Result<Reply> {
        let file = self.dir.join("script.conf");
        fs::write(&file, script)?;
        let output = self.rpc_command()?.stdin(fs::File::open(&file)?).output();
        Ok(Reply::new(&output.context("run ferry rpc")?))
    }

    /// Runs a command line that must succeed and gives its result.
    ///
    /// # Errors
    /// When it fails; the message holds the reply and the service's log.
    pub fn call(&self, line: &str) -> Result<Value> {
        let reply = self.rpc(line)?;
        if !reply.ok {
            bail!(
                "'{line}' failed: {}{}\nlog of the service:\n{}",
                reply.out,
                reply.err,
                self.log()
            );
        }
        Ok(reply.json())
    }

    fn rpc_command(&self) -> Result<Command> {
        let mut command = Command::new(binary("ferry")?);
        command.arg("rpc").arg("-s").arg(&self.rpc_socket);
        Ok(command)
    }

    /// The run directory of the service.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The RPC socket.
    #[must_use]
    pub fn rpc_socket(&self) -> &Path {
        &self.rpc_socket
    }

    /// The temporary directory that goes away with the service; exports may live there.
    #[must_use]
    pub fn dir(&self) -> &TempDir {
        &self.dir
    }

    /// What both processes have logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.output()
    }

    /// Whether the supervisor runs.
    ///
    /// # Errors
    /// When that cannot be found out.
    pub fn running(&mut self) -> Result<bool> {
        self.process.running()
    }

    /// The id of the supervisor.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The process of one of the supervisor's programs, as it runs now.
    ///
    /// # Errors
    /// When it does not run.
    pub fn child(&self, name: &str) -> Result<Pid> {
        child_of(self.id(), name)
    }

    /// Waits until a process of this name runs below the supervisor that is not `former`.
    ///
    /// # Errors
    /// When none comes up in a minute.
    pub fn next_child(&self, name: &str, former: Option<Pid>) -> Result<Pid> {
        let other = || self.child(name).ok().filter(|new| Some(*new) != former);
        wait_until(
            &format!("another {name} runs"),
            Duration::from_secs(60),
            || Ok(other().is_some()),
        )?;
        other().with_context(|| format!("{name} has ended again"))
    }

    /// Ends the service as Ctrl-C does.
    ///
    /// # Errors
    /// When it does not end in time or ends with a failure.
    pub fn stop(&mut self) -> Result<()> {
        let status = self.process.stop(Signal::SIGINT, STOP_LIMIT)?;
        ensure!(
            status.success(),
            "ferry up ended with {status}; its log:\n{}",
            self.log()
        );
        Ok(())
    }

    /// Brings up a DOCA device on the first static function and gives the function's socket.
    ///
    /// # Errors
    /// When a step is refused.
    pub fn start_doca_device(&self, name: &str, tag: &str, fsdev: &str) -> Result<PathBuf> {
        self.start_doca_device_with(name, tag, fsdev, "")
    }

    /// As [`Service::start_doca_device`], with more options of `virtio_fs_device_create`.
    ///
    /// # Errors
    /// When a step is refused.
    pub fn start_doca_device_with(
        &self,
        name: &str,
        tag: &str,
        fsdev: &str,
        options: &str,
    ) -> Result<PathBuf> {
        self.call("virtio_fs_transport_create -t DOCA")?;
        self.call("virtio_fs_doca_manager_create -m mlx5_0")?;
        self.call("virtio_fs_transport_start -t DOCA")?;
        let (vuid, socket) = self.first_function()?;
        self.call(&format!(
            "virtio_fs_device_create --transport-name DOCA --dev-name {name} --tag {tag} --fsdev {fsdev} \
             --num-request-queues 8 --queue-size 256 --driver-platform x86_64 {options}"
        ))?;
        self.call(&format!(
            "virtio_fs_doca_device_modify --dev-name {name} --manager mlx5_0 --vuid {vuid}"
        ))?;
        self.call(&format!("virtio_fs_device_start --dev-name {name}"))?;
        Ok(socket)
    }

    /// Brings up a vhost-user device and gives its socket.
    ///
    /// # Errors
    /// When a step is refused.
    pub fn start_vhost_user_device(&self, name: &str, tag: &str, fsdev: &str) -> Result<PathBuf> {
        self.start_vhost_user_device_with(name, tag, fsdev, "")
    }

    /// As [`Service::start_vhost_user_device`], with more options of `virtio_fs_device_create`.
    ///
    /// # Errors
    /// When a step is refused.
    pub fn start_vhost_user_device_with(
        &self,
        name: &str,
        tag: &str,
        fsdev: &str,
        options: &str,
    ) -> Result<PathBuf> {
        self.call("virtio_fs_transport_create -t VHOST_USER")?;
        self.call("virtio_fs_transport_start -t VHOST_USER")?;
        self.add_vhost_user_device_with(name, tag, fsdev, options)
    }

    /// Brings up one more vhost-user device and gives its socket.
    ///
    /// # Errors
    /// When a step is refused.
    pub fn add_vhost_user_device(&self, name: &str, tag: &str, fsdev: &str) -> Result<PathBuf> {
        self.add_vhost_user_device_with(name, tag, fsdev, "")
    }

    fn add_vhost_user_device_with(
        &self,
        name: &str,
        tag: &str,
        fsdev: &str,
        options: &str,
    ) -> Result<PathBuf> {
        self.call(&format!(
            "virtio_fs_device_create --transport-name VHOST_USER --dev-name {name} --tag {tag} --fsdev {fsdev} \
             --num-request-queues 2 --queue-size 256 {options}"
        ))?;
        self.call(&format!("virtio_fs_device_start --dev-name {name}"))?;
        Ok(self.run_dir().join("vhost").join(format!("{name}.sock")))
    }

    /// Mounts a function on this host.
    ///
    /// # Errors
    /// When it does not get mounted; the message holds what the tool and the service say.
    pub fn mount(&self, socket: &Path) -> Result<HostMount> {
        let dir = self.dir.make_dir("mnt");
        let mut command = Command::new(binary("ferry")?);
        command.arg("mount").arg(socket).arg(&dir);
        let process = Process::start(&command, &self.dir.join("mount.log"))?;
        let mut mount = HostMount { process, dir };
        let ready = wait_until("the function is mounted", START_LIMIT, || {
            ensure!(mount.process.running()?, "ferry mount has ended");
            mount.is_mounted()
        });
        ready.with_context(|| {
            format!(
                "{}\nlog of the service:\n{}",
                mount.process.output(),
                self.log()
            )
        })?;
        Ok(mount)
    }

    /// The VUID and the socket of the first static function.
    ///
    /// # Errors
    /// When there is none.
    pub fn first_function(&self) -> Result<(String, PathBuf)> {
        let managers = self.call("virtio_fs_doca_get_functions")?;
        let vuid = managers[0]["Function List"][0]["vuid"]
            .as_str()
            .context("no static function")?
            .to_owned();
        let socket = self.run_dir().join("pci").join(format!("{vuid}.sock"));
        Ok((vuid, socket))
    }
}

impl HostMount {
    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The process that is its driver.
    ///
    /// # Errors
    /// Never in practice: the kernel gives no larger ids.
    pub fn pid(&self) -> Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.process.id())?))
    }

    fn is_mounted(&self) -> Result<bool> {
        let needle = format!(" {} fuse", self.dir.display());
        Ok(fs::read_to_string("/proc/self/mounts")?
            .lines()
            .any(|line| line.contains(&needle)))
    }

    /// Unmounts and waits until the tool has ended.
    ///
    /// # Errors
    /// When the mount is busy or the tool does not end well.
    pub fn unmount(mut self) -> Result<()> {
        let status = Command::new("umount")
            .arg(&self.dir)
            .status()
            .context("run umount")?;
        ensure!(status.success(), "umount {} failed", self.dir.display());
        let status = self.process.wait(STOP_LIMIT)?;
        ensure!(
            status.success(),
            "ferry mount ended with {status}:\n{}",
            self.process.output()
        );
        Ok(())
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        if matches!(self.is_mounted(), Ok(true))
            && let Err(error) = Command::new("umount").arg("-l").arg(&self.dir).status()
        {
            eprintln!("cannot unmount {}: {error}", self.dir.display());
        }
    }
}

impl Reply {
    fn new(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            ok: output.status.success(),
            out: text(&output.stdout),
            err: text(&output.stderr),
        }
    }

    /// The error member of the response, where the tool printed one.
    #[must_use]
    pub fn error(&self) -> Option<Value> {
        let (_, after) = self.err.split_once("response:")?;
        serde_json::Deserializer::from_str(after)
            .into_iter()
            .next()?
            .ok()
    }

    /// The result as JSON; what is not JSON is a plain string, as the guide's tool prints strings.
    #[must_use]
    pub fn json(&self) -> Value {
        let trimmed = self.out.trim();
        serde_json::from_str(trimmed).unwrap_or_else(|_| Value::String(trimmed.to_owned()))
    }
}
