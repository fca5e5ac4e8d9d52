//! The socket of a function: one client at a time, its commands in, its answers out.
//!
//! Owns the listening socket, the connection and the answers that wait for the cores. It must never wait itself; the
//! management thread calls it when a descriptor is ready or a core has reported something. A peer that breaks the protocol
//! loses its connection, which resets the function, and nothing else. What a command has changed is saved before the command
//! is taken out of the socket and answered, so that a later process goes on with the same client.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use ferry_shared::errno::Errno;
use ferry_shared::msg::{DeviceSpec, Failure};
use nix::errno::Errno as SysErrno;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};
use zerocopy::{FromBytes, IntoBytes};

use super::frame::{self, Incoming, Malformed, Message};
use super::handshake;
use super::pci::PciFunction;
use super::serve::{Answer, Reply, Served, ServedV1, Until};
use super::wire::{Header, MAX_MSG_FDS, command};
use crate::engine::Cores;
use crate::id::{CoreEvent, DeviceId};
use crate::keeper::Keeper;
use crate::os::fdstore::Kept;
use crate::os::poller::{Poller, Token};
use crate::os::socket::{Listener, Stream};
use crate::platform::EmulatedFunction;
use crate::transport::link::{Link, LinkV1, Settled};
use crate::transport::saver::Saver;
use crate::transport::staged::Staged;

/// Numbers of the descriptors in the poller.
const LISTENER: u32 = 0;
const CLIENT: u32 = 1;
const PIN: u32 = 2;

/// Commands carried out before other descriptors get their turn.
const COMMANDS_PER_TURN: usize = 64;
/// Answers of one client that may wait for the cores, before no more commands are read.
const MAX_POSTPONED: usize = 64;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the client has closed the connection")]
    Closed,
    #[error("the connection failed: {0}")]
    Socket(SysErrno),
    #[error("the client broke the protocol: {0}")]
    Malformed(#[from] Malformed),
    #[error("the client does not begin with a version that is spoken here")]
    Version,
}

/// An answer that waits for the cores.
#[derive(Debug)]
struct Postponed {
    to: Header,
    payload: Vec<u8>,
    until: Until,
}

/// A client as it is kept.
#[derive(Serialize, Deserialize)]
struct ClientV1 {
    max_fds: Option<u32>,
    /// Header and payload. What they waited for has happened with the end of the process, if it was guest memory.
    postponed: Vec<(Vec<u8>, Vec<u8>, bool)>,
    served: ServedV1,
}

/// The transport as it is kept.
#[derive(Serialize, Deserialize)]
struct VfioUserV1 {
    listener: Option<u64>,
    file: (u64, u64),
    client: Option<ClientV1>,
    next: Option<u64>,
}

/// What the poller was told last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Interest {
    input: bool,
    output: bool,
    /// Only more input counts: a part of a command stays in the socket.
    partial: bool,
}

/// A connected client.
#[derive(Debug)]
struct Client {
    link: Link,
    /// A part of a command is in the socket.
    partial: bool,
    /// Descriptors that it takes in one message; not known before the handshake.
    max_fds: Option<usize>,
    postponed: Vec<Postponed>,
    interest: Interest,
}

/// A function behind its socket.
#[derive(Debug)]
pub struct VfioUser {
    id: DeviceId,
    name: String,
    poller: Arc<Poller>,
    /// `None` while the function is not offered to anybody: not plugged, or closed.
    listener: Option<Listener>,
    kept: Option<Kept>,
    saver: Saver,
    client: Option<Client>,
    /// A client that has come while the cores still work for the last one.
    next: Option<(Stream, Option<Kept>)>,
    served: Served,
}

