//! The data plane's side of the handshake: the run directory, its socket and the one control plane that it admits.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
    listen, recv, sendmsg, socket,
};

use super::mapping::{MapError, Mapping};
use super::{Channel, HELLO_BYTES, Hello, Mismatch, Peer, SOCKET_NAME, Verdict};
use crate::region::{COMMANDS, REPLIES, Region, RegionError};
use crate::ring::{Consumer, Producer};

/// Connections that have not introduced themselves; the oldest one goes when another comes.
const MAX_STRANGERS: usize = 8;

/// Why the run directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody else owns it and could replace the sockets.
    #[error(
        "run directory {} is owned by uid {owner}, not by uid {user}; choose another --run-dir or chown it",
        .path.display()
    )]
    ForeignOwner {
        /// The directory.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who runs this process.
        user: u32,
    },
    /// Others can write to it and could replace the sockets.
    #[error(
        "run directory {} can be written by others (mode {mode:04o}); choose another --run-dir or chmod it to 0755",
        .path.display()
    )]
    Writable {
        /// The directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Another data plane works there.
    #[error(
        "another data plane uses run directory {}; stop that one or choose another --run-dir",
        .0.display()
    )]
    InUse(PathBuf),
    /// The name of the socket is taken by something else.
    #[error("{} exists and is not a socket; remove it or choose another --run-dir", .0.display())]
    NotASocket(PathBuf),
    /// The name is too long for a socket address.
    #[error("{} is too long for a socket (107 bytes); choose a shorter --run-dir", .0.display())]
    TooLong(PathBuf),
    /// A system call fails.
    #[error("cannot {what} {}: {error}", .path.display())]
    System {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
}

/// Why a connection was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Its user is not allowed.
    #[error("its user may not control the data plane (see --control-uid)")]
    Denied,
    /// There is a control plane already.
    #[error("another control plane is connected")]
    Busy,
    /// It is another build.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// It does not introduce itself properly.
    #[error("it does not speak the protocol of the control rings")]
    Stranger,
    /// The rings cannot be made.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The rings cannot be made.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The answer cannot be sent.
    #[error("it cannot be answered: {0}")]
    Unreachable(Errno),
}

/// What became of a connection.
pub enum Accepted {
    /// A control plane is connected. It replaces the former one, whose channel is to be dropped.
    Channel(Channel),
    /// Somebody was refused.
    Refused {
        /// Who.
        peer: Peer,
        /// Why.
        why: Refusal,
    },
}

/// The socket of the run directory. Its descriptor is readable when [`Listener::accept`] has something to do.
pub struct Listener {
    path: PathBuf,
    allowed_uid: Option<u32>,
    socket: OwnedFd,
    epoll: Epoll,
    strangers: Vec<(OwnedFd, Peer)>,
    live: Weak<OwnedFd>,
    /// The counters, for every control plane to read.
    counters: Option<OwnedFd>,
    /// The lock on the run directory, held until the socket is removed.
    _lock: Flock<File>,
}

fn system(what: &'static str, path: &Path) -> impl Fn(io::Error) -> BindError {
    move |error| BindError::System {
        what,
        path: path.into(),
        error,
    }
}

/// Creates the run directory if needed, checks it and locks it.
fn open_run_dir(run_dir: &Path) -> Result<Flock<File>, BindError> {
    if !run_dir.exists() {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(run_dir);
        made.map_err(system("create run directory", run_dir))?;
        // Whatever the umask: the control plane has to get in.
        let opened = fs::set_permissions(run_dir, Permissions::from_mode(0o755));
        opened.map_err(system("set the mode of run directory", run_dir))?;
    }
    let flags = libc::O_DIRECTORY | libc::O_CLOEXEC;
    let dir = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(run_dir);
    let dir = dir.map_err(system("open run directory", run_dir))?;
    let facts = dir
        .metadata()
        .map_err(system("examine run directory", run_dir))?;
    let (owner, user) = (facts.uid(), nix::unistd::geteuid().as_raw());
    if owner != user {
        return Err(BindError::ForeignOwner {
            path: run_dir.into(),
            owner,
            user,
        });
    }
    let mode = facts.mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(BindError::Writable {
            path: run_dir.into(),
            mode,
        });
    }
    Flock::lock(dir, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => BindError::InUse(run_dir.into()),
        errno => system("lock run directory", run_dir)(errno.into()),
    })
}

