//! Requests that a target of the original answered, with its answers: this server's have the same shape, or differ for a
//! reason that is written here.

use core::iter::repeat;
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

/// What comes of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    /// A result.
    Answered,
    /// An error of this code.
    Refused(i64),
    /// No answer.
    Silent,
    /// An array of answers.
    Batch,
    /// More than one answer.
    Several,
    /// Something that is no JSON.
    Broken,
}

use Outcome::Answered;
use Outcome::Batch;
use Outcome::Broken;
use Outcome::Refused;
use Outcome::Silent;

/// What is answered otherwise on purpose.
struct Difference {
    /// The method, or nothing where the request has none that can be read.
    method: &'static str,
    /// A part of the request without its blanks, or of the record's note: which requests of the method; all if empty.
    of: &'static str,
    theirs: Outcome,
    ours: Outcome,
    why: &'static str,
}

const fn differs(
    method: &'static str,
    of: &'static str,
    (theirs, ours): (Outcome, Outcome),
    why: &'static str,
) -> Difference {
    Difference {
        method,
        of,
        theirs,
        ours,
        why,
    }
}

/// A method of which a target of the original knows that there is none here.
const fn absent(method: &'static str, why: &'static str) -> Difference {
    differs(method, "", (Answered, Refused(-32601)), why)
}

/// A subsystem of which a target of the original knows that there is none here.
const fn no_subsystem(of: &'static str) -> Difference {
    let why = "the subsystems are those of this service";
    differs("framework_get_config", of, (Answered, Refused(-32602)), why)
}

const ACCEL: &str = "acceleration modules are not part of this service";
const BDEV: &str = "block devices are not part of this service";
const ISCSI: &str = "iSCSI is not part of this service";
const NVMF: &str = "NVMe over fabrics is not part of this service";
const SOCK: &str = "network sockets are not part of this service";
const VFU: &str = "functions are made through the DOCA transport";
const LATER: &str = "today's target has no such method, the guide's has";
const LISTED: &str = "the subsystems may be listed before the start too, when they can be disabled";
const NULL_ID: &str =
    "a request without an id is answered with a null id, as the guide's release does";
const NO_BATCH: &str = "a batch is refused, as the guide's release does";
const NAMES: &str = "the names that other releases have for a parameter are understood too";
const SMALL: &str = "transfers of less than a page are refused: no driver could read or write";

