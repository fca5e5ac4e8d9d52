//! The metrics endpoint: what the cores count, in the text form of Prometheus, over HTTP.
//!
//! Off by default. It listens on a unix socket or a loopback address only: whoever wants it elsewhere puts a proxy with
//! access control before it. Every connection gets one answer and is closed.

use core::fmt::Write;
use core::time::Duration;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::str::FromStr;
use std::sync::Arc;

use ferry_shared::counters::CoreCounter;
use ferry_shared::counters::OpTotals;
use ferry_shared::counters::Reader;
use nix::sys::stat::Mode;
use nix::sys::stat::umask;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use crate::app::App;
use crate::rpc::stats::OPERATIONS;
use crate::rpc::stats::Totals;
use crate::rpc::stats::limit_of;

/// Connections at a time; further ones wait.
const MAX_CONNECTIONS: usize = 8;
/// Longest request that is read.
const MAX_REQUEST: usize = 8 * 1024;
/// How long a client may take for its request and for taking the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the endpoint listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A unix socket.
    Unix(PathBuf),
    /// A loopback address.
    Loopback(SocketAddr),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Place, String> {
        if text.starts_with('/') {
            return Ok(Place::Unix(PathBuf::from(text)));
        }
        let address: SocketAddr = text.parse().map_err(|_| {
            format!("{text:?} is neither an absolute path nor an address with a port")
        })?;
        if !address.ip().is_loopback() {
            return Err(format!(
                "{address} is not a loopback address; let a proxy with access control serve others"
            ));
        }
        Ok(Place::Loopback(address))
    }
}

enum Listener {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, path) = self {
            // Whoever removed it before has done the work.
            let _ = std::fs::remove_file(path);
        }
    }
}

async fn listen(place: &Place) -> io::Result<Listener> {
    match place {
        Place::Loopback(address) => Ok(Listener::Tcp(TcpListener::bind(address).await?)),
        Place::Unix(path) => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
            // Numbers are for everybody who reaches the directory.
            let old = umask(Mode::from_bits_truncate(0o111));
            let bound = UnixListener::bind(path);
            umask(old);
            Ok(Listener::Unix(bound?, path.clone()))
        }
    }
}

/// Serves the metrics; returns only when listening fails.
pub async fn serve(app: Rc<App>, place: Place) -> io::Result<()> {
    let listener = listen(&place).await?;
    tracing::info!(?place, "serving metrics");
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return Ok(());
        };
        let app = Rc::clone(&app);
        match &listener {
            Listener::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                tokio::task::spawn_local(async move {
                    converse(&app, stream).await;
                    drop(slot);
                });
            }
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                tokio::task::spawn_local(async move {
                    converse(&app, stream).await;
                    drop(slot);
                });
            }
        }
    }
}

async fn converse(app: &App, mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let talk = async {
        let request = read_request(&mut stream).await?;
        let answer = respond(app, &request);
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await
    };
    match tokio::time::timeout(PATIENCE, talk).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "metrics client"),
        Err(_) => tracing::debug!("a metrics client was too slow"),
    }
}

/// Reads up to the blank line after the headers.
async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        let count = stream.read(&mut buffer).await?;
        request.extend_from_slice(buffer.get(..count).unwrap_or_default());
        let whole = request.windows(4).any(|end| end == b"\r\n\r\n");
        if whole || count == 0 || request.len() > MAX_REQUEST {
            return Ok(request);
        }
    }
}

fn respond(app: &App, request: &[u8]) -> String {
    let line = request
        .split(|byte| *byte == b'\r')
        .next()
        .unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let (method, path) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let (status, body) = match (method, path) {
        (b"GET" | b"HEAD", b"/metrics" | b"/") => ("200 OK", render(app)),
        (b"GET" | b"HEAD", _) => (
            "404 Not Found",
            "the metrics are under /metrics\n".to_owned(),
        ),
        _ => ("405 Method Not Allowed", "GET /metrics\n".to_owned()),
    };
    let length = body.len();
    let body = if method == b"HEAD" { "" } else { &body };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

/// Everything, in the text form.
pub fn render(app: &App) -> String {
    let mut text = Text(String::new());
    let counters = app.counters().ok();
    text.head(
        "ferry_dataplane_up",
        "gauge",
        "Whether the data plane is connected",
    );
    text.sample("ferry_dataplane_up", "", u64::from(counters.is_some()));
    let Some(counters) = counters else {
        return text.0;
    };
    let reader = counters.reader();
    cores(&mut text, &reader);
    let devices: Vec<(String, Totals)> = reader
        .devices()
        .into_iter()
        .map(|device| {
            let mut totals = Totals::default();
            (0..reader.cores()).for_each(|core| totals.add(&Totals::of(&reader, core, device.id)));
            (escape(&device.name), totals)
        })
        .collect();
    states(&mut text, app);
    requests(&mut text, &devices);
    text.0
}

struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl core::fmt::Display) {
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }
}

