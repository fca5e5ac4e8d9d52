//! `ferry top` against a service: as text for somebody who may do nothing else, and live on a terminal while both processes
//! are restarted. What it counts is what Prometheus is told.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Service, ServiceConfig, binary, need, repository, skip, wait_until};
use nix::sys::signal::{Signal, kill};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;

/// Nobody else has these.
const USER: u32 = 54_321;
const GROUP: u32 = 54_322;

/// A service with a mounted device, `GROUP` let in for the counters only, and metrics on a socket.
fn service() -> Result<Service> {
    let rule = format!("{GROUP}:ferry_get_counters");
    let args = ["--socket-mode", "666", "--allow", &rule];
    Service::start_with(&ServiceConfig {
        args: args.map(str::to_owned).to_vec(),
        ..ServiceConfig::default()
    })
}

/// The rows of a table of text that begins with this column, each as column and cell.
fn rows(frame: &str, first: &str, second: &str) -> Vec<BTreeMap<String, String>> {
    let words = |line: &str| {
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let begins = |line: &&str| words(line).starts_with(&[first.to_owned(), second.to_owned()]);
    let mut lines = frame.lines().skip_while(|line| !begins(line));
    let columns = words(lines.next().unwrap_or_default());
    lines
        .take_while(|line| !line.is_empty())
        .map(|line| columns.iter().cloned().zip(words(line)).collect())
        .collect()
}

fn number(row: &BTreeMap<String, String>, column: &str) -> Result<u64> {
    let cell = row
        .get(column)
        .with_context(|| format!("no column {column}"))?;
    cell.parse().with_context(|| format!("{column} is {cell}"))
}

#[test]
fn one_frame_shows_a_user_with_no_other_right_what_was_done() {
    need!(binary("ferry"));
    if !nix::unistd::geteuid().is_root() {
        return skip("becoming another user needs root");
    }
    if let Err(error) = frame_for_an_unprivileged_user() {
        panic!("{error:#}");
    }
}

fn frame_for_an_unprivileged_user() -> Result<()> {
    let service = service()?;
    let export = service.dir().make_dir("export");
    service.call(&format!("fsdev_aio_create aio0 {}", export.display()))?;
    let socket = service.start_vhost_user_device("vfsdev0", "t", "aio0")?;
    let mount = service.mount(&socket)?;
    let blocks = vec![0x5a; 100 * BLOCK];
    fs::write(mount.path().join("file"), &blocks)?;
    ensure!(
        fs::metadata(mount.path().join("nothing")).is_err(),
        "it is there"
    );

    // Where the program lies is not for everybody.
    let program = service.dir().join("ferry");
    fs::copy(binary("ferry")?, &program)?;
    fs::set_permissions(service.dir().path(), fs::Permissions::from_mode(0o755))?;
    let as_user = |group: u32, command: &[&str]| {
        Command::new("setpriv")
            .args([format!("--reuid={USER}"), format!("--regid={group}")])
            .args(["--clear-groups", "--no-new-privs"])
            .arg(&program)
            .args(command)
            .arg("-s")
            .arg(service.rpc_socket())
            .output()
            .context("run ferry top")
    };
    let output = as_user(GROUP, &["top", "--once", "-i", "0.1"])?;
    let (frame, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    ensure!(output.status.success(), "ferry top failed: {frame}{err}");
    let devices = rows(&frame, "DEVICE", "STATE");
    ensure!(devices.len() == 1, "{frame}");
    for (column, cell) in [
        ("DEVICE", "vfsdev0"),
        ("STATE", "running"),
        ("MOUNTED", "yes"),
        ("FSDEV", "aio0"),
        ("QUEUES", "3"),
    ] {
        ensure!(
            devices[0].get(column).is_some_and(|found| found == cell),
            "{column} is not {cell}:\n{frame}"
        );
    }
    let op = |name: &str| {
        let all = rows(&frame, "DEVICE", "OP");
        let row = all.into_iter().find(|row| row["OP"] == name);
        row.with_context(|| format!("no operation {name}:\n{frame}"))
    };
    ensure!(number(&op("lookup")?, "ERRORS")? >= 1, "{frame}");
    ensure!(number(&op("write")?, "REQUESTS")? >= 1, "{frame}");
    ensure!(rows(&frame, "CORE", "CPU").len() == 1, "{frame}");
    let queues = rows(&frame, "QUEUE", "THREAD");
    ensure!(!queues.is_empty(), "{frame}");
    let sum = |column: &str| -> Result<u64> { queues.iter().map(|row| number(row, column)).sum() };
    for column in ["REQUESTS", "ERRORS"] {
        ensure!(
            sum(column)? == number(&devices[0], column)?,
            "{column}: {frame}"
        );
    }

    // Who asked is in the log.
    let asked = format!("uid={USER} gid={GROUP}");
    ensure!(
        service
            .log()
            .lines()
            .any(|line| line.contains("RPC client") && line.contains(&asked)),
        "{}",
        service.log()
    );

    // Another group may not look, and is told what is missing.
    let refused = as_user(GROUP + 1, &["top", "--once", "-i", "0.1"])?;
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success(), "{refused:?}");
    ensure!(
        message.contains("ferry_get_counters") && message.contains("--allow"),
        "{message}"
    );
    mount.unmount()
}

/// The sum of a metric's samples, by the value of a label.
fn sums(metrics: &str, name: &str, label: &str) -> BTreeMap<String, f64> {
    let mut sums = BTreeMap::new();
    for line in metrics
        .lines()
        .filter(|line| line.starts_with(&format!("{name}{{")))
    {
        let of = line
            .split_once(&format!("{label}=\""))
            .and_then(|(_, rest)| rest.split_once('"'));
        let value = line
            .rsplit_once(' ')
            .and_then(|(_, value)| value.parse::<f64>().ok());
        if let (Some((of, _)), Some(value)) = (of, value) {
            *sums.entry(of.to_owned()).or_insert(0.0) += value;
        }
    }
    sums
}

fn scrape(mut stream: impl Read + Write) -> Result<String> {
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: ferry\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    Ok(body.to_owned())
}

#[test]
fn prometheus_is_told_the_same_totals_and_every_metric_of_the_dashboard() {
    need!(binary("ferry"));
    if let Err(error) = compare_with_prometheus() {
        panic!("{error:#}");
    }
}

fn compare_with_prometheus() -> Result<()> {
    let dir = ferry_tests::TempDir::new();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777))?;
    let place = dir.join("metrics.sock");
    let args = ["--metrics".to_owned(), place.display().to_string()];
    let service = Service::start_with(&ServiceConfig {
        args: args.to_vec(),
        ..ServiceConfig::default()
    })?;
    let export = service.dir().make_dir("export");
    service.call(&format!("fsdev_aio_create aio0 {}", export.display()))?;
    let socket = service.start_doca_device("vfsdev0", "t", "aio0")?;
    let mount = service.mount(&socket)?;
    fs::write(mount.path().join("file"), vec![1; 64 * BLOCK])?;
    ensure!(
        fs::read(mount.path().join("file"))?.len() == 64 * BLOCK,
        "short"
    );
    ensure!(
        fs::metadata(mount.path().join("nothing")).is_err(),
        "it is there"
    );
    mount.unmount()?;

    let top = Command::new(binary("ferry")?)
        .args(["top", "--once", "-i", "0.1", "-s"])
        .arg(service.rpc_socket())
        .output()?;
    let frame = String::from_utf8_lossy(&top.stdout).into_owned();
    let metrics = scrape(UnixStream::connect(&place)?)?;
    let requests = sums(&metrics, "ferry_request_duration_seconds_count", "op");
    let errors = sums(&metrics, "ferry_errors_total", "op");
    let shown = rows(&frame, "DEVICE", "OP");
    let names: BTreeSet<&String> = shown.iter().map(|row| &row["OP"]).collect();
    ensure!(names == requests.keys().collect(), "{frame}\n{metrics}");
    for row in &shown {
        let op = &row["OP"];
        ensure!(
            number(row, "REQUESTS")? as f64 == requests[op],
            "{op}:\n{frame}\n{metrics}"
        );
        ensure!(
            number(row, "ERRORS")? as f64 == errors[op],
            "{op}:\n{frame}\n{metrics}"
        );
    }
    let device = &rows(&frame, "DEVICE", "STATE")[0];
    ensure!(
        number(device, "REQUESTS")? as f64 == requests.values().sum::<f64>(),
        "{frame}\n{metrics}"
    );
    let written = sums(&metrics, "ferry_written_bytes_total", "device");
    ensure!(written["vfsdev0"] == (64 * BLOCK) as f64, "{metrics}");

    for name in dashboard_metrics()? {
        let given = metrics.lines().any(|line| {
            line.strip_prefix(&name)
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        ensure!(
            given,
            "the dashboard shows {name}, which is not given:\n{metrics}"
        );
    }
    Ok(())
}

/// The names of metrics in the dashboard's queries.
fn dashboard_metrics() -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(repository().join("tools/deploy/grafana-dashboard.json"))?;
    let dashboard: serde_json::Value = serde_json::from_str(&text)?;
    let mut queries = Vec::new();
    collect(&dashboard, &mut queries);
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let names: BTreeSet<String> = queries
        .iter()
        .flat_map(|query| query.split(|c| !is_name(c)))
        .filter(|word| word.starts_with("ferry_"))
        .map(str::to_owned)
        .collect();
    ensure!(names.len() >= 8, "only {names:?}");
    Ok(names)
}

