//! The virtio-fs device as its driver sees it: features, status, configuration space, queue settings.
//!
//! Free of any transport: vhost-user and vfio-user translate their messages and register accesses into the calls here, and
//! do what the answers say. Every number in here except what [`DeviceModel::new`] gets comes from a guest or its VMM.
//!
//! `VIRTIO_F_IN_ORDER` is not offered: a lock that waits would hold back every answer behind it, also the one whose receiver
//! is to release the lock. The configuration space never changes while a driver has the device, so its generation does not
//! either.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use ferry_shared::limits::MAX_RING_SIZE;
use ferry_shared::msg::DeviceSpec;

use super::queue::{QueueConfig, QueueState};
use super::spec::{Features, FsConfig, Status};
use crate::id::{QueueIdx, QueueKind};
use crate::mem::Iova;

/// Smallest buffer that the driver puts into the notification queue: the largest message of the device fits.
pub const NOTIFY_BUF_SIZE: u32 = 4096;

/// What the driver has set for one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSettings {
    /// Descriptors.
    pub size: u16,
    /// Descriptor area.
    pub desc: Iova,
    /// Driver area.
    pub avail: Iova,
    /// Device area.
    pub used: Iova,
    /// The driver has enabled the queue; nothing else can be set then.
    pub enabled: bool,
}

impl QueueSettings {
    fn fresh(size: u16) -> QueueSettings {
        QueueSettings {
            size,
            desc: Iova(0),
            avail: Iova(0),
            used: Iova(0),
            enabled: false,
        }
    }
}

/// What a transport has to do after the driver has written the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusEffect {
    /// Nothing.
    None,
    /// Stop all queues, end the session, then call [`DeviceModel::reset`]. The status reads as before until then.
    Reset,
    /// Start the enabled queues.
    DriverOk,
}

/// Why the driver's settings are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// Feature bits that were not offered.
    #[error("feature bits {0:#x} are not offered")]
    Features(u64),
    /// The driver does not accept `VIRTIO_F_VERSION_1`.
    #[error("the driver does not accept VIRTIO_F_VERSION_1")]
    Legacy,
    /// No such queue.
    #[error("there is no queue {index}, only {count}")]
    NoQueue {
        /// The number.
        index: u32,
        /// How many there are.
        count: u16,
    },
    /// The queue size is 0, too large or (split) not a power of two.
    #[error("queue {index} cannot have {size} descriptors")]
    QueueSize {
        /// The queue.
        index: u16,
        /// The size.
        size: u32,
    },
    /// The queue is enabled already.
    #[error("queue {index} is in use")]
    QueueInUse {
        /// The queue.
        index: u16,
    },
}

/// What the driver has set, as it is kept for a later process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceModelV1 {
    accepted: u64,
    status: u8,
    /// Size, descriptor, driver and device area, and whether it is enabled.
    queues: Vec<(u16, u64, u64, u64, bool)>,
}

/// A virtio-fs device.
#[derive(Debug)]
pub struct DeviceModel {
    config: FsConfig,
    offered: Features,
    max_queue_size: u16,
    /// What the driver has accepted so far; checked when it sets `FEATURES_OK`.
    accepted: Features,
    status: Status,
    queues: Box<[QueueSettings]>,
}

impl DeviceModel {
    /// The device that `spec` describes, as it is after a reset. `extra` are features of the transport.
    pub fn new(spec: &DeviceSpec, extra: Features, max_queue_size: u16) -> DeviceModel {
        let mut offered =
            Features::VERSION_1 | Features::INDIRECT_DESC | Features::EVENT_IDX | extra;
        offered.set(Features::RING_PACKED, spec.packed_vq);
        offered.set(Features::FS_NOTIFICATION, spec.notification_vq);
        let mut config = FsConfig {
            tag: [0; _],
            num_request_queues: spec.num_request_queues.into(),
            notify_buf_size: if spec.notification_vq {
                NOTIFY_BUF_SIZE.into()
            } else {
                0.into()
            },
        };
        for (to, &from) in config.tag.iter_mut().zip(spec.tag.as_bytes()) {
            *to = from;
        }
        let max_queue_size = max_queue_size.min(MAX_RING_SIZE as u16);
        let count = spec.queues() as usize;
        DeviceModel {
            config,
            offered,
            max_queue_size,
            accepted: Features::empty(),
            status: Status::empty(),
            queues: vec![QueueSettings::fresh(max_queue_size); count].into_boxed_slice(),
        }
    }

