//! `ferry-dataplane`: the privileged process. Sets up memory, cores and sockets, and then runs the management thread.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use ferry_dataplane::control::Control;
use ferry_dataplane::cores::{
    CoreOptions, CoreSet, DEFAULT_BUFFERS_PER_CORE, DEFAULT_SLOTS_PER_CORE, PollMode, core_memory,
};
use ferry_dataplane::keeper::Keeper;
use ferry_dataplane::os::arena::{Arena, Pages};
use ferry_dataplane::os::cpulock::LOCK_DIR;
use ferry_dataplane::os::fdstore::FdStore;
use ferry_dataplane::os::poller::{Poller, Token};
use ferry_dataplane::os::signal::Signals;
use ferry_dataplane::platform::{Platform, firmware};
use ferry_dataplane::pool::DATA_BUFFER_STRIDE;
use ferry_dataplane::service::Service;
use ferry_shared::affinity::Allowed;
use ferry_shared::cpumask::CpuMask;
use ferry_shared::handshake::server::Listener;
use ferry_shared::limits::MIN_BUFFERS_PER_CORE;
use ferry_shared::logging;

/// A core has something to say.
const CORES: Token = Token {
    device: Token::SERVICE,
    local: 2,
};
/// A signal has come.
const SIGNALS: Token = Token {
    device: Token::SERVICE,
    local: 3,
};

/// The record of the firmware's settings that are in effect.
const FIRMWARE_KEY: &str = "firmware/settings";

