//! What an NFS server needs of a mount that it exports: file handles that go on naming their files, whatever happens to the
//! server's machine or to the data plane; and such a server itself, NFS-Ganesha, with a client that knows nothing of Ferry.

use anyhow::{Context, Result, ensure};
use ferry_tests::{
    HostMount, Process, Rigs, Service, TempDir, build_checks, can_mount, need, wait_until,
};
use nix::sys::signal::{Signal, kill};
use std::env;
use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const DATA_PLANE: &str = "ferry-dataplane";

/// Kills the data plane and waits for the one that goes on in its place.
fn crash(service: &Service) -> Result<()> {
    let before = service.child(DATA_PLANE)?;
    kill(before, Signal::SIGKILL)?;
    service.next_child(DATA_PLANE, Some(before)).map(drop)
}

/// A program that has taken handles and opens them when it is asked to.
struct Holder {
    process: Process,
    input: ChildStdin,
    answers: usize,
}

impl Holder {
    fn start(service: &Service, mount: &HostMount) -> Result<Holder> {
        let mut command = Command::new(build_checks(service.dir().path())?);
        command.arg("handles").arg(mount.path());
        let log = service.dir().join("handles.log");
        let (process, input) = Process::start_reading(Signal::SIGKILL, &command, &log)?;
        let mut holder = Holder {
            process,
            input,
            answers: 0,
        };
        ensure!(holder.answer()? == "taken", "no handles were taken");
        Ok(holder)
    }

    fn answer(&mut self) -> Result<String> {
        let mut answer = None;
        wait_until("the holder of handles answers", LIMIT, || {
            let output = self.process.output();
            answer = output.lines().nth(self.answers).map(str::to_owned);
            ensure!(
                answer.is_some() || self.process.running()?,
                "it has ended: {output}"
            );
            Ok(answer.is_some())
        })?;
        self.answers += 1;
        answer.context("no answer")
    }

    fn tries(&mut self) -> Result<String> {
        writeln!(self.input)?;
        self.answer()
    }

    fn opens_them(&mut self) -> Result<()> {
        let answer = self.tries()?;
        ensure!(answer == "opened", "the handles are {answer}");
        Ok(())
    }
}

fn handles_live_on(start: fn(&Service) -> Result<PathBuf>) -> Result<()> {
    let (mut service, export) = Service::start_exporting("--enable-xattr")?;
    let socket = start(&service)?;
    let mount = service.mount(&socket)?;
    let mut holder = Holder::start(&service, &mount)?;
    holder.opens_them()?;
    crash(&service)?;
    holder.opens_them().context("after a crash")?;
    mount.unmount()?;
    let mount = service.mount(&socket)?;
    // What is met first in the new mount must not get the ids of what the handles name.
    for number in 0..100 {
        fs::write(mount.path().join(format!("other-{number}")), "")?;
    }
    holder.opens_them().context("in the next mount")?;
    fs::rename(export.join("of-handles/d"), export.join("elsewhere"))?;
    holder.opens_them().context("after a rename")?;
    crash(&service)?;
    mount.unmount()?;
    let mount = service.mount(&socket)?;
    holder
        .opens_them()
        .context("after a crash, in the mount after it")?;
    fs::remove_dir_all(mount.path().join("elsewhere"))?;
    // The kernel gives up what was open in its own time.
    wait_until("handles of nothing are stale", LIMIT, || {
        Ok(holder.tries()? == "stale")
    })?;
    mount.unmount()?;
    service.stop()
}

#[test]
fn file_handles_outlive_crashes_and_mounts_of_a_doca_function() {
    need!(can_mount());
    handles_live_on(|service| service.start_doca_device("vfsdev0", "tag", "aio0")).unwrap();
}

#[test]
fn file_handles_outlive_crashes_and_mounts_of_a_vhost_user_device() {
    need!(can_mount());
    handles_live_on(|service| service.start_vhost_user_device("vfsdev0", "tag", "aio0")).unwrap();
}

/// An NFS server that exports a directory as `/ferry`, over TCP on this machine only.
struct Ganesha {
    process: Process,
    rigs: Rigs,
    port: u16,
    dir: TempDir,
}

