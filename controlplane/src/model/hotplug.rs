//! What may happen to functions on hot-plug ports, and to devices on them.
//!
//! The data plane knows which ports have a function and how far each is plugged; here is what must exist again after it
//! has started anew, and what is refused before anything is sent.

use ferry_shared::errno::Errno;
use ferry_shared::msg::Attach;
use ferry_shared::msg::Command;
use ferry_shared::msg::DeviceSpec;
use ferry_shared::msg::Failure;
use ferry_shared::msg::Function;
use ferry_shared::msg::HostLink;
use ferry_shared::msg::PlugState;

use super::Effect;
use super::HotplugFunction;
use super::Live;
use super::Model;
use super::Step;
use super::Ticket;
use super::TransportKind;
use super::refuse;

/// A started device on a hot-plug port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plugged {
    /// Name of the device.
    pub device: String,
    /// Its function.
    pub function: Function,
    /// How to reach the host of the function's manager.
    pub link: Option<HostLink>,
}

impl Model {
    fn port_ticket(command: Command, effect: Effect) -> Box<Ticket> {
        Box::new(Ticket { command, effect })
    }

    /// The functions on hot-plug ports that are to exist, oldest first.
    pub fn hotplug_functions(&self) -> &[HotplugFunction] {
        &self.functions
    }

    /// Begins to create a function on a hot-plug port: the one with this VUID, or any.
    pub fn function_create(&self, manager: &str, vuid: Option<&str>) -> Result<Step, Failure> {
        self.manager(manager)?;
        if let Some(vuid) = vuid.filter(|vuid| self.function(manager, vuid).is_some()) {
            return refuse(
                Errno::EEXIST,
                format!("manager {manager} has function {vuid} already"),
            );
        }
        let ports = self.offered_manager(manager)?.hotplug_ports;
        if ports == 0 {
            return refuse(
                Errno::EOPNOTSUPP,
                format!(
                    "manager {manager} has no hot-plug ports; set PCI_SWITCH_EMULATION_ENABLE and \
                     PCI_SWITCH_EMULATION_NUM_PORT with ferry fwconfig, or use one of its static functions"
                ),
            );
        }
        let used = self.functions(manager).filter(|(f, _)| f.port.is_some());
        if used.count() >= ports as usize {
            return refuse(
                Errno::ENOSPC,
                format!(
                    "all {ports} hot-plug ports of manager {manager} have a function; destroy one with \
                     virtio_fs_doca_function_destroy"
                ),
            );
        }
        let command = Command::FunctionCreate {
            manager: manager.to_owned(),
            vuid: vuid.map(str::to_owned),
        };
        Ok(Step::Send(Model::port_ticket(
            command,
            Effect::FunctionCreate,
        )))
    }

    /// Records a function that the data plane has created.
    pub fn function_created(&mut self, function: Function) {
        let wanted = HotplugFunction {
            manager: function.manager.clone(),
            vuid: function.vuid.clone(),
        };
        self.forget_function(&wanted);
        self.functions.push(wanted);
        self.platform.functions.push(function);
    }

    pub(super) fn forget_function(&mut self, gone: &HotplugFunction) {
        let HotplugFunction { manager, vuid } = gone;
        self.functions.retain(|f| f != gone);
        self.platform
            .functions
            .retain(|f| f.manager != *manager || f.vuid != *vuid);
    }

    /// Begins to destroy a function on a hot-plug port.
    pub fn function_destroy(&self, manager: &str, vuid: &str) -> Result<Step, Failure> {
        self.manager(manager)?;
        let Some(function) = self.function(manager, vuid) else {
            return refuse(
                Errno::ENODEV,
                format!(
                    "manager {manager} has no function {vuid}; virtio_fs_doca_get_functions lists its functions"
                ),
            );
        };
        if function.port.is_none() {
            return refuse(
                Errno::EINVAL,
                format!("function {vuid} is static and cannot be destroyed"),
            );
        }
        let associated = self.devices.iter().find(|device| {
            let named =
                device.manager.as_deref() == Some(manager) && device.vuid.as_deref() == Some(vuid);
            named || device.occupies(manager, vuid)
        });
        if let Some(device) = associated {
            return refuse(
                Errno::EBUSY,
                format!(
                    "function {vuid} is used by device {0}; destroy it with virtio_fs_device_destroy --dev-name {0}",
                    device.name
                ),
            );
        }
        let command = Command::FunctionDestroy {
            manager: manager.to_owned(),
            vuid: vuid.to_owned(),
        };
        let gone = HotplugFunction {
            manager: manager.to_owned(),
            vuid: vuid.to_owned(),
        };
        let effect = Effect::FunctionDestroy(gone);
        Ok(Step::Send(Model::port_ticket(command, effect)))
    }

