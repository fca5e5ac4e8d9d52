//! Locks conflict between owners, devices and the host, and go when they should.

use std::fs::{self, File};

use ferry_dataplane::fsdev::FsDev as _;
use ferry_dataplane::fsdev::passthrough::Passthrough;
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
