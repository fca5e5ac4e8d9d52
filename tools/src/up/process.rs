//! One supervised process: how it is started, its messages, and when it is started again.
#![expect(unsafe_code, reason = "prepares the new process between fork and exec")]

use core::time::Duration;
use std::ffi::OsString;
use std::io::{self, PipeReader, Read, Write, pipe};
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::Context;
use ferry_shared::affinity::Allowed;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::{Pid, User, getppid};

use super::fdstore::{FdStore, News};
use super::options::ControlFile;
use super::pass::Passed;
use super::{Reach, file_name, sockets};

/// A process that has lived this long has not been started in vain.
const SETTLED: Duration = Duration::from_millis(100);
/// So many processes that were started in vain, one after the other, are replaced at once.
const FREE_STARTS: u32 = 20;
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(5);
/// Longest line that is relayed in one piece.
const LINE: usize = 16 * 1024;

/// What a process is to the cores, whose requests nothing may delay.
#[derive(Clone, Copy)]
pub(super) enum Standing {
    /// It has them, and these CPUs.
    Cores(Allowed),
    /// It keeps out of their way: on the CPUs that this process keeps to, and behind them where there is but one.
    Aside,
}

/// How far behind the cores it is then.
const NICE: libc::c_int = 10;

impl Standing {
    /// Runs in the new process.
    fn take(self) -> io::Result<()> {
        match self {
            Standing::Cores(cpus) => {
                // Where it is not allowed, nothing has been changed before either.
                let _ = cpus.keep_off(&[]);
                Ok(())
            }
            Standing::Aside => {
                // SAFETY: takes numbers, and no memory.
                let set = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
                match set {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            }
        }
    }
}

/// How to start a process.
pub(super) struct Launch {
    pub(super) program: PathBuf,
    pub(super) args: Vec<OsString>,
    pub(super) files: Vec<ControlFile>,
    /// Whom it runs as, if not as this process.
    pub(super) user: Option<User>,
    pub(super) standing: Standing,
    /// An RPC socket that a former instance may have left.
    pub(super) stale_rpc: Option<PathBuf>,
}

/// Delays between starts. A crash is mended at once, for guests wait; a process that keeps ending as soon as it has
/// begun is started ever less often.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    in_vain: u32,
    delay: Duration,
}

impl Backoff {
    /// How long to wait after a process that has lived so long.
    pub(super) fn after(&mut self, lived: Duration) -> Duration {
        self.in_vain = match lived >= SETTLED {
            true => 0,
            false => self.in_vain.saturating_add(1),
        };
        self.delay = match self.in_vain.checked_sub(FREE_STARTS + 1) {
            None => Duration::ZERO,
            Some(over) => FIRST_DELAY
                .saturating_mul(1 << over.min(16))
                .min(LONGEST_DELAY),
        };
        self.delay
    }
}

struct Running {
    child: Child,
    since: Instant,
    /// It has said so; only the process with a store of descriptors does.
    ready: bool,
}

pub(super) struct Process {
    name: &'static str,
    launch: Launch,
    running: Option<Running>,
    messages: Option<Messages>,
    backoff: Backoff,
    not_before: Option<Instant>,
    /// What it has stored for its successor.
    store: Option<FdStore>,
}

impl Process {
    pub(super) fn new(name: &'static str, launch: Launch, store: Option<FdStore>) -> Process {
        Process {
            name,
            launch,
            running: None,
            messages: None,
            backoff: Backoff::default(),
            not_before: None,
            store,
        }
    }