    /// A device that can be plugged or unplugged.
    fn on_port(&self, name: &str) -> Result<Plugged, Failure> {
        let device = self.device(name)?;
        device.check_not_pending()?;
        if device.transport == TransportKind::VhostUser {
            let detail =
                format!("device {name} belongs to transport VHOST_USER and is not a PCIe function");
            return refuse(Errno::EINVAL, detail);
        }
        let Some(Live {
            spec:
                DeviceSpec {
                    attach: Attach::Doca { manager, vuid },
                    ..
                },
            paused: false,
            ..
        }) = &device.live
        else {
            let detail = format!(
                "device {name} is not started; start it with virtio_fs_device_start --dev-name {name}"
            );
            return refuse(Errno::EINVAL, detail);
        };
        let Some(function) = self.function(manager, vuid).filter(|f| f.port.is_some()) else {
            let detail = format!(
                "device {name} is on static function {vuid}, which is always there; create a function to plug with \
                 virtio_fs_doca_function_create -m {manager}"
            );
            return refuse(Errno::EINVAL, detail);
        };
        Ok(Plugged {
            device: name.to_owned(),
            function: function.clone(),
            link: self.offered_manager(manager)?.host_link.clone(),
        })
    }

    /// Begins to offer a device to the host.
    pub fn device_hotplug(&self, name: &str) -> Result<(Plugged, Step), Failure> {
        let plugged = self.on_port(name)?;
        let state = plugged.function.plug;
        if state != PlugState::PowerOff {
            let what = match state {
                PlugState::PowerOff | PlugState::PowerOn => "is plugged already",
                PlugState::PlugInProgress => {
                    "is offered to the host already, whose driver has not taken it yet"
                }
                PlugState::UnplugInProgress => "is being unplugged",
            };
            return refuse(Errno::EALREADY, format!("device {name} {what}"));
        }
        let command = Command::DevicePlug {
            name: name.to_owned(),
        };
        let step = Step::Send(Model::port_ticket(command, Effect::Plug));
        Ok((plugged, step))
    }

    /// Begins to take a device away from the host, or asks once more. `ask` is for hosts that no link leads to.
    pub fn device_hotunplug(&self, name: &str, ask: bool) -> Result<(Plugged, Step), Failure> {
        let plugged = self.on_port(name)?;
        if plugged.function.plug == PlugState::PowerOff {
            return refuse(Errno::EINVAL, format!("device {name} is not plugged"));
        }
        let command = Command::DeviceUnplug {
            name: name.to_owned(),
            ask,
        };
        let step = Step::Send(Model::port_ticket(command, Effect::Plug));
        Ok((plugged, step))
    }

    /// How far a device is plugged, if it is on a hot-plug port.
    pub fn plug_state(&self, name: &str) -> Option<PlugState> {
        let device = self.device(name).ok()?;
        let (manager, vuid) = (device.manager.as_ref()?, device.vuid.as_ref()?);
        let function = self.function(manager, vuid)?;
        function.port.map(|_| function.plug)
    }

    /// Whether a function exists or is to exist again.
    pub(super) fn will_have(&self, manager: &str, vuid: &str) -> bool {
        let wanted = |f: &HotplugFunction| f.manager == manager && f.vuid == vuid;
        self.function(manager, vuid).is_some() || self.functions.iter().any(wanted)
    }

    /// Takes the functions of a snapshot over, and lists the commands for those that are missing.
    pub(super) fn adopt_functions(&mut self) -> Vec<Ticket> {
        let there = self.platform.functions.iter().filter(|f| f.port.is_some());
        let there: Vec<HotplugFunction> = there
            .map(|f| HotplugFunction {
                manager: f.manager.clone(),
                vuid: f.vuid.clone(),
            })
            .collect();
        let missing = self
            .functions
            .iter()
            .filter(|f| !there.contains(f))
            .map(|f| Ticket {
                command: Command::FunctionCreate {
                    manager: f.manager.clone(),
                    vuid: Some(f.vuid.clone()),
                },
                effect: Effect::FunctionCreate,
            })
            .collect();
        for function in there {
            if !self.functions.contains(&function) {
                self.functions.push(function);
            }
        }
        missing
    }

    /// The data plane reports how far a function is plugged.
    pub(super) fn plug_changed(&mut self, manager: &str, vuid: &str, state: PlugState) {
        let functions = self.platform.functions.iter_mut();
        for function in functions.filter(|f| f.manager == manager && f.vuid == vuid) {
            function.plug = state;
        }
    }
}
