//! libFuzzer's entry to [`ferry_fuzz::vhost_user::messages`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_fuzz::vhost_user::messages(data));
