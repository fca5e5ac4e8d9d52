//! The RPC socket: one owner, at most 64 connections, requests answered in the order they came.
//!
//! The file `<path>.lock` is held locked as long as the socket is served, so that a socket left behind by a dead process
//! can be told from one in use. A connection that does not read its answers is not read from either.

use core::time::Duration;
use std::fs::File;
use std::fs::OpenOptions;
use std::fs::Permissions;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener as StdListener;
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use ferry_shared::errno::Errno as FailureCode;
use ferry_shared::msg::Failure;
use nix::errno::Errno;
use nix::fcntl::Flock;
use nix::fcntl::FlockArg;
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::PollTimeout;
use nix::poll::poll;
use nix::sys::stat::Mode;
use nix::sys::stat::umask;
use nix::unistd::Gid;
use nix::unistd::Uid;
use nix::unistd::chown;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::Mutex;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::access;
use crate::access::Grant;
use crate::access::Peer;
use crate::access::Rule;
use crate::app::App;
use crate::framing;
use crate::framing::Framer;
use crate::framing::Request;
use crate::rpc::RpcError;
use crate::rpc::table::Handler;

/// Connections at a time; further ones wait.
pub const MAX_CONNECTIONS: usize = 64;
/// Requests of one connection that may wait for other requests at a time.
const MAX_DETACHED: usize = 16;

/// Time between two looks whether a client that writes no more is still there.
const LOOK: Duration = Duration::from_millis(250);

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody else holds the lock.
    #[error("RPC socket {} is in use by another process, which holds {} locked; stop that process or choose another \
             socket with -r", .0.display(), .1.display())]
    Locked(PathBuf, PathBuf),
    /// Somebody answers there without holding the lock.
    #[error("RPC socket {} is in use by another program; stop it or choose another socket with -r", .0.display())]
    InUse(PathBuf),
    /// The path is something else.
    #[error("RPC socket path {} exists and is not a socket; choose another one with -r", .0.display())]
    NotASocket(PathBuf),
    /// The socket cannot be given to its group.
    #[error("cannot give RPC socket {} to group {group}: {error}; make the user of the control plane a member of that \
             group, or choose another one with --socket-group", .path.display())]
    Group {
        /// The socket.
        path: PathBuf,
        /// The group.
        group: Gid,
        /// The answer of the operating system.
        error: io::Error,
    },
    /// The operating system refuses.
    #[error("cannot {what} {}: {error}; choose another socket with -r or change the directory's owner or mode", .path.display())]
    Os {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Its answer.
        error: io::Error,
    },
}

/// A bound RPC socket; dropping it removes the socket and its lock file.
#[derive(Debug)]
pub struct Endpoint {
    listener: StdListener,
    path: PathBuf,
    lock_path: PathBuf,
    _lock: Flock<File>,
}

impl Endpoint {
    /// Takes the lock, removes a stale socket and listens. The socket gets `mode`, and `group` if one is given.
    pub fn bind(path: &Path, mode: u32, group: Option<Gid>) -> Result<Endpoint, BindError> {
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);
        let lock = take_lock(path, &lock_path)?;
        remove_stale(path)?;
        // The socket has its mode from the beginning, not a moment later; with another group, the group's part follows.
        let first = if group.is_some() { mode & 0o700 } else { mode };
        let old = umask(Mode::from_bits_truncate(!first & 0o777));
        let bound = StdListener::bind(path);
        umask(old);
        if let Some(group) = group {
            give_to(path, group, mode)?;
        }
        let listener = bound
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(|error| BindError::Os {
                what: "listen on RPC socket",
                path: path.to_owned(),
                error,
            })?;
        Ok(Endpoint {
            listener,
            path: path.to_owned(),
            lock_path,
            _lock: lock,
        })
    }

    /// Serves connections, to each what the rules grant to its peer; never returns unless the listener breaks.
    pub async fn serve(&self, app: Rc<App>, rules: &[Rule]) -> io::Result<()> {
        let listener = UnixListener::from_std(self.listener.try_clone()?)?;
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut retry = tokio::time::interval(Duration::from_millis(100));
        loop {
            // The semaphore is never closed.
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                return Ok(());
            };
            match listener.accept().await {
                Ok((stream, _)) => match welcome(&stream, rules) {
                    Ok(client) => {
                        let client = Rc::new(client);
                        let serving = serve_connection(Rc::clone(&app), client, stream, slot);
                        tokio::task::spawn_local(serving);
                    }
                    Err(error) => {
                        tracing::warn!(%error, "an RPC client whose credentials are not known is sent away");
                    }
                },
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an RPC connection");
                    retry.reset();
                    retry.tick().await;
                }
            }
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        for path in [&self.path, &self.lock_path] {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove");
            }
        }
    }
}

/// Gives the socket to a group, and then the mode that lets the group in.
fn give_to(path: &Path, group: Gid, mode: u32) -> Result<(), BindError> {
    let failed = |error: io::Error| {
        // A socket that the wrong clients reach is worse than none.
        let _ = std::fs::remove_file(path);
        BindError::Group {
            path: path.to_owned(),
            group,
            error,
        }
    };
    chown(path, None, Some(group)).map_err(|errno| failed(errno.into()))?;
    std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed)
}

