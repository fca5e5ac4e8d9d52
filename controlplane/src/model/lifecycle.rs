//! What may happen to a device: creation, changes, start, stop, destruction, and the function that it occupies.

use ferry_shared::errno::Errno;
use ferry_shared::limits;
use ferry_shared::msg;
use ferry_shared::msg::Attach;
use ferry_shared::msg::Command;
use ferry_shared::msg::DeviceSpec;
use ferry_shared::msg::Failure;

use super::Changes;
use super::Device;
use super::DeviceState;
use super::Effect;
use super::Live;
use super::Model;
use super::Step;
use super::Ticket;
use super::TransportKind;
use super::device::Pending;
use super::refuse;

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
        if !self.will_have(manager, vuid) {
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

    pub(super) fn start_spec(&self, device: &Device) -> Result<DeviceSpec, Failure> {
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
        Ok(Step::Send(Box::new(Ticket {
            command: Command::DeviceStart(spec.clone()),
            effect: Effect::Start(spec),
        })))
    }

    /// Begins to stop a running device. One that is meant to run and could not be started again is no longer meant to.
    pub fn device_stop(&mut self, name: &str) -> Result<Step, Failure> {
        let device = self.device(name)?;
        device.check_not_pending()?;
        if device.state() == DeviceState::Idle && device.wanted {
            if let Some(device) = self.device_mut(name) {
                device.wanted = false;
            }
            return Ok(Step::Done);
        }
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
        Ok(Step::Send(Box::new(Ticket {
            command,
            effect: Effect::Stop(name.to_owned()),
        })))
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
        Ok(Step::Send(Box::new(Ticket {
            command,
            effect: Effect::Destroy(name.to_owned()),
        })))
    }

    pub(super) fn device_started(&mut self, spec: DeviceSpec, done: bool) {
        let Some(device) = self.device_mut(&spec.name) else {
            return;
        };
        device.pending = None;
        if !done {
            return;
        }
        device.wanted = true;
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
            device.wanted = false;
        }
    }

    pub(super) fn device_destroyed(&mut self, name: &str, done: bool) {
        if done {
            self.devices.retain(|device| device.name != name);
        } else if let Some(device) = self.device_mut(name) {
            device.pending = None;
        }
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
