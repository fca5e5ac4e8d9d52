//! Functions on hot-plug ports, and how devices on them come to the host and go.
//!
//! A function is offered to the host by its socket: plugging makes it, unplugging takes it away once the client has left.
//! Which VMM is told to look at the socket, and how, is the control plane's business.

use std::collections::BTreeSet;

use ferry_shared::errno::Errno;
use ferry_shared::msg::{Attach, Event, Failure, Function, PlugState};

use super::{Device, Service, refuse};
use crate::keeper::Keeper;
use crate::platform::{EmulatedFunction, no_function};

/// The ports that have a function: manager and number.
pub(super) type Ports = BTreeSet<(String, u16)>;

/// Where it is kept for a later process that a function exists; the value is the name of its manager.
fn function_key(vuid: &str) -> String {
    format!("function/{vuid}")
}

/// Whether a client may come to a function in this state.
pub(super) fn is_offered(state: PlugState) -> bool {
    match state {
        PlugState::PlugInProgress | PlugState::PowerOn => true,
        PlugState::PowerOff | PlugState::UnplugInProgress => false,
    }
}

impl Service {
    /// Brings back the functions that a former process has left.
    pub(super) fn restore_ports(&mut self) {
        for vuid in self.keeper.keys("function/") {
            let manager: Option<String> = self.keeper.load(&function_key(&vuid));
            let manager = manager.unwrap_or_default();
            match self.platform.find(&manager, &vuid).map(|f| f.port) {
                Ok(Some(port)) => {
                    self.ports.insert((manager, port));
                }
                _ => {
                    tracing::error!(
                        manager,
                        vuid,
                        "the platform has no port any more for a function of the former process; it is gone"
                    );
                    self.keeper.forget(&function_key(&vuid));
                }
            }
        }
    }

    /// A function that exists.
    pub(super) fn place(&self, manager: &str, vuid: &str) -> Result<&EmulatedFunction, Failure> {
        let function = self.platform.find(manager, vuid)?;
        let exists = function
            .port
            .is_none_or(|port| self.ports.contains(&(manager.to_owned(), port)));
        if !exists {
            return Err(no_function(manager, vuid));
        }
        Ok(function)
    }

    fn user(&self, vuid: &str) -> Option<&Device> {
        let on = |d: &&Device| matches!(&d.spec.attach, Attach::Doca { vuid: v, .. } if v == vuid);
        self.devices.iter().find(on)
    }

    fn plug_state(&self, vuid: &str) -> PlugState {
        self.user(vuid).map_or(PlugState::PowerOff, |d| d.plug)
    }

    /// The functions on ports, as the control plane is told.
    pub(super) fn describe_ports(&self) -> impl Iterator<Item = Function> {
        self.ports.iter().filter_map(|(manager, port)| {
            let functions = &self.platform.manager(manager).ok()?.ports;
            let function = functions.get(usize::from(*port))?;
            let plug = self.plug_state(&function.vuid);
            Some(function.describe(manager, plug, &self.run_dir))
        })
    }

    pub(super) fn function_create(
        &mut self,
        manager: &str,
        vuid: Option<&str>,
    ) -> Result<Function, Failure> {
        let ports = &self.platform.manager(manager)?.ports;
        let taken = |f: &&EmulatedFunction| {
            f.port
                .is_some_and(|port| self.ports.contains(&(manager.to_owned(), port)))
        };
        let wanted = |f: &&EmulatedFunction| vuid.is_none_or(|v| v == f.vuid);
        let free = |f: &&EmulatedFunction| wanted(f) && !taken(f);
        let Some((function, port)) = ports.iter().find(free).and_then(|f| Some((f, f.port?)))
        else {
            return match vuid {
                Some(vuid) if ports.iter().any(|f| f.vuid == vuid) => refuse(
                    Errno::EEXIST,
                    format!("manager {manager} has function {vuid} already"),
                ),
                Some(vuid) => Err(no_function(manager, vuid)),
                None if ports.is_empty() => refuse(
                    Errno::EOPNOTSUPP,
                    format!("manager {manager} has no hot-plug ports"),
                ),
                None => refuse(
                    Errno::ENOSPC,
                    format!(
                        "all {} hot-plug ports of manager {manager} have a function",
                        ports.len()
                    ),
                ),
            };
        };
        let described = function.describe(manager, PlugState::PowerOff, &self.run_dir);
        self.ports.insert((manager.to_owned(), port));
        self.keeper
            .save(&function_key(&described.vuid), &described.manager);
        tracing::info!(manager, vuid = described.vuid, "function created");
        Ok(described)
    }

