//! libFuzzer's entry to [`ferry_fuzz::fuse::ops`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_fuzz::fuse::ops(data));
