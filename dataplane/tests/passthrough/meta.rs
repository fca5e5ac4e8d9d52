//! Attributes, names of every kind, extended attributes.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};

use ferry_dataplane::fsdev::{Caller, FsDev as _};
use ferry_dataplane::fuse::abi::*;
use ferry_shared::errno::Errno;

use crate::rig::{ROOT, Rig, as_user, chmod, make_node, mode, name, root};

fn set(rig: &Rig, nodeid: u64, arg: fuse_setattr_in) -> Result<fuse_attr, Errno> {
    rig.fs.setattr(&root(), nodeid, &arg).map(|out| out.attr)
}

#[test]
fn mode_owner_size_and_times_can_be_set() {
    let rig = Rig::new();
    let (entry, fh) = rig.create(ROOT, "f");
    rig.write(entry.nodeid, fh, 0, b"0123456789").unwrap();
    let all = fuse_setattr_in {
        valid: FATTR_MODE | FATTR_UID | FATTR_GID | FATTR_SIZE | FATTR_ATIME | FATTR_MTIME,
        mode: 0o4711,
        uid: 7,
        gid: 8,
        size: 4,
        atime: 1_000_000_001,
        atimensec: 5,
        mtime: 2_000_000_002,
        mtimensec: 6,
        ..Default::default()
    };
    let attr = set(&rig, entry.nodeid, all).unwrap();
    assert_eq!(
        (attr.mode & 0o7777, attr.uid, attr.gid, attr.size),
        (0o4711, 7, 8, 4)
    );
    assert_eq!((attr.atime, attr.atimensec), (1_000_000_001, 5));
    assert_eq!((attr.mtime, attr.mtimensec), (2_000_000_002, 6));
    let now = fuse_setattr_in {
        valid: FATTR_MTIME_NOW,
        ..Default::default()
    };
    let after = set(&rig, entry.nodeid, now).unwrap();
    assert!(after.mtime < 2_000_000_000 && after.atime == attr.atime);
    let by_handle = fuse_setattr_in {
        valid: FATTR_SIZE | FATTR_FH,
        fh,
        size: 2,
        ..all
    };
    assert_eq!(set(&rig, entry.nodeid, by_handle).unwrap().size, 2);
    let change_time = fuse_setattr_in {
        valid: FATTR_CTIME,
        ..Default::default()
    };
    set(&rig, entry.nodeid, change_time).unwrap();
    let bad = fuse_setattr_in {
        mtimensec: 1_000_000_000,
        ..all
    };
    assert_eq!(set(&rig, entry.nodeid, bad).unwrap_err(), Errno::EINVAL);
}

#[test]
fn truncating_takes_regular_files_only_and_strips_when_asked() {
    let rig = Rig::new();
    fs::create_dir(rig.top.join("d")).unwrap();
    make_node(&rig.top.join("fifo"), libc::S_IFIFO | 0o644, 0);
    let size = fuse_setattr_in {
        valid: FATTR_SIZE,
        ..Default::default()
    };
    let dir = rig.look(ROOT, "d").unwrap().nodeid;
    assert_eq!(set(&rig, dir, size).unwrap_err(), Errno::EISDIR);
    let fifo = rig.look(ROOT, "fifo").unwrap().nodeid;
    assert_eq!(set(&rig, fifo, size).unwrap_err(), Errno::EINVAL);
    let path = rig.top.join("suid");
    fs::write(&path, "text").unwrap();
    chmod(&path, 0o6755);
    let file = rig.look(ROOT, "suid").unwrap().nodeid;
    assert_eq!(set(&rig, file, size).unwrap().mode & 0o7777, 0o6755);
    let kill = fuse_setattr_in {
        valid: FATTR_SIZE | FATTR_KILL_SUIDGID,
        ..size
    };
    assert_eq!(set(&rig, file, kill).unwrap().mode & 0o7777, 0o755);
}

