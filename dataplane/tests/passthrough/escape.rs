//! Nothing in a guest's power reaches outside the export, opens a device, or waits for one.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::sync::atomic::{AtomicBool, Ordering};

use ferry_dataplane::fsdev::FsDev as _;
use ferry_dataplane::fuse::abi::*;
use ferry_shared::errno::Errno;

use crate::rig::{self, Mounted, ROOT, Rig, make_node, name, root};

#[test]
fn a_create_does_not_follow_a_link_to_a_file_outside() {
    let rig = Rig::new();
    let secret = rig.outside.join("secret");
    fs::write(&secret, "secret").unwrap();
    let target = name(secret.to_str().unwrap());
    let link = rig.fs.symlink(&root(), ROOT, &name("x"), &target).unwrap();
    for flags in [0, libc::O_TRUNC, libc::O_EXCL, libc::O_NOFOLLOW] {
        let made = rig.create_with(&root(), ROOT, "x", libc::O_RDWR | flags, 0o777, 0);
        let errno = made.unwrap_err();
        assert!([Errno::ELOOP, Errno::EEXIST].contains(&errno), "{errno}");
    }
    assert_eq!(
        rig.open(link.nodeid, libc::O_RDWR).unwrap_err(),
        Errno::ELOOP
    );
    assert_eq!(rig.opendir(link.nodeid).unwrap_err(), Errno::ENOTDIR);
    assert_eq!(rig.look(link.nodeid, "y").unwrap_err(), Errno::ENOTDIR);
    let meta = fs::metadata(&secret).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o7777), (6, 0o644));
    let missing = name(rig.outside.join("new").to_str().unwrap());
    rig.fs.symlink(&root(), ROOT, &name("y"), &missing).unwrap();
    rig.create_with(&root(), ROOT, "y", libc::O_RDWR, 0o777, 0)
        .unwrap_err();
    assert!(!rig.outside.join("new").exists());
}

#[test]
fn special_files_are_never_opened_and_never_waited_for() {
    let rig = Rig::new();
    make_node(&rig.top.join("fifo"), libc::S_IFIFO | 0o666, 0);
    make_node(
        &rig.top.join("null"),
        libc::S_IFCHR | 0o666,
        libc::makedev(1, 3),
    );
    make_node(
        &rig.top.join("disk"),
        libc::S_IFBLK | 0o666,
        libc::makedev(7, 0),
    );
    make_node(&rig.top.join("sock"), libc::S_IFSOCK | 0o666, 0);
    for n in ["fifo", "null", "disk", "sock"] {
        let nodeid = rig.look(ROOT, n).unwrap().nodeid;
        for flags in [
            libc::O_RDONLY,
            libc::O_WRONLY,
            libc::O_RDWR | libc::O_NONBLOCK,
        ] {
            assert_eq!(rig.open(nodeid, flags).unwrap_err(), Errno::ENXIO, "{n}");
            let made = rig.create_with(&root(), ROOT, n, flags, 0o644, 0);
            assert_eq!(made.unwrap_err(), Errno::ENXIO, "{n}");
        }
        let arg = fuse_bmap_in {
            block: 0,
            blocksize: 512,
            padding: 0,
        };
        assert_eq!(
            rig.fs.bmap(&root(), nodeid, &arg).unwrap_err(),
            Errno::EINVAL
        );
    }
}

#[test]
fn flags_that_could_do_harm_are_dropped() {
    let rig = Rig::new();
    let (file, _) = rig.create(ROOT, "f");
    let odd = libc::O_DIRECTORY
        | libc::O_PATH
        | libc::O_CREAT
        | libc::O_EXCL
        | libc::O_NOFOLLOW
        | libc::O_ASYNC;
    let fh = rig.open(file.nodeid, libc::O_RDWR | odd).unwrap();
    assert_eq!(rig.write(file.nodeid, fh, 0, b"x").unwrap(), 1);
    assert_eq!(
        rig.open(file.nodeid, libc::O_ACCMODE).unwrap_err(),
        Errno::EINVAL
    );
}

#[test]
fn dot_names_need_export_support_and_end_at_the_root() {
    let rig = Rig::new();
    let d = rig.mkdir(ROOT, "d").unwrap().nodeid;
    let e = rig.mkdir(d, "e").unwrap().nodeid;
    let (f, _) = rig.create(e, "f");
    assert_eq!(rig.look(e, "..").unwrap().nodeid, d);
    assert_eq!(rig.look(d, "..").unwrap().nodeid, ROOT);
    assert_eq!(rig.look(ROOT, "..").unwrap().nodeid, ROOT);
    assert_eq!(rig.look(ROOT, ".").unwrap().nodeid, ROOT);
    assert_eq!(rig.look(f.nodeid, ".").unwrap().nodeid, f.nodeid);
    assert_eq!(rig.look(f.nodeid, "..").unwrap_err(), Errno::ENOTDIR);
    rig.mount(!FUSE_EXPORT_SUPPORT);
    for n in [".", ".."] {
        assert_eq!(rig.look(ROOT, n).unwrap_err(), Errno::EINVAL);
    }
}

