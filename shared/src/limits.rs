//! Every limit of the service, in one place. A number that bounds something a guest, a peer or an operator can ask for
//! lives here and nowhere else.

/// Request queues of one function: at least one.
pub const MIN_REQUEST_QUEUES: u32 = 1;
/// Request queues of one function: at most 254.
pub const MAX_REQUEST_QUEUES: u32 = 254;
/// Request queues of a function when the operator names none.
pub const DEFAULT_REQUEST_QUEUES: u32 = 31;
/// Virtqueues of one function: the request queues, the high-priority queue and the notification queue.
pub const MAX_QUEUES_PER_DEVICE: u32 = MAX_REQUEST_QUEUES + 2;
/// Virtqueues of the whole service, all functions together, every kind of queue counted.
pub const MAX_QUEUES_PER_SERVICE: u32 = 2_000;

/// Smallest virtqueue, in descriptors.
pub const MIN_QUEUE_SIZE: u32 = 8;
/// Largest virtqueue that an operator may configure, in descriptors.
pub const MAX_QUEUE_SIZE: u32 = 256;
/// Largest virtqueue that the queue code itself accepts (vhost-user VMMs choose the size).
pub const MAX_RING_SIZE: u32 = 1_024;
/// Virtqueue size when the operator names none.
pub const DEFAULT_QUEUE_SIZE: u32 = 64;

/// Descriptors of one request, indirect ones included.
pub const MAX_CHAIN: usize = 1_024;

/// Bytes of the tag in the device's configuration space (virtio 1.3, section 5.11.4).
pub const TAG_LEN: usize = 36;
/// Bytes of a tag on the DOCA transport.
pub const DOCA_TAG_LEN: usize = 20;
/// Bytes of a VUID.
pub const VUID_LEN: usize = 127;
/// Bytes of the name of a device, an fsdev or a manager.
pub const NAME_LEN: usize = 64;

/// Largest data buffer, and so the largest `max_xfer_size`: 255 KiB.
pub const MAX_DATA_BUFFER: u32 = 255 * 1024;
/// Default of `max_xfer_size` and `max_readahead`: 128 KiB.
pub const DEFAULT_XFER_SIZE: u32 = 128 * 1024;
/// Smallest `max_xfer_size`: one page, the least that the FUSE driver of Linux uses.
pub const MIN_XFER_SIZE: u32 = 4_096;

/// Most data of one READ or WRITE that is carried out at all, in bytes: 63 of the largest pages that a guest may have. No
/// driver that keeps to `max_pages` asks for more, and one that does would hold up the core's other devices.
pub const MAX_TRANSFER: u32 = 63 * 64 * 1024;
/// Most elements of one BATCH_FORGET.
pub const MAX_FORGETS: u32 = 64 * 1024;

/// Bytes of a request's headers, arguments and names that fit its slot; a longer request also takes a data buffer.
pub const SLOT_INPUT: usize = 4_096;
/// Bytes of a reply that fit the slot; a longer reply takes a data buffer.
pub const SLOT_OUTPUT: usize = 4_096;

/// Longest name of a directory entry, in bytes (`NAME_MAX`).
pub const NAME_MAX: usize = 255;
/// Longest symbolic link target, in bytes without the terminating NUL (`PATH_MAX` - 1).
pub const SYMLINK_MAX: usize = 4_095;
/// Longest value of an extended attribute, in bytes (`XATTR_SIZE_MAX`).
pub const XATTR_SIZE_MAX: usize = 65_536;
/// Longest list of extended attribute names, in bytes (`XATTR_LIST_MAX`).
pub const XATTR_LIST_MAX: usize = 65_536;

/// Hot-plug ports of the emulated switch.
pub const MAX_HOTPLUG_FUNCTIONS: u32 = 31;
/// How long a command waits for the guest to take a plugged function or to let go of one, in seconds. Less than the time
/// after which clients stop waiting for an answer.
pub const HOTPLUG_WAIT_SECS: u64 = 45;
/// Bytes of the path of a unix socket.
pub const SOCKET_PATH_LEN: usize = 107;
/// MSI-X vectors of a function.
pub const MAX_MSIX_VECTORS: u32 = 63;

/// Guest memory regions of one device.
pub const MAX_MEMORY_REGIONS: usize = 512;

/// Longest frame on a control ring, in bytes.
pub const MAX_FRAME: usize = 64 * 1024;
/// Default of fsdev option `fsdev_io_pool_size`, in objects.
pub const DEFAULT_IO_POOL_SIZE: u32 = 65_535;
/// Default of fsdev option `fsdev_io_cache_size`, in objects.
pub const DEFAULT_IO_CACHE_SIZE: u32 = 256;

/// Fewest request slots of all cores together.
pub const MIN_SLOTS: u32 = 64;
/// Fewest data buffers of all cores together.
pub const MIN_BUFFERS: u32 = 8;
/// Fewest data buffers of a core: one request may need two.
pub const MIN_BUFFERS_PER_CORE: u32 = 2;
/// Most request slots of a core: as many operations as a core's ring can have under way.
pub const MAX_SLOTS_PER_CORE: u32 = 16 * 1024;
/// Shortest time between two looks of the scheduler, in microseconds.
pub const MIN_SCHEDULER_PERIOD_US: u64 = 10_000;
/// Longest time between two looks of the scheduler, in microseconds.
pub const MAX_SCHEDULER_PERIOD_US: u64 = 3_600_000_000;
