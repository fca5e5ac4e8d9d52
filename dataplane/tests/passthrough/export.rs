//! What an export's own parameters change: caching, read-only, ids, names of extended attributes.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};

use ferry_dataplane::fsdev::{Caller, FsDev};
use ferry_dataplane::fuse::abi::*;
use ferry_shared::errno::Errno;
use ferry_shared::export::{Cache, ExportSpec, IdMap, Squash, XattrMap};

use super::rig::*;

fn export(change: impl FnOnce(&mut ExportSpec)) -> Rig {
    Rig::with(|spec| change(&mut spec.export))
}

fn open_flags(rig: &Rig) -> (u32, u32) {
    fs::write(rig.top.join("f"), "x").unwrap();
    let file = rig.look(ROOT, "f").unwrap().nodeid;
    let arg = fuse_open_in::default();
    let opened = rig.fs.open(&root(), file, &arg).unwrap();
    let dir = rig.fs.opendir(&root(), ROOT, &arg).unwrap();
    let common = FOPEN_PARALLEL_DIRECT_WRITES;
    assert_eq!(opened.open_flags & common, common);
    (opened.open_flags & !common, dir.open_flags)
}

#[test]
fn each_cache_gives_its_own_flags_to_files_and_directories() {
    let keep = FOPEN_KEEP_CACHE;
    for (cache, file, dir) in [
        (Cache::Never, FOPEN_DIRECT_IO, 0),
        (Cache::Auto, 0, 0),
        (Cache::Metadata, 0, 0),
        (Cache::Always, keep, keep | FOPEN_CACHE_DIR),
    ] {
        let rig = export(|e| e.cache = cache);
        assert_eq!(open_flags(&rig), (file, dir), "{cache:?}");
        let (_, made) = rig
            .create_with(&root(), ROOT, "new", libc::O_RDWR, 0o600, 0)
            .unwrap();
        assert_eq!(
            made.open_flags,
            file | FOPEN_PARALLEL_DIRECT_WRITES,
            "{cache:?}"
        );
        let mmap = FUSE_DIRECT_IO_ALLOW_MMAP | FUSE_AUTO_INVAL_DATA;
        assert_eq!(rig.fs.offer().flags & mmap, mmap);
    }
}

#[test]
fn names_attributes_and_absence_are_valid_for_times_of_their_own() {
    let rig = export(|e| {
        e.attr_valid_ms = Some(1_500);
        e.entry_valid_ms = Some(2_000);
        e.negative_valid_ms = Some(3_250);
    });
    rig.create(ROOT, "f");
    let entry = rig.look(ROOT, "f").unwrap();
    assert_eq!((entry.attr_valid, entry.attr_valid_nsec), (1, 500_000_000));
    assert_eq!((entry.entry_valid, entry.entry_valid_nsec), (2, 0));
    let attr = rig.fs.getattr(&root(), entry.nodeid, None).unwrap();
    assert_eq!((attr.attr_valid, attr.attr_valid_nsec), (1, 500_000_000));
    let none = rig.look(ROOT, "none").unwrap();
    assert_eq!(none.nodeid, 0);
    assert_eq!((none.entry_valid, none.entry_valid_nsec), (3, 250_000_000));
    // Only a missing name is remembered.
    let below = rig.look(entry.nodeid, "none").unwrap_err();
    assert_eq!(below, Errno::ENOTDIR);
    let rig = export(|e| e.cache = Cache::Metadata);
    assert_eq!(rig.look(ROOT, "none").unwrap_err(), Errno::ENOENT);
}

