//! A connection that outlives this process: its socket, what has been read from it for good, and the replies that wait.
//!
//! A message is looked at without being taken out of the socket. When it has had its effect and the transport has saved
//! what follows from it, [`Link::settle`] takes it out and sends its reply; how far both got is in the ledger, for certain.
//! So a process that dies in between leaves either a message that has had no effect, which the next process obeys, or one
//! that has had it, of which the next process only does what is left to do. Each transport owns the links to its peers.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};
use serde::{Deserialize, Serialize};

use crate::keeper::Keeper;
use crate::os::fdstore::Kept;
use crate::os::ledger::{self, Ledger};
use crate::os::socket::{Received, Stream};

/// Bytes taken out of the socket at a time.
const CHUNK: usize = 4096;

/// A link as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LinkV1 {
    stream: u64,
    done: u64,
    base: u64,
    outbox: Vec<(Vec<u8>, Vec<u64>)>,
}

/// A reply that waits for the socket.
#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    fds: Vec<(OwnedFd, Option<Kept>)>,
}

/// A message's bytes and descriptors.
pub(crate) type Whole = (Vec<u8>, Vec<OwnedFd>);

/// How much was there to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// As much as was asked for.
    All,
    /// Less.
    Part,
    /// Nothing.
    Nothing,
    /// The peer is gone.
    Closed,
}

/// How a turn on the socket ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// Everything is sent.
    Done,
    /// The peer must read before the rest can be sent.
    Waiting,
    /// The peer is gone.
    Closed,
}

/// A connection to a peer.
#[derive(Debug)]
pub(crate) struct Link {
    stream: Stream,
    kept: Option<Kept>,
    ledger: Ledger,
    /// Bytes of the incoming stream that have had their effect.
    done: u64,
    outbox: VecDeque<Outgoing>,
    /// Where the first reply of the outbox begins in the outgoing stream.
    base: u64,
}

impl Link {
    /// A new connection; its ledger is kept under `name`.
    pub(crate) fn new(stream: Stream, name: &str, keeper: &Keeper) -> Option<Link> {
        let ledger = Ledger::new(keeper.words(name, ledger::WORDS)?)?;
        ledger.clear();
        Some(Link {
            kept: keeper.keep(&stream),
            stream,
            ledger,
            done: 0,
            outbox: VecDeque::new(),
            base: 0,
        })
    }

    /// The connection of a former process; `None` if what is kept of it does not hold together.
    pub(crate) fn restore(saved: LinkV1, name: &str, keeper: &Keeper) -> Option<Link> {
        let LinkV1 {
            stream,
            done,
            base,
            outbox,
        } = saved;
        let kept = keeper.fds().adopt(stream)?;
        let stream = kept.as_fd().try_clone_to_owned().ok()?;
        let ledger = Ledger::new(keeper.words(name, ledger::WORDS)?)?;
        let outbox = outbox
            .into_iter()
            .map(|(bytes, fds)| {
                let fds = fds.into_iter().map(|number| {
                    let kept = keeper.fds().adopt(number)?;
                    Some((kept.as_fd().try_clone_to_owned().ok()?, Some(kept)))
                });
                let fds = fds.collect::<Option<_>>()?;
                Some(Outgoing { bytes, fds })
            })
            .collect::<Option<VecDeque<_>>>()?;
        let waiting: u64 = outbox.iter().map(|o| o.bytes.len() as u64).sum();
        let sent = ledger.sent().checked_sub(base)?;
        if sent > waiting {
            return None;
        }
        Some(Link {
            stream: Stream::new(UnixStream::from(stream)).ok()?,
            kept: Some(kept),
            // Messages without a reply that change nothing are taken out without a note.
            done: done.max(ledger.received()),
            ledger,
            outbox,
            base,
        })
    }

    /// What a later process needs; `None` if nothing is kept.
    pub(crate) fn saved(&self) -> Option<LinkV1> {
        let number = |(_, kept): &(OwnedFd, Option<Kept>)| kept.as_ref().map(Kept::number);
        let outgoing = |o: &Outgoing| {
            let fds = o.fds.iter().filter_map(number).collect();
            (o.bytes.clone(), fds)
        };
        Some(LinkV1 {
            stream: self.kept.as_ref()?.number(),
            done: self.done,
            base: self.base,
            outbox: self.outbox.iter().map(outgoing).collect(),
        })
    }

