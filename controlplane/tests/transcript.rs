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
use ferry_shared::msg::PoolSpec;
use ferry_shared::msg::Reply;
use ferry_shared::msg::Scheduler;
use ferry_shared::msg::Service;
use ferry_shared::msg::ToControlplane;
use ferry_shared::msg::ToDataplane;
use ferry_shared::msg::Tuning;
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::PollTimeout;
use nix::poll::poll;
use serde_json::Value;

/// A target of today, and one of the release that the guide describes.
const TRANSCRIPTS: [&str; 2] = [
    include_str!("data/spdk-rpc-transcript.jsonl"),
    include_str!("data/spdk-fork-rpc-transcript.jsonl"),
];

/// How this server answers what it answers otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ours {
    /// With an error of this code.
    Refused(i64),
    /// With a result.
    Answered,
}

use Ours::Answered;
use Ours::Refused;

/// What is answered otherwise on purpose: a part of the request or of the record's note, how, and why.
const DIFFERENT: &[(&str, Ours, &str)] = &[
    (
        "\"accel_",
        Refused(-32601),
        "acceleration modules are not part of this service",
    ),
    (
        "\"bdev_",
        Refused(-32601),
        "block devices are not part of this service",
    ),
    (
        "\"iscsi_",
        Refused(-32601),
        "iSCSI is not part of this service",
    ),
    (
        "\"nvmf_",
        Refused(-32601),
        "NVMe over fabrics is not part of this service",
    ),
    (
        "\"sock_",
        Refused(-32601),
        "network sockets are not part of this service",
    ),
    (
        "\"rmem_",
        Refused(-32601),
        "what a restart needs is kept without being asked for",
    ),
    (
        "\"vfu_",
        Refused(-32601),
        "functions are made through the DOCA transport",
    ),
    (
        "\"framework_get_governor",
        Refused(-32601),
        "the service does not change CPU frequencies",
    ),
    (
        "\"name\":\"sock\"",
        Refused(-32602),
        "the subsystems are those of this service",
    ),
    (
        "\"name\":\"vmd\"",
        Refused(-32602),
        "the subsystems are those of this service",
    ),
    (
        "\"name\":\"keyring\"",
        Refused(-32602),
        "the subsystems are those of this service",
    ),
    (
        "\"name\":\"accel\"",
        Refused(-32602),
        "the subsystems are those of this service",
    ),
    (
        "\"name\":\"bdev\"",
        Refused(-32602),
        "the subsystems are those of this service",
    ),
    (
        "\"name\":\"bdev_group\"",
        Refused(-32602),
        "the subsystems are those of this service",
    ),
    (
        "\"name\":\"scsi\"",
        Refused(-32602),
        "the subsystems are those of this service",
    ),
    (
        "\"name\":\"nvmf\"",
        Refused(-32602),
        "the subsystems are those of this service",
    ),
    (
        "\"name\":\"nbd\"",
        Refused(-32602),
        "the subsystems are those of this service",
    ),
    (
        "\"name\":\"iscsi\"",
        Refused(-32602),
        "the subsystems are those of this service",
    ),
    (
        "\"name\":\"vfio_user_target\"",
        Refused(-32602),
        "the subsystems are those of this service",
    ),
    (
        "log_set_level bogus",
        Refused(-32602),
        "an unknown level is -32602 in the release that the guide describes",
    ),
    (
        "log_set_flag unknown flag",
        Refused(-32602),
        "an unknown flag is refused, as today's target does and the guide's does not",
    ),
    (
        "\"fsdev_get_iostat",
        Answered,
        "today's target has no such method, the guide's has",
    ),
    (
        "\"fsdev_get_fsdevs",
        Answered,
        "today's target has no such method, the guide's has",
    ),
    (
        "fsdev_get_fsdevs unknown name",
        Refused(-19),
        "today's target has no such method, the guide's has",
    ),
    (
        "fsdev_set_opts before init",
        Answered,
        "options may be set before the start, when they can still have an effect",
    ),
    (
        "root_path is a file",
        Refused(-32603),
        "a file is refused at once and not at the mount",
    ),
    (
        "notification without id",
        Answered,
        "a request without an id is answered with a null id, as the guide's release does",
    ),
    (
        "id null",
        Answered,
        "a request without an id is answered with a null id, as the guide's release does",
    ),
    ("enable_xattr=true", Answered, "the recorded target crashed"),
    (
        "startup state: framework_get_subsystems",
        Answered,
        "the subsystems may be listed before the start too, when they can be disabled",
    ),
    (
        "fsdev_get_fsdevs unknown key",
        Refused(-32603),
        "today's target has no such method, the guide's has",
    ),
    (
        "batch of",
        Refused(-32600),
        "a batch is refused, as the guide's release does",
    ),
    (
        "batch mixed",
        Refused(-32600),
        "a batch is refused, as the guide's release does",
    ),
    (
        "\"max_write\":65536",
        Answered,
        "the names that other releases have for a parameter are understood too",
    ),
    (
        "fsdev_aio_delete ok (t2)",
        Answered,
        "t2 could be created by the other release's name of a parameter",
    ),
    (
        "fsdev_aio_create max_xfer_size 0",
        Refused(-32603),
        "transfers of less than a page are refused: no driver could read or write",
    ),
    (
        "fsdev_aio_create max_xfer_size 1",
        Refused(-32603),
        "transfers of less than a page are refused: no driver could read or write",
    ),
];

