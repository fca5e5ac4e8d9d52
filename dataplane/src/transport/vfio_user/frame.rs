//! Messages out of a byte stream, and replies into it.
//!
//! Gives the bytes between the socket and [`super::conn`] their form. What is held for a peer is bounded: one message of at
//! most [`MAX_MESSAGE`] bytes.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use zerocopy::IntoBytes;

use super::wire::{Header, MAX_MESSAGE, MAX_MSG_FDS, header_flags};
use crate::transport::link::{Link, Seen};

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
    #[error("the socket failed: {0}")]
    Socket(#[from] Errno),
}

/// What a look at the socket gave.
#[derive(Debug)]
pub(crate) enum Incoming {
    Message(Message),
    /// Nothing.
    Nothing,
    /// A part of a command, which stays in the socket.
    Part,
    /// The client is gone.
    Closed,
}

/// Looks at the next command. All of it stays in the socket until somebody says that it has been carried out.
pub(crate) fn next(link: &Link) -> Result<Incoming, Malformed> {
    let mut header: [u8; HEADER] = [0; _];
    match link.look(&mut header)? {
        Seen::All => {}
        Seen::Part => return Ok(Incoming::Part),
        Seen::Nothing => return Ok(Incoming::Nothing),
        Seen::Closed => return Ok(Incoming::Closed),
    }
    let header: Header = zerocopy::transmute!(header);
    if header.flags & header_flags::TYPE_MASK != header_flags::COMMAND {
        return Err(Malformed::Type(header.flags));
    }
    let size = header.size as usize;
    if !(HEADER..=MAX_MESSAGE).contains(&size) {
        return Err(Malformed::Size(header.size));
    }
    match link.message(size, MAX_MSG_FDS) {
        Ok(Some((mut payload, fds))) => {
            payload.drain(..HEADER);
            Ok(Incoming::Message(Message {
                header,
                payload,
                fds,
            }))
        }
        Ok(None) => Ok(Incoming::Part),
        Err(Errno::ECONNRESET) => Ok(Incoming::Closed),
        Err(Errno::EMSGSIZE) => Err(Malformed::Descriptors),
        Err(error) => Err(Malformed::Socket(error)),
    }
}

/// The bytes and descriptors of the reply to a command, unless its sender wants none.
pub(crate) fn reply(
    to: &Header,
    result: Result<(Vec<u8>, Vec<OwnedFd>), Errno>,
) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    if to.flags & header_flags::NO_REPLY != 0 {
        return None;
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
    Some((bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::Keeper;
    use crate::os::socket::Stream;
    use crate::transport::vfio_user::wire::command;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn header(size: u32, flags: u32) -> Header {
        Header {
            id: 7,
            command: command::REGION_READ,
            size,
            flags,
            error: 0,
        }
    }

    fn pair() -> (Stream, Link) {
        let (a, b) = UnixStream::pair().unwrap();
        let link = Link::new(Stream::new(b).unwrap(), "link", &Keeper::default());
        (Stream::new(a).unwrap(), link.unwrap())
    }

    #[test]
    fn messages_come_out_whole_however_the_stream_is_cut() {
        let mut stream = header(20, 0).as_bytes().to_vec();
        stream.extend_from_slice(b"abcd");
        stream.extend_from_slice(header(16, 0).as_bytes());
        for step in 1..40 {
            let (client, mut link) = pair();
            let mut payloads = Vec::new();
            assert!(matches!(next(&link), Ok(Incoming::Nothing)));
            for piece in stream.chunks(step) {
                client.send(piece, &[]).unwrap();
                while let Incoming::Message(m) = next(&link).unwrap() {
                    link.obeyed(m.header.size as usize);
                    link.settle().unwrap();
                    payloads.push(m.payload);
                }
            }
            assert_eq!(payloads, [&b"abcd"[..], b""], "step {step}");
            client.send(&stream[..18], &[]).unwrap();
            assert!(matches!(next(&link), Ok(Incoming::Part)));
            drop(client);
            assert!(matches!(next(&link), Ok(Incoming::Closed)));
        }
    }

    #[test]
    fn bad_sizes_and_replies_end_the_stream() {
        let wrong = |header: Header| {
            let (client, link) = pair();
            client.send(header.as_bytes(), &[]).unwrap();
            next(&link).unwrap_err()
        };
        assert_eq!(wrong(header(15, 0)), Malformed::Size(15));
        assert_eq!(wrong(header(u32::MAX, 0)), Malformed::Size(u32::MAX));
        assert_eq!(wrong(header(16, 1)), Malformed::Type(1));
    }

    #[test]
    fn descriptors_are_those_of_their_message_and_too_many_end_the_stream() {
        let (client, mut link) = pair();
        let file = std::fs::File::open("/dev/null").unwrap();
        for count in [0, 3, 0] {
            let fds = vec![file.as_fd(); count];
            client.send(header(16, 0).as_bytes(), &fds).unwrap();
        }
        for count in [0, 3, 0] {
            let Ok(Incoming::Message(m)) = next(&link) else {
                panic!("no message");
            };
            assert_eq!(m.fds.len(), count);
            link.obeyed(16);
            link.settle().unwrap();
        }
        let fds = [file.as_fd(); MAX_MSG_FDS + 1];
        client.send(header(16, 0).as_bytes(), &fds).unwrap();
        assert_eq!(next(&link).unwrap_err(), Malformed::Descriptors);
    }

    #[test]
    fn replies_repeat_id_and_command_and_are_left_out_where_none_is_wanted() {
        let good = Header {
            size: 18,
            flags: 1,
            ..header(0, 0)
        };
        let (bytes, _) = reply(&header(16, 0), Ok((b"xy".to_vec(), Vec::new()))).unwrap();
        assert_eq!(bytes, [good.as_bytes(), b"xy"].concat());
        let silent = header(16, header_flags::NO_REPLY);
        assert!(reply(&silent, Err(Errno::EIO)).is_none());
        let bad = Header {
            size: 16,
            flags: 0x21,
            error: 22,
            ..header(0, 0)
        };
        let (bytes, _) = reply(&header(16, 0), Err(Errno::EINVAL)).unwrap();
        assert_eq!(bytes, bad.as_bytes());
    }
}
