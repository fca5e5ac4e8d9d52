//! Unix stream sockets that carry file descriptors: what the transports listen on and talk through.
//!
//! Everything is non-blocking. Received descriptors are close-on-exec; those that a message may not have are closed.
// UNSAFETY: takes ownership of descriptors that the kernel has just made for us.
#![expect(
    unsafe_code,
    reason = "descriptors arrive as numbers in control messages"
)]

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use ferry_shared::errno::Errno;
use ferry_shared::msg::Failure;
use nix::errno::Errno as SysErrno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recv, recvmsg, sendmsg};

/// Most descriptors that the kernel passes with one message (`SCM_MAX_FD`).
const KERNEL_MAX_FDS: usize = 253;

/// A listening socket; its file goes away with it.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, to remove it only while it is still ours.
    file: (u64, u64),
}

fn failed(what: &str, path: &Path, error: &std::io::Error) -> Failure {
    let errno = error.raw_os_error().unwrap_or(SysErrno::EIO as i32);
    Failure::new(
        Errno::from_raw(errno),
        format!("cannot {what} socket {}", path.display()),
    )
}

impl Listener {
    /// Binds and listens. A socket file that nobody listens on any more is replaced; anything else there is left alone and
    /// refused.
    pub fn bind(path: &Path) -> Result<Listener, Failure> {
        match std::fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(Failure::new(
                    Errno::EEXIST,
                    format!("{} exists and is not a socket", path.display()),
                ));
            }
            Ok(_) => remove_if_stale(path)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed("look for", path, &e)),
        }
        let socket = UnixListener::bind(path).map_err(|e| failed("bind", path, &e))?;
        socket
            .set_nonblocking(true)
            .map_err(|e| failed("set up", path, &e))?;
        let meta = std::fs::symlink_metadata(path).map_err(|e| failed("look for", path, &e))?;
        Ok(Listener {
            socket,
            path: path.to_owned(),
            file: (meta.dev(), meta.ino()),
        })
    }

    /// Goes on listening with a socket that a former process has bound to `path`. `None` if its file is not there any more:
    /// nobody could connect.
    pub fn adopt(socket: OwnedFd, path: &Path, file: (u64, u64)) -> Option<Listener> {
        let socket = UnixListener::from(socket);
        socket.set_nonblocking(true).ok()?;
        let meta = std::fs::symlink_metadata(path).ok()?;
        let there = meta.file_type().is_socket() && (meta.dev(), meta.ino()) == file;
        there.then(|| Listener {
            socket,
            path: path.to_owned(),
            file,
        })
    }

    /// Device and inode of the socket's file.
    pub fn file(&self) -> (u64, u64) {
        self.file
    }

    /// The next connection, if one waits.
    pub fn accept(&self) -> Option<Stream> {
        let (socket, _) = self.socket.accept().ok()?;
        Stream::new(socket).ok()
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn remove_if_stale(path: &Path) -> Result<(), Failure> {
    match UnixStream::connect(path) {
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|e| failed("replace the stale", path, &e))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) if e.kind() != std::io::ErrorKind::WouldBlock => Err(failed("probe", path, &e)),
        _ => Err(Failure::new(
            Errno::EADDRINUSE,
            format!(
                "another process listens on socket {}; stop it first",
                path.display()
            ),
        )),
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.file);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A connection.
#[derive(Debug)]
pub struct Stream(UnixStream);

/// What a read from a [`Stream`] gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing is there now.
    Nothing,
    /// The peer has closed the connection.
    Closed,
}

impl Stream {
    /// Takes over a connected socket.
    pub fn new(socket: UnixStream) -> std::io::Result<Stream> {
        socket.set_nonblocking(true)?;
        Ok(Stream(socket))
    }

    /// Bytes that can be received.
    pub fn available(&self) -> Result<usize, SysErrno> {
        let mut bytes: libc::c_int = 0;
        // SAFETY: the call writes one int.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
        SysErrno::result(done)?;
        Ok(usize::try_from(bytes).unwrap_or(0))
    }

