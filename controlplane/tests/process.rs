//! The control plane as a process: its files, its signals, its initial configuration.

use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command as Process;
use std::process::ExitStatus;
use std::process::Stdio;

use ferry_shared::handshake::Channel;
use ferry_shared::handshake::server::Accepted;
use ferry_shared::handshake::server::Listener;
use ferry_shared::msg::Attach;
use ferry_shared::msg::Command;
use ferry_shared::msg::Function;
use ferry_shared::msg::Item;
use ferry_shared::msg::Manager;
use ferry_shared::msg::PlugState;
use ferry_shared::msg::Reply;
use ferry_shared::msg::ToControlplane;
use ferry_shared::msg::ToDataplane;
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::PollTimeout;
use nix::poll::poll;
use nix::sys::signal::Signal;
use nix::sys::signal::kill;
use nix::unistd::Pid;

const VUID: &str = "MT2251XZ02WZVFSS0D0F3";

/// A fresh directory, removed with the value.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let path =
            std::env::temp_dir().join(format!("ferry-process-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Directory(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A running control plane, killed with the value.
struct Controlplane {
    child: Child,
    messages: BufReader<std::process::ChildStderr>,
}

impl Controlplane {
    fn start(directory: &Directory, args: &[&str], script: Option<&Path>) -> Controlplane {
        let mut process = Process::new(env!("CARGO_BIN_EXE_ferry-controlplane"));
        process
            .arg("-r")
            .arg(directory.path("rpc.sock"))
            .arg("--run-dir")
            .arg(directory.path("run"))
            .args(args);
        process
            .env_remove("SPDK_RPC_INIT_CONF_JSON")
            .env_remove("RUST_LOG")
            .env("NO_COLOR", "1");
        match script {
            Some(script) => process.env("SPDK_RPC_INIT_CONF", script),
            None => process.env_remove("SPDK_RPC_INIT_CONF"),
        };
        let mut child = process.stderr(Stdio::piped()).spawn().unwrap();
        let messages = BufReader::new(child.stderr.take().unwrap());
        Controlplane { child, messages }
    }

    /// Reads messages up to one that contains `text`.
    fn says(&mut self, text: &str) {
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            assert!(
                self.messages.read_line(&mut line).unwrap() > 0,
                "it has never said {text:?}"
            );
        }
    }

    /// Everything that it says until it ends, and how it ends.
    fn end(mut self) -> (String, ExitStatus) {
        let mut all = String::new();
        self.messages.read_to_string(&mut all).unwrap();
        (all, self.child.wait().unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }
}

impl Drop for Controlplane {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ask(directory: &Directory, request: &str) -> String {
    let mut stream = UnixStream::connect(directory.path("rpc.sock")).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line
}

fn wait(fd: &impl AsFd) {
    poll(
        &mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)],
        PollTimeout::NONE,
    )
    .unwrap();
}

fn accept(listener: &mut Listener) -> Channel {
    loop {
        if let Some(Accepted::Channel(channel)) = listener.accept().unwrap() {
            return channel;
        }
        wait(listener);
    }
}

/// A data plane with one function: agrees to everything until `last` commands have come, snapshots apart.
fn agree(channel: &mut Channel, last: usize) -> Vec<Command> {
    let mut commands = Vec::new();
    loop {
        while let Some(ToDataplane { seq, command }) = channel.recv().unwrap() {
            let result = match command {
                Command::Snapshot { .. } => Ok(Reply::Snapshot {
                    items: platform(),
                    next: None,
                }),
                command => {
                    commands.push(command);
                    Ok(Reply::Done)
                }
            };
            channel
                .send(&ToControlplane::Completion { seq, result })
                .unwrap();
        }
        if commands.len() >= last {
            return commands;
        }
        if channel.prepare_sleep().unwrap() {
            wait(channel);
            channel.wake().unwrap();
        }
    }
}

fn platform() -> Vec<Item> {
    let function = Function {
        manager: "mlx5_0".to_owned(),
        vuid: VUID.to_owned(),
        pci_address: "0000:29:00.2".to_owned(),
        port: None,
        plug: PlugState::PowerOn,
        socket: "/run/ferry/pci/f.sock".to_owned(),
    };
    vec![
        Item::Manager(Manager {
            name: "mlx5_0".to_owned(),
            hotplug_ports: 0,
            host_link: None,
        }),
        Item::Function(function),
    ]
}

#[test]
fn it_serves_without_a_data_plane_and_leaves_nothing_when_asked_to_end() {
    let directory = Directory::new("signals");
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut controlplane = Controlplane::start(&directory, &[], None);
        controlplane.says("serving RPC");
        assert!(
            ask(&directory, r#"{"id":1,"method":"spdk_get_version"}"#)
                .contains("\"version\":\"Ferry v")
        );
        let refused = ask(
            &directory,
            r#"{"id":1,"method":"virtio_fs_doca_get_possible_managers"}"#,
        );
        assert!(
            refused.contains("\"code\":-19") && refused.contains("dataplane.sock"),
            "{refused}"
        );
        controlplane.signal(signal);
        let (_, status) = controlplane.end();
        assert!(status.success(), "{signal}: {status}");
        assert_eq!(std::fs::read_dir(&directory.0).unwrap().count(), 0);
    }
}

#[test]
fn a_request_can_ask_it_to_end() {
    let directory = Directory::new("kill");
    let mut controlplane = Controlplane::start(&directory, &[], None);
    controlplane.says("serving RPC");
    let unknown = ask(
        &directory,
        r#"{"id":1,"method":"spdk_kill_instance","params":{"sig_name":"BOGUS"}}"#,
    );
    assert!(
        unknown.contains("-32602") && unknown.contains("Invalid parameters"),
        "{unknown}"
    );
    let done = ask(
        &directory,
        r#"{"id":1,"method":"spdk_kill_instance","params":{"sig_name":"15"}}"#,
    );
    assert!(done.contains("\"result\":true"), "{done}");
    let code = controlplane.end().1.code();
    assert_eq!(code, Some(i32::from(ferry_shared::EXIT_ASKED)));
}

#[test]
fn a_second_one_on_the_same_socket_says_so_and_ends() {
    let directory = Directory::new("second");
    let mut first = Controlplane::start(&directory, &[], None);
    first.says("serving RPC");
    let (messages, status) = Controlplane::start(&directory, &[], None).end();
    assert_eq!(status.code(), Some(1));
    assert!(
        messages.contains("rpc.sock is in use by another process"),
        "{messages}"
    );
    assert!(
        ask(&directory, r#"{"id":1,"method":"spdk_get_version"}"#).contains("result"),
        "the first one is disturbed"
    );
}

#[test]
fn an_unusable_configuration_is_named() {
    let directory = Directory::new("unusable");
    let missing = directory.path("missing.json");
    let broken = directory.write("broken.json", "{\"subsystems\": 5}");
    for (file, says) in [(missing, "cannot read"), (broken, "subsystems")] {
        let name = file.to_str().unwrap();
        let (messages, status) = Controlplane::start(&directory, &["-c", name], None).end();
        assert_eq!(status.code(), Some(1));
        assert!(
            messages.contains(name) && messages.contains(says),
            "{messages}"
        );
    }
}

#[test]
fn the_guides_init_script_runs_as_printed_once_the_data_plane_is_there() {
    let directory = Directory::new("script");
    let script = directory.write(
        "spdk_rpc_init.conf",
        r#"fsdev_aio_create aio0 /etc/virtiofs/test
virtio_fs_transport_create -t DOCA
virtio_fs_transport_start -t DOCA
virtio_fs_device_create --transport-name DOCA --dev-name
vfsdev0 --tag docatag --fsdev aio0 --num-request-queues
1 --queue-size 32 --driver-platform x86_64
virtio_fs_doca_device_modify --dev-name vfsdev0 --
manager mlx5_0 --vuid "MT2251XZ02WZVFSS0D0F3"
virtio_fs_device_start --dev-name vfsdev0
"#,
    );
    let mut controlplane = Controlplane::start(&directory, &[], Some(&script));
    controlplane.says("serving RPC");
    let mut listener = Listener::bind(&directory.path("run"), None).unwrap();
    let mut channel = accept(&mut listener);
    let commands = agree(&mut channel, 2);
    let Command::DeviceStart(device) = &commands[1] else {
        panic!("{commands:?}")
    };
    assert_eq!(
        device.attach,
        Attach::Doca {
            manager: "mlx5_0".to_owned(),
            vuid: VUID.to_owned()
        }
    );
    assert_eq!((device.tag.as_str(), device.queue_size), ("docatag", 32));
    assert!(
        ask(&directory, r#"{"id":1,"method":"framework_wait_init"}"#).contains("\"result\":true")
    );
    assert!(
        ask(&directory, r#"{"id":1,"method":"virtio_fs_get_devices"}"#)
            .contains("\"state\":\"running\"")
    );
}

#[test]
fn a_saved_configuration_is_fatal_when_it_fails_unless_failures_are_ignored() {
    let directory = Directory::new("json");
    let saved = r#"{"subsystems":[{"subsystem":"fsdev","config":[
        {"method":"nosuch"}, {"method":"fsdev_null_create","params":{"name":"n"}}]}]}"#;
    let file = directory.write("saved.json", saved);
    let file = file.to_str().unwrap();
    let mut listener = Listener::bind(&directory.path("run"), None).unwrap();

    let controlplane = Controlplane::start(&directory, &["--json", file], None);
    let mut channel = accept(&mut listener);
    let serve = std::thread::spawn(move || {
        // Only the snapshot comes; the control plane then ends.
        while let Ok(Some(ToDataplane { seq, .. })) = receive(&mut channel) {
            let reply = Reply::Snapshot {
                items: platform(),
                next: None,
            };
            channel
                .send(&ToControlplane::Completion {
                    seq,
                    result: Ok(reply),
                })
                .unwrap();
        }
    });
    let (messages, status) = controlplane.end();
    serve.join().unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(
        messages.contains("nosuch") && messages.contains("--json-ignore-init-errors"),
        "{messages}"
    );

    let _ignoring =
        Controlplane::start(&directory, &["-c", file, "--json-ignore-init-errors"], None);
    let mut channel = accept(&mut listener);
    assert!(
        matches!(&agree(&mut channel, 1)[..], [Command::FsdevCreate(fsdev)] if fsdev.name == "n")
    );
}

