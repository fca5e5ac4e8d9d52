//! The data plane is killed under a mounted file system: what the host's kernel knows stays valid, and nothing fails.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Service, can_mount, need};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::times;

/// How often the data plane is killed in each test, unless `FERRY_KILLS` says otherwise.
const KILLS: usize = 10;

type StartDevice = fn(&Service) -> Result<PathBuf>;

fn doca(service: &Service) -> Result<PathBuf> {
    service.start_doca_device("vfsdev0", "crashes", "aio0")
}

fn vhost_user(service: &Service) -> Result<PathBuf> {
    service.start_vhost_user_device("vfsdev0", "crashes", "aio0")
}

fn doca_packed(service: &Service) -> Result<PathBuf> {
    service.start_doca_device_with("vfsdev0", "crashes", "aio0", "--packed-vq")
}

fn vhost_user_packed(service: &Service) -> Result<PathBuf> {
    service.start_vhost_user_device_with("vfsdev0", "crashes", "aio0", "--packed-vq")
}

/// Kills the data plane, and waits for the next one.
fn kill_data_plane(service: &Service) -> Result<Pid> {
    let old = service.child("ferry-dataplane")?;
    kill(old, Signal::SIGKILL).context("kill the data plane")?;
    service.next_child("ferry-dataplane", Some(old))
}

fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options
        .open(path)
        .with_context(|| path.display().to_string())
}

fn locks_conflict(path: &Path, kind: libc::c_int) -> Result<bool> {
    let other = open(path)?;
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let arg = nix::fcntl::FcntlArg::F_OFD_SETLK(&lock);
    match nix::fcntl::fcntl(&other, arg) {
        Ok(_) => Ok(false),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(true),
        Err(error) => Err(error).context("try a lock"),
    }
}

/// Everything that a process can hold of a file system is still there after a kill.
fn what_is_held_survives(start: StartDevice) -> Result<()> {
    let (mut service, export) = Service::start_exporting("--enable-xattr")?;
    let socket = start(&service)?;
    let mount = service.mount(&socket)?;
    let top = mount.path().to_owned();

    let mut unlinked = open(&top.join("unlinked"))?;
    unlinked.write_all(b"still here")?;
    fs::remove_file(top.join("unlinked"))?;
    let replaced = open(&top.join("replaced"))?;
    replaced.write_all_at(b"the old one", 0)?;
    fs::write(top.join("other"), b"the new one")?;
    fs::rename(top.join("other"), top.join("replaced"))?;

    fs::create_dir(top.join("listed"))?;
    for n in 0..500 {
        fs::write(top.join(format!("listed/entry-{n}")), b"")?;
    }
    let mut listing = fs::read_dir(top.join("listed"))?;
    let mut names: Vec<_> = listing.by_ref().take(20).collect::<Result<_, _>>()?;

    let locked = open(&top.join("locked"))?;
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&locked, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole))?;
    let flocked = open(&top.join("flocked"))?;
    flocked.lock()?;

    let append = OpenOptions::new()
        .append(true)
        .create(true)
        .open(top.join("appended"))?;
    (&append).write_all(b"one,")?;

    for round in 0..3 {
        kill_data_plane(&service)?;
        let mut text = String::new();
        unlinked.seek(SeekFrom::Start(0))?;
        unlinked.read_to_string(&mut text)?;
        ensure!(text == "still here", "round {round}: {text:?}");
        let mut old = [0; 11];
        replaced.read_exact_at(&mut old, 0)?;
        ensure!(&old == b"the old one");
        ensure!(fs::read(top.join("replaced"))? == b"the new one");
        ensure!(
            locks_conflict(&top.join("locked"), libc::F_RDLCK)?,
            "round {round}: the record lock is gone"
        );
        // Another process of the host, which knows nothing of the guest's kernel.
        ensure!(
            locks_conflict(&export.join("locked"), libc::F_RDLCK)?,
            "round {round}: the record lock is gone from the host"
        );
        ensure!(
            matches!(
                open(&export.join("flocked"))?.try_lock(),
                Err(fs::TryLockError::WouldBlock)
            ),
            "round {round}: the flock lock is gone from the host"
        );
        (&append).write_all(b"more,")?;
    }
    names.extend(listing.collect::<Result<Vec<_>, _>>()?);
    let mut names: Vec<_> = names.into_iter().map(|e| e.file_name()).collect();
    names.sort();
    names.dedup();
    ensure!(names.len() == 500, "{} names", names.len());
    ensure!(fs::read(export.join("appended"))? == b"one,more,more,more,");
    drop((unlinked, replaced, locked, flocked, append));
    ensure!(!locks_conflict(&export.join("locked"), libc::F_WRLCK)?);
    mount.unmount()?;
    service.stop()
}

#[test]
fn what_is_held_survives_kills_of_the_data_plane_on_a_doca_function() {
    need!(can_mount());
    what_is_held_survives(doca).unwrap();
}

#[test]
fn what_is_held_survives_kills_of_the_data_plane_on_a_vhost_user_device() {
    need!(can_mount());
    what_is_held_survives(vhost_user).unwrap();
}

