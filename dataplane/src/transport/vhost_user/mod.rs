//! The vhost-user transport: a device behind a socket that a VMM connects to.
//!
//! [`wire`] is the protocol as bytes. `frame` makes messages of a stream, `conn` gives them their meaning, and this module has
//! the socket: it listens, serves one front end at a time, and holds an answer back while the cores still work on it;
//! meanwhile nothing is read. What a message has changed is saved before the message is taken out of the socket and
//! answered, so that a later process goes on with the same front end. The management thread calls everything here.

mod conn;
mod error;
mod frame;
mod memory;
mod record;
mod ring;
pub mod wire;

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use ferry_shared::errno::Errno;
use ferry_shared::limits::MAX_RING_SIZE;
use ferry_shared::msg::{DeviceSpec, Failure};

use self::conn::{Answer, Conn, ConnV1, Device, Wait};
use self::error::PeerError;
use self::frame::{Incoming, Message};
use self::wire::{FLAG_REPLY, Header, Request, VERSION};
use super::link::{Link, LinkV1, Settled};
use super::log_gate::LogGate;
use super::requests::{Requests, RequestsV1};
use super::running::{Notice, RunningQueues};
use super::saver::Saver;
use super::staged::Staged;
use crate::engine::{CoreEvent, Cores, DeviceId};
use crate::keeper::Keeper;
use crate::os::fdstore::Kept;
use crate::os::poller::{Poller, Token};
use crate::os::socket::Listener;
use crate::virtio::device::{DeviceModel, DeviceModelV1};
use crate::virtio::spec::Features;

/// Local tokens.
const LISTENER: u32 = 0;
const CONNECTION: u32 = 1;

/// Messages that are obeyed at a time, so that one front end cannot keep the management thread from the others.
const TURN: usize = 64;

/// A message that is being obeyed.
#[derive(Clone, Copy, Debug)]
struct Current {
    request: Request,
    need_reply: bool,
    len: usize,
}

#[derive(Debug)]
struct Peer {
    link: Link,
    conn: Conn,
    /// A message whose answer waits for the cores.
    pending: Option<(Current, Wait)>,
    /// Only more input is waited for, because a part of a message stays in the socket.
    partial: bool,
}

impl Peer {
    fn new(link: Link, conn: Conn) -> Peer {
        Peer {
            link,
            conn,
            pending: None,
            partial: false,
        }
    }
}

/// The transport as it is kept.
#[derive(Serialize, Deserialize)]
struct VhostUserV1 {
    listener: Option<u64>,
    file: (u64, u64),
    requests: Option<RequestsV1>,
    peer: Option<(DeviceModelV1, ConnV1)>,
}

#[derive(Debug)]
enum State {
    /// Waits for a front end.
    Listening,
    /// Serves one.
    Connected(Box<Peer>),
    /// It has left; its queues are still stopping.
    Leaving,
    /// For ever.
    Closing,
}

/// A device behind a vhost-user socket.
#[derive(Debug)]
pub struct VhostUser {
    name: String,
    id: DeviceId,
    listener: Listener,
    kept: Option<Kept>,
    saver: Saver,
    /// The record of requests in flight.
    requests: Option<Requests>,
    poller: Arc<Poller>,
    model: DeviceModel,
    queues: RunningQueues,
    state: State,
    log: LogGate,
}

