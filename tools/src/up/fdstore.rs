//! The descriptors that the data plane must find again when it has died: `ferry up` as its service manager.
//!
//! Speaks the notification protocol of systemd on a socket of its own, and heeds only the process that it has started.
//! What that process sends is bounded in length and in number.
#![expect(unsafe_code, reason = "descriptors arrive as numbers")]

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixDatagram;

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::socket::sockopt::PassCred;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, UnixAddr, UnixCredentials, bind, recvmsg, setsockopt,
};
use nix::unistd::Pid;

/// Descriptors that are kept at most: kick, call and error event of every queue that a service can have, its sockets, its
/// guests' memory and its unlinked files.
pub(super) const ROOM: usize = 16 * 1024;
/// Bytes of a message, as systemd takes them.
const MESSAGE: usize = 4096;
/// Bytes of a name, as systemd takes them.
const NAME: usize = 255;
/// Descriptors of a message: what the kernel passes at most.
const RIGHTS: usize = 253;
/// The first descriptor that a service is passed.
pub(super) const FIRST: RawFd = 3;

/// What the process has said besides what it wants to be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    pub(super) ready: bool,
}

/// The socket, and what has come through it.
#[derive(Debug)]
pub(super) struct FdStore {
    socket: UnixDatagram,
    /// Names and descriptors, in the order in which they came.
    kept: Vec<(String, OwnedFd)>,
    full: bool,
}

impl FdStore {
    /// A store that nobody has put anything into.
    pub(super) fn new() -> anyhow::Result<FdStore> {
        let failed = "cannot make the socket on which the data plane stores its descriptors";
        let socket = UnixDatagram::unbound().context(failed)?;
        // A name of the kernel's choice, which needs no place in the file system; who sends is looked at.
        bind(socket.as_raw_fd(), &UnixAddr::new_unnamed()).context(failed)?;
        setsockopt(&socket, PassCred, &true).context(failed)?;
        Ok(FdStore {
            socket,
            kept: Vec::new(),
            full: false,
        })
    }

    /// What `NOTIFY_SOCKET` has to say.
    pub(super) fn address(&self) -> io::Result<String> {
        let address = self.socket.local_addr()?;
        let name = address.as_abstract_name().unwrap_or_default();
        // The kernel chooses hexadecimal digits.
        Ok(format!("@{}", String::from_utf8_lossy(name)))
    }

    /// What `LISTEN_FDNAMES` has to say.
    pub(super) fn names(&self) -> String {
        let names: Vec<&str> = self.kept.iter().map(|(name, _)| name.as_str()).collect();
        names.join(":")
    }

    /// The descriptors, in the order of their names.
    pub(super) fn descriptors(&self) -> impl ExactSizeIterator<Item = RawFd> + '_ {
        self.kept.iter().map(|(_, fd)| fd.as_raw_fd())
    }

    /// Forgets everything: whatever was connected through it is disconnected.
    pub(super) fn clear(&mut self) {
        self.kept.clear();
    }

    /// Takes what has arrived; only `sender` is heeded.
    pub(super) fn drain(&mut self, sender: Option<Pid>) -> News {
        let mut news = News::default();
        loop {
            match self.receive() {
                Ok(Some(message)) if Some(message.sender) == sender => {
                    self.obey(message, &mut news);
                }
                // Descriptors that came with it are closed.
                Ok(Some(_)) => {}
                Ok(None) => return news,
                Err(_) => {}
            }
        }
    }

    fn receive(&self) -> Result<Option<Message>, Errno> {
        let mut bytes = [0; MESSAGE];
        let mut control = nix::cmsg_space!([RawFd; RIGHTS], UnixCredentials);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let socket = self.socket.as_raw_fd();
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let received = match recvmsg::<()>(socket, &mut parts, Some(&mut control), flags) {
            Ok(received) => received,
            Err(Errno::EAGAIN) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        let cut = MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC;
        let whole = !received.flags.intersects(cut);
        let mut sender = None;
        let mut fds = Vec::new();
        for part in received.cmsgs()? {
            match part {
                ControlMessageOwned::ScmCredentials(who) => sender = Some(who.pid()),
                ControlMessageOwned::ScmRights(raw) => {
                    // SAFETY: the kernel has just made these descriptors for this process; nobody else owns them.
                    let own = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
                    fds.extend(raw.into_iter().map(own));
                }
                _ => {}
            }
        }
        let len = received.bytes;
        let text = bytes.get(..len).filter(|_| whole).unwrap_or(&[]);
        Ok(Some(Message {
            sender: Pid::from_raw(sender.unwrap_or(0)),
            text: String::from_utf8_lossy(text).into_owned(),
            fds,
        }))
    }

    fn obey(&mut self, message: Message, news: &mut News) {
        let (mut store, mut remove, mut name) = (false, false, "stored");
        for line in message.text.lines() {
            match line.split_once('=') {
                Some(("FDSTORE", "1")) => store = true,
                Some(("FDSTOREREMOVE", "1")) => remove = true,
                Some(("FDNAME", given)) if is_name(given) => name = given,
                Some(("READY", "1")) => news.ready = true,
                _ => {}
            }
        }
        if remove {
            self.kept.retain(|(kept, _)| kept != name);
            self.full = false;
        } else if store {
            for fd in message.fds {
                self.keep(name, fd);
            }
        }
    }

    fn keep(&mut self, name: &str, fd: OwnedFd) {
        if self.kept.len() < ROOM {
            self.kept.push((name.to_owned(), fd));
        } else if !std::mem::replace(&mut self.full, true) {
            eprintln!(
                "up: ferry-dataplane: stores more than {ROOM} descriptors; a crash now loses the connections of the last ones"
            );
        }
    }
}

