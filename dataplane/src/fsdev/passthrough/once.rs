//! Acts that must not happen twice, when a request is executed again after a crash.
//!
//! Before the act, what is there is looked at and noted; executed again, what is there is compared with that. An act that
//! would fail notes nothing: it may fail again.

use core::ffi::CStr;
use core::ops::ControlFlow;

use ferry_shared::errno::Errno;

use super::sys::{self, Stat};
use crate::fsdev::Caller;
use crate::mem::Segments;
use crate::recovery::journal::Before;

fn present(dir: i32, name: &CStr) -> Result<Option<Stat>, Errno> {
    match sys::stat_at(dir, name) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn dev(stat: &Stat) -> u64 {
    super::inode::device(stat)
}

fn is(stat: &Stat, facts: &[u64; 4]) -> bool {
    let [ino, device, ..] = facts;
    (stat.stx_ino, dev(stat)) == (*ino, *device)
}

/// Whether an earlier execution has made this name; if not, the caller does so next. `of`: the inode that the name is for.
pub(super) fn is_made(
    caller: &Caller<'_>,
    dir: i32,
    name: &CStr,
    of: Option<&Stat>,
) -> Result<bool, Errno> {
    let journal = &caller.journal;
    if !journal.is_on() {
        return Ok(false);
    }
    let found = present(dir, name)?;
    match (journal.before(), found) {
        (Before::Begun(facts), Some(found)) => Ok(of.is_none() || is(&found, &facts)),
        (Before::Begun(_), None) | (Before::Nothing, Some(_)) => Ok(false),
        (Before::Nothing, None) => {
            let [ino, device] = of.map_or([0; 2], |stat| [stat.stx_ino, dev(stat)]);
            journal.begin([ino, device, 0, 0]);
            Ok(false)
        }
    }
}

/// Breaks off when an earlier execution has removed this name; if not, the caller does so next, and is told what it is the name
/// of, if that was looked at and there is something.
pub(super) fn removal(
    caller: &Caller<'_>,
    dir: i32,
    name: &CStr,
) -> Result<ControlFlow<(), Option<Stat>>, Errno> {
    let journal = &caller.journal;
    if !journal.is_on() {
        return Ok(ControlFlow::Continue(None));
    }
    let found = present(dir, name)?;
    match (journal.before(), found) {
        (Before::Begun(facts), found) if found.is_none_or(|found| !is(&found, &facts)) => {
            Ok(ControlFlow::Break(()))
        }
        (Before::Begun(_), found) => Ok(ControlFlow::Continue(found)),
        (Before::Nothing, Some(found)) => {
            journal.begin([found.stx_ino, dev(&found), 0, 0]);
            Ok(ControlFlow::Continue(Some(found)))
        }
        (Before::Nothing, None) => Ok(ControlFlow::Continue(None)),
    }
}

/// Whether an earlier execution has renamed; if not, the caller does so next.
pub(super) fn is_renamed(
    caller: &Caller<'_>,
    old: (i32, &CStr),
    new: (i32, &CStr),
) -> Result<bool, Errno> {
    let journal = &caller.journal;
    if !journal.is_on() {
        return Ok(false);
    }
    let source = present(old.0, old.1)?;
    match (journal.before(), source) {
        (Before::Begun(facts), source) => {
            let moved = source.is_none_or(|source| !is(&source, &facts));
            let target = present(new.0, new.1)?;
            Ok(moved && target.is_some_and(|target| is(&target, &facts)))
        }
        (Before::Nothing, Some(source)) => {
            journal.begin([source.stx_ino, dev(&source), 0, 0]);
            Ok(false)
        }
        (Before::Nothing, None) => Ok(false),
    }
}

/// Whether an earlier execution has appended all of `data` to this file; if not, the caller does so next.
pub(super) fn is_appended(caller: &Caller<'_>, fd: i32, data: Segments<'_>) -> Result<bool, Errno> {
    let journal = &caller.journal;
    if !journal.is_on() {
        return Ok(false);
    }
    let size = sys::stat_fd(fd)?.stx_size;
    match journal.before() {
        Before::Nothing => {
            journal.begin([size, 0, 0, 0]);
            Ok(false)
        }
        Before::Begun([before, ..]) => holds(fd, before, size, data),
    }
}

/// Whether the file has exactly this data at `at`. What cannot be read, because the file is open for writing alone, is
/// judged by the length.
fn holds(fd: i32, at: u64, size: u64, data: Segments<'_>) -> Result<bool, Errno> {
    let len = data.len() as u64;
    if size < at.saturating_add(len) {
        return Ok(false);
    }
    let file = match sys::reopen(fd, libc::O_RDONLY) {
        Ok(file) => file,
        Err(_) => return Ok(size == at.saturating_add(len)),
    };
    let (mut wanted, mut found) = ([0; 4096], [0; 4096]);
    let (mut at, mut rest) = (at, data);
    while !rest.is_empty() {
        let count = rest.read(&mut wanted);
        let there = found.get_mut(..count).ok_or(Errno::EIO)?;
        if sys::read_at(file.raw(), there, at)? != count || wanted.get(..count) != Some(there) {
            return Ok(false);
        }
        at = at.saturating_add(count as u64);
        rest = rest.after(count);
    }
    Ok(true)
}

/// Whether an earlier execution has made this attribute with this value; if not, the caller does so next.
pub(super) fn is_set(caller: &Caller<'_>, path: &CStr, name: &CStr, value: &[u8]) -> bool {
    let journal = &caller.journal;
    if !journal.is_on() {
        return false;
    }
    match journal.before() {
        Before::Nothing => {
            if sys::get_xattr(path, name, &mut []) == Err(Errno::ENODATA) {
                journal.begin([0; _]);
            }
            false
        }
        Before::Begun(_) => sys::get_xattr(path, name, &mut []).is_ok_and(|len| len == value.len()),
    }
}

/// Whether an earlier execution has removed this attribute; if not, the caller does so next.
pub(super) fn is_unset(caller: &Caller<'_>, path: &CStr, name: &CStr) -> bool {
    let journal = &caller.journal;
    if !journal.is_on() {
        return false;
    }
    let there = sys::get_xattr(path, name, &mut []);
    match journal.before() {
        Before::Nothing => {
            if there.is_ok() {
                journal.begin([0; _]);
            }
            false
        }
        Before::Begun(_) => there == Err(Errno::ENODATA),
    }
}