impl VfioUser {
    /// Makes the function at `place`, and its socket if it is `offered`, or takes over what a former process has kept of
    /// them; [`VfioUser::adopt`] then goes on with it.
    pub fn open(
        spec: &DeviceSpec,
        id: DeviceId,
        place: &EmulatedFunction,
        socket: &Path,
        offered: bool,
        poller: Arc<Poller>,
        keeper: &Keeper,
    ) -> Result<VfioUser, Failure> {
        let failed = |what: &str, e: SysErrno| {
            let detail = format!("cannot {what} of device {}", spec.name);
            Failure::new(Errno::from_raw(e as i32), detail)
        };
        let function = || {
            let function = PciFunction::new(id, spec, place, keeper);
            function.map_err(|e| failed("make the event counters", e))
        };
        let mut served = Served::new(&spec.name, function()?, keeper);
        let mut saver = Saver::new(id, keeper);
        let (saved, link) = match saver.load::<VfioUserV1>() {
            Some((saved, link)) => (Some(saved), link),
            None => (None, None),
        };
        let listener = saved
            .as_ref()
            .and_then(|saved| restore_listener(saved, socket, keeper));
        let next = saved.as_ref().filter(|_| offered).and_then(|s| s.next);
        let next = next.and_then(|number| restore_stream(number, keeper));
        let client = saved.and_then(|s| s.client).zip(link);
        let client = match client {
            Some((saved, link)) => {
                let client = Client::restore(saved, link, &mut served, &saver);
                if client.is_none() {
                    tracing::error!(
                        device = spec.name,
                        "what was kept of a connection is not usable; the client is disconnected"
                    );
                    served = Served::new(&spec.name, function()?, keeper);
                }
                client
            }
            None => None,
        };
        let mut device = VfioUser {
            id,
            name: spec.name.clone(),
            poller,
            listener: None,
            kept: None,
            saver,
            client,
            next,
            served,
        };
        let pin = device.served.function.pin();
        device
            .poller
            .add(pin, device.token(PIN))
            .and_then(|()| match &device.client {
                Some(client) => device.poller.add(&client.link, device.token(CLIENT)),
                None => Ok(()),
            })
            .map_err(|e| failed("wait for connections", e))?;
        match listener {
            // What is not offered any more goes away here.
            _ if !offered => {}
            Some((listener, kept)) => device.offer(listener, Some(kept))?,
            None => device.offer_at(socket)?,
        }
        Ok(device)
    }

    /// Offers the function to clients.
    pub fn listen(&mut self, socket: &Path) -> Result<(), Failure> {
        self.offer_at(socket)?;
        self.save();
        Ok(())
    }

    fn offer_at(&mut self, socket: &Path) -> Result<(), Failure> {
        let listener = Listener::bind(socket)?;
        let kept = self.saver.keeper().keep(&listener);
        self.offer(listener, kept)
    }

    fn offer(&mut self, listener: Listener, kept: Option<Kept>) -> Result<(), Failure> {
        self.poller
            .add(&listener, self.token(LISTENER))
            .map_err(|e| {
                let detail = format!("cannot wait for connections of device {}", self.name);
                Failure::new(Errno::from_raw(e as i32), detail)
            })?;
        (self.listener, self.kept) = (Some(listener), kept);
        Ok(())
    }

    /// Takes the socket away; a client that is connected stays.
    pub fn withdraw(&mut self) {
        self.stop_listening();
        self.save();
    }

    fn stop_listening(&mut self) {
        if let Some(listener) = self.listener.take() {
            let _ = self.poller.remove(&listener);
        }
        self.kept = None;
        self.next = None;
    }

    /// Asks the client, in the way of VFIO, to let go of the function.
    pub fn ask_release(&self) {
        self.served.function.ask_release();
    }

    /// Whether the driver has taken the function.
    pub fn driver_ok(&self) -> bool {
        self.served.function.driver_ok()
    }

    /// Starts what ran in a former process, and does what it had left to do; the session of a client that is gone ends.
    pub fn adopt(&mut self, cores: &mut dyn Cores) {
        if self.client.is_some() {
            info!(device = %self.name, "the client stays connected");
            self.served.resume(cores);
            self.turn(cores);
        } else {
            cores.end_session(self.id);
            self.welcome();
            self.save();
        }
    }