#[test]
fn a_read_only_export_refuses_every_change() {
    let rig = export(|e| e.read_only = true);
    fs::write(rig.top.join("f"), "data").unwrap();
    fs::create_dir(rig.top.join("d")).unwrap();
    let before = fs::metadata(rig.top.join("f")).unwrap();
    let f = rig.look(ROOT, "f").unwrap().nodeid;
    let (me, new) = (root(), name("new"));
    let read_only = Errno::EROFS;
    for flags in [
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_WRONLY | libc::O_APPEND,
    ] {
        assert_eq!(rig.open(f, flags).unwrap_err(), read_only, "{flags:o}");
    }
    let created = |n, flags| rig.create_with(&me, ROOT, n, flags, 0o644, 0).map(drop);
    assert_eq!(created("new", libc::O_RDONLY), Err(read_only));
    assert_eq!(created("f", libc::O_RDWR), Err(read_only));
    assert_eq!(created("f", libc::O_RDONLY), Ok(()));
    assert_eq!(
        created("f", libc::O_RDONLY | libc::O_EXCL),
        Err(Errno::EEXIST)
    );
    assert_eq!(rig.mkdir(ROOT, "new").unwrap_err(), read_only);
    let node = fuse_mknod_in {
        mode: libc::S_IFIFO | 0o600,
        ..Default::default()
    };
    let fs = &rig.fs;
    assert_eq!(fs.mknod(&me, ROOT, &new, &node).unwrap_err(), read_only);
    assert_eq!(fs.symlink(&me, ROOT, &new, &new).unwrap_err(), read_only);
    assert_eq!(fs.link(&me, ROOT, f, &new).unwrap_err(), read_only);
    assert_eq!(fs.unlink(&me, ROOT, &name("f")), Err(read_only));
    assert_eq!(fs.rmdir(&me, ROOT, &name("d")), Err(read_only));
    assert_eq!(
        fs.rename(&me, ROOT, &name("f"), ROOT, &new, 0),
        Err(read_only)
    );
    let create = fuse_create_in::default();
    assert_eq!(fs.tmpfile(&me, ROOT, &create).unwrap_err(), read_only);
    for valid in [FATTR_MODE, FATTR_UID, FATTR_SIZE, FATTR_ATIME_NOW] {
        let arg = fuse_setattr_in {
            valid,
            ..Default::default()
        };
        assert_eq!(fs.setattr(&me, f, &arg).unwrap_err(), read_only, "{valid}");
    }
    let user = name("user.a");
    assert_eq!(fs.setxattr(&me, f, &user, b"v", 0, 0), Err(read_only));
    assert_eq!(fs.removexattr(&me, f, &user), Err(read_only));
    assert_eq!(fs.access(&me, f, libc::W_OK as u32), Err(read_only));
    assert_eq!(fs.access(&me, f, libc::R_OK as u32), Ok(()));

    // Reading and locking go on, and leave no trace.
    let fh = rig.open(f, libc::O_RDONLY).unwrap();
    assert_eq!(rig.read(f, fh, 0, 10).unwrap(), b"data");
    assert_eq!(rig.write(f, fh, 0, b"x").unwrap_err(), read_only);
    let lock = fuse_lk_in {
        fh,
        owner: 7,
        lk: fuse_file_lock {
            start: 0,
            end: 9,
            type_: libc::F_RDLCK as u32,
            pid: 1,
        },
        ..Default::default()
    };
    fs.setlk(&me, f, &lock, false).unwrap();
    let after = fs::metadata(rig.top.join("f")).unwrap();
    let times = |m: &fs::Metadata| (m.atime_nsec(), m.mtime_nsec(), m.ctime_nsec());
    assert_eq!(times(&after), times(&before));
}

fn mapped(change: impl FnOnce(&mut ExportSpec)) -> Rig {
    export(|e| {
        e.map_uid = IdMap::parse("map_uid", "0:100000:2000").unwrap();
        e.map_gid = IdMap::parse("map_gid", "0:200000:2000").unwrap();
        change(e);
    })
}

fn owner_of(rig: &Rig, n: &str) -> (u32, u32) {
    let meta = fs::symlink_metadata(rig.top.join(n)).unwrap();
    (meta.uid(), meta.gid())
}

fn seen(rig: &Rig, n: &str) -> (u32, u32) {
    let attr = rig.look(ROOT, n).unwrap().attr;
    (attr.uid, attr.gid)
}

#[test]
fn ids_are_mapped_in_both_directions() {
    let rig = mapped(|_| {});
    chown(&rig.top, Some(101_000), Some(201_000)).unwrap();
    let user = as_user(1_000, 1_001);
    rig.create_with(&user, ROOT, "f", libc::O_RDWR, 0o644, 0)
        .unwrap();
    assert_eq!(owner_of(&rig, "f"), (101_000, 201_001));
    assert_eq!(seen(&rig, "f"), (1_000, 1_001));
    let file = rig.look(ROOT, "f").unwrap().nodeid;
    let give = |uid, gid| {
        let arg = fuse_setattr_in {
            valid: FATTR_UID | FATTR_GID,
            uid,
            gid,
            ..Default::default()
        };
        rig.fs.setattr(&root(), file, &arg)
    };
    assert_eq!(give(5, 6).unwrap().attr.uid, 5);
    assert_eq!(owner_of(&rig, "f"), (100_005, 200_006));
    assert_eq!(give(2_000, 6).unwrap_err(), Errno::EINVAL);
    let stranger = as_user(2_000, 0);
    let made = rig.create_with(&stranger, ROOT, "g", libc::O_RDWR, 0o644, 0);
    assert_eq!(made.unwrap_err(), Errno::EOVERFLOW);
    fs::write(rig.top.join("host"), "").unwrap();
    assert_eq!(seen(&rig, "host"), (65_534, 65_534));
    let stat = fuse_statx_in::default();
    let stat = rig.fs.statx(&root(), file, &stat).unwrap().stat;
    assert_eq!((stat.uid, stat.gid), (5, 6));
}

