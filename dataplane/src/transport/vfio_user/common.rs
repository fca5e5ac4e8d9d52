//! The layout of the common configuration structure (virtio 1.3, section 4.1.4.3): which bytes are which field.
//!
//! Drivers may access a field whole, 64-bit fields in halves; others may access anything. So registers are read as an image
//! of the whole structure, and a write of any shape becomes whole new values for the fields it touches.

use super::config::COMMON_LEN;

/// The structure as bytes.
pub(crate) type Image = [u8; COMMON_LEN as usize];

/// A field of the structure that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    DeviceFeatureSelect,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    DeviceStatus,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueDesc,
    QueueDriver,
    QueueDevice,
    QueueReset,
}

/// The writable fields: where they begin and their length.
const WRITABLE: [(Field, usize, usize); 13] = [
    (Field::DeviceFeatureSelect, 0x00, 4),
    (Field::DriverFeatureSelect, 0x08, 4),
    (Field::DriverFeature, 0x0c, 4),
    (Field::ConfigVector, 0x10, 2),
    (Field::DeviceStatus, 0x14, 1),
    (Field::QueueSelect, 0x16, 2),
    (Field::QueueSize, 0x18, 2),
    (Field::QueueVector, 0x1a, 2),
    (Field::QueueEnable, 0x1c, 2),
    (Field::QueueDesc, 0x20, 8),
    (Field::QueueDriver, 0x28, 8),
    (Field::QueueDevice, 0x30, 8),
    (Field::QueueReset, 0x3a, 2),
];

/// Values of all fields, as the driver reads them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Common {
    pub(crate) device_feature_select: u32,
    pub(crate) device_feature: u32,
    pub(crate) driver_feature_select: u32,
    pub(crate) driver_feature: u32,
    pub(crate) config_vector: u16,
    pub(crate) num_queues: u16,
    pub(crate) device_status: u8,
    pub(crate) config_generation: u8,
    pub(crate) queue_select: u16,
    pub(crate) queue_size: u16,
    pub(crate) queue_vector: u16,
    pub(crate) queue_enable: u16,
    pub(crate) queue_notify_off: u16,
    pub(crate) queue_desc: u64,
    pub(crate) queue_driver: u64,
    pub(crate) queue_device: u64,
    pub(crate) queue_notify_data: u16,
    pub(crate) queue_reset: u16,
}

impl Common {
    /// The structure as the driver sees it.
    pub(crate) fn image(&self) -> Image {
        let mut image = [0; COMMON_LEN as usize];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            if let Some(place) = image.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
            at += bytes.len();
        };
        put(&self.device_feature_select.to_le_bytes());
        put(&self.device_feature.to_le_bytes());
        put(&self.driver_feature_select.to_le_bytes());
        put(&self.driver_feature.to_le_bytes());
        put(&self.config_vector.to_le_bytes());
        put(&self.num_queues.to_le_bytes());
        put(&[self.device_status, self.config_generation]);
        put(&self.queue_select.to_le_bytes());
        put(&self.queue_size.to_le_bytes());
        put(&self.queue_vector.to_le_bytes());
        put(&self.queue_enable.to_le_bytes());
        put(&self.queue_notify_off.to_le_bytes());
        put(&self.queue_desc.to_le_bytes());
        put(&self.queue_driver.to_le_bytes());
        put(&self.queue_device.to_le_bytes());
        put(&self.queue_notify_data.to_le_bytes());
        put(&self.queue_reset.to_le_bytes());
        image
    }
}

/// The fields that a write of `data` at `offset` touches, in the order of their addresses, each with the whole value that
/// it gets; bytes of a field that are not written keep what `image` says.
pub(crate) fn written(
    image: &Image,
    offset: usize,
    data: &[u8],
) -> impl Iterator<Item = (Field, u64)> {
    let end = offset.saturating_add(data.len());
    let mut new = *image;
    for (n, byte) in data.iter().enumerate() {
        if let Some(place) = offset.checked_add(n).and_then(|at| new.get_mut(at)) {
            *place = *byte;
        }
    }
    WRITABLE.into_iter().filter_map(move |(field, at, len)| {
        if offset >= at + len || end <= at {
            return None;
        }
        let bytes = new.get(at..at + len)?;
        let value = bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b));
        Some((field, value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let image = Common {
            device_status: 0x11,
            queue_select: 0x2233,
            queue_desc: 0x0102_0304_0506_0708,
            queue_reset: 1,
            ..Common::default()
        }
        .image();
        assert_eq!(image[0x14], 0x11);
        assert_eq!(image[0x16..0x18], [0x33, 0x22]);
        assert_eq!(image[0x20..0x28], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(image[0x3a..0x3c], [1, 0]);
    }

    #[test]
    fn half_of_an_address_keeps_the_other_half() {
        let image = Common {
            queue_desc: 0x1111_1111_2222_2222,
            ..Common::default()
        }
        .image();
        let fields: Vec<_> = written(&image, 0x24, &[0x33; 4]).collect();
        assert_eq!(fields, [(Field::QueueDesc, 0x3333_3333_2222_2222)]);
    }

    #[test]
    fn a_write_reaches_every_field_it_touches_and_no_other() {
        let image = Common::default().image();
        let fields: Vec<_> = written(&image, 0x13, &[9, 8, 7, 6]).map(|f| f.0).collect();
        assert_eq!(fields, [Field::DeviceStatus, Field::QueueSelect]);
        assert_eq!(written(&image, 0x12, &[1, 2]).count(), 0);
        assert_eq!(written(&image, 64, &[1; 64]).count(), 0);
        assert_eq!(written(&image, usize::MAX, &[1; 64]).count(), 0);
        assert_eq!(written(&image, 0, &[1; 100]).count(), WRITABLE.len());
        assert_eq!(written(&image, 0x14, &[]).count(), 0);
    }
}
