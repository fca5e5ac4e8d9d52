//! Tables that outlive the process: what a guest knows is still there after a crash.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::Instant;

use ferry_dataplane::fsdev::FsDev as _;
use ferry_dataplane::fsdev::passthrough::{Capacity, Passthrough};
use ferry_dataplane::fuse::abi::*;
use ferry_dataplane::recovery::region::Region;
use ferry_shared::errno::Errno;

use crate::rig::{ROOT, Rig, root, spec};

#[test]
fn node_ids_handles_and_lookup_counts_survive_a_crash() {
    let region = Region::create().unwrap();
    let rig = Rig::lasting(&region);
    fs::create_dir(rig.top.join("d")).unwrap();
    fs::write(rig.top.join("d/f"), b"content").unwrap();
    let dir = rig.look(ROOT, "d").unwrap().nodeid;
    let file = rig.look(dir, "f").unwrap();
    assert_eq!(rig.look(dir, "f").unwrap().nodeid, file.nodeid);
    let fh = rig.open(file.nodeid, libc::O_RDONLY).unwrap();
    let gone = rig.look(ROOT, "d").unwrap().nodeid;
    assert_eq!(gone, dir);
    let (killed, killed_fh) = rig.create(ROOT, "killed");
    rig.release(killed.nodeid, killed_fh);
    rig.forget(killed.nodeid);
    let usage = rig.fs.usage();

    let (rig, _region) = rig.crash(region);
    assert_eq!(rig.fs.usage(), usage);
    assert_eq!(rig.read(file.nodeid, fh, 3, 4).unwrap(), b"tent");
    let attr = rig.fs.getattr(&root(), file.nodeid, None).unwrap().attr;
    assert_eq!(attr.ino, file.attr.ino);
    assert_eq!(rig.look(dir, "f").unwrap().nodeid, file.nodeid);
    assert!(
        rig.fs.getattr(&root(), killed.nodeid, None).is_ok(),
        "a file handle may still name what was forgotten"
    );
    assert_eq!(
        rig.read(killed.nodeid, killed_fh, 0, 1).err(),
        Some(Errno::EBADF)
    );
    rig.release(file.nodeid, fh);
    // Three lookups before and after, no more and no less.
    rig.fs.forget(file.nodeid, 2);
    assert!(rig.fs.getattr(&root(), file.nodeid, None).is_ok());
    rig.forget(file.nodeid);
    assert_eq!(rig.fs.usage().0, 2, "the root and its directory");
}

#[test]
fn ids_given_out_before_a_crash_are_never_given_to_something_else() {
    let region = Region::create().unwrap();
    let rig = Rig::lasting(&region);
    let (a, fh) = rig.create(ROOT, "a");
    rig.release(a.nodeid, fh);
    rig.forget(a.nodeid);
    let (rig, region) = rig.crash(region);
    let (b, fh_b) = rig.create(ROOT, "b");
    assert_ne!((b.nodeid, fh_b), (a.nodeid, fh));
    assert_ne!(b.nodeid, a.nodeid);
    let (rig, _region) = rig.crash(region);
    let (c, fh_c) = rig.create(ROOT, "c");
    assert!(![a.nodeid, b.nodeid].contains(&c.nodeid));
    assert!(![fh, fh_b].contains(&fh_c));
}

#[test]
fn an_open_file_keeps_its_flags_and_is_not_truncated_again() {
    let region = Region::create().unwrap();
    let rig = Rig::lasting(&region);
    fs::write(rig.top.join("log"), b"").unwrap();
    let log = rig.look(ROOT, "log").unwrap().nodeid;
    let append = rig
        .open(log, libc::O_WRONLY | libc::O_APPEND | libc::O_TRUNC)
        .unwrap();
    rig.write(log, append, 0, b"one").unwrap();
    let (rig, _region) = rig.crash(region);
    rig.write(log, append, 0, b"two").unwrap();
    assert_eq!(fs::read(rig.top.join("log")).unwrap(), b"onetwo");
    assert_eq!(rig.read(log, append, 0, 1).err(), Some(Errno::EBADF));
}

#[test]
fn a_half_read_directory_goes_on_where_it_was() {
    let region = Region::create().unwrap();
    let rig = Rig::lasting(&region);
    for n in 0..200 {
        fs::write(rig.top.join(format!("entry-{n}")), b"").unwrap();
    }
    let fh = rig.opendir(ROOT).unwrap();
    let mut all = rig.readdir(ROOT, fh, 0, 2048, false);
    assert!(all.len() > 10 && all.len() < 150, "{}", all.len());
    let (rig, _region) = rig.crash(region);
    loop {
        let at = all.last().unwrap().off;
        let more = rig.readdir(ROOT, fh, at, 2048, false);
        if more.is_empty() {
            break;
        }
        all.extend(more);
    }
    let mut names: Vec<_> = all.into_iter().map(|e| e.name).collect();
    names.sort();
    let total = names.len();
    names.dedup();
    assert_eq!((total, names.len()), (202, 202));
}

