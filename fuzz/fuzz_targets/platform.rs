//! libFuzzer's entry to [`ferry_fuzz::platform::file`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_fuzz::platform::file(data));
