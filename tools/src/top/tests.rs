use std::io::BufRead;
use std::io::BufReader;
use std::io::Write as _;
use std::os::unix::net::UnixListener;

use clap::Parser;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::Event;
use ratatui::crossterm::event::KeyCode;
use ratatui::crossterm::event::KeyEvent;
use ratatui::crossterm::event::KeyModifiers;
use serde::Deserialize;
use serde_json::Value;
use serde_json::json;

use super::sample::Counters;
use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

fn args(line: &str) -> Args {
    Line::parse_from(format!("top {line}").split_whitespace()).args
}

/// A histogram with some requests in one bucket; bucket 0 ends at 512 ns.
fn op(requests: u64, errors: u64, ns: u64, bucket: usize) -> Value {
    let mut buckets = vec![0; 28];
    buckets[bucket] = requests;
    json!({"requests": requests, "errors": errors, "ns": ns, "buckets": buckets})
}

fn device(id: u32, name: &str, of: Value) -> Value {
    json!({"id": id, "name": name, "state": "running", "fsdev": "aio0", "mounted": true, "queues": 9,
        "bytes_read": 0, "bytes_written": 0, "all": of, "ops": {"read": of}})
}

fn queue(of: &Value) -> Value {
    let half = |value: &Value| json!(value.as_u64().unwrap_or(0) / 2);
    let all = &of["all"];
    let buckets: Vec<Value> = all["buckets"]
        .as_array()
        .unwrap()
        .iter()
        .map(half)
        .collect();
    json!({"name": format!("{}_q1", of["name"].as_str().unwrap()), "thread": 5, "core": 0, "device": of["id"],
        "bytes_read": half(&of["bytes_read"]), "slot_waits": half(&all["requests"]), "buffer_waits": 2,
        "all": {"requests": half(&all["requests"]), "errors": all["errors"], "ns": half(&all["ns"]), "buckets": buckets}})
}

fn sample(pid: u32, cores: Value, devices: &[Value], after: Duration) -> Sample {
    // Each device has its second queue in use, which has seen half of everything.
    let queues: Vec<Value> = devices.iter().map(queue).collect();
    let counters = json!({"pid": pid, "cores": cores, "devices": devices, "queues": queues});
    Sample {
        taken: start() + after,
        counters: Counters::deserialize(counters).unwrap(),
    }
}

fn start() -> Instant {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    *START.get_or_init(Instant::now)
}

fn core(busy_ns: u64, requests: u64, slot_waits: u64) -> Value {
    json!([{"cpu": 3, "busy_ns": busy_ns, "sleeps": 0, "requests": requests,
        "slot_waits": slot_waits, "buffer_waits": 0}])
}

#[test]
fn rates_are_what_has_grown_in_the_time_between() {
    let mut before = device(1, "d", op(1000, 10, 1_000_000, 0));
    before["bytes_read"] = json!(1 << 20);
    let mut after = before.clone();
    after["bytes_read"] = json!(5 << 20);
    for of in ["all", "/ops/read"] {
        let of = after
            .pointer_mut(&format!("/{}", of.trim_start_matches('/')))
            .unwrap();
        *of = json!({"requests": 1400, "errors": 14, "ns": 2_000_000, "buckets": of["buckets"]});
        of["buckets"][4] = json!(399);
        of["buckets"][10] = json!(1);
    }
    let before = sample(7, core(100, 50, 1), &[before], Duration::ZERO);
    let after = sample(
        7,
        core(1_500_000_100, 450, 5),
        &[after],
        Duration::from_secs(2),
    );
    let rates = sample::rates(&before, &after);
    let core = &rates.cores[0];
    assert_eq!(
        (core.busy, core.requests, core.slot_waits),
        (0.75, 200.0, 2.0)
    );
    let device = &rates.devices[0];
    assert_eq!(device.read, f64::from(2 << 20));
    assert_eq!((device.all.requests, device.all.errors), (200.0, 2.0));
    assert_eq!(device.all.mean, Some(2500));
    // What was in the first bucket before does not count.
    assert_eq!(device.all.percentiles, Some([8192, 8192, 1 << 19]));
    assert_eq!(device.ops[0].1, device.all);
    assert_eq!(device.ops[0].2.requests, 1400);
    let queue = &device.queues[0];
    assert_eq!(
        (queue.read, queue.slot_waits, queue.buffer_waits),
        (f64::from(1 << 20), 100.0, 0.0)
    );
    assert_eq!((queue.all.requests, queue.all.errors), (100.0, 2.0));
    assert_eq!(queue.all.percentiles, Some([8192, 8192, 8192]));
}

