//! The desired state, and the rules about what may follow what.
//!
//! Pure: no sockets, no clock, no files. A request either is refused with an error number and a sentence that names the
//! culprit, and then nothing has changed, or is accepted. Requests that need the data plane are accepted in two steps:
//! the first gives a [`Ticket`] with the command to send and marks the object as being worked on, the second
//! ([`Model::finish`]) records what became of it. The RPC handlers call this module; it never calls anybody.

mod device;
mod fsdev;
mod hotplug;
mod lifecycle;
mod stored;
mod sync;
#[cfg(test)]
mod tests;

pub use device::Changes;
pub use device::Device;
pub use device::DeviceState;
pub use device::Live;
pub use fsdev::Fsdev;
pub use fsdev::FsdevOptions;
pub(crate) use fsdev::method_stem;
pub(crate) use fsdev::module_name;
pub(crate) use fsdev::parse_placement;
pub(crate) use fsdev::placement_name;
pub use hotplug::Plugged;

use ferry_shared::errno::Errno;
use ferry_shared::msg::Command;
use ferry_shared::msg::DeviceSpec;
use ferry_shared::msg::Failure;
use ferry_shared::msg::Function;
use ferry_shared::msg::Manager as PlatformManager;
use ferry_shared::msg::PoolSpec;
use ferry_shared::msg::Scheduler;

/// Everything the operator has asked for, and what is known of the data plane.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    platform: Platform,
    transports: Vec<Transport>,
    managers: Vec<Manager>,
    devices: Vec<Device>,
    fsdevs: Vec<Fsdev>,
    options: FsdevOptions,
    /// Functions on hot-plug ports that are to exist, oldest first.
    functions: Vec<HotplugFunction>,
    wishes: Wishes,
}

/// A function on a hot-plug port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HotplugFunction {
    /// Name of its manager.
    pub manager: String,
    /// VUID.
    pub vuid: String,
}

/// What the operator wants of the data plane's own working; what was not asked for is left to the data plane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Request slots of all cores together.
    pub slots: Option<u32>,
    /// Data buffers of all cores together.
    pub buffers: Option<u32>,
    /// How queues are spread over the cores.
    pub scheduler: Option<Scheduler>,
}

impl Wishes {
    /// The pools that a data plane should have instead of those that it has, if others are wanted.
    pub fn pools(&self, present: PoolSpec) -> PoolSpec {
        PoolSpec {
            slots: self.slots.unwrap_or(present.slots),
            buffers: self.buffers.unwrap_or(present.buffers),
        }
    }
}

/// What the data plane offers; the last known facts while it is away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Platform {
    /// Directory of the sockets; empty until the data plane has been seen.
    pub run_dir: String,
    /// Number of cores that serve requests.
    pub cores: u32,
    /// Process id of the data plane.
    pub pid: u32,
    /// Emulation managers that could be created.
    pub managers: Vec<PlatformManager>,
    /// Their functions.
    pub functions: Vec<Function>,
}

/// The kinds of transports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportKind {
    /// Emulated PCIe functions.
    Doca,
    /// vhost-user sockets.
    VhostUser,
}

impl TransportKind {
    /// The name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            TransportKind::Doca => "DOCA",
            TransportKind::VhostUser => "VHOST_USER",
        }
    }

    /// Looks a name up; names are case-sensitive.
    pub fn parse(name: &str) -> Option<TransportKind> {
        [TransportKind::Doca, TransportKind::VhostUser]
            .into_iter()
            .find(|kind| kind.name() == name)
    }
}

/// A transport that has been created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transport {
    /// Which one.
    pub kind: TransportKind,
    /// Whether it has been started.
    pub started: bool,
}

/// An emulation manager that has been created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manager {
    /// Device name, for example `mlx5_0`.
    pub name: String,
    /// Created because something needed it, not because the operator asked; goes away with the transport.
    pub implicit: bool,
}

/// A command for the data plane, and what its outcome will mean.
#[must_use = "the object stays marked as being worked on until the ticket is finished"]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// What to send.
    pub command: Command,
    effect: Effect,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Effect {
    FsdevCreate(String),
    FsdevDelete(String),
    Start(DeviceSpec),
    Stop(String),
    Destroy(String),
    /// Its reply says what has come of it.
    FunctionCreate,
    FunctionDestroy(HotplugFunction),
    /// The data plane reports what has come of it.
    Plug,
}

