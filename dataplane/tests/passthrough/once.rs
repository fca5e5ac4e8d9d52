//! Requests that are executed again after a crash: the guest sees the outcome of one execution.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use ferry_dataplane::fsdev::{Caller, FsDev as _};
use ferry_dataplane::fuse::abi::*;
use ferry_dataplane::recovery::journal::{Journal, Line, Place};
use ferry_dataplane::recovery::region::Region;
use ferry_shared::errno::Errno;

use crate::rig::{ROOT, Rig, name, root};

fn line() -> Line {
    std::array::from_fn(|_| Default::default())
}

/// A request of process number `life`.
fn noting(line: &Line, unique: u64, life: u64) -> Caller<'_> {
    Caller {
        journal: Journal::new(Some(Place { line, life }), 1, unique, 1),
        ..root()
    }
}

/// Executes an operation, ends the process, and executes it again, with the same notes; `check` looks at the export.
fn twice(
    prepare: impl Fn(&Rig),
    act: impl Fn(&Rig, &Caller<'_>) -> Result<(), Errno>,
    undo: impl Fn(&Rig),
    check: impl Fn(&Rig),
) {
    // The act has happened.
    let region = Region::create().unwrap();
    let rig = Rig::lasting(&region);
    prepare(&rig);
    let notes = line();
    act(&rig, &noting(&notes, 7, 1)).unwrap();
    check(&rig);
    let (rig, _region) = rig.crash(region);
    assert_eq!(act(&rig, &noting(&notes, 7, 2)), Ok(()), "again");
    check(&rig);
    // Another request finds what is there, and fails as it should or not at all; it is never taken for the first.
    let _ = act(&rig, &noting(&notes, 8, 2));

    // It has been noted and has not happened.
    let region = Region::create().unwrap();
    let rig = Rig::lasting(&region);
    prepare(&rig);
    let notes = line();
    act(&rig, &noting(&notes, 7, 1)).unwrap();
    undo(&rig);
    let (rig, _region) = rig.crash(region);
    assert_eq!(
        act(&rig, &noting(&notes, 7, 2)),
        Ok(()),
        "for the first time"
    );
    check(&rig);
}

#[test]
fn names_are_made_once() {
    let mkdir = |rig: &Rig, caller: &Caller<'_>| {
        let arg = fuse_mkdir_in {
            mode: 0o755,
            umask: 0,
        };
        rig.fs.mkdir(caller, ROOT, &name("n"), &arg).map(drop)
    };
    let path = |rig: &Rig| rig.top.join("n");
    twice(
        |_| {},
        mkdir,
        |rig| fs::remove_dir(path(rig)).unwrap(),
        |rig| assert!(path(rig).is_dir()),
    );
    let symlink = |rig: &Rig, caller: &Caller<'_>| {
        let link = rig.fs.symlink(caller, ROOT, &name("n"), &name("target"));
        link.map(drop)
    };
    twice(
        |_| {},
        symlink,
        |rig| fs::remove_file(path(rig)).unwrap(),
        |rig| assert_eq!(fs::read_link(path(rig)).unwrap().to_str(), Some("target")),
    );
    let create = |rig: &Rig, caller: &Caller<'_>| {
        let flags = libc::O_RDWR | libc::O_EXCL;
        let made = rig.create_with(caller, ROOT, "n", flags, 0o640, 0)?;
        rig.write(made.0.nodeid, made.1.fh, 0, b"data").map(drop)
    };
    twice(
        |_| {},
        create,
        |rig| fs::remove_file(path(rig)).unwrap(),
        |rig| assert_eq!(fs::read(path(rig)).unwrap(), b"data"),
    );
    let link = |rig: &Rig, caller: &Caller<'_>| {
        let old = rig.look(ROOT, "old").unwrap().nodeid;
        rig.fs.link(caller, ROOT, old, &name("n")).map(drop)
    };
    twice(
        |rig| fs::write(rig.top.join("old"), b"").unwrap(),
        link,
        |rig| fs::remove_file(path(rig)).unwrap(),
        |rig| assert_eq!(fs::metadata(path(rig)).unwrap().nlink(), 2),
    );
}

#[test]
fn a_name_that_was_there_before_is_still_in_the_way_when_tried_again() {
    let region = Region::create().unwrap();
    let rig = Rig::lasting(&region);
    fs::create_dir(rig.top.join("n")).unwrap();
    let notes = line();
    let mkdir = |rig: &Rig, life| {
        let arg = fuse_mkdir_in::default();
        let caller = noting(&notes, 3, life);
        rig.fs.mkdir(&caller, ROOT, &name("n"), &arg).err()
    };
    assert_eq!(mkdir(&rig, 1), Some(Errno::EEXIST));
    let (rig, _region) = rig.crash(region);
    assert_eq!(mkdir(&rig, 2), Some(Errno::EEXIST));
}

