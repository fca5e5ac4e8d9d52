//! libFuzzer's entry to [`ferry_fuzz::queue::packed`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_fuzz::queue::packed(data));