#[test]
fn an_export_that_is_another_directory_now_is_refused_and_can_come_back() {
    let region = Region::create().unwrap();
    let rig = Rig::lasting(&region);
    let (file, fh) = rig.create(ROOT, "f");
    rig.write(file.nodeid, fh, 0, b"kept").unwrap();
    let (dead, region) = rig.die(region);
    let aside = dead.top.with_extension("aside");
    fs::rename(&dead.top, &aside).unwrap();
    fs::create_dir(&dead.top).unwrap();
    let area = region.area("fs").unwrap().unwrap();
    let open = || Passthrough::in_area(&spec(&dead.top), Capacity::default(), &area, None);
    let failure = open().map(drop).unwrap_err();
    assert_eq!(failure.errno, Errno::ESTALE);
    assert!(
        failure.detail.contains("not the directory"),
        "{}",
        failure.detail
    );
    fs::remove_dir(&dead.top).unwrap();
    assert_eq!(open().map(drop).unwrap_err().errno, Errno::ENOENT);
    fs::rename(&aside, &dead.top).unwrap();
    drop(area);
    let rig = dead.rise(&region);
    assert_eq!(rig.read(file.nodeid, fh, 0, 4).unwrap(), b"kept");
}

#[test]
fn a_file_that_was_removed_meanwhile_is_stale_and_its_number_is_not_mistaken() {
    let region = Region::create().unwrap();
    let rig = Rig::lasting(&region);
    fs::write(rig.top.join("f"), b"old").unwrap();
    let old = rig.look(ROOT, "f").unwrap();
    let top = rig.top.clone();
    let (dead, region) = rig.die(region);
    fs::remove_file(top.join("f")).unwrap();
    fs::write(top.join("f"), b"new").unwrap();
    let rig = dead.rise(&region);
    assert_eq!(
        rig.fs.getattr(&root(), old.nodeid, None).err(),
        Some(Errno::ESTALE)
    );
    let new = rig.look(ROOT, "f").unwrap();
    assert_ne!(new.nodeid, old.nodeid);
    let ino = fs::metadata(top.join("f")).unwrap().ino();
    assert_eq!(new.attr.ino, ino);
}

#[test]
fn taking_over_ten_thousand_inodes_opens_none_of_them() {
    let region = Region::create().unwrap();
    let rig = Rig::lasting(&region);
    let mut nodes = Vec::new();
    for n in 0..10_000 {
        fs::write(rig.top.join(format!("{n}")), b"").unwrap();
        nodes.push(rig.look(ROOT, &format!("{n}")).unwrap().nodeid);
    }
    let (dead, region) = rig.die(region);
    let before = dead.fds();
    let began = Instant::now();
    let rig = dead.rise(&region);
    println!("taken over in {:?}", began.elapsed());
    assert!(rig.fds() < before + 8, "{} and {before}", rig.fds());
    assert_eq!(rig.fs.usage().0, 10_001);
    for nodeid in nodes {
        rig.fs.getattr(&root(), nodeid, None).unwrap();
        rig.forget(nodeid);
    }
    assert_eq!(rig.fs.usage().0, 1);
}

#[test]
fn a_crash_at_any_step_of_taking_over_leaves_it_possible() {
    let region = Region::create().unwrap();
    let mut rig = Rig::lasting(&region);
    let (file, fh) = rig.create(ROOT, "f");
    rig.write(file.nodeid, fh, 0, b"abc").unwrap();
    let mut region = region;
    for _ in 0..20 {
        (rig, region) = rig.crash(region);
        assert_eq!(rig.read(file.nodeid, fh, 0, 3).unwrap(), b"abc");
        let (n, open) = rig.create(ROOT, "more");
        rig.release(n.nodeid, open);
        rig.forget(n.nodeid);
        rig.fs
            .unlink(&root(), ROOT, &crate::rig::name("more"))
            .unwrap();
    }
    assert_eq!(rig.fs.usage(), (2, 1, 0));
    let attr: fuse_attr = rig.fs.getattr(&root(), file.nodeid, None).unwrap().attr;
    assert_eq!(attr.size, 3);
}