impl Listener {
    /// Prepares the run directory and listens in it. Root, this process's own user and `allowed_uid` may connect.
    pub fn bind(run_dir: &Path, allowed_uid: Option<u32>) -> Result<Listener, BindError> {
        let lock = open_run_dir(run_dir)?;
        let path = run_dir.join(SOCKET_NAME);
        match fs::symlink_metadata(&path) {
            Ok(facts) if !facts.file_type().is_socket() => return Err(BindError::NotASocket(path)),
            Ok(_) | Err(_) => {}
        }
        // Bound under another name and renamed when its mode and owner are right, which also replaces a stale one: the
        // lock says that nobody serves it.
        let fresh = run_dir.join(".dataplane.new");
        let address = UnixAddr::new(&path).and_then(|_| UnixAddr::new(&fresh));
        let address = address.map_err(|_| BindError::TooLong(path.clone()))?;
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(system("remove", &fresh)(error));
            }
            Ok(()) | Err(_) => {}
        }
        let at = |what| {
            move |errno: Errno| BindError::System {
                what,
                path: run_dir.into(),
                error: errno.into(),
            }
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
            .map_err(at("create socket"))?;
        bind(socket.as_raw_fd(), &address).map_err(at("bind socket"))?;
        fs::set_permissions(&fresh, Permissions::from_mode(0o660))
            .map_err(system("set the mode of", &fresh))?;
        if let Some(uid) = allowed_uid.filter(|uid| *uid != nix::unistd::geteuid().as_raw()) {
            std::os::unix::fs::chown(&fresh, Some(uid), None)
                .map_err(system("give to --control-uid", &fresh))?;
        }
        listen(
            &socket,
            Backlog::new(MAX_STRANGERS as i32).map_err(at("listen on socket"))?,
        )
        .map_err(at("listen on socket"))?;
        fs::rename(&fresh, &path).map_err(system("put in place", &path))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(at("watch socket"))?;
        epoll
            .add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, 0))
            .map_err(at("watch socket"))?;
        Ok(Listener {
            path,
            allowed_uid,
            socket,
            epoll,
            strangers: Vec::new(),
            live: Weak::new(),
            counters: None,
            _lock: lock,
        })
    }

    /// Gives every control plane the file of the counters from now on.
    pub fn share_counters(&mut self, file: OwnedFd) {
        self.counters = Some(file);
    }

    /// Path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Deals with the next connection; `None` when there is nothing more to do for now.
    pub fn accept(&mut self) -> io::Result<Option<Accepted>> {
        loop {
            if let Some(accepted) = self.hear_strangers() {
                return Ok(Some(accepted));
            }
            let socket = match accept4(
                self.socket.as_raw_fd(),
                SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            ) {
                Ok(socket) => own(socket),
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let peer = Peer::of(&socket)?;
            if !self.admits(peer.uid) {
                answer(&socket, Verdict::Denied);
                return Ok(Some(Accepted::Refused {
                    peer,
                    why: Refusal::Denied,
                }));
            }
            if self.strangers.len() >= MAX_STRANGERS {
                self.strangers.remove(0);
            }
            self.epoll
                .add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
            self.strangers.push((socket, peer));
        }
    }

    fn admits(&self, uid: u32) -> bool {
        uid == 0 || uid == nix::unistd::geteuid().as_raw() || self.allowed_uid == Some(uid)
    }

    /// Looks for a connection that has introduced itself.
    fn hear_strangers(&mut self) -> Option<Accepted> {
        let mut bytes = [0; HELLO_BYTES + 1];
        let (at, len) =
            self.strangers
                .iter()
                .enumerate()
                .find_map(|(at, (socket, _))| {
                    match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
                        Err(Errno::EAGAIN | Errno::EINTR) => None,
                        Err(_) => Some((at, 0)),
                        Ok(len) => Some((at, len)),
                    }
                })?;
        let (socket, peer) = self.strangers.remove(at);
        // The socket outlives its place among the strangers, so it has to be taken out of the set by hand.
        let judged = self.epoll.delete(&socket).map_err(Refusal::Unreachable);
        let hello = bytes.get(..len).and_then(Hello::from_bytes);
        Some(
            match judged.and_then(|()| self.judge(hello, socket, peer)) {
                Ok(channel) => Accepted::Channel(channel),
                Err(why) => Accepted::Refused { peer, why },
            },
        )
    }

    fn judge(
        &mut self,
        hello: Option<Hello>,
        socket: OwnedFd,
        peer: Peer,
    ) -> Result<Channel, Refusal> {
        let Some(hello) = hello else {
            answer(&socket, Verdict::Mismatch);
            return Err(Refusal::Stranger);
        };
        if let Some(mismatch) = hello.mismatch() {
            answer(&socket, Verdict::Mismatch);
            return Err(mismatch.into());
        }
        if self.live.upgrade().is_some_and(|socket| !hung_up(&socket)) {
            answer(&socket, Verdict::Busy);
            return Err(Refusal::Busy);
        }
        let (mapping, memory) = Mapping::create()?;
        let region = Region::format(Arc::new(mapping))?;
        let channel = Channel {
            producer: Producer::new(region.clone(), REPLIES)?,
            consumer: Consumer::new(region, COMMANDS)?,
            socket: Arc::new(socket),
            peer,
            counters: None,
        };
        let bytes = Hello::ours(Verdict::Welcome).to_bytes();
        let counters = self.counters.as_ref().map(AsRawFd::as_raw_fd);
        let files: Vec<RawFd> = core::iter::once(memory.as_raw_fd())
            .chain(counters)
            .collect();
        let rights = [ControlMessage::ScmRights(&files)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(
            channel.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            &rights,
            flags,
            None,
        )
        .map_err(Refusal::Unreachable)?;
        self.live = Arc::downgrade(&channel.socket);
        Ok(channel)
    }
}

/// Sends a verdict without rings. A peer that does not want it has hung up, which is as good.
fn answer(socket: &OwnedFd, verdict: Verdict) {
    let bytes = Hello::ours(verdict).to_bytes();
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let _ = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        &[],
        flags,
        None,
    );
}

/// Whether the peer of a channel has closed its end, noticed by the owner of the channel or not.
fn hung_up(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok()
        && fds[0]
            .revents()
            .is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
}

#[expect(unsafe_code, reason = "takes ownership of an accepted descriptor")]
fn own(accepted: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for this process; nothing else knows of it.
    unsafe { OwnedFd::from_raw_fd(accepted) }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.0.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // The lock is still held, so this is the own socket. A socket that is left behind is replaced at the next start.
        let _ = fs::remove_file(&self.path);
    }
}
