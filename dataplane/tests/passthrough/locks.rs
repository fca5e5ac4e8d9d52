//! Locks conflict between owners, devices and the host, and go when they should.

use std::fs::{self, File};

use ferry_dataplane::fsdev::passthrough::Passthrough;
use ferry_dataplane::fsdev::{Caller, FsDev as _};
use ferry_dataplane::fuse::abi::*;
use ferry_shared::errno::Errno;

use crate::rig::{ROOT, Rig, host_flock, host_lock, mount, name, root, spec};

const TO_END: u64 = i64::MAX as u64;
const READ: i32 = libc::F_RDLCK;
const WRITE: i32 = libc::F_WRLCK;
const NONE: i32 = libc::F_UNLCK;

fn lk(fh: u64, owner: u64, kind: i32, start: u64, end: u64) -> fuse_lk_in {
    let lk = fuse_file_lock {
        start,
        end,
        type_: kind as u32,
        pid: owner as u32 * 10,
    };
    fuse_lk_in {
        fh,
        owner,
        lk,
        lk_flags: 0,
        padding: 0,
    }
}

fn set(rig: &Rig, nodeid: u64, arg: fuse_lk_in) -> Result<(), Errno> {
    rig.fs.setlk(&root(), nodeid, &arg, false)
}

#[test]
fn owners_conflict_where_their_ranges_meet() {
    let rig = Rig::new();
    let (f, fh) = rig.create(ROOT, "f");
    let id = f.nodeid;
    set(&rig, id, lk(fh, 1, WRITE, 0, 99)).unwrap();
    set(&rig, id, lk(fh, 1, READ, 50, 60)).unwrap();
    assert_eq!(
        set(&rig, id, lk(fh, 2, WRITE, 99, 99)).unwrap_err(),
        Errno::EAGAIN
    );
    assert_eq!(
        set(&rig, id, lk(fh, 2, WRITE, 55, 55)).unwrap_err(),
        Errno::EAGAIN
    );
    set(&rig, id, lk(fh, 2, READ, 50, 60)).unwrap();
    set(&rig, id, lk(fh, 2, WRITE, 100, TO_END)).unwrap();
    let found = rig.fs.getlk(&root(), id, &lk(fh, 3, READ, 10, 20)).unwrap();
    assert_eq!((found.type_ as i32, found.start, found.end), (WRITE, 0, 49));
    let found = rig
        .fs
        .getlk(&root(), id, &lk(fh, 1, READ, 200, 300))
        .unwrap();
    assert_eq!(
        (found.type_ as i32, found.start, found.end),
        (WRITE, 100, TO_END)
    );
    assert_eq!(found.pid, 20, "the only other owner");
    let found = rig
        .fs
        .getlk(&root(), id, &lk(fh, 2, WRITE, 200, 300))
        .unwrap();
    assert_eq!(found.type_ as i32, NONE, "its own lock is not in its way");
    set(&rig, id, lk(fh, 1, NONE, 0, 49)).unwrap();
    set(&rig, id, lk(fh, 3, WRITE, 0, 49)).unwrap();
}

#[test]
fn the_process_behind_a_lock_is_told_among_many_and_only_within_its_guest() {
    let rig = Rig::new();
    let (f, fh) = rig.create(ROOT, "f");
    for owner in 1..=5 {
        let at = owner * 10;
        set(&rig, f.nodeid, lk(fh, owner, WRITE, at, at + 4)).unwrap();
        set(&rig, f.nodeid, lk(fh, owner, READ, 1000, 1000 + owner)).unwrap();
    }
    let holder = |fs: &Passthrough, id, fh, owner, at| {
        let asked = lk(fh, owner, WRITE, at, at);
        let found = fs.getlk(&root(), id, &asked).unwrap();
        (found.type_ as i32, found.pid)
    };
    for owner in 1..=5 {
        let at = owner * 10 + 2;
        assert_eq!(
            holder(&rig.fs, f.nodeid, fh, 9, at),
            (WRITE, owner as u32 * 10)
        );
    }
    assert_eq!(holder(&rig.fs, f.nodeid, fh, 1, 1005), (READ, 50));
    let other = Passthrough::new(&spec(&rig.top)).unwrap();
    mount(&other, u64::MAX);
    let (id, gh) = open_in(&other, "f");
    assert_eq!(
        holder(&other, id, gh, 9, 12),
        (WRITE, 0),
        "of another guest"
    );
    let host = File::options()
        .read(true)
        .write(true)
        .open(rig.top.join("g"));
    let host = host
        .or_else(|_| File::create_new(rig.top.join("g")))
        .unwrap();
    assert!(host_lock(&host, WRITE));
    let (id, gh) = open_in(&rig.fs, "g");
    assert_eq!(holder(&rig.fs, id, gh, 9, 12), (WRITE, 0), "of the host");
}

