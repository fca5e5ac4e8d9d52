//! Asks the service whether it is ready: an RPC that needs nothing but a running control plane.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use ferry_shared::handshake::SOCKET_NAME;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket};
use nix::unistd::Pid;

const REQUEST: &[u8] = br#"{"jsonrpc":"2.0","id":1,"method":"spdk_get_version"}"#;
/// Bytes of an answer that is certainly wrong.
const LIMIT: usize = 64 * 1024;

pub(super) struct Probe {
    rpc: PathBuf,
    dataplane: PathBuf,
    link: Option<UnixStream>,
    answer: Vec<u8>,
}

impl Probe {
    pub(super) fn new(rpc: PathBuf, run_dir: PathBuf) -> Probe {
        Probe {
            rpc,
            dataplane: run_dir.join(SOCKET_NAME),
            link: None,
            answer: Vec::new(),
        }
    }

    /// Readable when there may be news.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().map(AsFd::as_fd)
    }

    /// Looks again, without waiting: both sockets exist and `server` answers RPC.
    pub(super) fn is_ready(&mut self, server: Option<Pid>) -> bool {
        let Some(server) = server.filter(|_| self.dataplane.exists()) else {
            return false;
        };
        let ready = self.ask(server);
        if ready.is_err() {
            self.link = None;
        }
        ready.unwrap_or(false)
    }

    fn ask(&mut self, server: Pid) -> io::Result<bool> {
        if self.link.is_none() {
            let mut link = dial(&self.rpc)?;
            // Somebody else may serve the socket, which our control plane is about to find out.
            if getsockopt(&link, PeerCredentials)?.pid() != server.as_raw() {
                return Ok(false);
            }
            link.write_all(REQUEST)?;
            self.answer.clear();
            self.link = Some(link);
        }
        let Some(link) = &mut self.link else {
            return Ok(false);
        };
        let mut bytes = [0; 4096];
        match link.read(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => self.answer.extend_from_slice(&bytes[..len]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
        if self.answer.len() > LIMIT {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(is_answer(&self.answer))
    }
}

/// Whether these bytes are a whole response, whatever it says: a method may be forbidden by `--rpcs-allowed`.
pub(super) fn is_answer(bytes: &[u8]) -> bool {
    let value: Result<serde_json::Value, _> = serde_json::from_slice(bytes);
    value.is_ok_and(|value| value.get("id").is_some_and(|id| id == 1))
}

/// Connects without ever waiting.
pub(super) fn dial(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(UnixStream::from(fd))
}
