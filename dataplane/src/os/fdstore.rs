//! The service manager's store of descriptors: what must outlive this process is kept there and comes back at the start.
//!
//! Speaks the notification protocol of systemd (`sd_notify(3)`, `sd_listen_fds(3)`), which `ferry up` implements too.
//! Without `NOTIFY_SOCKET` nothing is sent and nothing is kept. Storing never waits and never fails for the caller: what the
//! manager does not take at once goes to a thread that waits ([`late`]), what cannot be stored is told to the operator and
//! tried again by [`FdStore::sweep`].
// UNSAFETY: takes over the descriptors that the service manager passes by their numbers, and asks kcmp(2).
#![expect(unsafe_code, reason = "descriptors arrive as numbers")]

mod late;

use std::collections::BTreeMap;
use std::env;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, setsockopt,
    socket, sockopt,
};
use nix::sys::stat::fstat;
use nix::sys::time::{TimeVal, TimeValLike};

use late::Late;

/// The first descriptor that a service manager passes.
const FIRST: RawFd = 3;
/// What the names of numbered descriptors begin with.
const NUMBERED: &str = "k";
/// How long a message waits for a service manager that does not read.
const PATIENCE_SECONDS: i64 = 1;

/// The descriptors are taken over once in the life of a process.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// The way to the service manager.
#[derive(Debug)]
struct Manager {
    socket: OwnedFd,
    address: UnixAddr,
    /// The last message could not be sent.
    stuck: AtomicBool,
    /// Descriptors that the manager has room for, where it says so.
    room: Option<usize>,
    /// How often it is to be fed, where it watches.
    watchdog: Option<Duration>,
}

/// The store, and the descriptors that have come from it and have not been taken yet.
#[derive(Debug, Default)]
pub struct FdStore {
    manager: Option<Arc<Manager>>,
    late: Arc<Late>,
    received: Mutex<BTreeMap<String, OwnedFd>>,
    numbers: Mutex<Numbers>,
    /// Descriptors that the manager holds.
    held: AtomicUsize,
}

/// Descriptors that are stored under numbers.
#[derive(Debug, Default)]
struct Numbers {
    last: u64,
    live: BTreeMap<u64, Weak<Token>>,
    /// No longer in use, but a state that names them may still be the one in force.
    condemned: Vec<(u64, Arc<OwnedFd>)>,
    /// The manager has not got these.
    unsent: Vec<u64>,
}

#[derive(Debug)]
struct Token {
    number: u64,
    fd: Arc<OwnedFd>,
    store: Weak<FdStore>,
}

impl Drop for Token {
    fn drop(&mut self) {
        if let Some(store) = self.store.upgrade() {
            let mut numbers = lock(&store.numbers);
            numbers.live.remove(&self.number);
            numbers.condemned.push((self.number, Arc::clone(&self.fd)));
        }
    }
}

/// A descriptor that the service manager holds too, under a number by which a later process finds it. When the last clone
/// is dropped, the next [`FdStore::sweep`] removes it there.
#[derive(Clone, Debug)]
pub struct Kept(Arc<Token>);

impl Kept {
    /// The number.
    pub fn number(&self) -> u64 {
        self.0.number
    }
}

impl AsFd for Kept {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn name_of(number: u64) -> String {
    format!("{NUMBERED}{number}")
}

fn number_of(name: &str) -> Option<u64> {
    name.strip_prefix(NUMBERED)?.parse().ok()
}

impl Manager {
    fn new(
        address: &str,
        room: Option<usize>,
        watchdog: Option<Duration>,
    ) -> Result<Manager, Errno> {
        let address = match address.strip_prefix('@') {
            Some(name) => UnixAddr::new_abstract(name.as_bytes())?,
            None => UnixAddr::new(address)?,
        };
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
        setsockopt(
            &socket,
            sockopt::SendTimeout,
            &TimeVal::seconds(PATIENCE_SECONDS),
        )?;
        Ok(Manager {
            socket,
            address,
            stuck: AtomicBool::new(false),
            room,
            watchdog,
        })
    }