impl VhostUser {
    /// Listens on `socket`, or takes over what a former process has kept of this device; [`VhostUser::adopt`] then goes on
    /// with it.
    pub fn open(
        spec: &DeviceSpec,
        id: DeviceId,
        socket: &Path,
        poller: Arc<Poller>,
        keeper: &Keeper,
    ) -> Result<VhostUser, Failure> {
        let mut saver = Saver::new(id, keeper);
        let mut model = DeviceModel::new(spec, Features::RING_RESET, MAX_RING_SIZE as u16);
        let saved = saver.load::<VhostUserV1>();
        let (saved, link) = match saved {
            Some((saved, link)) => (Some(saved), link),
            None => (None, None),
        };
        let kept = saved.as_ref().and_then(|s| keeper.fds().adopt(s.listener?));
        let adopted = kept.as_ref().zip(saved.as_ref()).and_then(|(kept, s)| {
            let fd = kept.as_fd().try_clone_to_owned().ok()?;
            Listener::adopt(fd, socket, s.file)
        });
        let (listener, kept) = match adopted {
            Some(listener) => (listener, kept),
            None => {
                let listener = Listener::bind(socket)?;
                let kept = keeper.keep(&listener);
                (listener, kept)
            }
        };
        let queues = model.num_queues();
        let requests = saved.as_ref().and_then(|s| s.requests);
        let requests = requests.and_then(|r| Requests::restore(r, queues, keeper));
        let peer = saved
            .and_then(|s| s.peer)
            .zip(link)
            .and_then(|(saved, link)| {
                let peer = restore_peer(saved, link, &mut model, &saver);
                if peer.is_none() {
                    tracing::error!(
                        device = spec.name,
                        "what was kept of a connection is not usable; the front end is disconnected"
                    );
                }
                peer
            });
        // Without the record nobody knows what was in flight.
        let peer = peer.filter(|_| requests.is_some());
        let device = VhostUser {
            name: spec.name.clone(),
            id,
            listener,
            kept,
            requests: requests.or_else(|| Requests::new(queues, keeper)),
            saver,
            poller,
            queues: RunningQueues::new(id, queues),
            model,
            state: peer.map_or(State::Listening, State::Connected),
            log: LogGate::new(Instant::now()),
        };
        device.watch().map_err(|e| {
            Failure::new(
                Errno::from_raw(e as i32),
                format!("cannot wait for connections to {}", socket.display()),
            )
        })?;
        Ok(device)
    }

    /// Starts what ran in a former process, and does what it had left to do; the session of a front end that is gone ends.
    pub fn adopt(&mut self, cores: &mut dyn Cores) {
        let State::Connected(peer) = &mut self.state else {
            cores.end_session(self.id);
            self.save();
            return;
        };
        let mut device = Device {
            model: &mut self.model,
            queues: &mut self.queues,
            cores,
            keeper: self.saver.keeper(),
            requests: self.requests.as_ref(),
        };
        let resumed = peer.conn.resume(&mut device);
        tracing::info!(device = %self.name, "the front end stays connected");
        match resumed {
            Ok(()) => {
                self.settle(cores);
                self.serve(cores);
            }
            Err(error) => self.give_up(error, cores),
        }
    }

    /// Keeps what a later process needs.
    fn save(&mut self) {
        if !self.saver.keeper().is_on() {
            return;
        }
        let peer = match &self.state {
            State::Connected(peer) => Some(peer),
            State::Listening | State::Leaving | State::Closing => None,
        };
        let state = VhostUserV1 {
            listener: self.kept.as_ref().map(Kept::number),
            file: self.listener.file(),
            requests: self.requests.as_ref().map(Requests::saved),
            peer: peer.map(|p| (self.model.saved(), p.conn.saved())),
        };
        self.saver.save(&state, peer.and_then(|p| p.link.saved()));
    }

    fn token(&self, local: u32) -> Token {
        Token {
            device: self.id,
            local,
        }
    }

    /// Waits for the front end, or for one.
    fn watch(&self) -> Result<(), nix::errno::Errno> {
        match &self.state {
            State::Connected(peer) => self.poller.add(&peer.link, self.token(CONNECTION)),
            _ => self.poller.add(&self.listener, self.token(LISTENER)),
        }
    }

    /// Something can be read from the socket that `local` names.
    pub fn ready(&mut self, local: u32, cores: &mut dyn Cores) {
        match local {
            LISTENER => self.accept(cores),
            _ => self.serve(cores),
        }
    }

    fn accept(&mut self, cores: &mut dyn Cores) {
        if !matches!(self.state, State::Listening) {
            return;
        }
        let Some(stream) = self.listener.accept() else {
            return;
        };
        let name = self.saver.ledger();
        let Some(link) = Link::new(stream, &name, self.saver.keeper()) else {
            return;
        };
        if let Err(error) = self.poller.add(&link, self.token(CONNECTION)) {
            tracing::warn!(device = %self.name, %error, "cannot wait for the front end's messages");
            return;
        }
        // One front end at a time; the next waits in the backlog.
        let _ = self.poller.remove(&self.listener);
        let conn = Conn::new(self.model.num_queues());
        self.state = State::Connected(Box::new(Peer::new(link, conn)));
        self.save();
        self.serve(cores);
    }

    /// Obeys what has arrived, until nothing has or an answer must wait.
    fn serve(&mut self, cores: &mut dyn Cores) {
        for _ in 0..TURN {
            let State::Connected(peer) = &mut self.state else {
                return;
            };
            if peer.pending.is_some() {
                return;
            }
            match frame::next(&peer.link) {
                Ok(Incoming::Nothing) => return self.await_more(false, cores),
                Ok(Incoming::Part) => return self.await_more(true, cores),
                Ok(Incoming::Message(message)) => self.obey(message, cores),
                Ok(Incoming::Closed) => return self.hang_up(cores),
                Err(error) => return self.give_up(error, cores),
            }
        }
        self.await_more(false, cores);
    }

