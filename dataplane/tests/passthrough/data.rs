//! What is done with open files and directories.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use ferry_dataplane::fsdev::{FsDev as _, Io};
use ferry_dataplane::fuse::abi::*;
use ferry_dataplane::mem::IoVec;
use ferry_shared::errno::Errno;
use ferry_shared::msg::Placement;

use crate::rig::{ROOT, Rig, as_user, chmod, mode, name, root};

#[test]
fn numbers_that_no_file_has_are_refused() {
    let rig = Rig::new();
    let (file, fh) = rig.create(ROOT, "f");
    for offset in [u64::MAX, i64::MAX as u64, 1 << 63] {
        assert_eq!(
            rig.read(file.nodeid, fh, offset, 8).unwrap_err(),
            Errno::EINVAL
        );
        assert_eq!(
            rig.write(file.nodeid, fh, offset, b"x").unwrap_err(),
            Errno::EFBIG
        );
    }
    for (nodeid, fh) in [
        (file.nodeid, 0),
        (file.nodeid, fh + 1),
        (ROOT, fh),
        (file.nodeid, fh | 1 << 40),
    ] {
        assert_eq!(rig.read(nodeid, fh, 0, 8).unwrap_err(), Errno::EBADF);
    }
    rig.release(file.nodeid, fh);
    assert_eq!(rig.read(file.nodeid, fh, 0, 8).unwrap_err(), Errno::EBADF);
    let dir = rig.opendir(ROOT).unwrap();
    assert_eq!(rig.read(ROOT, dir, 0, 8).unwrap_err(), Errno::EBADF);
}

#[test]
fn node_ids_that_were_never_given_out_or_are_forgotten_are_told_apart() {
    let rig = Rig::new();
    rig.mount(!FUSE_EXPORT_SUPPORT);
    let dir = rig.mkdir(ROOT, "d").unwrap().nodeid;
    assert_eq!(rig.look(dir + 1, "x").unwrap_err(), Errno::ENOENT);
    assert_eq!(rig.look(0, "x").unwrap_err(), Errno::ENOENT);
    assert_eq!(rig.look(u64::MAX, "x").unwrap_err(), Errno::ENOENT);
    rig.fs.forget(dir, u64::MAX);
    assert_eq!(rig.look(dir, "x").unwrap_err(), Errno::ESTALE);
    rig.fs.forget(dir, 1);
    rig.fs.forget(ROOT, u64::MAX);
    assert_ne!(rig.look(ROOT, "d").unwrap().nodeid, dir);
}

#[test]
fn an_open_file_that_is_in_use_outlives_its_release() {
    let rig = Rig::new();
    let (file, fh) = rig.create(ROOT, "f");
    let arg = fuse_fsync_in {
        fh,
        ..Default::default()
    };
    let pending = rig.fs.fsync(&root(), file.nodeid, &arg).unwrap();
    let fds = rig.fds();
    rig.release(file.nodeid, fh);
    assert_eq!(rig.read(file.nodeid, fh, 0, 1).unwrap_err(), Errno::EBADF);
    assert_eq!(rig.fds(), fds);
    rig.perform(pending, &IoVec::EMPTY).unwrap();
    assert_eq!(rig.fds(), fds - 1);
}

#[test]
fn a_create_of_an_existing_name_opens_it_unless_it_must_be_new() {
    let rig = Rig::new();
    fs::write(rig.top.join("f"), "text").unwrap();
    let flags = libc::O_RDWR | libc::O_EXCL;
    let made = rig.create_with(&root(), ROOT, "f", flags, 0o600, 0);
    assert_eq!(made.unwrap_err(), Errno::EEXIST);
    let (entry, open) = rig
        .create_with(&root(), ROOT, "f", libc::O_RDWR, 0o600, 0)
        .unwrap();
    assert_eq!(rig.read(entry.nodeid, open.fh, 0, 9).unwrap(), b"text");
    assert_eq!(mode(&rig.top.join("f")), 0o644);
    let flags = libc::O_RDWR | libc::O_TRUNC;
    let (entry, _) = rig
        .create_with(&root(), ROOT, "f", flags, 0o600, 0)
        .unwrap();
    assert_eq!(entry.attr.size, 0);
    rig.mkdir(ROOT, "d").unwrap();
    let made = rig.create_with(&root(), ROOT, "d", libc::O_RDWR, 0o600, 0);
    assert_eq!(made.unwrap_err(), Errno::EISDIR);
    let known = rig.fs.usage().0;
    rig.fs.forget(entry.nodeid, 2);
    assert_eq!(
        rig.fs.usage().0,
        known - 1,
        "the failed create has left no lookup behind"
    );
}

