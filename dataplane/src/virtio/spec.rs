//! The numbers and structs of virtio 1.3 that a virtio-fs device uses. Layout only, no behaviour.

use bitflags::bitflags;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use ferry_shared::limits::TAG_LEN;

/// Device id of a file-system device (section 5.11.1).
pub const DEVICE_ID_FS: u16 = 26;
/// PCI vendor id of virtio devices (section 4.1.2).
pub const PCI_VENDOR_ID: u16 = 0x1af4;
/// PCI device id of a modern file-system device: 0x1040 plus the device id (section 4.1.2.1).
pub const PCI_DEVICE_ID_FS: u16 = 0x1040 + DEVICE_ID_FS;
/// Smallest PCI revision of a device that is not transitional (section 4.1.2.2).
pub const PCI_REVISION: u8 = 1;

bitflags! {
    /// Feature bits (sections 5.11.3 and 6).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Features: u64 {
        /// `VIRTIO_FS_F_NOTIFICATION`: the device has a notification queue.
        const FS_NOTIFICATION = 1 << 0;
        /// `VIRTIO_F_INDIRECT_DESC`.
        const INDIRECT_DESC = 1 << 28;
        /// `VIRTIO_F_EVENT_IDX`.
        const EVENT_IDX = 1 << 29;
        /// `VIRTIO_F_VERSION_1`.
        const VERSION_1 = 1 << 32;
        /// `VIRTIO_F_ACCESS_PLATFORM`: addresses go through the platform's IOMMU.
        const ACCESS_PLATFORM = 1 << 33;
        /// `VIRTIO_F_RING_PACKED`.
        const RING_PACKED = 1 << 34;
        /// `VIRTIO_F_IN_ORDER`.
        const IN_ORDER = 1 << 35;
        /// `VIRTIO_F_ORDER_PLATFORM`.
        const ORDER_PLATFORM = 1 << 36;
        /// `VIRTIO_F_NOTIFICATION_DATA`.
        const NOTIFICATION_DATA = 1 << 38;
        /// `VIRTIO_F_NOTIF_CONFIG_DATA`.
        const NOTIF_CONFIG_DATA = 1 << 39;
        /// `VIRTIO_F_RING_RESET`.
        const RING_RESET = 1 << 40;

        // Bits without a name here are kept, so that a check can refuse them.
        const _ = !0;
    }

    /// Device status (section 2.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Status: u8 {
        /// The driver has noticed the device.
        const ACKNOWLEDGE = 1;
        /// The driver knows how to drive it.
        const DRIVER = 2;
        /// The driver is set up.
        const DRIVER_OK = 4;
        /// Feature negotiation is complete.
        const FEATURES_OK = 8;
        /// The device has met an error that it cannot recover from.
        const NEEDS_RESET = 64;
        /// The driver has given up.
        const FAILED = 128;
    }

    /// Flags of a descriptor, split and packed (sections 2.7.5 and 2.8.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct DescFlags: u16 {
        /// The chain goes on.
        const NEXT = 1;
        /// The device writes to the buffer.
        const WRITE = 2;
        /// The buffer is a table of descriptors.
        const INDIRECT = 4;
        /// Packed: available, relative to the wrap counter.
        const AVAIL = 1 << 7;
        /// Packed: used, relative to the wrap counter.
        const USED = 1 << 15;

        // The driver may set what it likes in the others.
        const _ = !0;
    }
}

/// A descriptor of a split ring, or of an indirect table of one (section 2.7.5).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Desc {
    /// Guest address of the buffer.
    pub addr: U64,
    /// Its length in bytes.
    pub len: U32,
    /// [`DescFlags`].
    pub flags: U16,
    /// Index of the next descriptor of the chain.
    pub next: U16,
}

/// A descriptor of a packed ring, or of an indirect table of one (section 2.8.13).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PackedDesc {
    /// Guest address of the buffer.
    pub addr: U64,
    /// Its length in bytes.
    pub len: U32,
    /// Buffer id.
    pub id: U16,
    /// [`DescFlags`].
    pub flags: U16,
}

/// An entry of a split used ring (section 2.7.8).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct UsedElem {
    /// Index of the head of the chain.
    pub id: U32,
    /// Bytes that the device has written.
    pub len: U32,
}

/// Size of a descriptor of either kind.
pub const DESC_SIZE: usize = 16;

/// Split available ring, `flags`: the driver wants no interrupts (section 2.7.6).
pub const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// Split used ring, `flags`: the device wants no kicks (section 2.7.8).
pub const USED_F_NO_NOTIFY: u16 = 1;

/// Packed event suppression, `flags`: events are on (section 2.8.14).
pub const EVENT_FLAGS_ENABLE: u16 = 0;
/// Packed event suppression, `flags`: events are off.
pub const EVENT_FLAGS_DISABLE: u16 = 1;
/// Packed event suppression, `flags`: one event, when the descriptor at the given position changes hands.
pub const EVENT_FLAGS_DESC: u16 = 2;

/// The device's configuration space (section 5.11.4).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FsConfig {
    /// The tag, padded with NULs, not terminated when it fills the field.
    pub tag: [u8; TAG_LEN],
    /// Number of request queues.
    pub num_request_queues: U32,
    /// Smallest buffer for the notification queue, in bytes; only with `FS_NOTIFICATION`.
    pub notify_buf_size: U32,
}

const _: () = {
    assert!(size_of::<Desc>() == DESC_SIZE);
    assert!(size_of::<PackedDesc>() == DESC_SIZE);
    assert!(size_of::<UsedElem>() == 8);
    assert!(size_of::<FsConfig>() == 44);
    assert!(core::mem::offset_of!(Desc, flags) == 12);
    assert!(core::mem::offset_of!(PackedDesc, flags) == 14);
    assert!(core::mem::offset_of!(FsConfig, num_request_queues) == 36);
};
