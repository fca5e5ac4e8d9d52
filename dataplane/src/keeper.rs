//! What the management thread puts aside for the next process: records in the recovery memory, descriptors in the service
//! manager's store.
//!
//! Without a service manager nothing would survive, so nothing is kept. A record that cannot be kept is told to the
//! operator once; the service goes on.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::os::fdstore::{FdStore, Kept};
use crate::recovery;
use crate::recovery::placed::Placed;
use crate::recovery::region::{Region, RegionError};

/// The first byte of every record: how the rest is written. Any change of a struct that is kept raises it.
pub(crate) const VERSION: u8 = 2;
/// What the keys of records begin with that are kept through here.
const KINDS: [&str; 6] = [
    "firmware/",
    "fsdev/",
    "function/",
    "device/",
    "transport/",
    "link/",
];

/// Why the state of a former process cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The memory as a whole.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// A record.
    #[error(
        "record {key} of the recovery memory is not readable by this version (format {format}, {VERSION} is known)"
    )]
    Record {
        /// Its key.
        key: String,
        /// Its first byte.
        format: u8,
    },
}

/// The records and descriptors.
#[derive(Clone, Debug, Default)]
pub struct Keeper {
    fds: Arc<FdStore>,
    region: Option<Arc<Mutex<Region>>>,
    /// The operator knows that something is not kept.
    warned: Arc<AtomicBool>,
}

impl Keeper {
    /// Takes over what the former process has kept, or begins anew.
    pub fn open(fds: Arc<FdStore>) -> Result<Keeper, KeepError> {
        if !fds.is_kept() {
            return Ok(Keeper::default());
        }
        let region = match fds.take(recovery::FD_NAME) {
            Some(file) => Region::adopt(file)?,
            None => {
                let region = Region::create()?;
                fds.put(recovery::FD_NAME, region.fd());
                region
            }
        };
        let keeper = Keeper {
            fds,
            region: Some(Arc::new(Mutex::new(region))),
            warned: Arc::default(),
        };
        keeper.check()?;
        Ok(keeper)
    }

    /// Whether every record is of a kind that this version reads.
    fn check(&self) -> Result<(), KeepError> {
        let Some(region) = self.region() else {
            return Ok(());
        };
        let all = region.cells().iter();
        for (key, value) in all.filter(|(key, _)| KINDS.iter().any(|kind| key.starts_with(kind))) {
            let format = value.first().copied().unwrap_or(0);
            if format != VERSION {
                let key = key.to_owned();
                return Err(KeepError::Record { key, format });
            }
        }
        Ok(())
    }

    /// Whether anything is kept.
    pub fn is_on(&self) -> bool {
        self.region.is_some()
    }

    /// The recovery memory.
    pub fn region(&self) -> Option<MutexGuard<'_, Region>> {
        let region = self.region.as_ref()?;
        Some(region.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The store of descriptors.
    pub fn fds(&self) -> &Arc<FdStore> {
        &self.fds
    }

    /// Has a descriptor kept.
    pub fn keep(&self, fd: impl AsFd) -> Option<Kept> {
        self.fds.keep(fd)
    }

    /// Keeps a record under a key, in place of what was there.
    pub fn save(&self, key: &str, value: &impl Serialize) {
        if self.is_on() {
            self.save_bytes(key, &encode(value));
        }
    }

    /// Keeps a record that [`encode`] has made.
    pub fn save_bytes(&self, key: &str, bytes: &[u8]) {
        let Some(mut region) = self.region() else {
            return;
        };
        if let Err(error) = region.cells_mut().put(key, bytes)
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            tracing::error!(key, %error, "a record cannot be kept: a crash now may disconnect guests");
        }
    }

    /// The record under a key. One that cannot be read counts as none, and is told to the operator.
    pub fn load<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        let bytes = self.region()?.cells().get(key)?;
        let decoded = bytes
            .split_first()
            .map(|(_, body)| postcard::from_bytes(body));
        match decoded {
            Some(Ok(value)) => Some(value),
            Some(Err(error)) => {
                tracing::error!(key, %error, "a record of the former process is damaged and ignored");
                None
            }
            None => None,
        }
    }

    /// The keys that begin so, without that beginning.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let Some(region) = self.region() else {
            return Vec::new();
        };
        let keys = region.cells().keys();
        keys.filter_map(|key| key.strip_prefix(prefix))
            .map(str::to_owned)
            .collect()
    }

    /// Forgets a record.
    pub fn forget(&self, key: &str) {
        if let Some(mut region) = self.region() {
            region.cells_mut().remove(key);
        }
    }

    /// Words that the next process finds under the same name, zero when they are new. Without a service manager, or if
    /// there is no room, they are only this process's.
    pub fn words(&self, name: &str, count: usize) -> Option<Placed<AtomicU64>> {
        let Some(region) = self.region() else {
            return Placed::on_heap(count);
        };
        let len = (count as u64).saturating_mul(size_of::<u64>() as u64);
        let words = region
            .area(name)
            .and_then(|area| area.map_or_else(|| region.add_area(name, len), Ok))
            .and_then(|area| area.words(0, count));
        match words {
            Ok(words) => Some(words),
            Err(error) => {
                tracing::error!(name, %error, "no recovery memory: a crash now may disconnect guests");
                Placed::on_heap(count)
            }
        }
    }

    /// Gives words back; nobody in this process uses them any more.
    pub fn forget_words(&self, name: &str) {
        if let Some(region) = self.region() {
            region.remove_area(name);
        }
    }
}

/// A record as it is kept.
pub fn encode(value: &impl Serialize) -> Vec<u8> {
    // Writing into a growing buffer fails for no value that is kept here.
    let body = postcard::to_allocvec(value).unwrap_or_default();
    [&[VERSION][..], &body].concat()
}
