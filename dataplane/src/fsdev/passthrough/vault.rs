//! Descriptors that cannot be opened again, kept in the service manager's fd store.
//!
//! Files without a name, and files that hold locks, live in their descriptors. They go to the store before the guest hears
//! of what has made them so, and are found again under a name made of their kind and id.
// UNSAFETY: lends descriptor numbers that the tables own.
#![expect(unsafe_code, reason = "descriptors are numbers in the tables")]

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use std::os::fd::{BorrowedFd, IntoRawFd};

use super::sys::Fd;
use crate::os::fdstore::FdStore;

/// What a kept descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `O_PATH`, of an inode that has lost its last name.
    Inode,
    /// An open file that was locked with flock(2).
    Handle,
    /// The description that holds an owner's range locks.
    Owner,
}

impl Kind {
    fn letter(self) -> char {
        match self {
            Kind::Inode => 'i',
            Kind::Handle => 'h',
            Kind::Owner => 'l',
        }
    }
}

/// A device's part of the store.
#[derive(Clone, Debug, Default)]
pub(super) struct Vault {
    /// `None`: descriptors end with the process.
    store: Option<Arc<FdStore>>,
    prefix: String,
}

impl Vault {
    /// Names begin with a number made of the area that the tables lie in.
    pub(super) fn new(store: Option<Arc<FdStore>>, area: &str) -> Vault {
        let hash = area.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Vault {
            store: store.filter(|s| s.is_kept()),
            prefix: format!("f{hash:016x}"),
        }
    }

    /// Whether anything is kept at all.
    pub(super) fn is_active(&self) -> bool {
        self.store.is_some()
    }

    fn name(&self, kind: Kind, id: u64) -> String {
        format!("{}{}{id:x}", self.prefix, kind.letter())
    }

    /// Keeps a descriptor; `false` when it will end with the process.
    pub(super) fn put(&self, kind: Kind, id: u64, fd: i32) -> bool {
        let Some(store) = &self.store else {
            return false;
        };
        // SAFETY: the caller's pin keeps the descriptor open until this returns.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        store.put(&self.name(kind, id), fd)
    }

    /// Gives up a kept descriptor.
    pub(super) fn remove(&self, kind: Kind, id: u64) {
        if let Some(store) = &self.store {
            store.remove(&self.name(kind, id));
        }
    }

    /// Takes everything that an earlier process has kept.
    pub(super) fn take_all(&self) -> Vec<(Kind, u64, Fd)> {
        let Some(store) = &self.store else {
            return Vec::new();
        };
        let all = store.take_prefix(&self.prefix).into_iter();
        all.filter_map(|(name, fd)| {
            let rest = name.strip_prefix(&self.prefix)?;
            let kinds = [Kind::Inode, Kind::Handle, Kind::Owner];
            let kind = kinds.into_iter().find(|k| rest.starts_with(k.letter()))?;
            let id = u64::from_str_radix(rest.get(1..)?, 16).ok()?;
            Some((kind, id, Fd::from_raw(fd.into_raw_fd())))
        })
        .collect()
    }
}
