//! What exists in this process: file-system devices, functions, started devices. The management thread's state.
//!
//! Every change is checked completely before anything is touched, so a refused command has changed nothing. Commands that
//! have to wait for the cores leave a note with the device and are answered when the device has got there.

mod plug;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_shared::counters;
use ferry_shared::errno::Errno;
use ferry_shared::limits::{MAX_QUEUES_PER_SERVICE, NAME_LEN};
use ferry_shared::logging;
use ferry_shared::msg::{
    Attach, Command, DeviceSnapshot, DeviceSpec, Event, Failure, FsdevSpec, Item, PlugState, Reply,
    Service as Facts,
};

use self::plug::Ports;
use crate::cores::CoreSet;
use crate::fsdev::registry::AnyFsDev;
use crate::fuse::session::Session;
use crate::id::{CoreEvent, DeviceId};
use crate::os::poller::{Poller, Token};
use crate::platform::Platform;
use crate::reactor::DeviceShared;
use crate::transport::Transport;
use crate::transport::log_gate::LogGate;

/// The answer to a command: at once, or later under the same number.
pub type Answer = (u64, Result<Reply, Failure>);

/// What a device does next, once its queues are quiet. The number of the command is lost with its control plane.
enum Next {
    /// Report that it is paused.
    Paused { seq: Option<u64> },
    /// Close it.
    Close { seq: Option<u64> },
    /// Close it and start it with another specification.
    Reopen {
        seq: Option<u64>,
        spec: Box<DeviceSpec>,
    },
}

impl Next {
    fn forget_seq(&mut self) {
        match self {
            Next::Paused { seq } | Next::Close { seq } | Next::Reopen { seq, .. } => *seq = None,
        }
    }
}

/// A started device.
struct Device {
    id: DeviceId,
    spec: DeviceSpec,
    transport: Transport,
    shared: Arc<DeviceShared<AnyFsDev>>,
    next: Option<Next>,
    /// Told to pause, and not yet told to go on.
    paused: bool,
    /// As last reported.
    connected: bool,
    /// As last reported.
    mounted: bool,
    /// It is on a hot-plug port.
    hot: bool,
    /// How far it is plugged; a device that needs no plugging is always on.
    plug: PlugState,
    gate: LogGate,
}

/// The state of the data plane.
pub struct Service {
    platform: Platform,
    /// The hot-plug ports that have a function.
    ports: Ports,
    run_dir: PathBuf,
    cpus: Vec<u32>,
    cores: CoreSet<AnyFsDev>,
    poller: Arc<Poller>,
    fsdevs: BTreeMap<String, FsdevSpec>,
    devices: Vec<Device>,
    last_id: u32,
    answers: Vec<Answer>,
    events: Vec<Event>,
}

fn refuse<T>(errno: Errno, detail: String) -> Result<T, Failure> {
    Err(Failure::new(errno, detail))
}

impl Service {
    /// An empty service.
    pub fn new(
        platform: Platform,
        run_dir: PathBuf,
        cpus: Vec<u32>,
        cores: CoreSet<AnyFsDev>,
        poller: Arc<Poller>,
    ) -> Service {
        Service {
            platform,
            ports: Ports::default(),
            run_dir,
            cpus,
            cores,
            poller,
            fsdevs: BTreeMap::new(),
            devices: Vec::new(),
            last_id: 0,
            answers: Vec::new(),
            events: Vec::new(),
        }
    }

    /// The cores, for the loop that waits for them.
    pub fn cores(&self) -> &CoreSet<AnyFsDev> {
        &self.cores
    }

    /// Carries out a command. Its answer comes out of [`Service::take_answers`], now or later.
    pub fn command(&mut self, seq: u64, command: Command) {
        let result = match command {
            Command::Snapshot { from } => Ok(Some(self.snapshot(from))),
            Command::FsdevCreate(spec) => self.fsdev_create(spec).map(|()| Some(Reply::Done)),
            Command::FsdevDelete { name } => self.fsdev_delete(&name).map(|()| Some(Reply::Done)),
            Command::DeviceStart(spec) => self.device_start(seq, spec),
            Command::DeviceStop { name } => self.device_stop(seq, &name),
            Command::DeviceDestroy { name } => self.device_destroy(seq, &name),
            Command::FunctionCreate { manager, vuid } => self
                .function_create(&manager, vuid.as_deref())
                .map(|function| Some(Reply::Function(function))),
            Command::FunctionDestroy { manager, vuid } => self
                .function_destroy(&manager, &vuid)
                .map(|()| Some(Reply::Done)),
            Command::DevicePlug { name } => self.device_plug(&name).map(|()| Some(Reply::Done)),
            Command::DeviceUnplug { name, ask } => {
                self.device_unplug(&name, ask).map(|()| Some(Reply::Done))
            }
            Command::SetLog(spec) => logging::set(&spec).map(|()| Some(Reply::Done)),
        };
        match result {
            Ok(Some(reply)) => self.answers.push((seq, Ok(reply))),
            Ok(None) => {}
            Err(failure) => self.answers.push((seq, Err(failure))),
        }
        self.settle();
    }

