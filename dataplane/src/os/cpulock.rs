//! Claims on CPUs by lock files, as SPDK applications make them: `spdk_cpu_lock_NNN` in one directory of the machine, locked
//! by whoever runs a core on that CPU and holding its process id.
#![expect(
    unsafe_code,
    reason = "takes record locks, which fcntl(2) does by raw structure"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ferry_shared::errno::Errno;
use ferry_shared::msg::Failure;

/// Where the lock files of this machine are.
pub const LOCK_DIR: &str = "/var/tmp";

/// Claimed CPUs; given up when dropped.
#[derive(Debug)]
pub struct CpuLocks {
    files: Vec<(PathBuf, File)>,
}

impl CpuLocks {
    /// Claims all of these CPUs, or none.
    pub fn claim(dir: &Path, cpus: &[u32]) -> Result<CpuLocks, Failure> {
        let mut locks = CpuLocks { files: Vec::new() };
        for &cpu in cpus {
            let path = dir.join(format!("spdk_cpu_lock_{cpu:03}"));
            let file = claim_file(cpu, &path)?;
            let pid = (std::process::id() as i32).to_ne_bytes();
            if let Err(error) = file.write_all_at(&pid, 0) {
                tracing::warn!(path = %path.display(), %error, "cannot say who has claimed the CPU");
            }
            locks.files.push((path, file));
        }
        Ok(locks)
    }
}

impl Drop for CpuLocks {
    fn drop(&mut self) {
        for (path, _) in &self.files {
            // While it is still locked, so that nobody else's claim is removed.
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove the claim of a CPU");
            }
        }
    }
}

/// Opens and locks the file of a CPU.
fn claim_file(cpu: u32, path: &Path) -> Result<File, Failure> {
    let cannot = |error: io::Error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        let detail = format!("cannot claim CPU {cpu} by {}: {error}", path.display());
        Failure::new(errno, detail)
    };
    loop {
        let file = open(path).map_err(cannot)?;
        if let Err(error) = lock(&file) {
            return Err(taken(cpu, path, &file, &error));
        }
        // Who held it may have removed it between the two steps; then the claim has to be on the file that is there.
        let locked = file.metadata().map_err(cannot)?.ino();
        if std::fs::symlink_metadata(path).is_ok_and(|there| there.ino() == locked) {
            return Ok(file);
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)
}

fn whole_file(kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn lock(file: &File) -> io::Result<()> {
    let lock = whole_file(libc::F_WRLCK);
    // SAFETY: `lock` is a whole `struct flock`, which the call only reads.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Explains a claim that somebody else has.
fn taken(cpu: u32, path: &Path, file: &File, error: &io::Error) -> Failure {
    let mut pid = [0; 4];
    let owner = match file.read_exact_at(&mut pid, 0) {
        Ok(()) => format!("process {} has claimed it", i32::from_ne_bytes(pid)),
        Err(_) => format!("another process has claimed it ({error})"),
    };
    let detail = format!(
        "Failed to claim CPU core: {cpu}: {owner} by {}; give the services different CPUs with --cpumask, or say \
         --cpumask-locks off",
        path.display()
    );
    Failure::new(Errno::EBUSY, detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A directory for one test, removed with the value.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Dir {
            let path =
                std::env::temp_dir().join(format!("ferry-lock-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Dir(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// Set for the process that holds a claim for a test.
    const HOLD: &str = "FERRY_TEST_HOLD_CPU";

    #[test]
    fn claims_exclude_each_other_between_processes() {
        if let Some(dir) = std::env::var_os(HOLD) {
            let refused = CpuLocks::claim(Path::new(&dir), &[6, 7]).unwrap_err();
            assert_eq!(refused.errno, Errno::EBUSY);
            let parent = std::os::unix::process::parent_id().to_string();
            assert!(
                refused.detail.starts_with("Failed to claim CPU core: 7"),
                "{}",
                refused.detail
            );
            assert!(refused.detail.contains(&parent), "{}", refused.detail);
            assert!(
                CpuLocks::claim(Path::new(&dir), &[6]).is_ok(),
                "nothing of a refused claim is left"
            );
            return;
        }
        let dir = Dir::new("claims");
        let mine = CpuLocks::claim(&dir.0, &[5, 7]).unwrap();
        let other = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "os::cpulock::tests::claims_exclude_each_other_between_processes",
            ])
            .env(HOLD, &dir.0)
            .output()
            .unwrap();
        assert!(
            other.status.success(),
            "{}",
            String::from_utf8_lossy(&other.stdout)
        );
        drop(mine);
        assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 0);
    }

    #[test]
    fn a_link_in_the_place_of_a_lock_file_is_not_followed() {
        let dir = Dir::new("link");
        std::os::unix::fs::symlink("/dev/null", dir.0.join("spdk_cpu_lock_003")).unwrap();
        let refused = CpuLocks::claim(&dir.0, &[3]).unwrap_err();
        assert!(
            refused.detail.contains("spdk_cpu_lock_003"),
            "{}",
            refused.detail
        );
    }
}
