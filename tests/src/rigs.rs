//! What `tests/rigs/fetch` has put into the cache, and the check program that is built from `tests/guest`.

use crate::repository;
use anyhow::{Context, Result, bail, ensure};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The cache of the guest rigs.
#[derive(Clone, Debug)]
pub struct Rigs(PathBuf);

impl Rigs {
    /// The cache, with every part in `parts` complete.
    ///
    /// # Errors
    /// When a part is missing; the message says how to get it.
    pub fn find(parts: &[&str]) -> Result<Self> {
        let root = match env::var_os("FERRY_RIG_CACHE") {
            Some(path) => PathBuf::from(path),
            None => PathBuf::from(env::var_os("HOME").context("HOME is not set")?)
                .join(".cache/ferry/rigs"),
        };
        for part in parts {
            if !root.join(part).join(".stamp").exists() {
                bail!(
                    "no {part} under {}: run tests/rigs/fetch {part}",
                    root.display()
                );
            }
        }
        Ok(Self(root))
    }

    /// A program of the original's Python client, which `tools/test integration` installs there.
    ///
    /// # Errors
    /// When it has not been installed.
    pub fn python_client(program: &str) -> Result<PathBuf> {
        let path = Self::find(&[])?.path("spdk/bin").join(program);
        ensure!(
            path.exists(),
            "no {}: tools/test integration installs it",
            path.display()
        );
        Ok(path)
    }

    /// A path below the cache.
    #[must_use]
    pub fn path(&self, below: &str) -> PathBuf {
        self.0.join(below)
    }

    /// The kernel modules of a part, in load order.
    ///
    /// # Errors
    /// When the part's list cannot be read.
    pub fn modules(&self, part: &str) -> Result<Vec<String>> {
        let order = self.0.join(part).join("order");
        let text =
            fs::read_to_string(&order).with_context(|| format!("read {}", order.display()))?;
        Ok(text.lines().map(str::to_owned).collect())
    }
}

/// Builds the static program of system-call checks into `dir`.
///
/// # Errors
/// When there is no C compiler or the program does not compile.
pub fn build_checks(dir: &Path) -> Result<PathBuf> {
    let source = repository().join("tests/guest");
    let program = dir.join("checks");
    let mut files: Vec<PathBuf> = fs::read_dir(&source)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
        .collect();
    files.sort();
    let status = Command::new(env::var_os("CC").unwrap_or_else(|| "cc".into()))
        .args(["-static", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&program)
        .args(files)
        .current_dir(&source)
        .status()
        .context("run the C compiler; install gcc")?;
    ensure!(
        status.success(),
        "the guest's check program does not compile"
    );
    Ok(program)
}
