//! `ferry up`: starts the data plane and the control plane and keeps them running, for machines without a service
//! manager.
//!
//! Each process is in a process group of its own, so that a Ctrl-C reaches only this one, which then stops the control
//! plane and after it the data plane. A process that ends is started again, at once unless it keeps ending; the other one
//! is not touched. Only a process that ends before the service has been ready once ends everything, since it will have
//! said what is wrong with the command line. The data plane stores descriptors here, which it gets back when it is started
//! again. This module waits in poll(2) and nowhere else.

mod fdstore;
mod options;
mod pass;
mod probe;
mod process;
mod reach;
mod sockets;
mod upgrade;

pub use options::Args;

use core::time::Duration;
use std::env;
use std::ffi::OsStr;
use std::fs::DirBuilder;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail};
use ferry_shared::EXIT_ASKED;
use ferry_shared::affinity::Allowed;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{User, chown, geteuid};

use fdstore::FdStore;
use probe::Probe;
use process::{Launch, Process, Standing};
use reach::Reach;
use upgrade::Upgrades;

/// How long the control plane gets to end by itself.
const CONTROLPLANE_GRACE: Duration = Duration::from_secs(3);
/// How long the data plane gets to end by itself; requests in flight are completed in this time.
const DATAPLANE_GRACE: Duration = Duration::from_secs(6);
/// How long a killed process may take to disappear.
const KILL_GRACE: Duration = Duration::from_millis(400);
/// How often the service is asked whether it is ready, until it is.
const PROBE_INTERVAL: Duration = Duration::from_millis(50);

/// Starts the service and returns when it has been told to stop and has done so.
pub fn run(args: Args) -> anyhow::Result<()> {
    let args = args.with_app_args(env::var("APP_ARGS").ok().as_deref())?;
    if let Some(program) = &args.upgrade {
        return upgrade::ask(&args.run_dir(), program);
    }
    raise_fd_limit();
    let mut supervisor = Supervisor::new(&args)?;
    let outcome = supervisor.supervise();
    supervisor.stop();
    sockets::clean(&args.run_dir(), &args.rpc_socket());
    outcome
}

/// What the data plane stores takes descriptors: as many as the system allows.
fn raise_fd_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // With fewer the store is only smaller.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// The user that the control plane runs as; `None` when it is the one that started this process.
fn control_user(args: &Args) -> anyhow::Result<Option<User>> {
    let name = args.control_user.as_deref();
    if !geteuid().is_root() {
        if let Some(name) = name {
            bail!("--control-user {name} needs root; without it the control plane runs as you");
        }
        return Ok(None);
    }
    let name = name.unwrap_or("nobody");
    let found = User::from_name(name).with_context(|| format!("cannot look up user {name}"))?;
    let user = found.with_context(|| {
        format!("there is no user {name}; name another one with --control-user")
    })?;
    Ok(Some(user))
}

/// Makes the state directory for the user of the control plane, who cannot do so in most places. One that exists is
/// left as it is.
fn make_state_dir(dir: &Path, user: &User) -> anyhow::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => {
            return Err(error)
                .with_context(|| format!("cannot create state directory {}", dir.display()));
        }
    }
    chown(dir, Some(user.uid), Some(user.gid))
        .with_context(|| format!("cannot give {} to user {}", dir.display(), user.name))
}

/// One of the programs that are installed beside this one.
fn program(name: &str) -> anyhow::Result<PathBuf> {
    let own = env::current_exe().context("cannot find the own program")?;
    let path = own.with_file_name(name);
    if !path.is_file() {
        bail!(
            "{} is missing: `ferry up` starts the programs that lie beside itself",
            path.display()
        );
    }
    Ok(path)
}

/// The signals that matter, received through a descriptor from now on.
fn watch_signals() -> nix::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGCHLD,
    ] {
        set.add(signal);
    }
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

struct Supervisor {
    signals: SignalFd,
    dataplane: Process,
    controlplane: Process,
    /// Asks for readiness; `None` once it has been announced.
    probe: Option<Probe>,
    ready_line: String,
    run_dir: PathBuf,
    /// Once the service has been ready.
    upgrades: Option<Upgrades>,
}

impl Supervisor {
    fn new(args: &Args) -> anyhow::Result<Supervisor> {
        let user = control_user(args)?;
        let (run_dir, rpc) = (args.run_dir(), args.rpc_socket());
        if let Some(user) = user
            .as_ref()
            .filter(|user| !reach::searchable_by(&run_dir, user))
        {
            let (name, dir) = (&user.name, run_dir.display());
            bail!(
                "user {name} cannot reach run directory {dir}; choose another --run-dir or --control-user"
            );
        }
        if let (Some(dir), Some(user)) = (&args.state_dir, &user) {
            make_state_dir(dir, user)?;
        }
        let cpus = Allowed::now().context("cannot learn which CPUs there are")?;
        // Where that is not allowed it works as well, only with more jitter.
        let _ = cpus.keep_off(&args.cores());
        let dataplane = Launch {
            program: program("ferry-dataplane")?,
            args: args.for_dataplane(user.as_ref().map(|user| user.uid.as_raw())),
            files: Vec::new(),
            user: None,
            standing: Standing::Cores(cpus),
            stale_rpc: None,
        };
        let controlplane = Launch {
            program: program("ferry-controlplane")?,
            args: args.for_controlplane(),
            files: args.files_of_controlplane(),
            user,
            standing: Standing::Aside,
            stale_rpc: Some(rpc.clone()),
        };
        Ok(Supervisor {
            signals: watch_signals().context("cannot watch signals")?,
            dataplane: Process::new("dataplane", dataplane, Some(FdStore::new()?)),
            controlplane: Process::new("controlplane", controlplane, None),
            ready_line: format!("READY rpc={} run-dir={}", rpc.display(), run_dir.display()),
            run_dir: run_dir.clone(),
            probe: Some(Probe::new(rpc, run_dir)),
            upgrades: None,
        })
    }