/// The next command; `None` when the control plane has gone.
fn receive(channel: &mut Channel) -> Result<Option<ToDataplane>, ferry_shared::ring::RecvError> {
    loop {
        if let Some(message) = channel.recv()? {
            return Ok(Some(message));
        }
        if channel.prepare_sleep()? {
            wait(channel);
            if channel.wake().is_err() {
                return Ok(None);
            }
        }
    }
}

/// A control plane that keeps its state, and the first `last` commands that a data plane gets from it.
fn start_with_state(
    directory: &Directory,
    more: &[&str],
    last: usize,
) -> (Controlplane, Channel, Vec<Command>) {
    let state = directory.path("state");
    let mut args = vec!["--state-dir", state.to_str().unwrap()];
    args.extend(more);
    let mut listener = Listener::bind(&directory.path("run"), None).unwrap();
    let controlplane = Controlplane::start(directory, &args, None);
    let mut channel = accept(&mut listener);
    let commands = agree(&mut channel, last);
    (controlplane, channel, commands)
}

const BRING_UP: &str = r#"{"subsystems":[{"subsystem":"virtio_fs","config":[
    {"method":"fsdev_aio_create","params":{"name":"aio0","root_path":"/srv","enable_xattr":true}},
    {"method":"virtio_fs_transport_create","params":{"transport_name":"VHOST_USER"}},
    {"method":"virtio_fs_transport_start","params":{"transport_name":"VHOST_USER"}},
    {"method":"virtio_fs_device_create","params":{"transport_name":"VHOST_USER","dev_name":"idle"}},
    {"method":"virtio_fs_device_create","params":
        {"transport_name":"VHOST_USER","dev_name":"d","tag":"t","fsdev":"aio0","queue_size":16}},
    {"method":"virtio_fs_device_start","params":{"dev_name":"d"}}]}]}"#;