#[test]
fn an_open_leaves_truncation_to_the_guest_which_knows_what_it_executes() {
    let rig = Rig::new();
    let path = rig.top.join("f");
    fs::write(&path, "text").unwrap();
    assert_eq!(rig.fs.offer().flags & FUSE_ATOMIC_O_TRUNC, 0);
    let f = rig.look(ROOT, "f").unwrap().nodeid;
    for access in [libc::O_RDONLY, libc::O_WRONLY] {
        rig.open(f, access | libc::O_TRUNC).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"text");
    }
}

#[test]
fn a_create_of_an_existing_name_truncates_it_as_the_guest_will_not() {
    let rig = Rig::new();
    let path = rig.top.join("f");
    for (open_flags, kept) in [(0, 0o6755), (FUSE_OPEN_KILL_SUIDGID, 0o755)] {
        fs::write(&path, "text").unwrap();
        chmod(&path, 0o6755);
        let arg = fuse_create_in {
            flags: (libc::O_WRONLY | libc::O_TRUNC) as u32,
            mode: 0o600,
            umask: 0,
            open_flags,
        };
        rig.fs.create(&root(), ROOT, &name("f"), &arg).unwrap();
        assert_eq!((fs::read(&path).unwrap().len(), mode(&path)), (0, kept));
    }
}

#[test]
fn an_open_reply_leaves_the_page_cache_in_use() {
    let rig = Rig::new();
    let (file, _) = rig.create(ROOT, "f");
    for flags in [libc::O_RDWR, libc::O_RDWR | libc::O_DIRECT] {
        let arg = fuse_open_in {
            flags: flags as u32,
            open_flags: 0,
        };
        let open = rig.fs.open(&root(), file.nodeid, &arg).unwrap();
        assert_eq!(open.open_flags & FOPEN_DIRECT_IO, 0);
    }
}

#[test]
fn direct_transfers_of_any_alignment_work() {
    let rig = Rig::on_disk();
    let (file, _) = rig.create(ROOT, "f");
    let flags = libc::O_RDWR | libc::O_DIRECT;
    let fh = rig.open(file.nodeid, flags).unwrap();
    rig.write(file.nodeid, fh, 3, b"odd").unwrap();
    assert_eq!(rig.read(file.nodeid, fh, 0, 100).unwrap(), b"\0\0\0odd");
    let (other, open) = rig
        .create_with(&root(), ROOT, "g", flags, 0o644, 0)
        .unwrap();
    let page = vec![7u8; 4096];
    let cache = FUSE_WRITE_CACHE;
    rig.write_as(&root(), other.nodeid, open.fh, 0, &page, cache)
        .unwrap();
    rig.write_as(&root(), other.nodeid, open.fh, 4096, b"tail", cache)
        .unwrap();
    assert_eq!(fs::metadata(rig.top.join("g")).unwrap().len(), 4100);
}

