//! The command line of `ferry up`, and what each process gets of it.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use ferry_shared::cpumask::CpuMask;

/// The data plane's own default.
const DEFAULT_CPUMASK: &str = "0x1";

/// The options of both processes. Further ones can be given in the environment variable APP_ARGS, split as a shell does.
#[derive(clap::Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    /// CPUs of the data plane's cores, for example `0x3` or `[0,1]`
    #[arg(short = 'm', long, value_name = "MASK")]
    pub cpumask: Option<String>,
    /// Memory of the data plane's pools, in MiB
    #[arg(short = 's', long, value_name = "MIB")]
    pub mem_size: Option<String>,
    /// Use normal pages instead of hugepages
    #[arg(long)]
    pub no_huge: bool,
    /// Directory of the sockets [default: /run/ferry]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Platform file: emulation managers and functions
    #[arg(long, value_name = "FILE")]
    pub platform: Option<PathBuf>,
    /// Settings of the emulated firmware, which `ferry fwconfig` changes [default: /etc/ferry/firmware.toml]
    #[arg(long, value_name = "FILE")]
    pub firmware: Option<PathBuf>,
    /// How cores wait for work: adaptive, busy or interrupt
    #[arg(long, value_name = "MODE")]
    pub poll: Option<String>,
    /// Whether the CPUs of the cores are claimed by lock files, so that no other service takes them: on, off, or auto,
    /// which claims those of cores that always poll
    #[arg(long, value_name = "MODE")]
    pub cpumask_locks: Option<String>,
    /// The same as --cpumask-locks off
    #[arg(long, conflicts_with = "cpumask_locks")]
    pub disable_cpumask_locks: bool,
    /// Directory of the lock files [default: /var/tmp]
    #[arg(long, value_name = "DIR")]
    pub cpumask_locks_dir: Option<PathBuf>,
    /// RPC socket [default: /var/tmp/spdk.sock]
    #[arg(short = 'r', long, value_name = "PATH")]
    pub rpc_socket: Option<PathBuf>,
    /// Saved configuration to apply
    #[arg(
        short = 'c',
        long,
        visible_alias = "json",
        value_name = "FILE",
        env = "SPDK_RPC_INIT_CONF_JSON"
    )]
    pub config: Option<PathBuf>,
    /// Go on when a request of the saved configuration fails
    #[arg(long)]
    pub json_ignore_init_errors: bool,
    /// Wait for framework_start_init before anything is initialised
    #[arg(long)]
    pub wait_for_rpc: bool,
    /// Answer only these methods
    #[arg(long, value_name = "LIST")]
    pub rpcs_allowed: Option<String>,
    /// Script of commands to run after the start
    #[arg(long, value_name = "FILE", env = "SPDK_RPC_INIT_CONF")]
    pub init_conf: Option<PathBuf>,
    /// Directory in which what the operator asks for is kept across restarts [default: nothing is kept]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Start from the state directory, and keep nothing new there
    #[arg(long)]
    pub no_autosave: bool,
    /// Mode of the RPC socket, octal [default: 600, with --socket-group 660]
    #[arg(long, value_name = "MODE")]
    pub socket_mode: Option<String>,
    /// Group of the RPC socket
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,
    /// Methods that members of a group may call, as GROUP:METHOD,METHOD or GROUP:*; may be given several times
    #[arg(long, value_name = "RULE")]
    pub allow: Vec<String>,
    /// Serve metrics for Prometheus on a unix socket or a loopback address
    #[arg(long, value_name = "PLACE")]
    pub metrics: Option<String>,
    /// User that the control plane runs as when root starts it [default: nobody]
    #[arg(long, value_name = "USER")]
    pub control_user: Option<String>,
    /// Start nothing: have the running `ferry up` of the run directory hand over to this ferry-dataplane, or the one in
    /// this directory, without disconnecting anybody
    #[arg(long, value_name = "PATH")]
    pub upgrade: Option<PathBuf>,
}

/// The words of APP_ARGS.
#[derive(Parser)]
#[command(
    name = "APP_ARGS",
    no_binary_name = true,
    disable_help_flag = true,
    args_override_self = true
)]
struct AppArgs {
    #[command(flatten)]
    args: Args,
}

/// A file that the control plane has to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ControlFile {
    /// Goes behind `--config`.
    Config(PathBuf),
    /// Goes into `SPDK_RPC_INIT_CONF`.
    InitConf(PathBuf),
}

impl Args {
    /// Adds the options of APP_ARGS; the command line wins.
    pub(super) fn with_app_args(self, app_args: Option<&str>) -> anyhow::Result<Args> {
        let Some(text) = app_args.filter(|text| !text.trim().is_empty()) else {
            return Ok(self);
        };
        let words = shlex::split(text)
            .with_context(|| format!("APP_ARGS {text:?} has an unclosed quote"))?;
        let app = AppArgs::try_parse_from(words)
            .with_context(|| format!("APP_ARGS {text:?} is not understood"))?;
        Ok(self.or(app.args))
    }