impl Ganesha {
    fn start(rigs: &Rigs, path: &Path) -> Result<Ganesha> {
        let dir = TempDir::new();
        let state = dir.make_dir("state");
        // Free now; whoever takes it first makes the server end, and the test fail.
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
            .local_addr()?
            .port();
        let plugins = rigs.path("nfs/usr/lib/x86_64-linux-gnu/ganesha");
        fs::write(
            dir.join("conf"),
            format!(
                "NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = {port}; Bind_addr = 127.0.0.1; Enable_NLM = false; \
                 Enable_RQUOTA = false; Plugins_Dir = \"{}\"; }}\n\
                 NFSV4 {{ Graceless = true; UseGetpwnam = true; Only_Numeric_Owners = true; RecoveryBackend = fs; \
                 RecoveryRoot = \"{}\"; }}\n\
                 EXPORT {{ Export_Id = 7; Path = \"{}\"; Pseudo = \"/ferry\"; Access_Type = RW; \
                 Squash = No_root_squash; SecType = sys; Transports = TCP; FSAL {{ Name = VFS; }} }}\n",
                plugins.display(),
                state.display(),
                path.display()
            ),
        )?;
        let mut command = with_libraries(rigs, "ganesha.nfsd");
        command
            .args(["-F", "-L", "/dev/stdout", "-N", "EVENT", "-f"])
            .arg(dir.join("conf"))
            .arg("-p")
            .arg(dir.join("pid"));
        let process = Process::start(&command, &dir.join("log"))?;
        let mut server = Ganesha {
            process,
            rigs: rigs.clone(),
            port,
            dir,
        };
        let serves = wait_until("the NFS server serves", LIMIT, || {
            ensure!(server.process.running()?, "it has ended");
            Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok())
        });
        serves.with_context(|| server.process.output())?;
        Ok(server)
    }

    fn url(&self, path: &str) -> String {
        let port = self.port;
        format!("nfs://127.0.0.1/ferry/{path}?version=4&nfsport={port}")
    }

    fn client(&self, program: &str, arguments: &[&str]) -> Result<Vec<u8>> {
        let output = with_libraries(&self.rigs, program)
            .args(arguments)
            .output()
            .with_context(|| format!("run {program}"))?;
        ensure!(
            output.status.success(),
            "{program} {arguments:?} failed: {}\nlog of the server:\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.process.output()
        );
        Ok(output.stdout)
    }

    fn reads(&self, path: &str, expected: &[u8]) -> Result<()> {
        let read = self.client("nfs-cat", &[&self.url(path)])?;
        ensure!(read == expected, "{path} reads otherwise over NFS");
        Ok(())
    }

    /// Writes a file; this client cannot write more than a few thousand bytes over NFS 4.
    fn writes(&self, path: &str, content: &[u8]) -> Result<()> {
        let from = self.dir.join("content");
        fs::write(&from, content)?;
        let from = from.to_str().context("a path that is no text")?;
        self.client("nfs-cp", &[from, &self.url(path)]).map(drop)
    }

    fn lists(&self, path: &str, expected: &[&str]) -> Result<()> {
        let listing = self.client("nfs-ls", &[&self.url(path)])?;
        let listing = String::from_utf8_lossy(&listing);
        let mut names: Vec<&str> = listing
            .lines()
            .filter_map(|line| line.split_whitespace().last())
            .collect();
        names.sort_unstable();
        ensure!(names == expected, "{path} lists {names:?} over NFS");
        Ok(())
    }
}

/// A program of the rig, with the libraries that came with it.
fn with_libraries(rigs: &Rigs, program: &str) -> Command {
    let libraries = ["nfs/usr/lib/x86_64-linux-gnu", "nfs/usr/lib/ganesha"]
        .map(|part| rigs.path(part).display().to_string());
    let mut command = Command::new(rigs.path("nfs/usr/bin").join(program));
    command.env("LD_LIBRARY_PATH", libraries.join(":"));
    command
}

fn serve_over_nfs(rigs: &Rigs) -> Result<()> {
    let (mut service, export) = Service::start_exporting("--enable-xattr")?;
    let socket = service.start_vhost_user_device("vfsdev0", "tag", "aio0")?;
    let mount = service.mount(&socket)?;
    let large: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
    fs::write(export.join("large"), &large)?;
    fs::create_dir(export.join("d"))?;
    let server = Ganesha::start(rigs, mount.path())?;
    server.reads("large", &large)?;
    for name in ["one", "two"] {
        server.writes(&format!("d/{name}"), name.as_bytes())?;
        ensure!(
            fs::read(export.join("d").join(name))? == name.as_bytes(),
            "what was written over NFS is not in the export"
        );
    }
    server.lists("d", &["one", "two"])?;
    crash(&service)?;
    server.reads("large", &large).context("after a crash")?;
    server
        .writes("d/three", b"three")
        .context("after a crash")?;
    fs::rename(mount.path().join("d"), mount.path().join("e"))?;
    server.lists("e", &["one", "three", "two"])?;
    drop(server);
    mount.unmount()?;

    let mount = service.mount(&socket)?;
    let server = Ganesha::start(rigs, mount.path())?;
    server.reads("large", &large).context("in the next mount")?;
    server.reads("e/three", b"three")?;
    fs::remove_file(export.join("e/three"))?;
    server.lists("e", &["one", "two"])?;
    drop(server);
    mount.unmount()?;
    service.stop()
}

#[test]
fn an_nfs_server_serves_a_mount() {
    if env::var_os("FERRY_POSIX_FULL").is_none() {
        return;
    }
    need!(can_mount());
    serve_over_nfs(&need!(Rigs::find(&["nfs"]))).unwrap();
}
