//! A writer for the `newc` cpio archive that the kernel unpacks as its first file system.

use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive under construction.
#[derive(Debug, Default)]
pub(crate) struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Initramfs {
    /// An archive with the directories that a guest expects and a console.
    pub(crate) fn new() -> Result<Self> {
        let mut archive = Self::default();
        for name in ["bin", "dev", "mnt", "modules", "proc", "sys", "tmp"] {
            archive.directory(name)?;
        }
        archive.entry("dev/console", CHARACTER_DEVICE, (5, 1), &[])?;
        archive.entry("dev/null", CHARACTER_DEVICE, (1, 3), &[])?;
        Ok(archive)
    }

    /// Adds a directory, unless it is there.
    fn directory(&mut self, name: &str) -> Result<()> {
        if self.directories.insert(name.to_owned()) {
            self.entry(name, DIRECTORY, (0, 0), &[])?;
        }
        Ok(())
    }

    /// Adds an executable file with this content, and the directories that it lies in.
    pub(crate) fn file(&mut self, name: &str, content: &[u8]) -> Result<()> {
        for (end, _) in name.match_indices('/') {
            self.directory(&name[..end])?;
        }
        self.entry(name, PROGRAM, (0, 0), content)
    }

    /// Adds a copy of a file of the host.
    pub(crate) fn copy(&mut self, name: &str, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        self.file(name, &content)
    }

    /// Ends the archive and writes it.
    pub(crate) fn write(mut self, to: &Path) -> Result<()> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        fs::write(to, &self.bytes).with_context(|| format!("write {}", to.display()))
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).context("a file of the initramfs is too large")?;
        let name_size = u32::try_from(name.len() + 1)?;
        // ino, mode, uid, gid, nlink, mtime, size, the archive's device, the node's device, length of the name, checksum
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        write!(self.bytes, "070701")?;
        for field in fields {
            write!(self.bytes, "{field:08x}")?;
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
