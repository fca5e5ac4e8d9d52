//! What travels on the rings: commands from the control plane, completions and events from the data plane.
//!
//! One frame holds one postcard-encoded [`ToDataplane`] or [`ToControlplane`]. The control plane is less privileged than
//! the data plane, so the data plane checks every field again ([`DeviceSpec::check`], [`FsdevSpec::check`]) whatever
//! the control plane has checked before.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::errno::Errno;
use crate::export::ExportSpec;
use crate::limits;
pub use crate::tuning::{Balance, PciDevice, PoolSpec, Scheduler, Tuning};

/// One frame from the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToDataplane {
    /// Chosen by the control plane; the completion carries it back.
    pub seq: u64,
    /// What to do.
    pub command: Command,
}

/// One frame from the data plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToControlplane {
    /// The answer to the command with the same `seq`; every command gets exactly one.
    Completion {
        /// The command's `seq`.
        seq: u64,
        /// What it gave, or why it failed and changed nothing.
        result: Result<Reply, Failure>,
    },
    /// Something happened that nobody asked for.
    Event(Event),
}

/// What the control plane can ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Describe what exists, from item number `from` on; the reply holds as many items as fit one frame.
    Snapshot {
        /// The `next` of the previous page; 0 to begin.
        from: u32,
    },
    /// Create a file-system device.
    FsdevCreate(FsdevSpec),
    /// Delete a file-system device; refused with `EBUSY` while a device has it mounted.
    FsdevDelete {
        /// Name of the fsdev.
        name: String,
    },
    /// Create a function on a hot-plug port of a manager: the first free one, or the one that has this VUID.
    FunctionCreate {
        /// Name of the manager.
        manager: String,
        /// The function that an earlier data plane had.
        vuid: Option<String>,
    },
    /// Destroy a function on a hot-plug port that no device is started on.
    FunctionDestroy {
        /// Name of the manager.
        manager: String,
        /// VUID of the function.
        vuid: String,
    },
    /// Offer a started device on a hot-plug port to the host.
    DevicePlug {
        /// Name of the device.
        name: String,
    },
    /// Take a device on a hot-plug port away from the host, once the host lets go of it. May be repeated meanwhile.
    DeviceUnplug {
        /// Name of the device.
        name: String,
        /// Whether to ask the VMM for it on the device's own connection.
        ask: bool,
    },
    /// Start a device, or resume it when it is paused by [`Command::DeviceStop`]: a paused device whose specification
    /// has not changed goes on where it was, connection, FUSE session and rings kept; with another specification it
    /// is closed and opened anew.
    DeviceStart(DeviceSpec),
    /// Pause a running device: requests in flight are completed, new ones stay in the rings.
    DeviceStop {
        /// Name of the device.
        name: String,
    },
    /// Close a paused device: its socket goes away, its session ends.
    DeviceDestroy {
        /// Name of the device.
        name: String,
    },
    /// Log as told from now on.
    SetLog(LogSpec),
    /// Tell what has been tuned.
    Tuning,
    /// Make the pools of the cores anew; refused with `EBUSY` while there is a device.
    SetPools(PoolSpec),
    /// Spread queues over the cores in this way.
    SetScheduler(Scheduler),
    /// Serve a queue on one of these CPUs from now on. Answered when the queue has left its core, if it has to.
    PlaceThread {
        /// The queue's number among the threads.
        thread: u32,
        /// CPU numbers.
        cpus: Vec<u32>,
    },
    /// Trace at these points, one bit each.
    SetTrace {
        /// The points of [`crate::trace`].
        mask: u64,
    },
    /// Claim the cores' CPUs by lock files, or give them up.
    LockCpus {
        /// Whether they are claimed.
        lock: bool,
    },
    /// Count context switches of the cores, or stop that.
    CountContextSwitches {
        /// Whether they are counted.
        count: bool,
    },
    /// Describe the PCIe functions on which a device is started, from number `from` on.
    PciDevices {
        /// The `next` of the previous page; 0 to begin.
        from: u32,
    },
}

/// What is logged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogSpec {
    /// Of every component.
    pub level: LogLevel,
    /// Of the components in `flags`.
    pub flag_level: LogLevel,
    /// Components that are looked at more closely, by the names of [`LOG_FLAGS`].
    pub flags: Vec<String>,
    /// Whether lines begin with the time.
    pub timestamps: bool,
}

/// How much is logged, least first. The names are those of the RPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum LogLevel {
    /// What an operator must act on.
    Error,
    /// Misbehaviour of guests and peers, too.
    Warning,
    /// Lifecycle, too.
    Notice,
    /// Details of components with a flag, too.
    Info,
    /// Everything of components with a flag, too.
    Debug,
}