    /// Keeps what a later process needs.
    fn save(&mut self) {
        if !self.saver.keeper().is_on() {
            return;
        }
        let file = self.listener.as_ref().map(Listener::file);
        let state = VfioUserV1 {
            listener: self.kept.as_ref().map(Kept::number),
            file: file.unwrap_or_default(),
            client: self.client.as_ref().map(|c| c.saved(&self.served)),
            next: self
                .next
                .as_ref()
                .and_then(|(_, kept)| Some(kept.as_ref()?.number())),
        };
        let link = self.client.as_ref().and_then(|c| c.link.saved());
        self.saver.save(&state, link);
    }

    /// Forgets everything that is kept for a later process; the device is gone.
    pub fn forget(self) {
        let VfioUser {
            saver,
            served,
            kept,
            client,
            next,
            ..
        } = self;
        drop((served, kept, client, next));
        saver.forget();
    }

    fn token(&self, local: u32) -> Token {
        Token {
            device: self.id,
            local,
        }
    }

    /// Whether a client is connected.
    pub fn connected(&self) -> bool {
        self.client.is_some()
    }

    /// Stops a running queue where it stands and starts it again.
    pub fn start_again(&mut self, index: crate::id::QueueIdx, cores: &mut dyn Cores) {
        self.served.function.queues().start_again(index, cores);
    }

    /// The configuration space as the driver sees it.
    pub fn pci_config(&self) -> [u8; 256] {
        self.served.function.config_space()
    }

    /// Stops the queues where they stand; the client is served on.
    pub fn pause(&mut self, cores: &mut dyn Cores) {
        self.served.function.queues().pause(cores);
    }

    /// Whether a pause is complete.
    pub fn is_paused(&self) -> bool {
        self.served.function.is_paused()
    }

    /// Ends a pause.
    pub fn resume(&mut self, cores: &mut dyn Cores) {
        self.served.function.queues().resume(cores);
    }

    /// Takes the socket away and resets the function. [`is_quiet`](Self::is_quiet) tells when nothing is left.
    pub fn begin_close(&mut self, cores: &mut dyn Cores) {
        self.stop_listening();
        let _ = self.poller.remove(self.served.function.pin());
        self.drop_client();
        self.served.hang_up(cores);
    }

    /// Whether no core works for the device.
    pub fn is_quiet(&self) -> bool {
        self.served.is_quiet()
    }

    /// A descriptor of the device is ready.
    pub fn ready(&mut self, local: u32, cores: &mut dyn Cores) {
        match local {
            LISTENER => self.accept(),
            CLIENT => self.turn(cores),
            PIN => {
                self.served.function.pin_fired();
                self.save();
            }
            _ => {}
        }
    }

    /// A core has reported something about the device.
    pub fn core_event(&mut self, event: CoreEvent, cores: &mut dyn Cores) {
        self.served.event(event, cores);
        self.settle(Ok(()), cores);
    }

    fn accept(&mut self) {
        let Some(stream) = self.listener.as_ref().and_then(Listener::accept) else {
            return;
        };
        if self.client.is_some() || self.next.is_some() {
            info!(device = %self.name, "a second client was turned away; a function has one at a time");
            return;
        }
        let kept = self.saver.keeper().keep(&stream);
        self.next = Some((stream, kept));
        self.welcome();
        self.save();
    }

    /// Serves the client that has come, if the last one is forgotten.
    fn welcome(&mut self) {
        if self.client.is_some() || !self.served.is_settled() {
            return;
        }
        let Some((stream, _)) = self.next.take() else {
            return;
        };
        let Some(link) = Link::new(stream, &self.saver.ledger(), self.saver.keeper()) else {
            return;
        };
        if let Err(error) = self.poller.add(&link, self.token(CLIENT)) {
            warn!(device = %self.name, %error, "cannot watch a client's connection");
            return;
        }
        info!(device = %self.name, "client connected");
        self.client = Some(Client {
            link,
            partial: false,
            max_fds: None,
            postponed: Vec::new(),
            interest: Interest {
                input: true,
                output: false,
                partial: false,
            },
        });
    }