/// Serves virtio-fs functions: queues, FUSE and file systems.
#[derive(Debug, Parser)]
#[command(name = "ferry-dataplane", version)]
struct Options {
    /// CPUs to run on, one core each: a hexadecimal mask (0x3) or a list ([0,2-3])
    #[arg(short = 'm', long, value_name = "MASK", default_value = "0x1")]
    cpumask: CpuMask,
    /// Memory for request slots and data buffers of all cores, in MiB [default: 32 data buffers a core]
    #[arg(short = 's', long, value_name = "MIB")]
    mem_size: Option<usize>,
    /// Use normal pages
    #[arg(long)]
    no_huge: bool,
    /// Directory of the sockets
    #[arg(long, value_name = "DIR", default_value = "/run/ferry")]
    run_dir: PathBuf,
    /// What the emulated platform offers [default: one manager mlx5_0 with static functions]
    #[arg(long, value_name = "FILE")]
    platform: Option<PathBuf>,
    /// Settings of the emulated firmware, which `ferry fwconfig` changes; what it says about a manager replaces the firmware
    /// table of the platform file
    #[arg(long, value_name = "FILE", default_value = firmware::DEFAULT_STORE)]
    firmware: PathBuf,
    /// When cores poll
    #[arg(long, value_enum, default_value_t = Poll::Adaptive)]
    poll: Poll,
    /// Whether the cores' CPUs are claimed by lock files in /var/tmp, so that no other service takes them: auto claims
    /// them for cores that always poll, since others can share theirs
    #[arg(long, value_enum, default_value_t = Locks::Auto)]
    cpumask_locks: Locks,
    /// Directory of the lock files
    #[arg(long, value_name = "DIR", default_value = LOCK_DIR)]
    cpumask_locks_dir: PathBuf,
    /// User id that may connect as the control plane, besides root and this process's own
    #[arg(long, value_name = "UID")]
    control_uid: Option<u32>,
    /// Say whether this version can go on with what the service manager keeps of the running one, and end
    #[arg(long)]
    check_recovery: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Locks {
    /// Claim the CPUs of cores that always poll
    Auto,
    /// Claim them
    On,
    /// Claim none
    Off,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Poll {
    /// Poll while there is work, then sleep
    Adaptive,
    /// Always poll
    Busy,
    /// Always sleep when there is nothing to do
    Interrupt,
}

fn main() -> ExitCode {
    let options = Options::parse();
    logging::init("FERRY_LOG");
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> anyhow::Result<()> {
    // Before any thread exists, so that all of them have these signals blocked.
    let signals = Signals::block().context("cannot take signals over")?;
    // Before any descriptor is opened where the service manager says that it has put some.
    let fds = FdStore::from_env();
    raise_fd_limit();
    let keeper = open_keeper(fds)?;
    if options.check_recovery {
        return Ok(());
    }
    let platform = load_platform(&options, &keeper)?;
    let mut listener = Listener::bind(&options.run_dir, options.control_uid)?;
    let run_dir = options
        .run_dir
        .canonicalize()
        .context("cannot resolve the run directory")?;
    for sub in ["pci", "vhost"] {
        let dir = run_dir.join(sub);
        std::fs::create_dir_all(&dir)
            .with_context(|| format!("cannot create {}", dir.display()))?;
    }
    record(&options, &platform, &run_dir, &keeper)?;
    let poller = Arc::new(Poller::new().context("cannot create an epoll instance")?);
    let cpus = options.cpumask.cpus();
    let (mut arena, buffers) = memory(&options, cpus.len())?;
    let mode = match options.poll {
        Poll::Adaptive => PollMode::Adaptive,
        Poll::Busy => PollMode::Busy,
        Poll::Interrupt => PollMode::Interrupt,
    };
    let core_options = CoreOptions {
        cpus: cpus.clone(),
        mode,
        slots: DEFAULT_SLOTS_PER_CORE,
        buffers,
    };
    let cores = CoreSet::start(&core_options, &mut arena).context("cannot start the cores")?;
    keep_off(&cpus);
    let counters = cores.counters_file().try_clone_to_owned();
    listener.share_counters(counters.context("cannot share the counters")?);
    poller.add(cores.event_fd(), CORES)?;
    poller.add(&signals, SIGNALS)?;
    let control = Control::new(listener, Arc::clone(&poller))?;
    let mut service = Service::new(
        platform,
        run_dir.clone(),
        cpus,
        cores,
        Arc::clone(&poller),
        keeper.clone(),
    );
    let limit = options.mem_size.map(|mib| mib.saturating_mul(1 << 20));
    service.limit_memory(limit, !options.no_huge);
    service.keep_cpu_locks_in(options.cpumask_locks_dir);
    let claim = match options.cpumask_locks {
        Locks::Auto => mode == PollMode::Busy,
        chosen => chosen == Locks::On,
    };
    if claim && let Err(failure) = service.lock_cpus(true) {
        anyhow::bail!("{}", failure.detail);
    }
    service.restore();
    keeper.fds().ready();
    tracing::info!(run_dir = %run_dir.display(), cpumask = %options.cpumask, buffers, "ready");
    let watchdog = Watchdog::new(&keeper);
    serve(service, control, &poller, &signals, watchdog)
}

/// Keeps this thread, which has to do with sockets and with control planes that come and go, from taking time of the cores.
fn keep_off(cpus: &[u32]) {
    if let Err(error) = Allowed::now().and_then(|allowed| allowed.keep_off(cpus)) {
        tracing::warn!(%error, "the management thread cannot be kept off the cores' CPUs and may delay requests");
    }
}

/// The service manager's watchdog. It hears from this process only while the management thread and every core go on.
struct Watchdog {
    fds: Arc<FdStore>,
    /// How often it hears of us, at least; a third of the time after which it ends the process.
    period: Option<Duration>,
    next: Instant,
}

impl Watchdog {
    fn new(keeper: &Keeper) -> Watchdog {
        let fds = Arc::clone(keeper.fds());
        Watchdog {
            period: fds.watchdog().map(|limit| limit / 3),
            fds,
            next: Instant::now(),
        }
    }

    /// Feeds it if it is time; gives the time until the next look in milliseconds, or -1.
    fn feed(&mut self, service: &Service) -> i32 {
        let Some(period) = self.period else {
            return -1;
        };
        let now = Instant::now();
        if now >= self.next {
            if service.cores().all_answered() {
                self.fds.feed_watchdog();
                service.cores().ping();
            }
            self.next = now + period;
        }
        let left = self.next.saturating_duration_since(now).as_millis();
        i32::try_from(left).unwrap_or(i32::MAX).saturating_add(1)
    }
}

/// Takes over the state of a former process. Never guesses: one that cannot be read is refused, and stays as it is.
fn open_keeper(fds: Arc<FdStore>) -> anyhow::Result<Keeper> {
    Keeper::open(fds).context(
        "cannot go on with the state of the former process; start the version that wrote it, or stop the service for \
         good, which disconnects its guests",
    )
}

/// The platform that is in effect: what a former process had, if this one goes on with its devices.
fn load_platform(options: &Options, keeper: &Keeper) -> anyhow::Result<Platform> {
    let file = options.platform.as_deref();
    let platform = match keeper.load::<String>(FIRMWARE_KEY) {
        Some(kept) => Platform::resume(file, &kept)?,
        None => Platform::load(file, &options.firmware)?,
    };
    Ok(platform)
}

/// Leaves word of the settings that are in effect, for `ferry fwconfig` and for a later process.
fn record(
    options: &Options,
    platform: &Platform,
    run_dir: &Path,
    keeper: &Keeper,
) -> anyhow::Result<()> {
    let absolute = |path: &Path| std::path::absolute(path);
    let file = options.platform.as_deref().map(absolute).transpose()?;
    let record = platform.record(file.as_deref(), &absolute(&options.firmware)?);
    keeper.save(FIRMWARE_KEY, &record.text());
    let path = run_dir.join(firmware::RECORD);
    record
        .save(&path)
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Gets the memory that all cores work in.
fn memory(options: &Options, cores: usize) -> anyhow::Result<(Arena, u32)> {
    let least = cores * core_memory(DEFAULT_SLOTS_PER_CORE, MIN_BUFFERS_PER_CORE);
    let buffers = match options.mem_size {
        None => DEFAULT_BUFFERS_PER_CORE,
        Some(mib) => {
            let bytes = mib.saturating_mul(1 << 20);
            anyhow::ensure!(
                bytes >= least,
                "--mem-size {mib} is too small for {cores} cores: at least {} MiB are needed",
                least.div_ceil(1 << 20)
            );
            let spare = (bytes / cores).saturating_sub(core_memory(DEFAULT_SLOTS_PER_CORE, 0));
            u32::try_from(spare / DATA_BUFFER_STRIDE).unwrap_or(u32::MAX)
        }
    };
    let bytes = cores * core_memory(DEFAULT_SLOTS_PER_CORE, buffers);
    let arena = Arena::new(bytes, !options.no_huge)
        .with_context(|| format!("cannot map {} MiB of memory", bytes.div_ceil(1 << 20)))?;
    if arena.pages() == Pages::Normal && !options.no_huge {
        tracing::warn!(
            "no {} hugepages of 2 MiB are free: running on normal pages, slower; reserve them with \
             `sysctl vm.nr_hugepages={0}`, or say --no-huge",
            bytes.div_ceil(2 << 20)
        );
    }
    Ok((arena, buffers))
}

/// Inodes and open files take descriptors: as many as the system allows.
fn raise_fd_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// How long the management thread may sleep, in ms; -1: for ever.
fn wait_ms(service: &Service) -> i32 {
    match service.quiet_for() {
        None => -1,
        // Not before it is due.
        Some(time) => i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX),
    }
}

/// The shorter of two times in milliseconds, of which -1 is for ever.
fn sooner(a: i32, b: i32) -> i32 {
    if a < 0 || b < 0 { a.max(b) } else { a.min(b) }
}

/// The management thread: sockets, commands, and what the cores report. It never waits for a guest or a file.
fn serve(
    mut service: Service,
    mut control: Control,
    poller: &Poller,
    signals: &Signals,
    mut watchdog: Watchdog,
) -> anyhow::Result<()> {
    let mut ready = Vec::new();
    loop {
        let limit = watchdog.feed(&service);
        service.drain_cores();
        service.tick();
        if control.take_ended() {
            service.forget_caller();
        }
        let commands = control.commands();
        let more = !commands.is_empty();
        for (seq, command) in commands {
            service.command(seq, command);
        }
        // These commands may have been the last of a connection that broke the rules behind them.
        if control.take_ended() {
            service.forget_caller();
        }
        control.send(service.take_answers(), service.take_events());
        if more {
            continue;
        }
        let limit = if control.prepare_sleep() && service.cores().prepare_sleep() {
            sooner(limit, wait_ms(&service))
        } else {
            0
        };
        poller.wait(&mut ready, limit).context("epoll failed")?;
        service.cores().awake();
        control.wake();
        for &token in &ready {
            match token {
                Control::LISTENER => control.accept(),
                Control::CONNECTION | CORES => {}
                SIGNALS => {
                    if signals.take() {
                        tracing::info!("stopping");
                        service.shut_down();
                        return Ok(());
                    }
                }
                device => service.ready(device),
            }
        }
    }
}