fn take_lock(path: &Path, lock_path: &Path) -> Result<Flock<File>, BindError> {
    let os = |what, error| BindError::Os {
        what,
        path: lock_path.to_owned(),
        error,
    };
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits())
        .open(lock_path)
        .map_err(|error| os("open lock file", error))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => BindError::Locked(path.to_owned(), lock_path.to_owned()),
        errno => os("lock", errno.into()),
    })
}

fn remove_stale(path: &Path) -> Result<(), BindError> {
    let os = |what, error| BindError::Os {
        what,
        path: path.to_owned(),
        error,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(os("examine RPC socket", error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    if StdStream::connect(path).is_ok() {
        return Err(BindError::InUse(path.to_owned()));
    }
    std::fs::remove_file(path).map_err(|error| os("remove stale RPC socket", error))
}

type Writer = Rc<Mutex<OwnedWriteHalf>>;

/// Who is at the other end of a connection, and what it may call.
struct Client {
    peer: Peer,
    grant: Grant,
}

fn welcome(stream: &UnixStream, rules: &[Rule]) -> io::Result<Client> {
    let credentials = stream.peer_cred()?;
    let peer = Peer {
        pid: credentials.pid(),
        uid: Uid::from_raw(credentials.uid()),
        gid: Gid::from_raw(credentials.gid()),
    };
    let grant = access::grant(rules, &peer);
    tracing::info!(pid = peer.pid, uid = %peer.uid, gid = %peer.gid, "RPC client");
    Ok(Client { peer, grant })
}

async fn serve_connection(
    app: Rc<App>,
    client: Rc<Client>,
    stream: UnixStream,
    slot: OwnedSemaphorePermit,
) {
    if let Err(error) = converse(app, client, stream).await {
        tracing::debug!(%error, "RPC connection has ended");
    }
    drop(slot);
}

async fn converse(app: Rc<App>, client: Rc<Client>, stream: UnixStream) -> io::Result<()> {
    let (mut reader, writer) = stream.into_split();
    let writer: Writer = Rc::new(Mutex::new(writer));
    let mut framer = Framer::default();
    let mut detached = JoinSet::new();
    let mut buffer = [0; 4096];
    loop {
        let count = reader.read(&mut buffer).await?;
        if count == 0 {
            return answer_out(&reader, &mut detached).await;
        }
        framer.push(buffer.get(..count).unwrap_or_default());
        while let Some(next) = framer.next_request() {
            match next {
                Ok(request) if is_detached(&app, &request) => {
                    if detached.len() >= MAX_DETACHED {
                        detached.join_next().await;
                    }
                    let answering = answer(
                        Rc::clone(&app),
                        Rc::clone(&client),
                        Rc::clone(&writer),
                        request,
                    );
                    detached.spawn_local(answering);
                }
                Ok(request) => {
                    let (app, client) = (Rc::clone(&app), Rc::clone(&client));
                    answer(app, client, Rc::clone(&writer), request).await?;
                }
                Err(rejection) => {
                    let fatal = rejection.fatal;
                    tracing::debug!(error = rejection.error.message, "malformed RPC request");
                    writer
                        .lock()
                        .await
                        .write_all(&framing::response(&rejection.id, &Err(rejection.error)))
                        .await?;
                    if fatal {
                        return Ok(());
                    }
                }
            }
        }
    }
}

/// A client that writes no more may still read: it gets the answers that are under way, unless it goes altogether.
async fn answer_out(
    reader: &OwnedReadHalf,
    detached: &mut JoinSet<io::Result<()>>,
) -> io::Result<()> {
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            joined = detached.join_next() => if joined.is_none() {
                return Ok(());
            },
            _ = look.tick() => {
                let stream: &UnixStream = reader.as_ref();
                let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
                poll(&mut fds, PollTimeout::ZERO)?;
                let events = fds.iter().filter_map(PollFd::revents);
                if events.into_iter().any(|events| events.contains(PollFlags::POLLHUP)) {
                    return Ok(());
                }
            }
        }
    }
}

fn is_detached(app: &App, request: &Request) -> bool {
    app.find(&request.method)
        .is_ok_and(|method| matches!(method.handler, Handler::Detached(_)))
}

/// Refuses a method that exists and is not granted to this client.
fn check_grant(app: &App, client: &Client, name: &str) -> Result<(), RpcError> {
    match app.find(name) {
        Ok(method) if !client.grant.includes(method.name) => {
            let Client { peer, .. } = client;
            let detail = format!(
                "{peer} may not call {name}; the rules of --allow name no group of that user with this method"
            );
            Err(Failure::new(FailureCode::EACCES, detail).into())
        }
        Ok(_) | Err(_) => Ok(()),
    }
}

async fn answer(
    app: Rc<App>,
    client: Rc<Client>,
    writer: Writer,
    request: Request,
) -> io::Result<()> {
    let outcome = match check_grant(&app, &client, &request.method) {
        Ok(()) => app.call(&request.method, &request.params).await,
        Err(refusal) => Err(refusal),
    };
    match &outcome {
        Ok(_) => tracing::debug!(method = request.method, "done"),
        Err(error) => tracing::info!(
            method = request.method,
            code = error.code,
            error = error.message,
            "refused"
        ),
    }
    let response = framing::response(&request.id, &outcome);
    writer.lock().await.write_all(&response).await
}

#[cfg(test)]
mod tests;