    fn answer(&mut self, seq: Option<u64>, result: Result<Reply, Failure>) {
        match (seq, result) {
            (Some(seq), result) => self.answers.push((seq, result)),
            (None, Ok(_)) => {}
            (None, Err(Failure { errno, detail })) => {
                tracing::error!(%errno, detail, "a command failed after its control plane had gone");
            }
        }
    }

    /// The control plane has gone: what it asked for is still done, and answered to nobody. The next one counts its
    /// commands from the beginning again.
    pub fn forget_caller(&mut self) {
        self.answers.clear();
        self.events.clear();
        for next in self.devices.iter_mut().filter_map(|d| d.next.as_mut()) {
            next.forget_seq();
        }
    }

    /// Takes the answers that have become ready.
    pub fn take_answers(&mut self) -> Vec<Answer> {
        std::mem::take(&mut self.answers)
    }

    /// Takes what has happened.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// A socket of a device is ready.
    pub fn ready(&mut self, token: Token) {
        if let Some(device) = self.devices.iter_mut().find(|d| d.id == token.device) {
            device.transport.ready(token.local, &mut self.cores);
        }
        self.settle();
    }

    /// Takes what the cores have to say.
    pub fn drain_cores(&mut self) {
        while let Some(event) = self.cores.take_event() {
            let id = match &event {
                CoreEvent::QueueStopped { device, .. }
                | CoreEvent::MemoryReplaced { device }
                | CoreEvent::QueueFailed { device, .. }
                | CoreEvent::Mounted { device, .. } => *device,
            };
            let Some(device) = self.devices.iter_mut().find(|d| d.id == id) else {
                continue;
            };
            device.transport.core_event(event, &mut self.cores);
        }
        self.settle();
    }

    /// Closes every device and ends the cores.
    pub fn shut_down(mut self) {
        for device in &mut self.devices {
            device.next = Some(Next::Close { seq: None });
            device.transport.begin_close(&mut self.cores);
        }
        // Requests on a file system that never answers cannot be waited for; the kernel ends them with the process.
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut ready = Vec::new();
        while !self.devices.is_empty() && Instant::now() < deadline {
            let timeout = if self.cores.prepare_sleep() { 100 } else { 0 };
            let _ = self.poller.wait(&mut ready, timeout);
            self.cores.awake();
            self.drain_cores();
        }
        if self.devices.is_empty() {
            self.cores.shut_down();
        }
    }

    // ---- commands ----

    fn snapshot(&self, from: u32) -> Reply {
        let service = Item::Service(Facts {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            cores: self.cpus.clone(),
            run_dir: self.run_dir.to_string_lossy().into_owned(),
        });
        let managers = self.platform.describe_managers().map(Item::Manager);
        let functions = self
            .platform
            .describe_functions(&self.run_dir)
            .chain(self.describe_ports())
            .map(Item::Function);
        let fsdevs = self.fsdevs.values().cloned().map(Item::Fsdev);
        let devices = self.devices.iter().filter_map(describe).map(Item::Device);
        let all = std::iter::once(service)
            .chain(managers)
            .chain(functions)
            .chain(fsdevs)
            .chain(devices);
        // The longest item is an fsdev with its path; this many fit a frame whatever they are.
        const PAGE: usize = ferry_shared::limits::MAX_FRAME / (2 * (4096 + 4 * NAME_LEN));
        let mut items: Vec<Item> = all.skip(from as usize).take(PAGE + 1).collect();
        let more = items.len() > PAGE;
        items.truncate(PAGE);
        let next = more.then_some(from.saturating_add(PAGE as u32));
        Reply::Snapshot { items, next }
    }

    fn fsdev_create(&mut self, spec: FsdevSpec) -> Result<(), Failure> {
        spec.check()?;
        if self.fsdevs.contains_key(&spec.name) {
            return refuse(Errno::EEXIST, format!("fsdev {} exists already", spec.name));
        }
        // One is made in any case: it is what finds out whether the export can be used.
        let mut backend = Some(AnyFsDev::new(&spec)?);
        for device in self.devices.iter().filter(|d| d.spec.fsdev == spec.name) {
            let backend = match backend.take() {
                Some(backend) => backend,
                None => AnyFsDev::new(&spec)?,
            };
            device.shared.set_backend(Some(Arc::new(backend)));
        }
        tracing::info!(fsdev = spec.name, "created");
        self.fsdevs.insert(spec.name.clone(), spec);
        Ok(())
    }

