//! PostgreSQL: a cluster with checksums, pgbench, a server that is killed, its recovery, and a check of every page.

use super::Places;
use crate::matrix::full;
use crate::outcome::output_of;
use anyhow::{Context, Result, ensure};
use ferry_tests::wait_until;
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
/// It refuses to run as root.
const USER: &str = "nobody";
/// What each transaction of pgbench adds to four tables.
const SUMS: &str = "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers), \
    (SELECT sum(bbalance) FROM pgbench_branches), (SELECT sum(delta) FROM pgbench_history), \
    (SELECT count(*) FROM pgbench_history)";

/// Where the newest version that is installed has its programs.
pub(super) fn programs() -> Result<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    versions
        .map(|version| version.path().join("bin"))
        .filter(|bin| bin.join("initdb").exists() && bin.join("pgbench").exists())
        .max()
        .context("no PostgreSQL on this machine; tools/test posix installs it")
}

struct Cluster {
    bin: PathBuf,
    data: PathBuf,
    sockets: PathBuf,
}

/// Ends the server when it goes.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // the immediate shutdown, which takes its children along
        let quit = Command::new("kill")
            .args(["-QUIT", &self.0.id().to_string()])
            .status();
        if let Err(error) = quit.and_then(|_| self.0.wait()) {
            eprintln!("cannot end the server: {error}");
        }
    }
}

impl Cluster {
    fn new(places: &Places<'_>) -> Result<Self> {
        let (data, sockets) = (places.dir.join("data"), places.scratch.join("sockets"));
        let id = |flag| -> Result<u32> {
            Ok(output_of(Command::new("id").args([flag, USER]))?
                .trim()
                .parse()?)
        };
        let (uid, gid) = (id("-u")?, id("-g")?);
        for dir in [&data, &sockets] {
            fs::create_dir(dir)?;
            chown(dir, Some(uid), Some(gid))?;
        }
        let cluster = Self {
            bin: programs()?,
            data,
            sockets,
        };
        let mut initdb = cluster.as_user("initdb");
        initdb.args([
            "--data-checksums",
            "--no-locale",
            "--encoding=UTF8",
            "-U",
            USER,
            "-D",
        ]);
        output_of(initdb.arg(&cluster.data))?;
        Ok(cluster)
    }

    fn as_user(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", USER, "--regid", "nogroup", "--clear-groups"])
            .arg(self.bin.join(program))
            .current_dir(&self.sockets);
        command
    }

    fn start(&self) -> Result<Server> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.sockets.join("log"))?;
        let child = self
            .as_user("postgres")
            .arg("-D")
            .arg(&self.data)
            .arg("-k")
            .arg(&self.sockets)
            .args(["-c", "listen_addresses=", "-c", "shared_buffers=16MB"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start postgres")?;
        let mut server = Server(child);
        let ready = wait_until("PostgreSQL answers", LIMIT, || {
            ensure!(server.0.try_wait()?.is_none(), "the server has ended");
            let mut ask = self.as_user("pg_isready");
            Ok(ask.arg("-h").arg(&self.sockets).output()?.status.success())
        });
        ready.with_context(|| self.log())?;
        Ok(server)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.sockets.join("log")).unwrap_or_default()
    }

    fn bench(&self, args: &[&str]) -> Result<()> {
        let mut command = self.as_user("pgbench");
        command
            .arg("-h")
            .arg(&self.sockets)
            .args(["-U", USER])
            .args(args);
        output_of(command.arg("postgres"))
            .with_context(|| self.log())
            .map(drop)
    }

    fn sums(&self) -> Result<Vec<i64>> {
        let mut command = self.as_user("psql");
        command
            .arg("-h")
            .arg(&self.sockets)
            .args(["-U", USER, "-At", "-c", SUMS]);
        let line = output_of(command.arg("postgres"))?;
        line.trim()
            .split('|')
            .map(|number| number.parse().context("a sum is no number"))
            .collect()
    }
}

/// The clients count what they were told is committed; all of that must survive.
pub(super) fn bench_and_recover(places: &Places<'_>) -> Result<String> {
    let (clients, each) = (4_i64, if full() { 250_i64 } else { 25 });
    let cluster = Cluster::new(places)?;
    let server = cluster.start()?;
    cluster.bench(&["-i", "-q", "-s", "1"])?;
    let (c, t) = (clients.to_string(), each.to_string());
    cluster.bench(&["-n", "-c", &c, "-t", &t])?;
    drop(server);
    let server = cluster.start()?;
    ensure!(
        cluster
            .log()
            .contains("database system was not properly shut down"),
        "the server did not recover:\n{}",
        cluster.log()
    );
    let sums = cluster.sums()?;
    ensure!(
        sums.len() == 5 && sums[..4].iter().all(|sum| *sum == sums[0]) && sums[4] == clients * each,
        "the tables contradict each other: {sums:?}"
    );
    let mut stop = cluster.as_user("pg_ctl");
    output_of(
        stop.args(["stop", "-s", "-m", "fast", "-D"])
            .arg(&cluster.data),
    )?;
    drop(server);
    check_pages(&cluster, &cluster.data)?;
    Ok(format!("{} transactions", sums[4]))
}

fn check_pages(cluster: &Cluster, data: &Path) -> Result<()> {
    let mut check = cluster.as_user("pg_checksums");
    output_of(check.arg("--check").arg("-D").arg(data)).map(drop)
}
