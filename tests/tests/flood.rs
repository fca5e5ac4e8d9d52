//! 64 clients at once that pipeline, cut their requests to pieces, send nonsense, too much, and too slowly: every answer is
//! the right one, the limits hold, and afterwards the control plane has no file and hardly a page more than before.
//!
//! A fixed number of rounds; `FERRY_FLOOD_SECONDS` floods for so long instead.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Service, binary, need, wait_until};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

const CLIENTS: usize = 64;
const ROUNDS: usize = 40;
const LIMIT: Duration = Duration::from_secs(60);
const MAX_REQUEST: usize = 32 * 1024;
/// What 64 connections may hold at most in requests and answers that are under way, and the allocator's slack.
const MOST_GROWTH_KIB: u64 = 64 * 1024;
/// What may stay behind of that: the allocator gives pages back when it likes.
const MOST_LEFT_KIB: u64 = 16 * 1024;

fn connect(socket: &Path) -> Result<BufReader<UnixStream>> {
    let stream = UnixStream::connect(socket).context("connect")?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(BufReader::new(stream))
}

fn answer(client: &mut BufReader<UnixStream>) -> Result<Value> {
    let mut line = String::new();
    client.read_line(&mut line).context("read an answer")?;
    serde_json::from_str(&line).with_context(|| format!("no answer: {line:?}"))
}