    /// Waits for input; with a part of a message in the socket, for more of it.
    fn await_more(&mut self, partial: bool, cores: &mut dyn Cores) {
        let token = self.token(CONNECTION);
        let State::Connected(peer) = &mut self.state else {
            return;
        };
        if peer.pending.is_some() || peer.partial == partial {
            return;
        }
        peer.partial = partial;
        let changed = match partial {
            true => self.poller.more(&peer.link, token, false),
            false => self.poller.modify(&peer.link, token, true, false),
        };
        if let Err(error) = changed {
            self.give_up(PeerError::Socket(error), cores);
        }
    }

    fn obey(&mut self, message: Message, cores: &mut dyn Cores) {
        let State::Connected(peer) = &mut self.state else {
            return;
        };
        let current = Current {
            request: message.request,
            need_reply: message.need_reply,
            len: message.len,
        };
        let mut staged = Staged::new(cores);
        let mut device = Device {
            model: &mut self.model,
            queues: &mut self.queues,
            cores: &mut staged,
            keeper: self.saver.keeper(),
            requests: self.requests.as_ref(),
        };
        match peer.conn.handle(message, &mut device) {
            Ok(Answer::Later(wait)) => {
                peer.pending = Some((current, wait));
                // Level-triggered: what is not going to be read must not be waited for.
                let _ = self.poller.remove(&peer.link);
                staged.release();
            }
            Ok(answer) => {
                self.conclude(current, answer);
                staged.release();
                self.settle(cores);
            }
            Err(error) if current.need_reply && peer.conn.acks() && error.can_be_refused() => {
                if let Some(left_out) = self.log.admit(Instant::now()) {
                    tracing::warn!(device = %self.name, left_out, request = ?current.request, %error, "refused what the front end asked for");
                }
                let refusal = Answer::Reply(1u64.to_ne_bytes().to_vec(), None);
                self.conclude(current, refusal);
                staged.release();
                self.settle(cores);
            }
            Err(error) => {
                staged.release();
                self.give_up(error, cores);
            }
        }
    }

    /// A message has had its effect: notes that, with the answer, before anybody sees either.
    fn conclude(&mut self, current: Current, answer: Answer) {
        let State::Connected(peer) = &mut self.state else {
            return;
        };
        let reply = match answer {
            Answer::Reply(payload, fd) => Some((payload, fd)),
            Answer::Ack if current.need_reply && peer.conn.acks() => {
                Some((0u64.to_ne_bytes().to_vec(), None))
            }
            Answer::Ack | Answer::Later(_) => None,
        };
        peer.link.obeyed(current.len);
        if let Some((payload, fd)) = reply {
            let header = Header {
                request: current.request as u32,
                flags: VERSION | FLAG_REPLY,
                size: payload.len() as u32,
            };
            let bytes = [header.as_bytes(), &payload].concat();
            let fds = fd.into_iter().collect();
            peer.link.reply(bytes, fds, self.saver.keeper());
        }
        self.save();
    }

    /// Takes obeyed messages out of the socket and sends their answers.
    fn settle(&mut self, cores: &mut dyn Cores) {
        let State::Connected(peer) = &mut self.state else {
            return;
        };
        match peer.link.settle() {
            Ok(Settled::Done) => {}
            Ok(Settled::Closed) => self.hang_up(cores),
            // A front end waits for its answers before it goes on; one that does not is given up.
            Ok(Settled::Waiting) => {
                self.give_up(PeerError::Socket(nix::errno::Errno::EAGAIN), cores);
            }
            Err(error) => self.give_up(PeerError::Socket(error), cores),
        }
    }

    fn give_up(&mut self, error: PeerError, cores: &mut dyn Cores) {
        if let Some(left_out) = self.log.admit(Instant::now()) {
            tracing::warn!(device = %self.name, left_out, %error, "closing the front end's connection");
        }
        self.hang_up(cores);
    }

    /// The front end is gone: what it set up goes with it.
    fn hang_up(&mut self, cores: &mut dyn Cores) {
        self.disconnect();
        self.state = State::Leaving;
        self.save();
        if self.queues.reset(cores) {
            self.fresh();
        }
    }

