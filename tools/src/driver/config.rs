//! The configuration space of a virtio-fs device, as the driver understands it.

use ferry_dataplane::virtio::spec::FsConfig;

use super::error::{DriverError, Result};

/// What a device says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceConfig {
    /// The name under which the file system is mounted.
    pub tag: String,
    /// Request queues, at least one.
    pub num_request_queues: u32,
    /// Smallest buffer of the notification queue; 0 without `VIRTIO_FS_F_NOTIFICATION`.
    pub notify_buf_size: u32,
}

impl DeviceConfig {
    pub(super) fn new(raw: &FsConfig) -> Result<DeviceConfig> {
        let end = raw.tag.iter().position(|&b| b == 0);
        let tag = &raw.tag[..end.unwrap_or(raw.tag.len())];
        if tag.is_empty() {
            return Err(DriverError::Unusable("it has no tag".into()));
        }
        if raw.num_request_queues.get() == 0 {
            return Err(DriverError::Unusable("it has no request queues".into()));
        }
        Ok(DeviceConfig {
            tag: String::from_utf8_lossy(tag).into_owned(),
            num_request_queues: raw.num_request_queues.get(),
            notify_buf_size: raw.notify_buf_size.get(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::DeviceConfig;
    use ferry_dataplane::virtio::spec::FsConfig;
    use zerocopy::FromZeros;

    #[test]
    fn a_tag_may_fill_its_field_but_not_be_empty() {
        let mut raw = FsConfig::new_zeroed();
        raw.num_request_queues = 1.into();
        assert!(DeviceConfig::new(&raw).is_err());
        raw.tag = [b'x'; 36];
        let config = DeviceConfig::new(&raw).expect("a valid space");
        assert_eq!(config.tag, "x".repeat(36));
        raw.tag[3] = 0;
        assert_eq!(DeviceConfig::new(&raw).expect("valid").tag, "xxx");
    }

    #[test]
    fn a_device_without_request_queues_is_refused() {
        let mut raw = FsConfig::new_zeroed();
        raw.tag[0] = b'x';
        assert!(DeviceConfig::new(&raw).is_err());
    }
}