    /// Takes everything that the driver has set back.
    pub fn reset(&mut self) {
        let DeviceModel {
            config: _,
            offered: _,
            max_queue_size,
            accepted,
            status,
            queues,
        } = self;
        *accepted = Features::empty();
        *status = Status::empty();
        queues.fill(QueueSettings::fresh(*max_queue_size));
    }

    /// What the driver has set.
    pub fn saved(&self) -> DeviceModelV1 {
        let queue = |q: &QueueSettings| {
            let QueueSettings {
                size,
                desc,
                avail,
                used,
                enabled,
            } = *q;
            (size, desc.0, avail.0, used.0, enabled)
        };
        let DeviceModel {
            config: _,
            offered: _,
            max_queue_size: _,
            accepted,
            status,
            queues,
        } = self;
        DeviceModelV1 {
            accepted: accepted.bits(),
            status: status.bits(),
            queues: queues.iter().map(queue).collect(),
        }
    }

    /// Takes back what a driver had set when a former process served it; `false`, and nothing changed, if this device
    /// cannot have been set like that.
    pub fn restore(&mut self, saved: &DeviceModelV1) -> bool {
        let DeviceModelV1 {
            accepted,
            status,
            queues,
        } = saved;
        let status = Status::from_bits_truncate(*status);
        let agreed = status.contains(Status::FEATURES_OK);
        let accepted =
            core::mem::replace(&mut self.accepted, Features::from_bits_retain(*accepted));
        let good = |q: &(u16, u64, u64, u64, bool)| !q.4 || q.0 <= self.max_queue_size;
        if queues.len() != self.queues.len()
            || !queues.iter().all(good)
            || (agreed && self.check_features().is_err())
        {
            self.accepted = accepted;
            return false;
        }
        self.status = status;
        for (to, &(size, desc, avail, used, enabled)) in self.queues.iter_mut().zip(queues) {
            *to = QueueSettings {
                size,
                desc: Iova(desc),
                avail: Iova(avail),
                used: Iova(used),
                enabled,
            };
        }
        true
    }

    /// Features of the device.
    pub fn offered(&self) -> Features {
        self.offered
    }

    /// Features that the driver has written.
    pub fn accepted(&self) -> Features {
        self.accepted
    }

    /// The driver writes its features. After `FEATURES_OK` they stay as they are.
    pub fn write_features(&mut self, bits: u64) {
        if !self.status.contains(Status::FEATURES_OK) {
            self.accepted = Features::from_bits_retain(bits);
        }
    }

    /// Whether the device can work with the features that the driver has written.
    pub fn check_features(&self) -> Result<(), SettingError> {
        let alien = self.accepted.difference(self.offered);
        if !alien.is_empty() {
            return Err(SettingError::Features(alien.bits()));
        }
        if !self.accepted.contains(Features::VERSION_1) {
            return Err(SettingError::Legacy);
        }
        Ok(())
    }

    /// The device status.
    pub fn status(&self) -> Status {
        self.status
    }

    /// The driver writes the status: 0 asks for a reset, otherwise bits are added. `FEATURES_OK` is only taken when the
    /// features are acceptable, and `DRIVER_OK` only after that; the driver finds out by reading the status.
    pub fn write_status(&mut self, bits: u8) -> StatusEffect {
        if bits == 0 {
            return StatusEffect::Reset;
        }
        let mut new = Status::from_bits_truncate(bits).difference(Status::NEEDS_RESET);
        if !self.status.contains(Status::FEATURES_OK) && self.check_features().is_err() {
            new.remove(Status::FEATURES_OK);
        }
        if !(self.status | new).contains(Status::FEATURES_OK) {
            new.remove(Status::DRIVER_OK);
        }
        let started = new.contains(Status::DRIVER_OK) && !self.status.contains(Status::DRIVER_OK);
        self.status |= new;
        if started {
            StatusEffect::DriverOk
        } else {
            StatusEffect::None
        }
    }