    /// Where the next [`Stream::peek`] begins, counted from the first byte that has not been received. Each one moves it on.
    pub fn peek_from(&self, at: usize) -> Result<(), SysErrno> {
        let at = libc::c_int::try_from(at).map_err(|_| SysErrno::EINVAL)?;
        // SAFETY: the option is an int, which is read during the call.
        let done = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEEK_OFF,
                (&raw const at).cast(),
                size_of_val(&at) as libc::socklen_t,
            )
        };
        SysErrno::result(done).map(drop)
    }

    /// Bytes as [`Stream::peek`] sees them, without descriptors.
    pub fn peek_bytes(&self, buf: &mut [u8]) -> Result<Received, SysErrno> {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(self.0.as_raw_fd(), buf, flags) {
            Ok(0) | Err(SysErrno::ECONNRESET) => Ok(Received::Closed),
            Ok(n) => Ok(Received::Bytes(n)),
            Err(SysErrno::EAGAIN | SysErrno::EINTR) => Ok(Received::Nothing),
            Err(error) => Err(error),
        }
    }

    /// As [`Stream::receive`], but leaves everything in the socket. Descriptors are seen with every byte of the send that they
    /// came with, and also by a look that ends just before it.
    pub fn peek(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        max_fds: usize,
    ) -> Result<Received, SysErrno> {
        self.read(buf, fds, max_fds, MsgFlags::MSG_PEEK)
    }

    /// Receives up to `buf.len()` bytes. Descriptors that come with them are appended to `fds`; those past `max_fds` are
    /// closed, and the call fails with `EMSGSIZE`.
    pub fn receive(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        max_fds: usize,
    ) -> Result<Received, SysErrno> {
        self.read(buf, fds, max_fds, MsgFlags::empty())
    }

    fn read(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        max_fds: usize,
        how: MsgFlags,
    ) -> Result<Received, SysErrno> {
        let mut control = nix::cmsg_space!([RawFd; KERNEL_MAX_FDS]);
        let mut parts = [IoSliceMut::new(buf)];
        let flags = how | MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message = match recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut control), flags)
        {
            Ok(message) => message,
            Err(SysErrno::EAGAIN | SysErrno::EINTR) => return Ok(Received::Nothing),
            Err(SysErrno::ECONNRESET) => return Ok(Received::Closed),
            Err(e) => return Err(e),
        };
        for part in message.cmsgs()? {
            let ControlMessageOwned::ScmRights(raw) = part else {
                continue;
            };
            // SAFETY: the kernel has just made these descriptors for this process; nobody else owns them.
            fds.extend(
                raw.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
        if fds.len() > max_fds {
            fds.truncate(max_fds);
            return Err(SysErrno::EMSGSIZE);
        }
        Ok(match message.bytes {
            0 => Received::Closed,
            n => Received::Bytes(n),
        })
    }

    /// Sends all of `bytes`, with `fds`, or fails: a peer that does not read its answers gets `EAGAIN` and is given up.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SysErrno> {
        if self.send_some(bytes, fds)? < bytes.len() {
            return Err(SysErrno::EAGAIN);
        }
        Ok(())
    }

    /// Sends as many of `bytes` as there is room for, and `fds` with the first of them; says how many.
    pub fn send_some(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, SysErrno> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let parts = [IoSlice::new(bytes)];
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        match sendmsg::<()>(self.0.as_raw_fd(), &parts, control, flags, None) {
            Err(SysErrno::EAGAIN | SysErrno::EINTR) => Ok(0),
            other => other,
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::eventfd::EventFd;

    /// A directory that goes away with the test.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Dir {
            let path = std::env::temp_dir().join(format!("ferry-{}-{name}", std::process::id()));
            std::fs::create_dir(&path).unwrap();
            Dir(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn pair() -> (Stream, Stream) {
        let (a, b) = UnixStream::pair().unwrap();
        (Stream::new(a).unwrap(), Stream::new(b).unwrap())
    }

    #[test]
    fn a_live_socket_is_refused_and_a_stale_one_replaced() {
        let dir = Dir::new("stale");
        let path = dir.0.join("s");
        let live = Listener::bind(&path).unwrap();
        let refused = Listener::bind(&path).unwrap_err();
        assert_eq!(refused.errno, Errno::EADDRINUSE);
        assert!(refused.detail.contains("/s;"), "{}", refused.detail);
        drop(live);
        assert!(!path.exists());
        // A process that dies leaves the file behind.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let again = Listener::bind(&path).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        assert!(again.accept().is_some());
        assert!(again.accept().is_none());
        drop(client);
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = Dir::new("file");
        let path = dir.0.join("s");
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(Listener::bind(&path).unwrap_err().errno, Errno::EEXIST);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_listener_does_not_remove_the_socket_of_a_successor() {
        let dir = Dir::new("successor");
        let path = dir.0.join("s");
        let old = Listener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let new = Listener::bind(&path).unwrap();
        drop(old);
        assert!(path.exists());
        drop(new);
        assert!(!path.exists());
    }

    #[test]
    fn bytes_and_descriptors_arrive_and_surplus_descriptors_are_closed() {
        let (a, b) = pair();
        let event = EventFd::new().unwrap();
        let mut buf = [0; 8];
        let mut fds = Vec::new();
        assert_eq!(b.receive(&mut buf, &mut fds, 8), Ok(Received::Nothing));
        a.send(b"abc", &[event.as_fd()]).unwrap();
        assert_eq!(b.receive(&mut buf, &mut fds, 8), Ok(Received::Bytes(3)));
        assert_eq!(fds.len(), 1);
        EventFd::from_peer(fds.pop().unwrap()).unwrap().signal();
        assert_eq!(nix::unistd::read(&event, &mut buf), Ok(8));

        a.send(b"abc", &[event.as_fd(); 20]).unwrap();
        assert_eq!(b.receive(&mut buf, &mut fds, 8), Err(SysErrno::EMSGSIZE));
        assert_eq!(fds.len(), 8);
        drop(a);
        assert_eq!(b.receive(&mut buf, &mut fds, 8), Ok(Received::Closed));
    }

    #[test]
    fn what_was_peeked_at_is_still_there() {
        let (a, b) = pair();
        let event = EventFd::new().unwrap();
        let mut buf = [0; 8];
        let mut fds = Vec::new();
        // Descriptors end a message of the kernel's, so this is seen in three looks.
        a.send(b"ab", &[event.as_fd()]).unwrap();
        a.send(b"cd", &[event.as_fd()]).unwrap();
        a.send(b"ef", &[]).unwrap();
        for _ in 0..2 {
            assert_eq!(b.available(), Ok(6));
            b.peek_from(0).unwrap();
            fds.clear();
            for (expected, n) in [(&b"ab"[..], 1), (b"cd", 2), (b"ef", 2)] {
                assert_eq!(b.peek(&mut buf, &mut fds, 8), Ok(Received::Bytes(2)));
                assert_eq!((&buf[..2], fds.len()), (expected, n));
            }
            assert_eq!(b.peek(&mut buf, &mut fds, 8), Ok(Received::Nothing));
        }
        // What is received is gone, its descriptors too.
        assert_eq!(
            b.receive(&mut buf[..2], &mut fds, 8),
            Ok(Received::Bytes(2))
        );
        b.peek_from(0).unwrap();
        assert_eq!(b.peek_bytes(&mut buf), Ok(Received::Bytes(2)));
        assert_eq!(&buf[..2], b"cd");
        drop(a);
        b.peek_from(4).unwrap();
        assert_eq!(b.peek(&mut buf, &mut fds, 8), Ok(Received::Closed));
    }

    #[test]
    fn a_listener_is_adopted_while_its_file_is_there() {
        let dir = Dir::new("adopt");
        let path = dir.0.join("s");
        let first = Listener::bind(&path).unwrap();
        let fd = || first.as_fd().try_clone_to_owned().unwrap();
        let waiting = UnixStream::connect(&path).unwrap();
        let second = Listener::adopt(fd(), &path, first.file()).unwrap();
        assert!(second.accept().is_some());
        assert!(Listener::adopt(fd(), &path, (0, 0)).is_none());
        drop((waiting, second));
        assert!(!path.exists());
        assert!(Listener::adopt(fd(), &path, first.file()).is_none());
    }

    #[test]
    fn a_peer_that_does_not_read_is_noticed() {
        let (a, _b) = pair();
        let gave_up = (0..100_000).find_map(|_| a.send(&[0; 4096], &[]).err());
        assert_eq!(gave_up, Some(SysErrno::EAGAIN));
    }
}
