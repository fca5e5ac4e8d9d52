//! Messages out of a byte stream, and replies into it.
//!
//! Owns the bytes between the socket and [`super::conn`]; makes no system call itself. What is held for a peer is bounded: one
//! message of at most [`MAX_MESSAGE`] bytes inwards, and outwards the caller stops reading commands while
//! [`Outbox::is_full`].

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use zerocopy::{FromBytes, IntoBytes};

use super::wire::{Header, MAX_MESSAGE, MAX_MSG_FDS, header_flags};

const HEADER: usize = size_of::<Header>();

/// A whole command.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// Why a stream cannot be followed any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("message size {0} is outside {HEADER} to {MAX_MESSAGE}")]
    Size(u32),
    #[error("message with flags {0:#x} is not a command")]
    Type(u32),
    #[error("more than {MAX_MSG_FDS} file descriptors in a message")]
    Descriptors,
}

/// Collects one message at a time. Only the bytes of that message are asked for, so descriptors that arrive with them
/// belong to it.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    bytes: Vec<u8>,
    filled: usize,
    fds: Vec<OwnedFd>,
}

impl Inbox {
    /// Where the next bytes of the stream go; never empty.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        if self.bytes.len() < HEADER {
            self.bytes.resize(HEADER, 0);
        }
        self.bytes.get_mut(self.filled..).unwrap_or_default()
    }

    /// Takes note of `n` bytes that were put into [`Inbox::room`], and of descriptors that came with them.
    pub(crate) fn received(
        &mut self,
        n: usize,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<Message>, Malformed> {
        self.filled = self.filled.saturating_add(n);
        self.fds.extend(fds);
        if self.fds.len() > MAX_MSG_FDS {
            return Err(Malformed::Descriptors);
        }
        if self.filled < HEADER || self.filled < self.bytes.len() {
            return Ok(None);
        }
        let Ok((header, _)) = Header::read_from_prefix(&self.bytes) else {
            return Ok(None);
        };
        if header.flags & header_flags::TYPE_MASK != header_flags::COMMAND {
            return Err(Malformed::Type(header.flags));
        }
        let size = header.size as usize;
        if !(HEADER..=MAX_MESSAGE).contains(&size) {
            return Err(Malformed::Size(header.size));
        }
        if self.filled < size {
            self.bytes.resize(size, 0);
            return Ok(None);
        }
        self.filled = 0;
        let mut payload = std::mem::take(&mut self.bytes);
        payload.drain(..HEADER);
        Ok(Some(Message {
            header,
            payload,
            fds: std::mem::take(&mut self.fds),
        }))
    }
}

/// Replies that wait for the socket.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    queue: VecDeque<Outgoing>,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl Outbox {
    /// As many replies may wait before no more commands are read.
    const FULL: usize = 64;

    /// Adds the reply to a command, unless its sender wants none.
    pub(crate) fn reply(
        &mut self,
        to: &Header,
        result: Result<(Vec<u8>, Vec<OwnedFd>), nix::errno::Errno>,
    ) {
        if to.flags & header_flags::NO_REPLY != 0 {
            return;
        }
        let mut header = Header {
            flags: header_flags::REPLY,
            ..*to
        };
        let (payload, fds) = match result {
            Ok(good) => {
                header.error = 0;
                good
            }
            Err(errno) => {
                header.flags |= header_flags::ERROR;
                header.error = (errno as i32).unsigned_abs();
                Default::default()
            }
        };
        let size = HEADER.saturating_add(payload.len());
        header.size = u32::try_from(size).unwrap_or(u32::MAX);
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(&payload);
        self.queue.push_back(Outgoing {
            bytes,
            sent: 0,
            fds,
        });
    }

    /// Whether the peer must take replies before it may send more commands.
    pub(crate) fn is_full(&self) -> bool {
        self.queue.len() >= Self::FULL
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// What to send next, with the descriptors that go with the first of the bytes.
    pub(crate) fn next(&self) -> Option<(&[u8], &[OwnedFd])> {
        let first = self.queue.front()?;
        Some((first.bytes.get(first.sent..)?, &first.fds))
    }

    /// Takes note that `n` bytes of [`Outbox::next`], and its descriptors, are sent.
    pub(crate) fn sent(&mut self, n: usize) {
        if let Some(first) = self.queue.front_mut() {
            first.sent = first.sent.saturating_add(n);
            first.fds.clear();
            if first.sent >= first.bytes.len() {
                self.queue.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::vfio_user::wire::command;
    use nix::errno::Errno;

    fn header(size: u32, flags: u32) -> Header {
        Header {
            id: 7,
            command: command::REGION_READ,
            size,
            flags,
            error: 0,
        }
    }

    /// Feeds bytes in pieces of at most `step`.
    fn feed(inbox: &mut Inbox, mut bytes: &[u8], step: usize) -> Result<Vec<Message>, Malformed> {
        let mut messages = Vec::new();
        while !bytes.is_empty() {
            let room = inbox.room();
            assert!(!room.is_empty());
            let n = room.len().min(step).min(bytes.len());
            room[..n].copy_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            messages.extend(inbox.received(n, Vec::new())?);
        }
        Ok(messages)
    }

    #[test]
    fn messages_come_out_whole_however_the_stream_is_cut() {
        let mut stream = header(20, 0).as_bytes().to_vec();
        stream.extend_from_slice(b"abcd");
        stream.extend_from_slice(header(16, 0).as_bytes());
        for step in 1..40 {
            let messages = feed(&mut Inbox::default(), &stream, step).unwrap();
            let payloads: Vec<_> = messages.iter().map(|m| &m.payload[..]).collect();
            assert_eq!(payloads, [&b"abcd"[..], b""], "step {step}");
        }
    }

    #[test]
    fn bad_sizes_and_replies_end_the_stream() {
        let size = |n| feed(&mut Inbox::default(), header(n, 0).as_bytes(), 16).unwrap_err();
        assert_eq!(size(15), Malformed::Size(15));
        assert_eq!(size(u32::MAX), Malformed::Size(u32::MAX));
        let reply = feed(&mut Inbox::default(), header(16, 1).as_bytes(), 16).unwrap_err();
        assert_eq!(reply, Malformed::Type(1));
    }

    #[test]
    fn too_many_descriptors_end_the_stream() {
        let mut inbox = Inbox::default();
        inbox.room();
        let fds = (0..=MAX_MSG_FDS).map(|_| std::fs::File::open("/dev/null").unwrap().into());
        assert_eq!(
            inbox.received(1, fds.collect()).unwrap_err(),
            Malformed::Descriptors
        );
    }

    #[test]
    fn replies_repeat_id_and_command_and_are_sent_in_order() {
        let mut outbox = Outbox::default();
        outbox.reply(&header(16, 0), Ok((b"xy".to_vec(), Vec::new())));
        outbox.reply(&header(16, header_flags::NO_REPLY), Err(Errno::EIO));
        outbox.reply(&header(16, 0), Err(Errno::EINVAL));
        let good = Header {
            size: 18,
            flags: 1,
            ..header(0, 0)
        };
        let (bytes, _) = outbox.next().unwrap();
        assert_eq!(bytes, [good.as_bytes(), b"xy"].concat());
        outbox.sent(17);
        assert_eq!(outbox.next().unwrap().0, b"y");
        outbox.sent(1);
        let bad = Header {
            size: 16,
            flags: 0x21,
            error: 22,
            ..header(0, 0)
        };
        assert_eq!(outbox.next().unwrap().0, bad.as_bytes());
        outbox.sent(16);
        assert!(outbox.is_empty());
    }
}