/// Whether the service has closed the connection.
fn is_closed(client: &mut BufReader<UnixStream>) -> Result<bool> {
    match client.read(&mut [0]) {
        Ok(count) => Ok(count == 0),
        // It was closed with some of what we sent unread.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// A request and what its answer must be: the id, and a result or an error's code.
fn request(number: usize) -> (Value, Option<i64>) {
    let id = json!(format!("id-{number}"));
    let of = |method: &str, params: Value, code| {
        let request = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
        (request, code)
    };
    match number % 6 {
        0 => (json!({"id": id, "method": "spdk_get_version"}), None),
        1 => of("fsdev_get_fsdevs", json!({}), None),
        2 => of("no_such_method", json!({}), Some(-32601)),
        3 => of(
            "virtio_fs_device_start",
            json!({"dev_name": 5}),
            Some(-32602),
        ),
        4 => of(
            "virtio_fs_device_start",
            json!({"dev_name": "nosuch"}),
            Some(-19),
        ),
        _ => of("virtio_fs_get_devices", json!({}), None),
    }
}

fn check(number: usize, answer: &Value) -> Result<()> {
    let (request, code) = request(number);
    let right = answer["id"] == request["id"]
        && match code {
            None => answer.get("result").is_some() && answer.get("error").is_none(),
            Some(code) => answer["error"]["code"] == code && answer.get("result").is_none(),
        };
    ensure!(right, "{request} is answered with {answer}");
    Ok(())
}

/// Many requests at once, and their answers in the same order.
fn pipelined(socket: &Path, seed: usize) -> Result<()> {
    let mut client = connect(socket)?;
    let numbers = seed..seed + 20;
    let text: String = numbers
        .clone()
        .map(|number| request(number).0.to_string())
        .collect();
    client.get_mut().write_all(text.as_bytes())?;
    numbers
        .into_iter()
        .try_for_each(|number| check(number, &answer(&mut client)?))
}

/// Requests in pieces of a few bytes, cut anywhere.
fn fragmented(socket: &Path, seed: usize) -> Result<()> {
    let mut client = connect(socket)?;
    let text: String = (seed..seed + 3)
        .map(|number| request(number).0.to_string())
        .collect();
    for piece in text.as_bytes().chunks(1 + seed % 7) {
        client.get_mut().write_all(piece)?;
    }
    (seed..seed + 3).try_for_each(|number| check(number, &answer(&mut client)?))
}

/// What is no request is answered as the catalogue says; where the stream is lost, the connection ends.
fn refused(socket: &Path, text: &[u8], code: i64, closes: bool) -> Result<()> {
    let mut client = connect(socket)?;
    match client.get_mut().write_all(text) {
        // It was refused before all of it was sent.
        Err(error)
            if closes
                && [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()) => {}
        written => written?,
    }
    let begin = String::from_utf8_lossy(&text[..text.len().min(60)]).into_owned();
    let refusal = answer(&mut client)?;
    ensure!(refusal["error"]["code"] == code, "{begin}: {refusal}");
    if closes {
        ensure!(
            is_closed(&mut client)?,
            "{begin}: the connection is still open"
        );
    } else {
        client
            .get_mut()
            .write_all(request(0).0.to_string().as_bytes())?;
        check(0, &answer(&mut client)?)?;
    }
    Ok(())
}

fn malformed(socket: &Path, seed: usize) -> Result<()> {
    let many = format!(
        "{{\"id\": 1, \"method\": \"x\", \"params\": [{}1]}}",
        "1,".repeat(1100)
    );
    let long_id = json!({"id": "i".repeat(200), "method": "spdk_get_version"}).to_string();
    let cases: [(&[u8], i64, bool); 6] = [
        (b"{\"method\": ]}", -32700, true),
        (b"\xff\xfe", -32700, true),
        (b"[{\"method\": \"spdk_get_version\"}]", -32600, false),
        (b"{\"id\": 1}", -32600, false),
        (many.as_bytes(), -32700, true),
        (long_id.as_bytes(), -32600, false),
    ];
    let (text, code, closes) = cases[seed % cases.len()];
    refused(socket, text, code, closes)
}

fn oversized(socket: &Path) -> Result<()> {
    let text = format!("{{\"method\": \"{}", "x".repeat(2 * MAX_REQUEST));
    refused(socket, text.as_bytes(), -32600, true)
}

/// Begins, and never ends; whoever else asks meanwhile is answered.
fn slow(socket: &Path, seed: usize) -> Result<()> {
    let mut client = connect(socket)?;
    let text = request(seed).0.to_string();
    let (begin, end) = text.split_at(text.len() / 2);
    client.get_mut().write_all(begin.as_bytes())?;
    if seed.is_multiple_of(2) {
        // This one goes away in the middle.
        client.get_mut().shutdown(Shutdown::Both)?;
        return Ok(());
    }
    thread::yield_now();
    client.get_mut().write_all(end.as_bytes())?;
    check(seed, &answer(&mut client)?)
}

/// Asks for much and reads none of it until it has asked for everything.
fn deaf(socket: &Path, seed: usize) -> Result<()> {
    let mut client = connect(socket)?;
    let text = json!({"id": 1, "method": "rpc_get_methods"})
        .to_string()
        .repeat(50);
    client.get_mut().write_all(text.as_bytes())?;
    if seed.is_multiple_of(2) {
        return Ok(());
    }
    for _ in 0..50 {
        ensure!(answer(&mut client)?["result"].is_array(), "no list");
    }
    Ok(())
}

fn flood(socket: &Path, client: usize, until: Option<Instant>) -> Result<usize> {
    let mut done = 0;
    loop {
        let more = until.map_or(done < ROUNDS, |until| Instant::now() < until);
        if !more {
            return Ok(done);
        }
        let seed = client * 1009 + done * 7;
        let played = match (client + done) % 6 {
            0 => pipelined(socket, seed),
            1 => fragmented(socket, seed),
            2 => malformed(socket, seed),
            3 => oversized(socket),
            4 => slow(socket, seed),
            _ => deaf(socket, seed),
        };
        played.with_context(|| format!("client {client}, round {done}"))?;
        done += 1;
    }
}

/// Open files, and memory in KiB: resident now, and resident at most.
fn usage(pid: Pid) -> Result<(usize, u64, u64)> {
    let files = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line
            .and_then(|line| line.split_whitespace().next())
            .context("no such field")?;
        Ok(number.parse()?)
    };
    Ok((files, field("VmRSS:")?, field("VmHWM:")?))
}

/// As many connections as the service takes, all of them served.
fn fill(socket: &Path) -> Result<()> {
    let mut all: Vec<_> = (0..CLIENTS)
        .map(|_| connect(socket))
        .collect::<Result<_>>()?;
    for client in &mut all {
        client
            .get_mut()
            .write_all(request(0).0.to_string().as_bytes())?;
    }
    all.iter_mut()
        .try_for_each(|client| check(0, &answer(client)?))?;
    // One more has to wait until another one goes.
    let mut waiting = connect(socket)?;
    waiting
        .get_mut()
        .write_all(request(1).0.to_string().as_bytes())?;
    let first = all.swap_remove(0);
    let rest = &mut all;
    for client in rest {
        client
            .get_mut()
            .write_all(request(2).0.to_string().as_bytes())?;
        check(2, &answer(client)?)?;
    }
    waiting.get_mut().set_nonblocking(true)?;
    let early = waiting
        .get_mut()
        .read(&mut [0])
        .map_err(|error| error.kind());
    ensure!(
        early == Err(ErrorKind::WouldBlock),
        "a 65th connection is served: {early:?}"
    );
    waiting.get_mut().set_nonblocking(false)?;
    drop(first);
    check(1, &answer(&mut waiting)?)
}

fn run() -> Result<()> {
    let service = Service::start()?;
    let socket = service.rpc_socket().to_owned();
    let pid = service.child("ferry-controlplane")?;
    fill(&socket)?;
    let settled = || {
        connect(&socket).and_then(|mut client| {
            client
                .get_mut()
                .write_all(request(0).0.to_string().as_bytes())?;
            check(0, &answer(&mut client)?)
        })
    };
    settled()?;
    let mut files = usize::MAX;
    wait_until("its connections are closed", LIMIT, || {
        let now = usage(pid)?.0;
        Ok(core::mem::replace(&mut files, now) == now)
    })?;
    let (files, before, _) = usage(pid)?;

    let seconds = std::env::var("FERRY_FLOOD_SECONDS").ok();
    let until = match seconds {
        Some(seconds) => Some(Instant::now() + Duration::from_secs(seconds.parse()?)),
        None => None,
    };
    let flooding: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let socket = socket.clone();
            thread::spawn(move || flood(&socket, client, until))
        })
        .collect();
    let mut rounds = 0;
    for one in flooding {
        rounds += one
            .join()
            .map_err(|_| anyhow::anyhow!("a client panicked"))??;
    }

    ensure!(
        service.child("ferry-controlplane")? == pid,
        "it has been started again"
    );
    settled()?;
    wait_until("all its connections are closed", LIMIT, || {
        Ok(usage(pid)?.0 <= files)
    })?;
    let (_, after, most) = usage(pid)?;
    println!(
        "{rounds} rounds; resident {before} KiB before, {after} KiB after, {most} KiB at most; {files} files"
    );
    ensure!(
        most <= before + MOST_GROWTH_KIB,
        "{most} KiB at most, {before} KiB before"
    );
    ensure!(
        after <= before + MOST_LEFT_KIB,
        "{after} KiB after, {before} KiB before"
    );
    Ok(())
}

#[test]
fn a_flood_of_clients_gets_right_answers_and_leaves_nothing_behind() {
    need!(binary("ferry"));
    if let Err(error) = run() {
        panic!("{error:#}");
    }
}