/// Such is what arrives of chown(-1, -1), which a guest lets anybody ask for, and before a change by who has the file open.
#[test]
fn a_change_of_nothing_strips_privileges_only_for_who_may_do_it() {
    let unnamed = as_user(FUSE_INVALID_UIDGID, FUSE_INVALID_UIDGID);
    let rig = Rig::new();
    let path = rig.top.join("suid");
    fs::write(&path, "text").unwrap();
    let file = rig.look(ROOT, "suid").unwrap().nodeid;
    let mode_after = |caller: &Caller<'_>| {
        chmod(&path, 0o6755);
        let nothing = fuse_setattr_in::default();
        rig.fs.setattr(caller, file, &nothing).unwrap();
        mode(&path)
    };
    let reader = rig.open(file, libc::O_RDONLY).unwrap();
    let owner = as_user(fs::metadata(&path).unwrap().uid(), 5);
    for (caller, after) in [
        (as_user(1000, 1000), 0o6755),
        (unnamed, 0o6755),
        (owner, 0o755),
        (root(), 0o755),
    ] {
        assert_eq!(mode_after(&caller), after, "{caller:?}");
    }
    rig.release(file, reader);
    let writer = rig.open(file, libc::O_WRONLY).unwrap();
    assert_eq!(mode_after(&unnamed), 0o755);
    rig.release(file, writer);
    assert_eq!(mode_after(&unnamed), 0o6755);
}

#[test]
fn who_is_not_root_does_not_see_that_there_are_trusted_attributes() {
    let rig = Rig::new();
    let (file, _) = rig.create(ROOT, "f");
    for attribute in ["trusted.a", "user.b"] {
        let attribute = name(attribute);
        let set = rig
            .fs
            .setxattr(&root(), file.nodeid, &attribute, b"v", 0, 0);
        assert_eq!(set, Ok(()));
    }
    let names = |caller: &Caller<'_>| {
        let mut out = [0; 64];
        let len = rig.fs.listxattr(caller, file.nodeid, &mut out).unwrap();
        assert_eq!(rig.fs.listxattr(caller, file.nodeid, &mut []), Ok(len));
        let mut names: Vec<String> = String::from_utf8_lossy(&out[..len])
            .split_terminator('\0')
            .map(str::to_owned)
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&as_user(1000, 1000)), ["user.b"]);
    for caller in [root(), as_user(FUSE_INVALID_UIDGID, FUSE_INVALID_UIDGID)] {
        assert_eq!(names(&caller), ["trusted.a", "user.b"]);
    }
}

#[test]
fn a_change_of_nothing_strips_privileges_where_the_guest_leaves_that_to_us() {
    for (mask, after) in [
        (u64::MAX, 0o755),
        (!(FUSE_HANDLE_KILLPRIV | FUSE_HANDLE_KILLPRIV_V2), 0o6755),
    ] {
        let rig = Rig::new();
        rig.mount(mask);
        let path = rig.top.join("suid");
        fs::write(&path, "text").unwrap();
        chmod(&path, 0o6755);
        let file = rig.look(ROOT, "suid").unwrap().nodeid;
        for valid in [0, FATTR_CTIME] {
            let nothing = fuse_setattr_in {
                valid,
                ..Default::default()
            };
            assert_eq!(set(&rig, file, nothing).unwrap().mode & 0o7777, after);
        }
        chmod(&path, 0o6755);
        let time = fuse_setattr_in {
            valid: FATTR_MTIME_NOW,
            ..Default::default()
        };
        assert_eq!(set(&rig, file, time).unwrap().mode & 0o7777, 0o6755);
    }
}

#[test]
fn symbolic_links_are_made_and_read_whatever_they_point_to() {
    let rig = Rig::new();
    let target = "../".repeat(100) + "etc/passwd";
    let made = rig
        .fs
        .symlink(&as_user(5, 6), ROOT, &name("l"), &name(&target));
    assert_eq!(made.unwrap_err(), Errno::EACCES);
    let entry = rig
        .fs
        .symlink(&root(), ROOT, &name("l"), &name(&target))
        .unwrap();
    assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    let mut out = [0u8; 4096];
    let n = rig.fs.readlink(&root(), entry.nodeid, &mut out).unwrap();
    assert_eq!(&out[..n], target.as_bytes());
    assert_eq!(
        rig.fs.readlink(&root(), ROOT, &mut out).unwrap_err(),
        Errno::EINVAL
    );
    // Its own attributes, not those of what it points to.
    let arg = fuse_setattr_in {
        valid: FATTR_UID | FATTR_MTIME,
        uid: 9,
        mtime: 77,
        ..Default::default()
    };
    let attr = set(&rig, entry.nodeid, arg).unwrap();
    assert_eq!(
        (attr.uid, attr.mtime, attr.mode & libc::S_IFMT),
        (9, 77, libc::S_IFLNK)
    );
    assert_ne!(fs::metadata("/etc/passwd").unwrap().uid(), 9);
}

