//! libFuzzer's entry to [`ferry_fuzz::vfio_user::commands`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ferry_fuzz::vfio_user::commands(data));