/// Changes names as fast as it can; every step must have the outcome of one execution.
fn churn(top: &Path, number: usize, stop: &AtomicBool) -> Result<u64> {
    let dir = top.join(format!("churn-{number}"));
    fs::create_dir(&dir)?;
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        let at = |name: &str| dir.join(format!("{name}-{rounds}"));
        let step = |what: &str| format!("round {rounds}: {what}");
        fs::create_dir(at("d")).with_context(|| step("mkdir"))?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(at("d").join("f"))
            .with_context(|| step("create"))?;
        file.write_all_at(&[number as u8; 3000], 0)
            .with_context(|| step("write"))?;
        fs::hard_link(at("d").join("f"), at("h")).with_context(|| step("link"))?;
        fs::rename(at("d").join("f"), at("r")).with_context(|| step("rename"))?;
        std::os::unix::fs::symlink("target", at("s")).with_context(|| step("symlink"))?;
        fs::remove_file(at("h")).with_context(|| step("unlink"))?;
        fs::remove_file(at("s")).with_context(|| step("unlink a link"))?;
        fs::remove_dir(at("d")).with_context(|| step("rmdir"))?;
        let bytes = fs::read(at("r")).with_context(|| step("read"))?;
        ensure!(bytes == [number as u8; 3000], "{}", step("wrong bytes"));
        drop(file);
        fs::remove_file(at("r")).with_context(|| step("unlink the file"))?;
        rounds += 1;
    }
    let left = fs::read_dir(&dir)?.count();
    ensure!(left == 0, "{left} names are left of churner {number}");
    Ok(rounds)
}

/// Appends numbers; each must be there once, in order.
fn append(top: &Path, stop: &AtomicBool) -> Result<u64> {
    let mut log = OpenOptions::new()
        .append(true)
        .create(true)
        .open(top.join("log"))?;
    let mut written: u64 = 0;
    while !stop.load(Ordering::Relaxed) {
        log.write_all(&written.to_le_bytes()).context("append")?;
        written += 1;
        if written.is_multiple_of(64) {
            log.sync_all().context("fsync")?;
        }
    }
    let bytes = fs::read(top.join("log"))?;
    let found = bytes
        .chunks(8)
        .map(|c| c.try_into().map(u64::from_le_bytes));
    let found: Vec<u64> = found.collect::<Result<_, _>>()?;
    ensure!(
        found.len() as u64 == written,
        "{} of {written}",
        found.len()
    );
    ensure!(found.into_iter().eq(0..written), "the log is out of order");
    Ok(written)
}

fn under_load(start: StartDevice, kills: usize) -> Result<()> {
    let (mut service, _) = Service::start_exporting("--enable-xattr")?;
    let socket = start(&service)?;
    let mount = service.mount(&socket)?;
    let top = mount.path().to_owned();
    let stop = AtomicBool::new(false);
    let mut pauses = Vec::new();
    std::thread::scope(|scope| {
        let (top, stop) = (&top, &stop);
        let churners: Vec<_> = (0..2)
            .map(|n| scope.spawn(move || churn(top, n, stop)))
            .collect();
        let appender = scope.spawn(move || append(top, stop));
        let mut killed = Ok(());
        for round in 0..kills {
            // Nothing but the moment of the kill depends on this.
            for _ in 0..round.wrapping_mul(37) % 100 + 1 {
                fs::write(top.join("probe"), round.to_le_bytes())?;
            }
            let began = Instant::now();
            killed = kill_data_plane(&service).map(drop);
            if killed.is_err() {
                break;
            }
            fs::write(top.join("probe"), round.to_le_bytes())?;
            pauses.push(began.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
        for churner in churners {
            let rounds = churner.join().map_err(|_| anyhow::anyhow!("panic"))??;
            println!("{rounds} rounds");
        }
        let written = appender.join().map_err(|_| anyhow::anyhow!("panic"))??;
        println!("{written} records");
        killed
    })
    .with_context(|| service.log())?;
    pauses.sort();
    println!(
        "pauses: median {:?}, longest {:?}",
        pauses.get(pauses.len() / 2),
        pauses.last()
    );
    mount.unmount()?;
    service.stop()
}

#[test]
fn kills_under_load_lose_and_double_nothing_on_a_doca_function() {
    need!(can_mount());
    under_load(doca, times(KILLS).unwrap()).unwrap();
}

#[test]
fn kills_under_load_lose_and_double_nothing_on_a_vhost_user_device() {
    need!(can_mount());
    under_load(vhost_user, times(KILLS).unwrap()).unwrap();
}

#[test]
fn kills_under_load_lose_and_double_nothing_on_a_doca_function_with_packed_rings() {
    need!(can_mount());
    under_load(doca_packed, times(KILLS).unwrap()).unwrap();
}

#[test]
fn kills_under_load_lose_and_double_nothing_on_a_vhost_user_device_with_packed_rings() {
    need!(can_mount());
    under_load(vhost_user_packed, times(KILLS).unwrap()).unwrap();
}
