use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::string::{String, ToString};
use std::time::Duration;
use std::vec::Vec;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect as connect_socket, socket,
};
use nix::unistd::{Pid, geteuid};

use super::client::{ConnectError, Connecting, connect, connect_within};
use super::server::{Accepted, BindError, Listener, Refusal};
use super::*;
use crate::msg::{Command, Event, ToControlplane, ToDataplane};

/// A directory of its own for each test, removed at the end.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let path = std::env::temp_dir().join(std::format!("ferry-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Dir(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn admitted(listener: &mut Listener) -> Channel {
    match listener.accept().unwrap() {
        Some(Accepted::Channel(channel)) => channel,
        Some(Accepted::Refused { why, .. }) => panic!("refused: {why}"),
        None => panic!("nobody came"),
    }
}

fn refused(listener: &mut Listener) -> Refusal {
    match listener.accept().unwrap() {
        Some(Accepted::Channel(_)) => panic!("admitted"),
        Some(Accepted::Refused { why, .. }) => why,
        None => panic!("nobody came"),
    }
}

fn met(dir: &Path) -> (Listener, Channel, Channel) {
    let mut listener = Listener::bind(dir, None).unwrap();
    let connecting = connect(dir).unwrap();
    assert!(connecting.finish().unwrap().is_none());
    let server = admitted(&mut listener);
    let client = connecting.finish().unwrap().unwrap();
    (listener, server, client)
}

fn error(connecting: &Connecting) -> ConnectError {
    connecting
        .finish()
        .map(|channel| channel.is_some())
        .unwrap_err()
}

/// A connection that says whatever the test wants.
fn stranger(dir: &Path, says: &[u8]) -> OwnedFd {
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    connect_socket(
        fd.as_raw_fd(),
        &UnixAddr::new(&dir.join(SOCKET_NAME)).unwrap(),
    )
    .unwrap();
    send(fd.as_raw_fd(), says, MsgFlags::empty()).unwrap();
    fd
}

fn verdict(fd: &OwnedFd) -> Option<u32> {
    let mut bytes = [0; 64];
    let len = recv(fd.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT).unwrap();
    Hello::from_bytes(&bytes[..len]).map(|hello| hello.verdict)
}

fn readable(channel: &Channel) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    poll(
        &mut [PollFd::new(channel.as_fd(), PollFlags::POLLIN)],
        PollTimeout::ZERO,
    )
    .unwrap()
        == 1
}

#[test]
fn the_two_sides_exchange_messages_and_doorbells() {
    let dir = Dir::new("exchange");
    let (_listener, mut server, mut client) = met(&dir.0);
    assert_eq!(
        client.peer(),
        Peer {
            pid: Pid::this().as_raw(),
            uid: geteuid().as_raw()
        }
    );
    let command = ToDataplane {
        seq: 1,
        command: Command::Snapshot { from: 0 },
    };
    assert!(server.prepare_sleep().unwrap());
    client.send(&command).unwrap();
    client.send(&command).unwrap();
    assert!(readable(&server));
    server.wake().unwrap();
    assert!(!readable(&server));
    assert_eq!(server.recv::<ToDataplane>().unwrap(), Some(command.clone()));
    assert_eq!(server.recv::<ToDataplane>().unwrap(), Some(command));
    assert_eq!(server.recv::<ToDataplane>().unwrap(), None);
    let event = ToControlplane::Event(Event::Mounted {
        device: "fs0".to_string(),
        mounted: true,
    });
    server.send(&event).unwrap();
    assert!(!readable(&client), "an awake side gets no doorbell");
    assert!(!client.prepare_sleep().unwrap());
    assert_eq!(client.recv::<ToControlplane>().unwrap(), Some(event));
}

#[test]
fn a_full_ring_rings_back_when_there_is_room() {
    let dir = Dir::new("full");
    let (_listener, mut server, mut client) = met(&dir.0);
    let name: String = "n".repeat(60_000);
    let command = ToDataplane {
        seq: 1,
        command: Command::DeviceStop { name },
    };
    let sent = (0..100)
        .take_while(|_| client.send(&command).is_ok())
        .count();
    assert_eq!(sent, 4);
    assert!(!readable(&client));
    assert_eq!(server.recv::<ToDataplane>().unwrap(), Some(command.clone()));
    assert!(readable(&client));
    client.wake().unwrap();
    client.send(&command).unwrap();
}

#[test]
fn a_peer_that_leaves_is_noticed() {
    let dir = Dir::new("leaves");
    let (_listener, mut server, client) = met(&dir.0);
    drop(client);
    assert!(readable(&server));
    assert!(matches!(server.wake(), Err(Lost::Gone)));
}

