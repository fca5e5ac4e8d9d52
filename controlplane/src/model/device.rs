//! Devices: idle, running, stopped, and which function each occupies.

use ferry_shared::errno::Errno;
use ferry_shared::limits;
use ferry_shared::msg;
use ferry_shared::msg::Attach;
use ferry_shared::msg::Command;
use ferry_shared::msg::DeviceSpec;
use ferry_shared::msg::Failure;
use ferry_shared::msg::Platform;

use super::Effect;
use super::Model;
use super::Step;
use super::Ticket;
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

fn parse_platform(name: &str) -> Result<Platform, Failure> {
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
    fn new(name: &str, transport: TransportKind) -> Device {
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
        device.set_live(snapshot);
        device
    }

    /// Takes the data plane's description over.
    pub(super) fn set_live(&mut self, snapshot: msg::DeviceSnapshot) {
        let msg::DeviceSnapshot {
            spec,
            paused,
            connected,
            mounted,
        } = snapshot;
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
        self.live = Some(Live {
            spec,
            paused,
            connected,
            mounted,
        });
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

    fn check_not_pending(&self) -> Result<(), Failure> {
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

    fn check_configurable(&self) -> Result<(), Failure> {
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

    fn apply(&mut self, changes: Changes) -> Result<(), Failure> {
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

impl Model {
    /// Finds a device by name.
    pub fn device(&self, name: &str) -> Result<&Device, Failure> {
        self.devices
            .iter()
            .find(|device| device.name == name)
            .ok_or_else(|| {
                Failure::new(
                    Errno::ENODEV,
                    format!("there is no device {name}; virtio_fs_get_devices lists the devices"),
                )
            })
    }

    pub(super) fn device_mut(&mut self, name: &str) -> Option<&mut Device> {
        self.devices.iter_mut().find(|device| device.name == name)
    }

    fn replace(&mut self, device: Device) {
        if let Some(old) = self.device_mut(&device.name) {
            *old = device;
        }
    }

    fn check_total(&self, candidate: &Device) -> Result<(), Failure> {
        let others: u32 = self
            .devices
            .iter()
            .filter(|device| device.name != candidate.name)
            .fold(0, |sum, device| sum.saturating_add(device.queues()));
        let most = limits::MAX_QUEUES_PER_SERVICE;
        if others.saturating_add(candidate.queues()) > most {
            return refuse(
                Errno::ENOSPC,
                format!(
                    "device {} needs {} virtqueues and the other devices have {others} of {most}; \
                     lower num_request_queues or destroy a device",
                    candidate.name,
                    candidate.queues()
                ),
            );
        }
        Ok(())
    }

    /// Creates a device on a started transport.
    pub fn device_create(
        &mut self,
        transport: &str,
        name: &str,
        changes: Changes,
    ) -> Result<(), Failure> {
        let transport = self.transport(transport)?;
        msg::check_name("device", name)?;
        if self.device(name).is_ok() {
            return refuse(Errno::EEXIST, format!("device {name} already exists"));
        }
        if !transport.started {
            return refuse(
                Errno::EINVAL,
                format!(
                    "transport {0} is not started; start it with virtio_fs_transport_start -t {0}",
                    transport.kind.name()
                ),
            );
        }
        let mut device = Device::new(name, transport.kind);
        device.apply(changes)?;
        self.check_total(&device)?;
        self.devices.push(device);
        Ok(())
    }

    /// Changes properties of a device that is not running.
    pub fn device_modify(&mut self, name: &str, changes: Changes) -> Result<(), Failure> {
        let mut device = self.device(name)?.clone();
        device.check_configurable()?;
        device.apply(changes)?;
        self.check_total(&device)?;
        self.replace(device);
        Ok(())
    }

    /// Sets the function of a device that is not running. Neither name is looked up before the start; a manager that
    /// the platform offers is created.
    pub fn doca_device_modify(
        &mut self,
        name: &str,
        manager: Option<String>,
        vuid: Option<String>,
    ) -> Result<(), Failure> {
        let mut device = self.device(name)?.clone();
        if device.transport != TransportKind::Doca {
            let transport = device.transport.name();
            let detail = format!(
                "device {name} belongs to transport {transport}, which has no managers or functions"
            );
            return refuse(Errno::EINVAL, detail);
        }
        device.check_configurable()?;
        if let Some(manager) = manager {
            msg::check_name("manager", &manager)?;
            device.manager = Some(manager);
        }
        if let Some(vuid) = vuid {
            if vuid.is_empty() || vuid.len() > limits::VUID_LEN {
                let detail = format!(
                    "vuid {vuid:?} of device {name} must be 1 to {} bytes",
                    limits::VUID_LEN
                );
                return refuse(Errno::EINVAL, detail);
            }
            device.vuid = Some(vuid);
        }
        let manager = device.manager.clone();
        self.replace(device);
        if let Some(manager) = manager {
            self.ensure_manager(&manager);
        }
        Ok(())
    }

    fn attach(&self, device: &Device) -> Result<Attach, Failure> {
        if device.transport == TransportKind::VhostUser {
            return Ok(Attach::VhostUser);
        }
        let (Some(manager), Some(vuid)) = (&device.manager, &device.vuid) else {
            let lacking = if device.manager.is_none() {
                "manager"
            } else {
                "vuid"
            };
            return refuse(
                Errno::EINVAL,
                format!(
                    "device {0} has no {lacking}; set it with virtio_fs_doca_device_modify --dev-name {0} --manager M --vuid V",
                    device.name
                ),
            );
        };
        if !self.has_manager(manager) {
            self.offered_manager(manager)?;
        }
        if self.function(manager, vuid).is_none() {
            return refuse(
                Errno::ENODEV,
                format!(
                    "manager {manager} has no function {vuid}; virtio_fs_doca_get_functions lists its functions"
                ),
            );
        }
        if let Some(owner) = self
            .device_on(manager, vuid)
            .filter(|owner| owner.name != device.name)
        {
            return refuse(
                Errno::EBUSY,
                format!(
                    "function {vuid} is already used by device {}; destroy that device or choose another function",
                    owner.name
                ),
            );
        }
        Ok(Attach::Doca {
            manager: manager.clone(),
            vuid: vuid.clone(),
        })
    }

    fn start_spec(&self, device: &Device) -> Result<DeviceSpec, Failure> {
        let (Some(tag), Some(fsdev)) = (&device.tag, &device.fsdev) else {
            let lacking = if device.tag.is_none() { "tag" } else { "fsdev" };
            return refuse(
                Errno::EINVAL,
                format!(
                    "device {0} has no {lacking}; set it with virtio_fs_device_modify --dev-name {0} --{lacking} ...",
                    device.name
                ),
            );
        };
        let spec = DeviceSpec {
            name: device.name.clone(),
            attach: self.attach(device)?,
            tag: tag.clone(),
            num_request_queues: device.num_request_queues,
            queue_size: device.queue_size,
            fsdev: fsdev.clone(),
            packed_vq: device.packed_vq,
            notification_vq: device.notification_vq,
            driver_platform: device.driver_platform,
        };
        spec.check()?;
        Ok(spec)
    }

    /// Begins to start a device, or to resume a stopped one.
    pub fn device_start(&mut self, name: &str) -> Result<Step, Failure> {
        let device = self.device(name)?;
        device.check_not_pending()?;
        if device.state() == DeviceState::Running {
            return refuse(
                Errno::EALREADY,
                format!("device {name} has already been started"),
            );
        }
        let spec = self.start_spec(device)?;
        if let Attach::Doca { manager, .. } = &spec.attach {
            self.ensure_manager(manager);
        }
        if let Some(device) = self.device_mut(name) {
            device.pending = Some(Pending::Starting(spec.attach.clone()));
        }
        Ok(Step::Send(Ticket {
            command: Command::DeviceStart(spec.clone()),
            effect: Effect::Start(spec),
        }))
    }

    /// Begins to stop a running device.
    pub fn device_stop(&mut self, name: &str) -> Result<Step, Failure> {
        let device = self.device(name)?;
        device.check_not_pending()?;
        if device.state() != DeviceState::Running {
            return refuse(
                Errno::EALREADY,
                format!(
                    "device {name} is not started, its state is {}",
                    device.state().name()
                ),
            );
        }
        if let Some(device) = self.device_mut(name) {
            device.pending = Some(Pending::Stopping);
        }
        let command = Command::DeviceStop {
            name: name.to_owned(),
        };
        Ok(Step::Send(Ticket {
            command,
            effect: Effect::Stop(name.to_owned()),
        }))
    }

    /// Begins to destroy a device that is not running.
    pub fn device_destroy(&mut self, name: &str) -> Result<Step, Failure> {
        let device = self.device(name)?;
        device.check_configurable()?;
        if device.live.is_none() {
            self.devices.retain(|device| device.name != name);
            return Ok(Step::Done);
        }
        if let Some(device) = self.device_mut(name) {
            device.pending = Some(Pending::Destroying);
        }
        let command = Command::DeviceDestroy {
            name: name.to_owned(),
        };
        Ok(Step::Send(Ticket {
            command,
            effect: Effect::Destroy(name.to_owned()),
        }))
    }

    pub(super) fn device_started(&mut self, spec: DeviceSpec, done: bool) {
        let Some(device) = self.device_mut(&spec.name) else {
            return;
        };
        device.pending = None;
        if !done {
            return;
        }
        match &mut device.live {
            Some(live) if live.spec == spec => live.paused = false,
            live => {
                *live = Some(Live {
                    spec,
                    paused: false,
                    connected: false,
                    mounted: false,
                })
            }
        }
    }

    pub(super) fn device_stopped(&mut self, name: &str, done: bool) {
        let Some(device) = self.device_mut(name) else {
            return;
        };
        device.pending = None;
        if let Some(live) = device.live.as_mut().filter(|_| done) {
            live.paused = true;
        }
    }

    pub(super) fn device_destroyed(&mut self, name: &str, done: bool) {
        if done {
            self.devices.retain(|device| device.name != name);
        } else if let Some(device) = self.device_mut(name) {
            device.pending = None;
        }
    }

    /// Plugs or unplugs a device.
    pub fn device_hotplug(&self, name: &str) -> Result<(), Failure> {
        let device = self.device(name)?;
        let manager = match &device.live {
            Some(Live {
                spec:
                    DeviceSpec {
                        attach: Attach::Doca { manager, .. },
                        ..
                    },
                paused: false,
                ..
            }) => manager,
            Some(_) | None if device.transport == TransportKind::VhostUser => {
                return refuse(
                    Errno::EINVAL,
                    format!(
                        "device {name} belongs to transport VHOST_USER and is not a PCIe function"
                    ),
                );
            }
            Some(_) | None => {
                let detail = format!(
                    "device {name} is not started; start it with virtio_fs_device_start --dev-name {name}"
                );
                return refuse(Errno::EINVAL, detail);
            }
        };
        self.no_hotplug(manager)
    }

    /// Path of the socket by which a VMM reaches the device, where it is known.
    pub fn device_socket(&self, device: &Device) -> Option<String> {
        match device.transport {
            TransportKind::Doca => {
                let (manager, vuid) = (device.manager.as_ref()?, device.vuid.as_ref()?);
                self.function(manager, vuid)
                    .map(|function| function.socket.clone())
            }
            TransportKind::VhostUser if self.platform.run_dir.is_empty() => None,
            TransportKind::VhostUser => Some(format!(
                "{}/vhost/{}.sock",
                self.platform.run_dir, device.name
            )),
        }
    }
}
