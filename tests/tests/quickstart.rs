//! `tools/quickstart`, interrupted where it hurts: nothing stays behind.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Process, TempDir, repository, skip, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// The build may have to do everything.
const BUILD_LIMIT: Duration = Duration::from_secs(1500);
const STOP_LIMIT: Duration = Duration::from_secs(180);

/// The processes that still carry our temporary directory in their environment.
fn processes_with(mark: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        // a process may end while it is looked at, and threads of the kernel have no environment
        let Ok(environment) = fs::read(path.join("environ")) else {
            continue;
        };
        if String::from_utf8_lossy(&environment)
            .split('\0')
            .any(|variable| variable == mark)
        {
            let line = fs::read(path.join("cmdline")).unwrap_or_default();
            found.push(String::from_utf8_lossy(&line).replace('\0', " "));
        }
    }
    Ok(found)
}

fn mounts_below(dir: &Path) -> Result<Vec<String>> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let below = format!(" {}", dir.display());
    Ok(mounts
        .lines()
        .filter(|line| line.contains(&below))
        .map(str::to_owned)
        .collect())
}

/// Starts the script, waits for `line` in its output, and interrupts the script alone, as `kill -INT` does.
fn interrupt_at(line: &str) -> Result<()> {
    let dir = TempDir::new();
    let temporary = dir.make_dir("tmp");
    let mark = format!("TMPDIR={}", temporary.display());
    // a shell that was started with the signal ignored, as background jobs are, could not catch it
    let mut command = Command::new("env");
    command
        .arg("--default-signal=INT")
        .arg(repository().join("tools/quickstart"))
        .arg(dir.make_dir("export"))
        .env("TMPDIR", &temporary)
        .current_dir(dir.path());
    let mut script = Process::start(&command, &dir.join("log"))?;
    wait_until(&format!("quickstart says '{line}'"), BUILD_LIMIT, || {
        ensure!(script.running()?, "it has ended:\n{}", script.output());
        Ok(script.output().contains(line))
    })?;
    kill(Pid::from_raw(i32::try_from(script.id())?), Signal::SIGINT)
        .context("interrupt the script")?;
    let status = script.wait(STOP_LIMIT).with_context(|| script.output())?;
    ensure!(
        status.code() == Some(130),
        "quickstart ended with {status}:\n{}",
        script.output()
    );
    let (processes, mounts) = (processes_with(&mark)?, mounts_below(&temporary)?);
    ensure!(
        processes.is_empty(),
        "left running after '{line}': {processes:#?}"
    );
    ensure!(
        mounts.is_empty(),
        "left mounted after '{line}': {mounts:#?}"
    );
    ensure!(
        fs::read_dir(&temporary)?.next().is_none(),
        "left files in {} after '{line}'",
        temporary.display()
    );
    Ok(())
}

#[test]
fn quickstart_leaves_nothing_behind_wherever_it_is_interrupted() {
    if !nix::unistd::geteuid().is_root() {
        return skip("quickstart needs root");
    }
    if std::env::var_os("FERRY_REQUIRE_ALL").is_none() {
        return skip("quickstart builds everything; tools/test quickstart runs it");
    }
    for line in ["== building", "== starting", "Ctrl-C ends everything"] {
        interrupt_at(line).unwrap();
    }
}