/// Looks a file up and opens it.
fn open_in(fs: &Passthrough, n: &str) -> (u64, u64) {
    let id = fs.lookup(&root(), ROOT, &name(n)).unwrap().nodeid;
    let arg = fuse_open_in {
        flags: libc::O_RDWR as u32,
        open_flags: 0,
    };
    (id, fs.open(&root(), id, &arg).unwrap().fh)
}

/// A device whose lock owners wait: its files `a`, `b` and `c`, open.
struct Waiting {
    fs: Passthrough,
    files: [(u64, u64); 3],
}

const A: usize = 0;
const B: usize = 1;
const C: usize = 2;

impl Waiting {
    fn new(rig: &Rig) -> Waiting {
        for n in ["a", "b", "c"] {
            fs::write(rig.top.join(n), "").unwrap();
        }
        let fs = Passthrough::new(&spec(&rig.top)).unwrap();
        mount(&fs, u64::MAX);
        let files = ["a", "b", "c"].map(|n| open_in(&fs, n));
        Waiting { fs, files }
    }

    fn ask(&self, file: usize, owner: u64, kind: i32, unique: u64) -> Result<(), Errno> {
        let (id, fh) = self.files[file];
        let caller = Caller { unique, ..root() };
        let arg = lk(fh, owner, kind, 0, TO_END);
        self.fs.setlk(&caller, id, &arg, true)
    }

    /// Takes a free lock.
    fn take(&self, file: usize, owner: u64, kind: i32) {
        self.ask(file, owner, kind, 0).unwrap();
    }

    /// Has a request wait for a lock.
    fn wait(&self, file: usize, owner: u64, kind: i32, unique: u64) {
        assert_eq!(self.ask(file, owner, kind, unique), Err(Errno::EAGAIN));
    }

    fn deadlocks(&self, file: usize, owner: u64, kind: i32, unique: u64) {
        assert_eq!(self.ask(file, owner, kind, unique), Err(Errno::EDEADLK));
    }
}

#[test]
fn a_request_that_would_wait_for_itself_is_refused_and_others_go_on_waiting() {
    let rig = Rig::new();
    let one = Waiting::new(&rig);
    one.take(A, 1, WRITE);
    one.take(B, 2, WRITE);
    one.take(C, 3, WRITE);
    one.wait(B, 1, WRITE, 101);
    one.wait(C, 2, READ, 102);
    one.wait(B, 1, WRITE, 101);
    one.deadlocks(A, 3, WRITE, 103);
    one.deadlocks(A, 3, READ, 103);
    one.wait(A, 4, READ, 104);
    one.take(C, 3, NONE);
    one.ask(C, 2, READ, 102).unwrap();
    one.wait(A, 3, WRITE, 103);
}

#[test]
fn two_readers_that_both_want_to_write_are_a_deadlock() {
    let rig = Rig::new();
    let one = Waiting::new(&rig);
    one.take(A, 1, READ);
    one.take(A, 2, READ);
    one.wait(A, 1, WRITE, 101);
    one.deadlocks(A, 2, WRITE, 102);
    one.take(A, 2, NONE);
    one.ask(A, 1, WRITE, 101).unwrap();
}

#[test]
fn a_deadlock_between_two_guests_is_found_too() {
    let rig = Rig::new();
    let one = Waiting::new(&rig);
    let two = Waiting::new(&rig);
    one.take(A, 7, WRITE);
    two.take(B, 7, WRITE);
    one.wait(B, 7, WRITE, 1);
    two.deadlocks(A, 7, WRITE, 1);
    two.fs.unmount();
    one.ask(B, 7, WRITE, 1).unwrap();
}