/// A label's value, with what the form reserves escaped.
fn escape(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn cores(text: &mut Text, reader: &Reader<'_>) {
    let counters = [
        (
            "ferry_core_busy_seconds_total",
            CoreCounter::Busy,
            "Time with work",
        ),
        (
            "ferry_core_idle_seconds_total",
            CoreCounter::Idle,
            "Time without work",
        ),
        (
            "ferry_core_requests_total",
            CoreCounter::Requests,
            "Requests taken from queues",
        ),
        (
            "ferry_core_sleeps_total",
            CoreCounter::Sleeps,
            "Times that the core slept",
        ),
        (
            "ferry_core_slot_waits_total",
            CoreCounter::SlotWaits,
            "Times that a queue waited for a request slot",
        ),
        (
            "ferry_core_buffer_waits_total",
            CoreCounter::BufferWaits,
            "Times that a request waited for data buffers",
        ),
    ];
    for (name, counter, help) in counters {
        text.head(name, "counter", help);
        for core in 0..reader.cores() {
            let labels = format!("{{core=\"{core}\"}}");
            let value = reader.core(core, counter);
            match counter {
                CoreCounter::Busy | CoreCounter::Idle => {
                    text.sample(name, &labels, seconds(value));
                }
                _ => text.sample(name, &labels, value),
            }
        }
    }
}

fn states(text: &mut Text, app: &App) {
    let name = "ferry_device_mounted";
    text.head(name, "gauge", "Whether a guest has the device mounted");
    for device in app.model().devices() {
        let labels = format!(
            "{{device=\"{}\",state=\"{}\",fsdev=\"{}\"}}",
            escape(&device.name),
            device.state().name(),
            escape(device.fsdev.as_deref().unwrap_or_default())
        );
        let mounted = device.live.as_ref().is_some_and(|live| live.mounted);
        text.sample(name, &labels, u64::from(mounted));
    }
}

fn requests(text: &mut Text, devices: &[(String, Totals)]) {
    type Bytes = fn(&Totals) -> u64;
    let bytes: [(&str, Bytes, &str); 2] = [
        (
            "ferry_read_bytes_total",
            |totals| totals.read,
            "Bytes read by guests",
        ),
        (
            "ferry_written_bytes_total",
            |totals| totals.written,
            "Bytes written by guests",
        ),
    ];
    for (name, of, help) in bytes {
        text.head(name, "counter", help);
        for (device, totals) in devices {
            text.sample(name, &format!("{{device=\"{device}\"}}"), of(totals));
        }
    }
    let used = |totals: &Totals| -> Vec<(&'static str, OpTotals)> {
        OPERATIONS
            .into_iter()
            .map(|(name, opcodes)| (name, totals.operation(opcodes)))
            .filter(|(_, op)| op.requests > 0)
            .collect()
    };
    let name = "ferry_errors_total";
    text.head(name, "counter", "Requests answered with an error");
    for (device, totals) in devices {
        for (op, of) in used(totals) {
            text.sample(
                name,
                &format!("{{device=\"{device}\",op=\"{op}\"}}"),
                of.errors,
            );
        }
    }
    let name = "ferry_request_duration_seconds";
    text.head(name, "histogram", "From taking a request to answering it");
    for (device, totals) in devices {
        for (op, of) in used(totals) {
            histogram(text, name, &format!("device=\"{device}\",op=\"{op}\""), &of);
        }
    }
}

fn histogram(text: &mut Text, name: &str, labels: &str, op: &OpTotals) {
    let mut sum = 0u64;
    for (bucket, count) in op.buckets.iter().enumerate() {
        sum = sum.wrapping_add(*count);
        if bucket + 1 < op.buckets.len() {
            let le = seconds(limit_of(bucket));
            text.sample(
                &format!("{name}_bucket"),
                &format!("{{{labels},le=\"{le}\"}}"),
                sum,
            );
        }
    }
    // The parts are read one after the other, and must agree with one another.
    text.sample(
        &format!("{name}_bucket"),
        &format!("{{{labels},le=\"+Inf\"}}"),
        sum,
    );
    text.sample(
        &format!("{name}_sum"),
        &format!("{{{labels}}}"),
        seconds(op.ns),
    );
    text.sample(&format!("{name}_count"), &format!("{{{labels}}}"), sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_and_loopback_addresses_are_places() {
        assert_eq!("/run/m".parse(), Ok(Place::Unix("/run/m".into())));
        assert!(matches!("127.0.0.1:9100".parse(), Ok(Place::Loopback(_))));
        assert!(matches!("[::1]:9100".parse(), Ok(Place::Loopback(_))));
        for text in ["0.0.0.0:9100", "192.0.2.1:1", "localhost", "run/m"] {
            let refused = text.parse::<Place>().unwrap_err();
            assert!(refused.contains(text.trim_end_matches(":1")), "{refused}");
        }
    }

    #[test]
    fn histograms_are_cumulative() {
        let mut op = OpTotals {
            requests: 3,
            ns: 1_500_000_000,
            ..OpTotals::default()
        };
        (op.buckets[0], op.buckets[1]) = (1, 2);
        let mut text = Text(String::new());
        histogram(&mut text, "h", "d=\"x\"", &op);
        for line in [
            "h_bucket{d=\"x\",le=\"0.000000512\"} 1\n",
            "h_bucket{d=\"x\",le=\"0.000001024\"} 3\n",
            "h_bucket{d=\"x\",le=\"+Inf\"} 3\n",
            "h_sum{d=\"x\"} 1.5\n",
            "h_count{d=\"x\"} 3\n",
        ] {
            assert!(text.0.contains(line), "{line} is missing in {}", text.0);
        }
    }

    #[test]
    fn other_requests_than_for_the_metrics_are_refused() {
        let app = App::new(None);
        let cases: [(&[u8], &str); 5] = [
            (b"GET /metrics HTTP/1.1\r\n\r\n", "200 OK"),
            (b"GET /other HTTP/1.1\r\n\r\n", "404 Not Found"),
            (b"POST /metrics HTTP/1.1\r\n\r\n", "405 Method"),
            (b"", "405 Method"),
            (b"\xff\xff", "405 Method"),
        ];
        for (request, status) in cases {
            let answer = respond(&app, request);
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status}")),
                "{answer}"
            );
        }
        let up = respond(&app, cases[0].0);
        assert!(up.ends_with("ferry_dataplane_up 0\n"), "{up}");
    }
}
