//! `ferry up` with two stand-ins for the processes that it supervises.

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Lines};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

/// A running `ferry up` in a directory of its own, which goes away with it.
struct Service {
    dir: PathBuf,
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    stderr: Lines<BufReader<ChildStderr>>,
}

impl Service {
    fn start(name: &str, args: &[&str], env: &[(&str, &str)]) -> Service {
        let dir = std::env::temp_dir().join(format!("ferry-up-it-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        // The control plane is another user.
        fs::set_permissions(&dir, Permissions::from_mode(0o1777)).unwrap();
        let ferry = dir.join("ferry");
        let fakes = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fakes");
        // By another process: a child that a test starts meanwhile would keep a program that this one writes busy.
        let copied = Command::new("install")
            .args(["-m", "755", env!("CARGO_BIN_EXE_ferry")])
            .args(["ferry-dataplane", "ferry-controlplane"].map(|name| fakes.join(name)))
            .arg(&dir)
            .status();
        assert!(copied.unwrap().success());
        fs::create_dir(dir.join("secret")).unwrap();
        fs::set_permissions(dir.join("secret"), Permissions::from_mode(0o700)).unwrap();
        fs::write(dir.join("secret/init.conf"), "first line").unwrap();
        let mut child = Command::new(&ferry)
            .current_dir(&dir)
            .arg("up")
            .args(if args.contains(&"--run-dir") {
                vec![]
            } else {
                vec!["--run-dir".into(), dir.join("run")]
            })
            .args(args)
            .arg("--rpc-socket")
            .arg(dir.join("rpc.sock"))
            .env_remove("APP_ARGS")
            .env("FAKE_DIR", &dir)
            .envs(env.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap()).lines();
        let stderr = BufReader::new(child.stderr.take().unwrap()).lines();
        Service {
            dir,
            child,
            stdout,
            stderr,
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// The next message that begins so, without that beginning.
    fn message(&mut self, start: &str) -> String {
        for line in &mut self.stderr {
            if let Some(rest) = line.unwrap().strip_prefix(start) {
                return rest.to_string();
            }
        }
        panic!("no message {start:?}")
    }

    /// The process id in the next message that one of the processes has started.
    fn started(&mut self, name: &str) -> Pid {
        let rest = self.message(&format!("{name}: started "));
        Pid::from_raw(rest.split(' ').next().unwrap().parse().unwrap())
    }

    fn ready(&mut self) -> String {
        self.stdout.next().unwrap().unwrap()
    }

    /// Waits for the end; gives the exit code and the messages that are left.
    fn end(&mut self) -> (Option<i32>, Vec<String>) {
        let code = self.child.wait().unwrap().code();
        (code, (&mut self.stderr).map(Result::unwrap).collect())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

#[test]
fn it_says_ready_once_and_stops_the_control_plane_first() {
    let mut service = Service::start(
        "stop",
        &["-m", "0x3"],
        &[("APP_ARGS", "--no-huge --wait-for-rpc")],
    );
    let dir = service.dir.display().to_string();
    assert_eq!(
        service.ready(),
        format!("READY rpc={dir}/rpc.sock run-dir={dir}/run")
    );
    service.signal(Signal::SIGINT);
    let (code, messages) = service.end();
    assert_eq!(code, Some(0), "{messages:?}");
    let has = |text: &str| messages.iter().position(|line| line.contains(text));
    let control = has("controlplane: stopping").unwrap();
    assert!(
        has("dataplane: stopping").unwrap() > control,
        "{messages:?}"
    );
    assert!(
        has("--cpumask=0x3 --no-huge --run-dir=").is_some(),
        "{messages:?}"
    );
    assert!(has("--wait-for-rpc").is_some(), "{messages:?}");
    assert!(!service.dir.join("rpc.sock").exists());
    assert!(!service.dir.join("run/dataplane.sock").exists());
    assert!(service.stdout.next().is_none());
}

#[test]
fn a_control_plane_that_dies_is_replaced_and_the_data_plane_goes_on() {
    let mut service = Service::start("control", &[], &[]);
    let first = service.started("controlplane");
    service.ready();
    kill(first, Signal::SIGKILL).unwrap();
    assert!(
        service
            .message("up: ferry-controlplane: ended")
            .contains("starts again")
    );
    assert_ne!(service.started("controlplane"), first);
    service.signal(Signal::SIGTERM);
    let (code, messages) = service.end();
    assert_eq!(code, Some(0));
    assert!(
        !messages
            .iter()
            .any(|line| line.starts_with("dataplane: started")),
        "{messages:?}"
    );
}

#[test]
fn a_data_plane_that_dies_is_replaced_and_the_control_plane_goes_on() {
    let mut service = Service::start("data", &[], &[]);
    let first = service.started("dataplane");
    service.ready();
    kill(first, Signal::SIGSEGV).unwrap();
    assert_ne!(service.started("dataplane"), first);
    service.signal(Signal::SIGTERM);
    let (code, messages) = service.end();
    assert_eq!(code, Some(0));
    assert!(
        !messages
            .iter()
            .any(|line| line.starts_with("controlplane: started")),
        "{messages:?}"
    );
}

#[test]
fn a_process_that_fails_at_the_start_ends_everything() {
    let mut service = Service::start("fail", &[], &[("FAKE_FAIL", "1")]);
    let (code, messages) = service.end();
    assert_eq!(code, Some(1));
    assert!(
        messages
            .iter()
            .any(|line| line == "dataplane: no hugepages"),
        "{messages:?}"
    );
    let last = messages.last().unwrap();
    assert!(
        last.contains("ferry-dataplane has ended (exit status: 3) before the service was ready"),
        "{last}"
    );
    assert!(!service.dir.join("rpc.sock").exists());
    assert!(service.stdout.next().is_none());
}

#[test]
fn a_second_request_to_stop_kills_what_does_not_end() {
    let mut service = Service::start("stubborn", &[], &[("FAKE_STUBBORN", "1")]);
    service.ready();
    service.signal(Signal::SIGTERM);
    service.message("controlplane: not stopping");
    service.signal(Signal::SIGTERM);
    let (code, messages) = service.end();
    assert_eq!(code, Some(0));
    assert!(
        messages.iter().any(|line| line.contains("is killed")),
        "{messages:?}"
    );
    assert!(!service.dir.join("rpc.sock").exists());
}

#[test]
fn when_it_is_killed_nothing_stays_behind() {
    let mut service = Service::start("killed", &[], &[]);
    service.ready();
    service.signal(Signal::SIGKILL);
    service.child.wait().unwrap();
    for name in ["dataplane.lock", "controlplane.lock"] {
        // Held by the process as long as it lives.
        let file = File::open(service.dir.join(name)).unwrap();
        assert!(Flock::lock(file, FlockArg::LockExclusive).is_ok());
    }
}

#[test]
fn root_starts_the_control_plane_as_nobody_who_can_still_read_its_script() {
    if !geteuid().is_root() {
        assert!(
            std::env::var_os("REQUIRE_ALL").is_none(),
            "this test needs root"
        );
        eprintln!("SKIP the control plane as nobody: needs root");
        return;
    }
    let mut service = Service::start("nobody", &["--init-conf", "secret/init.conf"], &[]);
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    assert!(
        service
            .message("up: ferry-controlplane: user nobody cannot reach")
            .contains("/proc/self/fd/")
    );
    let uid = format!(" uid {} ", nobody.uid);
    assert!(service.message("controlplane: started").contains(&uid));
    assert_eq!(service.message("controlplane: script "), "first line");
    service.ready();
    service.signal(Signal::SIGTERM);
    assert_eq!(service.end().0, Some(0));
}

#[test]
fn a_run_directory_that_the_control_plane_cannot_reach_is_refused() {
    if !geteuid().is_root() {
        assert!(
            std::env::var_os("REQUIRE_ALL").is_none(),
            "this test needs root"
        );
        eprintln!("SKIP a run directory out of reach: needs root");
        return;
    }
    let mut service = Service::start("reach", &["--run-dir", "secret/run"], &[]);
    let (code, messages) = service.end();
    assert_eq!(code, Some(1));
    assert!(
        messages[0].contains("user nobody cannot reach run directory secret/run"),
        "{messages:?}"
    );
}

#[test]
fn a_missing_configuration_is_named() {
    let mut service = Service::start("missing", &["--json", "/nowhere/a.json"], &[]);
    let (code, messages) = service.end();
    assert_eq!(code, Some(1));
    assert!(
        messages.last().unwrap().contains("/nowhere/a.json"),
        "{messages:?}"
    );
}
