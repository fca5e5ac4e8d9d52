//! Inodes within a budget of descriptors: cold ones, reused numbers, nothing left behind.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use ferry_dataplane::fsdev::FsDev as _;
use ferry_dataplane::fsdev::passthrough::Capacity;
use ferry_dataplane::fuse::abi::*;
use ferry_shared::errno::Errno;

use crate::rig::{ROOT, Rig, name, root};

fn small(hot_inodes: u32) -> Capacity {
    Capacity {
        hot_inodes,
        ..Default::default()
    }
}

#[test]
fn many_inodes_need_few_descriptors_and_stay_usable() {
    const FILES: usize = 100_000;
    const HOT: u32 = 64;
    let rig = Rig::sized("/dev/shm", small(HOT), |_| {});
    for d in 0..FILES / 1000 {
        fs::create_dir(rig.top.join(format!("d{d}"))).unwrap();
        for f in 0..1000 {
            fs::File::create(rig.top.join(format!("d{d}/f{f}"))).unwrap();
        }
    }
    let mut nodes = Vec::new();
    for d in 0..FILES / 1000 {
        let dir = rig.look(ROOT, &format!("d{d}")).unwrap().nodeid;
        for f in 0..1000 {
            let entry = rig.look(dir, &format!("f{f}")).unwrap();
            nodes.push((entry.nodeid, entry.attr.ino));
        }
    }
    assert!(rig.fds() <= HOT as usize + 8, "{} descriptors", rig.fds());
    assert_eq!(rig.fs.usage().0 as usize, 1 + FILES / 1000 + FILES);
    for (nodeid, ino) in nodes.iter().step_by(7) {
        assert_eq!(
            rig.fs.getattr(&root(), *nodeid, None).unwrap().attr.ino,
            *ino
        );
    }
    let dir = rig.look(ROOT, "d3").unwrap().nodeid;
    for f in (0..1000).step_by(13) {
        let entry = rig.look(dir, &format!("f{f}")).unwrap();
        assert_eq!(
            entry.nodeid,
            nodes[3000 + f].0,
            "a cold inode is known again"
        );
        rig.forget(entry.nodeid);
    }
    for (nodeid, _) in nodes {
        rig.forget(nodeid);
    }
    assert_eq!(rig.fs.usage().0 as usize, 1 + FILES / 1000);
    rig.fs.unmount();
    assert_eq!(rig.fs.usage(), (1, 0, 0));
}

#[test]
fn a_cold_inode_whose_number_was_given_away_is_stale() {
    for base in ["/dev/shm", "/tmp"] {
        let rig = Rig::sized(base, small(8), |_| {});
        let victim = rig.top.join("victim");
        fs::write(&victim, "old").unwrap();
        let old = rig.look(ROOT, "victim").unwrap();
        for i in 0..64 {
            fs::write(rig.top.join(format!("f{i}")), "").unwrap();
            rig.look(ROOT, &format!("f{i}")).unwrap();
        }
        fs::remove_file(&victim).unwrap();
        // The file system may or may not give the number away again; all inodes must be told apart in any case.
        for i in 0..64 {
            let path = rig.top.join(format!("new{i}"));
            fs::write(&path, "new").unwrap();
            let new = rig.look(ROOT, &format!("new{i}")).unwrap();
            assert_ne!(new.nodeid, old.nodeid);
            assert_eq!(new.attr.ino, fs::metadata(&path).unwrap().ino());
        }
        assert_eq!(
            rig.fs.getattr(&root(), old.nodeid, None).unwrap_err(),
            Errno::ESTALE
        );
        rig.forget(old.nodeid);
    }
}