    /// The descriptor on which it stores descriptors.
    pub(super) fn store(&self) -> Option<BorrowedFd<'_>> {
        self.store.as_ref().map(AsFd::as_fd)
    }

    /// Takes what it has stored and said.
    pub(super) fn drain_store(&mut self) {
        let pid = self.pid();
        let Some(store) = &mut self.store else {
            return;
        };
        let News { ready } = store.drain(pid);
        if let Some(running) = &mut self.running {
            running.ready |= ready;
        }
    }

    /// Forgets what it has stored, for good.
    pub(super) fn clear_store(&mut self) {
        if let Some(store) = &mut self.store {
            store.clear();
        }
    }

    /// Whether it has said that it is ready.
    pub(super) fn is_ready(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.ready)
    }

    /// Whether its last start was in vain.
    pub(super) fn has_failed(&self) -> bool {
        self.running.is_none() && self.not_before.is_some()
    }

    /// Which program is started.
    pub(super) fn path(&self) -> &Path {
        &self.launch.program
    }

    /// Starts another program from now on, and the next time without delay.
    pub(super) fn replace_program(&mut self, program: PathBuf) {
        self.launch.program = program;
        self.backoff = Backoff::default();
        self.not_before = None;
    }

    /// Starts `program` beside the running process, with all that this one has stored.
    pub(super) fn check(&self, program: &Path) -> anyhow::Result<(Child, PipeReader)> {
        let mut command = Command::new(program);
        command.arg("--check-recovery");
        let passed = self.store.as_ref().map(Passed::new).transpose()?;
        spawn(command, Vec::new(), passed, Standing::Aside)
            .with_context(|| format!("cannot start {}", program.display()))
    }

    pub(super) fn program(&self) -> &str {
        file_name(&self.launch.program)
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// The delay before the next start.
    pub(super) fn delay(&self) -> Duration {
        self.backoff.delay
    }

    /// Collects the process if it has ended.
    pub(super) fn reap(&mut self) -> Option<ExitStatus> {
        let running = self.running.as_mut()?;
        let status = running.child.try_wait().ok().flatten()?;
        let lived = running.since.elapsed();
        // While it is known by its number: what it has stored before it died.
        self.drain_store();
        self.relay();
        (self.running, self.messages) = (None, None);
        self.postpone(lived);
        Some(status)
    }

    /// Puts the next start off, after a process that has lived so long.
    pub(super) fn postpone(&mut self, lived: Duration) {
        self.not_before = Some(Instant::now() + self.backoff.after(lived));
    }

    /// Its process id, while it runs.
    pub(super) fn pid(&self) -> Option<Pid> {
        self.running
            .as_ref()
            .map(|running| Pid::from_raw(running.child.id().cast_signed()))
    }

    /// Starts the process unless it runs; gives the time to wait if that is not due yet.
    pub(super) fn start_if_due(&mut self) -> anyhow::Result<Option<Duration>> {
        if self.running.is_some() {
            return Ok(None);
        }
        let wait = self
            .not_before
            .map(|at| at.saturating_duration_since(Instant::now()));
        if let Some(wait) = wait.filter(|wait| !wait.is_zero()) {
            return Ok(Some(wait));
        }
        self.start()
            .with_context(|| format!("cannot start {}", self.launch.program.display()))?;
        Ok(None)
    }

    fn start(&mut self) -> anyhow::Result<()> {
        if let Some(rpc) = &self.launch.stale_rpc {
            sockets::clean_rpc(rpc);
        }
        let (mut command, inherited) = self.command()?;
        if let Some(user) = &self.launch.user {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        let kept = inherited.iter().filter_map(Reach::descriptor).collect();
        let passed = self.store.as_ref().map(Passed::new).transpose()?;
        let (child, reader) = spawn(command, kept, passed, self.launch.standing)?;
        self.messages = Some(Messages {
            pipe: reader,
            line: Vec::new(),
        });
        self.running = Some(Running {
            child,
            since: Instant::now(),
            ready: false,
        });
        Ok(())
    }

    /// The command, and the files that it must inherit.
    fn command(&self) -> anyhow::Result<(Command, Vec<Reach>)> {
        let user = self.launch.user.as_ref();
        let reach = |path: &PathBuf| {
            Reach::of(path, user).with_context(|| format!("cannot open {}", path.display()))
        };
        let program = reach(&self.launch.program)?;
        let mut command = Command::new(program.name());
        command.arg0(&self.launch.program).args(&self.launch.args);
        let mut inherited = vec![program];
        for file in &self.launch.files {
            let (ControlFile::Config(path) | ControlFile::InitConf(path)) = file;
            let reach = reach(path)?;
            if reach.descriptor().is_some() {
                let name = user.map_or("", |user| user.name.as_str());
                self.say(&format!(
                    "user {name} cannot reach {} and gets it as {}",
                    path.display(),
                    reach.name().display()
                ));
            }
            match file {
                ControlFile::Config(_) => command.arg("--config").arg(reach.name()),
                ControlFile::InitConf(_) => command.env("SPDK_RPC_INIT_CONF", reach.name()),
            };
            inherited.push(reach);
        }
        Ok((command, inherited))
    }

    /// Sends a signal to the process and its own children.
    pub(super) fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            // It has not been collected, so its process group still exists.
            let _ = killpg(pid, signal);
        }
    }

    /// The descriptor of its messages.
    pub(super) fn messages(&self) -> Option<BorrowedFd<'_>> {
        self.messages.as_ref().map(|messages| messages.pipe.as_fd())
    }

    /// Passes its messages on.
    pub(super) fn relay(&mut self) {
        if self
            .messages
            .as_mut()
            .is_some_and(|messages| !messages.relay(self.name))
        {
            self.messages = None;
        }
    }

    /// Says something about the process among its messages.
    pub(super) fn say(&self, text: &str) {
        write_line("up", format!("{}: {text}", self.program()).as_bytes());
    }
}