/// What an accepted request needs: nothing more, or the data plane.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Step {
    /// Done.
    Done,
    /// Send this, then finish the ticket.
    Send(Box<Ticket>),
}

pub(crate) fn refuse<T>(errno: Errno, detail: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::new(errno, detail))
}

impl Model {
    /// What the data plane offers.
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// The transports, oldest first.
    pub fn transports(&self) -> &[Transport] {
        &self.transports
    }

    /// The managers, oldest first.
    pub fn managers(&self) -> &[Manager] {
        &self.managers
    }

    /// The devices, oldest first.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// The fsdevs, oldest first.
    pub fn fsdevs(&self) -> impl Iterator<Item = &Fsdev> {
        self.fsdevs.iter().filter(|fsdev| !fsdev.is_being_created())
    }

    /// The options of the fsdev library.
    pub fn options(&self) -> FsdevOptions {
        self.options
    }

    /// What is wanted of the data plane's own working.
    pub fn wishes(&self) -> Wishes {
        self.wishes
    }

    /// Wants something else.
    pub fn wish(&mut self, wishes: Wishes) {
        self.wishes = wishes;
    }

    /// Records what became of a ticket.
    pub fn finish(&mut self, ticket: Ticket, done: bool) {
        match ticket.effect {
            Effect::FsdevCreate(name) => self.fsdev_created(&name, done),
            Effect::FsdevDelete(name) => self.fsdev_deleted(&name, done),
            Effect::Start(spec) => self.device_started(spec, done),
            Effect::Stop(name) => self.device_stopped(&name, done),
            Effect::Destroy(name) => self.device_destroyed(&name, done),
            Effect::FunctionDestroy(function) if done => self.forget_function(&function),
            Effect::FunctionDestroy(_) | Effect::FunctionCreate | Effect::Plug => {}
        }
    }

    /// Creates a transport, stopped.
    pub fn transport_create(&mut self, name: &str) -> Result<(), Failure> {
        let Some(kind) = TransportKind::parse(name) else {
            return refuse(
                Errno::EINVAL,
                format!(
                    "there is no transport type {name:?}; the transport types are DOCA and VHOST_USER"
                ),
            );
        };
        if self
            .transports
            .iter()
            .any(|transport| transport.kind == kind)
        {
            return refuse(
                Errno::EEXIST,
                format!("transport {name} has already been created"),
            );
        }
        self.transports.push(Transport {
            kind,
            started: false,
        });
        Ok(())
    }

    /// Finds a transport by name.
    pub fn transport(&self, name: &str) -> Result<&Transport, Failure> {
        self.transports.iter().find(|transport| transport.kind.name() == name).ok_or_else(|| {
            Failure::new(
                Errno::ENODEV,
                format!("transport {name} has not been created; create it with virtio_fs_transport_create -t {name}"),
            )
        })
    }

    fn set_started(&mut self, kind: TransportKind, started: bool) {
        for transport in self
            .transports
            .iter_mut()
            .filter(|transport| transport.kind == kind)
        {
            transport.started = started;
        }
    }

    /// Starts a transport. A DOCA transport without a manager gets the first one that the platform offers.
    pub fn transport_start(&mut self, name: &str) -> Result<(), Failure> {
        let transport = self.transport(name)?;
        let kind = transport.kind;
        if transport.started {
            return refuse(
                Errno::EALREADY,
                format!("transport {name} has already been started"),
            );
        }
        if kind == TransportKind::Doca && self.managers.is_empty() {
            let Some(first) = self.platform.managers.first() else {
                return refuse(
                    Errno::ENODEV,
                    "the platform of the data plane has no emulation manager; name one in its platform file",
                );
            };
            self.managers.push(Manager {
                name: first.name.clone(),
                implicit: true,
            });
        }
        self.set_started(kind, true);
        Ok(())
    }

    /// Stops a transport that has no devices.
    pub fn transport_stop(&mut self, name: &str) -> Result<(), Failure> {
        let transport = self.transport(name)?;
        let kind = transport.kind;
        if !transport.started {
            return refuse(Errno::EALREADY, format!("transport {name} is not started"));
        }
        if let Some(device) = self.devices.iter().find(|device| device.transport == kind) {
            return refuse(
                Errno::EBUSY,
                format!(
                    "transport {name} still has device {0}; destroy it with virtio_fs_device_destroy --dev-name {0}",
                    device.name
                ),
            );
        }
        self.set_started(kind, false);
        Ok(())
    }

