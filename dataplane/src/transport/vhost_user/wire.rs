//! What travels over a vhost-user socket: message numbers, header and payloads, for both ends.
//!
//! Layout only. Numbers are in the host's byte order, as the protocol says; whoever reads a payload checks its size first.

use bitflags::bitflags;
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Longest payload that either end accepts. The longest one defined (`GET_CONFIG`, memory tables) is far shorter.
pub const MAX_PAYLOAD: usize = 4096;
/// Most file descriptors of one message: one per region of `SET_MEM_TABLE`.
pub const MAX_FDS: usize = 8;
/// Most regions of one `SET_MEM_TABLE`.
pub const MAX_TABLE_REGIONS: usize = 8;
/// Largest area that `GET_CONFIG` and `SET_CONFIG` carry, in bytes.
pub const MAX_CONFIG: usize = 256;

/// The feature bit that says that protocol features exist (`VHOST_USER_F_PROTOCOL_FEATURES`).
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// The feature bit that asks the back end to log writes to guest memory (`VHOST_F_LOG_ALL`).
pub const F_LOG_ALL: u64 = 1 << 26;

macro_rules! requests {
    ($($(#[$doc:meta])* $name:ident = $value:literal;)*) => {
        /// Number of a message that the front end sends.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Request {
            $($(#[$doc])* $name = $value,)*
        }

        impl Request {
            /// The message with this number.
            pub fn from_raw(raw: u32) -> Option<Request> {
                match raw {
                    $($value => Some(Request::$name),)*
                    _ => None,
                }
            }
        }
    };
}

requests! {
    /// Which virtio features the back end has; reply: `u64`.
    GetFeatures = 1;
    /// Which of them are in use: `u64`.
    SetFeatures = 2;
    /// This connection is now the session's owner.
    SetOwner = 3;
    /// Deprecated: disables all rings.
    ResetOwner = 4;
    /// The guest's memory: [`MemTable`] and regions, one file descriptor each.
    SetMemTable = 5;
    /// Shared memory for dirty logging.
    SetLogBase = 6;
    /// Event counter for dirty logging.
    SetLogFd = 7;
    /// Size of a ring: [`VringState`].
    SetVringNum = 8;
    /// Addresses of a ring: [`VringAddr`].
    SetVringAddr = 9;
    /// Where a ring begins: [`VringState`].
    SetVringBase = 10;
    /// Stops a ring; reply: where it stands, [`VringState`].
    GetVringBase = 11;
    /// The ring's kick: `u64` of ring number and [`VRING_NOFD`], and a file descriptor.
    SetVringKick = 12;
    /// The ring's interrupt, in the same form.
    SetVringCall = 13;
    /// The ring's error event, in the same form.
    SetVringErr = 14;
    /// Which protocol features the back end has; reply: `u64`.
    GetProtocolFeatures = 15;
    /// Which of them are in use: `u64`.
    SetProtocolFeatures = 16;
    /// How many rings the back end has; reply: `u64`.
    GetQueueNum = 17;
    /// Switches a ring on or off: [`VringState`].
    SetVringEnable = 18;
    /// Announces the guest after a migration.
    SendRarp = 19;
    /// Network devices only.
    NetSetMtu = 20;
    /// Socket for messages of the back end.
    SetBackendReqFd = 21;
    /// IOTLB messages.
    IotlbMsg = 22;
    /// Byte order of the rings.
    SetVringEndian = 23;
    /// Reads the configuration space: [`ConfigHeader`] and as many bytes; the reply has the same form.
    GetConfig = 24;
    /// Writes the configuration space.
    SetConfig = 25;
    /// Crypto devices only.
    CreateCryptoSession = 26;
    /// Crypto devices only.
    CloseCryptoSession = 27;
    /// Post-copy migration.
    PostcopyAdvise = 28;
    /// Post-copy migration.
    PostcopyListen = 29;
    /// Post-copy migration.
    PostcopyEnd = 30;
    /// Asks for shared memory for the in-flight record: [`Inflight`]; the reply has the same form and a file descriptor.
    GetInflightFd = 31;
    /// Gives the in-flight record back to a new back end: [`Inflight`] and a file descriptor.
    SetInflightFd = 32;
    /// GPU devices only.
    GpuSetSocket = 33;
    /// Resets the device.
    ResetDevice = 34;
    /// In-band kick.
    VringKick = 35;
    /// How many memory slots the back end has; reply: `u64`.
    GetMaxMemSlots = 36;
    /// Adds a region: [`MemRegionMsg`] and a file descriptor.
    AddMemReg = 37;
    /// Removes a region: [`MemRegionMsg`].
    RemMemReg = 38;
    /// Device status: `u64`.
    SetStatus = 39;
    /// Device status; reply: `u64`.
    GetStatus = 40;
}

bitflags! {
    /// Protocol features.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ProtocolFeatures: u64 {
        /// More than one queue; `GET_QUEUE_NUM`.
        const MQ = 1 << 0;
        /// Dirty log in shared memory.
        const LOG_SHMFD = 1 << 1;
        /// RARP.
        const RARP = 1 << 2;
        /// Any message can be acknowledged.
        const REPLY_ACK = 1 << 3;
        /// `NET_SET_MTU`.
        const MTU = 1 << 4;
        /// `SET_BACKEND_REQ_FD`.
        const BACKEND_REQ = 1 << 5;
        /// Rings of either byte order.
        const CROSS_ENDIAN = 1 << 6;
        /// Crypto sessions.
        const CRYPTO_SESSION = 1 << 7;
        /// Post-copy migration.
        const PAGEFAULT = 1 << 8;
        /// `GET_CONFIG` and `SET_CONFIG`.
        const CONFIG = 1 << 9;
        /// The back end may send file descriptors.
        const BACKEND_SEND_FD = 1 << 10;
        /// Host notifiers.
        const HOST_NOTIFIER = 1 << 11;
        /// The in-flight record in shared memory.
        const INFLIGHT_SHMFD = 1 << 12;
        /// `RESET_DEVICE`.
        const RESET_DEVICE = 1 << 13;
        /// Kicks and interrupts as messages.
        const INBAND_NOTIFICATIONS = 1 << 14;
        /// `ADD_MEM_REG`, `REM_MEM_REG`, `GET_MAX_MEM_SLOTS`.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// `GET_STATUS` and `SET_STATUS`.
        const STATUS = 1 << 16;
        /// Memory mapped with `MAP_XEN` flags.
        const XEN_MMAP = 1 << 17;

        // Bits without a name here are kept, so that a check can refuse them.
        const _ = !0;
    }
}

/// Begins every message.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Header {
    /// Number of the message, a [`Request`].
    pub request: u32,
    /// Version in the two lowest bits, and flags.
    pub flags: u32,
    /// Bytes of payload that follow.
    pub size: u32,
}

/// Bits of [`Header::flags`] that hold the version.
pub const VERSION_MASK: u32 = 3;
/// The protocol's version.
pub const VERSION: u32 = 1;
/// Flag: the message is a reply.
pub const FLAG_REPLY: u32 = 1 << 2;
/// Flag: the sender wants an acknowledgement, a reply with a `u64` that is 0 on success.
pub const FLAG_NEED_REPLY: u32 = 1 << 3;

/// In the `u64` of the kick, call and error messages: the bits of the ring's number.
pub const VRING_INDEX_MASK: u64 = 0xff;
/// In the same place: no file descriptor comes with the message.
pub const VRING_NOFD: u64 = 1 << 8;

/// A ring and a number.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VringState {
    /// Ring number.
    pub index: u32,
    /// Its size, position, or whether it is enabled.
    pub num: u32,
}