#[test]
fn a_write_strips_privileges_exactly_when_asked() {
    let rig = Rig::new();
    let path = rig.top.join("f");
    let (file, fh) = rig.create(ROOT, "f");
    let kill = FUSE_WRITE_KILL_SUIDGID;
    // Who writes as one of the others, and is not of the file's group 0, loses set-group-ID in any case.
    for (before, gid, flag, after) in [
        (0o6755, 1000, 0, 0o6755),
        (0o6755, 1000, kill, 0o755),
        (0o2644, 1000, kill, 0o2644),
        (0o2666, 1000, kill, 0o666),
        (0o2666, 0, kill, 0o2666),
        (0o2676, 0, kill, 0o676),
        (0o4600, 1000, kill, 0o600),
    ] {
        chmod(&path, before);
        rig.write_as(&as_user(1000, gid), file.nodeid, fh, 0, b"x", flag)
            .unwrap();
        assert_eq!(mode(&path), after, "{before:o} {flag}");
    }
    rig.mount(!FUSE_HANDLE_KILLPRIV_V2);
    let file = rig.look(ROOT, "f").unwrap();
    let fh = rig.open(file.nodeid, libc::O_RDWR).unwrap();
    chmod(&path, 0o4755);
    rig.write(file.nodeid, fh, 0, b"x").unwrap();
    assert_eq!(mode(&path), 0o755);
}

#[test]
fn an_appended_file_takes_pieces_and_pages_where_they_belong_and_the_rest_at_its_end() {
    const PIECE: usize = 131_072;
    let rig = Rig::new();
    fs::write(rig.top.join("f"), "0123456789").unwrap();
    let file = rig.look(ROOT, "f").unwrap();
    let fh = rig
        .open(file.nodeid, libc::O_RDWR | libc::O_APPEND)
        .unwrap();
    // The second of two pieces comes first.
    for (number, byte) in [(1, b'2'), (0, b'1')] {
        let offset = (10 + number * PIECE) as u64;
        rig.write(file.nodeid, fh, offset, &[byte; PIECE]).unwrap();
    }
    rig.write_as(&root(), file.nodeid, fh, 2, b"XY", FUSE_WRITE_CACHE)
        .unwrap();
    // From a guest that does not know how long the file has become.
    rig.write(file.nodeid, fh, 4, b"end").unwrap();
    let expected = [
        b"01XY456789".as_slice(),
        &[b'1'; PIECE],
        &[b'2'; PIECE],
        b"end",
    ];
    assert!(fs::read(rig.top.join("f")).unwrap() == expected.concat());
}

#[test]
fn an_allocation_by_an_unprivileged_caller_strips_privileges() {
    let rig = Rig::new();
    let path = rig.top.join("f");
    let (file, fh) = rig.create(ROOT, "f");
    let arg = fuse_fallocate_in {
        fh,
        length: 8192,
        ..Default::default()
    };
    for (caller, after) in [(root(), 0o6755), (as_user(1000, 1000), 0o755)] {
        chmod(&path, 0o6755);
        let io = rig.fs.fallocate(&caller, file.nodeid, &arg).unwrap();
        rig.perform(io, &IoVec::EMPTY).unwrap();
        assert_eq!(mode(&path), after);
    }
    assert_eq!(fs::metadata(&path).unwrap().len(), 8192);
}

/// Such a guest asks for it with a SETATTR beforehand, and does not say who allocates.
#[test]
fn an_allocation_by_an_unnamed_caller_strips_nothing_where_ids_may_be_mapped() {
    let unnamed = as_user(FUSE_INVALID_UIDGID, FUSE_INVALID_UIDGID);
    for (mask, after) in [(u64::MAX, 0o6755), (!FUSE_ALLOW_IDMAP, 0o755)] {
        let rig = Rig::new();
        rig.mount(mask);
        let path = rig.top.join("f");
        let (file, fh) = rig.create(ROOT, "f");
        chmod(&path, 0o6755);
        let arg = fuse_fallocate_in {
            fh,
            length: 8192,
            ..Default::default()
        };
        let io = rig.fs.fallocate(&unnamed, file.nodeid, &arg).unwrap();
        rig.perform(io, &IoVec::EMPTY).unwrap();
        assert_eq!(mode(&path), after);
    }
}