impl LogLevel {
    const NAMES: [(&'static str, LogLevel); 5] = [
        ("ERROR", LogLevel::Error),
        ("WARNING", LogLevel::Warning),
        ("NOTICE", LogLevel::Notice),
        ("INFO", LogLevel::Info),
        ("DEBUG", LogLevel::Debug),
    ];

    /// The name on the wire.
    pub fn name(self) -> &'static str {
        let found = LogLevel::NAMES
            .into_iter()
            .find(|(_, level)| *level == self);
        found.map_or("NOTICE", |(name, _)| name)
    }

    /// Looks a name up, in letters of either case.
    pub fn parse(name: &str) -> Option<LogLevel> {
        let mut levels = LogLevel::NAMES.into_iter();
        let found = levels.find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, level)| level)
    }
}

/// The components that have a flag of their own, and the modules that each consists of.
pub const LOG_FLAGS: &[(&str, &[&str])] = &[
    (
        "app_rpc",
        &["ferry_controlplane::server", "ferry_controlplane::app"],
    ),
    (
        "control",
        &["ferry_controlplane::dataplane", "ferry_dataplane::control"],
    ),
    ("fsdev", &["ferry_dataplane::fsdev"]),
    ("fsdev_aio", &["ferry_dataplane::fsdev::passthrough"]),
    (
        "fuse_dispatcher",
        &["ferry_dataplane::dispatch", "ferry_dataplane::fuse"],
    ),
    (
        "reactor",
        &["ferry_dataplane::reactor", "ferry_dataplane::cores"],
    ),
    ("vfio_user", &["ferry_dataplane::transport::vfio_user"]),
    ("vhost_user", &["ferry_dataplane::transport::vhost_user"]),
    (
        "virtio_fs",
        &[
            "ferry_dataplane::service",
            "ferry_dataplane::transport",
            "ferry_dataplane::virtio",
        ],
    ),
];

/// What a successful command gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done, nothing to say.
    Done,
    /// One page of [`Command::Snapshot`].
    Snapshot {
        /// The items of this page.
        items: Vec<Item>,
        /// Where the next page begins; `None` after the last one.
        next: Option<u32>,
    },
    /// The function of [`Command::FunctionCreate`].
    Function(Function),
    /// The answer to [`Command::Tuning`].
    Tuning(Tuning),
    /// One page of [`Command::PciDevices`].
    PciDevices {
        /// The functions of this page.
        devices: Vec<PciDevice>,
        /// Where the next page begins; `None` after the last one.
        next: Option<u32>,
    },
}

/// Why a command failed. A failed command has changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The error number.
    pub errno: Errno,
    /// What failed, on what, and what to do; without the text of the error number.
    pub detail: String,
}

impl Failure {
    /// A failure with its explanation.
    pub fn new(errno: Errno, detail: impl Into<String>) -> Failure {
        Failure {
            errno,
            detail: detail.into(),
        }
    }
}

/// One thing that exists in the data plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Item {
    /// Facts about the process.
    Service(Service),
    /// An emulation manager that the platform offers.
    Manager(Manager),
    /// A PCIe function of a manager.
    Function(Function),
    /// A file-system device.
    Fsdev(FsdevSpec),
    /// A started (running or paused) device.
    Device(DeviceSnapshot),
}

/// Facts about the data plane process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// The data plane's version, as in its Cargo.toml.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// CPU numbers that the cores are pinned to, in order.
    pub cores: Vec<u32>,
    /// Directory of the sockets, absolute.
    pub run_dir: String,
}

/// An emulation manager of the platform.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manager {
    /// Device name, for example `mlx5_0`.
    pub name: String,
    /// Number of hot-plug ports; 0 when the platform has no emulated PCIe switch.
    pub hotplug_ports: u32,
    /// How to reach the VMM that is the host, if the platform says so.
    pub host_link: Option<HostLink>,
}

/// The way to the VMM that a manager's functions are plugged into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostLink {
    /// QEMU's machine protocol.
    Qmp {
        /// Absolute path of the socket.
        socket: String,
        /// Ids of the root ports, one for each hot-plug port, in order.
        buses: Vec<String>,
    },
    /// The API of cloud-hypervisor.
    CloudHypervisor {
        /// Absolute path of the socket.
        socket: String,
    },
}

