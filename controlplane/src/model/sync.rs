//! Agreement with the data plane after either side has started.
//!
//! What runs is the data plane's truth and is taken over; what is wanted and missing is listed for the caller to issue.

use ferry_shared::msg::Attach;
use ferry_shared::msg::Command;
use ferry_shared::msg::DeviceSnapshot;
use ferry_shared::msg::Event;
use ferry_shared::msg::Failure;
use ferry_shared::msg::FsdevSpec;
use ferry_shared::msg::Item;

use super::Device;
use super::Effect;
use super::Fsdev;
use super::Manager;
use super::Model;
use super::Platform;
use super::Ticket;
use super::Transport;
use super::TransportKind;
use super::device::Pending;
use super::fsdev::FsdevState;
use super::fsdev::in_order;

/// What a snapshot has brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Objects that exist in the data plane and were unknown or different here, as words for the log.
    pub objects: Vec<String>,
    /// What the data plane lacks.
    pub missing: Vec<Ticket>,
    /// Why some of what it lacks cannot even be tried; it stays wanted.
    pub impossible: Vec<Failure>,
}

impl Model {
    /// Takes note of what the data plane offers.
    pub fn note_platform(&mut self, items: &[Item]) {
        let mut platform = Platform::default();
        for item in items {
            match item {
                Item::Service(service) => {
                    platform.run_dir.clone_from(&service.run_dir);
                    platform.pid = service.pid;
                    platform.cores = u32::try_from(service.cores.len()).unwrap_or(u32::MAX);
                }
                Item::Manager(manager) => platform.managers.push(manager.clone()),
                Item::Function(function) => platform.functions.push(function.clone()),
                Item::Fsdev(_) | Item::Device(_) => {}
            }
        }
        self.platform = platform;
    }

    /// Takes over what the data plane has, and lists what it lacks.
    pub fn adopt(&mut self, items: Vec<Item>) -> Adopted {
        self.note_platform(&items);
        let mut fsdevs = Vec::new();
        let mut devices = Vec::new();
        for item in items {
            match item {
                Item::Service(_) | Item::Manager(_) | Item::Function(_) => {}
                Item::Fsdev(spec) => fsdevs.push(spec),
                Item::Device(device) => devices.push(device),
            }
        }
        let mut adopted = Adopted::default();
        self.adopt_fsdevs(fsdevs, &mut adopted);
        adopted.missing.extend(self.adopt_functions());
        self.adopt_devices(devices, &mut adopted);
        adopted
    }

    fn adopt_fsdevs(&mut self, specs: Vec<FsdevSpec>, adopted: &mut Adopted) {
        for fsdev in &mut self.fsdevs {
            fsdev.state = FsdevState::Missing;
        }
        for spec in in_order(specs) {
            let position = self
                .fsdevs
                .iter()
                .position(|fsdev| fsdev.spec.name == spec.name);
            let known = position.and_then(|position| self.fsdevs.get_mut(position));
            if known.as_ref().is_none_or(|fsdev| fsdev.spec != spec) {
                adopted.objects.push(format!("fsdev {}", spec.name));
            }
            match known {
                Some(fsdev) => {
                    *fsdev = Fsdev {
                        spec,
                        state: FsdevState::Present,
                    }
                }
                None => self.fsdevs.push(Fsdev {
                    spec,
                    state: FsdevState::Present,
                }),
            }
        }
        for fsdev in self
            .fsdevs
            .iter_mut()
            .filter(|fsdev| fsdev.state == FsdevState::Missing)
        {
            let command = Command::FsdevCreate(fsdev.spec.clone());
            adopted.missing.push(Ticket {
                command,
                effect: Effect::FsdevCreate(fsdev.spec.name.clone()),
            });
        }
    }

    fn adopt_devices(&mut self, snapshots: Vec<DeviceSnapshot>, adopted: &mut Adopted) {
        let mut before = Vec::new();
        for device in &mut self.devices {
            device.pending = None;
            let live = device.live.take().filter(|live| !live.paused);
            if device.wanted {
                before.push((device.name.clone(), live.map(|live| live.spec)));
            }
        }
        for snapshot in snapshots {
            before.retain(|(name, _)| *name != snapshot.spec.name);
            self.adopt_parents(&snapshot.spec.attach);
            match self.device_mut(&snapshot.spec.name) {
                Some(device) => device.set_live(snapshot),
                None => {
                    adopted
                        .objects
                        .push(format!("device {}", snapshot.spec.name));
                    self.devices.push(Device::adopted(snapshot));
                }
            }
        }
        for (name, spec) in before {
            let spec = match (spec, self.device(&name)) {
                (Some(spec), _) => spec,
                (None, Ok(device)) => match self.start_spec(device) {
                    Ok(spec) => spec,
                    Err(failure) => {
                        adopted.impossible.push(failure);
                        continue;
                    }
                },
                (None, Err(_)) => continue,
            };
            if let Some(device) = self.device_mut(&name) {
                device.pending = Some(Pending::Starting(spec.attach.clone()));
            }
            adopted.missing.push(Ticket {
                command: Command::DeviceStart(spec.clone()),
                effect: Effect::Start(spec),
            });
        }
    }

    /// A started device implies a started transport and its manager.
    fn adopt_parents(&mut self, attach: &Attach) {
        let kind = match attach {
            Attach::Doca { manager, .. } => {
                if !self.has_manager(manager) {
                    self.managers.push(Manager {
                        name: manager.clone(),
                        implicit: false,
                    });
                }
                TransportKind::Doca
            }
            Attach::VhostUser => TransportKind::VhostUser,
        };
        if !self
            .transports
            .iter()
            .any(|transport| transport.kind == kind)
        {
            self.transports.push(Transport {
                kind,
                started: true,
            });
        }
        self.set_started(kind, true);
    }

    /// Records the outcome of a ticket from [`Model::adopt`]: unlike a request, a failure leaves the object wanted.
    pub fn finish_missing(&mut self, ticket: Ticket, done: bool) {
        match &ticket.effect {
            Effect::FsdevCreate(_) if !done => {}
            _ => self.finish(ticket, done),
        }
    }

    /// Takes a report of the data plane.
    pub fn event(&mut self, event: Event) {
        match event {
            Event::Connected { device, connected } => {
                if let Some(live) = self
                    .device_mut(&device)
                    .and_then(|device| device.live.as_mut())
                {
                    live.connected = connected;
                }
            }
            Event::Mounted { device, mounted } => {
                if let Some(live) = self
                    .device_mut(&device)
                    .and_then(|device| device.live.as_mut())
                {
                    live.mounted = mounted;
                }
            }
            Event::Plug {
                manager,
                vuid,
                state,
            } => self.plug_changed(&manager, &vuid, state),
        }
    }
}
