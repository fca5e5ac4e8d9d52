//! Messages out of a stream: a header, as many bytes as it says, and the file descriptors that come with them.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::error::PeerError;
use super::wire::{
    FLAG_NEED_REPLY, FLAG_REPLY, Header, MAX_FDS, MAX_PAYLOAD, Request, VERSION, VERSION_MASK,
};
use crate::transport::link::{Link, Seen};

const HEADER: usize = size_of::<Header>();

/// A complete message of the front end.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) request: Request,
    /// The front end waits for an answer.
    pub(super) need_reply: bool,
    /// Bytes of the whole message.
    pub(super) len: usize,
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
    /// Nothing.
    Nothing,
    /// A part of a message, which stays in the socket.
    Part,
    /// The front end has left.
    Closed,
}

/// Looks at the next message. All of it stays in the socket until somebody says that it has been obeyed.
pub(super) fn next(link: &Link) -> Result<Incoming, PeerError> {
    let mut header: [u8; HEADER] = [0; _];
    match link.look(&mut header).map_err(PeerError::Socket)? {
        Seen::All => {}
        Seen::Part => return Ok(Incoming::Part),
        Seen::Nothing => return Ok(Incoming::Nothing),
        Seen::Closed => return Ok(Incoming::Closed),
    }
    let header: Header = zerocopy::transmute!(header);
    let len = length(&header)?;
    match link.message(len, MAX_FDS) {
        Ok(Some((bytes, fds))) => message(&header, &bytes, fds).map(Incoming::Message),
        Ok(None) => Ok(Incoming::Part),
        Err(Errno::ECONNRESET) => Ok(Incoming::Closed),
        Err(error) => Err(PeerError::Socket(error)),
    }
}

/// How many bytes the message has.
fn length(header: &Header) -> Result<usize, PeerError> {
    if header.flags & VERSION_MASK != VERSION || header.flags & FLAG_REPLY != 0 {
        return Err(PeerError::Flags(header.flags));
    }
    match header.size as usize {
        n if n <= MAX_PAYLOAD => Ok(HEADER + n),
        _ => Err(PeerError::TooLong(header.size)),
    }
}

fn message(header: &Header, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Message, PeerError> {
    let request = Request::from_raw(header.request).ok_or(PeerError::Unknown(header.request))?;
    Ok(Message {
        request,
        need_reply: header.flags & FLAG_NEED_REPLY != 0,
        len: bytes.len(),
        payload: bytes.get(HEADER..).unwrap_or(&[]).to_vec(),
        fds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::Keeper;
    use crate::os::eventfd::EventFd;
    use crate::os::socket::Stream;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use zerocopy::IntoBytes;

    fn pair() -> (Stream, Link) {
        let (a, b) = UnixStream::pair().unwrap();
        let link = Link::new(Stream::new(b).unwrap(), "link", &Keeper::default());
        (Stream::new(a).unwrap(), link.unwrap())
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
        let (front, mut back) = pair();
        let event = EventFd::new().unwrap();
        let first = bytes(2, 0x9, 8, &7u64.to_ne_bytes());
        let (last, head) = first.split_last().unwrap();
        assert!(matches!(next(&back), Ok(Incoming::Nothing)));
        for (i, byte) in head.iter().enumerate() {
            let fd = [event.as_fd()];
            front
                .send(&[*byte], if i == 0 { &fd } else { &[] })
                .unwrap();
            assert!(matches!(next(&back), Ok(Incoming::Part)));
        }
        front
            .send(&[&[*last], &bytes(3, 1, 0, &[])[..]].concat(), &[])
            .unwrap();
        let Ok(Incoming::Message(message)) = next(&back) else {
            panic!("no message");
        };
        assert_eq!(message.request, Request::SetFeatures);
        assert!(message.need_reply);
        assert_eq!(message.len, first.len());
        assert_eq!(message.read::<u64>(), Ok(7));
        assert_eq!(message.fds.len(), 1);
        back.obeyed(message.len);
        back.settle().unwrap();
        let Ok(Incoming::Message(message)) = next(&back) else {
            panic!("no second message");
        };
        assert_eq!(message.request, Request::SetOwner);
        assert!(!message.need_reply && message.fds.is_empty());
        back.obeyed(message.len);
        back.settle().unwrap();
        drop(front);
        assert!(matches!(next(&back), Ok(Incoming::Closed)));
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
            assert_eq!(next(&back).unwrap_err(), want);
        }
    }
}
