//! `ferry mount` as a program, against devices that the tests play. Mounting needs root and `/dev/fuse`.

mod fake;

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::JoinHandle;

use fake::{Device as Fake, Log, Scratch, files};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

type Serve = fn(&Path, Fake, Log) -> JoinHandle<()>;
const BOTH: [(&str, Serve); 2] = [
    ("vhost-user", fake::vhost_user::serve),
    ("vfio-user", fake::vfio_user::serve),
];

/// Whether mounting is possible here. Says so when not, and fails where nothing may be skipped.
fn can_mount() -> bool {
    let reason = if !nix::unistd::geteuid().is_root() {
        "not root"
    } else if fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .is_err()
    {
        "no /dev/fuse"
    } else {
        return true;
    };
    assert!(std::env::var_os("REQUIRE_ALL").is_none(), "{reason}");
    eprintln!("SKIP mounting: {reason}");
    false
}

/// A mount by the program, of a device with one file.
struct Mounted {
    program: Child,
    dir: PathBuf,
    server: Option<JoinHandle<()>>,
    log: Log,
    _scratch: Scratch,
}

impl Mounted {
    fn new(name: &str, protocol: &str, serve: Serve) -> Mounted {
        let scratch = Scratch::new(&format!("mount-{name}-{protocol}"));
        let socket = scratch.0.join("socket");
        let dir = scratch.0.join("dir");
        fs::create_dir(&dir).expect("a directory");
        let log = Log::default();
        let fake = Fake {
            answer: files::answer,
            ..Fake::default()
        };
        let server = serve(&socket, fake, log.clone());
        let mut program = ferry()
            .args(["--transport", protocol])
            .args([&socket, &dir])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut line = String::new();
        let stdout = program.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        assert_eq!(line, format!("mounted fake at {}\n", dir.display()));
        Mounted {
            program,
            dir,
            server: Some(server),
            log,
            _scratch: scratch,
        }
    }

    fn is_mounted(&self) -> bool {
        let parent = self.dir.parent().expect("it has one");
        let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev());
        match (device(&self.dir), device(parent)) {
            (Ok(dir), Ok(parent)) => dir != parent,
            _ => true,
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.program.id()).expect("a pid");
        kill(Pid::from_raw(pid), signal).expect("the program runs");
    }

    /// Waits for the program's end; its success and what it said on standard error.
    fn end(&mut self) -> (bool, String) {
        let stderr = self.program.stderr.take().expect("piped");
        let text = std::io::read_to_string(BufReader::new(stderr)).expect("text");
        let status = self.program.wait().expect("the program ends");
        (status.success(), text)
    }

    fn join_server(&mut self) -> std::thread::Result<()> {
        self.server.take().expect("not joined yet").join()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

fn ferry() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferry"));
    command.arg("mount");
    command
}

#[test]
fn a_mounted_device_is_read_and_an_unmount_ends_the_program_and_resets_the_device() {
    if !can_mount() {
        return;
    }
    for (protocol, serve) in BOTH {
        let mut mount = Mounted::new("umount", protocol, serve);
        let file = mount.dir.join(files::NAME);
        assert_eq!(fs::read(&file).expect("the file"), files::CONTENT);
        let missing = fs::metadata(mount.dir.join("missing")).expect_err("no such file");
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        umount2(&mount.dir, MntFlags::empty()).expect("nobody uses it");
        assert_eq!(mount.end(), (true, String::new()));
        mount.join_server().expect("the device had no complaints");
        let reset = match protocol {
            "vhost-user" => "RESET_DEVICE",
            _ => "DEVICE_SET_IRQS 0 0",
        };
        assert!(
            mount.log.position(reset).is_some(),
            "{:?}",
            mount.log.lines()
        );
    }
}

