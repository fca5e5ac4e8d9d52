//! The kernel's side of a mount: `/dev/fuse`, mount(2) and umount(2).

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;

use super::request::FUSE_PAGE;

const FUSE_DEVICE: &str = "/dev/fuse";
const FS_TYPE: &str = "fuse.ferry";
/// `_IOR(229, 0, uint32_t)` of `linux/fuse.h`.
const FUSE_DEV_IOC_CLONE: libc::Ioctl = 0x8004_e500;
/// Of `linux/prctl.h`.
const PR_SET_IO_FLUSHER: libc::c_int = 57;
/// The kernel's limit on the pages of one request, where it can be configured.
const PAGES_LIMIT: &str = "/proc/sys/fs/fuse/max_pages_limit";
const DEFAULT_PAGES_LIMIT: usize = 256;
/// No request is longer than this, however the kernel is configured.
const MAX_PAGES_LIMIT: usize = 1024;

/// Opens a connection to the kernel.
pub(super) fn open_fuse() -> Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    open(FUSE_DEVICE, flags, Mode::empty()).map_err(|e| {
        let hint = match e {
            Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => {
                "the kernel has no FUSE here: load it with `modprobe fuse`, or give the container this device"
            }
            Errno::EACCES | Errno::EPERM => "run this as root",
            _ => "FUSE is needed to mount",
        };
        anyhow::anyhow!("cannot open {FUSE_DEVICE}: {e}; {hint}")
    })
}

/// Opens one more descriptor on the same connection. Each has its own queue of requests that were read and not yet
/// answered, so threads do not meet there.
#[expect(unsafe_code, reason = "this ioctl has no wrapper")]
pub(super) fn clone_fuse(main: &OwnedFd) -> Result<OwnedFd> {
    let clone = open_fuse()?;
    let number = main.as_raw_fd().cast_unsigned();
    // SAFETY: the kernel reads one u32 from the given address, which is that of `number`.
    let done = unsafe { libc::ioctl(clone.as_raw_fd(), FUSE_DEV_IOC_CLONE, &raw const number) };
    Errno::result(done).context("cannot clone the FUSE connection")?;
    Ok(clone)
}

/// Tells the kernel that this thread writes data back for it: when memory is short, the thread must not be made to wait
/// for just that. Without the right to say so the thread works all the same.
#[expect(unsafe_code, reason = "this prctl has no wrapper")]
pub(super) fn become_io_flusher() {
    // SAFETY: this operation takes numbers only, and changes nothing but flags of the calling thread.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
}

/// Bytes of the longest transfer that the kernel may ask for.
pub(super) fn max_transfer() -> usize {
    let limit = fs::read_to_string(PAGES_LIMIT)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(DEFAULT_PAGES_LIMIT);
    limit.clamp(1, MAX_PAGES_LIMIT) * FUSE_PAGE
}

/// The options of `-o`, sorted into what mount(2) has flags for and what it hands to FUSE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Options {
    flags: MsFlags,
    data: Vec<String>,
}

impl Options {
    pub(super) fn parse(list: &[String]) -> Result<Options> {
        let mut options = Options {
            flags: MsFlags::empty(),
            data: vec!["default_permissions".into(), "allow_other".into()],
        };
        for option in list.iter().flat_map(|item| item.split(',')) {
            options.add(option)?;
        }
        Ok(options)
    }

    fn add(&mut self, option: &str) -> Result<()> {
        let (flag, on) = match option {
            "" | "defaults" | "default_permissions" | "allow_other" => return Ok(()),
            "ro" => (MsFlags::MS_RDONLY, true),
            "rw" => (MsFlags::MS_RDONLY, false),
            "nosuid" => (MsFlags::MS_NOSUID, true),
            "suid" => (MsFlags::MS_NOSUID, false),
            "nodev" => (MsFlags::MS_NODEV, true),
            "dev" => (MsFlags::MS_NODEV, false),
            "noexec" => (MsFlags::MS_NOEXEC, true),
            "exec" => (MsFlags::MS_NOEXEC, false),
            "sync" => (MsFlags::MS_SYNCHRONOUS, true),
            "async" => (MsFlags::MS_SYNCHRONOUS, false),
            "dirsync" => (MsFlags::MS_DIRSYNC, true),
            "noatime" => (MsFlags::MS_NOATIME, true),
            "atime" => (MsFlags::MS_NOATIME, false),
            "nodiratime" => (MsFlags::MS_NODIRATIME, true),
            "relatime" => (MsFlags::MS_RELATIME, true),
            "strictatime" => (MsFlags::MS_STRICTATIME, true),
            _ if option.starts_with("max_read=") => {
                self.data.push(option.to_owned());
                return Ok(());
            }
            _ => bail!(
                "option `{option}` is not known; there are ro, rw, nosuid, nodev, noexec, sync, dirsync, noatime, \
                 nodiratime, relatime, strictatime, their opposites, and max_read=N"
            ),
        };
        self.flags.set(flag, on);
        Ok(())
    }
}

/// A file system mounted on a directory; it does not outlive this value.
#[derive(Debug)]
pub(super) struct Mount {
    dir: PathBuf,
    /// The kernel's number for it, by which it is told from what others may mount on the same directory.
    id: Option<u64>,
}