#[test]
fn the_parent_of_a_directory_that_was_moved_out_is_not_given() {
    let rig = Rig::new();
    let d = rig.mkdir(ROOT, "d").unwrap().nodeid;
    let e = rig.mkdir(d, "e").unwrap().nodeid;
    fs::rename(rig.top.join("d/e"), rig.outside.join("e")).unwrap();
    assert_eq!(rig.look(e, "..").unwrap_err(), Errno::ESTALE);
    fs::create_dir(rig.outside.join("deep")).unwrap();
    fs::rename(rig.outside.join("e"), rig.outside.join("deep/e")).unwrap();
    assert_eq!(rig.look(e, "..").unwrap_err(), Errno::ESTALE);
    fs::rename(rig.outside.join("deep/e"), rig.top.join("d/e")).unwrap();
    assert_eq!(rig.look(e, "..").unwrap().nodeid, d);
}

#[test]
fn the_parent_of_the_root_is_shown_as_the_root() {
    let rig = Rig::new();
    let own = fs::metadata(&rig.top).unwrap().ino();
    for plus in [false, true] {
        let listing = rig.list(ROOT, 4096, plus);
        let parent = listing.iter().find(|e| e.name == "..").unwrap();
        assert_eq!(parent.ino, own);
    }
}

#[test]
fn a_swap_of_directory_and_link_never_leads_outside() {
    let rig = Rig::new();
    fs::create_dir(rig.top.join("d")).unwrap();
    fs::write(rig.top.join("d/f"), "inside").unwrap();
    fs::write(rig.outside.join("f"), "outside").unwrap();
    symlink(&rig.outside, rig.top.join("l")).unwrap();
    let secret = fs::metadata(rig.outside.join("f")).unwrap().ino();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let (a, b) = (name("d"), name("l"));
                let flags = libc::RENAME_EXCHANGE;
                rig.fs.rename(&root(), ROOT, &a, ROOT, &b, flags).unwrap();
            }
        });
        let _end = rig::SetOnDrop(&done);
        for _ in 0..3_000 {
            let Ok(d) = rig.look(ROOT, "d") else { continue };
            if let Ok(f) = rig.look(d.nodeid, "f") {
                assert_ne!(f.attr.ino, secret);
                rig.forget(f.nodeid);
            }
            if let Ok((f, open)) = rig.create_with(&root(), d.nodeid, "g", libc::O_RDWR, 0o644, 0) {
                rig.release(f.nodeid, open.fh);
                rig.forget(f.nodeid);
            }
            rig.forget(d.nodeid);
        }
    });
    assert!(!rig.outside.join("g").exists());
}

#[test]
fn a_file_system_mounted_in_the_export_is_announced() {
    let rig = Rig::new();
    let d = rig.mkdir(ROOT, "d").unwrap();
    assert_eq!(d.attr.flags, 0);
    rig.forget(d.nodeid);
    let Some(_mounted) = Mounted::tmpfs(&rig.top.join("d")) else {
        return;
    };
    fs::write(rig.top.join("d/f"), "text").unwrap();
    let m = rig.look(ROOT, "d").unwrap();
    assert_eq!(m.attr.flags, FUSE_ATTR_SUBMOUNT);
    assert_ne!(m.attr.ino, d.attr.ino);
    let listing = rig.list(ROOT, 4096, true);
    let plus = listing
        .iter()
        .find(|e| e.name == "d")
        .unwrap()
        .entry
        .unwrap();
    assert_eq!(
        (plus.nodeid, plus.attr.flags),
        (m.nodeid, FUSE_ATTR_SUBMOUNT)
    );
    let f = rig.look(m.nodeid, "f").unwrap();
    assert_eq!((f.attr.flags, f.attr.size), (0, 4));
    assert_eq!(rig.look(m.nodeid, "..").unwrap().nodeid, ROOT);
    let moved = rig
        .fs
        .rename(&root(), m.nodeid, &name("f"), ROOT, &name("f"), 0);
    assert_eq!(moved.unwrap_err(), Errno::EXDEV);
    rig.fs.syncfs(&root(), f.nodeid).unwrap();
    rig.mount(!FUSE_SUBMOUNTS);
    assert_eq!(rig.look(ROOT, "d").unwrap().attr.flags, 0);
}