    fn drop_client(&mut self) {
        if let Some(client) = self.client.take() {
            let _ = self.poller.remove(&client.link);
            client.link.hang_up();
        }
    }

    /// Carries out what the client has sent.
    fn turn(&mut self, cores: &mut dyn Cores) {
        let mut result = match &mut self.client {
            Some(client) => client.flush(),
            None => return,
        };
        for _ in 0..COMMANDS_PER_TURN {
            match result.and_then(|()| self.step(cores)) {
                Ok(true) => result = Ok(()),
                Ok(false) => {
                    result = Ok(());
                    break;
                }
                Err(ended) => {
                    result = Err(ended);
                    break;
                }
            }
        }
        self.settle(result, cores);
    }

    /// Carries out one command; `false` when there is none, or the client must take answers first.
    fn step(&mut self, cores: &mut dyn Cores) -> Result<bool, Ended> {
        let Some(client) = self.client.as_mut().filter(|c| c.may_ask()) else {
            return Ok(false);
        };
        let Some(message) = client.receive()? else {
            return Ok(false);
        };
        let mut staged = Staged::new(cores);
        let handled = client.handle(message, &mut self.served, &mut staged, self.saver.keeper());
        self.save();
        staged.release();
        handled?;
        self.client.as_mut().map_or(Ok(()), Client::flush)?;
        Ok(true)
    }

    /// Sends what is due, and ends the connection if `result` says so.
    fn settle(&mut self, mut result: Result<(), Ended>, cores: &mut dyn Cores) {
        let token = self.token(CLIENT);
        if let Some(client) = &mut self.client {
            client.answer_due(&self.served, self.saver.keeper());
        }
        self.save();
        if let Some(client) = &mut self.client {
            result = result
                .and_then(|()| client.flush())
                .and_then(|()| client.watch(token, &self.poller));
            if let Err(ended) = result {
                match &ended {
                    Ended::Closed => info!(device = %self.name, "client left"),
                    _ => warn!(device = %self.name, "client dropped: {ended}"),
                }
                self.drop_client();
                self.save();
                self.served.hang_up(cores);
            }
        }
        if self.next.is_some() {
            self.welcome();
            self.save();
        }
    }
}

/// The listening socket of a former process, if clients still find it.
fn restore_listener(
    saved: &VfioUserV1,
    socket: &Path,
    keeper: &Keeper,
) -> Option<(Listener, Kept)> {
    let kept = keeper.fds().adopt(saved.listener?)?;
    let fd = kept.as_fd().try_clone_to_owned().ok()?;
    Some((Listener::adopt(fd, socket, saved.file)?, kept))
}

/// A stream that is kept.
fn restore_stream(number: u64, keeper: &Keeper) -> Option<(Stream, Option<Kept>)> {
    let kept = keeper.fds().adopt(number)?;
    let socket = UnixStream::from(kept.as_fd().try_clone_to_owned().ok()?);
    Some((Stream::new(socket).ok()?, Some(kept)))
}

impl Client {
    /// What a later process needs.
    fn saved(&self, served: &Served) -> ClientV1 {
        let postponed = |p: &Postponed| {
            let header = p.to.as_bytes().to_vec();
            (header, p.payload.clone(), p.until == Until::Reset)
        };
        ClientV1 {
            max_fds: self.max_fds.and_then(|n| u32::try_from(n).ok()),
            postponed: self.postponed.iter().map(postponed).collect(),
            served: served.saved(),
        }
    }

