//! Child processes that never outlive the test which started them.

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Polls `condition` until it holds or `limit` has passed.
///
/// The pause between two looks only spares the processor; no outcome depends on its length.
///
/// # Errors
/// When the limit passes first; `what` names the condition.
pub fn wait_until(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !condition().with_context(|| format!("while waiting until {what}"))? {
        if Instant::now() >= deadline {
            bail!("waited {} s in vain until {what}", limit.as_secs());
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
    Ok(())
}

/// A child process in a process group of its own, with its output in a log file.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, with standard output and standard error appended to `log` and nothing to read.
    ///
    /// # Errors
    /// When the log cannot be opened or the program cannot be started.
    pub fn start(command: &Command, log: &Path) -> Result<Self> {
        Self::start_ending_by(Signal::SIGTERM, command, log)
    }

    /// As [`Process::start`], for a program that may not heed SIGTERM: `signal` ends it should the test be killed.
    ///
    /// # Errors
    /// As [`Process::start`].
    pub fn start_ending_by(signal: Signal, command: &Command, log: &Path) -> Result<Self> {
        Self::spawn(signal, command, log, Stdio::null())
    }

    /// As [`Process::start_ending_by`], with what the program reads from standard input.
    ///
    /// # Errors
    /// As [`Process::start`].
    pub fn start_reading(
        signal: Signal,
        command: &Command,
        log: &Path,
    ) -> Result<(Self, ChildStdin)> {
        let mut process = Self::spawn(signal, command, log, Stdio::piped())?;
        let input = process.child.stdin.take().context("no pipe to write to")?;
        Ok((process, input))
    }

    fn spawn(signal: Signal, command: &Command, log: &Path, input: Stdio) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let out = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("open {}", log.display()))?;
        let child = ending_with_us(signal, command)
            .stdin(input)
            .stdout(out.try_clone()?)
            .stderr(out)
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self {
            child,
            name,
            log: log.to_path_buf(),
        })
    }

    /// The process's id, which is also its group's.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far.
    #[must_use]
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// When the kernel will not say.
    pub fn running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits for its end; at the limit its group is killed.
    ///
    /// # Errors
    /// When the limit passes first.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let mut status = None;
        let ended = wait_until(&format!("{} ends", self.name), limit, || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        });
        match (ended, status) {
            (Ok(()), Some(status)) => Ok(status),
            (ended, _) => {
                self.signal_group(Signal::SIGKILL);
                ended.and_then(|()| bail!("{} has no exit status", self.name))
            }
        }
    }

    /// Asks it to end, as an operator's Ctrl-C or service manager would, and waits.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn stop(&mut self, signal: Signal, limit: Duration) -> Result<ExitStatus> {
        self.signal_group(signal);
        self.wait(limit)
    }

    fn signal_group(&self, signal: Signal) {
        let Ok(id) = i32::try_from(self.child.id()) else {
            return;
        };
        match killpg(Pid::from_raw(id), signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => eprintln!("cannot signal the group of {}: {error}", self.name),
        }
    }
}

/// The same command, but asked to end by the kernel should the test be killed without a chance to clean up.
fn ending_with_us(signal: Signal, command: &Command) -> Command {
    let mut wrapped = Command::new("setpriv");
    wrapped
        .args(["--pdeathsig", signal.as_str().trim_start_matches("SIG")])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        wrapped.current_dir(dir);
    }
    wrapped
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.running(), Ok(true))
            && self.stop(Signal::SIGTERM, Duration::from_secs(10)).is_err()
        {
            eprintln!("{} did not end on SIGTERM and was killed", self.name);
        }
        self.signal_group(Signal::SIGKILL);
        if let Err(error) = self.child.wait() {
            eprintln!("cannot reap {}: {error}", self.name);
        }
    }
}