    /// Destroys a stopped transport; managers that nobody asked for go with it.
    pub fn transport_destroy(&mut self, name: &str) -> Result<(), Failure> {
        let transport = self.transport(name)?;
        let kind = transport.kind;
        if transport.started {
            return refuse(
                Errno::EBUSY,
                format!(
                    "transport {name} is started; stop it with virtio_fs_transport_stop -t {name}"
                ),
            );
        }
        if kind == TransportKind::Doca {
            if let Some(manager) = self.managers.iter().find(|manager| !manager.implicit) {
                return refuse(
                    Errno::EBUSY,
                    format!(
                        "transport {name} still has manager {0}; destroy it with virtio_fs_doca_manager_destroy -m {0}",
                        manager.name
                    ),
                );
            }
            self.managers.clear();
        }
        self.transports.retain(|transport| transport.kind != kind);
        Ok(())
    }

    fn has_manager(&self, name: &str) -> bool {
        self.managers.iter().any(|manager| manager.name == name)
    }

    /// Finds a manager that the platform offers.
    pub fn offered_manager(&self, name: &str) -> Result<&PlatformManager, Failure> {
        self.platform
            .managers
            .iter()
            .find(|manager| manager.name == name)
            .ok_or_else(|| {
                let offered: Vec<&str> = self
                    .platform
                    .managers
                    .iter()
                    .map(|manager| manager.name.as_str())
                    .collect();
                let offered = if offered.is_empty() {
                    "none".to_owned()
                } else {
                    offered.join(", ")
                };
                Failure::new(
                    Errno::ENODEV,
                    format!("the platform has no manager {name}; it offers {offered}"),
                )
            })
    }

    /// Creates a manager that the platform offers.
    pub fn manager_create(&mut self, name: &str) -> Result<(), Failure> {
        if self.has_manager(name) {
            return refuse(
                Errno::EEXIST,
                format!("manager {name} has already been created"),
            );
        }
        self.transport(TransportKind::Doca.name())?;
        self.offered_manager(name)?;
        self.managers.push(Manager {
            name: name.to_owned(),
            implicit: false,
        });
        Ok(())
    }

    /// Finds a manager that has been created.
    pub fn manager(&self, name: &str) -> Result<&Manager, Failure> {
        self.managers.iter().find(|manager| manager.name == name).ok_or_else(|| {
            Failure::new(
                Errno::ENODEV,
                format!("manager {name} has not been created; create it with virtio_fs_doca_manager_create -m {name}"),
            )
        })
    }

    /// Destroys a manager whose functions no device uses.
    pub fn manager_destroy(&mut self, name: &str) -> Result<(), Failure> {
        self.manager(name)?;
        if let Some(device) = self.devices.iter().find(|device| device.uses_manager(name)) {
            return refuse(
                Errno::EBUSY,
                format!(
                    "manager {name} is used by device {0}; destroy it with virtio_fs_device_destroy --dev-name {0}",
                    device.name
                ),
            );
        }
        self.managers.retain(|manager| manager.name != name);
        Ok(())
    }

    /// Creates a manager on behalf of something that needs it, if the platform offers it and the transport exists.
    fn ensure_manager(&mut self, name: &str) {
        let offered = self
            .platform
            .managers
            .iter()
            .any(|manager| manager.name == name);
        if offered && !self.has_manager(name) && self.transport(TransportKind::Doca.name()).is_ok()
        {
            self.managers.push(Manager {
                name: name.to_owned(),
                implicit: true,
            });
        }
    }

    /// The functions of one manager, with the device that occupies each.
    pub fn functions<'a>(
        &'a self,
        manager: &'a str,
    ) -> impl Iterator<Item = (&'a Function, Option<&'a Device>)> + use<'a> {
        self.platform
            .functions
            .iter()
            .filter(move |function| function.manager == manager)
            .map(move |function| (function, self.device_on(manager, &function.vuid)))
    }

    /// Whether any manager has this function.
    pub fn knows_vuid(&self, vuid: &str) -> bool {
        self.platform
            .functions
            .iter()
            .any(|function| function.vuid == vuid)
    }

    fn function(&self, manager: &str, vuid: &str) -> Option<&Function> {
        self.platform
            .functions
            .iter()
            .find(|function| function.manager == manager && function.vuid == vuid)
    }

    fn device_on(&self, manager: &str, vuid: &str) -> Option<&Device> {
        self.devices
            .iter()
            .find(|device| device.occupies(manager, vuid))
    }
}
