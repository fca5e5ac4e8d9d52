use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::JoinHandle;

use ferry_shared::errno::Errno;
use ferry_shared::handshake::Channel;
use ferry_shared::handshake::server::Accepted;
use ferry_shared::handshake::server::Listener;
use ferry_shared::msg::FsdevKind;
use ferry_shared::msg::FsdevSpec;
use ferry_shared::msg::ToControlplane;
use ferry_shared::msg::ToDataplane;
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::PollTimeout;
use nix::poll::poll;
use std::os::fd::AsFd;
use tokio::task::LocalSet;

use super::fake::FakeLink;
use super::*;
use crate::app::App;
use crate::app::Phase;
use crate::rpc::decode::Params;
use crate::test_dir;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
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
        match listener.accept().unwrap() {
            Some(Accepted::Channel(channel)) => return channel,
            Some(Accepted::Refused { why, .. }) => panic!("{why}"),
            None => {}
        }
        wait(listener);
    }
}

/// Answers commands over the rings until the control plane goes or `last` of them have been answered.
fn serve(channel: &mut Channel, fake: &FakeLink, last: usize) {
    while fake.commands.borrow().len() < last {
        while let Some(ToDataplane { seq, command }) = channel.recv().unwrap() {
            let result = fake.answer(command);
            channel
                .send(&ToControlplane::Completion { seq, result })
                .unwrap();
            if fake.commands.borrow().len() >= last {
                return;
            }
        }
        if channel.prepare_sleep().unwrap() {
            wait(channel);
            if channel.wake().is_err() {
                return;
            }
        }
    }
}

/// Runs `work` with a control plane that keeps connected to `run_dir`.
fn with_app<T>(run_dir: &Path, work: impl AsyncFnOnce(Rc<App>) -> T) -> T {
    let app = App::new(None);
    app.advance(Phase::Running);
    LocalSet::new().block_on(&runtime(), async {
        tokio::select! {
            never = keep_connected(Rc::clone(&app), run_dir) => match never {},
            result = work(Rc::clone(&app)) => result,
        }
    })
}

async fn call(
    app: &Rc<App>,
    method: &str,
    params: &str,
) -> Result<serde_json::Value, crate::rpc::RpcError> {
    let params: Params = serde_json::from_str(params).unwrap();
    app.call(method, &params).await
}

/// A data plane in a thread: serves one connection up to `last` commands and closes.
fn dataplane(run_dir: PathBuf, last: usize) -> JoinHandle<Vec<Command>> {
    let (ready, started) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let mut listener = Listener::bind(&run_dir, None).unwrap();
        ready.send(()).unwrap();
        let mut channel = accept(&mut listener);
        let fake = FakeLink::default();
        serve(&mut channel, &fake, last);
        fake.commands.into_inner()
    });
    started.recv().unwrap();
    thread
}

#[test]
fn without_a_data_plane_requests_say_what_to_do() {
    let dir = test_dir("without");
    let error = with_app(&dir.join("run"), async |app| {
        app.attempted().await;
        call(&app, "fsdev_aio_create", r#"{"name":"a","root_path":"/"}"#)
            .await
            .unwrap_err()
    });
    assert_eq!(error.code, -19);
    assert!(
        error
            .message
            .starts_with("No such device: data plane is not running"),
        "{}",
        error.message
    );
    for says in ["run/dataplane.sock", "start ferry-dataplane"] {
        assert!(
            error.message.contains(says),
            "{says} is missing in: {}",
            error.message
        );
    }
}

#[test]
fn commands_cross_the_rings_and_a_restarted_data_plane_gets_what_it_lacks() {
    let dir = test_dir("restart");
    let run_dir = dir.join("run");
    let first = dataplane(run_dir.clone(), 2);
    let (first, second) = with_app(&run_dir, async |app| {
        app.linked().await;
        call(&app, "fsdev_null_create", r#"{"name":"f"}"#)
            .await
            .unwrap();
        call(
            &app,
            "virtio_fs_transport_create",
            r#"{"transport_name":"VHOST_USER"}"#,
        )
        .await
        .unwrap();
        call(
            &app,
            "virtio_fs_transport_start",
            r#"{"transport_name":"VHOST_USER"}"#,
        )
        .await
        .unwrap();
        let device = r#"{"transport_name":"VHOST_USER","dev_name":"d","tag":"t","fsdev":"f"}"#;
        call(&app, "virtio_fs_device_create", device).await.unwrap();
        call(&app, "virtio_fs_device_start", r#"{"dev_name":"d"}"#)
            .await
            .unwrap();
        let first = first.join().unwrap();
        app.unlinked().await;
        let second = dataplane(run_dir.clone(), 3);
        // The link is up again, and the other two commands were issued, before this one is sent.
        call(&app, "fsdev_null_create", r#"{"name":"third"}"#)
            .await
            .unwrap();
        (first, second.join().unwrap())
    });
    assert!(
        matches!(
            &first[..],
            [Command::FsdevCreate(_), Command::DeviceStart(_)]
        ),
        "{first:?}"
    );
    assert_eq!(second[..2], first[..]);
    let third = FsdevSpec {
        name: "third".to_owned(),
        kind: FsdevKind::Null,
    };
    assert_eq!(second[2], Command::FsdevCreate(third));
}

#[test]
fn a_command_that_the_data_plane_does_not_outlive_fails_and_changes_nothing() {
    let dir = test_dir("dies");
    let run_dir = dir.join("run");
    // It closes when the first command is there, without an answer.
    let (ready, started) = mpsc::channel();
    let thread = std::thread::spawn({
        let run_dir = run_dir.clone();
        move || {
            let mut listener = Listener::bind(&run_dir, None).unwrap();
            ready.send(()).unwrap();
            let mut channel = accept(&mut listener);
            let fake = FakeLink::default();
            loop {
                while let Some(ToDataplane { seq, command }) = channel.recv().unwrap() {
                    if !matches!(command, Command::Snapshot { .. }) {
                        return;
                    }
                    let result = fake.answer(command);
                    channel
                        .send(&ToControlplane::Completion { seq, result })
                        .unwrap();
                }
                if channel.prepare_sleep().unwrap() {
                    wait(&channel);
                    channel.wake().unwrap();
                }
            }
        }
    });
    started.recv().unwrap();
    let error = with_app(&run_dir, async |app| {
        app.linked().await;
        let outcome = call(&app, "fsdev_null_create", r#"{"name":"f"}"#).await;
        assert!(app.model().fsdev("f").is_err());
        outcome.unwrap_err()
    });
    thread.join().unwrap();
    assert_eq!(error.errno, Some(Errno::ENODEV));
    assert!(error.message.contains("went away"), "{}", error.message);
}