    pub(super) fn function_destroy(&mut self, manager: &str, vuid: &str) -> Result<(), Failure> {
        let Some(port) = self.place(manager, vuid)?.port else {
            return refuse(
                Errno::EINVAL,
                format!("function {vuid} is static and cannot be destroyed"),
            );
        };
        if let Some(user) = self.user(vuid) {
            return refuse(
                Errno::EBUSY,
                format!("function {vuid} is used by device {}", user.spec.name),
            );
        }
        self.ports.remove(&(manager.to_owned(), port));
        self.keeper.forget(&function_key(vuid));
        tracing::info!(manager, vuid, "function destroyed");
        Ok(())
    }

    /// The device, if it is on a hot-plug port and nothing else is being done to it.
    fn on_port(&mut self, name: &str) -> Result<&mut Device, Failure> {
        let device = self.find(name)?;
        device.idle()?;
        if !device.hot {
            return refuse(
                Errno::EINVAL,
                format!("device {name} is not on a hot-plug port"),
            );
        }
        Ok(device)
    }

    pub(super) fn device_plug(&mut self, name: &str) -> Result<(), Failure> {
        let state = self.on_port(name)?.plug;
        if state != PlugState::PowerOff {
            return refuse(
                Errno::EALREADY,
                format!("device {name} is in state {}", state.name()),
            );
        }
        let run_dir = self.run_dir.clone();
        let Attach::Doca { manager, vuid } = self.on_port(name)?.spec.attach.clone() else {
            return Ok(());
        };
        let socket = self.place(&manager, &vuid)?.socket(&run_dir);
        let index = self.devices.iter().position(|d| d.spec.name == name);
        if let Some(device) = index.and_then(|i| self.devices.get_mut(i)) {
            if let Some(function) = device.transport.function() {
                function.listen(&socket)?;
            }
            device.set_plug(PlugState::PlugInProgress, &self.keeper, &mut self.events);
        }
        Ok(())
    }

    pub(super) fn device_unplug(&mut self, name: &str, ask: bool) -> Result<(), Failure> {
        if self.on_port(name)?.plug == PlugState::PowerOff {
            return refuse(Errno::EINVAL, format!("device {name} is not plugged"));
        }
        let index = self.devices.iter().position(|d| d.spec.name == name);
        if let Some(device) = index.and_then(|i| self.devices.get_mut(i)) {
            device.set_plug(PlugState::UnplugInProgress, &self.keeper, &mut self.events);
            if let Some(function) = device.transport.function() {
                // Nobody new may come while the host lets go.
                function.withdraw();
                if ask {
                    function.ask_release();
                }
            }
        }
        Ok(())
    }
}

impl Device {
    pub(super) fn set_plug(&mut self, state: PlugState, keeper: &Keeper, events: &mut Vec<Event>) {
        if self.plug == state {
            return;
        }
        self.plug = state;
        self.save(keeper);
        let Attach::Doca { manager, vuid } = &self.spec.attach else {
            return;
        };
        tracing::info!(
            device = self.spec.name,
            vuid,
            state = state.name(),
            "hot-plug"
        );
        events.push(Event::Plug {
            manager: manager.clone(),
            vuid: vuid.clone(),
            state,
        });
    }

    /// Goes on with what the host has done about the function. A host that leaves without having been asked is gone,
    /// together with the machine that the function was plugged into.
    pub(super) fn follow_plug(&mut self, keeper: &Keeper, events: &mut Vec<Event>) {
        if !self.hot {
            return;
        }
        let Some(function) = self.transport.function() else {
            return;
        };
        let next = match self.plug {
            PlugState::PlugInProgress if function.driver_ok() => PlugState::PowerOn,
            PlugState::PowerOn | PlugState::UnplugInProgress if !function.connected() => {
                function.withdraw();
                PlugState::PowerOff
            }
            state => state,
        };
        self.set_plug(next, keeper, events);
    }
}
