//! Every operation once, as a guest's kernel would call it.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};

use ferry_dataplane::fsdev::passthrough::Passthrough;
use ferry_dataplane::fsdev::{FsDev as _, Negotiated};
use ferry_dataplane::fuse::abi::*;
use ferry_shared::errno::Errno;

use crate::rig::{ROOT, Rig, TempDir, as_user, name, root, spec};

#[test]
fn a_root_that_is_missing_or_no_directory_is_refused_by_name() {
    let dir = TempDir::new("/dev/shm");
    fs::write(dir.0.join("file"), "").unwrap();
    for (path, errno) in [("gone", Errno::ENOENT), ("file", Errno::ENOTDIR)] {
        let failure = Passthrough::new(&spec(&dir.0.join(path))).err().unwrap();
        assert_eq!(failure.errno, errno);
        assert!(failure.detail.contains(path), "{}", failure.detail);
    }
}

#[test]
fn a_file_is_created_written_read_back_and_removed() {
    let rig = Rig::new();
    let (entry, fh) = rig.create(ROOT, "file");
    assert_eq!(rig.write(entry.nodeid, fh, 0, b"hello world").unwrap(), 11);
    assert_eq!(fs::read(rig.top.join("file")).unwrap(), b"hello world");
    assert_eq!(rig.read(entry.nodeid, fh, 6, 100).unwrap(), b"world");
    assert_eq!(rig.read(entry.nodeid, fh, 11, 100).unwrap(), b"");
    let attr = rig
        .fs
        .getattr(&root(), entry.nodeid, Some(fh))
        .unwrap()
        .attr;
    let meta = fs::metadata(rig.top.join("file")).unwrap();
    assert_eq!(
        (attr.size, attr.ino, attr.mode),
        (11, meta.ino(), meta.mode())
    );
    rig.fs.unlink(&root(), ROOT, &name("file")).unwrap();
    assert_eq!(rig.look(ROOT, "file").unwrap_err(), Errno::ENOENT);
    assert_eq!(rig.read(entry.nodeid, fh, 0, 5).unwrap(), b"hello");
    rig.release(entry.nodeid, fh);
    rig.forget(entry.nodeid);
    assert_eq!(rig.fs.usage(), (1, 0, 0));
}

#[test]
fn a_known_inode_keeps_its_node_id_under_every_name() {
    let rig = Rig::new();
    rig.mount(!FUSE_EXPORT_SUPPORT);
    fs::write(rig.top.join("a"), "x").unwrap();
    fs::hard_link(rig.top.join("a"), rig.top.join("b")).unwrap();
    let a = rig.look(ROOT, "a").unwrap();
    let b = rig.look(ROOT, "b").unwrap();
    assert_eq!(a.nodeid, b.nodeid);
    assert_eq!(a.attr.nlink, 2);
    rig.forget(a.nodeid);
    rig.fs.getattr(&root(), b.nodeid, None).unwrap();
    rig.forget(a.nodeid);
    assert_eq!(
        rig.fs.getattr(&root(), b.nodeid, None).unwrap_err(),
        Errno::ESTALE
    );
}

#[test]
fn directories_are_made_listed_and_removed() {
    let rig = Rig::new();
    let d = rig.mkdir(ROOT, "d").unwrap();
    for i in 0..500 {
        fs::write(rig.top.join(format!("d/file-{i:03}")), "").unwrap();
    }
    symlink("nowhere", rig.top.join("d/link")).unwrap();
    let mut listing = rig.list(d.nodeid, 4096, false);
    assert_eq!(listing.len(), 503);
    listing.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(
        (listing[0].name.as_str(), listing[1].name.as_str()),
        (".", "..")
    );
    assert_eq!(listing[0].ino, d.attr.ino);
    assert_eq!(listing[1].ino, fs::metadata(&rig.top).unwrap().ino());
    for e in &listing[2..] {
        let meta = fs::symlink_metadata(rig.top.join("d").join(&e.name)).unwrap();
        assert_eq!(
            (e.ino, e.kind << 12),
            (meta.ino(), meta.mode() & libc::S_IFMT)
        );
    }
    assert_eq!(
        rig.fs.rmdir(&root(), ROOT, &name("d")).unwrap_err(),
        Errno::ENOTEMPTY
    );
    fs::remove_dir_all(rig.top.join("d")).unwrap();
    rig.mkdir(ROOT, "d").unwrap();
    rig.fs.rmdir(&root(), ROOT, &name("d")).unwrap();
    assert_eq!(
        rig.fs.rmdir(&root(), ROOT, &name("d")).unwrap_err(),
        Errno::ENOENT
    );
}

