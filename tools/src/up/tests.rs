use std::ffi::OsString;
use std::os::unix::net::UnixListener;

use clap::Parser;

use super::options::ControlFile;
use super::process::Backoff;
use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn parse(words: &[&str]) -> Args {
    Cli::try_parse_from([&["up"], words].concat())
        .map(|cli| cli.args)
        .unwrap_or_else(|error| panic!("{error}"))
}

fn words(line: Vec<OsString>) -> Vec<String> {
    line.into_iter()
        .map(|word| word.into_string().unwrap_or_default())
        .collect()
}

#[test]
fn each_process_gets_its_own_flags() {
    let args = parse(&[
        "-m",
        "[0,1]",
        "-s",
        "512",
        "--no-huge",
        "--run-dir",
        "/r",
        "--platform",
        "/p",
        "--poll",
        "busy",
        "-r",
        "/s",
        "--json",
        "/j",
        "--json-ignore-init-errors",
        "--wait-for-rpc",
        "--rpcs-allowed",
        "a,b",
        "--init-conf",
        "/i",
        "--state-dir",
        "/var/lib/f",
        "--no-autosave",
        "--socket-mode",
        "660",
        "--socket-group",
        "ops",
        "--allow",
        "ops:*",
        "--allow=7:spdk_get_version",
    ]);
    let dataplane = words(args.for_dataplane(Some(65534)));
    let expected = [
        "--cpumask=[0,1]",
        "--mem-size=512",
        "--no-huge",
        "--run-dir=/r",
        "--platform=/p",
        "--poll=busy",
        "--control-uid=65534",
    ];
    assert_eq!(dataplane, expected);
    let controlplane = words(args.for_controlplane());
    let expected = [
        "--run-dir=/r",
        "--rpc-socket=/s",
        "--json-ignore-init-errors",
        "--wait-for-rpc",
        "--rpcs-allowed=a,b",
        "--state-dir=/var/lib/f",
        "--no-autosave",
        "--socket-mode=660",
        "--socket-group=ops",
        "--allow=ops:*",
        "--allow=7:spdk_get_version",
    ];
    assert_eq!(controlplane, expected);
    let files = [
        ControlFile::Config("/j".into()),
        ControlFile::InitConf("/i".into()),
    ];
    assert_eq!(args.files_of_controlplane(), files);
}

#[test]
fn without_flags_the_defaults_are_spelt_out() {
    let args = Args::default();
    assert_eq!(words(args.for_dataplane(None)), ["--run-dir=/run/ferry"]);
    assert_eq!(
        words(args.for_controlplane()),
        ["--run-dir=/run/ferry", "--rpc-socket=/var/tmp/spdk.sock"]
    );
}

#[test]
fn app_args_add_to_the_command_line_which_wins() {
    let args = parse(&["-m", "0x1"])
        .with_app_args(Some("-m 0x3 --platform '/a b' --wait-for-rpc"))
        .unwrap();
    assert_eq!(args.cpumask.as_deref(), Some("0x1"));
    assert_eq!(args.platform, Some("/a b".into()));
    assert!(args.wait_for_rpc);
    let none = parse(&["-m", "0x1"]);
    assert_eq!(none.clone().with_app_args(Some("  ")).unwrap(), none);
}

#[test]
fn app_args_that_are_not_understood_are_quoted_in_the_error() {
    for text in ["--nonsense", "-m 'open", "stray"] {
        let error = Args::default()
            .with_app_args(Some(text))
            .map(|_| ())
            .unwrap_err();
        assert!(format!("{error:#}").contains(text), "{error:#}");
    }
}

#[test]
fn delays_double_up_to_a_limit_and_begin_again_after_a_long_life() {
    let mut backoff = Backoff::default();
    let mut after = |ms| backoff.after(Duration::from_millis(ms)).as_millis();
    let delays: Vec<u128> = (0..28).map(|_| after(50)).collect();
    let growing = [100, 200, 400, 800, 1600, 3200, 5000, 5000];
    assert_eq!(delays, [&[0; 20][..], &growing].concat());
    assert_eq!(after(600), 0);
    assert_eq!(after(100), 0);
}

#[test]
fn any_whole_response_counts_as_an_answer() {
    assert!(probe::is_answer(br#"{"jsonrpc":"2.0","id":1,"result":{}}"#));
    assert!(probe::is_answer(
        br#"{"jsonrpc":"2.0","id":1,"error":{"code":-32601}}"#
    ));
    assert!(!probe::is_answer(br#"{"jsonrpc":"2.0","id":1,"res"#));
    assert!(!probe::is_answer(br#"{"id":2}"#));
}

/// A directory of its own, removed at the end.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let path = env::temp_dir().join(format!("ferry-up-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(path.join("pci")).unwrap();
        Dir(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn only_sockets_that_nobody_serves_are_removed() {
    let dir = Dir::new("clean");
    let stale = [
        dir.0.join("rpc.sock"),
        dir.0.join("dataplane.sock"),
        dir.0.join("pci/v.sock"),
    ];
    for path in &stale {
        drop(UnixListener::bind(path).unwrap());
    }
    std::fs::write(dir.0.join("rpc.sock.lock"), "").unwrap();
    std::fs::write(dir.0.join("pci/notes.sock"), "").unwrap();
    sockets::clean(&dir.0, &stale[0]);
    assert!(stale.iter().all(|path| !path.exists()));
    assert!(!dir.0.join("rpc.sock.lock").exists());
    assert!(dir.0.join("pci/notes.sock").exists());

    let _served = UnixListener::bind(&stale[0]).unwrap();
    sockets::clean_rpc(&stale[0]);
    assert!(stale[0].exists());
}
