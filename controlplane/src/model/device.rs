//! A device: its properties, its state, and the checks that need nothing but itself.

use ferry_shared::errno::Errno;
use ferry_shared::limits;
use ferry_shared::msg;
use ferry_shared::msg::Attach;
use ferry_shared::msg::DeviceSpec;
use ferry_shared::msg::Failure;
use ferry_shared::msg::Platform;

use super::TransportKind;
use super::refuse;

/// A virtio-fs device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Unique name.
    pub name: String,
    /// Its transport.
    pub transport: TransportKind,
    /// The tag, once given.
    pub tag: Option<String>,
    /// The fsdev, once given; it need not exist.
    pub fsdev: Option<String>,
    /// Number of request queues.
    pub num_request_queues: u32,
    /// Largest size of every queue.
    pub queue_size: u32,
    /// Whether packed rings are offered.
    pub packed_vq: bool,
    /// Whether the notification queue is offered.
    pub notification_vq: bool,
    /// Architecture of the guest's driver.
    pub driver_platform: Platform,
    /// Manager of the function it is to appear on.
    pub manager: Option<String>,
    /// VUID of that function.
    pub vuid: Option<String>,
    /// What the data plane has of it.
    pub live: Option<Live>,
    /// Whether it is meant to run: it was started and not stopped since. A device that could not be started again after
    /// a restart stays wanted.
    pub wanted: bool,
    pub(super) pending: Option<Pending>,
}

/// The data plane's side of a device that has been started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Live {
    /// What it was started with.
    pub spec: DeviceSpec,
    /// Whether it is paused.
    pub paused: bool,
    /// Whether a driver is connected.
    pub connected: bool,
    /// Whether the guest has it mounted.
    pub mounted: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Pending {
    Starting(Attach),
    Stopping,
    Destroying,
}

/// What `virtio_fs_get_devices` calls the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// Not started.
    Idle,
    /// Serving.
    Running,
    /// Started and stopped again: the session and the rings are kept.
    Stopped,
}

impl DeviceState {
    /// The name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            DeviceState::Idle => "idle",
            DeviceState::Running => "running",
            DeviceState::Stopped => "stopped",
        }
    }
}

/// Properties to set; `None` leaves them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The tag.
    pub tag: Option<String>,
    /// The fsdev.
    pub fsdev: Option<String>,
    /// Number of request queues.
    pub num_request_queues: Option<u32>,
    /// Largest size of every queue.
    pub queue_size: Option<u32>,
    /// Whether packed rings are offered.
    pub packed_vq: Option<bool>,
    /// Whether the notification queue is offered.
    pub notification_vq: Option<bool>,
    /// Architecture of the guest's driver: `native`, `x86`, `x86_64`, `aarch32` or `aarch64`.
    pub driver_platform: Option<String>,
}

/// The names of the architectures.
pub(crate) const PLATFORMS: [(&str, Platform); 5] = [
    ("native", Platform::Native),
    ("x86", Platform::X86),
    ("x86_64", Platform::X86_64),
    ("aarch32", Platform::Aarch32),
    ("aarch64", Platform::Aarch64),
];

pub(super) fn parse_platform(name: &str) -> Result<Platform, Failure> {
    PLATFORMS
        .into_iter()
        .find(|(known, _)| *known == name)
        .map(|(_, platform)| platform)
        .ok_or_else(|| {
            let known = PLATFORMS.map(|(known, _)| known).join(", ");
            Failure::new(
                Errno::EINVAL,
                format!("driver_platform {name:?} is not one of {known}"),
            )
        })
}

fn attach_on(manager: &str, vuid: &str, attach: &Attach) -> bool {
    matches!(attach, Attach::Doca { manager: m, vuid: v } if m == manager && v == vuid)
}

impl Device {
    pub(super) fn new(name: &str, transport: TransportKind) -> Device {
        Device {
            name: name.to_owned(),
            transport,
            tag: None,
            fsdev: None,
            num_request_queues: limits::DEFAULT_REQUEST_QUEUES,
            queue_size: limits::DEFAULT_QUEUE_SIZE,
            packed_vq: false,
            notification_vq: false,
            driver_platform: Platform::Native,
            manager: None,
            vuid: None,
            live: None,
            wanted: false,
            pending: None,
        }
    }

    /// A device as the data plane describes it.
    pub(super) fn adopted(snapshot: msg::DeviceSnapshot) -> Device {
        let transport = match snapshot.spec.attach {
            Attach::Doca { .. } => TransportKind::Doca,
            Attach::VhostUser => TransportKind::VhostUser,
        };
        let mut device = Device::new(&snapshot.spec.name, transport);
        device.take_properties(&snapshot.spec);
        device.set_live(snapshot);
        device
    }