    fn or(self, other: Args) -> Args {
        Args {
            cpumask: self.cpumask.or(other.cpumask),
            mem_size: self.mem_size.or(other.mem_size),
            no_huge: self.no_huge || other.no_huge,
            run_dir: self.run_dir.or(other.run_dir),
            platform: self.platform.or(other.platform),
            firmware: self.firmware.or(other.firmware),
            poll: self.poll.or(other.poll),
            cpumask_locks: self.cpumask_locks.or(other.cpumask_locks),
            disable_cpumask_locks: self.disable_cpumask_locks || other.disable_cpumask_locks,
            cpumask_locks_dir: self.cpumask_locks_dir.or(other.cpumask_locks_dir),
            rpc_socket: self.rpc_socket.or(other.rpc_socket),
            config: self.config.or(other.config),
            json_ignore_init_errors: self.json_ignore_init_errors || other.json_ignore_init_errors,
            wait_for_rpc: self.wait_for_rpc || other.wait_for_rpc,
            rpcs_allowed: self.rpcs_allowed.or(other.rpcs_allowed),
            init_conf: self.init_conf.or(other.init_conf),
            state_dir: self.state_dir.or(other.state_dir),
            no_autosave: self.no_autosave || other.no_autosave,
            socket_mode: self.socket_mode.or(other.socket_mode),
            socket_group: self.socket_group.or(other.socket_group),
            metrics: self.metrics.or(other.metrics),
            allow: if self.allow.is_empty() {
                other.allow
            } else {
                self.allow
            },
            control_user: self.control_user.or(other.control_user),
            upgrade: self.upgrade.or(other.upgrade),
        }
    }

    /// The CPUs of the cores; none if the data plane will refuse the mask.
    pub(super) fn cores(&self) -> Vec<u32> {
        let mask = self.cpumask.as_deref().unwrap_or(DEFAULT_CPUMASK);
        mask.parse()
            .map_or_else(|_| Vec::new(), |mask: CpuMask| mask.cpus())
    }

    pub(super) fn run_dir(&self) -> PathBuf {
        self.run_dir
            .clone()
            .unwrap_or_else(|| PathBuf::from("/run/ferry"))
    }

    pub(super) fn rpc_socket(&self) -> PathBuf {
        self.rpc_socket
            .clone()
            .unwrap_or_else(|| PathBuf::from("/var/tmp/spdk.sock"))
    }

    /// The data plane's command line; `control_uid` may connect to it.
    pub(super) fn for_dataplane(&self, control_uid: Option<u32>) -> Vec<OsString> {
        let mut line = Line::default();
        line.option("--cpumask", self.cpumask.as_ref());
        line.option("--mem-size", self.mem_size.as_ref());
        line.flag("--no-huge", self.no_huge);
        line.option("--run-dir", Some(self.run_dir()));
        line.option("--platform", self.platform.as_ref());
        line.option("--firmware", self.firmware.as_ref());
        line.option("--poll", self.poll.as_ref());
        let off = self.disable_cpumask_locks.then(|| "off".to_owned());
        line.option("--cpumask-locks", off.or(self.cpumask_locks.clone()));
        line.option("--cpumask-locks-dir", self.cpumask_locks_dir.as_ref());
        line.option("--control-uid", control_uid.map(|uid| uid.to_string()));
        line.0
    }

    /// The control plane's command line, without the files that it reads.
    pub(super) fn for_controlplane(&self) -> Vec<OsString> {
        let mut line = Line::default();
        line.option("--run-dir", Some(self.run_dir()));
        line.option("--rpc-socket", Some(self.rpc_socket()));
        line.flag("--json-ignore-init-errors", self.json_ignore_init_errors);
        line.flag("--wait-for-rpc", self.wait_for_rpc);
        line.option("--rpcs-allowed", self.rpcs_allowed.as_ref());
        line.option("--state-dir", self.state_dir.as_ref());
        line.flag("--no-autosave", self.no_autosave);
        line.option("--socket-mode", self.socket_mode.as_ref());
        line.option("--socket-group", self.socket_group.as_ref());
        line.option("--metrics", self.metrics.as_ref());
        for rule in &self.allow {
            line.option("--allow", Some(rule));
        }
        line.0
    }

    pub(super) fn files_of_controlplane(&self) -> Vec<ControlFile> {
        let config = self.config.clone().map(ControlFile::Config);
        let script = self.init_conf.clone().map(ControlFile::InitConf);
        config.into_iter().chain(script).collect()
    }
}

#[derive(Default)]
struct Line(Vec<OsString>);

impl Line {
    fn flag(&mut self, name: &str, given: bool) {
        self.0.extend(given.then(|| name.into()));
    }

    fn option(&mut self, name: &str, value: Option<impl Into<OsString>>) {
        if let Some(value) = value {
            // One word, so that a value may begin with a dash.
            let mut word = OsString::from(name);
            word.push("=");
            word.push(value.into());
            self.0.push(word);
        }
    }
}
