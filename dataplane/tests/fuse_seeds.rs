//! The fuzzers' seeds: one per case, made from the same bytes as the tests.

mod fuse_support;

use std::fs;
use std::path::PathBuf;

use fuse_support::cases::{self, Case};
use fuse_support::wire::wire;

/// Rewrites the seeds instead of comparing them, when set.
const WRITE: &str = "FERRY_WRITE_SEEDS";

fn corpus(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(target)
}

/// Every case, and the two requests that are none.
fn requests() -> Vec<(String, Vec<u8>)> {
    let file = |case: &Case| case.name.to_lowercase().replace(' ', "_");
    let mut requests: Vec<_> = cases::all()
        .iter()
        .map(|case| (file(case), case.request()))
        .collect();
    requests.push(("init".into(), cases::init(7, 45, u64::MAX)));
    requests.push(("interrupt".into(), cases::request(36, 0, &wire().u64(5).0)));
    let context = wire().u32(5).u32(0).text("user.a").raw(b"label").zeros(4);
    let extensions = wire().u32(16).u32(32).u32(1).u32(55);
    let extensions = extensions.u32(32).u32(1).raw(&context.0);
    let mkdir = wire().u32(0o755).u32(0).text("dir");
    let mkdir = cases::extended(9, cases::NODE, &mkdir.0, &extensions.0);
    requests.push(("mkdir_with_extensions".into(), mkdir));
    requests
}

fn compare(target: &str, seed: impl Fn(&[u8]) -> Vec<u8>) {
    for (name, request) in requests() {
        let path = corpus(target).join(name);
        let bytes = seed(&request);
        if std::env::var_os(WRITE).is_some() {
            fs::create_dir_all(corpus(target)).expect("a place for the seeds");
            fs::write(&path, &bytes).expect("the seed can be written");
        }
        let committed = fs::read(&path).unwrap_or_default();
        assert!(
            committed == bytes,
            "{} is not what the case says; run this test with {WRITE}=1 and commit the result",
            path.display()
        );
    }
}

#[test]
fn the_parsers_seeds_are_the_cases_in_the_newest_protocol() {
    compare("fuse_parse", |request| {
        // Protocol 7.45, every flag.
        wire().raw(&[18, 0xff]).raw(request).0
    });
}

/// The same request about something that the null backend has: its root directory, or its first file.
fn for_null(request: &[u8]) -> Vec<u8> {
    let mut request = request.to_vec();
    let directory = request.windows(8).any(|word| word == 0xf4u64.to_le_bytes())
        || [1, 6, 8, 9, 10, 11, 12, 13, 27, 35, 45, 51].contains(&fuse_support::opcode(&request));
    let node: u64 = if directory { 1 } else { 2 };
    for id in [cases::NODE, 0xf1, 0xf2, 0xf4] {
        for place in (16..request.len().saturating_sub(7)).step_by(8) {
            if request[place..place + 8] == id.to_le_bytes() {
                request[place..place + 8].copy_from_slice(&node.to_le_bytes());
            }
        }
    }
    request
}

#[test]
fn the_backends_seeds_are_the_cases_in_a_mounted_session() {
    compare("fuse_ops", |request| {
        let request = for_null(request);
        // Mounted; room for the reply, memory in pieces of 24 bytes, length.
        let step = wire().raw(&[1]).u16(8192).raw(&[24]);
        step.u16(request.len() as u16).raw(&request).0
    });
}
