//! One supervised process: how it is started, its messages, and when it is started again.
#![expect(unsafe_code, reason = "prepares the new process between fork and exec")]

use core::time::Duration;
use std::ffi::OsString;
use std::io::{self, PipeReader, Read, Write, pipe};
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::Context;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::{Pid, User, getppid};

use super::options::ControlFile;
use super::{Reach, file_name, sockets};

/// A process that has lived this long has not been started in vain.
const SETTLED: Duration = Duration::from_secs(10);
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(5);
/// Longest line that is relayed in one piece.
const LINE: usize = 16 * 1024;

/// How to start a process.
pub(super) struct Launch {
    pub(super) program: PathBuf,
    pub(super) args: Vec<OsString>,
    pub(super) files: Vec<ControlFile>,
    /// Whom it runs as, if not as this process.
    pub(super) user: Option<User>,
    /// An RPC socket that a former instance may have left.
    pub(super) stale_rpc: Option<PathBuf>,
}

/// Delays between starts: they double as long as the process keeps ending.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    delay: Duration,
}

impl Backoff {
    /// How long to wait after a process that has lived so long.
    pub(super) fn after(&mut self, lived: Duration) -> Duration {
        let next = if lived >= SETTLED {
            FIRST_DELAY
        } else {
            self.delay.saturating_mul(2)
        };
        self.delay = next.clamp(FIRST_DELAY, LONGEST_DELAY);
        self.delay
    }
}

struct Running {
    child: Child,
    since: Instant,
}

pub(super) struct Process {
    name: &'static str,
    launch: Launch,
    running: Option<Running>,
    messages: Option<Messages>,
    backoff: Backoff,
    not_before: Option<Instant>,
}

impl Process {
    pub(super) fn new(name: &'static str, launch: Launch) -> Process {
        Process {
            name,
            launch,
            running: None,
            messages: None,
            backoff: Backoff::default(),
            not_before: None,
        }
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
        let (reader, writer) = pipe()?;
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let (mut command, inherited) = self.command()?;
        command
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .process_group(0);
        if let Some(user) = &self.launch.user {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        let parent = Pid::this();
        let kept: Vec<RawFd> = inherited.iter().filter_map(Reach::descriptor).collect();
        // SAFETY: the closure only makes system calls, and reads integers and the list that were made before the fork.
        unsafe { command.pre_exec(move || prepare(parent, &kept)) };
        let child = command.spawn()?;
        self.messages = Some(Messages {
            pipe: reader,
            line: Vec::new(),
        });
        self.running = Some(Running {
            child,
            since: Instant::now(),
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
