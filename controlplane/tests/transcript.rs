//! Requests that a target of the original answered, with its answers: this server's have the same shape, or differ for a
//! reason that is written here.

use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command as Process;
use std::process::Stdio;

use ferry_shared::counters::Counters;
use ferry_shared::errno::Errno;
use ferry_shared::handshake::Channel;
use ferry_shared::handshake::server::Accepted;
use ferry_shared::handshake::server::Listener;
use ferry_shared::msg::Command;
use ferry_shared::msg::Failure;
use ferry_shared::msg::FsdevKind;
use ferry_shared::msg::FsdevSpec;
use ferry_shared::msg::Item;
use ferry_shared::msg::Reply;
use ferry_shared::msg::Service;
use ferry_shared::msg::ToControlplane;
use ferry_shared::msg::ToDataplane;
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::PollTimeout;
use nix::poll::poll;
use serde_json::Value;

const TRANSCRIPT: &str = include_str!("data/spdk-rpc-transcript.jsonl");

/// What is answered otherwise on purpose: a part of the request or of the record's note, and why.
const DIFFERENT: &[(&str, &str)] = &[
    (
        "\"accel_",
        "acceleration modules are not part of this service",
    ),
    ("\"bdev_", "block devices are not part of this service"),
    ("\"iscsi_", "iSCSI is not part of this service"),
    ("\"nvmf_", "NVMe over fabrics is not part of this service"),
    ("\"sock_", "network sockets are not part of this service"),
    ("\"vfu_", "functions are made through the DOCA transport"),
    (
        "delete while endpoints use it",
        "there are no such endpoints",
    ),
    ("\"trace_", "there are no trace points"),
    (
        "\"env_dpdk",
        "there is no DPDK; iobuf_get_stats tells of the pools",
    ),
    (
        "\"framework_get_governor",
        "the service does not change CPU frequencies",
    ),
    (
        "\"iobuf_set_options",
        "the pools are sized by --mem-size of the data plane",
    ),
    (
        "\"framework_get_config",
        "the subsystems are those of this service",
    ),
    (
        "\"framework_get_subsystems",
        "the subsystems are those of this service",
    ),
    (
        "log_set_level bogus",
        "an unknown level is -32602 in the release that the guide describes",
    ),
    (
        "\"fsdev_get_iostat",
        "the recorded release has no such method, the guide's has",
    ),
    (
        "\"fsdev_get_fsdevs",
        "the recorded release has no such method, the guide's has",
    ),
    (
        "\"fsdev_set_opts",
        "options may be set before the start too, as the guide's release allows",
    ),
    (
        "root_path is a file",
        "a file is refused at once and not at the mount",
    ),
    (
        "notification without id",
        "a request without an id is answered with a null id",
    ),
    (
        "id null",
        "a request without an id is answered with a null id",
    ),
    ("batch", "a batch is refused with one answer"),
    ("enable_xattr=true", "the recorded target crashed"),
];

/// Members of results that this service has no use for.
const ABSENT: &[(&str, &str)] = &[
    ("commit", "releases are known by their version"),
    ("numa_id", "cores are known by their CPU"),
    ("irq", "the kernel tells the use of a thread"),
    ("sys", "the kernel tells the use of a thread"),
    ("usr", "the kernel tells the use of a thread"),
];

/// Whether a value has the recorded form: the same types, and every recorded member.
fn fits(recorded: &Value, ours: &Value, path: &str) -> Result<(), String> {
    let wrong = || Err(format!("{path}: {ours} in the place of {recorded}"));
    match (recorded, ours) {
        (Value::Object(recorded), Value::Object(ours)) => {
            // Flags are named after the components of a program.
            let names = recorded.values().all(Value::is_boolean);
            for (key, value) in recorded.iter().filter(|_| !names) {
                match ours.get(key) {
                    Some(other) => fits(value, other, &format!("{path}.{key}"))?,
                    None if ABSENT.iter().any(|(absent, _)| absent == key) => {}
                    None => return Err(format!("{path}.{key} is missing")),
                }
            }
            Ok(())
        }
        (Value::Array(recorded), Value::Array(ours)) => match (recorded.first(), ours.first()) {
            (Some(recorded), Some(ours)) => fits(recorded, ours, &format!("{path}[]")),
            _ => Ok(()),
        },
        (Value::Null, Value::Null)
        | (Value::Bool(_), Value::Bool(_))
        | (Value::Number(_), Value::Number(_))
        | (Value::String(_), Value::String(_)) => Ok(()),
        _ => wrong(),
    }
}

fn compare(recorded: &Value, ours: &Value) -> Result<(), String> {
    let code = |answer: &Value| answer["error"]["code"].as_i64();
    match (code(recorded), code(ours)) {
        (None, None) => fits(&recorded["result"], &ours["result"], "result"),
        (one, other) if one == other => Ok(()),
        (one, other) => Err(format!("error {other:?} in the place of {one:?}")),
    }
}

fn answers(text: &str) -> Result<Vec<Value>, String> {
    let stream = serde_json::Deserializer::from_str(text).into_iter();
    stream
        .collect::<Result<_, _>>()
        .map_err(|error| format!("{error}: {text}"))
}