    /// Looks at the next message without its descriptors, as far as `header` goes.
    pub(crate) fn look(&self, header: &mut [u8]) -> Result<Seen, Errno> {
        self.stream.peek_from(0)?;
        let mut have = 0;
        while let Some(rest) = header.get_mut(have..).filter(|rest| !rest.is_empty()) {
            match self.stream.peek_bytes(rest)? {
                Received::Bytes(n) => have += n,
                Received::Nothing if have == 0 => return Ok(Seen::Nothing),
                Received::Nothing => return Ok(Seen::Part),
                Received::Closed => return Ok(Seen::Closed),
            }
        }
        Ok(Seen::All)
    }

    /// Looks at the next `len` bytes and the descriptors that were sent with them; `None` while they are not all there.
    ///
    /// A look ends behind the first send with descriptors, and shows those also if all that it has room for lies before
    /// that send. So there is room for one byte more than the message has: a look that fills it has seen descriptors that
    /// belong to what follows. Nobody sends two messages at once of which the first has descriptors.
    pub(crate) fn message(&self, len: usize, max_fds: usize) -> Result<Option<Whole>, Errno> {
        let there = self.stream.available()?;
        if there < len {
            self.stream.peek_from(there)?;
            return match self.stream.peek_bytes(&mut [0])? {
                Received::Closed => Err(Errno::ECONNRESET),
                Received::Bytes(_) | Received::Nothing => Ok(None),
            };
        }
        self.stream.peek_from(0)?;
        let mut bytes = vec![0; len.saturating_add(1)];
        let mut fds = Vec::new();
        let mut have = 0;
        while have < len {
            let rest = bytes.get_mut(have..).unwrap_or_default();
            let before = fds.len();
            match self.stream.peek(rest, &mut fds, max_fds) {
                Ok(Received::Bytes(n)) => have += n,
                Ok(Received::Nothing) => return Ok(None),
                Ok(Received::Closed) => return Err(Errno::ECONNRESET),
                Err(error) => return Err(error),
            }
            if have > len {
                fds.truncate(before);
            }
        }
        bytes.truncate(len);
        Ok(Some((bytes, fds)))
    }

    /// A message of so many bytes has had its effect.
    pub(crate) fn obeyed(&mut self, len: usize) {
        self.done = self.done.wrapping_add(len as u64);
    }

    /// Queues a reply.
    pub(crate) fn reply(&mut self, bytes: Vec<u8>, fds: Vec<OwnedFd>, keeper: &Keeper) {
        let fds = fds.into_iter().map(|fd| {
            let kept = keeper.keep(&fd);
            (fd, kept)
        });
        let fds = fds.collect();
        self.outbox.push_back(Outgoing { bytes, fds });
    }

    /// Ends the connection, whoever else holds its socket.
    pub(crate) fn hang_up(&self) {
        // It may have ended already.
        let _ = shutdown(self.stream.as_fd().as_raw_fd(), Shutdown::Both);
    }

    /// Whether replies wait.
    pub(crate) fn has_replies(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Takes out of the socket what has had its effect, and sends the replies that there is room for.
    pub(crate) fn settle(&mut self) -> Result<Settled, Errno> {
        let mut scratch = [0; CHUNK];
        loop {
            let left = self.done.saturating_sub(self.ledger.received());
            let n = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            let Some(buf) = scratch.get_mut(..n).filter(|buf| !buf.is_empty()) else {
                break;
            };
            match self.ledger.receive(self.stream.as_fd(), buf) {
                Ok(0) | Err(Errno::ECONNRESET) => return Ok(Settled::Closed),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        self.send()
    }

    fn send(&mut self) -> Result<Settled, Errno> {
        while let Some(first) = self.outbox.front() {
            let sent = self.ledger.sent().wrapping_sub(self.base);
            let rest = usize::try_from(sent)
                .ok()
                .and_then(|at| first.bytes.get(at..));
            let Some(rest) = rest.filter(|rest| !rest.is_empty()) else {
                self.base = self.base.wrapping_add(first.bytes.len() as u64);
                self.outbox.pop_front();
                continue;
            };
            // Descriptors go with the first byte.
            let fds: Vec<BorrowedFd<'_>> = match sent {
                0 => first.fds.iter().map(|(fd, _)| fd.as_fd()).collect(),
                _ => Vec::new(),
            };
            match self.ledger.send(self.stream.as_fd(), rest, &fds) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(Settled::Waiting),
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Ok(Settled::Closed),
                Err(error) => return Err(error),
            }
        }
        Ok(Settled::Done)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
