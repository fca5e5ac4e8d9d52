use std::path::PathBuf;

use ferry_shared::msg::PlugState;
use serde_json::Value;
use tokio::io::AsyncBufReadExt;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::io::BufReader;
use tokio::net::UnixListener;
use tokio::net::UnixStream;

use super::*;

fn function(port: u32) -> Function {
    Function {
        manager: "mlx5_0".into(),
        vuid: "MT1VFSS1D0F0".into(),
        pci_address: "0000:2a:00.0".into(),
        port: Some(port),
        plug: PlugState::PlugInProgress,
        socket: "/run/ferry/pci/MT1VFSS1D0F0.sock".into(),
    }
}

fn place(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("ferry-host-{}-{name}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

fn qmp(socket: &std::path::Path) -> HostLink {
    HostLink::Qmp {
        socket: socket.display().to_string(),
        buses: vec!["port1".into()],
    }
}

/// A QEMU that answers each command with what comes next; gives what it was told.
async fn vmm(listener: UnixListener, answers: &[&str]) -> Vec<Value> {
    let (stream, _) = listener.accept().await.unwrap();
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    writer.write_all(b"{\"QMP\": {}}\r\n").await.unwrap();
    let mut told = Vec::new();
    for answer in ["{\"return\": {}}"].iter().chain(answers) {
        let line = lines.next_line().await.unwrap().unwrap();
        told.push(serde_json::from_str(&line).unwrap());
        writer.write_all(answer.as_bytes()).await.unwrap();
        writer.write_all(b"\r\n").await.unwrap();
    }
    told
}

/// Runs `step` against a QEMU that gives `answers`.
async fn with_qemu<T>(
    name: &str,
    answers: &[&str],
    step: impl AsyncFnOnce(HostLink) -> T,
) -> (T, Vec<Value>) {
    let path = place(name);
    let listener = UnixListener::bind(&path).unwrap();
    let link = qmp(&path);
    let both = tokio::join!(step(link), vmm(listener, answers));
    std::fs::remove_file(&path).unwrap();
    both
}

/// A listener that connections can wait at before anybody runs.
fn bind(path: &std::path::Path) -> std::os::unix::net::UnixListener {
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test)
}

#[test]
fn qemu_is_told_the_socket_and_the_port_of_a_function() {
    let events = "{\"event\": \"RTC_CHANGE\", \"data\": {}}\r\n{\"return\": {}}";
    let plug = async |link| add(&link, &function(0)).await;
    let (outcome, told) = run(with_qemu("add", &[events], plug));
    outcome.unwrap();
    assert_eq!(told[1]["execute"], "device_add");
    assert_eq!(
        told[1]["arguments"],
        json!({
            "driver": "vfio-user-pci",
            "id": "ferry-MT1VFSS1D0F0",
            "bus": "port1",
            "socket": {"type": "unix", "path": "/run/ferry/pci/MT1VFSS1D0F0.sock"},
        })
    );
}

#[test]
fn what_qemu_refuses_is_told_in_its_words() {
    let answer = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"Bus 'port1' not found\"}}";
    let plug = async |link| add(&link, &function(0)).await;
    let (outcome, _) = run(with_qemu("no", &[answer], plug));
    let failure = Failure::from(outcome.unwrap_err());
    assert_eq!(failure.errno, Errno::EIO);
    assert!(
        failure.detail.contains("Bus 'port1' not found"),
        "{}",
        failure.detail
    );
    let error = run(add(&qmp(&place("none")), &function(1))).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("names 1 buses, and the function is on hot-plug port 2")
    );
    let error = run(add(&qmp(&place("none")), &function(0))).unwrap_err();
    assert_eq!(Failure::from(error).errno, Errno::ENOENT);
}

#[test]
fn a_removal_waits_for_the_device_that_was_named() {
    let deleted = "{\"return\": {}}\r\n\
        {\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"other\"}}\r\n\
        {\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"ferry-MT1VFSS1D0F0\"}}";
    let gone = async |link| remove(&link, &function(0), true).await;
    let (outcome, told) = run(with_qemu("del", &[deleted], gone));
    outcome.unwrap();
    assert_eq!(told[1]["execute"], "device_del");
    // A guest that has been asked already is not asked in vain.
    let again = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"Device x is already in the process of unplug\"}}\r\n\
        {\"event\": \"DEVICE_UNPLUG_GUEST_ERROR\", \"data\": {\"device\": \"ferry-MT1VFSS1D0F0\"}}";
    let (outcome, _) = run(with_qemu("again", &[again], gone));
    assert!(
        matches!(outcome, Err(LinkError::GuestRefused { .. })),
        "{outcome:?}"
    );
    let unknown =
        "{\"error\": {\"class\": \"DeviceNotFound\", \"desc\": \"Device 'x' not found\"}}";
    let (outcome, _) = run(with_qemu("unknown", &[unknown], gone));
    assert!(
        matches!(outcome, Err(LinkError::Unknown { .. })),
        "{outcome:?}"
    );
    // The VMM ends.
    let (outcome, _) = run(with_qemu("end", &["{\"return\": {}}"], gone));
    outcome.unwrap();
}

#[test]
fn a_vmm_that_speaks_otherwise_is_told_apart() {
    for words in ["hello\n", "{\"hello\": 1}\n"] {
        let path = place("other");
        let listener = bind(&path);
        let speak = async {
            let listener = UnixListener::from_std(listener).unwrap();
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(words.as_bytes()).await.unwrap();
            stream
        };
        let link = qmp(&path);
        let function = function(0);
        let (outcome, _stream) = run(async { tokio::join!(add(&link, &function), speak) });
        assert!(
            matches!(outcome, Err(LinkError::Protocol { .. })),
            "{outcome:?}"
        );
        std::fs::remove_file(&path).unwrap();
    }
}

async fn answer_http(stream: &mut UnixStream, answer: &str) -> String {
    let mut request = Vec::new();
    while !request.ends_with(b"}") {
        assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0);
    }
    stream.write_all(answer.as_bytes()).await.unwrap();
    String::from_utf8(request).unwrap()
}

#[test]
fn cloud_hypervisor_is_asked_by_its_api() {
    let path = place("ch");
    let listener = bind(&path);
    let link = HostLink::CloudHypervisor {
        socket: path.display().to_string(),
    };
    let function = function(0);
    let serve = async {
        let listener = UnixListener::from_std(listener).unwrap();
        let mut requests = Vec::new();
        for answer in [
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
            "HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n",
            "HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\n\r\nfull",
        ] {
            let (mut stream, _) = listener.accept().await.unwrap();
            requests.push(answer_http(&mut stream, answer).await);
        }
        requests
    };
    let calls = async {
        add(&link, &function).await.unwrap();
        remove(&link, &function, true).await.unwrap();
        add(&link, &function).await.unwrap_err()
    };
    let (error, requests) = run(async { tokio::join!(calls, serve) });
    assert!(error.to_string().contains("status 500 full"), "{error}");
    assert!(requests[0].starts_with("PUT /api/v1/vm.add-user-device HTTP/1.1\r\n"));
    assert!(requests[0].contains("\"socket\":\"/run/ferry/pci/MT1VFSS1D0F0.sock\""));
    assert!(requests[1].starts_with("PUT /api/v1/vm.remove-device HTTP/1.1\r\n"));
    assert!(requests[1].ends_with("{\"id\":\"ferry-MT1VFSS1D0F0\"}"));
    std::fs::remove_file(&path).unwrap();
}
