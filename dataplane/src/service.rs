//! What exists in this process: file-system devices, functions, started devices. The management thread's state.
//!
//! Every change is checked completely before anything is touched, so a refused command has changed nothing. Commands that
//! have to wait for the cores leave a note with the device and are answered when the device has got there.

mod handover;
mod plug;
mod tune;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use ferry_shared::counters;
use ferry_shared::errno::Errno;
use ferry_shared::limits::{MAX_QUEUES_PER_SERVICE, NAME_LEN};
use ferry_shared::logging;
use ferry_shared::msg::{
    Attach, Command, DeviceSnapshot, DeviceSpec, Event, Failure, FsdevKind, FsdevSpec, Item,
    PlugState, Reply, Service as Facts,
};
use serde::{Deserialize, Serialize};

use self::plug::Ports;
use crate::cores::CoreSet;
use crate::fsdev::registry::AnyFsDev;
use crate::fuse::session::Session;
use crate::id::{CoreEvent, DeviceId};
use crate::keeper::Keeper;
use crate::os::poller::{Poller, Token};
use crate::platform::Platform;
use crate::reactor::DeviceShared;
use crate::recovery::journal::Lines;
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
    keeper: Keeper,
    tuned: tune::Tuned,
}

/// A started device as it is kept for a later process.
#[derive(Serialize, Deserialize)]
struct DeviceV1 {
    spec: DeviceSpec,
    paused: bool,
    plug: PlugState,
}

fn fsdev_key(name: &str) -> String {
    format!("fsdev/{name}")
}

fn session_name(id: DeviceId) -> String {
    format!("session/{}", id.0)
}

fn journal_name(id: DeviceId) -> String {
    format!("journal/{}", id.0)
}

