//! A process that may open only a few files. Alone in its binary, because the limit is the process's. Needs root.

use std::fs;
use std::path::PathBuf;

use ferry_dataplane::fsdev::passthrough::{Capacity, Passthrough};
use ferry_dataplane::fsdev::{Caller, FsDev as _, Negotiated};
use ferry_dataplane::fuse::abi::{FUSE_ROOT_ID, fuse_open_in, fuse_release_in};
use ferry_shared::errno::Errno;
use ferry_shared::msg::{AioSpec, Placement};
use nix::sys::resource::{Resource, setrlimit};

const LIMIT: u64 = 128;

struct TempDir(PathBuf);

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn descriptors_run_out_only_when_every_one_is_an_open_file() {
    let dir = TempDir(format!("/dev/shm/ferry-fd-limit-{}", std::process::id()).into());
    fs::create_dir(&dir.0).unwrap();
    for i in 0..1_000 {
        fs::write(dir.0.join(format!("f{i}")), "text").unwrap();
    }
    setrlimit(Resource::RLIMIT_NOFILE, LIMIT, LIMIT).unwrap();
    let spec = AioSpec {
        root_path: dir.0.to_str().unwrap().to_owned(),
        enable_xattr: false,
        enable_writeback_cache: false,
        max_xfer_size: 4096,
        max_readahead: 4096,
        skip_rw: false,
        export: ferry_shared::export::ExportSpec::default(),
        metadata: Placement::Inline,
    };
    // The budget alone would allow more than the process has.
    let capacity = Capacity {
        hot_inodes: 10_000,
        ..Default::default()
    };
    let fs = Passthrough::with_capacity(&spec, capacity).unwrap();
    let granted = Negotiated {
        minor: 45,
        flags: 0,
        max_write: 4096,
    };
    fs.mount(granted).unwrap();
    let root = Caller {
        unique: 1,
        uid: 0,
        gid: 0,
        pid: 1,
        supplementary_group: None,
        security_context: None,
        journal: Default::default(),
    };
    let nodes: Vec<_> = (0..1_000)
        .map(|i| {
            let name = std::ffi::CString::new(format!("f{i}")).unwrap();
            fs.lookup(&root, FUSE_ROOT_ID, &name).unwrap().nodeid
        })
        .collect();
    let open = |nodeid| fs.open(&root, nodeid, &fuse_open_in::default());
    let mut files = Vec::new();
    let errno = loop {
        let nodeid = nodes[files.len()];
        match open(nodeid) {
            Ok(opened) => files.push((nodeid, opened.fh)),
            Err(errno) => break errno,
        }
    };
    assert_eq!(errno, Errno::EMFILE);
    assert!(files.len() as u64 > LIMIT / 2, "{} files", files.len());
    let (nodeid, fh) = files[0];
    let arg = fuse_release_in {
        fh,
        ..Default::default()
    };
    fs.release(&root, nodeid, &arg).unwrap();
    open(nodeid).unwrap();
}