#[test]
fn a_flood_of_doorbells_or_a_long_packet_loses_the_peer() {
    let dir = Dir::new("flood");
    let (_listener, mut server, client) = met(&dir.0);
    while send(client.as_raw_fd(), &[0], MsgFlags::MSG_DONTWAIT).is_ok() {}
    assert!(matches!(server.wake(), Err(Lost::Broken(_))));
    let dir = Dir::new("long");
    let (_listener, mut server, client) = met(&dir.0);
    send(client.as_raw_fd(), &[0; 100], MsgFlags::MSG_DONTWAIT).unwrap();
    assert!(matches!(server.wake(), Err(Lost::Broken(_))));
}

#[test]
fn a_second_control_plane_is_refused_until_the_first_has_left() {
    let dir = Dir::new("busy");
    let (mut listener, server, client) = met(&dir.0);
    let second = connect(&dir.0).unwrap();
    assert_eq!(refused(&mut listener), Refusal::Busy);
    assert!(matches!(error(&second), ConnectError::Busy(_)));
    drop(client);
    // The data plane's end still exists, but nobody is behind it.
    let third = connect(&dir.0).unwrap();
    let replacement = admitted(&mut listener);
    assert!(third.finish().unwrap().is_some());
    drop((server, replacement));
}

#[test]
fn another_version_or_layout_is_refused_on_both_sides() {
    let dir = Dir::new("mismatch");
    let mut listener = Listener::bind(&dir.0, None).unwrap();
    let ours = Hello::ours(Verdict::Welcome);
    for hello in [
        Hello {
            version: 99,
            ..ours
        },
        Hello { layout: 99, ..ours },
    ] {
        let fd = stranger(&dir.0, &hello.to_bytes());
        assert!(matches!(refused(&mut listener), Refusal::Mismatch(_)));
        assert_eq!(verdict(&fd), Some(Verdict::Mismatch as u32));
        let text = hello.mismatch().unwrap().to_string();
        assert!(text.contains("install both from one build"), "{text}");
    }
}

#[test]
fn nonsense_is_refused() {
    let dir = Dir::new("nonsense");
    let mut listener = Listener::bind(&dir.0, None).unwrap();
    let mut long = Hello::ours(Verdict::Welcome).to_bytes().to_vec();
    long.push(0);
    for says in [&b"GET / HTTP/1.1"[..], &long, &long[..20]] {
        let fd = stranger(&dir.0, says);
        assert_eq!(refused(&mut listener), Refusal::Stranger);
        assert_eq!(verdict(&fd), Some(Verdict::Mismatch as u32));
    }
}

#[test]
fn silent_connections_keep_nobody_out() {
    let dir = Dir::new("silent");
    let mut listener = Listener::bind(&dir.0, None).unwrap();
    let silent: Vec<OwnedFd> = (0..20)
        .map(|_| {
            let fd = socket(
                AddressFamily::Unix,
                SockType::SeqPacket,
                SockFlag::SOCK_CLOEXEC,
                None,
            )
            .unwrap();
            connect_socket(
                fd.as_raw_fd(),
                &UnixAddr::new(&dir.0.join(SOCKET_NAME)).unwrap(),
            )
            .unwrap();
            assert!(listener.accept().unwrap().is_none());
            fd
        })
        .collect();
    let connecting = connect(&dir.0).unwrap();
    let _server = admitted(&mut listener);
    assert!(connecting.finish().unwrap().is_some());
    drop(silent);
}

#[test]
fn nobody_listening_is_said_so() {
    let dir = Dir::new("nobody");
    let refusal = connect_within(&dir.0, Duration::ZERO)
        .map(|_| ())
        .unwrap_err();
    assert!(
        matches!(&refusal, ConnectError::NotThere(path) if path.starts_with(&dir.0)),
        "{refusal}"
    );
}

#[test]
fn a_data_plane_that_does_not_answer_times_out() {
    let dir = Dir::new("timeout");
    let _listener = Listener::bind(&dir.0, None).unwrap();
    let refusal = connect_within(&dir.0, Duration::from_millis(1))
        .map(|_| ())
        .unwrap_err();
    assert!(matches!(refusal, ConnectError::Timeout { .. }), "{refusal}");
}

#[test]
fn two_data_planes_cannot_share_a_run_directory() {
    let dir = Dir::new("inuse");
    let first = Listener::bind(&dir.0, None).unwrap();
    assert!(matches!(
        Listener::bind(&dir.0, None),
        Err(BindError::InUse(_))
    ));
    drop(first);
    assert!(!dir.0.join(SOCKET_NAME).exists());
    assert!(Listener::bind(&dir.0, None).is_ok());
}

#[test]
fn a_stale_socket_is_replaced_and_anything_else_is_not() {
    let dir = Dir::new("stale");
    fs::create_dir(&dir.0).unwrap();
    fs::set_permissions(&dir.0, Permissions::from_mode(0o755)).unwrap();
    drop(std::os::unix::net::UnixListener::bind(dir.0.join(SOCKET_NAME)).unwrap());
    let listener = Listener::bind(&dir.0, None).unwrap();
    let facts = fs::metadata(listener.path()).unwrap();
    assert_eq!(facts.mode() & 0o7777, 0o660);
    drop(listener);
    fs::write(dir.0.join(SOCKET_NAME), "mine").unwrap();
    assert!(matches!(
        Listener::bind(&dir.0, None),
        Err(BindError::NotASocket(_))
    ));
    assert_eq!(fs::read(dir.0.join(SOCKET_NAME)).unwrap(), b"mine");
}

