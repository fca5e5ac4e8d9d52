//! The socket of a function: one client at a time, its commands in, its answers out.
//!
//! Owns the listening socket, the connection and the answers that wait for the cores. It must never wait itself; the
//! management thread calls it when a descriptor is ready or a core has reported something. A peer that breaks the protocol
//! loses its connection, which resets the function, and nothing else.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use ferry_shared::errno::Errno;
use ferry_shared::msg::{DeviceSpec, Failure};
use nix::errno::Errno as SysErrno;
use tracing::{info, warn};

use super::frame::{Inbox, Malformed, Message, Outbox};
use super::handshake;
use super::pci::PciFunction;
use super::serve::{Answer, Served, Until};
use super::wire::{Header, MAX_MSG_FDS, command};
use crate::engine::Cores;
use crate::id::{CoreEvent, DeviceId};
use crate::os::poller::{Poller, Token};
use crate::os::socket::{Listener, Received, Stream};
use crate::platform::EmulatedFunction;

/// Numbers of the descriptors in the poller.
const LISTENER: u32 = 0;
const CLIENT: u32 = 1;
const PIN: u32 = 2;

/// Commands carried out before other descriptors get their turn.
const COMMANDS_PER_TURN: usize = 64;
/// Answers of one client that may wait for the cores.
const MAX_POSTPONED: usize = 1024;

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
    #[error("the client leaves too many commands unanswered")]
    Postponed,
}

/// An answer that waits for the cores.
#[derive(Debug)]
struct Postponed {
    to: Header,
    payload: Vec<u8>,
    until: Until,
}

/// A connected client.
#[derive(Debug)]
struct Client {
    stream: Stream,
    inbox: Inbox,
    outbox: Outbox,
    /// Descriptors that it takes in one message; not known before the handshake.
    max_fds: Option<usize>,
    postponed: Vec<Postponed>,
    /// What the poller was told last: whether input is waited for, whether room for output.
    interest: (bool, bool),
}

/// A function behind its socket.
#[derive(Debug)]
pub struct VfioUser {
    id: DeviceId,
    name: String,
    poller: Arc<Poller>,
    /// `None` while the function is not offered to anybody: not plugged, or closed.
    listener: Option<Listener>,
    client: Option<Client>,
    /// A client that has come while the cores still work for the last one.
    next: Option<Stream>,
    served: Served,
}

impl VfioUser {
    /// Makes the function at `place`, and its socket unless it is to be plugged later.
    pub fn open(
        spec: &DeviceSpec,
        id: DeviceId,
        place: &EmulatedFunction,
        socket: &Path,
        poller: Arc<Poller>,
    ) -> Result<VfioUser, Failure> {
        let failed = |what: &str, e: SysErrno| {
            let detail = format!("cannot {what} of device {}", spec.name);
            Failure::new(Errno::from_raw(e as i32), detail)
        };
        let function =
            PciFunction::new(id, spec, place).map_err(|e| failed("make the event counters", e))?;
        let mut device = VfioUser {
            id,
            name: spec.name.clone(),
            poller,
            listener: None,
            client: None,
            next: None,
            served: Served::new(&spec.name, function),
        };
        if place.port.is_none() {
            device.listen(socket)?;
        }
        let pin = device.served.function.pin();
        device
            .poller
            .add(pin, device.token(PIN))
            .map_err(|e| failed("watch the interrupt pin", e))?;
        Ok(device)
    }

