//! The process's state: the model, the link to the data plane and the phase of the start, and the one entry through
//! which every request comes, whether from a socket, a script or a configuration file.
//!
//! Everything runs on one thread. No borrow of the model lives across an await.

use core::cell::Cell;
use core::cell::Ref;
use core::cell::RefCell;
use core::cell::RefMut;
use std::rc::Rc;

use ferry_shared::affinity::Allowed;
use ferry_shared::counters::Counters;
use ferry_shared::errno::Errno;
use ferry_shared::logging;
use ferry_shared::msg::Command;
use ferry_shared::msg::Event;
use ferry_shared::msg::Failure;
use ferry_shared::msg::Item;
use ferry_shared::msg::PlugState;
use ferry_shared::msg::Reply;
use ferry_shared::msg::Tuning;
use serde_json::Value;
use tokio::sync::Notify;
use tokio::sync::watch;

use crate::dataplane::Link;
use crate::model::Model;
use crate::model::Step;
use crate::model::Wishes;
use crate::rpc::Baselines;
use crate::rpc::LogSettings;
use crate::rpc::Notifications;
use crate::rpc::RpcError;
use crate::rpc::decode;
use crate::rpc::decode::Params;
use crate::rpc::table;
use crate::rpc::table::Handler;
use crate::rpc::table::Method;
use crate::rpc::table::When;
use crate::state::StateError;
use crate::state::StateV1;
use crate::state::Store;

/// A part of the service that can be disabled before the start.
pub struct Subsystem {
    /// Its name, with which the names of its methods begin, or end if it is the scheduler.
    pub name: &'static str,
    /// Subsystems that it needs.
    pub depends_on: &'static [&'static str],
}

/// The subsystems, in the order of their dependencies.
pub const SUBSYSTEMS: [Subsystem; 4] = [
    Subsystem {
        name: "scheduler",
        depends_on: &[],
    },
    Subsystem {
        name: "iobuf",
        depends_on: &[],
    },
    Subsystem {
        name: "fsdev",
        depends_on: &[],
    },
    Subsystem {
        name: "virtio_fs",
        depends_on: &["fsdev"],
    },
];

/// How far the start has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Before `framework_start_init`.
    Startup,
    /// Requests are served; the data plane is awaited and the initial configuration applied.
    Running,
    /// The data plane has been there and the initial configuration is applied.
    Ready,
}

/// The control plane.
pub struct App {
    model: RefCell<Model>,
    /// The link, or why there is none.
    link: RefCell<Result<Rc<dyn Link>, String>>,
    /// Whether there is a link; `None` before the first attempt has ended.
    linked: watch::Sender<Option<bool>>,
    /// Whether somebody makes attempts.
    connecting: Cell<bool>,
    /// Asks for an attempt without delay.
    impatient: Notify,
    phase: watch::Sender<Phase>,
    /// Whether `framework_start_init` is at work.
    initialising: Cell<bool>,
    disabled: RefCell<Vec<&'static str>>,
    allowed: Option<Vec<String>>,
    /// Where the state is kept, if it is.
    store: RefCell<Option<Store>>,
    /// Whether the model may differ from what is kept.
    dirty: Cell<bool>,
    /// The CPUs to choose from, if the process keeps off those of the data plane's cores.
    cpus: Cell<Option<Allowed>>,
    log: RefCell<LogSettings>,
    notifications: RefCell<Notifications>,
    baselines: RefCell<Baselines>,
    /// Tells that the data plane has reported something.
    news: watch::Sender<()>,
    turn: tokio::sync::Mutex<()>,
    /// Whether an operator has asked for the end of the service.
    pub(crate) end_asked: Cell<bool>,
}