#[test]
fn the_guests_superuser_may_do_everything_where_it_is_an_ordinary_user_of_the_host() {
    let rig = mapped(|_| {});
    chown(&rig.top, Some(101_000), Some(201_000)).unwrap();
    chmod(&rig.top, 0o700);
    rig.mkdir(ROOT, "d").unwrap();
    assert_eq!(owner_of(&rig, "d"), (100_000, 200_000));
    let all = (libc::R_OK | libc::W_OK | libc::X_OK) as u32;
    assert_eq!(rig.fs.access(&root(), ROOT, all), Ok(()));
    let other = rig.fs.access(&as_user(7, 7), ROOT, all);
    assert_eq!(other, Err(Errno::EACCES));
}

#[test]
fn ids_in_acls_are_mapped_too() {
    let rig = mapped(|_| {});
    let (file, _) = rig.create(ROOT, "f");
    let acl = |user: u32| {
        let mut acl = vec![2, 0, 0, 0];
        for (tag, perm, id) in [
            (1u16, 6u16, u32::MAX),
            (2, 4, user),
            (4, 4, u32::MAX),
            (0x10, 4, u32::MAX),
            (0x20, 0, u32::MAX),
        ] {
            acl.extend(tag.to_le_bytes());
            acl.extend(perm.to_le_bytes());
            acl.extend(id.to_le_bytes());
        }
        acl
    };
    let access = name("system.posix_acl_access");
    let set = |value: &[u8]| rig.fs.setxattr(&root(), file.nodeid, &access, value, 0, 0);
    set(&acl(12)).unwrap();
    let mut out = [0; 128];
    let get = |fs: &dyn FsDev, out: &mut [u8]| fs.getxattr(&root(), file.nodeid, &access, out);
    let len = get(&rig.fs, &mut out).unwrap();
    assert_eq!(out[..len], acl(12));
    assert_eq!(set(&acl(2_000)), Err(Errno::EINVAL));
    // The user is the mapped one for the host.
    let host = as_user(12, 12);
    assert_eq!(rig.fs.access(&host, file.nodeid, 4), Ok(()));
    assert_eq!(
        rig.fs.access(&as_user(13, 13), file.nodeid, 4),
        Err(Errno::EACCES)
    );
}

/// A directory of the host's superuser with a private file, and one for everybody.
fn squashed(squash: Squash) -> Rig {
    let rig = export(|e| {
        e.squash = squash;
        e.anon_uid = 4_000;
        e.anon_gid = 4_001;
    });
    fs::write(rig.top.join("private"), "p").unwrap();
    chmod(&rig.top.join("private"), 0o600);
    fs::create_dir(rig.top.join("closed")).unwrap();
    fs::write(rig.top.join("closed/f"), "c").unwrap();
    chmod(&rig.top.join("closed"), 0o700);
    fs::create_dir(rig.top.join("open")).unwrap();
    chmod(&rig.top.join("open"), 0o777);
    rig
}

#[test]
fn a_squashed_superuser_has_the_rights_of_nobody() {
    let rig = squashed(Squash::Root);
    let me = root();
    let open_dir = rig.look(ROOT, "open").unwrap().nodeid;
    let (made, fh) = rig.create(open_dir, "f");
    assert_eq!(owner_of(&rig, "open/f"), (4_000, 4_001));
    assert_eq!((made.attr.uid, made.attr.gid), (4_000, 4_001));
    assert_eq!(rig.write(made.nodeid, fh, 0, b"x"), Ok(1));

    let denied = Errno::EACCES;
    let private = rig.look(ROOT, "private").unwrap().nodeid;
    assert_eq!(rig.open(private, libc::O_RDONLY).unwrap_err(), denied);
    let closed = rig.look(ROOT, "closed").unwrap().nodeid;
    assert_eq!(rig.look(closed, "f").unwrap_err(), denied);
    assert_eq!(rig.opendir(closed).unwrap_err(), denied);
    assert_eq!(rig.mkdir(ROOT, "d").unwrap_err(), denied);
    assert_eq!(rig.fs.unlink(&me, ROOT, &name("private")), Err(denied));
    let moved = rig
        .fs
        .rename(&me, ROOT, &name("private"), open_dir, &name("p"), 0);
    assert_eq!(moved, Err(denied));
    let set = |valid, node| {
        let arg = fuse_setattr_in {
            valid,
            mode: 0o777,
            ..Default::default()
        };
        rig.fs.setattr(&me, node, &arg).map(drop)
    };
    assert_eq!(set(FATTR_MODE, private), Err(Errno::EPERM));
    assert_eq!(set(FATTR_UID, made.nodeid), Err(Errno::EPERM));
    assert_eq!(set(FATTR_SIZE, private), Err(denied));
    assert_eq!(set(FATTR_MODE, made.nodeid), Ok(()));
    assert_eq!(set(FATTR_SIZE, made.nodeid), Ok(()));
    let x = name("user.a");
    assert_eq!(rig.fs.setxattr(&me, private, &x, b"", 0, 0), Err(denied));
    let node = fuse_mknod_in {
        mode: libc::S_IFCHR | 0o600,
        rdev: 0x103,
        ..Default::default()
    };
    let device = rig.fs.mknod(&me, open_dir, &name("n"), &node);
    assert_eq!(device.unwrap_err(), Errno::EPERM);

    // Others are themselves.
    let user = as_user(1_000, 1_000);
    rig.create_with(&user, open_dir, "g", libc::O_RDWR, 0o644, 0)
        .unwrap();
    assert_eq!(owner_of(&rig, "open/g"), (1_000, 1_000));
    assert_eq!(fs::read(rig.top.join("private")).unwrap(), b"p");
}