const DIFFERENT: &[Difference] = &[
    absent("accel_get_stats", ACCEL),
    absent("accel_set_options", ACCEL),
    absent("bdev_nvme_set_hotplug", BDEV),
    absent("bdev_nvme_set_options", BDEV),
    absent("bdev_raid_set_options", BDEV),
    absent("bdev_set_options", BDEV),
    absent("bdev_wait_for_examine", BDEV),
    absent("iscsi_set_options", ISCSI),
    absent("nvmf_set_config", NVMF),
    absent("nvmf_set_crdt", NVMF),
    absent("nvmf_set_max_subsystems", NVMF),
    absent("sock_impl_set_options", SOCK),
    absent("sock_set_default_impl", SOCK),
    absent(
        "framework_get_governor",
        "the service does not change CPU frequencies",
    ),
    absent(
        "rmem_get_config",
        "what a restart needs is kept without being asked for",
    ),
    absent("vfu_tgt_set_base_path", VFU),
    absent("vfu_virtio_create_fs_endpoint", VFU),
    absent("vfu_virtio_delete_endpoint", VFU),
    differs(
        "vfu_tgt_set_base_path",
        "missing params",
        (Refused(-32602), Refused(-32601)),
        VFU,
    ),
    differs(
        "vfu_virtio_create_fs_endpoint",
        "",
        (Refused(-32602), Refused(-32601)),
        VFU,
    ),
    differs(
        "vfu_virtio_delete_endpoint",
        "",
        (Refused(-32602), Refused(-32601)),
        VFU,
    ),
    differs(
        "vfu_virtio_delete_endpoint",
        "after a pending fsdev_aio_delete",
        (Silent, Refused(-32601)),
        VFU,
    ),
    no_subsystem("\"name\":\"accel\""),
    no_subsystem("\"name\":\"bdev\""),
    no_subsystem("\"name\":\"bdev_group\""),
    no_subsystem("\"name\":\"iscsi\""),
    no_subsystem("\"name\":\"keyring\""),
    no_subsystem("\"name\":\"nbd\""),
    no_subsystem("\"name\":\"nvmf\""),
    no_subsystem("\"name\":\"scsi\""),
    no_subsystem("\"name\":\"sock\""),
    no_subsystem("\"name\":\"vfio_user_target\""),
    no_subsystem("\"name\":\"vmd\""),
    differs(
        "log_set_level",
        "\"level\":\"bogus\"",
        (Refused(-32603), Refused(-32602)),
        "an unknown level is -32602 in the release that the guide describes",
    ),
    differs(
        "log_set_flag",
        "\"flag\":\"nosuch\"",
        (Answered, Refused(-32602)),
        "an unknown flag is refused, as today's target does and the guide's does not",
    ),
    differs("fsdev_get_iostat", "", (Refused(-32601), Answered), LATER),
    differs("fsdev_get_fsdevs", "", (Refused(-32601), Answered), LATER),
    differs(
        "fsdev_get_fsdevs",
        "\"name\":\"nosuch\"",
        (Refused(-32601), Refused(-19)),
        LATER,
    ),
    differs(
        "fsdev_get_fsdevs",
        "unknown key",
        (Refused(-32601), Refused(-32603)),
        LATER,
    ),
    differs(
        "fsdev_set_opts",
        "before init",
        (Refused(-1), Answered),
        "options may be set before the start, when they can still have an effect",
    ),
    differs(
        "fsdev_aio_create",
        "root_path is a file",
        (Answered, Refused(-32603)),
        "a file is refused at once and not at the mount",
    ),
    differs(
        "fsdev_aio_create",
        "enable_xattr=true [server closed connection]",
        (Silent, Answered),
        "the recorded target crashed",
    ),
    differs(
        "fsdev_aio_create",
        "\"max_write\":65536",
        (Refused(-32602), Answered),
        NAMES,
    ),
    differs(
        "fsdev_aio_create",
        "\"max_xfer_size\":0",
        (Answered, Refused(-32603)),
        SMALL,
    ),
    differs(
        "fsdev_aio_create",
        "\"max_xfer_size\":1}",
        (Answered, Refused(-32603)),
        SMALL,
    ),
    differs(
        "fsdev_aio_delete",
        "fsdev_aio_delete ok (t2)",
        (Refused(-19), Answered),
        "t2 could be created by the other release's name of a parameter",
    ),
    differs(
        "fsdev_aio_delete",
        "\"name\":\"n3\"",
        (Silent, Refused(-19)),
        "its creation was refused",
    ),
    differs(
        "fsdev_aio_delete",
        "\"name\":\"n4\"",
        (Silent, Refused(-19)),
        "its creation was refused",
    ),
    differs(
        "spdk_get_version",
        "id null",
        (Broken, Answered),
        "the recorded answer lacks its last brace",
    ),
    differs(
        "spdk_get_version",
        "notification without id",
        (Broken, Answered),
        "the recorded answer lacks its last brace",
    ),
    differs(
        "fsdev_aio_delete",
        "[no response",
        (Silent, Answered),
        "it keeps clients waiting for as long as somebody uses the fsdev; here nobody does",
    ),
    differs(
        "spdk_get_version",
        "id null [no response",
        (Silent, Answered),
        NULL_ID,
    ),
    differs(
        "spdk_get_version",
        "notification without id [no response",
        (Silent, Answered),
        NULL_ID,
    ),
    differs(
        "framework_get_subsystems",
        "startup state",
        (Refused(-1), Answered),
        LISTED,
    ),
    differs("", "batch of", (Batch, Refused(-32600)), NO_BATCH),
    differs("", "batch mixed", (Batch, Refused(-32600)), NO_BATCH),
    differs(
        "",
        "[server closed connection]",
        (Silent, Refused(-32700)),
        "the connection is closed likewise, and the reason is told first",
    ),
];