impl App {
    /// A control plane that answers the methods of `allowed` only, or all, and has not seen its data plane.
    pub fn new(allowed: Option<Vec<String>>) -> Rc<App> {
        Rc::new(App {
            model: RefCell::default(),
            link: RefCell::new(Err("no attempt to connect has been made yet".to_owned())),
            linked: watch::Sender::new(None),
            connecting: Cell::new(false),
            impatient: Notify::new(),
            phase: watch::Sender::new(Phase::Startup),
            initialising: Cell::new(false),
            disabled: RefCell::default(),
            allowed,
            store: RefCell::default(),
            dirty: Cell::new(false),
            cpus: Cell::default(),
            log: RefCell::default(),
            notifications: RefCell::default(),
            baselines: RefCell::default(),
            news: watch::Sender::default(),
            turn: tokio::sync::Mutex::default(),
            end_asked: Cell::new(false),
        })
    }

    /// Whether an operator has asked by RPC for the end of the service.
    pub fn is_end_asked(&self) -> bool {
        self.end_asked.get()
    }

    /// Begins with what was kept.
    pub fn restore(&self, state: StateV1) -> Result<(), Failure> {
        for name in &state.disabled {
            let known = SUBSYSTEMS.iter().find(|subsystem| subsystem.name == name);
            let unknown = || Failure::new(Errno::EINVAL, format!("there is no subsystem {name:?}"));
            self.set_enabled(known.ok_or_else(unknown)?.name, false);
        }
        *self.model_mut() = Model::restore(state)?;
        Ok(())
    }

    /// From now on every accepted change is kept before it is acknowledged.
    pub fn keep_in(&self, store: Store) {
        *self.store.borrow_mut() = Some(store);
    }

    /// From now on the calling thread keeps off the CPUs of the data plane's cores, whose requests it must not delay.
    pub fn keep_off_cores(&self) -> nix::Result<()> {
        self.cpus.set(Some(Allowed::now()?));
        Ok(())
    }

    fn leave_cores(&self, items: &[Item]) {
        let service = items.iter().find_map(|item| match item {
            Item::Service(service) => Some(service),
            _ => None,
        });
        if let (Some(cpus), Some(service)) = (self.cpus.get(), service)
            && let Err(error) = cpus.keep_off(&service.cores)
        {
            tracing::warn!(%error, "cannot keep off the CPUs of the data plane's cores");
        }
    }

    /// Keeps what has changed. Without a store there is nothing to do.
    pub fn keep(&self) -> Result<(), StateError> {
        if !self.dirty.get() {
            return Ok(());
        }
        if let Some(store) = self.store.borrow_mut().as_mut() {
            let mut state = self.model().stored();
            let disabled = self.disabled.borrow();
            state.disabled = disabled.iter().map(|name| (*name).to_owned()).collect();
            store.save(&state)?;
        }
        self.dirty.set(false);
        Ok(())
    }

    /// Keeps what a request has changed. If that fails, success becomes a failure: nothing may be acknowledged that a
    /// restart would forget.
    fn kept(&self, answer: Result<Value, RpcError>) -> Result<Value, RpcError> {
        let Err(error) = self.keep() else {
            return answer;
        };
        tracing::error!(%error, "the state is not kept");
        answer.and_then(|_| {
            let detail = format!(
                "the change is in effect and would be lost in a restart: {error}; then repeat any request that changes something"
            );
            Err(Failure::new(Errno::EIO, detail).into())
        })
    }

