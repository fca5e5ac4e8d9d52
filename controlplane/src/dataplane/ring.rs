//! The real link: the rings of the data plane's run directory.
//!
//! Commands that find the ring full wait here in their order. When the data plane goes away, every command without an
//! answer fails.

use core::cell::RefCell;
use core::time::Duration;
use std::collections::HashMap;
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::rc::Rc;

use ferry_shared::counters::Counters;
use ferry_shared::errno::Errno;
use ferry_shared::handshake::Channel;
use ferry_shared::handshake::client::ConnectError;
use ferry_shared::handshake::client::connect;
use ferry_shared::msg::Command;
use ferry_shared::msg::Event;
use ferry_shared::msg::Failure;
use ferry_shared::msg::Reply;
use ferry_shared::msg::ToControlplane;
use ferry_shared::msg::ToDataplane;
use ferry_shared::ring::PushError;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use super::Link;
use super::Outcome;

/// How long the data plane may take to answer the handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// A connection to the data plane.
pub struct RingLink {
    state: RefCell<State>,
    doorbell: Doorbell,
    counters: Option<Rc<Counters>>,
}

struct State {
    channel: Channel,
    next: u64,
    backlog: VecDeque<ToDataplane>,
    waiting: HashMap<u64, oneshot::Sender<Result<Reply, Failure>>>,
    /// Why the connection is of no further use.
    lost: Option<String>,
}

fn gone(command: &str, why: &str) -> Failure {
    let detail = format!("the data plane went away before it answered {command}: {why}");
    Failure::new(Errno::ENODEV, detail)
}

fn socket_error(path: &Path, error: io::Error) -> ConnectError {
    ConnectError::Socket {
        path: path.to_owned(),
        error,
    }
}

/// Tells when the socket of the data plane is readable; the channel alone reads it.
struct Doorbell(UnixStream);

impl Doorbell {
    fn of(socket: BorrowedFd<'_>) -> io::Result<Doorbell> {
        let socket = std::os::unix::net::UnixStream::from(socket.try_clone_to_owned()?);
        UnixStream::from_std(socket).map(Doorbell)
    }

    async fn rings(&self) -> io::Result<()> {
        self.0.readable().await?;
        // What arrives from here on makes it readable again.
        let forget = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
        let _ = self.0.try_io(Interest::READABLE, forget);
        Ok(())
    }
}

impl RingLink {
    /// Connects to the data plane of a run directory.
    pub async fn connect(run_dir: &Path) -> Result<Rc<RingLink>, ConnectError> {
        let failed = |error| socket_error(run_dir, error);
        let connecting = connect(run_dir)?;
        let doorbell = Doorbell::of(connecting.as_fd()).map_err(failed)?;
        let answer = async {
            loop {
                if let Some(channel) = connecting.finish()? {
                    return Ok::<Channel, ConnectError>(channel);
                }
                doorbell.rings().await.map_err(failed)?;
            }
        };
        let mut channel = match tokio::time::timeout(HANDSHAKE, answer).await {
            Ok(answer) => answer?,
            Err(_) => {
                return Err(ConnectError::Timeout {
                    path: run_dir.to_owned(),
                    waited: HANDSHAKE,
                });
            }
        };
        let doorbell = Doorbell::of(channel.as_fd()).map_err(failed)?;
        let counters = channel.take_counters().and_then(|file| {
            Counters::open(&file)
                .inspect_err(|error| tracing::warn!(%error, "no counters of the data plane"))
                .ok()
        });
        let state = State {
            channel,
            next: 1,
            backlog: VecDeque::new(),
            waiting: HashMap::new(),
            lost: None,
        };
        Ok(Rc::new(RingLink {
            state: RefCell::new(state),
            doorbell,
            counters: counters.map(Rc::new),
        }))
    }

    /// Delivers completions to their callers and events to `on_event`, until the data plane goes away; says why.
    pub async fn run(&self, mut on_event: impl FnMut(Event)) -> String {
        loop {
            let asleep = match self.state.borrow_mut().turn(&mut on_event) {
                Ok(asleep) => asleep,
                Err(why) => return self.lose(why),
            };
            if !asleep {
                // Others get their turn even if messages never end.
                tokio::task::yield_now().await;
                continue;
            }
            if let Err(error) = self.doorbell.rings().await {
                return self.lose(error.to_string());
            }
            let woken = self.state.borrow_mut().channel.wake();
            if let Err(lost) = woken {
                // It may have answered before it went; a broken ring has nothing more to say.
                let _ = self.state.borrow_mut().turn(&mut on_event);
                return self.lose(lost.to_string());
            }
        }
    }

    fn lose(&self, why: String) -> String {
        let mut state = self.state.borrow_mut();
        state.backlog.clear();
        for (_, caller) in state.waiting.drain() {
            // A caller that has lost interest is no matter.
            let _ = caller.send(Err(gone("the command", &why)));
        }
        state.lost = Some(why.clone());
        why
    }
}

impl State {
    /// Receives what is there and sends what waits. True: nothing is left to do before the next doorbell.
    fn turn(&mut self, on_event: &mut impl FnMut(Event)) -> Result<bool, String> {
        self.flush()?;
        while let Some(message) = self.channel.recv().map_err(|error| error.to_string())? {
            match message {
                ToControlplane::Event(event) => on_event(event),
                ToControlplane::Completion { seq, result } => match self.waiting.remove(&seq) {
                    Some(caller) => {
                        let _ = caller.send(result);
                    }
                    None => {
                        return Err(format!(
                            "it has answered command {seq}, which was not asked"
                        ));
                    }
                },
            }
        }
        self.channel
            .prepare_sleep()
            .map_err(|error| error.to_string())
    }

    fn flush(&mut self) -> Result<(), String> {
        while let Some(message) = self.backlog.front() {
            match self.channel.send(message) {
                Ok(()) => {}
                // Nothing was sent, so only this command fails.
                Err(PushError::TooLong) => self.refuse(message.seq),
                Err(PushError::Full) => return Ok(()),
                Err(PushError::Corrupt(corrupt)) => return Err(corrupt.to_string()),
            }
            self.backlog.pop_front();
        }
        Ok(())
    }

    fn refuse(&mut self, seq: u64) {
        if let Some(caller) = self.waiting.remove(&seq) {
            let _ = caller.send(Err(Failure::new(
                Errno::E2BIG,
                "the command is too long for the ring",
            )));
        }
    }
}

impl Link for RingLink {
    fn counters(&self) -> Option<Rc<Counters>> {
        self.counters.clone()
    }

    fn call(&self, command: Command) -> Outcome {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.state.borrow_mut();
        if let Some(why) = &state.lost {
            let failure = gone("the command", why);
            return Box::pin(async move { Err(failure) });
        }
        let seq = state.next;
        state.next = seq.wrapping_add(1);
        state.waiting.insert(seq, sender);
        state.backlog.push_back(ToDataplane { seq, command });
        // A broken ring shows again, and is reported, in `run`.
        let _ = state.flush();
        drop(state);
        Box::pin(async move {
            receiver
                .await
                .unwrap_or_else(|_| Err(gone("the command", "the connection was dropped")))
        })
    }
}
