//! libFuzzer's entry to [`ferry_fuzz::rings::control`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_fuzz::rings::control(data));