/// How far a function on a hot-plug port is plugged. A static function is always `PowerOn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PlugState {
    /// The host does not see it.
    PowerOff,
    /// It is offered to the host, whose driver has not taken it yet.
    PlugInProgress,
    /// The host's driver has taken it.
    PowerOn,
    /// The host was asked to let go of it, and has not yet done so.
    UnplugInProgress,
}

impl PlugState {
    /// The name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            PlugState::PowerOff => "POWER_OFF",
            PlugState::PlugInProgress => "PLUG_IN_PROGRESS",
            PlugState::PowerOn => "POWER_ON",
            PlugState::UnplugInProgress => "UNPLUG_IN_PROGRESS",
        }
    }
}

/// An emulated PCIe function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Name of its manager.
    pub manager: String,
    /// Vendor unique identifier.
    pub vuid: String,
    /// PCI address that the platform has for it, `dddd:bb:dd.f`; the host sees it there only while it is plugged.
    pub pci_address: String,
    /// The hot-plug port that it was created on, from 0; `None`: it is static.
    pub port: Option<u32>,
    /// How far it is plugged.
    pub plug: PlugState,
    /// Absolute path of its vfio-user socket; it exists while a device is started on the function.
    pub socket: String,
}

impl Function {
    /// Where the host sees it; empty if it does not.
    pub fn address(&self) -> &str {
        match self.plug {
            PlugState::PowerOff | PlugState::PlugInProgress => "",
            PlugState::PowerOn | PlugState::UnplugInProgress => &self.pci_address,
        }
    }
}

/// A device that has been started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSnapshot {
    /// What it was started with.
    pub spec: DeviceSpec,
    /// Whether it is paused.
    pub paused: bool,
    /// Whether a VMM or driver is connected to its socket.
    pub connected: bool,
    /// Whether a FUSE session is mounted.
    pub mounted: bool,
}

/// A file-system device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsdevSpec {
    /// Unique name.
    pub name: String,
    /// Which kind, and its parameters.
    pub kind: FsdevKind,
}

/// The kinds of file-system devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FsdevKind {
    /// A local directory.
    Aio(AioSpec),
    /// Answers everything at once and stores nothing; for measurement.
    Null,
    /// Hands everything on to another fsdev.
    Passthru {
        /// Name of the other one.
        base: String,
    },
}

/// Parameters of an `aio` fsdev.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AioSpec {
    /// The exported directory, absolute.
    pub root_path: String,
    /// Whether extended attributes are served.
    pub enable_xattr: bool,
    /// Whether the guest may cache writes.
    pub enable_writeback_cache: bool,
    /// Largest data of one READ or WRITE, in bytes.
    pub max_xfer_size: u32,
    /// Largest read-ahead of the guest, in bytes.
    pub max_readahead: u32,
    /// Complete READ and WRITE without doing them (measurement only).
    pub skip_rw: bool,
    /// How calls that may block are made.
    pub metadata: Placement,
    /// What the guest may cache, write and name.
    pub export: ExportSpec,
}

/// Where calls are made that may block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Placement {
    /// On the core; fastest for file systems in memory.
    Inline,
    /// On the core's helper thread; for file systems that can stall, such as network ones.
    Offload,
    /// On the core for calls that the kernel usually answers from memory, on the helper thread for the others.
    #[default]
    Auto,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// Unique name.
    pub name: String,
    /// Where it appears.
    pub attach: Attach,
    /// The tag that the guest mounts by.
    pub tag: String,
    /// Number of request queues.
    pub num_request_queues: u32,
    /// Largest size of every queue, in descriptors.
    pub queue_size: u32,
    /// Name of the fsdev behind it; it need not exist until the guest mounts.
    pub fsdev: String,
    /// Whether packed rings are offered.
    pub packed_vq: bool,
    /// Whether the notification queue is offered.
    pub notification_vq: bool,
    /// The guest's architecture, for the flags of open(2).
    pub driver_platform: Platform,
}

/// Where a device appears.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attach {
    /// On an emulated PCIe function.
    Doca {
        /// Name of the manager.
        manager: String,
        /// VUID of the function.
        vuid: String,
    },
    /// Behind the vhost-user socket `vhost/<device>.sock` of the run directory.
    VhostUser,
}

/// The architecture of the guest's driver, which decides the values of four flags of open(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Platform {
    /// The same as the data plane's.
    #[default]
    Native,
    /// 32-bit x86.
    X86,
    /// 64-bit x86.
    X86_64,
    /// 32-bit Arm.
    Aarch32,
    /// 64-bit Arm.
    Aarch64,
}

