//! The unprivileged half of Ferry.
//!
//! It owns the RPC socket, the rules ([`model`]), what is kept of them ([`state`]), saved configurations ([`config`]) and the link to the data plane
//! ([`dataplane`]). Nothing here touches a guest or its files: killing this process never disturbs a request. The table of
//! methods ([`rpc::table`]) and the command line made from it ([`rpc::cli`]) are also what `ferry rpc` is built on.

pub mod access;
pub mod app;
pub mod config;
pub mod dataplane;
pub mod framing;
mod host;
mod hotplug;
pub mod metrics;
pub mod model;
pub mod rpc;
pub mod server;
pub mod state;

/// A fresh directory for one test, removed with the value.
#[cfg(test)]
fn test_dir(name: &str) -> TestDir {
    static NEXT: core::sync::atomic::AtomicU32 = core::sync::atomic::AtomicU32::new(0);
    let number = NEXT.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
    let process = std::process::id();
    let path = std::env::temp_dir().join(format!("ferry-cp-{process}-{number}-{name}"));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir(&path).expect("a directory for the test");
    TestDir(path)
}

#[cfg(test)]
struct TestDir(std::path::PathBuf);

#[cfg(test)]
impl core::ops::Deref for TestDir {
    type Target = std::path::Path;

    fn deref(&self) -> &std::path::Path {
        &self.0
    }
}

#[cfg(test)]
impl Drop for TestDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
