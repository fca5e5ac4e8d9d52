//! libFuzzer's entry to [`ferry_fuzz::rpc::state`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_fuzz::rpc::state(data));