#[test]
fn a_run_directory_of_somebody_else_is_refused() {
    let dir = Dir::new("foreign");
    if !geteuid().is_root() {
        assert!(
            std::env::var_os("REQUIRE_ALL").is_none(),
            "this test needs root"
        );
        std::eprintln!("SKIP a run directory of somebody else: needs root");
        return;
    }
    fs::create_dir(&dir.0).unwrap();
    std::os::unix::fs::chown(&dir.0, Some(4242), None).unwrap();
    let refusal = Listener::bind(&dir.0, None).map(|_| ()).unwrap_err();
    let path = dir.0.display();
    let expected = std::format!(
        "run directory {path} is owned by uid 4242, not by uid 0; choose another --run-dir or chown it"
    );
    assert_eq!(refusal.to_string(), expected);
}

#[test]
fn a_run_directory_that_others_can_write_is_refused() {
    let dir = Dir::new("writable");
    fs::create_dir(&dir.0).unwrap();
    fs::set_permissions(&dir.0, Permissions::from_mode(0o1777)).unwrap();
    assert!(matches!(
        Listener::bind(&dir.0, None),
        Err(BindError::Writable { mode: 0o1777, .. })
    ));
}

#[test]
fn a_run_directory_with_a_very_long_name_is_refused() {
    let dir = Dir::new(&"x".repeat(120));
    assert!(matches!(
        Listener::bind(&dir.0, None),
        Err(BindError::TooLong(_))
    ));
}

#[test]
fn only_the_named_user_may_connect() {
    let dir = Dir::new("uid");
    if !geteuid().is_root() {
        assert!(
            std::env::var_os("REQUIRE_ALL").is_none(),
            "this test needs root"
        );
        std::eprintln!("SKIP only the named user may connect: needs root");
        return;
    }
    let mut listener = Listener::bind(&dir.0, Some(4242)).unwrap();
    assert_eq!(fs::metadata(listener.path()).unwrap().uid(), 4242);
    let ok = connect_as(4242, &dir.0).unwrap();
    let _server = admitted(&mut listener);
    assert!(ok.finish().unwrap().is_some());
    assert!(matches!(
        connect_as(4243, &dir.0),
        Err(ConnectError::Denied { uid: 4243, .. })
    ));
    // Even a socket that everybody can open admits only that user.
    fs::set_permissions(listener.path(), Permissions::from_mode(0o666)).unwrap();
    let denied = connect_as(4243, &dir.0).unwrap();
    assert_eq!(refused(&mut listener), Refusal::Denied);
    assert!(matches!(error(&denied), ConnectError::Denied { .. }));
}

/// Connects with another effective user and group id, which only a thread of its own takes.
fn connect_as(uid: i32, dir: &Path) -> Result<Connecting, ConnectError> {
    let dir = dir.to_path_buf();
    std::thread::spawn(move || {
        #[expect(
            unsafe_code,
            reason = "the C library would change the ids of all threads"
        )]
        let call = |number, first: i32, second: i32| {
            // SAFETY: these calls take integers, and setgroups no groups at all; they touch no memory.
            unsafe { libc::syscall(number, first, second, -1) }
        };
        assert_eq!(call(libc::SYS_setgroups, 0, 0), 0);
        assert_eq!(call(libc::SYS_setresgid, -1, uid), 0);
        assert_eq!(call(libc::SYS_setresuid, -1, uid), 0);
        connect(&dir)
    })
    .join()
    .unwrap()
}

#[test]
fn memory_that_could_shrink_is_not_mapped() {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let memory = memfd_create("unsealed", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&memory, crate::region::REGION_BYTES as i64).unwrap();
    assert!(matches!(
        mapping::Mapping::open(&memory),
        Err(MapError::Unsealed(_))
    ));
}

#[test]
fn the_memory_of_the_rings_cannot_be_resized() {
    let (_mapping, memory) = mapping::Mapping::create().unwrap();
    assert_eq!(nix::unistd::ftruncate(&memory, 0), Err(Errno::EPERM));
    assert_eq!(nix::unistd::ftruncate(&memory, 1 << 30), Err(Errno::EPERM));
}

#[test]
fn a_hello_survives_its_bytes_and_nothing_else_is_one() {
    let hello = Hello {
        version: 3,
        verdict: 1,
        layout: 0x0102_0304_0506_0708,
    };
    let bytes = hello.to_bytes();
    assert_eq!(Hello::from_bytes(&bytes), Some(hello));
    assert_eq!(Hello::from_bytes(&bytes[..23]), None);
    assert_eq!(Hello::from_bytes(&[0; 24]), None);
}
