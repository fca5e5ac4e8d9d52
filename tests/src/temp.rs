//! Temporary directories that go away with the test.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory under the system's temporary directory, removed on drop unless the test is panicking and
/// `FERRY_KEEP_TEMP` is set.
///
/// The path is short: the sockets below it must fit the 108 bytes of a Unix socket address.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// A new, empty directory.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("ferry-{}-{number}", std::process::id()));
        if let Err(error) = fs::create_dir(&path) {
            panic!("cannot create {}: {error}", path.display());
        }
        Self(path)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The path of an entry below it.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A new directory below it.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn make_dir(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        if let Err(error) = fs::create_dir_all(&path) {
            panic!("cannot create {}: {error}", path.display());
        }
        path
    }
}

impl Default for TempDir {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("FERRY_KEEP_TEMP").is_some() {
            eprintln!("kept {}", self.0.display());
        } else if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}
