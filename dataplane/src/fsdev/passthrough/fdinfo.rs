//! The range locks of an open file description, as the host's kernel lists them.
//!
//! Only the kernel knows what splitting, merging and converting have made of an owner's locks. Asked when a lock is in
//! somebody's way, never otherwise. Allocates nothing.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;

use super::sys::{ProcPath, RangeLock};

/// Longer than any line.
const BUFFER: usize = 2048;

/// Calls `visit` with each lock of the description behind `fd`; with none when the kernel does not tell.
pub(super) fn locks_of(fd: i32, mut visit: impl FnMut(RangeLock)) {
    let path = ProcPath::info(fd);
    let Ok(mut file) = File::open(OsStr::from_bytes(path.path().to_bytes())) else {
        return;
    };
    let mut buffer = [0u8; BUFFER];
    let mut kept = 0;
    while let Some(room) = buffer.get_mut(kept..).filter(|room| !room.is_empty()) {
        let Ok(got @ 1..) = file.read(room) else {
            return;
        };
        let filled = kept.saturating_add(got).min(BUFFER);
        let mut rest = buffer.get(..filled).unwrap_or_default();
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            let (line, after) = rest.split_at(end);
            rest = after.get(1..).unwrap_or_default();
            if let Some(lock) = core::str::from_utf8(line).ok().and_then(parse) {
                visit(lock);
            }
        }
        kept = rest.len();
        buffer.copy_within(filled.saturating_sub(kept)..filled, 0);
    }
}

/// `lock: NUMBER: CLASS ADVISORY KIND PID DEVICE:INODE FIRST LAST`.
fn parse(line: &str) -> Option<RangeLock> {
    let mut words = line.strip_prefix("lock:")?.split_whitespace();
    if words.nth(1)? != "OFDLCK" {
        return None;
    }
    let kind = match words.nth(1)? {
        "READ" => libc::F_RDLCK,
        "WRITE" => libc::F_WRLCK,
        _ => return None,
    };
    let start: i64 = words.nth(2)?.parse().ok()?;
    let len = match words.next()? {
        "EOF" => 0,
        last => last
            .parse::<i64>()
            .ok()?
            .checked_sub(start)?
            .checked_add(1)?,
    };
    Some(RangeLock {
        kind,
        start,
        len,
        pid: -1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fsdev::passthrough::sys;

    #[test]
    fn every_lock_of_a_description_is_listed_however_many_there_are() {
        let file = sys::open_path(c"/dev/shm", libc::O_TMPFILE | libc::O_RDWR).unwrap();
        let mut wanted = Vec::new();
        for n in 0..200 {
            let kind = if n % 3 == 0 {
                libc::F_WRLCK
            } else {
                libc::F_RDLCK
            };
            let lock = RangeLock {
                kind,
                start: n * 10,
                len: if n == 199 { 0 } else { 5 },
                pid: -1,
            };
            sys::set_range_lock(file.raw(), lock).unwrap();
            wanted.push(lock);
        }
        let mut seen = Vec::new();
        locks_of(file.raw(), |lock| seen.push(lock));
        seen.sort_by_key(|lock| lock.start);
        assert_eq!(seen, wanted);
    }

    #[test]
    fn lines_about_anything_else_are_passed_over() {
        for line in [
            "pos:\t0",
            "lock:\t1: FLOCK  ADVISORY  WRITE 17 00:1a:5 0 EOF",
            "lock:\t1: OFDLCK  ADVISORY  UNLCK -1 00:1a:5 0 EOF",
            "lock:\t1: OFDLCK  ADVISORY  READ -1 00:1a:5 x EOF",
            "lock:",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