#[test]
fn a_squashed_listing_tells_no_attributes_that_a_lookup_would_not() {
    let rig = squashed(Squash::Root);
    chmod(&rig.top.join("closed"), 0o744);
    let closed = rig.look(ROOT, "closed").unwrap().nodeid;
    let all = rig.list(closed, 4_096, true);
    let file = all.iter().find(|e| e.name == "f").unwrap();
    assert_eq!(file.entry.unwrap().nodeid, 0);
}

#[test]
fn a_guest_that_does_not_name_its_callers_is_not_offered_where_some_are_squashed() {
    let offered = |squash| squashed(squash).fs.offer().flags & FUSE_ALLOW_IDMAP != 0;
    assert!(offered(Squash::None));
    assert!(!offered(Squash::Root));
    assert!(!offered(Squash::All));
}

#[test]
fn everybody_can_be_squashed() {
    let rig = squashed(Squash::All);
    let open_dir = rig.look(ROOT, "open").unwrap().nodeid;
    let user = Caller {
        supplementary_group: Some(0),
        ..as_user(1_000, 1_000)
    };
    rig.create_with(&user, open_dir, "f", libc::O_RDWR, 0o644, 0)
        .unwrap();
    assert_eq!(owner_of(&rig, "open/f"), (4_000, 4_001));
}

#[test]
fn attributes_are_renamed_and_denied_by_rule() {
    let rules = "trusted.=user.g.trusted.,security.=!";
    let rig = export(|e| e.xattr_map = XattrMap::parse(rules).unwrap());
    let (file, _) = rig.create(ROOT, "f");
    let (me, node) = (root(), file.nodeid);
    let set = |n: &str| rig.fs.setxattr(&me, node, &name(n), b"v", 0, 0);
    assert_eq!(set("trusted.a"), Ok(()));
    assert_eq!(set("security.a"), Err(Errno::EOPNOTSUPP));
    // Otherwise any user of the guest could forge what only its superuser may set.
    assert_eq!(set("user.g.trusted.b"), Err(Errno::EOPNOTSUPP));
    let mut out = [0; 64];
    assert_eq!(
        rig.fs.getxattr(&me, node, &name("trusted.a"), &mut out),
        Ok(1)
    );
    assert_eq!(
        rig.fs.getxattr(&me, node, &name("security.a"), &mut out),
        Err(Errno::EOPNOTSUPP)
    );
    let list = b"trusted.a\0";
    assert_eq!(rig.fs.listxattr(&me, node, &mut []), Ok(list.len()));
    assert_eq!(rig.fs.listxattr(&me, node, &mut [0; 3]), Err(Errno::ERANGE));
    let len = rig.fs.listxattr(&me, node, &mut out).unwrap();
    assert_eq!(out[..len], *list);
    assert_eq!(rig.fs.removexattr(&me, node, &name("trusted.a")), Ok(()));
    assert_eq!(rig.fs.listxattr(&me, node, &mut out), Ok(0));
}

#[test]
fn the_host_has_the_renamed_attribute() {
    let rig = export(|e| e.xattr_map = XattrMap::parse("trusted.=user.g.trusted.").unwrap());
    let (file, _) = rig.create(ROOT, "f");
    let set = rig
        .fs
        .setxattr(&root(), file.nodeid, &name("trusted.a"), b"v", 0, 0);
    assert_eq!(set, Ok(()));
    // Another export of the same directory, without rules.
    let mut spec = spec(&rig.top);
    spec.export = ExportSpec::default();
    let other = ferry_dataplane::fsdev::passthrough::Passthrough::new(&spec).unwrap();
    mount(&other, u64::MAX);
    let node = other.lookup(&root(), ROOT, &name("f")).unwrap().nodeid;
    let mut out = [0; 64];
    let len = other.listxattr(&root(), node, &mut out).unwrap();
    assert_eq!(out[..len], *b"user.g.trusted.a\0");
}