    /// Offers the function to clients.
    pub fn listen(&mut self, socket: &Path) -> Result<(), Failure> {
        let listener = Listener::bind(socket)?;
        self.poller
            .add(&listener, self.token(LISTENER))
            .map_err(|e| {
                let detail = format!("cannot wait for connections of device {}", self.name);
                Failure::new(Errno::from_raw(e as i32), detail)
            })?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Takes the socket away; a client that is connected stays.
    pub fn withdraw(&mut self) {
        if let Some(listener) = self.listener.take() {
            let _ = self.poller.remove(&listener);
        }
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
        self.withdraw();
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
            PIN => self.served.function.pin_fired(),
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
        self.next = Some(stream);
        self.welcome();
    }

    /// Serves the client that has come, if the last one is forgotten.
    fn welcome(&mut self) {
        if self.client.is_some() || !self.served.is_settled() {
            return;
        }
        let Some(stream) = self.next.take() else {
            return;
        };
        if let Err(error) = self.poller.add(&stream, self.token(CLIENT)) {
            warn!(device = %self.name, %error, "cannot watch a client's connection");
            return;
        }
        info!(device = %self.name, "client connected");
        self.client = Some(Client {
            stream,
            inbox: Inbox::default(),
            outbox: Outbox::default(),
            max_fds: None,
            postponed: Vec::new(),
            interest: (true, false),
        });
    }

    fn drop_client(&mut self) {
        if let Some(client) = self.client.take() {
            let _ = self.poller.remove(&client.stream);
        }
    }

    /// Carries out what the client has sent.
    fn turn(&mut self, cores: &mut dyn Cores) {
        let Some(client) = &mut self.client else {
            return;
        };
        let mut result = client.flush();
        for _ in 0..COMMANDS_PER_TURN {
            if result.is_err() || client.outbox.is_full() {
                break;
            }
            match client.receive() {
                Ok(Some(message)) => {
                    result = client.handle(message, &mut self.served, cores);
                }
                Ok(None) => break,
                Err(ended) => result = Err(ended),
            }
        }
        self.settle(result, cores);
    }

    /// Sends what is due, and ends the connection if `result` says so.
    fn settle(&mut self, mut result: Result<(), Ended>, cores: &mut dyn Cores) {
        let token = self.token(CLIENT);
        if let Some(client) = &mut self.client {
            client.answer_due(&self.served);
            result = result
                .and_then(|()| client.flush())
                .and_then(|()| client.watch(token, &self.poller));
            if let Err(ended) = result {
                match &ended {
                    Ended::Closed => info!(device = %self.name, "client left"),
                    _ => warn!(device = %self.name, "client dropped: {ended}"),
                }
                self.drop_client();
                self.served.hang_up(cores);
            }
        }
        self.welcome();
    }
}

impl Client {
    /// The next whole command, if it has arrived.
    fn receive(&mut self) -> Result<Option<Message>, Ended> {
        loop {
            let mut fds = Vec::new();
            let received = self
                .stream
                .receive(self.inbox.room(), &mut fds, MAX_MSG_FDS)
                .map_err(Ended::Socket)?;
            let n = match received {
                Received::Bytes(n) => n,
                Received::Nothing => return Ok(None),
                Received::Closed => return Err(Ended::Closed),
            };
            if let Some(message) = self.inbox.received(n, fds)? {
                return Ok(Some(message));
            }
        }
    }

    fn handle(
        &mut self,
        mut message: Message,
        served: &mut Served,
        cores: &mut dyn Cores,
    ) -> Result<(), Ended> {
        let Some(max_fds) = self.max_fds else {
            if message.header.command != command::VERSION {
                return Err(Ended::Version);
            }
            let agreed = handshake::parse(&message.payload).ok_or(Ended::Version)?;
            self.max_fds = Some(agreed.max_fds);
            let reply = (handshake::reply(agreed), Vec::new());
            self.outbox.reply(&message.header, Ok(reply));
            return Ok(());
        };
        match served.serve(&mut message, max_fds, cores) {
            Answer::Now(answer) => self.outbox.reply(&message.header, answer),
            Answer::Later(payload, until) => {
                if self.postponed.len() >= MAX_POSTPONED {
                    return Err(Ended::Postponed);
                }
                self.postponed.push(Postponed {
                    to: message.header,
                    payload,
                    until,
                });
                self.answer_due(served);
            }
        }
        Ok(())
    }

    /// Answers what has waited long enough.
    fn answer_due(&mut self, served: &Served) {
        let outbox = &mut self.outbox;
        self.postponed.retain_mut(|p| {
            let due = served.is_due(p.until);
            if due {
                let payload = std::mem::take(&mut p.payload);
                outbox.reply(&p.to, Ok((payload, Vec::new())));
            }
            !due
        });
    }

    /// Sends what there is room for.
    fn flush(&mut self) -> Result<(), Ended> {
        while let Some((bytes, fds)) = self.outbox.next() {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            match self.stream.send_some(bytes, &fds) {
                Ok(0) => break,
                Ok(n) => self.outbox.sent(n),
                Err(SysErrno::EPIPE | SysErrno::ECONNRESET) => return Err(Ended::Closed),
                Err(error) => return Err(Ended::Socket(error)),
            }
        }
        Ok(())
    }

    /// Tells the poller what to wait for.
    fn watch(&mut self, token: Token, poller: &Poller) -> Result<(), Ended> {
        let interest = (!self.outbox.is_full(), !self.outbox.is_empty());
        if interest != self.interest {
            poller
                .modify(&self.stream, token, interest.0, interest.1)
                .map_err(Ended::Socket)?;
            self.interest = interest;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
