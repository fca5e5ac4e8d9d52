//! Messages out of a stream: a header, as many bytes as it says, and the file descriptors that come with them.

use std::os::fd::OwnedFd;

use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::error::PeerError;
use super::wire::{
    FLAG_NEED_REPLY, FLAG_REPLY, Header, MAX_FDS, MAX_PAYLOAD, Request, VERSION, VERSION_MASK,
};
use crate::os::socket::{Received, Stream};

const HEADER: usize = size_of::<Header>();

/// A complete message of the front end.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) request: Request,
    /// The front end waits for an answer.
    pub(super) need_reply: bool,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Message {
    fn bad_size(&self) -> PeerError {
        PeerError::Size {
            request: self.request,
            size: self.payload.len(),
        }
    }

    /// The payload, which must be exactly a `T`.
    pub(super) fn read<T: FromBytes>(&self) -> Result<T, PeerError> {
        T::read_from_bytes(&self.payload).map_err(|_| self.bad_size())
    }

    /// The payload's first part, and what follows it.
    pub(super) fn read_prefix<T: FromBytes + KnownLayout + Immutable>(
        &self,
    ) -> Result<(T, &[u8]), PeerError> {
        T::read_from_prefix(&self.payload).map_err(|_| self.bad_size())
    }

    /// The only descriptor.
    pub(super) fn one_fd(&mut self) -> Result<OwnedFd, PeerError> {
        let count = self.fds.len();
        let one = self.fds.pop().filter(|_| count == 1);
        one.ok_or(PeerError::Fds {
            request: self.request,
            count,
        })
    }
}

/// What a look at the socket gave.
#[derive(Debug)]
pub(super) enum Incoming {
    Message(Message),
    /// Nothing complete yet.
    Nothing,
    /// The front end has left.
    Closed,
}

/// Collects the pieces of one message; they may arrive in any number of parts.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    buf: Vec<u8>,
    have: usize,
    fds: Vec<OwnedFd>,
}

impl Assembler {
    /// Reads no more than the current message, so that descriptors cannot be taken for those of the next one.
    pub(super) fn next(&mut self, stream: &Stream) -> Result<Incoming, PeerError> {
        loop {
            let want = self.want()?;
            if self.have == want {
                return self.finish().map(Incoming::Message);
            }
            self.buf.resize(want, 0);
            let rest = self.buf.get_mut(self.have..).unwrap_or(&mut []);
            match stream.receive(rest, &mut self.fds, MAX_FDS) {
                Ok(Received::Bytes(n)) => self.have += n,
                Ok(Received::Nothing) => return Ok(Incoming::Nothing),
                Ok(Received::Closed) => return Ok(Incoming::Closed),
                Err(e) => return Err(PeerError::Socket(e)),
            }
        }
    }

    fn header(&self) -> Option<Header> {
        let bytes = self.buf.get(..HEADER).filter(|_| self.have >= HEADER)?;
        Header::read_from_bytes(bytes).ok()
    }

    /// How many bytes the message has, as far as that is known.
    fn want(&self) -> Result<usize, PeerError> {
        let Some(header) = self.header() else {
            return Ok(HEADER);
        };
        if header.flags & VERSION_MASK != VERSION || header.flags & FLAG_REPLY != 0 {
            return Err(PeerError::Flags(header.flags));
        }
        match header.size as usize {
            n if n <= MAX_PAYLOAD => Ok(HEADER + n),
            _ => Err(PeerError::TooLong(header.size)),
        }
    }

    fn finish(&mut self) -> Result<Message, PeerError> {
        let header = self.header().unwrap_or_default();
        let payload = self.buf.get(HEADER..).unwrap_or(&[]).to_vec();
        self.buf.clear();
        self.have = 0;
        let fds = std::mem::take(&mut self.fds);
        let request =
            Request::from_raw(header.request).ok_or(PeerError::Unknown(header.request))?;
        Ok(Message {
            request,
            need_reply: header.flags & FLAG_NEED_REPLY != 0,
            payload,
            fds,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::eventfd::EventFd;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use zerocopy::IntoBytes;

    fn pair() -> (Stream, Stream) {
        let (a, b) = UnixStream::pair().unwrap();
        (Stream::new(a).unwrap(), Stream::new(b).unwrap())
    }

    fn bytes(request: u32, flags: u32, size: u32, payload: &[u8]) -> Vec<u8> {
        let header = Header {
            request,
            flags,
            size,
        };
        [header.as_bytes(), payload].concat()
    }

    #[test]
    fn a_message_in_single_bytes_is_put_together_and_the_next_is_left_alone() {
        let (front, back) = pair();
        let event = EventFd::new().unwrap();
        let mut assembler = Assembler::default();
        let first = bytes(2, 0x9, 8, &7u64.to_ne_bytes());
        let (last, head) = first.split_last().unwrap();
        for (i, byte) in head.iter().enumerate() {
            let fd = [event.as_fd()];
            front
                .send(&[*byte], if i == 0 { &fd } else { &[] })
                .unwrap();
            assert!(matches!(assembler.next(&back), Ok(Incoming::Nothing)));
        }
        front
            .send(&[&[*last], &bytes(3, 1, 0, &[])[..]].concat(), &[])
            .unwrap();
        let Ok(Incoming::Message(message)) = assembler.next(&back) else {
            panic!("no message");
        };
        assert_eq!(message.request, Request::SetFeatures);
        assert!(message.need_reply);
        assert_eq!(message.read::<u64>(), Ok(7));
        assert_eq!(message.fds.len(), 1);
        let Ok(Incoming::Message(message)) = assembler.next(&back) else {
            panic!("no second message");
        };
        assert_eq!(message.request, Request::SetOwner);
        assert!(!message.need_reply && message.fds.is_empty());
        drop(front);
        assert!(matches!(assembler.next(&back), Ok(Incoming::Closed)));
    }

    #[test]
    fn a_header_that_cannot_be_right_is_refused_before_its_payload() {
        let cases = [
            (bytes(1, 0, 0, &[]), PeerError::Flags(0)),
            (bytes(1, 2, 0, &[]), PeerError::Flags(2)),
            (bytes(1, 5, 0, &[]), PeerError::Flags(5)),
            (bytes(1, 1, 4097, &[]), PeerError::TooLong(4097)),
            (bytes(1, 1, u32::MAX, &[]), PeerError::TooLong(u32::MAX)),
            (bytes(0, 1, 0, &[]), PeerError::Unknown(0)),
            (bytes(41, 1, 0, &[]), PeerError::Unknown(41)),
        ];
        for (sent, want) in cases {
            let (front, back) = pair();
            front.send(&sent, &[]).unwrap();
            assert_eq!(Assembler::default().next(&back).unwrap_err(), want);
        }
    }
}