impl AsFd for FdStore {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

struct Message {
    sender: Pid,
    text: String,
    fds: Vec<OwnedFd>,
}

/// A name that can stand in `LISTEN_FDNAMES`.
fn is_name(name: &str) -> bool {
    let good = |byte: u8| byte != b':' && (b' '..0x7f).contains(&byte);
    !name.is_empty() && name.len() <= NAME && name.bytes().all(good)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::IoSlice;

    use nix::sys::socket::{ControlMessage, sendmsg};

    fn store() -> FdStore {
        FdStore::new().unwrap_or_else(|error| panic!("{error:#}"))
    }

    fn send(store: &FdStore, text: &str, fds: &[RawFd]) {
        let address = store.address().unwrap();
        let address = UnixAddr::new_abstract(address.trim_start_matches('@').as_bytes()).unwrap();
        let socket = UnixDatagram::unbound().unwrap();
        let rights = [ControlMessage::ScmRights(fds)];
        let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        let parts = [IoSlice::new(text.as_bytes())];
        let flags = MsgFlags::empty();
        sendmsg(socket.as_raw_fd(), &parts, control, flags, Some(&address)).unwrap();
    }

    #[test]
    fn descriptors_are_kept_by_name_until_they_are_removed() {
        let mut store = store();
        let file = std::fs::File::open("/dev/null").unwrap();
        let fd = file.as_raw_fd();
        send(&store, "FDSTORE=1\nFDPOLL=0\nFDNAME=a", &[fd]);
        send(&store, "FDSTORE=1\nFDNAME=b", &[fd, fd]);
        send(&store, "FDSTORE=1", &[fd]);
        send(&store, "READY=1", &[]);
        let news = store.drain(Some(Pid::this()));
        assert!(news.ready);
        assert_eq!(store.names(), "a:b:b:stored");
        assert_eq!(store.descriptors().len(), 4);
        send(&store, "FDSTOREREMOVE=1\nFDNAME=b", &[]);
        send(&store, "WATCHDOG=1", &[]);
        assert!(!store.drain(Some(Pid::this())).ready);
        assert_eq!(store.names(), "a:stored");
    }

    #[test]
    fn nobody_but_the_child_is_heeded() {
        let mut store = store();
        let file = std::fs::File::open("/dev/null").unwrap();
        send(&store, "FDSTORE=1\nFDNAME=a\nREADY=1", &[file.as_raw_fd()]);
        assert_eq!(store.drain(Some(Pid::from_raw(1))), News::default());
        send(&store, "FDSTORE=1\nFDNAME=a\nREADY=1", &[file.as_raw_fd()]);
        assert_eq!(store.drain(None), News::default());
        assert_eq!(store.names(), "");
    }

    #[test]
    fn names_that_would_spoil_the_list_and_overlong_messages_are_not_taken() {
        let mut store = store();
        let file = std::fs::File::open("/dev/null").unwrap();
        let fd = [file.as_raw_fd()];
        send(&store, "FDSTORE=1\nFDNAME=a:b", &fd);
        send(
            &store,
            &format!("FDSTORE=1\nFDNAME={}", "x".repeat(256)),
            &fd,
        );
        send(&store, &format!("FDSTORE=1\nX={}", "y".repeat(5000)), &fd);
        store.drain(Some(Pid::this()));
        assert_eq!(store.names(), "stored:stored");
    }
}
