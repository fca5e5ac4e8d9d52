use super::*;
use crate::os::eventfd::EventFd;
use crate::os::mmap::new_memfd;
use nix::sys::socket::{ControlMessageOwned, recvmsg};
use std::io::IoSliceMut;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Stands for the service manager.
struct Fake {
    socket: UnixDatagram,
    store: Arc<FdStore>,
}

impl Fake {
    fn new(name: &str, room: Option<usize>, left: &[(&str, OwnedFd)]) -> Fake {
        let name = format!("ferry-fdstore-{}-{name}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        socket.set_nonblocking(true).unwrap();
        let manager = Manager::new(&format!("@{name}"), room, None).unwrap();
        let received = left
            .iter()
            .map(|(name, fd)| ((*name).to_owned(), fd.try_clone().unwrap()))
            .collect();
        let store = Arc::new(FdStore::new(Some(manager), received));
        Fake { socket, store }
    }

    /// The next message, and the descriptors that came with it.
    fn next(&self) -> Option<(String, Vec<OwnedFd>)> {
        let mut bytes = [0; 4096];
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(
            self.socket.as_raw_fd(),
            &mut parts,
            Some(&mut control),
            flags,
        )
        .ok()?;
        let mut fds = Vec::new();
        for part in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(raw) = part {
                // SAFETY: the kernel has just made them for this process.
                fds.extend(
                    raw.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        let len = message.bytes;
        Some((String::from_utf8(bytes[..len].to_vec()).unwrap(), fds))
    }

    fn texts(&self) -> Vec<String> {
        std::iter::from_fn(|| self.next()).map(|m| m.0).collect()
    }
}

#[test]
fn messages_are_those_of_the_protocol() {
    let fake = Fake::new("protocol", None, &[]);
    let event = EventFd::new().unwrap();
    assert!(fake.store.put("region", &event));
    let (text, fds) = fake.next().unwrap();
    assert_eq!(text, "FDSTORE=1\nFDPOLL=0\nFDNAME=region");
    assert!(same_file(fds[0].as_fd(), event.as_fd()));
    fake.store.remove("region");
    fake.store.ready();
    fake.store.feed_watchdog();
    fake.store.stopping();
    let expected = [
        "FDSTOREREMOVE=1\nFDNAME=region",
        "READY=1",
        "WATCHDOG=1",
        "STOPPING=1",
    ];
    assert_eq!(fake.texts(), expected);
}

#[test]
fn a_file_is_stored_once_and_removed_when_nobody_uses_it_and_the_state_is_written() {
    let fake = Fake::new("once", None, &[]);
    let memory = new_memfd("test", 4096).unwrap();
    let first = fake.store.keep(&memory).unwrap();
    let second = fake.store.keep(memory.try_clone().unwrap()).unwrap();
    assert_eq!(first.number(), second.number());
    // Another open file of the same kind, which only kcmp tells from the first.
    let (a, b) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    let (a, b) = (fake.store.keep(&a).unwrap(), fake.store.keep(&b).unwrap());
    assert_ne!(a.number(), b.number());
    assert_eq!(fake.texts().len(), 3);
    drop(first);
    fake.store.sweep();
    assert_eq!(fake.texts().len(), 0);
    drop(second);
    assert_eq!(fake.texts().len(), 0);
    // In use again before the state was written: it never left.
    let again = fake.store.keep(&memory).unwrap();
    fake.store.sweep();
    assert_eq!(fake.texts().len(), 0);
    let name = name_of(again.number());
    drop(again);
    fake.store.sweep();
    assert_eq!(fake.texts(), [format!("FDSTOREREMOVE=1\nFDNAME={name}")]);
}

#[test]
fn what_a_former_process_left_is_taken_by_name_or_number_and_the_rest_removed() {
    let event = || OwnedFd::from(nix::sys::eventfd::EventFd::new().unwrap());
    let left = [
        ("region", event()),
        ("k7", event()),
        ("k9", event()),
        ("backend/1", event()),
        ("backend/2", event()),
        ("alien", event()),
    ];
    let fake = Fake::new("left", None, &left);
    assert!(fake.store.take("region").is_some());
    assert!(fake.store.take("region").is_none());
    let kept = fake.store.adopt(7).unwrap();
    assert!(same_file(kept.as_fd(), left[1].1.as_fd()));
    // A second state may name it as well.
    assert_eq!(fake.store.adopt(7).unwrap().number(), 7);
    assert!(fake.store.adopt(8).is_none());
    let names: Vec<_> = fake
        .store
        .take_prefix("backend/")
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names, ["backend/1", "backend/2"]);
    fake.store.discard_rest();
    let removed: Vec<_> = ["alien", "k9"]
        .map(|name| format!("FDSTOREREMOVE=1\nFDNAME={name}"))
        .into();
    assert_eq!(fake.texts(), removed);
    // Numbers are never used twice, not even those of discarded descriptors.
    assert_eq!(fake.store.keep(event()).unwrap().number(), 10);
}

#[test]
fn what_a_full_manager_does_not_take_keeps_nobody_waiting_and_arrives_in_order() {
    let fake = Fake::new("full", None, &[]);
    let manager = fake.store.manager.as_ref().unwrap();
    let mut sent = 0;
    while manager.send("X=1", None, false).is_ok() {
        sent += 1;
        assert!(sent < 100_000, "the socket takes anything");
    }
    let began = std::time::Instant::now();
    let kept = fake.store.keep(EventFd::new().unwrap()).unwrap();
    for _ in 0..100 {
        assert!(fake.store.put("a", kept.as_fd()));
        fake.store.remove("a");
    }
    // Each would have waited for so long.
    assert!(began.elapsed().as_secs() < 100 * PATIENCE_SECONDS as u64);
    let store = |name: &str| format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}");
    let mut expected = vec!["X=1".to_owned(); sent];
    expected.push(store(&name_of(kept.number())));
    for _ in 0..100 {
        expected.extend([store("a"), "FDSTOREREMOVE=1\nFDNAME=a".to_owned()]);
    }
    fake.socket.set_nonblocking(false).unwrap();
    let found: Vec<_> = std::iter::from_fn(|| fake.next().map(|m| m.0))
        .take(expected.len())
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn without_a_service_manager_nothing_is_kept() {
    let store = Arc::new(FdStore::default());
    assert!(!store.is_kept());
    assert!(!store.put("x", EventFd::new().unwrap()));
    assert!(store.keep(EventFd::new().unwrap()).is_none());
    store.ready();
    store.sweep();
}
