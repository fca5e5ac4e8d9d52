//! libFuzzer's entry to [`ferry_fuzz::fuse::parse`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_fuzz::fuse::parse(data));