/// Starts a process in a group of its own; gives it and the end of a pipe with its messages.
fn spawn(
    mut command: Command,
    kept: Vec<RawFd>,
    mut passed: Option<Passed>,
    standing: Standing,
) -> anyhow::Result<(Child, PipeReader)> {
    let (reader, writer) = pipe()?;
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .process_group(0);
    let parent = Pid::this();
    let prepare = move || {
        prepare(parent, &kept)?;
        standing.take()?;
        passed.as_mut().map_or(Ok(()), Passed::install)
    };
    // SAFETY: this process has one thread, so that the new one finds every lock free, that of the allocator too.
    unsafe { command.pre_exec(prepare) };
    Ok((command.spawn()?, reader))
}

/// Runs in the new process: takes signals again, ends with its parent, keeps the files that it has to inherit.
fn prepare(parent: Pid, kept: &[RawFd]) -> io::Result<()> {
    SigSet::empty().thread_set_mask()?;
    set_pdeathsig(Signal::SIGTERM)?;
    if getppid() != parent {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    for fd in kept {
        // SAFETY: the number is that of a file that the parent holds open across the fork.
        let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    }
    Ok(())
}

/// The messages of a process, line by line.
struct Messages {
    pipe: PipeReader,
    line: Vec<u8>,
}

impl Messages {
    /// Relays what is there; false at the end.
    fn relay(&mut self, name: &str) -> bool {
        let mut bytes = [0; 4096];
        // Bounded, so that a flood of messages keeps nothing else from being looked at.
        for _ in 0..64 {
            match self.pipe.read(&mut bytes) {
                Ok(0) => {
                    self.flush(name);
                    return false;
                }
                Ok(len) => self.split(name, &bytes[..len]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        true
    }

    fn split(&mut self, name: &str, bytes: &[u8]) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.ends_with(b"\n") || self.line.len() >= LINE {
                self.flush(name);
            }
        }
    }

    fn flush(&mut self, name: &str) {
        let line = self.line.trim_ascii_end();
        if !line.is_empty() {
            write_line(name, line);
        }
        self.line.clear();
    }
}

/// Writes one line with its origin, in one piece.
fn write_line(name: &str, line: &[u8]) {
    let whole = [name.as_bytes(), b": ", line, b"\n"].concat();
    // There is nobody to tell that messages cannot be written.
    let _ = io::stderr().lock().write_all(&whole);
}