#[test]
fn what_has_begun_anew_counts_from_nothing() {
    let old = device(1, "d", op(1000, 0, 1000, 0));
    let before = sample(
        7,
        core(100, 50, 0),
        core::slice::from_ref(&old),
        Duration::ZERO,
    );
    let second = Duration::from_secs(1);
    // Another data plane, another device of the same name, and a counter that somebody has set back.
    let cases = [
        sample(8, core(1, 60, 0), &[old], second),
        sample(
            7,
            core(1, 60, 0),
            &[device(2, "d", op(1000, 0, 1000, 0))],
            second,
        ),
    ];
    for now in cases {
        let rates = sample::rates(&before, &now);
        assert_eq!(rates.devices[0].all.requests, 1000.0);
    }
    let smaller = device(1, "d", op(30, 0, 30, 0));
    let rates = sample::rates(&before, &sample(7, json!([]), &[smaller], second));
    assert_eq!(rates.devices[0].all.requests, 30.0);
}

#[test]
fn nothing_done_is_no_latency_and_no_division_by_zero() {
    let idle = sample(
        7,
        core(5, 0, 0),
        &[device(1, "d", op(9, 0, 9, 1))],
        Duration::ZERO,
    );
    let rates = sample::rates(&idle, &idle);
    assert_eq!(rates.cores[0].busy, 0.0);
    assert_eq!(
        (rates.devices[0].all.mean, rates.devices[0].all.percentiles),
        (None, None)
    );
    let text = text::frame("", &view::tables(rates, Order::Name, None));
    assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
}

fn two_devices() -> (Sample, Sample) {
    let none = json!({"requests": 0, "errors": 0, "ns": 0, "buckets": []});
    let before = [
        device(1, "slow", none.clone()),
        device(2, "a\u{1b}[2J", none),
    ];
    let after = [
        device(1, "slow", op(10, 1, 10_000_000, 20)),
        device(2, "a\u{1b}[2J", op(300, 0, 3_000_000, 5)),
    ];
    (
        sample(7, core(0, 0, 0), &before, Duration::ZERO),
        sample(7, core(250_000_000, 310, 4), &after, Duration::from_secs(1)),
    )
}

