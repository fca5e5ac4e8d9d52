//! The vhost-user transport: a device behind a socket that a VMM connects to.
//!
//! [`wire`] is the protocol as bytes. `frame` makes messages of a stream, `conn` gives them their meaning, and this module has
//! the socket: it listens, serves one front end at a time, and holds an answer back while the cores still work on it;
//! meanwhile nothing is read. The management thread calls everything here.

mod conn;
mod error;
mod frame;
mod memory;
mod record;
mod ring;
pub mod wire;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use zerocopy::IntoBytes;

use ferry_shared::errno::Errno;
use ferry_shared::limits::MAX_RING_SIZE;
use ferry_shared::msg::{DeviceSpec, Failure};

use self::conn::{Answer, Conn, Device, Wait};
use self::error::PeerError;
use self::frame::{Assembler, Incoming, Message};
use self::wire::{FLAG_REPLY, Header, Request, VERSION};
use super::log_gate::LogGate;
use super::running::{Notice, RunningQueues};
use crate::engine::{CoreEvent, Cores, DeviceId};
use crate::os::poller::{Poller, Token};
use crate::os::socket::{Listener, Stream};
use crate::virtio::device::DeviceModel;
use crate::virtio::spec::Features;

/// Local tokens.
const LISTENER: u32 = 0;
const CONNECTION: u32 = 1;

/// Messages that are obeyed at a time, so that one front end cannot keep the management thread from the others.
const TURN: usize = 64;

/// A message whose answer waits for the cores.
#[derive(Clone, Copy, Debug)]
struct Pending {
    request: Request,
    need_reply: bool,
    wait: Wait,
}

#[derive(Debug)]
struct Link {
    stream: Stream,
    assembler: Assembler,
    conn: Conn,
    pending: Option<Pending>,
}

#[derive(Debug)]
enum State {
    /// Waits for a front end.
    Listening,
    /// Serves one.
    Connected(Box<Link>),
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
    poller: Arc<Poller>,
    model: DeviceModel,
    queues: RunningQueues,
    state: State,
    log: LogGate,
}

impl VhostUser {
    /// Listens on `socket`.
    pub fn open(
        spec: &DeviceSpec,
        id: DeviceId,
        socket: &Path,
        poller: Arc<Poller>,
    ) -> Result<VhostUser, Failure> {
        let model = DeviceModel::new(spec, Features::empty(), MAX_RING_SIZE as u16);
        let device = VhostUser {
            name: spec.name.clone(),
            id,
            listener: Listener::bind(socket)?,
            poller,
            queues: RunningQueues::new(id, model.num_queues()),
            model,
            state: State::Listening,
            log: LogGate::new(Instant::now()),
        };
        device.listen().map_err(|e| {
            Failure::new(
                Errno::from_raw(e as i32),
                format!("cannot wait for connections to {}", socket.display()),
            )
        })?;
        Ok(device)
    }

    fn token(&self, local: u32) -> Token {
        Token {
            device: self.id,
            local,
        }
    }

    fn listen(&self) -> Result<(), nix::errno::Errno> {
        self.poller.add(&self.listener, self.token(LISTENER))
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
        if let Err(error) = self.poller.add(&stream, self.token(CONNECTION)) {
            tracing::warn!(device = %self.name, %error, "cannot wait for the front end's messages");
            return;
        }
        // One front end at a time; the next waits in the backlog.
        let _ = self.poller.remove(&self.listener);
        self.state = State::Connected(Box::new(Link {
            stream,
            assembler: Assembler::default(),
            conn: Conn::new(self.model.num_queues()),
            pending: None,
        }));
        self.serve(cores);
    }

    /// Obeys what has arrived, until nothing has or an answer must wait.
    fn serve(&mut self, cores: &mut dyn Cores) {
        for _ in 0..TURN {
            let State::Connected(link) = &mut self.state else {
                return;
            };
            if link.pending.is_some() {
                return;
            }
            match link.assembler.next(&link.stream) {
                Ok(Incoming::Nothing) => return,
                Ok(Incoming::Message(message)) => self.obey(message, cores),
                Ok(Incoming::Closed) => return self.hang_up(cores),
                Err(error) => return self.give_up(error, cores),
            }
        }
    }

    fn obey(&mut self, message: Message, cores: &mut dyn Cores) {
        let State::Connected(link) = &mut self.state else {
            return;
        };
        let (request, need_reply) = (message.request, message.need_reply);
        let mut device = Device {
            model: &mut self.model,
            queues: &mut self.queues,
            cores,
        };
        match link.conn.handle(message, &mut device) {
            Ok(Answer::Later(wait)) => {
                link.pending = Some(Pending {
                    request,
                    need_reply,
                    wait,
                });
                // Level-triggered: what is not going to be read must not be waited for.
                let _ = self.poller.remove(&link.stream);
            }
            Ok(answer) => self.answer(request, need_reply, answer, cores),
            Err(error) if need_reply && link.conn.acks() && error.can_be_refused() => {
                if let Some(left_out) = self.log.admit(Instant::now()) {
                    tracing::warn!(device = %self.name, left_out, ?request, %error, "refused what the front end asked for");
                }
                self.send(request, &1u64.to_ne_bytes(), None, cores);
            }
            Err(error) => self.give_up(error, cores),
        }
    }

    fn answer(
        &mut self,
        request: Request,
        need_reply: bool,
        answer: Answer,
        cores: &mut dyn Cores,
    ) {
        let State::Connected(link) = &self.state else {
            return;
        };
        match answer {
            Answer::Reply(payload, fd) => self.send(request, &payload, fd, cores),
            Answer::Ack if need_reply && link.conn.acks() => {
                self.send(request, &0u64.to_ne_bytes(), None, cores);
            }
            Answer::Ack | Answer::Later(_) => {}
        }
    }

    fn send(
        &mut self,
        request: Request,
        payload: &[u8],
        fd: Option<OwnedFd>,
        cores: &mut dyn Cores,
    ) {
        let State::Connected(link) = &self.state else {
            return;
        };
        let header = Header {
            request: request as u32,
            flags: VERSION | FLAG_REPLY,
            size: payload.len() as u32,
        };
        let bytes = [header.as_bytes(), payload].concat();
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        if let Err(error) = link.stream.send(&bytes, &fds) {
            self.give_up(PeerError::Socket(error), cores);
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
        if self.queues.reset(cores) {
            self.fresh();
        }
    }

    fn disconnect(&mut self) {
        if let State::Connected(link) = &self.state {
            // Not there while an answer waits; closing would forget it as well.
            let _ = self.poller.remove(&link.stream);
        }
    }

    /// All traces of a front end are gone.
    fn fresh(&mut self) {
        self.model.reset();
        if matches!(self.state, State::Closing) {
            return;
        }
        self.state = State::Listening;
        if let Err(error) = self.listen() {
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
            if let State::Connected(link) = &self.state {
                link.conn.ring_failed(index);
            }
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
        let State::Connected(link) = &mut self.state else {
            return;
        };
        let Some(pending) = link.pending else {
            return;
        };
        let mut device = Device {
            model: &mut self.model,
            queues: &mut self.queues,
            cores,
        };
        let Some(answer) = link.conn.arrived(pending.wait, notice, &mut device) else {
            return;
        };
        link.pending = None;
        if let Err(error) = self.poller.add(&link.stream, token) {
            return self.give_up(PeerError::Socket(error), cores);
        }
        self.answer(pending.request, pending.need_reply, answer, cores);
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

#[cfg(test)]
mod tests;