#[test]
fn names_are_removed_once_and_a_new_one_in_their_place_stays() {
    let prepare = |rig: &Rig| fs::write(rig.top.join("n"), b"first").unwrap();
    let unlink = |rig: &Rig, caller: &Caller<'_>| rig.fs.unlink(caller, ROOT, &name("n"));
    twice(prepare, unlink, prepare, |_| {});

    let region = Region::create().unwrap();
    let rig = Rig::lasting(&region);
    prepare(&rig);
    // Holds the number, so that the new file has another one.
    fs::hard_link(rig.top.join("n"), rig.outside.join("held")).unwrap();
    let notes = line();
    unlink(&rig, &noting(&notes, 7, 1)).unwrap();
    fs::write(rig.top.join("n"), b"second").unwrap();
    let (rig, _region) = rig.crash(region);
    assert_eq!(unlink(&rig, &noting(&notes, 7, 2)), Ok(()));
    assert_eq!(fs::read(rig.top.join("n")).unwrap(), b"second");

    let rmdir = |rig: &Rig, caller: &Caller<'_>| rig.fs.rmdir(caller, ROOT, &name("d"));
    let make = |rig: &Rig| fs::create_dir(rig.top.join("d")).unwrap();
    twice(
        make,
        rmdir,
        |_| {},
        |rig| assert!(!rig.top.join("d").exists()),
    );
}

#[test]
fn a_rename_happens_once_whatever_its_kind() {
    let both = |rig: &Rig| {
        fs::write(rig.top.join("a"), b"a").unwrap();
        fs::write(rig.top.join("b"), b"b").unwrap();
    };
    let read = |rig: &Rig, n: &str| fs::read_to_string(rig.top.join(n)).ok();
    let rename = |flags: u32| {
        move |rig: &Rig, caller: &Caller<'_>| {
            let (old, new) = (name("a"), name("b"));
            rig.fs.rename(caller, ROOT, &old, ROOT, &new, flags)
        }
    };
    twice(
        both,
        rename(0),
        |_| {},
        |rig| {
            assert_eq!((read(rig, "a"), read(rig, "b")), (None, Some("a".into())));
        },
    );
    let swapped = |rig: &Rig| {
        let swapped = (Some("b".into()), Some("a".into()));
        assert_eq!((read(rig, "a"), read(rig, "b")), swapped);
    };
    let back = |rig: &Rig| {
        let (a, b, c) = (rig.top.join("a"), rig.top.join("b"), rig.top.join("c"));
        fs::rename(&a, &c).unwrap();
        fs::rename(&b, &a).unwrap();
        fs::rename(&c, &b).unwrap();
    };
    twice(both, rename(libc::RENAME_EXCHANGE), back, swapped);
    let one = |rig: &Rig| fs::write(rig.top.join("a"), b"a").unwrap();
    let back = |rig: &Rig| fs::rename(rig.top.join("b"), rig.top.join("a")).unwrap();
    twice(one, rename(libc::RENAME_NOREPLACE), back, |rig| {
        assert_eq!((read(rig, "a"), read(rig, "b")), (None, Some("a".into())));
    });
}

#[test]
fn attributes_are_created_and_removed_once() {
    let file = |rig: &Rig| fs::write(rig.top.join("f"), b"").unwrap();
    let set = |rig: &Rig, caller: &Caller<'_>| {
        let node = rig.look(ROOT, "f").unwrap().nodeid;
        let flags = libc::XATTR_CREATE as u32;
        let attr = name("user.a");
        rig.fs.setxattr(caller, node, &attr, b"value", flags, 0)
    };
    let unset = |rig: &Rig, caller: &Caller<'_>| {
        let node = rig.look(ROOT, "f").unwrap().nodeid;
        rig.fs.removexattr(caller, node, &name("user.a"))
    };
    let plain = |rig: &Rig| unset(rig, &root()).unwrap();
    twice(file, set, plain, |_| {});
    let prepare = |rig: &Rig| {
        file(rig);
        set(rig, &root()).unwrap();
    };
    twice(prepare, unset, |rig| set(rig, &root()).unwrap(), |_| {});
}

#[test]
fn an_appended_record_is_there_once() {
    let region = Region::create().unwrap();
    let rig = Rig::lasting(&region);
    fs::write(rig.top.join("log"), b"begin,").unwrap();
    let log = rig.look(ROOT, "log").unwrap().nodeid;
    let fh = rig.open(log, libc::O_WRONLY | libc::O_APPEND).unwrap();
    let notes = line();
    rig.write_as(&noting(&notes, 7, 1), log, fh, 0, b"record,", 0)
        .unwrap();
    let (rig, region) = rig.crash(region);
    let again = rig.write_as(&noting(&notes, 7, 2), log, fh, 0, b"record,", 0);
    assert_eq!(again, Ok(7));
    assert_eq!(fs::read(rig.top.join("log")).unwrap(), b"begin,record,");
    // Noted, and not written.
    fs::write(rig.top.join("log"), b"begin,").unwrap();
    let (rig, _region) = rig.crash(region);
    let again = rig.write_as(&noting(&notes, 7, 3), log, fh, 0, b"record,", 0);
    assert_eq!(again, Ok(7));
    assert_eq!(fs::read(rig.top.join("log")).unwrap(), b"begin,record,");
}