/// Members of results that this service has no use for: the method, where the member is, and why.
const ABSENT: &[(&str, &str, &str)] = &[
    (
        "spdk_get_version",
        "result.fields.commit",
        "releases are known by their version",
    ),
    (
        "framework_get_config",
        "result[].params.small_bufsize",
        "the sizes of buffers are fixed",
    ),
    (
        "framework_get_config",
        "result[].params.large_bufsize",
        "the sizes of buffers are fixed",
    ),
    (
        "framework_get_config",
        "result[].params.enable_numa",
        "each core has pools of its own",
    ),
];

/// A recorded answer to a method, with which others are compared.
struct Form<'a> {
    method: &'a str,
}

impl Form<'_> {
    /// Whether a value has the recorded form: the same types, and every recorded member.
    fn fits(&self, recorded: &Value, ours: &Value, path: &str) -> Result<(), String> {
        match (recorded, ours) {
            (Value::Object(recorded), Value::Object(ours)) => {
                self.object_fits(recorded, ours, path)
            }
            (Value::Array(recorded), Value::Array(ours)) => {
                match (recorded.first(), ours.first()) {
                    (Some(recorded), Some(ours)) => self.fits(recorded, ours, &format!("{path}[]")),
                    _ => Ok(()),
                }
            }
            (Value::Null, Value::Null)
            | (Value::Bool(_), Value::Bool(_))
            | (Value::Number(_), Value::Number(_))
            | (Value::String(_), Value::String(_)) => Ok(()),
            _ => Err(format!("{path}: {ours} in the place of {recorded}")),
        }
    }

    fn object_fits(&self, recorded: &Object, ours: &Object, path: &str) -> Result<(), String> {
        // Groups of trace points and flags are named after the components of a program; they have one form.
        if self.method.starts_with("trace_get_") && path == "result" {
            let group = |all: &Object| all.values().find(|value| value.is_object()).cloned();
            let (recorded, ours) = group(recorded)
                .zip(group(ours))
                .ok_or_else(|| format!("{path} has no groups"))?;
            return self.fits(&recorded, &ours, &format!("{path}.group"));
        }
        if self.method == "log_get_flags" {
            let flags = !ours.is_empty() && ours.values().all(Value::is_boolean);
            return flags
                .then_some(())
                .ok_or_else(|| format!("{path}: {ours:?}"));
        }
        for (key, value) in recorded {
            let at = format!("{path}.{key}");
            let known =
                |(method, path, _): &&(&str, &str, &str)| *method == self.method && *path == at;
            match ours.get(key) {
                Some(other) => self.fits(value, other, &at)?,
                None if ABSENT.iter().any(|absent| known(&absent)) => {}
                None => return Err(format!("{at} is missing")),
            }
        }
        Ok(())
    }

    fn compare(&self, recorded: &Value, ours: &Value) -> Result<(), String> {
        let code = |answer: &Value| answer["error"]["code"].as_i64();
        match (code(recorded), code(ours)) {
            (None, None) => self.fits(&recorded["result"], &ours["result"], "result"),
            (one, other) if one == other => Ok(()),
            (one, other) => Err(format!("error {other:?} in the place of {one:?}")),
        }
    }
}

type Object = serde_json::Map<String, Value>;

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
fn compare_all(methods: &[String], recorded: &[Value], ours: &[Value]) -> Result<(), String> {
    if recorded.len() != ours.len() {
        return Err(format!("{} answers, not {}", ours.len(), recorded.len()));
    }
    let methods = methods.iter().map(String::as_str);
    let mut all = recorded.iter().zip(ours).zip(methods.chain(repeat("")));
    all.try_for_each(|((a, b), method)| Form { method }.compare(a, b))
}