/// Every query of panels and of variables.
fn collect<'a>(value: &'a serde_json::Value, queries: &mut Vec<&'a str>) {
    match value {
        serde_json::Value::Object(members) => {
            for (name, value) in members {
                match value.as_str() {
                    Some(text) if ["expr", "query", "definition"].contains(&name.as_str()) => {
                        queries.push(text);
                    }
                    _ => collect(value, queries),
                }
            }
        }
        serde_json::Value::Array(items) => items.iter().for_each(|item| collect(item, queries)),
        _ => {}
    }
}

#[test]
fn the_loopback_address_gives_the_same_metrics_as_the_socket() {
    need!(binary("ferry"));
    // The service gets a port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let place = format!("127.0.0.1:{port}");
    let service = Service::start_with(&ServiceConfig {
        args: vec!["--metrics".to_owned(), place.clone()],
        ..ServiceConfig::default()
    });
    let service = service.unwrap();
    let metrics = scrape(std::net::TcpStream::connect(&place).unwrap()).unwrap();
    assert!(metrics.contains("\nferry_dataplane_up 1\n"), "{metrics}");
    assert!(
        metrics.contains("ferry_core_busy_seconds_total{core=\"0\"}"),
        "{metrics}"
    );
    drop(service);
}

/// `ferry top` on a terminal of 140 by 40.
struct Terminal {
    child: Child,
    keys: ChildStdin,
    screen: Arc<Mutex<vt100::Parser>>,
}

