use core::ops::Deref;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::path::PathBuf;
use std::rc::Rc;
use std::thread::JoinHandle;

use ferry_controlplane::app::App;
use ferry_controlplane::app::Phase;
use ferry_controlplane::dataplane::Link;
use ferry_controlplane::dataplane::Outcome;
use ferry_controlplane::server::Endpoint;
use ferry_shared::msg::Command;
use ferry_shared::msg::Function;
use ferry_shared::msg::Item;
use ferry_shared::msg::Manager;
use ferry_shared::msg::PlugState;
use ferry_shared::msg::Reply;
use tokio::sync::oneshot;
use tokio::task::LocalSet;

use super::*;

const VUID: &str = "MT2251XZ02WZVFSS0D0F3";

/// A data plane with one manager and one function that agrees to everything.
struct Agreeable;

impl Link for Agreeable {
    fn call(&self, command: Command) -> Outcome {
        let items = || {
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
        };
        let reply = match command {
            Command::Snapshot { .. } => Reply::Snapshot {
                items: items(),
                next: None,
            },
            _ => Reply::Done,
        };
        Box::pin(async move { Ok(reply) })
    }
}

/// A control plane in a thread, on a socket in a directory of its own.
struct Service {
    directory: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    fn start(name: &str, wait_for_rpc: bool) -> Service {
        let directory = directory(name);
        let (stop, stopped) = oneshot::channel::<()>();
        let endpoint = Endpoint::bind(&directory.join("rpc.sock"), 0o600, None).unwrap();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            LocalSet::new().block_on(&runtime, async {
                let app = App::new(None);
                app.connected(Rc::new(Agreeable)).await.unwrap();
                if !wait_for_rpc {
                    app.advance(Phase::Ready);
                }
                tokio::select! {
                    served = endpoint.serve(app, &[]) => panic!("{served:?}"),
                    _ = stopped => {}
                }
            });
        });
        Service {
            directory,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).to_str().unwrap().to_owned()
    }

    /// Runs a command line; gives what it prints.
    fn run(&self, line: &str) -> Result<String, Failure> {
        let socket = self.path("rpc.sock");
        let line = format!("-s {socket} {line}");
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let mut out = Vec::new();
        run_words(&words, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    #[track_caller]
    fn prints(&self, line: &str) -> String {
        self.run(line)
            .unwrap_or_else(|failure| panic!("{line}: {failure}"))
    }

    fn script(&self, text: &str) -> Result<String, Failure> {
        let words = ["-s".to_owned(), self.path("rpc.sock")];
        let (options, _) = Options::parse(&words)?;
        let mut out = Vec::new();
        run_script(&mut Client::new(options), text, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.thread.take().map(JoinHandle::join);
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn directory(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("ferry-rpc-{}-{name}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir(&path).unwrap();
    path
}

#[test]
fn the_guides_static_bring_up_and_tear_down_work_line_by_line() {
    let service = Service::start("guide", false);
    let modify = format!(
        "--plugin rpc_virtio_fs_tgt -v virtio_fs_doca_device_modify --dev-name vfsdev0 --manager mlx5_0 --vuid {VUID}"
    );
    let lines = [
        ("fsdev_aio_create aio0 /etc/virtiofs", "aio0\n"),
        (
            "--plugin rpc_virtio_fs_tgt -v virtio_fs_transport_create -t DOCA",
            "",
        ),
        (
            "--plugin rpc_virtio_fs_tgt -v virtio_fs_doca_manager_create -m mlx5_0",
            "",
        ),
        (
            "--plugin rpc_virtio_fs_tgt -v virtio_fs_transport_start -t DOCA",
            "",
        ),
        (
            "--plugin rpc_virtio_fs_tgt -v virtio_fs_device_create --transport-name DOCA --dev-name vfsdev0 \
             --tag doca_test --fsdev aio0 --num-request-queues 8 --queue-size 256 --driver-platform x86_64",
            "",
        ),
        (&modify, ""),
        (
            "--plugin rpc_virtio_fs_tgt -v virtio_fs_device_start --dev-name vfsdev0",
            "",
        ),
        (
            "--plugin rpc_virtio_fs_tgt -v virtio_fs_device_stop --dev-name vfsdev0",
            "",
        ),
        (
            "--plugin rpc_virtio_fs_tgt -v virtio_fs_device_destroy --dev-name vfsdev0",
            "",
        ),
        (
            "--plugin rpc_virtio_fs_tgt -v virtio_fs_transport_stop -t DOCA",
            "",
        ),
        (
            "--plugin rpc_virtio_fs_tgt -v virtio_fs_doca_manager_destroy -m mlx5_0",
            "",
        ),
        (
            "--plugin rpc_virtio_fs_tgt -v virtio_fs_transport_destroy -t DOCA",
            "",
        ),
        ("fsdev_aio_delete aio0", ""),
    ];
    for (line, printed) in lines {
        assert_eq!(service.prints(line), printed, "{line}");
    }
}

#[test]
fn lists_are_printed_as_json_with_indent_two() {
    let service = Service::start("lists", false);
    service.prints("virtio_fs_transport_create -t DOCA");
    let expected = "[\n  {\n    \"name\": \"DOCA\",\n    \"state\": \"stopped\",\n    \"managers\": []\n  }\n]\n";
    assert_eq!(service.prints("virtio_fs_get_transports"), expected);
    assert_eq!(service.prints("virtio_fs_get_devices"), "[]\n");
}

#[test]
fn a_refusal_shows_request_and_response() {
    let service = Service::start("refusal", false);
    let failure = service.run("virtio_fs_device_start -d nosuch").unwrap_err();
    assert_eq!(failure.status(), 1);
    let text = failure.to_string();
    let begins = "request:\n{\n  \"dev_name\": \"nosuch\",\n  \"method\": \"virtio_fs_device_start\",\n  \
                  \"req_id\": 1\n}\nGot JSON-RPC error response\nresponse:\n{\n  \"code\": -19,\n  \
                  \"message\": \"No such device: there is no device nosuch";
    assert!(text.starts_with(begins), "{text}");
}

#[test]
fn a_script_stops_at_its_first_failure() {
    let service = Service::start("script", false);
    let good = "# bring-up\n\n--plugin rpc_virtio_fs_tgt -v fsdev_aio_create 'aio0' /srv\nvirtio_fs_transport_create -t DOCA\n";
    assert_eq!(service.script(good).unwrap(), "aio0\n");
    let bad = "virtio_fs_transport_create -t DOCA\nvirtio_fs_transport_start -t DOCA\n";
    assert_eq!(service.script(bad).unwrap_err().status(), 1);
    assert!(
        service
            .prints("virtio_fs_get_transports")
            .contains("stopped")
    );
}

#[test]
fn a_configuration_is_saved_from_one_service_and_loaded_into_another() {
    let first = Service::start("save", false);
    let file = first.path("saved.json");
    let script = format!(
        "fsdev_aio_create aio0 /srv\nvirtio_fs_transport_create -t DOCA\nvirtio_fs_transport_start -t DOCA\n\
         virtio_fs_device_create -t DOCA -d d --tag t --fsdev aio0\n\
         virtio_fs_doca_device_modify -d d --manager mlx5_0 --vuid {VUID}\nvirtio_fs_device_start -d d\nsave_config -o {file}\n"
    );
    first.script(&script).unwrap();
    // Loading starts a service that waits for it.
    let second = Service::start("load", true);
    assert_eq!(second.prints(&format!("load_config -j {file}")), "");
    assert_eq!(
        second.prints("virtio_fs_get_devices"),
        first.prints("virtio_fs_get_devices")
    );
    assert_eq!(
        second.prints("save_config"),
        std::fs::read_to_string(&file).unwrap()
    );
    let one = second.prints("save_subsystem_config -n fsdev -i -1");
    assert!(
        one.starts_with("{\"subsystem\":\"fsdev\",\"config\":[{\"method\":\"fsdev_set_opts\""),
        "{one}"
    );
}

#[test]
fn a_dry_run_prints_requests_and_needs_no_service() {
    let words = [
        "-s",
        "/nonexistent",
        "--dry-run",
        "virtio_fs_transport_create",
        "-t",
        "DOCA",
    ]
    .map(str::to_owned);
    let mut out = Vec::new();
    run_words(&words, &mut out).unwrap();
    let printed = String::from_utf8(out).unwrap();
    let request = printed.strip_prefix("Request:\n").unwrap();
    let request: Value = serde_json::from_str(request).unwrap();
    assert_eq!(request["method"], "virtio_fs_transport_create");
    assert_eq!(request["params"]["transport_name"], "DOCA");
}

#[test]
fn a_silent_service_and_a_missing_one_are_told_apart() {
    let directory = directory("silent");
    let socket = directory.join("rpc.sock");
    let run = |words: &str| {
        let line = format!("-s {} {words}", socket.display());
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        run_words(&words, &mut Vec::new()).unwrap_err().to_string()
    };
    let missing = run("-r 1 spdk_get_version");
    assert!(
        missing.contains("ferry-controlplane") && missing.contains("rpc.sock"),
        "{missing}"
    );
    let _listener = UnixListener::bind(&socket).unwrap();
    let silent = run("-t 0.05 spdk_get_version");
    assert!(
        silent.starts_with("no response to spdk_get_version within 0.05 s"),
        "{silent}"
    );
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn wrong_command_lines_name_their_culprit_with_status_two() {
    for (line, says) in [
        ("--nosuch spdk_get_version", "--nosuch"),
        ("-t soon spdk_get_version", "soon"),
        ("-s", "-s"),
        ("-p 5260 spdk_get_version", "UNIX socket"),
        ("--verbose LOUD spdk_get_version", "LOUD"),
        ("virtio_fs_get_device", "virtio_fs_get_devices"),
    ] {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let failure = run_words(&words, &mut Vec::new()).unwrap_err();
        assert!(failure.to_string().contains(says), "{line}: {failure}");
        assert_eq!(failure.status(), 2, "{line}");
    }
}

#[test]
fn options_before_the_method_are_those_of_the_original() {
    let words = [
        "-s/x",
        "-t",
        "5",
        "-r3",
        "-v",
        "--plugin",
        "a",
        "--plugin=b",
        "m",
        "-t",
        "DOCA",
    ]
    .map(str::to_owned);
    let (options, rest) = Options::parse(&words).unwrap();
    assert_eq!(options.socket, Path::new("/x"));
    assert_eq!(
        (options.timeout.as_secs(), options.retries, options.verbose),
        (5, 3, true)
    );
    assert_eq!(
        rest.iter().map(Deref::deref).collect::<Vec<&str>>(),
        ["m", "-t", "DOCA"]
    );
}

#[test]
fn the_names_of_the_original_tool_mean_this_command() {
    let words = |line: &str| {
        line.split_whitespace()
            .map(OsString::from)
            .collect::<Vec<_>>()
    };
    for (line, expected) in [
        ("/usr/bin/ferry rpc -v x", Some("-v x")),
        ("/opt/spdk_rpc.py -v x", Some("-v x")),
        ("rpc.py x", Some("x")),
        ("spdk_rpc", Some("")),
        ("ferry mount rpc", None),
        ("ferry", None),
    ] {
        assert_eq!(
            requested(words(line).into_iter()),
            expected.map(words),
            "{line}"
        );
    }
}

fn serve(service: &Service, text: &str) -> String {
    let (options, rest) = Options::parse(&[]).unwrap();
    let mut out = Vec::new();
    let socket = service.path("rpc.sock");
    let text = text.replace("SOCKET", &socket);
    server::run(&options, rest, text.as_bytes(), &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn in_server_mode_every_line_has_its_own_options_output_and_status() {
    let service = Service::start("lines", false);
    let lines = "\
-s SOCKET virtio_fs_transport_create -t DOCA
-s SOCKET virtio_fs_transport_create -t DOCA

# nothing
-s SOCKET virtio_fs_nosuch
-s SOCKET 'open
-s SOCKET
--nosuch
-s /nowhere spdk_get_version
-s SOCKET load_config
-v -t 5 -s SOCKET fsdev_aio_create a '/s rv'
-s SOCKET virtio_fs_transport_start -h";
    let printed = serve(&service, lines);
    let blocks: Vec<&str> = printed.split_inclusive("**STATUS=").collect();
    let statuses: String = printed
        .lines()
        .filter_map(|line| line.strip_prefix("**STATUS="))
        .collect();
    assert_eq!(statuses, "010011111100", "{printed}");
    // What was answered is there before the status; nothing else is printed for a wrong command line.
    assert_eq!(blocks[0], "**STATUS=");
    assert!(blocks[1].contains("\"code\": -17"), "{printed}");
    assert_eq!(blocks[4], "0\n**STATUS=");
    assert!(blocks[8].contains("/nowhere"), "{printed}");
    assert_eq!(blocks[10], "1\na\n**STATUS=");
    assert!(blocks[11].contains("usage: ferry rpc virtio_fs_transport_start"));
}

#[test]
fn server_mode_takes_no_method_beside_it() {
    let words = ["--server", "spdk_get_version"].map(str::to_owned);
    let failure = run_words(&words, &mut Vec::new()).unwrap_err();
    assert!(
        failure.to_string().contains("spdk_get_version"),
        "{failure}"
    );
    assert_eq!(failure.status(), 2);
}

#[test]
fn a_failure_in_a_script_names_its_line() {
    let service = Service::start("numbered", false);
    let failure = service
        .script("virtio_fs_transport_create -t DOCA\n\n# x\nvirtio_fs_transport_create -t DOCA\n")
        .unwrap_err();
    assert!(
        failure.to_string().starts_with("line 4: request:"),
        "{failure}"
    );
    assert_eq!(failure.status(), 1);
}