#[test]
fn a_signal_unmounts_and_ends_well_even_when_the_mount_is_in_use() {
    if !can_mount() {
        return;
    }
    for (signal, busy) in [(Signal::SIGINT, false), (Signal::SIGTERM, true)] {
        let mut mount = Mounted::new(signal.as_str(), "vhost-user", BOTH[0].1);
        let open = busy.then(|| fs::File::open(mount.dir.join(files::NAME)).expect("the file"));
        mount.signal(signal);
        let (success, said) = mount.end();
        assert!(success, "{said}");
        assert_eq!(said.contains("was in use"), busy, "{said}");
        assert!(!mount.is_mounted());
        mount.join_server().expect("the device had no complaints");
        drop(open);
    }
}

#[test]
fn when_the_device_dies_requests_fail_and_the_mount_goes() {
    if !can_mount() {
        return;
    }
    for (protocol, serve) in BOTH {
        let mut mount = Mounted::new("dies", protocol, serve);
        fs::metadata(mount.dir.join(files::DEADLY)).expect_err("the device has died");
        let (success, said) = mount.end();
        assert!(!success);
        assert!(said.contains("the device has gone away"), "{said}");
        assert!(!mount.is_mounted());
        assert!(mount.join_server().is_err(), "it died");
    }
}

#[test]
fn a_device_that_refuses_the_session_leaves_no_mount() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new("mount-refused");
    let socket = scratch.0.join("socket");
    let fake = Fake {
        answer: files::refuse_everything,
        ..Fake::default()
    };
    let server = fake::vhost_user::serve(&socket, fake, Log::default());
    let said = refused(ferry().args([&socket, &scratch.0]));
    assert!(said.contains("refuses the session"), "{said}");
    server.join().expect("the device had no complaints");
    let device = |path: &Path| fs::metadata(path).expect("a directory").dev();
    assert_eq!(device(&scratch.0), device(&std::env::temp_dir()));
}

#[test]
fn a_function_is_found_by_its_tag_in_a_run_directory() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new("mount-tag");
    fs::create_dir(scratch.0.join("vhost")).expect("a directory");
    let other = Fake {
        tag: "other",
        ..Fake::default()
    };
    let servers = [("a", &other), ("b", &Fake::default())].map(|(name, fake)| {
        let socket = scratch.0.join("vhost").join(name);
        fake::vhost_user::serve(&socket, fake.clone(), Log::default())
    });
    let mut search = ferry();
    search.args(["--tag", "wrong", "--run-dir"]);
    search.args([&scratch.0, &scratch.0]);
    let said = refused(&mut search);
    assert!(said.contains("`wrong`"), "{said}");
    assert!(
        said.contains("`other`") && said.contains("`fake`"),
        "{said}"
    );
    for server in servers {
        server.join().expect("the device had no complaints");
    }
}

#[test]
fn wrong_command_lines_are_refused_with_what_is_wrong() {
    if !can_mount() {
        return;
    }
    let scratch = Scratch::new("mount-wrong");
    let file = scratch.0.join("file");
    fs::write(&file, "").expect("a file");
    let nothing = scratch.0.join("nothing");
    let dir = &scratch.0;
    let cases: [(&[&Path], &str); 4] = [
        (&[&nothing, dir], "there is no such socket"),
        (&[&file, dir], "nobody listens there"),
        (&[&nothing, &file], "it is not a directory"),
        (&[&file, &nothing], "there is no such directory"),
    ];
    for (paths, reason) in cases {
        let said = refused(ferry().args(paths));
        assert!(said.contains(reason), "{said}");
        assert!(said.contains(&dir.display().to_string()), "{said}");
    }
    let said = refused(ferry().arg(dir));
    assert!(said.contains("--tag"), "{said}");
}

/// Runs a command line that must fail; what it said.
fn refused(command: &mut Command) -> String {
    let Output { status, stderr, .. } = command.output().expect("the program starts");
    let said = String::from_utf8(stderr).expect("text");
    assert_eq!(status.code(), Some(1), "{said}");
    said
}