    /// Takes the data plane's description over. Properties of a stopped device may have been changed since it was
    /// started, so they stay; a running device has those that it was started with.
    pub(super) fn set_live(&mut self, snapshot: msg::DeviceSnapshot) {
        let msg::DeviceSnapshot {
            spec,
            paused,
            connected,
            mounted,
        } = snapshot;
        if !paused {
            self.take_properties(&spec);
        }
        self.wanted = !paused;
        self.live = Some(Live {
            spec,
            paused,
            connected,
            mounted,
        });
    }

    fn take_properties(&mut self, spec: &DeviceSpec) {
        if let Attach::Doca { manager, vuid } = &spec.attach {
            self.manager = Some(manager.clone());
            self.vuid = Some(vuid.clone());
        }
        self.tag = Some(spec.tag.clone());
        self.fsdev = Some(spec.fsdev.clone());
        self.num_request_queues = spec.num_request_queues;
        self.queue_size = spec.queue_size;
        self.packed_vq = spec.packed_vq;
        self.notification_vq = spec.notification_vq;
        self.driver_platform = spec.driver_platform;
    }

    /// Its state.
    pub fn state(&self) -> DeviceState {
        match &self.live {
            None => DeviceState::Idle,
            Some(live) if live.paused => DeviceState::Stopped,
            Some(_) => DeviceState::Running,
        }
    }

    /// The name of its guest architecture.
    pub fn platform_name(&self) -> &'static str {
        PLATFORMS
            .into_iter()
            .find(|(_, platform)| *platform == self.driver_platform)
            .map_or("native", |(name, _)| name)
    }

    /// Virtqueues that it takes from the service's total, every kind counted.
    pub fn queues(&self) -> u32 {
        self.num_request_queues
            .saturating_add(1)
            .saturating_add(u32::from(self.notification_vq))
    }

    pub(super) fn uses_manager(&self, name: &str) -> bool {
        let live = match &self.live {
            Some(Live {
                spec:
                    DeviceSpec {
                        attach: Attach::Doca { manager, .. },
                        ..
                    },
                ..
            }) => manager == name,
            Some(_) | None => false,
        };
        live || self.manager.as_deref() == Some(name)
    }

    /// Whether it holds the function: running, stopped, or on the way there.
    pub(super) fn occupies(&self, manager: &str, vuid: &str) -> bool {
        let live = self
            .live
            .as_ref()
            .is_some_and(|live| attach_on(manager, vuid, &live.spec.attach));
        let starting = matches!(&self.pending, Some(Pending::Starting(attach)) if attach_on(manager, vuid, attach));
        live || starting
    }

    pub(super) fn check_not_pending(&self) -> Result<(), Failure> {
        let doing = match &self.pending {
            None => return Ok(()),
            Some(Pending::Starting(_)) => "started",
            Some(Pending::Stopping) => "stopped",
            Some(Pending::Destroying) => "destroyed",
        };
        refuse(
            Errno::EALREADY,
            format!(
                "device {} is being {doing}; wait for that request",
                self.name
            ),
        )
    }

    pub(super) fn check_configurable(&self) -> Result<(), Failure> {
        self.check_not_pending()?;
        if self.state() == DeviceState::Running {
            return refuse(
                Errno::EBUSY,
                format!(
                    "device {0} is started; stop it with virtio_fs_device_stop --dev-name {0}",
                    self.name
                ),
            );
        }
        Ok(())
    }

    pub(super) fn apply(&mut self, changes: Changes) -> Result<(), Failure> {
        let Changes {
            tag,
            fsdev,
            num_request_queues,
            queue_size,
            packed_vq,
            notification_vq,
            driver_platform,
        } = changes;
        if let Some(tag) = tag {
            let max = match self.transport {
                TransportKind::Doca => limits::DOCA_TAG_LEN,
                TransportKind::VhostUser => limits::TAG_LEN,
            };
            msg::check_tag(&tag, max)?;
            self.tag = Some(tag);
        }
        if let Some(fsdev) = fsdev {
            msg::check_name("fsdev", &fsdev)?;
            self.fsdev = Some(fsdev);
        }
        if let Some(number) = num_request_queues {
            let (least, most) = (limits::MIN_REQUEST_QUEUES, limits::MAX_REQUEST_QUEUES);
            if !(least..=most).contains(&number) {
                let detail = format!(
                    "num_request_queues {number} of device {} is outside {least} to {most}",
                    self.name
                );
                return refuse(Errno::EINVAL, detail);
            }
            self.num_request_queues = number;
        }
        if let Some(size) = queue_size {
            msg::check_queue_size(size)?;
            self.queue_size = size;
        }
        self.packed_vq = packed_vq.unwrap_or(self.packed_vq);
        self.notification_vq = notification_vq.unwrap_or(self.notification_vq);
        if let Some(platform) = driver_platform {
            self.driver_platform = parse_platform(&platform)?;
        }
        Ok(())
    }
}