    fn fsdev_delete(&mut self, name: &str) -> Result<(), Failure> {
        if !self.fsdevs.contains_key(name) {
            return refuse(Errno::ENODEV, format!("there is no fsdev {name}"));
        }
        let users = || self.devices.iter().filter(|d| d.spec.fsdev == name);
        if let Some(user) = users().find(|d| d.shared.session.mounted()) {
            let user = &user.spec.name;
            let detail = format!(
                "fsdev {name} is mounted through device {user}; unmount it in the guest, or stop and destroy {user}"
            );
            return refuse(Errno::EBUSY, detail);
        }
        for device in users() {
            device.shared.set_backend(None);
        }
        self.fsdevs.remove(name);
        tracing::info!(fsdev = name, "deleted");
        Ok(())
    }

    fn device_start(&mut self, seq: u64, spec: DeviceSpec) -> Result<Option<Reply>, Failure> {
        spec.check()?;
        self.check_start(&spec)?;
        let Some(device) = self.devices.iter_mut().find(|d| d.spec.name == spec.name) else {
            self.open(spec)?;
            return Ok(Some(Reply::Done));
        };
        if device.spec == spec {
            device.paused = false;
            device.transport.resume(&mut self.cores);
            tracing::info!(device = spec.name, "resumed");
            return Ok(Some(Reply::Done));
        }
        device.transport.begin_close(&mut self.cores);
        device.next = Some(Next::Reopen {
            seq: Some(seq),
            spec: Box::new(spec),
        });
        Ok(None)
    }

    /// Checks a start against what else exists.
    fn check_start(&self, spec: &DeviceSpec) -> Result<(), Failure> {
        if let Some(device) = self.devices.iter().find(|d| d.spec.name == spec.name) {
            device.idle()?;
            if !device.paused {
                return refuse(
                    Errno::EALREADY,
                    format!("device {} is running already", spec.name),
                );
            }
        }
        let others = || self.devices.iter().filter(|d| d.spec.name != spec.name);
        let used: u32 = others().map(|d| d.spec.queues()).sum();
        let wanted = spec.queues();
        if used.saturating_add(wanted) > MAX_QUEUES_PER_SERVICE {
            let detail = format!(
                "device {} needs {wanted} virtqueues, but {used} of the service's {MAX_QUEUES_PER_SERVICE} are in use",
                spec.name
            );
            return refuse(Errno::ENOSPC, detail);
        }
        if let Attach::Doca { manager, vuid } = &spec.attach {
            self.place(manager, vuid)?;
            let owner = others()
                .find(|d| matches!(&d.spec.attach, Attach::Doca { vuid: v, .. } if v == vuid));
            if let Some(owner) = owner {
                return refuse(
                    Errno::EBUSY,
                    format!("function {vuid} is used by device {}", owner.spec.name),
                );
            }
        }
        Ok(())
    }

    /// Opens a device that has been checked.
    fn open(&mut self, spec: DeviceSpec) -> Result<(), Failure> {
        let backend = match self.fsdevs.get(&spec.fsdev) {
            Some(fsdev) => Some(Arc::new(AnyFsDev::new(fsdev)?)),
            None => {
                tracing::warn!(
                    device = spec.name,
                    fsdev = spec.fsdev,
                    "no such fsdev; mounting will fail until it is created"
                );
                None
            }
        };
        let id = self.next_id();
        let shared = Arc::new(DeviceShared::new(
            Session::new(spec.driver_platform),
            backend,
        ));
        let poller = Arc::clone(&self.poller);
        let mut hot = false;
        let transport = match &spec.attach {
            Attach::Doca { manager, vuid } => {
                let function = self.place(manager, vuid)?;
                hot = function.port.is_some();
                let socket = function.socket(&self.run_dir);
                Transport::open_vfio_user(&spec, id, function, &socket, poller)?
            }
            Attach::VhostUser => {
                let socket = self
                    .run_dir
                    .join("vhost")
                    .join(format!("{}.sock", spec.name));
                Transport::open_vhost_user(&spec, id, &socket, poller)?
            }
        };
        self.cores.attach(id, &spec.name, Arc::clone(&shared));
        tracing::info!(
            device = spec.name,
            tag = spec.tag,
            fsdev = spec.fsdev,
            "started"
        );
        self.devices.push(Device {
            id,
            spec,
            transport,
            shared,
            next: None,
            paused: false,
            connected: false,
            mounted: false,
            hot,
            plug: if hot {
                PlugState::PowerOff
            } else {
                PlugState::PowerOn
            },
            gate: LogGate::new(Instant::now()),
        });
        Ok(())
    }

    /// A fresh id, one whose requests can be counted if there is any.
    fn next_id(&mut self) -> DeviceId {
        for _ in 0..counters::DEVICES {
            self.last_id += 1;
            if self.cores.would_count(DeviceId(self.last_id)) {
                break;
            }
        }
        DeviceId(self.last_id)
    }