fn device_key(id: DeviceId) -> String {
    format!("device/{}", id.0)
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
        keeper: Keeper,
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
            keeper,
            tuned: tune::Tuned::default(),
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
            Command::Tuning => Ok(Some(self.tuning())),
            Command::SetPools(pools) => self.set_pools(pools).map(Some),
            Command::SetScheduler(scheduler) => self.set_scheduler(scheduler).map(Some),
            Command::PlaceThread { thread, cpus } => self.place_thread(seq, thread, &cpus),
            Command::SetTrace { mask } => {
                self.cores.set_trace_mask(mask);
                Ok(Some(Reply::Done))
            }
            Command::LockCpus { lock } => self.lock_cpus(lock).map(Some),
            Command::CountContextSwitches { count } => Ok(Some(self.monitor_switches(count))),
            Command::PciDevices { from } => Ok(Some(self.pci_devices(from))),
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
        self.tuned.leaving.clear();
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
        drop(AnyFsDev::new(self.resolved(&spec)?)?);
        for device in self.devices.iter().filter(|d| d.spec.fsdev == spec.name) {
            let name = device.id.0.to_string();
            let (backend, _) = AnyFsDev::lasting(self.resolved(&spec)?, &name, &self.keeper)?;
            device.shared.set_backend(Some(Arc::new(backend)));
        }
        tracing::info!(fsdev = spec.name, "created");
        self.keeper.save(&fsdev_key(&spec.name), &spec);
        self.fsdevs.insert(spec.name.clone(), spec);
        Ok(())
    }

    /// Makes the backend of an fsdev for one device. One that hands everything on is what it hands on to.
    fn resolved<'a>(&'a self, mut spec: &'a FsdevSpec) -> Result<&'a FsdevSpec, Failure> {
        while let FsdevKind::Passthru { base } = &spec.kind {
            // What is handed on to is older, so this ends.
            let Some(below) = self.fsdevs.get(base) else {
                let detail = format!(
                    "fsdev {} hands on to fsdev {base}, which does not exist",
                    spec.name
                );
                return refuse(Errno::ENODEV, detail);
            };
            spec = below;
        }
        Ok(spec)
    }

    fn fsdev_delete(&mut self, name: &str) -> Result<(), Failure> {
        if !self.fsdevs.contains_key(name) {
            return refuse(Errno::ENODEV, format!("there is no fsdev {name}"));
        }
        let on_it =
            |spec: &&FsdevSpec| matches!(&spec.kind, FsdevKind::Passthru { base } if base == name);
        if let Some(above) = self.fsdevs.values().find(on_it) {
            let detail = format!(
                "fsdev {} hands on to fsdev {name}; delete it first",
                above.name
            );
            return refuse(Errno::EBUSY, detail);
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
            if let Some(backend) = device.shared.backend() {
                backend.discard();
            }
            device.shared.set_backend(None);
        }
        self.fsdevs.remove(name);
        self.keeper.forget(&fsdev_key(name));
        tracing::info!(fsdev = name, "deleted");
        Ok(())
    }

    fn device_start(&mut self, seq: u64, spec: DeviceSpec) -> Result<Option<Reply>, Failure> {
        spec.check()?;
        self.check_start(&spec)?;
        let Some(device) = self.devices.iter_mut().find(|d| d.spec.name == spec.name) else {
            let id = self.next_id();
            self.open(id, spec, false)?;
            return Ok(Some(Reply::Done));
        };
        if device.spec == spec {
            device.paused = false;
            device.save(&self.keeper);
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

    /// Opens a device that has been checked, or goes on with it if a former process has left it.
    fn open(&mut self, id: DeviceId, spec: DeviceSpec, paused: bool) -> Result<(), Failure> {
        let former: Option<DeviceV1> = self.keeper.load(&device_key(id));
        let adopted = former.is_some();
        // A new device is plugged when somebody asks for that.
        let plug = former.map_or(PlugState::PowerOff, |device| device.plug);
        let name = id.0.to_string();
        let lasting = |fsdev| {
            self.resolved(fsdev)
                .and_then(|fsdev| AnyFsDev::lasting(fsdev, &name, &self.keeper))
        };
        let mut goes_on = false;
        let backend = match self.fsdevs.get(&spec.fsdev).map(lasting) {
            Some(Ok((backend, there))) => {
                goes_on = there;
                Some(Arc::new(backend))
            }
            Some(Err(failure)) if adopted => {
                tracing::error!(
                    device = spec.name,
                    fsdev = spec.fsdev,
                    errno = %failure.errno,
                    detail = failure.detail,
                    "the export is gone; requests fail until the fsdev is deleted and created again"
                );
                None
            }
            Some(Err(failure)) => return Err(failure),
            None => {
                tracing::warn!(
                    device = spec.name,
                    fsdev = spec.fsdev,
                    "no such fsdev; mounting will fail until it is created"
                );
                None
            }
        };
        let record = self.keeper.words(&session_name(id), Session::RECORD);
        let session = Session::recorded(spec.driver_platform, record);
        match &backend {
            Some(backend) if goes_on => backend.resume(&session),
            // The tables are new, and what the record tells of has ended.
            Some(_) => session.forget_record(),
            None => {}
        }
        // Without a service manager there is no next process to read them.
        let lines = self.keeper.is_on().then(|| {
            let words = self.keeper.words(&journal_name(id), Lines::WORDS);
            let life = self.keeper.region().map_or(0, |region| region.generation());
            words.map(|words| Lines::new(words, life))
        });
        let shared = DeviceShared::new(session, backend).noting(lines.flatten());
        let shared = Arc::new(shared);
        let poller = Arc::clone(&self.poller);
        let mut hot = false;
        let keeper = &self.keeper;
        let transport = match &spec.attach {
            Attach::Doca { manager, vuid } => {
                let function = self.place(manager, vuid)?;
                hot = function.port.is_some();
                let offered = !hot || plug::is_offered(plug);
                let socket = function.socket(&self.run_dir);
                Transport::open_vfio_user(&spec, id, function, &socket, offered, poller, keeper)?
            }
            Attach::VhostUser => {
                let socket = self
                    .run_dir
                    .join("vhost")
                    .join(format!("{}.sock", spec.name));
                Transport::open_vhost_user(&spec, id, &socket, poller, keeper)?
            }
        };
        self.cores.attach(id, &spec.name, Arc::clone(&shared));
        tracing::info!(
            device = spec.name,
            tag = spec.tag,
            fsdev = spec.fsdev,
            "started"
        );
        let mut device = Device {
            id,
            spec,
            transport,
            shared,
            next: None,
            paused,
            connected: false,
            mounted: false,
            hot,
            plug: if hot { plug } else { PlugState::PowerOn },
            gate: LogGate::new(Instant::now()),
        };
        device.save(&self.keeper);
        if paused {
            device.transport.pause(&mut self.cores);
        }
        device.transport.adopt(&mut self.cores);
        self.devices.push(device);
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
            device.save(&self.keeper);
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
        self.settle_moves();
        for device in &mut self.devices {
            device.notice_changes(&self.keeper, &mut self.events);
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
                    let id = self.next_id();
                    let opened = self.open(id, *spec, false).map(|()| Reply::Done);
                    self.answer(seq, opened);
                }
            }
        }
    }

    /// Forgets a device that is quiet; its socket goes with its transport.
    fn close(&mut self, at: usize) {
        let mut device = self.devices.remove(at);
        if device.hot {
            device.set_plug(PlugState::PowerOff, &self.keeper, &mut self.events);
        }
        if let Some(backend) = device.shared.backend() {
            crate::reactor::Backend::reset(&*backend, &device.shared.session);
            backend.discard();
        }
        self.cores.detach(device.id);
        self.keeper.forget(&device_key(device.id));
        self.keeper.forget_words(&session_name(device.id));
        self.keeper.forget_words(&journal_name(device.id));
        device.transport.forget();
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
    /// Keeps it for a later process.
    fn save(&self, keeper: &Keeper) {
        let saved = DeviceV1 {
            spec: self.spec.clone(),
            paused: self.paused,
            plug: self.plug,
        };
        keeper.save(&device_key(self.id), &saved);
    }

    /// Reports a connection or a FUSE session that has come or gone. What changes back in between is not worth a report,
    /// and how often a guest mounts must not decide how much is logged.
    fn notice_changes(&mut self, keeper: &Keeper, events: &mut Vec<Event>) {
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
        self.follow_plug(keeper, events);
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