impl Terminal {
    fn start(socket: &Path) -> Result<Terminal> {
        let command = format!(
            "stty rows 40 cols 140; exec {} top -i 0.1 -t 0.5 -s {}",
            binary("ferry")?.display(),
            socket.display()
        );
        let mut child = Command::new("script")
            .args(["--quiet", "--return", "--command", &command, "/dev/null"])
            .env("TERM", "xterm")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("run script")?;
        let keys = child.stdin.take().context("no stdin")?;
        let mut output = child.stdout.take().context("no stdout")?;
        let screen = Arc::new(Mutex::new(vt100::Parser::new(40, 140, 0)));
        let seen = Arc::clone(&screen);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.process(&buffer[..count]);
            }
        });
        Ok(Terminal {
            child,
            keys,
            screen,
        })
    }

    fn shown(&self) -> String {
        let screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        screen.screen().contents()
    }

    fn shows(&mut self, text: &str) -> Result<()> {
        wait_until(&format!("the screen shows {text:?}"), LIMIT, || {
            ensure!(
                self.child.try_wait()?.is_none(),
                "ferry top has ended:\n{}",
                self.shown()
            );
            Ok(self.shown().contains(text))
        })
        .with_context(|| self.shown())
    }

    /// Presses q; gives whether it ended well.
    fn quit(mut self) -> Result<()> {
        self.keys.write_all(b"q")?;
        let mut status = None;
        wait_until("ferry top ends", LIMIT, || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        })?;
        ensure!(
            status.is_some_and(|status| status.success()),
            "it ended with {status:?}"
        );
        let screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(
            !screen.screen().alternate_screen(),
            "it leaves the terminal as it used it"
        );
        ensure!(!screen.screen().hide_cursor(), "it leaves no cursor");
        Ok(())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // The terminal goes with it.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[test]
fn the_live_view_outlives_both_processes_and_gives_the_terminal_back() {
    need!(binary("ferry"));
    if let Err(error) = outlive() {
        panic!("{error:#}");
    }
}

fn outlive() -> Result<()> {
    let service = Service::start()?;
    let mut top = Terminal::start(service.rpc_socket())?;
    for name in ["ferry-controlplane", "ferry-dataplane"] {
        let dataplane = service.child("ferry-dataplane")?;
        top.shows(&format!("data plane {dataplane}"))?;
        top.shows("BUSY%")?;
        let victim = service.child(name)?;
        // Stopped first, so that there is a time without answers, however quick the next start is.
        let controlplane = service.child("ferry-controlplane")?;
        kill(controlplane, Signal::SIGSTOP)?;
        top.shows("no counters for")?;
        kill(victim, Signal::SIGKILL)?;
        if victim != controlplane {
            kill(controlplane, Signal::SIGCONT)?;
        }
        wait_until("the next one runs", LIMIT, || {
            Ok(service.child(name).is_ok_and(|pid| pid != victim))
        })?;
    }
    let dataplane = service.child("ferry-dataplane")?;
    top.shows(&format!("data plane {dataplane}"))?;
    top.quit()
}
