//! No request allocates.
#![expect(unsafe_code, reason = "a counting allocator, and segments")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ffi::CString;
use std::ptr::NonNull;

use ferry_dataplane::fsdev::passthrough::Capacity;
use ferry_dataplane::fsdev::{Caller, DirSink, FsDev as _, Io, IoOp};
use ferry_dataplane::fuse::abi::*;
use ferry_dataplane::mem::{IoVec, Segments};

use crate::rig::{ROOT, Rig, as_user, name, root};

/// Counts each thread's allocations.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|n| n.set(n.get() + 1));
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|n| n.set(n.get() + 1));
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc_zeroed(layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Takes what fits and keeps nothing.
struct Room(usize);

impl DirSink for Room {
    fn entry(&mut self, name: &[u8], _: u64, _: u64, _: u32) -> bool {
        let size = (24 + name.len()).next_multiple_of(8);
        let fits = size <= self.0;
        self.0 -= if fits { size } else { 0 };
        fits
    }

    fn fits_plus(&self, name_len: usize) -> bool {
        152 + name_len <= self.0
    }

    fn entry_plus(&mut self, name: &[u8], _: u64, _: u32, _: &fuse_entry_out) -> bool {
        self.entry(name, 0, 0, 0)
    }
}

fn finish(rig: &Rig, io: Io) {
    if let Io::Submit { op, pin } = io {
        assert!(!matches!(op, IoOp::Fallocate { .. }));
        rig.fs.unpin(pin, op, 0);
    }
}

struct Names {
    files: Vec<CString>,
    moved: CString,
    link: CString,
    dir: CString,
    xattr: CString,
}

fn mix(rig: &Rig, names: &Names, caller: &Caller<'_>, data: Segments<'_>) {
    let fs = &rig.fs;
    let create = fuse_create_in {
        flags: libc::O_RDWR as u32,
        mode: 0o644,
        umask: 0o022,
        open_flags: 0,
    };
    for n in &names.files {
        let (file, open) = fs.create(caller, ROOT, n, &create).unwrap();
        let (id, fh) = (file.nodeid, open.fh);
        let arg = fuse_write_in {
            fh,
            size: 16,
            ..Default::default()
        };
        finish(rig, fs.write(caller, id, &arg, data).unwrap());
        let arg = fuse_read_in {
            fh,
            size: 16,
            ..Default::default()
        };
        finish(rig, fs.read(caller, id, &arg, data).unwrap());
        let lk = fuse_file_lock {
            type_: libc::F_WRLCK as u32,
            ..Default::default()
        };
        let arg = fuse_lk_in {
            fh,
            owner: 5,
            lk,
            ..Default::default()
        };
        fs.setlk(caller, id, &arg, false).unwrap();
        fs.getlk(caller, id, &arg).unwrap();
        fs.getattr(caller, id, Some(fh)).unwrap();
        let arg = fuse_setattr_in {
            valid: FATTR_SIZE | FATTR_MTIME_NOW,
            ..Default::default()
        };
        fs.setattr(caller, id, &arg).unwrap();
        fs.setxattr(caller, id, &names.xattr, b"v", 0, 0).unwrap();
        fs.getxattr(caller, id, &names.xattr, &mut [0; 64]).unwrap();
        fs.access(caller, id, 4).unwrap();
        fs.flush(
            caller,
            id,
            &fuse_flush_in {
                fh,
                lock_owner: 5,
                ..Default::default()
            },
        )
        .unwrap();
        fs.release(
            caller,
            id,
            &fuse_release_in {
                fh,
                ..Default::default()
            },
        )
        .unwrap();
        fs.rename(caller, ROOT, n, ROOT, &names.moved, 0).unwrap();
        let again = fs.lookup(caller, ROOT, &names.moved).unwrap();
        fs.link(caller, ROOT, again.nodeid, n).unwrap();
        fs.unlink(caller, ROOT, &names.moved).unwrap();
        fs.forget(id, 3);
    }
    let dir = fs
        .mkdir(
            caller,
            ROOT,
            &names.dir,
            &fuse_mkdir_in {
                mode: 0o755,
                umask: 0,
            },
        )
        .unwrap();
    fs.symlink(caller, dir.nodeid, &names.link, &names.dir)
        .unwrap();
    for plus in [false, true] {
        let fh = fs
            .opendir(caller, ROOT, &fuse_open_in::default())
            .unwrap()
            .fh;
        let arg = fuse_read_in {
            fh,
            size: 65536,
            ..Default::default()
        };
        fs.readdir(caller, ROOT, &arg, plus, &mut Room(65536))
            .unwrap();
        fs.releasedir(
            caller,
            ROOT,
            &fuse_release_in {
                fh,
                ..Default::default()
            },
        )
        .unwrap();
    }
    assert!(fs.lookup(caller, ROOT, &names.moved).is_err());
    fs.statfs(caller, dir.nodeid).unwrap();
    fs.unlink(caller, dir.nodeid, &names.link).unwrap();
    fs.rmdir(caller, ROOT, &names.dir).unwrap();
    for n in &names.files {
        fs.unlink(caller, ROOT, n).unwrap();
    }
    rig.mount(u64::MAX);
}

#[test]
fn a_mix_of_requests_allocates_nothing_after_the_start() {
    let capacity = Capacity {
        hot_inodes: 8,
        ..Default::default()
    };
    let rig = Rig::sized("/tmp", capacity, |_| {});
    crate::rig::chmod(&rig.top, 0o777);
    let names = Names {
        files: (0..50).map(|i| name(&format!("file-{i}"))).collect(),
        moved: name("moved"),
        link: name("link"),
        dir: name("dir"),
        xattr: name("user.x"),
    };
    let mut bytes = [7u8; 64];
    let pieces = [IoVec::new(NonNull::from(&mut bytes).cast(), 64)];
    // SAFETY: the piece is `bytes`, which is not touched meanwhile.
    let data = unsafe { Segments::new(&pieces) };
    let callers = [root(), as_user(1000, 1000)];
    let before = ALLOCATIONS.get();
    for caller in callers.iter().cycle().take(20) {
        mix(&rig, &names, caller, data);
    }
    assert_eq!(ALLOCATIONS.get(), before);
    drop(Box::new(1u8));
    assert!(ALLOCATIONS.get() > before, "the counter counts");
}
