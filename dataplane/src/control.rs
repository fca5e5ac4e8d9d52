//! The control plane's connection: ring frames in, commands out, and the answers back.
//!
//! Everything that arrives is hostile until it has been checked. A control plane that breaks the rules of the rings loses
//! its connection, and nothing else: devices run on.

use std::collections::VecDeque;
use std::sync::Arc;

use ferry_shared::handshake::Channel;
use ferry_shared::handshake::server::{Accepted, Listener};
use ferry_shared::msg::{Command, Event, ToControlplane, ToDataplane};
use ferry_shared::ring::PushError;

use crate::os::poller::{Poller, Token};
use crate::service::Answer;

/// Messages that wait for room on the ring, at most; a control plane that does not read is cut off.
const MAX_BACKLOG: usize = 4096;
/// Commands taken in one go, so that a flood does not keep the devices' sockets waiting.
const BATCH: usize = 64;

/// The place where a control plane connects, and the connection if there is one.
pub struct Control {
    listener: Listener,
    channel: Option<Channel>,
    backlog: VecDeque<ToControlplane>,
    poller: Arc<Poller>,
    /// A connection has ended since this was last asked.
    ended: bool,
}

impl Control {
    /// The listener is ready.
    pub const LISTENER: Token = Token {
        device: Token::SERVICE,
        local: 0,
    };
    /// The connection is ready.
    pub const CONNECTION: Token = Token {
        device: Token::SERVICE,
        local: 1,
    };

    /// Waits for control planes.
    pub fn new(listener: Listener, poller: Arc<Poller>) -> nix::Result<Control> {
        poller.add(&listener, Control::LISTENER)?;
        Ok(Control {
            listener,
            channel: None,
            backlog: VecDeque::new(),
            poller,
            ended: false,
        })
    }

    /// The listener is ready.
    pub fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok(Some(Accepted::Channel(channel))) => {
                    self.hang_up();
                    tracing::info!(
                        pid = channel.peer().pid,
                        uid = channel.peer().uid,
                        "control plane connected"
                    );
                    if let Err(error) = self.poller.add(&channel, Control::CONNECTION) {
                        tracing::error!(%error, "cannot watch the control plane's connection");
                        return;
                    }
                    self.channel = Some(channel);
                }
                Ok(Some(Accepted::Refused { peer, why })) => {
                    tracing::warn!(pid = peer.pid, uid = peer.uid, %why, "refused a control plane");
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(%error, "cannot accept control planes");
                    return;
                }
            }
        }
    }

    /// The connection is ready, or may be: takes doorbells and the news that the peer is gone.
    pub fn wake(&mut self) {
        if let Some(channel) = &mut self.channel
            && let Err(lost) = channel.wake()
        {
            tracing::info!(%lost, "control plane disconnected");
            self.hang_up();
        }
    }

    /// Whether a connection has ended since this was last called.
    pub fn take_ended(&mut self) -> bool {
        std::mem::take(&mut self.ended)
    }

    /// The commands that have arrived, a batch at most.
    pub fn commands(&mut self) -> Vec<(u64, Command)> {
        let mut commands = Vec::new();
        while commands.len() < BATCH {
            let Some(channel) = &mut self.channel else {
                break;
            };
            match channel.recv::<ToDataplane>() {
                Ok(Some(ToDataplane { seq, command })) => commands.push((seq, command)),
                Ok(None) => break,
                Err(error) => {
                    tracing::error!(%error, "the control plane broke the rules of the rings; it is cut off");
                    self.hang_up();
                }
            }
        }
        commands
    }

    /// Queues events and answers, and sends what fits. Whoever gets an answer knows of the events that led to it.
    pub fn send(&mut self, answers: Vec<Answer>, events: Vec<Event>) {
        if self.channel.is_none() {
            return;
        }
        let answers = answers
            .into_iter()
            .map(|(seq, result)| ToControlplane::Completion { seq, result });
        let events = events.into_iter().map(ToControlplane::Event);
        self.backlog.extend(events.chain(answers));
        self.flush();
        if self.backlog.len() > MAX_BACKLOG {
            tracing::error!(
                waiting = self.backlog.len(),
                "the control plane does not read its ring; it is cut off"
            );
            self.hang_up();
        }
    }

    fn flush(&mut self) {
        while let (Some(channel), Some(message)) = (&mut self.channel, self.backlog.front()) {
            match channel.send(message) {
                Ok(()) => {
                    self.backlog.pop_front();
                }
                Err(PushError::Full) => return,
                Err(error) => {
                    tracing::error!(%error, "cannot answer the control plane; it is cut off");
                    self.hang_up();
                }
            }
        }
    }

    /// Before the management thread sleeps: `false` when there is something to do first.
    pub fn prepare_sleep(&mut self) -> bool {
        self.flush();
        let Some(channel) = &mut self.channel else {
            return true;
        };
        match channel.prepare_sleep() {
            Ok(quiet) => quiet,
            Err(error) => {
                tracing::error!(%error, "the control plane broke the rules of the rings; it is cut off");
                self.hang_up();
                true
            }
        }
    }

    fn hang_up(&mut self) {
        if let Some(channel) = self.channel.take() {
            let _ = self.poller.remove(&channel);
            self.ended = true;
        }
        self.backlog.clear();
    }
}