/// Addresses of a ring, in the front end's address space.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Serialize,
    Deserialize,
)]
#[repr(C)]
pub struct VringAddr {
    /// Ring number.
    pub index: u32,
    /// Bit 0: writes to the used ring are logged.
    pub flags: u32,
    /// Descriptor table (split) or descriptor ring (packed).
    pub desc: u64,
    /// Used ring, or device event suppression.
    pub used: u64,
    /// Available ring, or driver event suppression.
    pub avail: u64,
    /// Guest address of the used ring, for logging.
    pub log: u64,
}

/// Begins a memory table; as many [`MemRegion`]s follow, and perhaps unused ones.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct MemTable {
    /// Number of regions.
    pub num_regions: u32,
    /// Not used.
    pub padding: u32,
}

/// A region of guest memory.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Serialize,
    Deserialize,
)]
#[repr(C)]
pub struct MemRegion {
    /// First guest-physical address.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Where the front end has it mapped.
    pub user_addr: u64,
    /// Where it begins in the file.
    pub mmap_offset: u64,
}

/// Payload of `ADD_MEM_REG` and `REM_MEM_REG`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct MemRegionMsg {
    /// Not used.
    pub padding: u64,
    /// The region.
    pub region: MemRegion,
}

/// Begins the payload of `GET_CONFIG` and `SET_CONFIG`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ConfigHeader {
    /// Offset in the configuration space.
    pub offset: u32,
    /// Number of bytes.
    pub size: u32,
    /// 0, or 1 for fields that may be written for live migration only.
    pub flags: u32,
}

/// Describes the in-flight record.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Serialize,
    Deserialize,
)]
#[repr(C)]
pub struct Inflight {
    /// Bytes of the record.
    pub mmap_size: u64,
    /// Where it begins in the file.
    pub mmap_offset: u64,
    /// Rings that it covers.
    pub num_queues: u16,
    /// Descriptors of each.
    pub queue_size: u16,
    /// Not used. Front ends send the struct with this padding, or leave these 4 bytes away.
    pub padding: u32,
}

/// Bytes of [`Inflight`] that every front end sends.
pub const INFLIGHT_MIN: usize = 20;

const _: () = {
    assert!(size_of::<Header>() == 12);
    assert!(size_of::<VringState>() == 8);
    assert!(size_of::<VringAddr>() == 40);
    assert!(size_of::<MemTable>() == 8);
    assert!(size_of::<MemRegion>() == 32);
    assert!(size_of::<MemRegionMsg>() == 40);
    assert!(size_of::<ConfigHeader>() == 12);
    assert!(size_of::<Inflight>() == 24);
};