    /// Keeps both processes running until a signal asks for the end.
    fn supervise(&mut self) -> anyhow::Result<()> {
        loop {
            let mut next = None;
            self.dataplane.drain_store();
            let expected = self.upgrades.as_ref().is_some_and(Upgrades::expects_end);
            for process in [&mut self.dataplane, &mut self.controlplane] {
                if let Some(ended) = process.reap() {
                    if self.probe.is_some() {
                        bail!(
                            "{} has ended ({ended}) before the service was ready; its messages are above",
                            process.program()
                        );
                    }
                    if ended.code() == Some(EXIT_ASKED.into()) && process.store().is_none() {
                        process.say("was asked by RPC to end the service");
                        return Ok(());
                    }
                    process.say(&ended_text(&ended.to_string(), process.delay()));
                }
                if expected && process.store().is_some() {
                    // The upgrade says which program comes next.
                    continue;
                }
                match process.start_if_due() {
                    Ok(wait) => next = earlier(next, wait),
                    Err(error) if self.probe.is_some() => return Err(error),
                    Err(error) => {
                        process.postpone(Duration::ZERO);
                        process.say(&format!(
                            "{error:#}; tries again in {} ms",
                            process.delay().as_millis()
                        ));
                        next = earlier(next, Some(process.delay()));
                    }
                }
            }
            if let Some(upgrades) = &mut self.upgrades {
                next = earlier(next, upgrades.advance(&mut self.dataplane));
                if expected && !self.dataplane.is_running() {
                    continue;
                }
            }
            if let Some(probe) = &mut self.probe {
                if probe.is_ready(self.controlplane.pid()) {
                    self.announce();
                } else {
                    next = earlier(next, Some(PROBE_INTERVAL));
                }
            }
            if self.wait(next)? {
                return Ok(());
            }
        }
    }

    fn announce(&mut self) {
        self.probe = None;
        match Upgrades::new(&self.run_dir) {
            Ok(upgrades) => self.upgrades = Some(upgrades),
            Err(error) => self.dataplane.say(&format!("no upgrades: {error:#}")),
        }
        let mut stdout = io::stdout().lock();
        // Whoever started us need not read it.
        let _ = writeln!(stdout, "{}", self.ready_line).and_then(|()| stdout.flush());
    }

    /// Waits for signals, messages and readiness, at most `limit`; relays messages; tells whether to stop.
    fn wait(&mut self, limit: Option<Duration>) -> anyhow::Result<bool> {
        let timeout = limit.map_or(PollTimeout::NONE, |limit| {
            // Rounded up, so that nothing is looked at before it is due.
            PollTimeout::try_from(limit + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        let sources = [
            Some(self.signals.as_fd()),
            self.dataplane.messages(),
            self.controlplane.messages(),
            self.dataplane.store(),
            self.probe.as_ref().and_then(Probe::descriptor),
            self.upgrades.as_ref().map(Upgrades::descriptor),
        ];
        let mut fds: Vec<PollFd> = sources
            .into_iter()
            .flatten()
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("cannot wait for events"),
        }
        self.dataplane.drain_store();
        self.dataplane.relay();
        self.controlplane.relay();
        Ok(self.stop_requested())
    }

    /// Takes all pending signals and tells whether one of them asks for the end.
    fn stop_requested(&mut self) -> bool {
        let mut stop = false;
        while let Ok(Some(signal)) = self.signals.read_signal() {
            stop |= signal.ssi_signo != Signal::SIGCHLD as u32;
        }
        stop
    }

    /// Stops the control plane, then the data plane.
    fn stop(&mut self) {
        self.probe = None;
        if let Some(mut upgrades) = self.upgrades.take() {
            upgrades.cancel();
        }
        let mut patient = true;
        for (which, grace) in [
            (Which::Controlplane, CONTROLPLANE_GRACE),
            (Which::Dataplane, DATAPLANE_GRACE),
        ] {
            patient = self.end(which, Signal::SIGTERM, grace, patient);
            if self.process(which).is_running() {
                self.process(which)
                    .say("does not end by itself and is killed");
                self.end(which, Signal::SIGKILL, KILL_GRACE, true);
            }
        }
        self.dataplane.clear_store();
    }

    /// Sends a signal and waits for the end of the process. A second request to stop ends the patience.
    fn end(&mut self, which: Which, signal: Signal, grace: Duration, mut patient: bool) -> bool {
        self.process(which).signal(signal);
        let start = Instant::now();
        while self.process(which).reap().is_none() && self.process(which).is_running() {
            let left = grace.saturating_sub(start.elapsed());
            if left.is_zero() || !patient {
                break;
            }
            // Without poll(2) there is nothing to wait with, so the process is killed at once.
            patient = !self.wait(Some(left)).unwrap_or(true);
        }
        patient
    }

    fn process(&mut self, which: Which) -> &mut Process {
        match which {
            Which::Dataplane => &mut self.dataplane,
            Which::Controlplane => &mut self.controlplane,
        }
    }
}

#[derive(Clone, Copy)]
enum Which {
    Dataplane,
    Controlplane,
}

fn ended_text(ended: &str, delay: Duration) -> String {
    match delay.as_millis() {
        0 => format!("ended ({ended}), starts again"),
        ms => format!("ended ({ended}), starts again in {ms} ms"),
    }
}

fn earlier(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    one.into_iter().chain(other).min()
}

/// The name of a program for messages.
fn file_name(path: &Path) -> &str {
    path.file_name()
        .and_then(OsStr::to_str)
        .unwrap_or("the program")
}

#[cfg(test)]
mod tests;