#[test]
fn a_wait_that_is_over_closes_no_circle() {
    for how in ["given up", "unmounted", "granted"] {
        let rig = Rig::new();
        let one = Waiting::new(&rig);
        let two = Waiting::new(&rig);
        one.take(A, 1, WRITE);
        two.take(B, 2, WRITE);
        one.wait(B, 1, WRITE, 101);
        match how {
            "given up" => one.fs.wait_ended(101),
            "unmounted" => {
                one.fs.unmount();
                mount(&one.fs, u64::MAX);
                let (id, fh) = open_in(&one.fs, "a");
                let again = lk(fh, 1, WRITE, 0, TO_END);
                one.fs.setlk(&root(), id, &again, false).unwrap();
            }
            _ => {
                two.take(B, 2, NONE);
                one.ask(B, 1, WRITE, 101).unwrap();
            }
        }
        two.wait(A, 2, WRITE, 102);
    }
}

#[test]
fn a_circle_that_a_granted_lock_closes_is_found_when_the_waiter_tries_again() {
    let rig = Rig::new();
    let one = Waiting::new(&rig);
    one.take(A, 1, WRITE);
    one.take(B, 3, WRITE);
    one.wait(A, 2, WRITE, 102);
    one.wait(B, 1, WRITE, 101);
    one.take(B, 3, NONE);
    one.take(B, 2, WRITE);
    one.deadlocks(B, 1, WRITE, 101);
}

#[test]
fn locks_that_make_no_sense_are_refused() {
    let rig = Rig::new();
    let (f, fh) = rig.create(ROOT, "f");
    for bad in [
        lk(fh, 1, 7, 0, 1),
        lk(fh, 1, -1, 0, 1),
        lk(fh, 1, WRITE, 5, 4),
        lk(fh, 1, WRITE, 1 << 63, u64::MAX),
    ] {
        assert_eq!(set(&rig, f.nodeid, bad).unwrap_err(), Errno::EINVAL);
    }
    assert_eq!(
        set(&rig, f.nodeid, lk(fh + 9, 1, WRITE, 0, 1)).unwrap_err(),
        Errno::EBADF
    );
    assert_eq!(rig.fs.usage().2, 0);
}

#[test]
fn another_device_and_the_host_are_in_the_way_too() {
    let rig = Rig::new();
    let (f, fh) = rig.create(ROOT, "f");
    set(&rig, f.nodeid, lk(fh, 1, WRITE, 0, TO_END)).unwrap();
    let host = File::options()
        .read(true)
        .write(true)
        .open(rig.top.join("f"))
        .unwrap();
    assert!(!host_lock(&host, READ));
    let other = Passthrough::new(&spec(&rig.top)).unwrap();
    mount(&other, u64::MAX);
    let g = other.lookup(&root(), ROOT, &name("f")).unwrap().nodeid;
    let flags = libc::O_RDWR as u32;
    let gh = other
        .open(
            &root(),
            g,
            &fuse_open_in {
                flags,
                open_flags: 0,
            },
        )
        .unwrap()
        .fh;
    let wanted = lk(gh, 1, WRITE, 0, 0);
    assert_eq!(
        other.setlk(&root(), g, &wanted, true).unwrap_err(),
        Errno::EAGAIN
    );
    set(&rig, f.nodeid, lk(fh, 1, NONE, 0, TO_END)).unwrap();
    other.setlk(&root(), g, &wanted, true).unwrap();
    assert!(!host_lock(&host, WRITE));
    other.unmount();
    assert!(host_lock(&host, WRITE));
    assert_eq!(
        set(&rig, f.nodeid, lk(fh, 1, READ, 0, 0)).unwrap_err(),
        Errno::EAGAIN
    );
}