#[test]
fn holes_are_punched_found_and_copied_over() {
    let rig = Rig::new();
    let (file, fh) = rig.create(ROOT, "f");
    rig.write(file.nodeid, fh, 0, &[1u8; 65536]).unwrap();
    let mode = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
    let arg = fuse_fallocate_in {
        fh,
        offset: 8192,
        length: 8192,
        mode,
        padding: 0,
    };
    let io = rig.fs.fallocate(&root(), file.nodeid, &arg).unwrap();
    rig.perform(io, &IoVec::EMPTY).unwrap();
    let seek = |offset, whence: i32| {
        let arg = fuse_lseek_in {
            fh,
            offset,
            whence: whence as u32,
            padding: 0,
        };
        rig.fs.lseek(&root(), file.nodeid, &arg)
    };
    assert_eq!(seek(0, libc::SEEK_HOLE).unwrap(), 8192);
    assert_eq!(seek(8192, libc::SEEK_DATA).unwrap(), 16384);
    assert_eq!(seek(0, libc::SEEK_END).unwrap(), 65536);
    assert_eq!(seek(65536, libc::SEEK_DATA).unwrap_err(), Errno::ENXIO);
    let (copy, to) = rig.create(ROOT, "copy");
    let arg = fuse_copy_file_range_in {
        fh_in: fh,
        nodeid_out: copy.nodeid,
        fh_out: to,
        len: 65536,
        ..Default::default()
    };
    assert_eq!(
        rig.fs.copy_file_range(&root(), file.nodeid, &arg).unwrap(),
        65536
    );
    assert_eq!(
        fs::read(rig.top.join("copy")).unwrap(),
        fs::read(rig.top.join("f")).unwrap()
    );
    let flagged = fuse_copy_file_range_in { flags: 1, ..arg };
    let refused = rig.fs.copy_file_range(&root(), file.nodeid, &flagged);
    assert_eq!(refused.unwrap_err(), Errno::EINVAL);
}

#[test]
fn holes_are_not_sought_while_the_guest_caches_writes() {
    let rig = Rig::with(|spec| spec.enable_writeback_cache = true);
    let (file, fh) = rig.create(ROOT, "f");
    for (whence, expected) in [
        (libc::SEEK_DATA, Err(Errno::ENOSYS)),
        (libc::SEEK_HOLE, Err(Errno::ENOSYS)),
        (libc::SEEK_END, Ok(0)),
    ] {
        let whence = whence as u32;
        let arg = fuse_lseek_in {
            fh,
            whence,
            ..Default::default()
        };
        assert_eq!(rig.fs.lseek(&root(), file.nodeid, &arg), expected);
    }
}

#[test]
fn flushing_and_syncing_work_on_every_node() {
    let rig = Rig::on_disk();
    let dir = rig.mkdir(ROOT, "d").unwrap().nodeid;
    let (file, fh) = rig.create(dir, "f");
    let id = file.nodeid;
    rig.fs
        .flush(
            &root(),
            id,
            &fuse_flush_in {
                fh,
                ..Default::default()
            },
        )
        .unwrap();
    for fsync_flags in [0, FUSE_FSYNC_FDATASYNC] {
        let arg = fuse_fsync_in {
            fh,
            fsync_flags,
            padding: 0,
        };
        rig.perform(rig.fs.fsync(&root(), id, &arg).unwrap(), &IoVec::EMPTY)
            .unwrap();
    }
    let fh = rig.opendir(dir).unwrap();
    let arg = fuse_fsync_in {
        fh,
        ..Default::default()
    };
    rig.perform(rig.fs.fsyncdir(&root(), dir, &arg).unwrap(), &IoVec::EMPTY)
        .unwrap();
    for nodeid in [ROOT, dir, id] {
        rig.fs.syncfs(&root(), nodeid).unwrap();
    }
}