    fn disconnect(&mut self) {
        if let State::Connected(peer) = &self.state {
            // Not there while an answer waits; closing would forget it as well.
            let _ = self.poller.remove(&peer.link);
            peer.link.hang_up();
        }
    }

    /// All traces of a front end are gone.
    fn fresh(&mut self) {
        self.model.reset();
        if matches!(self.state, State::Closing) {
            return;
        }
        self.state = State::Listening;
        if let Err(error) = self.watch() {
            tracing::error!(device = %self.name, %error, "cannot wait for connections; stop and start the device");
        }
    }

    /// Takes what the cores report about this device.
    pub fn core_event(&mut self, event: CoreEvent, cores: &mut dyn Cores) {
        let Some(notice) = self.queues.event(event, cores) else {
            return;
        };
        if let Notice::Failed(index) = notice {
            self.model.set_needs_reset();
            if let State::Connected(peer) = &self.state {
                peer.conn.ring_failed(index);
            }
            self.save();
            return;
        }
        match &mut self.state {
            State::Connected(_) => self.deliver(notice, cores),
            State::Leaving | State::Closing if notice == Notice::ResetDone => self.fresh(),
            State::Leaving | State::Closing | State::Listening => {}
        }
    }

    /// Gives the answer that waited for this, and goes on reading.
    fn deliver(&mut self, notice: Notice, cores: &mut dyn Cores) {
        let token = self.token(CONNECTION);
        let State::Connected(peer) = &mut self.state else {
            return;
        };
        let Some((current, wait)) = peer.pending else {
            return;
        };
        let mut staged = Staged::new(cores);
        let mut device = Device {
            model: &mut self.model,
            queues: &mut self.queues,
            cores: &mut staged,
            keeper: self.saver.keeper(),
            requests: self.requests.as_ref(),
        };
        let Some(answer) = peer.conn.arrived(wait, notice, &mut device) else {
            return staged.release();
        };
        peer.pending = None;
        peer.partial = false;
        let watched = self.poller.add(&peer.link, token);
        self.conclude(current, answer);
        staged.release();
        if let Err(error) = watched {
            return self.give_up(PeerError::Socket(error), cores);
        }
        self.settle(cores);
        self.serve(cores);
    }

    /// Stops all queues where they are and keeps everything else.
    pub fn pause(&mut self, cores: &mut dyn Cores) {
        self.queues.pause(cores);
    }

    /// Stops a running queue where it stands and starts it again.
    pub fn start_again(&mut self, index: crate::id::QueueIdx, cores: &mut dyn Cores) {
        self.queues.start_again(index, cores);
    }

    /// Lets the queues run on.
    pub fn resume(&mut self, cores: &mut dyn Cores) {
        self.queues.resume(cores);
    }

    /// Disconnects the front end and takes no other; when [`is_quiet`](Self::is_quiet), the device can be dropped.
    pub fn begin_close(&mut self, cores: &mut dyn Cores) {
        self.disconnect();
        if matches!(self.state, State::Listening) {
            let _ = self.poller.remove(&self.listener);
        }
        self.state = State::Closing;
        self.queues.reset(cores);
    }

    /// Forgets everything that is kept for a later process; the device is gone.
    pub fn forget(self) {
        let VhostUser {
            saver,
            kept,
            requests,
            state,
            ..
        } = self;
        drop((kept, requests, state));
        saver.forget();
    }

    /// Whether no queue runs and none is stopping.
    pub fn is_quiet(&self) -> bool {
        self.queues.is_quiet()
    }

    /// Whether a pause is complete.
    pub fn is_paused(&self) -> bool {
        self.queues.is_paused()
    }

    /// Whether a front end is connected.
    pub fn connected(&self) -> bool {
        matches!(self.state, State::Connected(_))
    }
}

/// The session that a front end had with a former process, and what its driver had set.
fn restore_peer(
    (model, conn): (DeviceModelV1, ConnV1),
    link: LinkV1,
    to: &mut DeviceModel,
    saver: &Saver,
) -> Option<Box<Peer>> {
    let keeper = saver.keeper();
    let link = Link::restore(link, &saver.ledger(), keeper)?;
    let restored = Conn::restore(conn, to.num_queues(), keeper);
    let conn = restored
        .inspect_err(|error| tracing::error!(%error, "a connection cannot be taken over"))
        .ok()
        .filter(|_| to.restore(&model));
    if conn.is_none() {
        link.hang_up();
    }
    Some(Box::new(Peer::new(link, conn?)))
}

#[cfg(test)]
mod tests;