#[test]
fn an_inode_without_a_name_stays_reachable_while_the_guest_knows_it() {
    let rig = Rig::sized("/dev/shm", small(8), |_| {});
    let (file, fh) = rig.create(ROOT, "f");
    rig.write(file.nodeid, fh, 0, b"text").unwrap();
    rig.fs.unlink(&root(), ROOT, &name("f")).unwrap();
    rig.release(file.nodeid, fh);
    for i in 0..64 {
        rig.create(ROOT, &format!("f{i}"));
    }
    let attr = rig.fs.getattr(&root(), file.nodeid, None).unwrap().attr;
    assert_eq!((attr.nlink, attr.size), (0, 4));
    let again = rig.open(file.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(rig.read(file.nodeid, again, 0, 9).unwrap(), b"text");
}

#[test]
fn a_full_inode_table_recovers() {
    let capacity = Capacity {
        inodes: 10,
        ..Default::default()
    };
    let rig = Rig::sized("/dev/shm", capacity, |_| {});
    for i in 0..12 {
        fs::write(rig.top.join(format!("f{i}")), "").unwrap();
    }
    let nodes: Vec<_> = (0..9)
        .map(|i| rig.look(ROOT, &format!("f{i}")).unwrap().nodeid)
        .collect();
    let fds = rig.fds();
    assert_eq!(rig.look(ROOT, "f9").unwrap_err(), Errno::ENFILE);
    let made = rig.create_with(&root(), ROOT, "f10", libc::O_RDWR, 0o644, 0);
    assert_eq!(made.unwrap_err(), Errno::ENFILE);
    let made = rig.create_with(&root(), ROOT, "new", libc::O_RDWR, 0o644, 0);
    assert_eq!(made.unwrap_err(), Errno::ENFILE);
    assert!(!rig.top.join("new").exists());
    assert_eq!(rig.fds(), fds);
    assert_eq!(rig.list(ROOT, 4096, true).len(), 14);
    // The listing has counted it once more.
    rig.fs.forget(nodes[4], 2);
    rig.look(ROOT, "f9").unwrap();
}

/// What an NFS server in the guest asks for after its kernel has dropped the inode.
#[test]
fn a_forgotten_inode_is_found_again_by_its_node_id() {
    let rig = Rig::on_disk();
    let d = rig.mkdir(ROOT, "d").unwrap().nodeid;
    let (f, fh) = rig.create(d, "f");
    rig.release(f.nodeid, fh);
    let fds = rig.fds();
    rig.forget(f.nodeid);
    rig.forget(d);
    assert_eq!(rig.fds(), fds - 2, "it costs no descriptor");
    assert_eq!(rig.fs.usage(), (1, 0, 0));
    let again = rig.look(f.nodeid, ".").unwrap();
    assert_eq!((again.nodeid, again.attr.ino), (f.nodeid, f.attr.ino));
    assert_eq!(rig.look(d, "..").unwrap().nodeid, ROOT);
    assert_eq!(rig.look(d, ".").unwrap().nodeid, d);
    assert_eq!(rig.fs.usage().0, 3);
    rig.forget(d);
    assert_eq!(rig.look(ROOT, "d").unwrap().nodeid, d, "by name too");
    rig.forget(f.nodeid);
    fs::remove_file(rig.top.join("d/f")).unwrap();
    assert_eq!(rig.look(f.nodeid, ".").unwrap_err(), Errno::ESTALE);
}

/// The server's clients keep their handles while its machine mounts again.
#[test]
fn node_ids_outlive_a_mount_for_those_who_hold_file_handles() {
    let rig = Rig::on_disk();
    let fds = rig.fds();
    let d = rig.mkdir(ROOT, "d").unwrap().nodeid;
    let (f, _) = rig.create(d, "f");
    let (gone, _) = rig.create(d, "gone");
    rig.fs.unlink(&root(), d, &name("gone")).unwrap();
    for _ in 0..2 {
        rig.mount(u64::MAX);
        // The FORGETs of the mount before may come late.
        rig.forget(f.nodeid);
        assert_eq!(rig.fs.usage(), (1, 0, 0));
        assert_eq!(rig.fds(), fds, "it costs no descriptor");
    }
    assert_eq!(rig.look(f.nodeid, ".").unwrap().attr.ino, f.attr.ino);
    assert_eq!(rig.look(d, "f").unwrap().nodeid, f.nodeid);
    assert_eq!(rig.look(gone.nodeid, ".").unwrap_err(), Errno::ESTALE);
    rig.mount(!FUSE_EXPORT_SUPPORT);
    assert_eq!(rig.fs.getattr(&root(), d, None).unwrap_err(), Errno::ESTALE);
}

#[test]
fn a_removed_inode_is_not_remembered() {
    let rig = Rig::new();
    let (f, fh) = rig.create(ROOT, "f");
    rig.fs.unlink(&root(), ROOT, &name("f")).unwrap();
    rig.release(f.nodeid, fh);
    rig.forget(f.nodeid);
    assert_eq!(rig.look(f.nodeid, ".").unwrap_err(), Errno::ESTALE);
    assert_eq!(rig.fds(), Rig::new().fds());
}

#[test]
fn forgotten_inodes_make_way_for_others() {
    let capacity = Capacity {
        inodes: 16,
        ..Default::default()
    };
    let rig = Rig::sized("/dev/shm", capacity, |_| {});
    for i in 0..200 {
        fs::write(rig.top.join(format!("f{i}")), "").unwrap();
        let f = rig.look(ROOT, &format!("f{i}")).unwrap();
        rig.forget(f.nodeid);
        assert_eq!(rig.look(f.nodeid, ".").unwrap().nodeid, f.nodeid);
        rig.forget(f.nodeid);
    }
    let kept: Vec<_> = (0..15)
        .map(|i| rig.look(ROOT, &format!("f{i}")).unwrap().nodeid)
        .collect();
    assert_eq!(rig.look(ROOT, "f99").unwrap_err(), Errno::ENFILE);
    assert_eq!(rig.fs.usage().0, 16);
    rig.forget(kept[3]);
    rig.look(ROOT, "f99").unwrap();
}

#[test]
fn a_full_handle_table_leaves_nothing_behind() {
    let capacity = Capacity {
        handles: 3,
        ..Default::default()
    };
    let rig = Rig::sized("/dev/shm", capacity, |_| {});
    let (file, fh) = rig.create(ROOT, "f");
    rig.open(file.nodeid, libc::O_RDONLY).unwrap();
    rig.opendir(ROOT).unwrap();
    let before = (rig.fds(), rig.fs.usage());
    assert_eq!(
        rig.open(file.nodeid, libc::O_RDONLY).unwrap_err(),
        Errno::ENFILE
    );
    assert_eq!(rig.opendir(ROOT).unwrap_err(), Errno::ENFILE);
    let made = rig.create_with(&root(), ROOT, "g", libc::O_RDWR, 0o644, 0);
    assert_eq!(made.unwrap_err(), Errno::ENFILE);
    assert_eq!((rig.fds(), rig.fs.usage()), before);
    assert!(!rig.top.join("g").exists());
    rig.release(file.nodeid, fh);
    rig.open(file.nodeid, libc::O_RDONLY).unwrap();
}

#[test]
fn every_lookup_that_is_counted_can_be_taken_back_and_leaves_no_descriptor() {
    let rig = Rig::on_disk();
    let fds = rig.fds();
    let mut counted = Vec::new();
    for round in 0..3 {
        let dir = rig
            .look(ROOT, "d")
            .or_else(|_| rig.mkdir(ROOT, "d"))
            .unwrap();
        counted.push(dir.nodeid);
        let n = format!("f{round}");
        let (file, fh) = rig.create(dir.nodeid, &n);
        counted.push(file.nodeid);
        rig.release(file.nodeid, fh);
        let link = rig.fs.link(&root(), ROOT, file.nodeid, &name(&n)).unwrap();
        counted.push(link.nodeid);
        counted.push(rig.look(dir.nodeid, "..").unwrap().nodeid);
        counted.push(rig.look(dir.nodeid, ".").unwrap().nodeid);
        counted.push(
            rig.fs
                .symlink(&root(), ROOT, &name(&format!("l{round}")), c"x")
                .unwrap()
                .nodeid,
        );
        let arg = fuse_mknod_in {
            mode: libc::S_IFIFO | 0o600,
            ..Default::default()
        };
        counted.push(
            rig.fs
                .mknod(&root(), ROOT, &name(&format!("p{round}")), &arg)
                .unwrap()
                .nodeid,
        );
        let plus = rig.list(ROOT, 65536, true);
        counted.extend(
            plus.iter()
                .map(|e| e.entry.unwrap().nodeid)
                .filter(|&id| id != 0),
        );
    }
    for nodeid in counted {
        rig.forget(nodeid);
    }
    assert_eq!(rig.fs.usage(), (1, 0, 0));
    assert_eq!(rig.fds(), fds);
}

#[test]
fn a_device_that_goes_takes_its_descriptors_along() {
    let rig = Rig::new();
    let other =
        ferry_dataplane::fsdev::passthrough::Passthrough::new(&crate::rig::spec(&rig.top)).unwrap();
    crate::rig::mount(&other, u64::MAX);
    let fds = rig.fds();
    fs::write(rig.top.join("f"), "").unwrap();
    let f = other.lookup(&root(), ROOT, c"f").unwrap().nodeid;
    other.open(&root(), f, &fuse_open_in::default()).unwrap();
    assert_eq!(rig.fds(), fds + 2);
    drop(other);
    assert_eq!(
        rig.fds(),
        fds - 2,
        "the root, and the descriptor on its mount"
    );
}

#[test]
fn a_closed_file_leaves_one_descriptor_for_reading_to_the_next_open() {
    let rig = Rig::new();
    let (file, fh) = rig.create(ROOT, "f");
    rig.write(file.nodeid, fh, 0, b"text").unwrap();
    rig.release(file.nodeid, fh);
    let nodeid = file.nodeid;
    let fds = rig.fds();
    let open = |flags| rig.open(nodeid, flags).unwrap();

    let first = open(libc::O_RDONLY);
    rig.release(nodeid, first);
    assert_eq!(rig.fds(), fds + 1, "it is left");
    let (first, second) = (open(libc::O_RDONLY), open(libc::O_RDONLY));
    assert_eq!(rig.fds(), fds + 2, "one takes it, the other needs its own");
    assert_eq!(rig.read(nodeid, first, 0, 9).unwrap(), b"text");
    assert_eq!(rig.read(nodeid, second, 0, 9).unwrap(), b"text");
    rig.release(nodeid, first);
    assert_eq!(
        rig.read(nodeid, first, 0, 9).unwrap_err(),
        Errno::EBADF,
        "an ended handle stays ended"
    );
    rig.release(nodeid, second);
    assert_eq!(rig.fds(), fds + 1, "one is enough");

    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_SYNC] {
        let other = open(flags);
        assert_eq!(rig.fds(), fds + 2, "what is left is not for {flags:#x}");
        rig.release(nodeid, other);
        assert_eq!(rig.fds(), fds + 1, "{flags:#x} leaves nothing");
    }
    rig.forget(nodeid);
    assert_eq!(rig.fds(), fds - 1, "it goes with its inode");
}