    /// A queue has failed: the device works no more until it is reset. Whether the driver has to be told now (section
    /// 2.1.2: by a configuration change interrupt, if it has got as far as `DRIVER_OK`).
    pub fn set_needs_reset(&mut self) -> bool {
        let told = self.status.contains(Status::NEEDS_RESET);
        self.status |= Status::NEEDS_RESET;
        !told && self.status.contains(Status::DRIVER_OK)
    }

    /// Reads the configuration space; there are zeros behind its end.
    pub fn read_config(&self, offset: u64, out: &mut [u8]) {
        out.fill(0);
        let bytes = self.config.as_bytes();
        let from = usize::try_from(offset).ok().and_then(|at| bytes.get(at..));
        for (to, &from) in out.iter_mut().zip(from.unwrap_or(&[])) {
            *to = from;
        }
    }

    /// Number of queues of every kind.
    pub fn num_queues(&self) -> u16 {
        self.queues.len() as u16
    }

    /// What travels on a queue. It depends on the features that the driver accepted: without the notification queue the
    /// request queues begin one earlier, and the last queue stays without a purpose.
    pub fn queue_kind(&self, index: QueueIdx) -> Option<QueueKind> {
        let requests = self.config.num_request_queues.get();
        let notification = self.accepted.contains(Features::FS_NOTIFICATION);
        let first = 1u32.saturating_add(u32::from(notification));
        match u32::from(index.0) {
            0 => Some(QueueKind::HighPriority),
            1 if notification => Some(QueueKind::Notification),
            n if n < first.saturating_add(requests) => Some(QueueKind::Request),
            _ => None,
        }
    }

    /// Largest size of a queue.
    pub fn max_queue_size(&self) -> u16 {
        self.max_queue_size
    }

    /// The settings of a queue.
    pub fn queue(&self, index: QueueIdx) -> Option<&QueueSettings> {
        self.queues.get(usize::from(index.0))
    }

    /// The settings of a queue, to change them; refused while it is enabled.
    pub fn queue_mut(&mut self, index: QueueIdx) -> Result<&mut QueueSettings, SettingError> {
        let count = self.num_queues();
        match self.queues.get_mut(usize::from(index.0)) {
            None => Err(SettingError::NoQueue {
                index: u32::from(index.0),
                count,
            }),
            Some(queue) if queue.enabled => Err(SettingError::QueueInUse { index: index.0 }),
            Some(queue) => Ok(queue),
        }
    }

    /// Checks a size that the driver wants for a queue.
    pub fn check_size(&self, index: QueueIdx, size: u32) -> Result<u16, SettingError> {
        let refused = SettingError::QueueSize {
            index: index.0,
            size,
        };
        if size == 0 || size > u32::from(self.max_queue_size) {
            return Err(refused);
        }
        if !self.accepted.contains(Features::RING_PACKED) && !size.is_power_of_two() {
            return Err(refused);
        }
        u16::try_from(size).map_err(|_| refused)
    }

    /// Enables a queue, for good until a reset or [`disable_queue`](Self::disable_queue).
    pub fn enable_queue(&mut self, index: QueueIdx) -> Result<(), SettingError> {
        let size = self.queue_mut(index)?.size;
        self.check_size(index, u32::from(size))?;
        self.queue_mut(index)?.enabled = true;
        Ok(())
    }

    /// Makes a queue's settings changeable again.
    pub fn disable_queue(&mut self, index: QueueIdx) {
        if let Some(queue) = self.queues.get_mut(usize::from(index.0)) {
            queue.enabled = false;
        }
    }