#[test]
fn a_block_number_is_given_where_the_file_system_has_blocks() {
    let rig = Rig::on_disk();
    let (file, fh) = rig.create(ROOT, "f");
    rig.write(file.nodeid, fh, 0, &[1u8; 16384]).unwrap();
    let arg = fuse_fsync_in {
        fh,
        ..Default::default()
    };
    rig.perform(
        rig.fs.fsync(&root(), file.nodeid, &arg).unwrap(),
        &IoVec::EMPTY,
    )
    .unwrap();
    let at = |block, blocksize| {
        let arg = fuse_bmap_in {
            block,
            blocksize,
            padding: 0,
        };
        rig.fs.bmap(&root(), file.nodeid, &arg)
    };
    match at(1, 4096) {
        Ok(block) => {
            assert_ne!(block, 0);
            assert_eq!(at(8, 512).unwrap(), block * 8);
        }
        Err(errno) => assert!([Errno::EINVAL, Errno::ENOTTY, Errno::EPERM].contains(&errno)),
    }
    assert_eq!(at(0, 0).unwrap_err(), Errno::EINVAL);
}

#[test]
fn an_open_file_is_always_ready() {
    let rig = Rig::new();
    let (file, fh) = rig.create(ROOT, "f");
    let events = (libc::POLLIN | libc::POLLOUT | libc::POLLPRI) as u32;
    let arg = fuse_poll_in {
        fh,
        events,
        ..Default::default()
    };
    let ready = (libc::POLLIN | libc::POLLOUT) as u32;
    assert_eq!(rig.fs.poll(&root(), file.nodeid, &arg).unwrap(), ready);
}

#[test]
fn an_unnamed_file_can_be_used_and_linked() {
    let rig = Rig::new();
    let mode = libc::S_IFREG | 0o666;
    let arg = fuse_create_in {
        flags: libc::O_RDWR as u32,
        mode,
        umask: 0o022,
        open_flags: 0,
    };
    chmod(&rig.top, 0o777);
    let (file, open) = rig.fs.tmpfile(&as_user(3, 4), ROOT, &arg).unwrap();
    assert_eq!((file.attr.uid, file.attr.gid, file.attr.nlink), (3, 4, 0));
    assert_eq!(file.attr.mode, libc::S_IFREG | 0o644);
    rig.write(file.nodeid, open.fh, 0, b"text").unwrap();
    assert_eq!(rig.list(ROOT, 4096, false).len(), 2);
    rig.fs
        .link(&root(), ROOT, file.nodeid, &name("now"))
        .unwrap();
    assert_eq!(fs::read(rig.top.join("now")).unwrap(), b"text");
    let excl = fuse_create_in {
        flags: (libc::O_RDWR | libc::O_EXCL) as u32,
        ..arg
    };
    let (file, _) = rig.fs.tmpfile(&root(), ROOT, &excl).unwrap();
    let linked = rig.fs.link(&root(), ROOT, file.nodeid, &name("never"));
    assert_eq!(linked.unwrap_err(), Errno::ENOENT);
}

#[test]
fn skipped_reads_still_end_at_the_end_of_the_file() {
    let rig = Rig::with(|spec| spec.skip_rw = true);
    fs::write(rig.top.join("f"), [0u8; 10_000]).unwrap();
    let f = rig.look(ROOT, "f").unwrap().nodeid;
    let fh = rig.open(f, libc::O_RDWR).unwrap();
    let lens = [0, 4096, 8192, 10_000, 50_000].map(|at| rig.read(f, fh, at, 4096).unwrap().len());
    assert_eq!(lens, [4096, 4096, 1808, 0, 0]);
    assert_eq!(rig.write(f, fh, 0, &[9; 100]).unwrap(), 100);
    assert_eq!(fs::read(rig.top.join("f")).unwrap()[0], 0);
}