    /// The client of a former process, and what it had set up.
    fn restore(
        saved: ClientV1,
        link: LinkV1,
        served: &mut Served,
        saver: &Saver,
    ) -> Option<Client> {
        let link = Link::restore(link, &saver.ledger(), saver.keeper())?;
        let postponed = saved.postponed.into_iter().map(|(header, payload, reset)| {
            let to = Header::read_from_bytes(&header).ok()?;
            let until = if reset {
                Until::Reset
            } else {
                Until::Memory(0)
            };
            Some(Postponed { to, payload, until })
        });
        let postponed = postponed.collect::<Option<Vec<_>>>();
        if postponed.is_none() || !served.restore(saved.served, saver.keeper()) {
            link.hang_up();
            return None;
        }
        Some(Client {
            link,
            partial: false,
            max_fds: saved.max_fds.map(|n| (n as usize).min(MAX_MSG_FDS)),
            postponed: postponed.unwrap_or_default(),
            interest: Interest {
                input: true,
                output: false,
                partial: false,
            },
        })
    }

    /// Whether another command may be carried out; otherwise the client must take answers first, or wait for some.
    fn may_ask(&self) -> bool {
        !self.link.has_replies() && self.postponed.len() < MAX_POSTPONED
    }

    /// The next whole command, if it has arrived. It stays in the socket.
    fn receive(&mut self) -> Result<Option<Message>, Ended> {
        let incoming = frame::next(&self.link)?;
        self.partial = matches!(incoming, Incoming::Part);
        match incoming {
            Incoming::Message(message) => Ok(Some(message)),
            Incoming::Nothing | Incoming::Part => Ok(None),
            Incoming::Closed => Err(Ended::Closed),
        }
    }

    fn handle(
        &mut self,
        mut message: Message,
        served: &mut Served,
        cores: &mut dyn Cores,
        keeper: &Keeper,
    ) -> Result<(), Ended> {
        self.link.obeyed(message.header.size as usize);
        let Some(max_fds) = self.max_fds else {
            if message.header.command != command::VERSION {
                return Err(Ended::Version);
            }
            let agreed = handshake::parse(&message.payload).ok_or(Ended::Version)?;
            self.max_fds = Some(agreed.max_fds);
            let reply = (handshake::reply(agreed), Vec::new());
            self.reply(&message.header, Ok(reply), keeper);
            return Ok(());
        };
        match served.serve(&mut message, max_fds, cores) {
            Answer::Now(answer) => self.reply(&message.header, answer, keeper),
            Answer::Later(payload, until) => {
                self.postponed.push(Postponed {
                    to: message.header,
                    payload,
                    until,
                });
                self.answer_due(served, keeper);
            }
        }
        Ok(())
    }

    fn reply(&mut self, to: &Header, result: Result<Reply, SysErrno>, keeper: &Keeper) {
        if let Some((bytes, fds)) = frame::reply(to, result) {
            self.link.reply(bytes, fds, keeper);
        }
    }

    /// Answers what has waited long enough.
    fn answer_due(&mut self, served: &Served, keeper: &Keeper) {
        let (due, waiting) = std::mem::take(&mut self.postponed)
            .into_iter()
            .partition(|p| served.is_due(p.until));
        self.postponed = waiting;
        let due: Vec<Postponed> = due;
        for p in due {
            self.reply(&p.to, Ok((p.payload, Vec::new())), keeper);
        }
    }

    /// Takes what is done out of the socket, and sends what there is room for.
    fn flush(&mut self) -> Result<(), Ended> {
        match self.link.settle() {
            Ok(Settled::Done | Settled::Waiting) => Ok(()),
            Ok(Settled::Closed) => Err(Ended::Closed),
            Err(error) => Err(Ended::Socket(error)),
        }
    }

    /// Tells the poller what to wait for.
    fn watch(&mut self, token: Token, poller: &Poller) -> Result<(), Ended> {
        let interest = Interest {
            input: self.may_ask(),
            output: self.link.has_replies(),
            partial: self.may_ask() && self.partial,
        };
        if interest == self.interest {
            return Ok(());
        }
        self.interest = interest;
        let Interest {
            input,
            output,
            partial,
        } = interest;
        match partial {
            true => poller.more(&self.link, token, output),
            false => poller.modify(&self.link, token, input, output),
        }
        .map_err(Ended::Socket)
    }
}

#[cfg(test)]
mod tests;