    /// Sends a message, and waits for the manager if the caller may.
    fn send(&self, message: &str, fd: Option<BorrowedFd<'_>>, waits: bool) -> Result<(), Errno> {
        let fds: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        let parts = [IoSlice::new(message.as_bytes())];
        let mut flags = MsgFlags::MSG_NOSIGNAL;
        flags.set(MsgFlags::MSG_DONTWAIT, !waits);
        loop {
            let address = Some(&self.address);
            match sendmsg(self.socket.as_raw_fd(), &parts, control, flags, address) {
                Ok(_) => {
                    self.stuck.store(false, Ordering::Relaxed);
                    return Ok(());
                }
                Err(Errno::EINTR) => {}
                // Somebody else will wait.
                Err(error) if !waits => return Err(error),
                Err(error) => {
                    let before = self.stuck.swap(true, Ordering::Relaxed);
                    if !before {
                        tracing::warn!(
                            %error,
                            "the service manager takes no messages: a crash now may lose connections"
                        );
                    }
                    return Err(error);
                }
            }
        }
    }
}

impl FdStore {
    /// The store of this process: what the environment says. Called once, at the start, when nothing else can have taken
    /// the descriptors that the service manager passes.
    pub fn from_env() -> Arc<FdStore> {
        let number = |name: &str| env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
        let own = u64::from(std::process::id());
        let watched = number("WATCHDOG_PID").is_none_or(|pid| pid == own);
        let watchdog = number("WATCHDOG_USEC").filter(|&usec| watched && usec > 0);
        let room = number("FDSTORE").and_then(|n| usize::try_from(n).ok());
        let manager = env::var("NOTIFY_SOCKET").ok().and_then(|address| {
            Manager::new(&address, room, watchdog.map(Duration::from_micros))
                .inspect_err(|error| {
                    tracing::warn!(address, %error, "NOTIFY_SOCKET cannot be used: a crash loses all connections");
                })
                .ok()
        });
        let count = number("LISTEN_FDS").filter(|_| number("LISTEN_PID") == Some(own));
        let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
        let received = match count.map(i32::try_from) {
            Some(Ok(count)) if !TAKEN.swap(true, Ordering::Relaxed) => receive(count, &names),
            _ => BTreeMap::new(),
        };
        Arc::new(FdStore::new(manager, received))
    }

    fn new(manager: Option<Manager>, received: BTreeMap<String, OwnedFd>) -> FdStore {
        let last = received.keys().filter_map(|name| number_of(name)).max();
        let late = Arc::new(Late::default());
        let manager = manager.map(Arc::new);
        if let Some(manager) = &manager {
            late.start(manager);
        }
        FdStore {
            manager,
            late,
            held: AtomicUsize::new(received.len()),
            received: Mutex::new(received),
            numbers: Mutex::new(Numbers {
                last: last.unwrap_or(0),
                ..Numbers::default()
            }),
        }
    }

    /// Whether there is a service manager that keeps descriptors.
    pub fn is_kept(&self) -> bool {
        self.manager.is_some()
    }

    /// How often the service manager wants to hear from this process, if it watches it.
    pub fn watchdog(&self) -> Option<Duration> {
        self.manager.as_ref()?.watchdog
    }

    // ---- by name ----

    /// Takes a descriptor that a former process has left. It stays in the store until [`FdStore::remove`].
    pub fn take(&self, name: &str) -> Option<OwnedFd> {
        lock(&self.received).remove(name)
    }

    /// Takes all descriptors whose names begin so.
    pub fn take_prefix(&self, prefix: &str) -> Vec<(String, OwnedFd)> {
        let mut received = lock(&self.received);
        let all = std::mem::take(&mut *received);
        let (wanted, rest) = all
            .into_iter()
            .partition(|(name, _)| name.starts_with(prefix));
        *received = rest;
        let wanted: BTreeMap<String, OwnedFd> = wanted;
        wanted.into_iter().collect()
    }

    /// Says something to the manager: at once if that is possible, otherwise a thread says it that waits. The cores store
    /// what guests unlink and lock, and must not wait for anybody. Whether it will be said.
    fn say(&self, message: String, fd: Option<BorrowedFd<'_>>) -> bool {
        let Some(manager) = &self.manager else {
            return false;
        };
        if self.late.is_empty() {
            match manager.send(&message, fd, false) {
                Err(Errno::EAGAIN) => {}
                done => return done.is_ok(),
            }
        }
        let Ok(fd) = fd.map(|fd| fd.try_clone_to_owned()).transpose() else {
            return false;
        };
        self.late.add((message, fd));
        true
    }

    /// Stores a descriptor, without waiting; false if the service manager will not get it.
    pub fn put(&self, name: &str, fd: impl AsFd) -> bool {
        let Some(manager) = &self.manager else {
            return false;
        };
        let held = self.held.fetch_add(1, Ordering::Relaxed);
        if manager.room == Some(held) {
            tracing::warn!(
                room = held,
                "the service manager has no room for more descriptors: a crash now loses connections; raise FileDescriptorStoreMax"
            );
        }
        // Not polled by the manager: a peer that hangs up is for the next process to see.
        let message = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}");
        self.say(message, Some(fd.as_fd()))
    }

    /// Removes what is stored under a name, without waiting.
    pub fn remove(&self, name: &str) {
        if self.manager.is_some() {
            self.held.fetch_sub(1, Ordering::Relaxed);
            self.say(format!("FDSTOREREMOVE=1\nFDNAME={name}"), None);
        }
    }

    // ---- by number ----

    /// Stores a descriptor under a number of its own; `None` without a service manager. A file that is stored already
    /// keeps its number, because systemd keeps an open file only once.
    pub fn keep(self: &Arc<Self>, fd: impl AsFd) -> Option<Kept> {
        self.manager.as_ref()?;
        if let Some(known) = self.find(fd.as_fd()) {
            return Some(known);
        }
        let fd = fd.as_fd().try_clone_to_owned();
        let fd = fd
            .inspect_err(|error| tracing::warn!(%error, "cannot keep a descriptor"))
            .ok()?;
        let number = {
            let mut numbers = lock(&self.numbers);
            numbers.last += 1;
            numbers.last
        };
        let sent = self.put(&name_of(number), &fd);
        let kept = self.enter(number, Arc::new(fd));
        if !sent {
            lock(&self.numbers).unsent.push(number);
        }
        Some(kept)
    }