#[test]
fn a_listing_can_be_continued_anywhere_and_survives_change() {
    for rig in [Rig::new(), Rig::on_disk()] {
        for i in 0..200 {
            fs::write(rig.top.join(format!("file-{i:03}")), "").unwrap();
        }
        let fh = rig.opendir(ROOT).unwrap();
        let all = rig.readdir(ROOT, fh, 0, 65536, false);
        assert_eq!(all.len(), 202);
        for at in [150, 10, 100] {
            let rest = rig.readdir(ROOT, fh, all[at].off, 65536, false);
            let names =
                |es: &[crate::rig::Entry]| es.iter().map(|e| e.name.clone()).collect::<Vec<_>>();
            assert_eq!(names(&rest), names(&all[at + 1..]));
        }
        let some = rig.readdir(ROOT, fh, 0, 1024, false);
        for e in all.iter().filter(|e| e.name.ends_with('7')) {
            fs::remove_file(rig.top.join(&e.name)).unwrap();
        }
        let mut seen: Vec<_> = some.iter().map(|e| e.name.clone()).collect();
        let mut at = some.last().unwrap().off;
        loop {
            let more = rig.readdir(ROOT, fh, at, 1024, false);
            let Some(last) = more.last() else { break };
            at = last.off;
            seen.extend(more.into_iter().map(|e| e.name));
        }
        seen.retain(|n| !n.ends_with('7'));
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 182);
    }
}

#[test]
fn a_reply_too_small_for_one_entry_is_an_error_and_not_the_end() {
    let rig = Rig::new();
    fs::write(rig.top.join("x".repeat(200)), "").unwrap();
    let fh = rig.opendir(ROOT).unwrap();
    let first = rig.readdir(ROOT, fh, 0, 64, false);
    assert_eq!(first.len(), 2);
    let mut sink = crate::rig::Sink {
        room: 64,
        entries: Vec::new(),
    };
    let arg = fuse_read_in {
        fh,
        offset: first[1].off,
        size: 64,
        ..Default::default()
    };
    let next = rig.fs.readdir(&root(), ROOT, &arg, false, &mut sink);
    assert_eq!(next.unwrap_err(), Errno::EINVAL);
}

#[test]
fn readdirplus_counts_one_lookup_for_every_entry_that_the_guest_sees() {
    let rig = Rig::new();
    for i in 0..100 {
        fs::write(rig.top.join(format!("file-{i:02}")), "").unwrap();
    }
    let all = rig.list(ROOT, 2000, true);
    assert_eq!(all.len(), 102);
    assert_eq!(rig.fs.usage().0, 101);
    for e in &all {
        let entry = e.entry.unwrap();
        let path = rig.top.join(&e.name);
        assert_eq!(
            entry.attr.mode & libc::S_IFMT,
            fs::symlink_metadata(&path).unwrap().mode() & libc::S_IFMT
        );
        let dot = e.name.starts_with('.');
        assert_eq!(entry.nodeid == 0, dot);
        if !dot {
            assert_eq!(rig.look(ROOT, &e.name).unwrap().nodeid, entry.nodeid);
            rig.fs.forget(entry.nodeid, 2);
        }
    }
    assert_eq!(rig.fs.usage().0, 1);
}

#[test]
fn the_placement_decides_what_leaves_the_core() {
    let ops = [FUSE_LOOKUP, FUSE_OPEN, FUSE_SETATTR, FUSE_WRITE];
    for (metadata, ordinary) in [
        (Placement::Inline, false),
        (Placement::Auto, false),
        (Placement::Offload, true),
    ] {
        let rig = Rig::with(|spec| spec.metadata = metadata);
        assert!(ops.iter().all(|&op| rig.fs.may_block(op) == ordinary));
        assert!(!rig.fs.may_block(FUSE_FORGET) && !rig.fs.may_block(FUSE_BATCH_FORGET));
        assert!(rig.fs.may_block(FUSE_SYNCFS) && rig.fs.may_block(FUSE_COPY_FILE_RANGE));
    }
}

#[test]
fn a_read_that_fails_half_way_is_not_taken_for_the_end_of_the_file() {
    let rig = Rig::new();
    fs::write(rig.top.join("f"), [7; 8192]).unwrap();
    let file = rig.look(ROOT, "f").unwrap().nodeid;
    let fh = rig.open(file, libc::O_RDONLY).unwrap();
    // The ring meets the error itself, and answers with it.
    assert!(matches!(
        rig.read_into_a_hole(file, fh),
        Ok(Io::Submit { .. })
    ));
}