    /// Whether the rings are packed.
    pub fn packed(&self) -> bool {
        self.accepted.contains(Features::RING_PACKED)
    }

    /// What a core needs to know to run a queue from `state` on.
    pub fn queue_config(&self, index: QueueIdx, state: QueueState) -> Option<QueueConfig> {
        let QueueSettings {
            size,
            desc,
            avail,
            used,
            enabled: _,
        } = *self.queue(index)?;
        Some(QueueConfig {
            size,
            desc,
            avail,
            used,
            packed: self.packed(),
            event_idx: self.accepted.contains(Features::EVENT_IDX),
            indirect: self.accepted.contains(Features::INDIRECT_DESC),
            state,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use ferry_shared::msg::{Attach, Platform};

    fn spec() -> DeviceSpec {
        DeviceSpec {
            name: "d".to_string(),
            attach: Attach::VhostUser,
            tag: "a-tag".to_string(),
            num_request_queues: 3,
            queue_size: 64,
            fsdev: "f".to_string(),
            packed_vq: false,
            notification_vq: false,
            driver_platform: Platform::Native,
        }
    }

    fn model(change: impl FnOnce(&mut DeviceSpec)) -> DeviceModel {
        let mut spec = spec();
        change(&mut spec);
        DeviceModel::new(&spec, Features::empty(), 64)
    }

    fn bring_up(device: &mut DeviceModel, features: Features) {
        device.write_status(1);
        device.write_status(3);
        device.write_features(features.bits());
        device.write_status(11);
    }

    #[test]
    fn features_follow_the_specification_of_the_device() {
        let base = Features::VERSION_1 | Features::INDIRECT_DESC | Features::EVENT_IDX;
        assert_eq!(model(|_| ()).offered(), base);
        let all = model(|s| {
            s.packed_vq = true;
            s.notification_vq = true;
        });
        assert_eq!(
            all.offered(),
            base | Features::RING_PACKED | Features::FS_NOTIFICATION
        );
    }

    #[test]
    fn features_ok_is_kept_back_for_features_that_are_not_offered_or_legacy() {
        for bad in [0, 1 << 32 | 1 << 34, 1 << 28, 1 << 32 | 1 << 63] {
            let mut device = model(|_| ());
            bring_up(&mut device, Features::from_bits_retain(bad));
            assert_eq!(device.status(), Status::ACKNOWLEDGE | Status::DRIVER);
            assert_eq!(device.write_status(15), StatusEffect::None);
            assert!(!device.status().contains(Status::DRIVER_OK));
        }
    }

    #[test]
    fn a_driver_gets_to_driver_ok_once_and_back_by_a_reset() {
        let mut device = model(|_| ());
        bring_up(&mut device, Features::VERSION_1);
        assert!(device.status().contains(Status::FEATURES_OK));
        device.write_features(u64::MAX);
        assert_eq!(device.accepted(), Features::VERSION_1);
        let queue = device.queue_mut(QueueIdx(1)).unwrap();
        queue.size = 16;
        device.enable_queue(QueueIdx(1)).unwrap();
        assert_eq!(device.write_status(15), StatusEffect::DriverOk);
        assert_eq!(device.write_status(15), StatusEffect::None);
        assert!(device.set_needs_reset());
        assert!(!device.set_needs_reset());
        assert_eq!(device.status().bits(), 15 | 64);

        assert_eq!(device.write_status(0), StatusEffect::Reset);
        assert_eq!(device.status().bits(), 15 | 64);
        device.reset();
        assert_eq!(device.status().bits(), 0);
        assert_eq!(device.accepted(), Features::empty());
        assert_eq!(device.queue(QueueIdx(1)), Some(&QueueSettings::fresh(64)));
    }

    #[test]
    fn the_configuration_space_has_the_tag_and_the_queues_and_zeros_behind() {
        let read = |device: &DeviceModel, at, n| {
            let mut out = vec![0xaa; n];
            device.read_config(at, &mut out);
            out
        };
        let device = model(|s| s.tag = "x".repeat(36));
        assert_eq!(read(&device, 0, 36), vec![b'x'; 36]);
        let device = model(|_| ());
        assert_eq!(&read(&device, 0, 6), b"a-tag\0");
        assert_eq!(&read(&device, 0, 40)[36..], [3, 0, 0, 0]);
        assert_eq!(read(&device, 36, 12), [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(read(&device, 4096, 2), [0, 0]);
        assert_eq!(read(&device, u64::MAX, 1), [0]);
        let device = model(|s| s.notification_vq = true);
        assert_eq!(read(&device, 40, 4), NOTIFY_BUF_SIZE.to_le_bytes());
    }

    #[test]
    fn what_the_driver_has_set_survives_and_what_it_cannot_have_set_does_not() {
        let mut device = model(|_| ());
        bring_up(&mut device, Features::VERSION_1 | Features::EVENT_IDX);
        let queue = device.queue_mut(QueueIdx(2)).unwrap();
        (queue.size, queue.desc, queue.used) = (16, Iova(0x1000), Iova(0x2000));
        device.enable_queue(QueueIdx(2)).unwrap();
        device.write_status(15);
        device.set_needs_reset();
        let saved = device.saved();
        let mut next = model(|_| ());
        assert!(next.restore(&saved));
        assert_eq!(next.saved(), saved);
        assert_eq!(next.queue(QueueIdx(2)), device.queue(QueueIdx(2)));
        let fresh = model(|_| ()).saved();
        // A device of another shape, features that are not offered, a ring that is too long.
        assert!(!model(|s| s.num_request_queues = 1).restore(&saved));
        let mut bad = saved.clone();
        bad.accepted |= 1 << 34;
        let mut long = saved;
        long.queues[2].0 = 128;
        for wrong in [bad, long] {
            let mut next = model(|_| ());
            assert!(!next.restore(&wrong));
            assert_eq!(next.saved(), fresh);
        }
    }

    #[test]
    fn the_layout_of_the_queues_follows_the_negotiated_features() {
        let kinds = |device: &DeviceModel| -> Vec<_> {
            (0..6).map(|i| device.queue_kind(QueueIdx(i))).collect()
        };
        use QueueKind::{HighPriority as H, Notification as N, Request as R};
        let mut device = model(|s| s.notification_vq = true);
        assert_eq!(device.num_queues(), 5);
        let without = [Some(H), Some(R), Some(R), Some(R), None, None];
        assert_eq!(kinds(&device), without);
        device.write_features((Features::VERSION_1 | Features::FS_NOTIFICATION).bits());
        let with = [Some(H), Some(N), Some(R), Some(R), Some(R), None];
        assert_eq!(kinds(&device), with);
        let device = model(|_| ());
        assert_eq!(device.num_queues(), 4);
        assert_eq!(kinds(&device), without);
    }

    #[test]
    fn queue_settings_are_checked_and_fixed_once_enabled() {
        let mut device = model(|s| s.packed_vq = true);
        for size in [0, 24, 65, 128, u32::MAX] {
            assert!(device.check_size(QueueIdx(0), size).is_err(), "{size}");
        }
        device.write_features((Features::VERSION_1 | Features::RING_PACKED).bits());
        assert_eq!(device.check_size(QueueIdx(0), 24), Ok(24));
        device.queue_mut(QueueIdx(0)).unwrap().size = 24;
        device.enable_queue(QueueIdx(0)).unwrap();
        assert_eq!(
            device.queue_mut(QueueIdx(0)),
            Err(SettingError::QueueInUse { index: 0 })
        );
        assert!(matches!(
            device.queue_mut(QueueIdx(4)),
            Err(SettingError::NoQueue { .. })
        ));
        let config = device
            .queue_config(QueueIdx(0), QueueState::fresh(true))
            .unwrap();
        assert!(config.packed && !config.event_idx && !config.indirect);
        assert_eq!(config.size, 24);
        device.disable_queue(QueueIdx(0));
        assert!(device.queue_mut(QueueIdx(0)).is_ok());
    }
}
