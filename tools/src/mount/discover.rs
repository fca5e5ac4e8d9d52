//! Finds a function by its tag among the sockets of a service's run directory.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::driver::{Device, Protocol};

/// Where the sockets of each protocol are in a run directory.
const PLACES: [(&str, Protocol); 2] = [("pci", Protocol::VfioUser), ("vhost", Protocol::VhostUser)];

/// Attaches to the function with this tag. Looking at a function attaches to it for a moment; one that is in use refuses.
pub(super) fn by_tag(run_dir: &Path, tag: &str, only: Option<Protocol>) -> Result<Device> {
    let mut seen = Vec::new();
    for (place, protocol) in PLACES {
        if only.is_some_and(|only| only != protocol) {
            continue;
        }
        for socket in sockets(&run_dir.join(place))? {
            match Device::connect(&socket, Some(protocol)) {
                Ok(device) if device.config().tag == tag => return Ok(device),
                Ok(device) => seen.push(format!(
                    "{}: tag `{}`",
                    socket.display(),
                    device.config().tag
                )),
                Err(e) => seen.push(format!("{}: {e}", socket.display())),
            }
        }
    }
    if seen.is_empty() {
        bail!(
            "there are no sockets of functions in {}: is the service running, with this run directory?",
            run_dir.display()
        );
    }
    bail!(
        "no function in {} that is free has the tag `{tag}`:\n  {}",
        run_dir.display(),
        seen.join("\n  ")
    );
}

/// The sockets in a directory, sorted; none if there is no such directory.
fn sockets(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| format!("cannot look into {}", dir.display())),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot look into {}", dir.display()))?;
        if entry.file_type().is_ok_and(|kind| kind.is_socket()) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}