    /// Takes back the descriptor that a former process has kept under this number.
    pub fn adopt(self: &Arc<Self>, number: u64) -> Option<Kept> {
        let live = lock(&self.numbers)
            .live
            .get(&number)
            .and_then(Weak::upgrade);
        if let Some(token) = live {
            return Some(Kept(token));
        }
        let fd = self.take(&name_of(number))?;
        Some(self.enter(number, Arc::new(fd)))
    }

    fn enter(self: &Arc<Self>, number: u64, fd: Arc<OwnedFd>) -> Kept {
        let token = Arc::new(Token {
            number,
            fd,
            store: Arc::downgrade(self),
        });
        lock(&self.numbers)
            .live
            .insert(number, Arc::downgrade(&token));
        Kept(token)
    }

    fn find(self: &Arc<Self>, fd: BorrowedFd<'_>) -> Option<Kept> {
        let wanted = identity(fd)?;
        let same = |known: BorrowedFd<'_>| identity(known) == Some(wanted) && same_file(known, fd);
        let live: Vec<_> = lock(&self.numbers)
            .live
            .values()
            .filter_map(Weak::upgrade)
            .collect();
        if let Some(token) = live.into_iter().find(|t| same(t.fd.as_fd())) {
            return Some(Kept(token));
        }
        let (number, fd) = {
            let condemned = &mut lock(&self.numbers).condemned;
            let at = condemned.iter().position(|(_, fd)| same(fd.as_fd()))?;
            condemned.swap_remove(at)
        };
        Some(self.enter(number, fd))
    }

    /// Removes what is not in use any more, and tries again to store what could not be. To be called when the state that
    /// names the descriptors has been written.
    pub fn sweep(&self) {
        let (condemned, unsent) = {
            let mut numbers = lock(&self.numbers);
            if numbers.condemned.is_empty() && numbers.unsent.is_empty() {
                return;
            }
            let condemned = std::mem::take(&mut numbers.condemned);
            (condemned, std::mem::take(&mut numbers.unsent))
        };
        for (number, _) in condemned.iter().filter(|(n, _)| !unsent.contains(n)) {
            self.remove(&name_of(*number));
        }
        for number in unsent {
            let token = lock(&self.numbers)
                .live
                .get(&number)
                .and_then(Weak::upgrade);
            if let Some(token) = token
                && !self.put(&name_of(number), &*token.fd)
            {
                lock(&self.numbers).unsent.push(number);
            }
        }
    }

    /// Removes what a former process has left and nobody has taken.
    pub fn discard_rest(&self) {
        let rest = std::mem::take(&mut *lock(&self.received));
        for name in rest.keys() {
            self.remove(name);
        }
    }

    // ---- state of the service ----

    fn notify(&self, message: &str) {
        if let Some(manager) = &self.manager {
            let _ = manager.send(message, None, true);
        }
    }

    /// The service is ready.
    pub fn ready(&self) {
        self.notify("READY=1");
    }

    /// The service is about to end.
    pub fn stopping(&self) {
        self.notify("STOPPING=1");
    }

    /// The service is alive.
    pub fn feed_watchdog(&self) {
        self.notify("WATCHDOG=1");
    }
}

/// Takes over `count` descriptors.
fn receive(count: i32, names: &str) -> BTreeMap<String, OwnedFd> {
    let mut names = names.split(':');
    let mut received = BTreeMap::new();
    for raw in (FIRST..).take(usize::try_from(count).unwrap_or(0)) {
        let name = names.next().unwrap_or("unknown");
        // SAFETY: borrowed for the one call that finds out whether it is open.
        let open = fcntl(
            unsafe { BorrowedFd::borrow_raw(raw) },
            FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC),
        );
        if let Err(error) = open {
            tracing::warn!(fd = raw, name, %error, "the service manager passes a descriptor that is not open");
            break;
        }
        // SAFETY: it is open, and `TAKEN` and the contract of `from_env` say that nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        if received.insert(name.to_owned(), fd).is_some() {
            tracing::warn!(
                name,
                "the service manager passes two descriptors of this name; the last one is used"
            );
        }
    }
    received
}

/// Device and inode.
fn identity(fd: BorrowedFd<'_>) -> Option<(u64, u64)> {
    let stat = fstat(fd).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// Whether both are the same open file; where the kernel does not tell, they are not.
fn same_file(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    const KCMP_FILE: i32 = 0;
    let pid = std::process::id();
    // SAFETY: compares two descriptors of this process, and touches no memory.
    let order = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            pid,
            pid,
            KCMP_FILE,
            a.as_raw_fd(),
            b.as_raw_fd(),
        )
    };
    order == 0
}

#[cfg(test)]
mod tests;