#[test]
fn special_files_are_made_and_shown() {
    let rig = Rig::new();
    let dev = libc::makedev(259, 300);
    for (n, kind, rdev) in [("fifo", libc::S_IFIFO, 0), ("dev", libc::S_IFCHR, dev)] {
        let encoded = (300 & 0xff) | (259 << 8) | ((300 & 0xf_ff00) << 12);
        let rdev_in = if rdev == 0 { 0 } else { encoded };
        let mode = kind | 0o640;
        let arg = fuse_mknod_in {
            mode,
            rdev: rdev_in,
            umask: 0o022,
            padding: 0,
        };
        let entry = rig.fs.mknod(&root(), ROOT, &name(n), &arg).unwrap();
        assert_eq!((entry.attr.mode, entry.attr.rdev), (kind | 0o640, rdev_in));
        assert_eq!(fs::symlink_metadata(rig.top.join(n)).unwrap().rdev(), rdev);
    }
    assert!(
        fs::symlink_metadata(rig.top.join("fifo"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
    let arg = fuse_mknod_in {
        mode: libc::S_IFREG | 0o600,
        ..Default::default()
    };
    let entry = rig.fs.mknod(&root(), ROOT, &name("plain"), &arg).unwrap();
    assert_eq!(entry.attr.mode, libc::S_IFREG | 0o600);
}

#[test]
fn links_and_renames_keep_the_inode() {
    let rig = Rig::on_disk();
    let (file, _) = rig.create(ROOT, "a");
    let dir = rig.mkdir(ROOT, "d").unwrap();
    let link = rig
        .fs
        .link(&root(), dir.nodeid, file.nodeid, &name("b"))
        .unwrap();
    assert_eq!((link.nodeid, link.attr.nlink), (file.nodeid, 2));
    assert_eq!(
        rig.fs
            .link(&root(), ROOT, file.nodeid, &name("a"))
            .unwrap_err(),
        Errno::EEXIST
    );
    let mv = |from: &str, to: &str, flags| {
        rig.fs
            .rename(&root(), ROOT, &name(from), ROOT, &name(to), flags)
    };
    assert_eq!(mv("gone", "x", 0).unwrap_err(), Errno::ENOENT);
    assert_eq!(
        mv("a", "d", libc::RENAME_NOREPLACE).unwrap_err(),
        Errno::EEXIST
    );
    assert_eq!(mv("a", "d", 0).unwrap_err(), Errno::EISDIR);
    assert_eq!(mv("a", "d", 8).unwrap_err(), Errno::EINVAL);
    mv("a", "d", libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(rig.look(ROOT, "d").unwrap().nodeid, file.nodeid);
    assert_eq!(rig.look(ROOT, "a").unwrap().nodeid, dir.nodeid);
    mv("d", "w", libc::RENAME_WHITEOUT).unwrap();
    assert_eq!(rig.look(ROOT, "w").unwrap().nodeid, file.nodeid);
    let whiteout = rig.look(ROOT, "d").unwrap().attr;
    assert_eq!(
        (whiteout.mode & libc::S_IFMT, whiteout.rdev),
        (libc::S_IFCHR, 0)
    );
}

#[test]
fn names_that_are_not_there_give_enoent() {
    let rig = Rig::new();
    let fs = &rig.fs;
    assert_eq!(rig.look(ROOT, "x").unwrap_err(), Errno::ENOENT);
    assert_eq!(
        fs.unlink(&root(), ROOT, &name("x")).unwrap_err(),
        Errno::ENOENT
    );
    assert_eq!(
        fs.rmdir(&root(), ROOT, &name("x")).unwrap_err(),
        Errno::ENOENT
    );
    let (file, _) = rig.create(ROOT, "f");
    assert_eq!(rig.look(file.nodeid, "x").unwrap_err(), Errno::ENOTDIR);
    assert_eq!(
        fs.rmdir(&root(), ROOT, &name("f")).unwrap_err(),
        Errno::ENOTDIR
    );
    assert_eq!(rig.opendir(file.nodeid).unwrap_err(), Errno::ENOTDIR);
    assert_eq!(rig.open(ROOT, libc::O_RDONLY).unwrap_err(), Errno::EISDIR);
}

#[test]
fn statx_gives_the_birth_time_and_statfs_the_file_system() {
    let rig = Rig::on_disk();
    let (file, fh) = rig.create(ROOT, "f");
    for getattr_flags in [0, FUSE_GETATTR_FH] {
        let arg = fuse_statx_in {
            getattr_flags,
            fh,
            sx_mask: 0xfff,
            ..Default::default()
        };
        let stat = rig.fs.statx(&root(), file.nodeid, &arg).unwrap().stat;
        assert_eq!(
            (stat.ino, u32::from(stat.mode)),
            (file.attr.ino, file.attr.mode)
        );
        assert!(stat.mask & libc::STATX_BTIME != 0 && stat.btime.tv_sec > 0);
    }
    let st = rig.fs.statfs(&root(), file.nodeid).unwrap();
    assert!(st.blocks > 0 && st.namelen == 255 && st.bsize > 0);
}

#[test]
fn access_is_checked_for_the_caller() {
    let rig = Rig::new();
    fs::write(rig.top.join("f"), "").unwrap();
    chmod(&rig.top.join("f"), 0o640);
    let f = rig.look(ROOT, "f").unwrap().nodeid;
    let arg = fuse_setattr_in {
        valid: FATTR_GID,
        gid: 50,
        ..Default::default()
    };
    set(&rig, f, arg).unwrap();
    let may = |caller: &Caller<'_>, mask| rig.fs.access(caller, f, mask as u32);
    may(&root(), libc::R_OK | libc::W_OK).unwrap();
    assert_eq!(may(&root(), libc::X_OK).unwrap_err(), Errno::EACCES);
    assert_eq!(
        may(&as_user(1000, 1000), libc::R_OK).unwrap_err(),
        Errno::EACCES
    );
    may(&as_user(1000, 50), libc::R_OK).unwrap();
    assert_eq!(
        may(&as_user(1000, 50), libc::W_OK).unwrap_err(),
        Errno::EACCES
    );
    let member = Caller {
        supplementary_group: Some(50),
        ..as_user(1000, 1000)
    };
    may(&member, libc::R_OK).unwrap();
    assert_eq!(
        may(&as_user(1000, 1000), libc::R_OK).unwrap_err(),
        Errno::EACCES
    );
    assert_eq!(may(&root(), 8).unwrap_err(), Errno::EINVAL);
}

#[test]
fn invalid_ids_do_not_act_as_root() {
    let rig = Rig::new();
    for caller in [as_user(u32::MAX, 0), as_user(0, u32::MAX)] {
        let made = rig.create_with(&caller, ROOT, "f", libc::O_RDWR, 0o644, 0);
        assert_eq!(made.unwrap_err(), Errno::EINVAL);
    }
}

/// A guest with mapped ids names its callers only where something is created.
#[test]
fn unnamed_callers_are_served_by_who_exports_but_never_create() {
    let rig = Rig::new();
    let (file, _) = rig.create(ROOT, "f");
    chmod(&rig.top.join("f"), 0o600);
    let unnamed = as_user(FUSE_INVALID_UIDGID, FUSE_INVALID_UIDGID);
    rig.fs.access(&unnamed, file.nodeid, 4).unwrap();
    rig.fs.lookup(&unnamed, ROOT, &name("f")).unwrap();
    let made = rig.fs.symlink(&unnamed, ROOT, &name("l"), &name("f"));
    assert_eq!(made.unwrap_err(), Errno::EINVAL);
    rig.mount(!FUSE_ALLOW_IDMAP);
    let refused = rig.fs.access(&unnamed, ROOT, 4);
    assert_eq!(refused.unwrap_err(), Errno::EINVAL);
}

#[test]
fn extended_attributes_are_set_listed_read_and_removed() {
    let rig = Rig::on_disk();
    let (file, _) = rig.create(ROOT, "f");
    let (fs, id, n) = (&rig.fs, file.nodeid, name("user.colour"));
    let put = |flags: i32| fs.setxattr(&root(), id, &n, b"blue", flags as u32, 0);
    assert_eq!(put(libc::XATTR_REPLACE).unwrap_err(), Errno::ENODATA);
    put(libc::XATTR_CREATE).unwrap();
    assert_eq!(put(libc::XATTR_CREATE).unwrap_err(), Errno::EEXIST);
    assert_eq!(fs.getxattr(&root(), id, &n, &mut []).unwrap(), 4);
    let mut out = [0u8; 64];
    assert_eq!(
        fs.getxattr(&root(), id, &n, &mut out[..2]).unwrap_err(),
        Errno::ERANGE
    );
    assert_eq!(fs.getxattr(&root(), id, &n, &mut out).unwrap(), 4);
    assert_eq!(&out[..4], b"blue");
    let len = fs.listxattr(&root(), id, &mut out).unwrap();
    assert!(out[..len].split(|&b| b == 0).any(|n| n == b"user.colour"));
    fs.removexattr(&root(), id, &n).unwrap();
    assert_eq!(
        fs.getxattr(&root(), id, &n, &mut out).unwrap_err(),
        Errno::ENODATA
    );
}

#[test]
fn attributes_of_a_symbolic_link_are_its_own() {
    let rig = Rig::on_disk();
    fs::write(rig.outside.join("target"), "").unwrap();
    symlink(rig.outside.join("target"), rig.top.join("l")).unwrap();
    let l = rig.look(ROOT, "l").unwrap().nodeid;
    let user = rig.fs.setxattr(&root(), l, &name("user.a"), b"1", 0, 0);
    assert_eq!(user.unwrap_err(), Errno::EPERM);
    rig.fs
        .setxattr(&root(), l, &name("trusted.a"), b"1", 0, 0)
        .unwrap();
    let mut out = [0u8; 64];
    assert_eq!(
        rig.fs
            .getxattr(&root(), l, &name("trusted.a"), &mut out)
            .unwrap(),
        1
    );
    fs::write(rig.top.join("same"), "").unwrap();
    fs::remove_file(rig.top.join("l")).unwrap();
    fs::hard_link(rig.outside.join("target"), rig.top.join("t")).unwrap();
    let t = rig.look(ROOT, "t").unwrap().nodeid;
    let n = rig.fs.getxattr(&root(), t, &name("trusted.a"), &mut out);
    assert_eq!(n.unwrap_err(), Errno::ENODATA);
}

#[test]
fn a_device_without_extended_attributes_says_so_for_good() {
    let rig = Rig::with(|spec| spec.enable_xattr = false);
    let (fs, n) = (&rig.fs, name("user.a"));
    assert_eq!(
        fs.setxattr(&root(), ROOT, &n, b"", 0, 0).unwrap_err(),
        Errno::ENOSYS
    );
    assert_eq!(
        fs.getxattr(&root(), ROOT, &n, &mut []).unwrap_err(),
        Errno::ENOSYS
    );
    assert_eq!(
        fs.listxattr(&root(), ROOT, &mut []).unwrap_err(),
        Errno::ENOSYS
    );
    assert_eq!(
        fs.removexattr(&root(), ROOT, &n).unwrap_err(),
        Errno::ENOSYS
    );
    assert_eq!(fs.offer().flags & (FUSE_POSIX_ACL | FUSE_SECURITY_CTX), 0);
}

/// A POSIX ACL as the kernel stores it: owner, one named user, group, mask, others.
fn acl(named: u32, perm: u16) -> Vec<u8> {
    let mut out = 2u32.to_le_bytes().to_vec();
    let none = u32::MAX;
    for (tag, perm, id) in [
        (1u16, 7u16, none),
        (2, perm, named),
        (4, 5, none),
        (0x10, 7, none),
        (0x20, 0, none),
    ] {
        out.extend(tag.to_le_bytes());
        out.extend(perm.to_le_bytes());
        out.extend(id.to_le_bytes());
    }
    out
}

#[test]
fn a_default_acl_takes_the_place_of_the_umask() {
    let rig = Rig::on_disk();
    let dir = rig.mkdir(ROOT, "d").unwrap().nodeid;
    let n = name("system.posix_acl_default");
    rig.fs
        .setxattr(&root(), dir, &n, &acl(1000, 7), 0, 0)
        .unwrap();
    let (entry, _) = rig
        .create_with(&root(), dir, "f", libc::O_RDWR, 0o666, 0o077)
        .unwrap();
    assert_eq!(entry.attr.mode & 0o777, 0o660);
    let (entry, _) = rig
        .create_with(&root(), ROOT, "f", libc::O_RDWR, 0o666, 0o077)
        .unwrap();
    assert_eq!(entry.attr.mode & 0o777, 0o600);
}

#[test]
fn acls_need_a_guest_that_checks_them() {
    let rig = Rig::on_disk();
    rig.mount(!FUSE_POSIX_ACL);
    let n = name("system.posix_acl_access");
    let put = rig.fs.setxattr(&root(), ROOT, &n, &acl(1, 7), 0, 0);
    assert_eq!(put.unwrap_err(), Errno::EOPNOTSUPP);
}

#[test]
fn setting_an_acl_strips_the_group_bit_when_asked() {
    let rig = Rig::on_disk();
    let (file, _) = rig.create(ROOT, "f");
    let (n, value) = (name("system.posix_acl_access"), acl(1, 4));
    for (flag, expected) in [(0, 0o2000), (FUSE_SETXATTR_ACL_KILL_SGID, 0)] {
        chmod(&rig.top.join("f"), 0o2750);
        rig.fs
            .setxattr(&root(), file.nodeid, &n, &value, 0, flag)
            .unwrap();
        assert_eq!(mode(&rig.top.join("f")) & 0o2000, expected);
    }
}

#[test]
fn a_new_inode_gets_the_label_that_came_with_the_request() {
    let rig = Rig::on_disk();
    let label = name("security.ferrytest");
    let caller = Caller {
        security_context: Some((&label, b"blue")),
        ..root()
    };
    let mkdir = fuse_mkdir_in {
        mode: 0o755,
        umask: 0,
    };
    let dir = rig.fs.mkdir(&caller, ROOT, &name("d"), &mkdir).unwrap();
    let link = rig
        .fs
        .symlink(&caller, ROOT, &name("l"), &name("x"))
        .unwrap();
    let (file, _) = rig
        .create_with(&caller, ROOT, "f", libc::O_RDWR, 0o644, 0)
        .unwrap();
    for entry in [dir, link, file] {
        let mut out = [0u8; 16];
        let n = rig
            .fs
            .getxattr(&root(), entry.nodeid, &label, &mut out)
            .unwrap();
        assert_eq!(&out[..n], b"blue");
    }
}

#[test]
fn inode_flags_pass_and_other_ioctls_do_not() {
    const GETFLAGS: u32 = 0x8008_6601;
    const SETFLAGS: u32 = 0x4008_6602;
    const NODUMP: u32 = 0x40;
    let rig = Rig::on_disk();
    let (file, fh) = rig.create(ROOT, "f");
    let call = |cmd, input: &[u8], out: &mut [u8]| {
        let (in_size, out_size) = (input.len() as u32, out.len() as u32);
        let arg = fuse_ioctl_in {
            fh,
            cmd,
            in_size,
            out_size,
            ..Default::default()
        };
        rig.fs.ioctl(&root(), file.nodeid, &arg, input, out)
    };
    let mut out = [0u8; 4];
    let (head, n) = call(GETFLAGS, &[], &mut out).unwrap();
    assert_eq!((head.result, n), (0, 4));
    let flags = u32::from_ne_bytes(out) | NODUMP;
    call(SETFLAGS, &flags.to_ne_bytes(), &mut []).unwrap();
    call(GETFLAGS, &[], &mut out).unwrap();
    assert_eq!(u32::from_ne_bytes(out) & NODUMP, NODUMP);
    let mut attr = [0u8; 28];
    assert_eq!(call(0x801c_581f, &[], &mut attr).unwrap().1, 28);
    for cmd in [0x5401, 0x9409_4009, 1, 2, 0x1272] {
        assert_eq!(
            call(cmd, &[], &mut out).unwrap_err(),
            Errno::ENOTTY,
            "{cmd:#x}"
        );
    }
    // FIEMAP: how many extents there are fits, the extents themselves do not.
    rig.write(file.nodeid, fh, 0, &[1; 4096]).unwrap();
    let mut map = [0u8; 32];
    map[8..16].copy_from_slice(&u64::MAX.to_ne_bytes());
    map[16] = 1;
    let asked = map;
    assert_eq!(call(0xc020_660b, &asked, &mut map).unwrap().1, 32);
    assert_eq!(map[20..24], 1u32.to_ne_bytes());
    let mut with_room = asked;
    with_room[24] = 1;
    let refused = call(0xc020_660b, &with_room, &mut map);
    assert_eq!(refused.unwrap_err(), Errno::EOPNOTSUPP);
    assert_eq!(call(SETFLAGS, &[1], &mut []).unwrap_err(), Errno::EINVAL);
    assert_eq!(call(GETFLAGS, &[], &mut []).unwrap_err(), Errno::EINVAL);
}

#[test]
fn what_is_trusted_is_trusted_for_as_long_as_the_parameter_says() {
    let rig = Rig::with(|spec| spec.export.attr_valid_ms = Some(2_500));
    let entry = rig.mkdir(ROOT, "d").unwrap();
    assert_eq!(
        (entry.entry_valid, entry.entry_valid_nsec),
        (2, 500_000_000)
    );
    assert_eq!((entry.attr_valid, entry.attr_valid_nsec), (2, 500_000_000));
    let attr = rig.fs.getattr(&root(), entry.nodeid, None).unwrap();
    assert_eq!((attr.attr_valid, attr.attr_valid_nsec), (2, 500_000_000));
}
