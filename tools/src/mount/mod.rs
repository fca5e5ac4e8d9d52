//! `ferry mount`: a function of the service, mounted on this host without a virtual machine.

use std::path::PathBuf;

use anyhow::{Context, ensure};

/// The command line of `ferry mount`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The function's socket (vfio-user or vhost-user).
    pub socket: PathBuf,
    /// The directory to mount it on.
    pub dir: PathBuf,
}

/// Mounts, serves until it is unmounted or stopped, and cleans up.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let meta = std::fs::metadata(&args.dir)
        .with_context(|| format!("cannot mount on {}", args.dir.display()))?;
    ensure!(
        meta.is_dir(),
        "cannot mount on {}: it is not a directory",
        args.dir.display()
    );
    Ok(())
}