fn outcome(answers: &[Value]) -> Outcome {
    match answers {
        [] => Silent,
        [one] if one.is_array() => Batch,
        [one] => match one["error"]["code"].as_i64() {
            Some(code) => Refused(code),
            None => Answered,
        },
        _ => Outcome::Several,
    }
}

/// One record of a transcript.
struct Record {
    request: String,
    response: String,
    note: String,
    /// Of each request in it.
    methods: Vec<String>,
}

impl Record {
    fn new(line: &str) -> Record {
        let record: Value = serde_json::from_str(line).unwrap();
        let text = |name: &str| record[name].as_str().unwrap_or_default().to_owned();
        let request = text("request");
        let requests = serde_json::Deserializer::from_str(&request).into_iter::<Value>();
        let method = |request: Value| request["method"].as_str().unwrap_or_default().to_owned();
        Record {
            methods: requests.map_while(Result::ok).map(method).collect(),
            response: text("response"),
            note: text("note"),
            request,
        }
    }

    /// The row of the difference, if it is one: `None` where the answers are alike.
    fn check(&self, ours: &str) -> Result<Option<usize>, String> {
        let (recorded, ours) = (answers(&self.response), answers(ours)?);
        let compared = recorded
            .as_ref()
            .map_err(Clone::clone)
            .and_then(|recorded| compare_all(&self.methods, recorded, &ours));
        let Err(why) = compared else {
            return Ok(None);
        };
        let dense: String = self.request.split_whitespace().collect();
        let theirs = recorded.map_or(Broken, |recorded| outcome(&recorded));
        let now = outcome(&ours);
        let method = match self.methods.as_slice() {
            [one] => one.as_str(),
            _ => "",
        };
        let known = |row: &Difference| {
            row.method == method
                && (dense.contains(row.of) || self.note.contains(row.of))
                && (row.theirs, row.ours) == (theirs, now)
        };
        let at = DIFFERENT.iter().position(known);
        let (note, request) = (&self.note, &self.request);
        at.map(Some)
            .ok_or_else(|| format!("{note}: {request}: {why} ({theirs:?}, here {now:?})"))
    }
}

#[test]
fn every_recorded_request_gets_an_answer_of_the_recorded_form_or_one_that_is_listed() {
    let dir = std::env::temp_dir().join(format!("ferry-transcript-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir(&dir).unwrap();
    dataplane(&dir.join("run"));
    let mut wrong = Vec::new();
    let mut used = vec![0; DIFFERENT.len()];
    let mut alike = 0;
    for transcript in TRANSCRIPTS {
        let mut controlplane = Controlplane::start(&dir, true);
        let mut before = String::new();
        for record in transcript.lines().map(Record::new) {
            // A new target was recorded from here on.
            let waits = |note: &str| note.contains("--wait-for-rpc target");
            if waits(&record.note) != waits(&before) || before.contains("TARGET PROCESS DIED") {
                drop(controlplane);
                controlplane = Controlplane::start(&dir, waits(&record.note));
            }
            match record.check(&controlplane.ask(&record.request)) {
                Ok(None) => alike += 1,
                Ok(Some(row)) => used[row] += 1,
                Err(why) => wrong.push(why),
            }
            before.clone_from(&record.note);
        }
    }
    let _ = std::fs::remove_dir_all(&dir);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let rows = || DIFFERENT.iter().zip(&used);
    let stale = rows().filter(|(_, used)| **used == 0);
    let stale: Vec<String> = stale
        .map(|(row, _)| format!("{} {:?}", row.method, row.of))
        .collect();
    assert!(stale.is_empty(), "no record differs by {stale:?}");
    let differ: usize = used.iter().sum();
    println!(
        "{alike} answers have the recorded form, {differ} differ in {} ways:",
        used.len()
    );
    for (row, used) in rows() {
        println!(
            "{used:>4} {} {}: {:?}, here {:?}: {}",
            row.method, row.of, row.theirs, row.ours, row.why
        );
    }
}