    fn device_stop(&mut self, seq: u64, name: &str) -> Result<Option<Reply>, Failure> {
        let device = self.find(name)?;
        device.idle()?;
        if device.paused {
            return refuse(Errno::EALREADY, format!("device {name} is stopped already"));
        }
        device.next = Some(Next::Paused { seq: Some(seq) });
        let index = self.devices.iter().position(|d| d.spec.name == name);
        if let Some(device) = index.and_then(|i| self.devices.get_mut(i)) {
            device.paused = true;
            device.transport.pause(&mut self.cores);
        }
        Ok(None)
    }

    fn device_destroy(&mut self, seq: u64, name: &str) -> Result<Option<Reply>, Failure> {
        let device = self.find(name)?;
        device.idle()?;
        if !device.paused {
            return refuse(
                Errno::EBUSY,
                format!("device {name} is running; stop it first"),
            );
        }
        device.next = Some(Next::Close { seq: Some(seq) });
        let index = self.devices.iter().position(|d| d.spec.name == name);
        if let Some(device) = index.and_then(|i| self.devices.get_mut(i)) {
            device.transport.begin_close(&mut self.cores);
        }
        Ok(None)
    }

    fn find(&mut self, name: &str) -> Result<&mut Device, Failure> {
        let found = self.devices.iter_mut().find(|d| d.spec.name == name);
        found.ok_or_else(|| Failure::new(Errno::ENODEV, format!("device {name} is not started")))
    }

    // ---- what follows from changes ----

    /// Goes on with devices that have become quiet, and reports connections that came or went.
    fn settle(&mut self) {
        for device in &mut self.devices {
            device.notice_changes(&mut self.events);
        }
        while let Some(at) = self
            .devices
            .iter()
            .position(|d| d.next.is_some() && d.transport.is_quiet())
        {
            let Some(next) = self.devices.get_mut(at).and_then(|d| d.next.take()) else {
                break;
            };
            match next {
                Next::Paused { seq } => self.answer(seq, Ok(Reply::Done)),
                Next::Close { seq } => {
                    self.close(at);
                    self.answer(seq, Ok(Reply::Done));
                }
                Next::Reopen { seq, spec } => {
                    self.close(at);
                    let opened = self.open(*spec).map(|()| Reply::Done);
                    self.answer(seq, opened);
                }
            }
        }
    }

    /// Forgets a device that is quiet; its socket goes with its transport.
    fn close(&mut self, at: usize) {
        let mut device = self.devices.remove(at);
        if device.hot {
            device.set_plug(PlugState::PowerOff, &mut self.events);
        }
        if let Some(backend) = device.shared.backend() {
            crate::reactor::Backend::reset(&*backend, &device.shared.session);
        }
        self.cores.detach(device.id);
        tracing::info!(device = device.spec.name, "closed");
    }
}

/// A device as it will be once what it does has been done; a new control plane cannot wait for a slow file system.
fn describe(device: &Device) -> Option<DeviceSnapshot> {
    let (spec, paused) = match &device.next {
        None | Some(Next::Paused { .. }) => (&device.spec, device.paused),
        Some(Next::Reopen { spec, .. }) => (&**spec, false),
        Some(Next::Close { .. }) => return None,
    };
    Some(DeviceSnapshot {
        spec: spec.clone(),
        paused,
        connected: device.connected,
        mounted: device.shared.session.mounted(),
    })
}

impl Device {
    /// Reports a connection or a FUSE session that has come or gone. What changes back in between is not worth a report,
    /// and how often a guest mounts must not decide how much is logged.
    fn notice_changes(&mut self, events: &mut Vec<Event>) {
        let device = &self.spec.name;
        let connected = self.transport.connected();
        if connected != self.connected {
            self.connected = connected;
            events.push(Event::Connected {
                device: device.clone(),
                connected,
            });
        }
        let mounted = self.shared.session.mounted();
        if mounted != self.mounted {
            self.mounted = mounted;
            events.push(Event::Mounted {
                device: device.clone(),
                mounted,
            });
            if let Some(left_out) = self.gate.admit(Instant::now()) {
                tracing::info!(
                    device,
                    tag = self.spec.tag,
                    mounted,
                    left_out,
                    "FUSE session"
                );
            }
        }
        self.follow_plug(events);
    }

    /// Refuses while an earlier command is still under way.
    fn idle(&self) -> Result<(), Failure> {
        let what = match &self.next {
            None => return Ok(()),
            Some(Next::Paused { .. }) => "is being stopped",
            Some(Next::Close { .. }) => "is being destroyed",
            Some(Next::Reopen { .. }) => "is being started",
        };
        refuse(Errno::EALREADY, format!("device {} {what}", self.spec.name))
    }
}
