//! Hands the data plane over to another program while guests are connected.
//!
//! `ferry up --upgrade PATH` asks the running `ferry up` through a socket in the run directory. The new program is first
//! asked whether it can read what the old one has stored, while the old one serves on. Only then the old one is told to
//! end, which it does as soon as no request is in flight, and the new one is started in its place. One that does not come
//! up is replaced by the old one again.

use core::time::Duration;
use std::fs;
use std::io::{BufRead, BufReader, PipeReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Instant;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;

use super::process::Process;

/// The socket's name in the run directory.
pub(super) const SOCKET: &str = "up.sock";
/// How long the new program may take to say whether it can read what is stored.
const CHECK: Duration = Duration::from_secs(10);
/// How long the new program may take until it is ready.
const START: Duration = Duration::from_secs(20);
/// How long the client waits for all of it.
const ALL: Duration = Duration::from_secs(60);
/// Bytes of a request.
const REQUEST: u64 = 4096;

/// Where an upgrade is.
enum Stage {
    /// The new program looks at what is stored.
    Checked(Child, PipeReader),
    /// The old process has been told to end.
    Ending,
    /// The new process has been started.
    Starting,
    /// The new process has failed, and the old program has been started again.
    Returning,
}

struct Upgrade {
    client: UnixStream,
    old: PathBuf,
    new: PathBuf,
    stage: Stage,
    /// Since when the stage lasts.
    since: Instant,
    /// When the old process was told to end.
    paused: Instant,
    /// How long the old process took to end.
    ended: Duration,
}

/// The socket on which upgrades are asked for, and the one that is under way.
pub(super) struct Upgrades {
    listener: UnixListener,
    current: Option<Upgrade>,
}

impl Upgrades {
    /// Listens in the run directory, which exists.
    pub(super) fn new(run_dir: &Path) -> anyhow::Result<Upgrades> {
        let path = run_dir.join(SOCKET);
        let failed = || format!("cannot listen on {}", path.display());
        // A former `ferry up` has left it: the data plane holds the lock on the directory.
        let _ = fs::remove_file(&path);
        let before = umask(Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(&path);
        umask(before);
        let listener = listener.with_context(failed)?;
        listener.set_nonblocking(true).with_context(failed)?;
        Ok(Upgrades {
            listener,
            current: None,
        })
    }

    /// Readable when somebody asks for an upgrade.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Whether the data plane's end is a part of an upgrade.
    pub(super) fn expects_end(&self) -> bool {
        let stage = self.current.as_ref().map(|upgrade| &upgrade.stage);
        matches!(stage, Some(Stage::Ending))
    }

    /// Goes on with the upgrade, without waiting; gives the time after which to look again.
    pub(super) fn advance(&mut self, dataplane: &mut Process) -> Option<Duration> {
        self.accept(dataplane);
        let upgrade = self.current.take()?;
        self.current = upgrade.advance(dataplane);
        self.current.as_ref().map(Upgrade::left)
    }

    fn accept(&mut self, dataplane: &Process) {
        let Ok((client, _)) = self.listener.accept() else {
            return;
        };
        let begun = match self.current {
            Some(_) => Err(anyhow::anyhow!("another upgrade is under way")),
            None => Upgrade::begin(client.try_clone(), dataplane),
        };
        match begun {
            Ok(upgrade) => self.current = Some(upgrade),
            Err(error) => {
                dataplane.say(&format!("upgrade refused: {error:#}"));
                answer(&client, &format!("error {error:#}"));
            }
        }
    }

    /// The end of everything: nobody waits any longer.
    pub(super) fn cancel(&mut self) {
        if let Some(upgrade) = self.current.take() {
            upgrade.give_up("the service is being stopped");
        }
    }
}

/// The last line that the checking process has written.
fn last_words(messages: &mut PipeReader) -> String {
    let mut bytes = Vec::new();
    // The process has ended, so that there is nothing to wait for.
    let _ = messages.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    let last = text.lines().rfind(|line| !line.trim().is_empty());
    last.map_or_else(
        || "it said nothing".to_owned(),
        |line| format!("it said: {}", line.trim()),
    )
}

fn answer(mut client: &UnixStream, text: &str) {
    // Whoever asked may have gone.
    let _ = client.write_all(format!("{text}\n").as_bytes());
}

impl Upgrade {
    fn begin(client: std::io::Result<UnixStream>, dataplane: &Process) -> anyhow::Result<Upgrade> {
        let client = client?;
        let peer = getsockopt(&client, PeerCredentials)?;
        let own = geteuid().as_raw();
        if peer.uid() != 0 && peer.uid() != own {
            bail!("user {} may not upgrade the data plane", peer.uid());
        }
        // The one line has been sent before the connection is noticed, or a moment later.
        client.set_read_timeout(Some(Duration::from_millis(500)))?;
        client.set_write_timeout(Some(Duration::from_millis(500)))?;
        let mut line = String::new();
        BufReader::new((&client).take(REQUEST))
            .read_line(&mut line)
            .context("no request came")?;
        let path = line.strip_prefix("upgrade ").map(str::trim_end);
        let new = PathBuf::from(path.context("the request is not understood")?);
        if !dataplane.is_ready() {
            bail!("the data plane is not ready; try again when it is");
        }
        let (child, messages) = dataplane.check(&new)?;
        dataplane.say(&format!("asks {} to read its state", new.display()));
        let now = Instant::now();
        Ok(Upgrade {
            client,
            old: dataplane.path().to_owned(),
            new,
            stage: Stage::Checked(child, messages),
            since: now,
            paused: now,
            ended: Duration::ZERO,
        })
    }

    /// How long the present stage may still take.
    fn left(&self) -> Duration {
        let limit = match self.stage {
            Stage::Checked(..) => CHECK,
            Stage::Ending | Stage::Starting | Stage::Returning => START,
        };
        limit.saturating_sub(self.since.elapsed())
    }

    fn enter(mut self, stage: Stage) -> Option<Upgrade> {
        self.stage = stage;
        self.since = Instant::now();
        Some(self)
    }

    fn give_up(mut self, why: &str) {
        if let Stage::Checked(child, _) = &mut self.stage {
            let _ = child.kill();
            let _ = child.wait();
        }
        answer(&self.client, &format!("error {why}"));
    }

    fn advance(mut self, dataplane: &mut Process) -> Option<Upgrade> {
        let late = self.left().is_zero();
        match &mut self.stage {
            Stage::Checked(child, messages) => match child.try_wait() {
                Ok(None) if !late => Some(self),
                Ok(Some(status)) if status.success() => {
                    dataplane.say("ends for an upgrade");
                    dataplane.signal(Signal::SIGTERM);
                    self.paused = Instant::now();
                    self.enter(Stage::Ending)
                }
                Ok(Some(status)) => {
                    let why = format!(
                        "{} cannot take over ({status}), and the old version serves on; {}",
                        self.new.display(),
                        last_words(messages)
                    );
                    dataplane.say(&format!("upgrade refused: {why}"));
                    self.give_up(&why);
                    None
                }
                Ok(None) | Err(_) => {
                    let why = format!(
                        "{} does not say whether it can take over",
                        self.new.display()
                    );
                    dataplane.say(&format!("upgrade refused: {why}"));
                    self.give_up(&why);
                    None
                }
            },
            Stage::Ending if !dataplane.is_running() => {
                self.ended = self.paused.elapsed();
                dataplane.replace_program(self.new.clone());
                self.enter(Stage::Starting)
            }
            Stage::Ending => {
                if late {
                    // What is in flight is recovered like after a crash.
                    dataplane.signal(Signal::SIGKILL);
                }
                Some(self)
            }
            Stage::Starting if dataplane.is_ready() => {
                let text = format!(
                    "upgraded to {}: paused for {} ms, {} ms of them to complete requests in flight",
                    self.new.display(),
                    self.paused.elapsed().as_millis(),
                    self.ended.as_millis()
                );
                dataplane.say(&text);
                answer(&self.client, &format!("ok {text}"));
                None
            }
            Stage::Starting if late || dataplane.has_failed() => {
                dataplane.signal(Signal::SIGKILL);
                dataplane.replace_program(self.old.clone());
                dataplane.say("the new version does not come up; the old one goes on");
                self.enter(Stage::Returning)
            }
            Stage::Starting => Some(self),
            Stage::Returning if late || dataplane.is_ready() => {
                let why = format!(
                    "{} did not come up; the old version serves again",
                    self.new.display()
                );
                self.give_up(&why);
                None
            }
            Stage::Returning => Some(self),
        }
    }
}

/// Asks the `ferry up` of this run directory for an upgrade, and says how it went.
pub(super) fn ask(run_dir: &Path, program: &Path) -> anyhow::Result<()> {
    let program =
        fs::canonicalize(program).with_context(|| format!("cannot find {}", program.display()))?;
    let program = match program.is_dir() {
        true => program.join("ferry-dataplane"),
        false => program,
    };
    let executable = fs::metadata(&program)
        .with_context(|| format!("cannot find {}", program.display()))?
        .permissions()
        .mode()
        & 0o111
        != 0;
    let text = program.to_str().filter(|text| !text.contains('\n'));
    let Some(text) = text.filter(|_| executable) else {
        bail!("{} is not a program", program.display());
    };
    let path = run_dir.join(SOCKET);
    let mut link = UnixStream::connect(&path).with_context(|| {
        format!(
            "no `ferry up` can be reached at {}; name its --run-dir",
            path.display()
        )
    })?;
    link.set_read_timeout(Some(ALL))?;
    writeln!(link, "upgrade {text}")?;
    let mut line = String::new();
    BufReader::new(link)
        .read_line(&mut line)
        .context("no answer from `ferry up`")?;
    match line.trim_end().split_once(' ') {
        Some(("ok", text)) => {
            println!("{text}");
            Ok(())
        }
        Some(("error", why)) => bail!("{why}"),
        _ => bail!("`ferry up` has ended before the upgrade was done"),
    }
}