/// Members of results that this service has no use for.
const ABSENT: &[(&str, &str)] = &[
    ("commit", "releases are known by their version"),
    ("small_bufsize", "the sizes of buffers are fixed"),
    ("large_bufsize", "the sizes of buffers are fixed"),
    ("enable_numa", "each core has pools of its own"),
];

/// Whether a value has the recorded form: the same types, and every recorded member.
fn fits(recorded: &Value, ours: &Value, path: &str) -> Result<(), String> {
    let wrong = || Err(format!("{path}: {ours} in the place of {recorded}"));
    match (recorded, ours) {
        (Value::Object(recorded), Value::Object(ours))
            if recorded.contains_key("tpoint_group_mask") =>
        {
            // The groups are named after the components of a program; they have one form.
            let group = |all: &serde_json::Map<String, Value>| {
                all.values().find(|value| value.is_object()).cloned()
            };
            let groups = group(recorded).zip(group(ours));
            let (recorded, ours) = groups.ok_or_else(|| format!("{path} has no groups"))?;
            fits(&recorded, &ours, &format!("{path}.group"))
        }
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
        Command::Tuning => Ok(Reply::Tuning(Tuning {
            pools: PoolSpec {
                slots: 256,
                buffers: 32,
            },
            arena_bytes: 8 << 20,
            hugepages: false,
            scheduler: Scheduler::Static,
            trace_file: "/proc/1/fd/3".to_owned(),
            trace_mask: 0,
            cpu_locks: false,
            context_switches: false,
        })),
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

/// Compares all answers to a request with those of the record.
fn compare_all(note: &str, response: &str, ours: &str) -> Result<(), String> {
    let (recorded, ours) = (answers(response)?, answers(ours)?);
    // The original closes the connection without a word; here the parse error is told first.
    let parse_error = |answer: &Value| answer["error"]["code"] == -32700;
    if note.contains("[server closed connection]") && ours.iter().all(parse_error) {
        return Ok(());
    }
    // It keeps clients waiting for as long as somebody uses the fsdev; here nobody does.
    if note.contains("[no response") && note.contains("fsdev_aio_delete") {
        return Ok(());
    }
    if recorded.len() != ours.len() {
        return Err(format!("{} answers, not {}", ours.len(), recorded.len()));
    }
    let mut both = recorded.iter().zip(&ours);
    both.try_for_each(|(a, b)| compare(a, b))
}

/// Whether the answer is the one that the list of differences tells.
fn is_expected(expected: Ours, ours: &str) -> Result<(), String> {
    let ours = answers(ours)?;
    let fits = match (expected, ours.as_slice()) {
        (Refused(code), [one]) => one["error"]["code"] == code,
        (Answered, [one]) => one.get("result").is_some(),
        (Refused(_) | Answered, _) => false,
    };
    if fits {
        return Ok(());
    }
    Err(format!("{ours:?} in the place of {expected:?}"))
}

#[test]
fn every_recorded_request_gets_an_answer_of_the_recorded_form_or_one_that_is_listed() {
    let dir = std::env::temp_dir().join(format!("ferry-transcript-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir(&dir).unwrap();
    dataplane(&dir.join("run"));
    let mut wrong = Vec::new();
    let mut used = vec![false; DIFFERENT.len()];
    for transcript in TRANSCRIPTS {
        let mut controlplane = Controlplane::start(&dir, true);
        let mut before = String::new();
        for line in transcript.lines() {
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
            let Err(why) = compare_all(&note, &response, &ours) else {
                continue;
            };
            let dense: String = request.split_whitespace().collect();
            // The later one of the list is about less.
            let known =
                |(part, ..): &(&str, Ours, &str)| dense.contains(part) || note.contains(part);
            let outcome = match DIFFERENT.iter().rposition(known) {
                None => Err(why),
                Some(at) => {
                    used[at] = true;
                    is_expected(DIFFERENT[at].1, &ours)
                }
            };
            if let Err(why) = outcome {
                wrong.push(format!("{note}: {request}: {why}"));
            }
        }
    }
    let _ = std::fs::remove_dir_all(&dir);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let stale = DIFFERENT.iter().zip(&used).filter(|(_, used)| !**used);
    let stale: Vec<&str> = stale.map(|((part, ..), _)| *part).collect();
    assert!(stale.is_empty(), "no record differs by {stale:?}");
}