#[test]
fn what_was_acknowledged_is_there_again_after_both_processes_were_killed() {
    let directory = Directory::new("state");
    let file = directory.write("saved.json", BRING_UP);
    let (mut first, _channel, commands) =
        start_with_state(&directory, &["-c", file.to_str().unwrap()], 2);
    first.says("serving RPC");
    assert!(
        ask(&directory, r#"{"id":1,"method":"framework_wait_init"}"#).contains("true"),
        "not ready"
    );
    let devices = r#"{"id":1,"method":"virtio_fs_get_devices"}"#;
    let before = ask(&directory, devices);
    assert!(before.contains("\"state\":\"running\"") && before.contains("\"idle\""));
    first.signal(Signal::SIGKILL);
    drop(first);

    let (mut second, _channel, again) = start_with_state(&directory, &[], 2);
    assert_eq!(again, commands);
    second.says("serving RPC");
    assert_eq!(ask(&directory, devices), before);

    // The same configuration once more: everything is there already.
    drop(second);
    let (mut third, _channel, again) =
        start_with_state(&directory, &["-c", file.to_str().unwrap()], 2);
    assert_eq!(again, commands);
    third.says("serving RPC");
    assert!(
        ask(&directory, r#"{"id":1,"method":"framework_wait_init"}"#).contains("true"),
        "not ready"
    );
    assert_eq!(ask(&directory, devices), before);
}

#[test]
fn a_damaged_state_is_refused_and_left_alone() {
    let directory = Directory::new("damaged");
    let state = directory.path("state");
    std::fs::create_dir(&state).unwrap();
    let (file, content) = (state.join("state"), "ferry-state 1 400 0123abcd\n{\"opt");
    std::fs::write(&file, content).unwrap();
    let args = ["--state-dir", state.to_str().unwrap()];
    let (messages, status) = Controlplane::start(&directory, &args, None).end();
    assert_eq!(status.code(), Some(1));
    assert!(
        messages.contains(file.to_str().unwrap()) && messages.contains("is damaged"),
        "{messages}"
    );
    assert_eq!(std::fs::read_to_string(&file).unwrap(), content);
    assert!(!directory.path("rpc.sock").exists());
}

#[test]
fn without_autosave_the_state_is_read_and_not_written() {
    let directory = Directory::new("autosave");
    let file = directory.write("saved.json", BRING_UP);
    let (mut first, _channel, commands) =
        start_with_state(&directory, &["-c", file.to_str().unwrap()], 2);
    first.says("serving RPC");
    ask(&directory, r#"{"id":1,"method":"framework_wait_init"}"#);
    drop(first);
    let state = directory.path("state").join("state");
    let kept = std::fs::read(&state).unwrap();
    let (mut second, _channel, again) = start_with_state(&directory, &["--no-autosave"], 2);
    assert_eq!(again, commands);
    second.says("serving RPC");
    let options = r#"{"id":1,"method":"fsdev_set_opts","params":{"fsdev_io_pool_size":7000,"fsdev_io_cache_size":7}}"#;
    assert!(ask(&directory, options).contains("\"result\":true"));
    drop(second);
    assert_eq!(std::fs::read(&state).unwrap(), kept);
}

#[test]
fn a_change_that_cannot_be_kept_is_not_acknowledged() {
    let directory = Directory::new("full");
    let state = directory.path("state");
    let args = ["--state-dir", state.to_str().unwrap()];
    let mut controlplane = Controlplane::start(&directory, &args, None);
    controlplane.says("serving RPC");
    std::fs::create_dir(state.join("state.tmp")).unwrap();
    let create =
        r#"{"id":1,"method":"virtio_fs_transport_create","params":{"transport_name":"DOCA"}}"#;
    let refused = ask(&directory, create);
    assert!(
        refused.contains("\"code\":-5") && refused.contains("cannot write"),
        "{refused}"
    );
    std::fs::remove_dir(state.join("state.tmp")).unwrap();
    // Any request that comes next makes up for it.
    ask(&directory, create);
    assert!(
        std::fs::read_to_string(state.join("state"))
            .unwrap()
            .contains("DOCA")
    );
}

/// Set in the environment of a copy of this program that is to be a client.
const CLIENT: &str = "FERRY_TEST_CLIENT_OF";

/// Asks as another user: a copy of this very test program, which finds the socket in its environment.
fn ask_as(directory: &Directory, uid: u32, gid: u32, request: &str) -> String {
    let copy = directory.path("client");
    if !copy.exists() {
        std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&copy, open.clone()).unwrap();
        std::fs::set_permissions(&directory.0, open).unwrap();
    }
    let output = Process::new(&copy)
        .args(["--exact", "members_of_a_group_may_call_what_its_rule_names"])
        .arg("--nocapture")
        .env(CLIENT, directory.path("rpc.sock"))
        .env("FERRY_TEST_REQUEST", request)
        .current_dir("/")
        .uid(uid)
        .gid(gid)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn members_of_a_group_may_call_what_its_rule_names() {
    if let Some(socket) = std::env::var_os(CLIENT) {
        match UnixStream::connect(socket) {
            Err(error) => println!("no connection: {error}"),
            Ok(mut stream) => {
                let request = std::env::var("FERRY_TEST_REQUEST").unwrap();
                stream.write_all(request.as_bytes()).unwrap();
                let mut line = String::new();
                BufReader::new(stream).read_line(&mut line).unwrap();
                println!("{line}");
            }
        }
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIP only root can be several users");
        return;
    }
    let directory = Directory::new("groups");
    let args = [
        "--socket-group=54321",
        "--socket-mode=660",
        "--allow=54321:rpc_get_methods,spdk_get_version",
        "--allow=54322:*",
    ];
    let mut controlplane = Controlplane::start(&directory, &args, None);
    controlplane.says("serving RPC");
    let socket = std::fs::metadata(directory.path("rpc.sock")).unwrap();
    assert_eq!((socket.gid(), socket.mode() & 0o777), (54_321, 0o660));

    let version = r#"{"id":1,"method":"spdk_get_version"}"#;
    let devices = r#"{"id":1,"method":"virtio_fs_get_devices"}"#;
    let unknown = r#"{"id":1,"method":"bogus"}"#;
    let member = |request| ask_as(&directory, 12_345, 54_321, request);
    assert!(member(version).contains("Ferry v"));
    controlplane.says("uid=12345");
    let refused = member(devices);
    assert!(
        refused.contains("\"code\":-13") && refused.contains("virtio_fs_get_devices"),
        "{refused}"
    );
    assert!(member(unknown).contains("-32601"));
    let stranger = ask_as(&directory, 12_345, 54_323, version);
    assert!(stranger.contains("no connection"), "{stranger}");
    assert!(ask(&directory, devices).contains("\"result\":[]"), "root");
}
