//! The vfio-user protocol as bytes: headers, payloads, numbers (protocol version 0.1; numbers shared with `linux/vfio.h`).
//!
//! No logic. Everything is in the byte order of the host, and every field is a plain integer, so that any bytes make a
//! valid value. A message is a [`Header`], the payload of its command, and file descriptors as ancillary data.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! wire {
    ($($(#[$doc:meta])* struct $name:ident = $size:literal { $($(#[$fdoc:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
            pub struct $name {
                $($(#[$fdoc])* pub $field: $type,)*
            }
            const _: () = assert!(size_of::<$name>() == $size);
        )*
    };
}

/// Protocol version that is spoken here: major.
pub const VERSION_MAJOR: u16 = 0;
/// Protocol version that is spoken here: minor.
pub const VERSION_MINOR: u16 = 1;

/// Largest data of one region access, as offered in the version message.
pub const MAX_DATA_XFER: u32 = 32 * 1024;
/// File descriptors of one message that are taken, as offered in the version message.
pub const MAX_MSG_FDS: usize = 16;
/// Largest message that is taken: nothing that a client has reason to send is longer.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// The numbers of the commands.
pub mod command {
    /// Handshake, the first message.
    pub const VERSION: u16 = 1;
    /// Guest memory appears.
    pub const DMA_MAP: u16 = 2;
    /// Guest memory goes.
    pub const DMA_UNMAP: u16 = 3;
    /// What the device is.
    pub const DEVICE_GET_INFO: u16 = 4;
    /// What a region is.
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    /// Event descriptors that replace writes to a region.
    pub const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    /// What a kind of interrupt is.
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    /// Where interrupts go.
    pub const DEVICE_SET_IRQS: u16 = 8;
    /// Read from a region.
    pub const REGION_READ: u16 = 9;
    /// Write to a region.
    pub const REGION_WRITE: u16 = 10;
    /// Read guest memory, asked by the server.
    pub const DMA_READ: u16 = 11;
    /// Write guest memory, asked by the server.
    pub const DMA_WRITE: u16 = 12;
    /// Reset the device.
    pub const DEVICE_RESET: u16 = 13;
    /// Several writes to regions.
    pub const REGION_WRITE_MULTI: u16 = 15;
    /// Optional features of a device, such as migration.
    pub const DEVICE_FEATURE: u16 = 16;
    /// Read migration data.
    pub const MIG_DATA_READ: u16 = 17;
    /// Write migration data.
    pub const MIG_DATA_WRITE: u16 = 18;
}

/// Bits of [`Header::flags`].
pub mod header_flags {
    /// Mask of the message's type.
    pub const TYPE_MASK: u32 = 0xf;
    /// Type: a command.
    pub const COMMAND: u32 = 0;
    /// Type: a reply.
    pub const REPLY: u32 = 1;
    /// The sender of the command wants no reply.
    pub const NO_REPLY: u32 = 1 << 4;
    /// The command failed; [`super::Header::error`] says why.
    pub const ERROR: u32 = 1 << 5;
}

/// Bits of [`DmaMap::flags`].
pub mod dma_flags {
    /// The device may read.
    pub const READ: u32 = 1;
    /// The device may write.
    pub const WRITE: u32 = 2;
    /// In [`super::DmaUnmap::flags`]: return a bitmap of the pages written.
    pub const UNMAP_GET_DIRTY_BITMAP: u32 = 1;
    /// In [`super::DmaUnmap::flags`]: everything goes; address and size are 0.
    pub const UNMAP_ALL: u32 = 2;
}

/// Bits of [`DeviceInfo::flags`].
pub mod device_flags {
    /// `DEVICE_RESET` works.
    pub const RESET: u32 = 1;
    /// A PCI device.
    pub const PCI: u32 = 2;
}

/// Bits of [`RegionInfo::flags`].
pub mod region_flags {
    /// Can be read.
    pub const READ: u32 = 1;
    /// Can be written.
    pub const WRITE: u32 = 2;
    /// Can be mapped.
    pub const MMAP: u32 = 4;
    /// Capabilities follow the structure.
    pub const CAPS: u32 = 8;
}

/// Bits of [`IrqInfo::flags`].
pub mod irq_flags {
    /// Event descriptors can be set.
    pub const EVENTFD: u32 = 1;
    /// Can be masked.
    pub const MASKABLE: u32 = 2;
    /// Masks itself when it has fired.
    pub const AUTOMASKED: u32 = 4;
    /// The number in use cannot change while some are in use.
    pub const NORESIZE: u32 = 8;
}

/// Bits of [`IrqSet::flags`].
pub mod irq_set_flags {
    /// No data: acts on the whole range.
    pub const DATA_NONE: u32 = 1;
    /// One byte for each interrupt: acts where it is not 0.
    pub const DATA_BOOL: u32 = 2;
    /// File descriptors came with the message; none means: take away.
    pub const DATA_EVENTFD: u32 = 4;
    /// Mask of the kind of data.
    pub const DATA_MASK: u32 = 7;
    /// Mask the interrupt.
    pub const ACTION_MASK: u32 = 8;
    /// Unmask the interrupt.
    pub const ACTION_UNMASK: u32 = 16;
    /// Fire the interrupt, or with descriptors: say where it goes.
    pub const ACTION_TRIGGER: u32 = 32;
    /// Mask of the kind of action.
    pub const ACTION_KIND: u32 = 0x38;
}

/// The numbers of a PCI device's regions.
pub mod region {
    /// The first base address register; the others follow.
    pub const BAR0: u32 = 0;
    /// The third base address register.
    pub const BAR2: u32 = 2;
    /// The last base address register.
    pub const BAR5: u32 = 5;
    /// The expansion ROM.
    pub const ROM: u32 = 6;
    /// Configuration space.
    pub const CONFIG: u32 = 7;
    /// The ranges of a VGA.
    pub const VGA: u32 = 8;
    /// How many there are.
    pub const COUNT: u32 = 9;
}

/// The numbers of a PCI device's kinds of interrupts.
pub mod irq {
    /// The interrupt pin.
    pub const INTX: u32 = 0;
    /// MSI.
    pub const MSI: u32 = 1;
    /// MSI-X.
    pub const MSIX: u32 = 2;
    /// Uncorrectable errors.
    pub const ERR: u32 = 3;
    /// The device asks to be released.
    pub const REQ: u32 = 4;
    /// How many there are.
    pub const COUNT: u32 = 5;
}

wire! {
    /// Begins every message.
    struct Header = 16 {
        /// Chosen by the sender of the command; the reply repeats it.
        id: u16,
        /// One of [`command`].
        command: u16,
        /// Bytes of the message, this header included.
        size: u32,
        /// [`header_flags`].
        flags: u32,
        /// In a reply with the error flag: an `errno` value.
        error: u32,
    }

    /// `VERSION`, both ways; a JSON text of capabilities with a terminating NUL may follow.
    struct Version = 4 {
        /// Major version.
        major: u16,
        /// Minor version.
        minor: u16,
    }

    /// `DMA_MAP`; the reply has no payload.
    struct DmaMap = 32 {
        /// Bytes of this structure.
        argsz: u32,
        /// [`dma_flags`].
        flags: u32,
        /// Offset into the file that came with the message.
        offset: u64,
        /// First guest address.
        address: u64,
        /// Bytes.
        size: u64,
    }

    /// `DMA_UNMAP`, both ways.
    struct DmaUnmap = 24 {
        /// Most bytes of the reply's payload.
        argsz: u32,
        /// [`dma_flags`].
        flags: u32,
        /// First guest address.
        address: u64,
        /// Bytes.
        size: u64,
    }

    /// `DEVICE_GET_INFO`, both ways.
    struct DeviceInfo = 16 {
        /// Most bytes of the reply's payload; in the reply: bytes of this structure.
        argsz: u32,
        /// [`device_flags`].
        flags: u32,
        /// Number of regions.
        num_regions: u32,
        /// Number of kinds of interrupts.
        num_irqs: u32,
    }

    /// `DEVICE_GET_REGION_INFO`, both ways.
    struct RegionInfo = 32 {
        /// Most bytes of the reply's payload; in the reply: bytes of it and its capabilities.
        argsz: u32,
        /// [`region_flags`].
        flags: u32,
        /// Which [`region`].
        index: u32,
        /// Where the capabilities begin.
        cap_offset: u32,
        /// Bytes of the region.
        size: u64,
        /// Where the region begins in its file, if it can be mapped.
        offset: u64,
    }

    /// `DEVICE_GET_REGION_IO_FDS`, both ways; in the reply `count` of [`IoEventFd`] follow.
    struct RegionIoFds = 16 {
        /// Most bytes of the reply's payload; in the reply: bytes needed for all of it.
        argsz: u32,
        /// 0.
        flags: u32,
        /// Which [`region`].
        index: u32,
        /// Number of entries that follow.
        count: u32,
    }

    /// A part of a region whose writes can be replaced by signalling an event descriptor.
    struct IoEventFd = 40 {
        /// Where the part begins.
        offset: u64,
        /// Its length in bytes.
        size: u64,
        /// Which of the message's descriptors.
        fd_index: u32,
        /// 0: an event descriptor.
        kind: u32,
        /// Flags of `KVM_IOEVENTFD`.
        flags: u32,
        /// Padding.
        padding: u32,
        /// The value to match, if the flags ask for it.
        datamatch: u64,
    }

    /// `DEVICE_GET_IRQ_INFO`, both ways.
    struct IrqInfo = 16 {
        /// Most bytes of the reply's payload; in the reply: bytes of this structure.
        argsz: u32,
        /// [`irq_flags`].
        flags: u32,
        /// Which [`irq`].
        index: u32,
        /// How many there are of the kind.
        count: u32,
    }

    /// `DEVICE_SET_IRQS`; with `DATA_BOOL`, `count` bytes follow. The reply has no payload.
    struct IrqSet = 20 {
        /// Bytes of this structure and what follows.
        argsz: u32,
        /// [`irq_set_flags`].
        flags: u32,
        /// Which [`irq`].
        index: u32,
        /// The first interrupt of the kind.
        start: u32,
        /// How many.
        count: u32,
    }

    /// `REGION_READ` and `REGION_WRITE`, both ways; a write's command and a read's reply have `count` bytes behind it.
    struct RegionAccess = 16 {
        /// Offset into the region.
        offset: u64,
        /// Which [`region`].
        region: u32,
        /// Bytes to transfer.
        count: u32,
    }

    /// `DMA_READ` and `DMA_WRITE`, both ways; a write's command and a read's reply have `count` bytes behind it.
    struct DmaAccess = 16 {
        /// Guest address.
        address: u64,
        /// Bytes to transfer.
        count: u64,
    }

    /// `REGION_WRITE_MULTI`: so many [`MultiWrite`] follow. The reply has only this.
    struct MultiCount = 8 {
        /// Number of writes.
        count: u64,
    }

    /// One write of `REGION_WRITE_MULTI`.
    struct MultiWrite = 24 {
        /// Offset into the region.
        offset: u64,
        /// Which [`region`].
        region: u32,
        /// Bytes of `data` to write, at most 8.
        count: u32,
        /// The bytes.
        data: [u8; 8],
    }
}