/// What the data plane reports by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A VMM or driver has connected to the device's socket, or left it.
    Connected {
        /// Name of the device.
        device: String,
        /// Whether it is there now.
        connected: bool,
    },
    /// The guest has mounted or unmounted the device.
    Mounted {
        /// Name of the device.
        device: String,
        /// Whether it is mounted now.
        mounted: bool,
    },
    /// A function on a hot-plug port has been plugged or unplugged, or is on the way there.
    Plug {
        /// Name of its manager.
        manager: String,
        /// Its VUID.
        vuid: String,
        /// How far it is now.
        state: PlugState,
    },
}

/// Checks the name of a device, an fsdev or a manager.
pub fn check_name(what: &str, name: &str) -> Result<(), Failure> {
    let good = |b: u8| b.is_ascii_graphic() && b != b'/';
    if name.is_empty()
        || name.len() > limits::NAME_LEN
        || !name.bytes().all(good)
        || name.starts_with('.')
    {
        return Err(Failure::new(
            Errno::EINVAL,
            format!(
                "{what} name {name:?} must be 1 to {} printable characters without blanks and '/', and not begin with '.'",
                limits::NAME_LEN
            ),
        ));
    }
    Ok(())
}

fn check_range(what: &str, value: u32, low: u32, high: u32) -> Result<(), Failure> {
    if value < low || value > high {
        return Err(Failure::new(
            Errno::EINVAL,
            format!("{what} {value} is outside {low} to {high}"),
        ));
    }
    Ok(())
}

impl FsdevSpec {
    /// Checks everything that can be checked without looking at the file system.
    pub fn check(&self) -> Result<(), Failure> {
        check_name("fsdev", &self.name)?;
        match &self.kind {
            FsdevKind::Null => Ok(()),
            FsdevKind::Passthru { base } => check_name("base fsdev", base),
            FsdevKind::Aio(aio) => {
                if !aio.root_path.starts_with('/') || aio.root_path.contains('\0') {
                    return Err(Failure::new(
                        Errno::EINVAL,
                        format!(
                            "root_path {:?} of fsdev {} must be an absolute path",
                            aio.root_path, self.name
                        ),
                    ));
                }
                check_range(
                    "max_xfer_size",
                    aio.max_xfer_size,
                    limits::MIN_XFER_SIZE,
                    limits::MAX_DATA_BUFFER,
                )?;
                let export = &aio.export;
                export.check(aio.enable_writeback_cache, aio.enable_xattr)
            }
        }
    }
}

impl DeviceSpec {
    /// Virtqueues that the device takes from the service's total: requests, high priority, notification.
    pub fn queues(&self) -> u32 {
        self.num_request_queues
            .saturating_add(1)
            .saturating_add(u32::from(self.notification_vq))
    }

    /// Checks everything that does not depend on other objects.
    pub fn check(&self) -> Result<(), Failure> {
        check_name("device", &self.name)?;
        check_range(
            "num_request_queues",
            self.num_request_queues,
            limits::MIN_REQUEST_QUEUES,
            limits::MAX_REQUEST_QUEUES,
        )?;
        check_queue_size(self.queue_size)?;
        let tag_max = match &self.attach {
            Attach::Doca { vuid, .. } => {
                if vuid.is_empty() || vuid.len() > limits::VUID_LEN {
                    return Err(Failure::new(
                        Errno::EINVAL,
                        format!(
                            "vuid {vuid:?} of device {} must be 1 to {} bytes",
                            self.name,
                            limits::VUID_LEN
                        ),
                    ));
                }
                limits::DOCA_TAG_LEN
            }
            Attach::VhostUser => limits::TAG_LEN,
        };
        check_tag(&self.tag, tag_max)
    }
}

/// Checks a queue size: a power of two (split rings need one) within the limits.
pub fn check_queue_size(size: u32) -> Result<(), Failure> {
    check_range(
        "queue_size",
        size,
        limits::MIN_QUEUE_SIZE,
        limits::MAX_QUEUE_SIZE,
    )?;
    if !size.is_power_of_two() {
        return Err(Failure::new(
            Errno::EINVAL,
            format!("queue_size {size} is not a power of two"),
        ));
    }
    Ok(())
}

/// Checks a tag against the limit of its transport, in bytes.
pub fn check_tag(tag: &str, max: usize) -> Result<(), Failure> {
    if tag.is_empty() || tag.len() > max || tag.contains('\0') {
        return Err(Failure::new(
            Errno::EINVAL,
            format!("tag {tag:?} must be 1 to {max} bytes without NUL"),
        ));
    }
    Ok(())
}