#[test]
fn a_new_inode_belongs_to_the_caller_and_obeys_its_umask() {
    let rig = Rig::new();
    let attr = rig.fs.getattr(&root(), ROOT, None).unwrap().attr;
    let arg = fuse_setattr_in {
        valid: FATTR_MODE,
        mode: 0o777,
        ..Default::default()
    };
    assert_eq!(attr.mode & 0o7777, 0o755);
    rig.fs.setattr(&root(), ROOT, &arg).unwrap();
    let user = as_user(1000, 1001);
    let (entry, _) = rig
        .create_with(&user, ROOT, "f", libc::O_RDWR, 0o666, 0o027)
        .unwrap();
    assert_eq!((entry.attr.uid, entry.attr.gid), (1000, 1001));
    assert_eq!(entry.attr.mode, libc::S_IFREG | 0o640);
    let arg = fuse_mkdir_in {
        mode: 0o777,
        umask: 0o077,
    };
    let entry = rig.fs.mkdir(&user, ROOT, &name("d"), &arg).unwrap();
    assert_eq!((entry.attr.uid, entry.attr.gid), (1000, 1001));
    assert_eq!(entry.attr.mode, libc::S_IFDIR | 0o700);
    // And this thread is the service again.
    let (entry, _) = rig.create(ROOT, "g");
    assert_eq!((entry.attr.uid, entry.attr.gid), (0, 0));
    assert_eq!(entry.attr.mode, libc::S_IFREG | 0o644);
}

#[test]
fn a_caller_without_permission_cannot_create() {
    let rig = Rig::new();
    let made = rig.create_with(&as_user(1000, 1000), ROOT, "f", libc::O_RDWR, 0o666, 0);
    assert_eq!(made.unwrap_err(), Errno::EACCES);
    assert!(!rig.top.join("f").exists());
}

#[test]
fn a_mount_without_writeback_does_not_inherit_it() {
    let rig = Rig::with(|spec| spec.enable_writeback_cache = true);
    assert!(rig.fs.offer().flags & FUSE_WRITEBACK_CACHE != 0);
    rig.mount(!FUSE_WRITEBACK_CACHE);
    let (entry, fh) = rig.create(ROOT, "f");
    rig.write(entry.nodeid, fh, 0, b"abc").unwrap();
    let append = rig
        .open(entry.nodeid, libc::O_WRONLY | libc::O_APPEND)
        .unwrap();
    rig.write(entry.nodeid, append, 0, b"def").unwrap();
    assert_eq!(fs::read(rig.top.join("f")).unwrap(), b"abcdef");
    rig.mount(u64::MAX);
    let entry = rig.look(ROOT, "f").unwrap();
    let append = rig
        .open(entry.nodeid, libc::O_WRONLY | libc::O_APPEND)
        .unwrap();
    rig.write(entry.nodeid, append, 0, b"xyz").unwrap();
    assert_eq!(rig.read(entry.nodeid, append, 0, 9).unwrap(), b"xyzdef");
}

#[test]
fn a_second_mount_begins_with_nothing() {
    let rig = Rig::new();
    let (entry, fh) = rig.create(ROOT, "f");
    let granted = Negotiated {
        minor: 31,
        flags: 0,
        max_write: 4096,
    };
    rig.fs.mount(granted).unwrap();
    assert_eq!(rig.fs.usage(), (1, 0, 0));
    assert_eq!(
        rig.fs.getattr(&root(), entry.nodeid, None).unwrap_err(),
        Errno::ESTALE
    );
    assert_eq!(rig.read(entry.nodeid, fh, 0, 1).unwrap_err(), Errno::EBADF);
}