#[test]
fn locks_go_with_flush_release_forget_and_unmount_and_wake_who_waits() {
    let rig = Rig::new();
    let path = rig.top.join("f");
    fs::write(&path, "").unwrap();
    let host = File::options().read(true).write(true).open(&path).unwrap();
    let free = |when: &str| {
        assert!(host_lock(&host, WRITE), "still locked after {when}");
        assert!(host_lock(&host, NONE));
    };
    for when in ["unlock", "flush", "release", "close", "forget", "unmount"] {
        let id = rig.look(ROOT, "f").unwrap().nodeid;
        let fh = rig.open(id, libc::O_RDWR).unwrap();
        set(&rig, id, lk(fh, 1, WRITE, 0, 9)).unwrap();
        assert!(!host_lock(&host, READ));
        let before = rig.fs.lock_epoch();
        match when {
            "unlock" => set(&rig, id, lk(fh, 1, NONE, 0, TO_END)).unwrap(),
            "flush" => {
                let other = fuse_flush_in {
                    fh,
                    lock_owner: 2,
                    ..Default::default()
                };
                rig.fs.flush(&root(), id, &other).unwrap();
                assert!(!host_lock(&host, READ));
                let arg = fuse_flush_in {
                    fh,
                    lock_owner: 1,
                    ..Default::default()
                };
                rig.fs.flush(&root(), id, &arg).unwrap();
            }
            "release" => {
                let release_flags = FUSE_RELEASE_FLUSH;
                let arg = fuse_release_in {
                    fh,
                    lock_owner: 1,
                    release_flags,
                    flags: 0,
                };
                rig.fs.release(&root(), id, &arg).unwrap();
            }
            // What the guest's kernel sends at the end of an open file description whose own locks (F_OFD_SETLK) it held.
            "close" => {
                let arg = fuse_release_in {
                    fh,
                    ..Default::default()
                };
                rig.fs.release(&root(), id, &arg).unwrap();
            }
            "forget" => rig.fs.forget(id, u64::MAX),
            _ => rig.mount(u64::MAX),
        }
        assert_ne!(rig.fs.lock_epoch(), before, "{when}");
        assert_eq!(rig.fs.usage().2, 0, "{when}");
        free(when);
    }
}

#[test]
fn whole_file_locks_belong_to_the_open_file() {
    let rig = Rig::new();
    let (f, a) = rig.create(ROOT, "f");
    let b = rig.open(f.nodeid, libc::O_RDWR).unwrap();
    let host = File::open(rig.top.join("f")).unwrap();
    let flock = |fh, kind| {
        let arg = fuse_lk_in {
            lk_flags: FUSE_LK_FLOCK,
            ..lk(fh, 1, kind, 0, TO_END)
        };
        rig.fs.setlk(&root(), f.nodeid, &arg, true)
    };
    flock(a, WRITE).unwrap();
    assert_eq!(flock(b, READ).unwrap_err(), Errno::EAGAIN);
    assert!(!host_flock(&host, libc::LOCK_SH));
    set(&rig, f.nodeid, lk(b, 2, WRITE, 0, TO_END)).unwrap();
    let before = rig.fs.lock_epoch();
    flock(a, READ).unwrap();
    assert_ne!(rig.fs.lock_epoch(), before);
    flock(b, READ).unwrap();
    let before = rig.fs.lock_epoch();
    flock(b, NONE).unwrap();
    assert_ne!(rig.fs.lock_epoch(), before);
    let before = rig.fs.lock_epoch();
    let release_flags = FUSE_RELEASE_FLOCK_UNLOCK;
    let arg = fuse_release_in {
        fh: a,
        release_flags,
        ..Default::default()
    };
    rig.fs.release(&root(), f.nodeid, &arg).unwrap();
    assert_ne!(rig.fs.lock_epoch(), before);
    assert!(host_flock(&host, libc::LOCK_EX));
}

#[test]
fn a_directory_can_be_locked_as_a_whole_only() {
    let rig = Rig::new();
    let fh = rig.opendir(ROOT).unwrap();
    let arg = fuse_lk_in {
        lk_flags: FUSE_LK_FLOCK,
        ..lk(fh, 1, WRITE, 0, TO_END)
    };
    rig.fs.setlk(&root(), ROOT, &arg, false).unwrap();
    assert_eq!(
        set(&rig, ROOT, lk(fh, 1, READ, 0, 1)).unwrap_err(),
        Errno::EBADF
    );
}

#[test]
fn lock_owners_are_bounded_and_say_so() {
    let capacity = ferry_dataplane::fsdev::passthrough::Capacity {
        lock_owners: 4,
        ..Default::default()
    };
    let rig = Rig::sized("/dev/shm", capacity, |_| {});
    let (f, fh) = rig.create(ROOT, "f");
    for owner in 1..=4 {
        set(&rig, f.nodeid, lk(fh, owner, READ, 0, 1)).unwrap();
    }
    assert_eq!(
        set(&rig, f.nodeid, lk(fh, 5, READ, 0, 1)).unwrap_err(),
        Errno::ENOLCK
    );
    set(&rig, f.nodeid, lk(fh, 2, NONE, 0, TO_END)).unwrap();
    set(&rig, f.nodeid, lk(fh, 5, READ, 0, 1)).unwrap();
}