/// A data plane that agrees to everything but directories that do not exist. It ends with its process.
fn dataplane(run_dir: &Path) {
    let mut listener = Listener::bind(run_dir, None).unwrap();
    let (_counters, file) = Counters::create(1).unwrap();
    listener.share_counters(file);
    std::thread::spawn(move || {
        loop {
            if let Some(Accepted::Channel(channel)) = listener.accept().unwrap() {
                serve(channel);
            } else {
                wait(&listener);
            }
        }
    });
}

fn wait(fd: &impl AsFd) {
    let fd = PollFd::new(fd.as_fd(), PollFlags::POLLIN);
    poll(&mut [fd], PollTimeout::NONE).unwrap();
}

fn serve(mut channel: Channel) {
    loop {
        while let Ok(Some(ToDataplane { seq, command })) = channel.recv() {
            let result = answer(command);
            let completion = ToControlplane::Completion { seq, result };
            channel.send(&completion).unwrap();
        }
        if channel.prepare_sleep() == Ok(true) {
            wait(&channel);
            if channel.wake().is_err() {
                return;
            }
        }
    }
}

fn answer(command: Command) -> Result<Reply, Failure> {
    match command {
        Command::Snapshot { .. } => {
            let service = Service {
                version: "0".to_owned(),
                pid: 1,
                cores: vec![0],
                run_dir: "/run/ferry".to_owned(),
            };
            Ok(Reply::Snapshot {
                items: vec![Item::Service(service)],
                next: None,
            })
        }
        Command::FsdevCreate(FsdevSpec {
            kind: FsdevKind::Aio(aio),
            ..
        }) if aio.root_path != "/srv/x" => Err(Failure::new(Errno::ENOENT, aio.root_path)),
        _ => Ok(Reply::Done),
    }
}

/// A control plane, killed with the value.
struct Controlplane(Child, PathBuf);

impl Controlplane {
    fn start(dir: &Path, wait_for_rpc: bool) -> Controlplane {
        let socket = dir.join("rpc.sock");
        let mut process = Process::new(env!("CARGO_BIN_EXE_ferry-controlplane"));
        process
            .arg("-r")
            .arg(&socket)
            .arg("--run-dir")
            .arg(dir.join("run"));
        process.args(wait_for_rpc.then_some("--wait-for-rpc"));
        process
            .env_remove("SPDK_RPC_INIT_CONF_JSON")
            .env_remove("SPDK_RPC_INIT_CONF")
            .env_remove("RUST_LOG");
        let mut child = process.stderr(Stdio::piped()).spawn().unwrap();
        let mut messages = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("serving RPC") {
            line.clear();
            assert!(messages.read_line(&mut line).unwrap() > 0, "it has ended");
        }
        // Read on, so that it is never kept waiting.
        std::thread::spawn(move || std::io::copy(&mut messages, &mut std::io::sink()));
        Controlplane(child, socket)
    }

    fn ask(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(&self.1).unwrap();
        // What is longer than the limit is refused before it has been read.
        let _ = stream.write_all(request.as_bytes());
        let _ = stream.shutdown(Shutdown::Write);
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Controlplane {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn recorded_requests_get_answers_of_the_recorded_form() {
    let dir = std::env::temp_dir().join(format!("ferry-transcript-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir(&dir).unwrap();
    dataplane(&dir.join("run"));
    let mut controlplane = Controlplane::start(&dir, true);
    let (mut before, mut compared) = (String::new(), 0);
    let mut wrong = Vec::new();
    for line in TRANSCRIPT.lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        let text = |name: &str| record[name].as_str().unwrap_or_default().to_owned();
        let (request, response, note) = (text("request"), text("response"), text("note"));
        // A new target was recorded from here on.
        let waits = |note: &str| note.contains("--wait-for-rpc target");
        if waits(&note) != waits(&before) || before.contains("TARGET PROCESS DIED") {
            drop(controlplane);
            controlplane = Controlplane::start(&dir, waits(&note));
        }
        let ours = controlplane.ask(&request);
        before.clone_from(&note);
        let known = |(part, _): &(&str, &str)| request.contains(part) || note.contains(part);
        if DIFFERENT.iter().any(known) {
            continue;
        }
        compared += 1;
        let outcome = answers(&response).and_then(|recorded| {
            let ours = answers(&ours)?;
            // The original closes the connection without a word; here the parse error is told first.
            let parse_error = |answer: &Value| answer["error"]["code"] == -32700;
            if note.contains("[server closed connection]") && ours.iter().all(parse_error) {
                return Ok(());
            }
            if recorded.len() != ours.len() {
                return Err(format!("{} answers, not {}", ours.len(), recorded.len()));
            }
            recorded
                .iter()
                .zip(&ours)
                .try_for_each(|(a, b)| compare(a, b))
        });
        if let Err(why) = outcome {
            wrong.push(format!("{note}: {why}"));
        }
    }
    drop(controlplane);
    let _ = std::fs::remove_dir_all(&dir);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(compared > 70, "only {compared} were compared");
}