    /// The model, to read.
    pub fn model(&self) -> Ref<'_, Model> {
        self.model.borrow()
    }

    /// The model, to change.
    pub fn model_mut(&self) -> RefMut<'_, Model> {
        self.dirty.set(true);
        self.model.borrow_mut()
    }

    /// Leaves the startup state. A data plane that is there first gets what it lacks.
    pub async fn start_init(&self) -> Result<(), Failure> {
        if self.initialising.replace(true) {
            let detail = "the initialisation is under way; wait for it with framework_wait_init";
            return Err(Failure::new(Errno::EALREADY, detail));
        }
        loop {
            let link = self.link.borrow().clone();
            let Ok(link) = link else {
                break;
            };
            if let Ok(items) = snapshot(&*link).await {
                self.reconcile(&*link, items).await;
            }
            // A data plane that has come meanwhile has been given nothing yet.
            if matches!(&*self.link.borrow(), Ok(current) if Rc::ptr_eq(current, &link)) {
                break;
            }
        }
        self.initialising.set(false);
        self.advance(Phase::Running);
        Ok(())
    }

    /// Moves the start on; never back.
    pub fn advance(&self, phase: Phase) {
        self.phase.send_if_modified(|current| {
            let later = phase > *current;
            *current = phase.max(*current);
            later
        });
    }

    /// Waits until the start has come so far.
    pub async fn reached(&self, phase: Phase) {
        let mut receiver = self.phase.subscribe();
        // The sender lives in `self`, so the channel cannot be closed.
        let _ = receiver.wait_for(|current| *current >= phase).await;
    }

    /// Waits until the data plane is there.
    pub async fn linked(&self) {
        let mut receiver = self.linked.subscribe();
        let _ = receiver.wait_for(|linked| *linked == Some(true)).await;
    }

    /// Waits until it is known that the data plane is not there.
    #[cfg(test)]
    pub(crate) async fn unlinked(&self) {
        let mut receiver = self.linked.subscribe();
        let _ = receiver.wait_for(|linked| *linked == Some(false)).await;
    }

    /// Waits until the first attempt to reach the data plane has ended.
    pub async fn attempted(&self) {
        let mut receiver = self.linked.subscribe();
        let _ = receiver.wait_for(Option::is_some).await;
    }

    /// Whether a subsystem is enabled.
    pub fn is_enabled(&self, subsystem: &str) -> bool {
        !self.disabled.borrow().contains(&subsystem)
    }

    pub(crate) fn set_enabled(&self, subsystem: &'static str, enabled: bool) {
        let mut disabled = self.disabled.borrow_mut();
        disabled.retain(|name| *name != subsystem);
        if !enabled {
            disabled.push(subsystem);
        }
        self.dirty.set(true);
    }

    /// Whether a method exists for clients: allowed, and not of a disabled subsystem.
    pub(crate) fn offers(&self, method: &Method) -> bool {
        let allowed = match &self.allowed {
            None => true,
            Some(names) => names.iter().any(|name| name == method.name),
        };
        let of = |subsystem: &&str| match *subsystem {
            "scheduler" => method.name.ends_with("_scheduler"),
            other => {
                let rest = method.name.strip_prefix(other);
                rest.is_some_and(|rest| rest.starts_with('_'))
            }
        };
        allowed && !self.disabled.borrow().iter().any(of)
    }

    /// Whether a method may be called in the present state.
    pub(crate) fn check_state(&self, method: &Method) -> Result<(), RpcError> {
        let startup = *self.phase.borrow() == Phase::Startup;
        let text = match method.when {
            When::Startup if !startup => {
                "Method may only be called before framework is initialized. Use --wait-for-rpc command line parameter \
                 and then issue this RPC before the framework_start_init RPC."
            }
            When::Runtime if startup => {
                "Method may only be called after framework is initialized using framework_start_init RPC."
            }
            When::Startup | When::Runtime | When::Always => return Ok(()),
        };
        Err(RpcError::new(RpcError::INVALID_STATE, text))
    }

    /// Finds a method that the server answers.
    pub fn find(&self, name: &str) -> Result<&'static Method, RpcError> {
        table::find(name)
            .filter(|method| method.is_remote() && self.offers(method))
            .ok_or_else(|| {
                RpcError::new(
                    RpcError::METHOD_NOT_FOUND,
                    format!("Method not found: {name}"),
                )
            })
    }

    /// Answers one request. The work goes on when the caller loses interest.
    pub async fn call(self: &Rc<App>, name: &str, params: &Params) -> Result<Value, RpcError> {
        let method = self.find(name)?;
        self.check_state(method)?;
        let args = decode::decode(method, params)?;
        if method.dataplane || matches!(method.handler, Handler::Later(_)) {
            self.look_again().await;
        }
        if method.dataplane {
            self.link()?;
        }
        match method.handler {
            Handler::Now(answer) => {
                let answer = answer(self, &args);
                self.kept(answer)
            }
            Handler::Later(answer) | Handler::Detached(answer) => {
                let app = Rc::clone(self);
                let work = tokio::task::spawn_local(async move {
                    let answer = answer(Rc::clone(&app), args).await;
                    app.kept(answer)
                });
                work.await.unwrap_or_else(|error| {
                    tracing::error!(method = method.name, %error, "the handler of a method has failed");
                    Err(RpcError::new(RpcError::INTERNAL_ERROR, format!("Internal error: {name} has failed")))
                })
            }
            Handler::Client(_) => Err(RpcError::new(
                RpcError::METHOD_NOT_FOUND,
                format!("Method not found: {name}"),
            )),
        }
    }

    /// While there is no link, waits for one more attempt, so that a request which follows the start of the data plane
    /// finds it.
    async fn look_again(&self) {
        if self.link.borrow().is_err() && self.connecting.get() {
            let mut attempts = self.linked.subscribe();
            self.impatient.notify_one();
            // The sender lives in `self`, so the channel cannot be closed.
            let _ = attempts.changed().await;
        }
    }

    /// Resolves when a request would have an attempt made now; whoever calls this makes it.
    pub async fn impatience(&self) {
        self.connecting.set(true);
        self.impatient.notified().await;
    }

    fn link(&self) -> Result<Rc<dyn Link>, Failure> {
        self.link
            .borrow()
            .clone()
            .map_err(|why| Failure::new(Errno::ENODEV, format!("data plane is not running: {why}")))
    }

    /// Waits for its turn among the requests that read something of the data plane and write it back changed.
    pub async fn turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Sends a command that concerns no object of the model.
    pub async fn send(&self, command: Command) -> Result<Reply, Failure> {
        let link = self.link()?;
        link.call(command).await
    }

    /// Asks how the data plane works.
    pub async fn tuning(&self) -> Result<Tuning, Failure> {
        let link = self.link()?;
        tuning(&*link).await
    }

    /// Whether there is a data plane to send to.
    pub fn is_linked(&self) -> bool {
        self.link.borrow().is_ok()
    }

    /// What is logged.
    pub fn log_settings(&self) -> LogSettings {
        self.log.borrow().clone()
    }

    /// Has both processes log as told; a data plane that is not there is told when it comes.
    pub async fn set_log(&self, settings: LogSettings) -> Result<(), Failure> {
        let spec = settings.spec();
        let link = self.link.borrow().clone();
        if let Ok(link) = link {
            link.call(Command::SetLog(spec.clone())).await?;
        }
        logging::set(&spec)?;
        *self.log.borrow_mut() = settings;
        Ok(())
    }

    /// The counters of the data plane's cores.
    pub fn counters(&self) -> Result<Rc<Counters>, Failure> {
        self.link()?.counters().ok_or_else(|| {
            Failure::new(
                Errno::ENODATA,
                "the data plane has given no counters to read",
            )
        })
    }

    /// Where counting began anew for those who asked for that.
    pub fn baselines(&self) -> RefMut<'_, Baselines> {
        self.baselines.borrow_mut()
    }

    /// What has happened.
    pub fn notifications(&self) -> Ref<'_, Notifications> {
        self.notifications.borrow()
    }

    fn notify(&self, kind: &'static str, about: &str) {
        self.notifications.borrow_mut().push(kind, about);
    }

    fn notify_of(&self, command: &Command) {
        match command {
            Command::FsdevCreate(spec) => self.notify("fsdev_register", &spec.name),
            Command::FsdevDelete { name } => self.notify("fsdev_unregister", name),
            Command::DeviceStart(spec) => self.notify("virtio_fs_device_start", &spec.name),
            Command::DeviceStop { name } => self.notify("virtio_fs_device_stop", name),
            Command::DeviceDestroy { name } => self.notify("virtio_fs_device_destroy", name),
            Command::FunctionDestroy { vuid, .. } => {
                self.notify("virtio_fs_function_destroy", vuid);
            }
            _ => {}
        }
    }

    /// Sends what a step needs to the data plane and records the outcome.
    pub async fn carry_out(&self, step: Step) -> Result<Reply, Failure> {
        let Step::Send(ticket) = step else {
            return Ok(Reply::Done);
        };
        let outcome = self.send(ticket.command.clone()).await;
        if let Ok(reply) = &outcome {
            self.notify_of(&ticket.command);
            self.take_function(reply);
        }
        self.model_mut().finish(*ticket, outcome.is_ok());
        outcome
    }

    /// Records a function that a command has created.
    fn take_function(&self, reply: &Reply) {
        if let Reply::Function(function) = reply {
            self.notify("virtio_fs_function_create", &function.vuid);
            self.model_mut().function_created(function.clone());
        }
    }

    /// Takes note that there is no data plane.
    pub fn disconnected(&self, why: String) {
        *self.link.borrow_mut() = Err(why);
        self.linked.send_replace(Some(false));
    }

    /// Sends requests to a data plane from now on. Once the startup state has been left, the data plane first gets what
    /// it lacks; before that, `framework_start_init` sees to it.
    pub async fn connected(&self, link: Rc<dyn Link>) -> Result<(), Failure> {
        let settings = self.log_settings();
        if settings != LogSettings::default() {
            link.call(Command::SetLog(settings.spec())).await?;
        }
        let items = snapshot(&*link).await?;
        self.leave_cores(&items);
        // Nothing is awaited between this and the taking of the link, so the start cannot pass in between.
        if *self.phase.borrow() == Phase::Startup {
            self.model.borrow_mut().note_platform(&items);
        } else {
            self.reconcile(&*link, items).await;
        }
        // Another data plane counts from zero.
        self.baselines().clear();
        self.notify("dataplane_connect", &self.model().platform().run_dir);
        *self.link.borrow_mut() = Ok(link);
        self.linked.send_replace(Some(true));
        Ok(())
    }

    /// Takes over what the data plane has, and issues what it lacks.
    async fn reconcile(&self, link: &dyn Link, items: Vec<Item>) {
        let adopted = self.model_mut().adopt(items);
        if !adopted.objects.is_empty() {
            tracing::info!(
                objects = adopted.objects.join(", "),
                "took over what the data plane has"
            );
        }
        for Failure { errno, detail } in adopted.impossible {
            tracing::error!(%errno, detail, "cannot issue again what the data plane lacks");
        }
        self.issue_wishes(link).await;
        for ticket in adopted.missing {
            let done = self.issue_missing(link, &ticket.command).await;
            self.model_mut().finish_missing(ticket, done);
        }
        if let Err(error) = self.keep() {
            tracing::error!(%error, "the state is not kept");
        }
    }

    /// Has the data plane work as wanted. What it refuses stays wanted.
    async fn issue_wishes(&self, link: &dyn Link) {
        let wishes = self.model().wishes();
        if wishes == Wishes::default() {
            return;
        }
        let tuning = match tuning(link).await {
            Ok(tuning) => tuning,
            Err(Failure { errno, detail }) => {
                return tracing::error!(%errno, detail, "cannot ask how the data plane works");
            }
        };
        let cores = self.model().platform().cores;
        let pools = wishes.pools(tuning.pools);
        let mut commands = Vec::new();
        if pools.per_core(cores) != tuning.pools.per_core(cores) && self.is_enabled("iobuf") {
            commands.push(Command::SetPools(pools));
        }
        let scheduler = wishes
            .scheduler
            .filter(|wanted| *wanted != tuning.scheduler);
        if self.is_enabled("scheduler") {
            commands.extend(scheduler.map(Command::SetScheduler));
        }
        for command in commands {
            match link.call(command.clone()).await {
                Ok(_) => tracing::info!(?command, "issued again what the data plane lacked"),
                Err(Failure { errno, detail }) => {
                    tracing::error!(?command, %errno, detail, "the data plane does not work as wanted");
                }
            }
        }
    }

    async fn issue_missing(&self, link: &dyn Link, command: &Command) -> bool {
        let subsystem = match command {
            Command::FsdevCreate(_) => "fsdev",
            _ => "virtio_fs",
        };
        if !self.is_enabled(subsystem) {
            tracing::info!(?command, subsystem, "not issued: its subsystem is disabled");
            return false;
        }
        match link.call(command.clone()).await {
            Ok(reply) => {
                self.notify_of(command);
                self.take_function(&reply);
                tracing::info!(?command, "issued again what the data plane lacked");
                true
            }
            Err(Failure { errno, detail }) => {
                tracing::error!(?command, %errno, detail, "cannot issue again what the data plane lacks");
                false
            }
        }
    }

    /// Waits until the model is as wanted after a report of the data plane, or the data plane has gone.
    pub async fn reported(&self, wanted: impl Fn(&Model) -> bool) -> Result<(), Failure> {
        let mut news = self.news.subscribe();
        let mut linked = self.linked.subscribe();
        loop {
            if wanted(&self.model()) {
                return Ok(());
            }
            self.link()?;
            tokio::select! {
                // The senders live in `self`, so the channels cannot be closed.
                _ = news.changed() => {}
                _ = linked.changed() => {}
            }
        }
    }

    /// Takes a report of the data plane.
    pub fn event(&self, event: Event) {
        tracing::debug!(?event, "data plane");
        match &event {
            Event::Connected { device, connected } => {
                let kind = if *connected {
                    "virtio_fs_connect"
                } else {
                    "virtio_fs_disconnect"
                };
                self.notify(kind, device);
            }
            Event::Mounted { device, mounted } => {
                let kind = if *mounted {
                    "virtio_fs_mount"
                } else {
                    "virtio_fs_umount"
                };
                self.notify(kind, device);
            }
            Event::Plug { vuid, state, .. } => {
                let kind = match state {
                    PlugState::PowerOff => "virtio_fs_power_off",
                    PlugState::PlugInProgress => "virtio_fs_plug_in_progress",
                    PlugState::PowerOn => "virtio_fs_power_on",
                    PlugState::UnplugInProgress => "virtio_fs_unplug_in_progress",
                };
                self.notify(kind, vuid);
            }
        }
        // None of it is kept, so this leaves `dirty` alone.
        self.model.borrow_mut().event(event);
        self.news.send_replace(());
    }
}

/// Asks how the data plane works.
pub(crate) async fn tuning(link: &dyn Link) -> Result<Tuning, Failure> {
    match link.call(Command::Tuning).await? {
        Reply::Tuning(tuning) => Ok(tuning),
        _ => Err(Failure::new(
            Errno::EPROTO,
            "the data plane has answered with something else than how it works",
        )),
    }
}

async fn snapshot(link: &dyn Link) -> Result<Vec<Item>, Failure> {
    let mut all = Vec::new();
    let mut from = 0;
    loop {
        let Reply::Snapshot { items, next } = link.call(Command::Snapshot { from }).await? else {
            return Err(Failure::new(
                Errno::EPROTO,
                "the data plane has answered a snapshot with something else",
            ));
        };
        all.extend(items);
        match next {
            None => return Ok(all),
            Some(next) if next > from => from = next,
            Some(next) => {
                let detail = format!(
                    "the data plane's snapshot does not end: page {next} follows page {from}"
                );
                return Err(Failure::new(Errno::EPROTO, detail));
            }
        }
    }
}
