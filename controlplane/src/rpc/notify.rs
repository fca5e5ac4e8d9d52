//! Notifications: what has happened to fsdevs and devices, numbered, the newest ones kept.

use std::collections::VecDeque;

use serde_json::Value;
use serde_json::json;

use super::RpcError;
use super::decode::Args;
use crate::app::App;

/// The kinds of notifications.
const TYPES: [&str; 10] = [
    "fsdev_register",
    "fsdev_unregister",
    "virtio_fs_device_start",
    "virtio_fs_device_stop",
    "virtio_fs_device_destroy",
    "virtio_fs_connect",
    "virtio_fs_disconnect",
    "virtio_fs_mount",
    "virtio_fs_umount",
    "dataplane_connect",
];

/// Notifications that are kept.
const KEPT: usize = 1024;

/// The newest notifications.
#[derive(Debug, Default)]
pub struct Notifications {
    next: u64,
    kept: VecDeque<(&'static str, String)>,
}

impl Notifications {
    /// Adds one.
    pub fn push(&mut self, kind: &'static str, about: &str) {
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back((kind, about.to_owned()));
        self.next = self.next.saturating_add(1);
    }

    /// At most `max`, from number `from` or the oldest that is kept.
    fn since(&self, from: u64, max: u64) -> Vec<Value> {
        let oldest = self.next.saturating_sub(self.kept.len() as u64);
        let skipped = usize::try_from(from.saturating_sub(oldest)).unwrap_or(usize::MAX);
        (oldest..)
            .zip(&self.kept)
            .skip(skipped)
            .take(usize::try_from(max).unwrap_or(usize::MAX))
            .map(|(id, (kind, about))| json!({"type": kind, "ctx": about, "id": id}))
            .collect()
    }
}

pub(super) fn get_types(_: &App, _: &Args) -> Result<Value, RpcError> {
    Ok(json!(TYPES))
}

pub(super) fn get_notifications(app: &App, args: &Args) -> Result<Value, RpcError> {
    let from = args.big("id").unwrap_or(0);
    let max = args.big("max").unwrap_or(u64::MAX);
    Ok(Value::Array(app.notifications().since(from, max)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(listed: &[Value]) -> Vec<u64> {
        let id = |value: &Value| value["id"].as_u64();
        listed.iter().filter_map(id).collect()
    }

    #[test]
    fn the_newest_are_kept_under_their_numbers() {
        let mut all = Notifications::default();
        assert!(all.since(0, u64::MAX).is_empty());
        for number in 0..(KEPT + 5) {
            all.push(TYPES[0], &number.to_string());
        }
        let listed = all.since(0, 2);
        assert_eq!(ids(&listed), [5, 6]);
        assert_eq!(listed[0]["ctx"], "5");
        assert_eq!(ids(&all.since(KEPT as u64 + 3, u64::MAX)), [1027, 1028]);
        assert!(all.since(u64::MAX, 1).is_empty());
        assert_eq!(all.since(0, u64::MAX).len(), KEPT);
    }
}