#[test]
fn a_frame_of_text_has_aligned_tables_and_nothing_that_moves_the_cursor() {
    let (before, after) = two_devices();
    let tables = view::tables(sample::rates(&before, &after), Order::Latency, None);
    let frame = text::frame("status", &tables);
    let expected = "\
status

CORE  CPU  BUSY%  REQ/s  SLEEPS/s  SLOT-WAITS/s  BUFFER-WAITS/s
   0    3   25.0    310         0           4.0               0

DEVICE  STATE    MOUNTED  FSDEV  QUEUES  IOPS  READ-MiB/s  WRITE-MiB/s    P50    P99  P99.9  ERR/s  REQUESTS  ERRORS
slow    running  yes      aio0        9  10.0           0            0  537ms  537ms  537ms    1.0        10       1
a?[2J   running  yes      aio0        9   300           0            0   16us   16us   16us      0       300       0

QUEUE     THREAD  CORE  IOPS  READ-MiB/s  WRITE-MiB/s    P50    P99  P99.9  SLOT-WAITS/s  BUFFER-WAITS/s  ERR/s  REQUESTS  ERRORS
slow_q1        5     0   5.0           0            0  537ms  537ms  537ms           5.0               0    1.0         5       1
a?[2J_q1       5     0   150           0            0   16us   16us   16us           150               0      0       150       0

DEVICE  OP    IOPS   MEAN    P50    P99  P99.9  ERR/s  REQUESTS  ERRORS
slow    read  10.0  1.0ms  537ms  537ms  537ms    1.0        10       1
a?[2J   read   300   10us   16us   16us   16us      0       300       0
";
    assert_eq!(frame, expected);
}

#[test]
fn devices_are_ordered_as_asked() {
    let (before, after) = two_devices();
    let first = |order| {
        let tables = view::tables(sample::rates(&before, &after), order, None);
        tables.devices.rows[0][0].clone()
    };
    assert_eq!(first(Order::Name), "a?[2J");
    assert_eq!(first(Order::Iops), "a?[2J");
    assert_eq!(first(Order::Latency), "slow");
    assert_eq!(first(Order::Errors), "slow");
}

fn key(code: KeyCode) -> Event {
    Event::Key(KeyEvent::new(code, KeyModifiers::NONE))
}

fn drawn(view: &mut screen::View) -> String {
    let mut terminal = Terminal::new(TestBackend::new(130, 24)).unwrap();
    terminal.draw(|frame| view.draw(frame)).unwrap();
    terminal.backend().to_string()
}

#[test]
fn the_screen_shows_the_selected_devices_operations_and_keeps_the_reason_of_a_silence() {
    let mut view = screen::View::new(&args("-s /nowhere"));
    assert!(drawn(&mut view).contains("connecting"));
    let (before, after) = two_devices();
    view.learn(Ok(before));
    view.learn(Ok(after.clone()));
    let shown = drawn(&mut view);
    assert!(
        shown.contains("data plane 7  cores 1  devices 2, mounted 2"),
        "{shown}"
    );
    assert_eq!(shown.matches("slow").count(), 1, "{shown}");
    // The selection stays on the last device, however far down it is moved.
    for _ in 0..5 {
        view.take(&key(KeyCode::Down));
    }
    assert_eq!(drawn(&mut view).matches("slow").count(), 2);
    view.take(&key(KeyCode::Up));
    assert_eq!(drawn(&mut view).matches("slow").count(), 1);
    view.take(&key(KeyCode::Char('o')));
    assert_eq!(drawn(&mut view).matches("slow").count(), 2);
    view.take(&key(KeyCode::Char('c')));
    assert!(!drawn(&mut view).contains("SLOT-WAITS"));
    view.take(&key(KeyCode::Char('u')));
    let shown = drawn(&mut view);
    assert!(
        shown.contains("SLOT-WAITS") && shown.contains("slow_q1"),
        "{shown}"
    );
    view.take(&key(KeyCode::Char('o')));
    let shown = drawn(&mut view);
    assert!(
        shown.contains("a?[2J_q1") && !shown.contains("slow_q1"),
        "{shown}"
    );

    view.learn(Err("it sleeps".to_owned()));
    let silent = drawn(&mut view);
    assert!(
        silent.contains("it sleeps") && !silent.contains("slow"),
        "{silent}"
    );
    view.learn(Ok(after));
    assert!(drawn(&mut view).contains("slow"));
}

#[test]
fn keys_ask_for_what_the_help_says() {
    let mut view = screen::View::new(&args("-i 1"));
    let mut wish = |code| view.take(&key(code));
    assert!(matches!(wish(KeyCode::Char('q')), screen::Wish::End));
    assert!(matches!(wish(KeyCode::Esc), screen::Wish::End));
    assert!(matches!(wish(KeyCode::Char('+')), screen::Wish::Pace));
    assert!(matches!(wish(KeyCode::Char(' ')), screen::Wish::Refresh));
    assert!(matches!(wish(KeyCode::Char('x')), screen::Wish::Nothing));
    let control = |code| Event::Key(KeyEvent::new(KeyCode::Char(code), KeyModifiers::CONTROL));
    assert!(matches!(view.take(&control('c')), screen::Wish::End));
    assert!(matches!(view.take(&control('l')), screen::Wish::Redraw));
    // Held, it takes in nothing.
    view.learn(Ok(two_devices().0));
    let shown = drawn(&mut view);
    assert!(
        shown.contains("every 2 s") && shown.contains("paused") && shown.contains("connecting"),
        "{shown}"
    );
}

#[test]
fn screens_too_small_for_anything_are_no_reason_to_end() {
    let (before, after) = two_devices();
    let mut view = screen::View::new(&args(""));
    view.learn(Ok(before));
    view.learn(Ok(after));
    for (width, height) in [(1, 1), (5, 2), (20, 4), (300, 5)] {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
    }
}

#[test]
fn intervals_have_limits() {
    for bad in ["0", "0.05", "3601", "nan", "soon", "-1"] {
        assert!(parse_interval(bad).is_err(), "{bad}");
    }
    assert_eq!(parse_interval("0.1"), Ok(SHORTEST));
}

#[test]
fn the_feed_goes_on_after_a_refusal_a_lost_connection_and_nonsense() {
    let path = std::env::temp_dir().join(format!("ferry-top-{}.sock", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    // One connection answers the first two requests and is closed on the third; the next answers two more.
    let server = std::thread::spawn(move || {
        let answers = [
            vec![
                json!({"result": {"pid": 1}}),
                json!({"error": {"code": -19, "message": "no data plane"}}),
            ],
            vec![json!({"result": "what?"})],
            vec![json!({"result": {"pid": 2}})],
        ];
        for answers in answers {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream);
            for mut answer in answers {
                let request = reader.fill_buf().unwrap();
                let length = request.len();
                answer["id"] = serde_json::from_slice::<Value>(request).unwrap()["id"].clone();
                reader.consume(length);
                writeln!(reader.get_mut(), "{answer}").unwrap();
            }
            let _ = reader.fill_buf();
        }
    });
    let (learns, learnt) = channel();
    let second = Duration::from_secs(60);
    let feed = Feed::start(&path, second, second, move |one| learns.send(one).is_ok()).unwrap();
    let next = || {
        let one: Learnt = learnt.recv().unwrap();
        feed.now();
        one.map(|sample| sample.counters.pid)
    };
    assert_eq!(next(), Ok(1));
    assert_eq!(
        next(),
        Err("ferry_get_counters is refused: no data plane".to_owned())
    );
    assert!(next().unwrap_err().contains("closed the connection"));
    assert!(next().unwrap_err().contains("something else"));
    assert_eq!(next(), Ok(2));
    drop(feed);
    server.join().unwrap();
    std::fs::remove_file(&path).unwrap();
}