impl Mount {
    /// Checks that something can be mounted on `dir`, and gives its full name.
    pub(super) fn check_dir(dir: &Path) -> Result<PathBuf> {
        let shown = dir.display();
        let meta = fs::metadata(dir).map_err(|e| match e.kind() {
            ErrorKind::NotFound => {
                anyhow::anyhow!("cannot mount on {shown}: there is no such directory; create it first")
            }
            ErrorKind::NotConnected => anyhow::anyhow!(
                "cannot mount on {shown}: a mount whose server has gone is there; `umount {shown}` removes it"
            ),
            _ => anyhow::anyhow!("cannot mount on {shown}: {e}"),
        })?;
        if !meta.is_dir() {
            bail!("cannot mount on {shown}: it is not a directory");
        }
        fs::canonicalize(dir).with_context(|| format!("cannot resolve {shown}"))
    }

    /// Mounts the connection on `dir`.
    pub(super) fn new(fuse: &OwnedFd, tag: &str, dir: &Path, options: &Options) -> Result<Mount> {
        let mut data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            fuse.as_fd().as_raw_fd()
        );
        for option in &options.data {
            data.push(',');
            data.push_str(option);
        }
        mount(
            Some(tag),
            dir,
            Some(FS_TYPE),
            options.flags,
            Some(data.as_str()),
        )
        .map_err(|e| {
            let shown = dir.display();
            let hint = match e {
                Errno::EPERM => "mounting needs root (CAP_SYS_ADMIN)",
                Errno::EINVAL => "the kernel does not take these options",
                Errno::ENODEV => "the kernel has no FUSE: load it with `modprobe fuse`",
                _ => "is the directory usable?",
            };
            anyhow::anyhow!("cannot mount {tag} on {shown}: {e}; {hint}")
        })?;
        let id = mounts(&read_mounts(), dir).last();
        Ok(Mount {
            dir: dir.to_owned(),
            id,
        })
    }

    /// Where it is mounted.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Unmounts, waiting for what is to be written; false if somebody still uses it and it is now only out of sight.
    pub(super) fn unmount(&self) -> Result<bool> {
        let shown = self.dir.display();
        match umount2(&self.dir, MntFlags::UMOUNT_NOFOLLOW) {
            // EINVAL: somebody else was faster.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(true),
            Err(Errno::EBUSY) => {
                let flags = MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH;
                umount2(&self.dir, flags).with_context(|| format!("cannot unmount {shown}"))?;
                Ok(false)
            }
            Err(e) => Err(e).with_context(|| format!("cannot unmount {shown}")),
        }
    }

    /// Ends the connection, so that nobody waits for an answer any more, and takes the mount away even if it is in use.
    pub(super) fn abort(&self) {
        if !mounts(&read_mounts(), &self.dir).any(|id| Some(id) == self.id) {
            return;
        }
        // The first fails while the mount is busy, but ends the connection all the same.
        for flags in [MntFlags::MNT_FORCE, MntFlags::MNT_DETACH] {
            let _ = umount2(&self.dir, flags | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.abort();
    }
}

/// The table of mounts, as proc(5) describes it.
fn read_mounts() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()
}

/// The numbers of this program's kind of mounts on `dir`, the last one on top.
fn mounts<'a>(table: &'a str, dir: &'a Path) -> impl Iterator<Item = u64> + use<'a> {
    table.lines().filter_map(move |line| {
        let (fields, rest) = line.split_once(" - ")?;
        let mut fields = fields.split(' ');
        let id = fields.next()?.parse().ok()?;
        let place = fields.nth(3)?;
        let ours = rest.split(' ').next()? == FS_TYPE && unescape(place) == dir.as_os_str();
        ours.then_some(id)
    })
}

/// Undoes the table's way of writing spaces and other separators.
fn unescape(text: &str) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{MsFlags, Options, mounts};

    #[test]
    fn mounts_are_found_by_directory_and_kind_with_spaces_in_the_name() {
        let table = "21 1 8:1 / / rw shared:1 - ext4 /dev/sda rw\n\
            30 21 0:40 / /a\\040b\\134 rw - fuse.ferry tag rw,user_id=0\n\
            31 21 0:41 / /a rw - fuse.ferry tag rw\n\
            32 30 0:42 / /a\\040b\\134 rw,nosuid shared:3 - fuse.ferry other rw\n\
            33 32 0:43 / /a\\040b\\134 rw - tmpfs tmpfs rw\n";
        let found: Vec<u64> = mounts(table, Path::new("/a b\\")).collect();
        assert_eq!(found, [30, 32]);
        assert_eq!(mounts(table, Path::new("/b")).next(), None);
    }

    fn parse(options: &str) -> anyhow::Result<Options> {
        Options::parse(&[options.to_owned()])
    }

    #[test]
    fn the_last_of_opposite_options_wins() {
        let options = parse("ro,nosuid,rw,noatime").expect("all are known");
        assert_eq!(options.flags, MsFlags::MS_NOSUID | MsFlags::MS_NOATIME);
    }

    #[test]
    fn options_of_fuse_are_handed_on_and_others_refused_by_name() {
        let options = parse("max_read=8192").expect("known");
        assert!(options.data.contains(&"max_read=8192".to_owned()));
        let error = parse("ro,fd=3").expect_err("not for the user to give");
        assert!(error.to_string().contains("fd=3"), "{error}");
    }
}
