//! `ferry mount`: a function of the service, mounted on this host without a virtual machine.
//!
//! A bridge between the kernel's FUSE, which asks through `/dev/fuse`, and the virtqueues of a virtio-fs device. It
//! understands no more of FUSE than it must ([`request`]): requests and replies pass as they are. One [`worker`] per request
//! queue moves them; the [`supervisor`] watches signals and the device, and cleans up.

mod discover;
mod hiprio;
mod kernel;
mod request;
mod session;
mod slots;
mod supervisor;
mod worker;

use std::fs::File;
use std::io::Write;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ferry_dataplane::os::eventfd::EventFd;
use nix::sys::signalfd::SignalFd;

use crate::driver::{Device, DmaMemory, Pages, Protocol, Queues, Setup};
use hiprio::Hiprio;
use kernel::{Mount, Options};
use session::Watch;
use slots::Slots;
use supervisor::Supervisor;
use worker::{Shared, Worker};

/// The command line of `ferry mount`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The function's socket, vfio-user or vhost-user (not with --tag alone), and the directory to mount it on
    #[arg(value_names = ["SOCKET", "DIR"], num_args = 1..=2, required = true)]
    paths: Vec<PathBuf>,
    /// The file system's tag: looks for it among the sockets of --run-dir, or checks the one at SOCKET
    #[arg(long)]
    tag: Option<String>,
    /// The service's run directory, where --tag looks
    #[arg(long, value_name = "DIR", default_value = "/run/ferry")]
    run_dir: PathBuf,
    /// The protocol of SOCKET, instead of finding out
    #[arg(long, value_enum)]
    transport: Option<Protocol>,
    /// Request queues to use [default: as many as the device and this host's processors allow]
    #[arg(long, value_name = "N")]
    queues: Option<u16>,
    /// Entries of each virtqueue, at most as many as the device has
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u16).range(2..=1024))]
    queue_size: u16,
    /// Longest time to wait for a reply without sleeping, in microseconds
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 50)]
    spin_us: u32,
    /// Take the requests' memory from the system's huge pages
    #[arg(long)]
    huge: bool,
    /// Mount options, as with mount(8)
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// Write the line that says that the mount is usable to this file descriptor instead of to standard output
    #[arg(long, value_name = "FD")]
    ready_fd: Option<RawFd>,
    /// Stay in the foreground (always the case; for scripts that say so)
    #[arg(long, short = 'f')]
    foreground: bool,
}

/// Mounts, serves until it is unmounted or stopped, and cleans up.
pub fn run(args: &Args) -> Result<()> {
    let options = Options::parse(&args.options)?;
    let (socket, dir) = match args.paths.as_slice() {
        [socket, dir] => (Some(socket), dir),
        [dir] => (None, dir),
        _ => bail!("give a SOCKET and a DIR, or --tag and a DIR"),
    };
    let dir = Mount::check_dir(dir)?;
    let fuse = kernel::open_fuse()?;
    let mut ready = Ready::new(args.ready_fd)?;
    // From here on signals end things in an orderly way.
    let signals = supervisor::take_signals()?;
    let device = find_device(args, socket.map(PathBuf::as_path))?;
    let tag = device.config().tag.clone();
    let bridge = Bridge::start(args, device, fuse)?;
    let supervisor = bridge.mount(&tag, &dir, &options, signals)?;
    ready.say(&format!("mounted {tag} at {}\n", dir.display()))?;
    supervisor.run()
}

fn find_device(args: &Args, socket: Option<&Path>) -> Result<Device> {
    let Some(socket) = socket else {
        let Some(tag) = &args.tag else {
            bail!("name the function: a SOCKET before the directory, or --tag");
        };
        return discover::by_tag(&args.run_dir, tag, args.transport);
    };
    let device = Device::connect(socket, args.transport)
        .with_context(|| format!("cannot attach to {}", socket.display()))?;
    let has = &device.config().tag;
    if let Some(tag) = &args.tag
        && tag != has
    {
        bail!(
            "the device at {} has the tag `{has}`, not `{tag}`",
            socket.display()
        );
    }
    Ok(device)
}

/// A device that runs, and a connection to the kernel that is not mounted yet.
struct Bridge {
    device: Device,
    queues: Queues,
    memory: Arc<DmaMemory>,
    fuse: OwnedFd,
    /// Bytes of the largest transfer that the memory has room for.
    room: usize,
    spin: Duration,
}

impl Bridge {
    fn start(args: &Args, mut device: Device, fuse: OwnedFd) -> Result<Bridge> {
        let has = device.max_request_queues();
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let setup = Setup {
            request_queues: match args.queues {
                Some(queues) => queues,
                None => has.min(u16::try_from(cpus).unwrap_or(u16::MAX)).max(1),
            },
            queue_size: args.queue_size,
            ..Setup::default()
        };
        ensure!(setup.request_queues > 0, "--queues must be at least 1");
        let room = kernel::max_transfer();
        let depth = usize::from(setup.queue_size);
        let slots = usize::from(setup.request_queues) * Slots::memory_needed(depth, room);
        let needed = device.memory_needed(&setup)
            + Hiprio::memory_needed(depth)
            + Slots::memory_needed(1, 0)
            + slots;
        let pages = if args.huge {
            Pages::Huge
        } else {
            Pages::Normal
        };
        let memory = DmaMemory::new(needed, pages)
            .with_context(|| format!("cannot get {} MiB of memory for requests", needed >> 20))?;
        let memory = Arc::new(memory);
        let queues = device.start(&setup, &memory)?;
        Ok(Bridge {
            device,
            queues,
            memory,
            fuse,
            room,
            spin: Duration::from_micros(args.spin_us.into()),
        })
    }

    /// Mounts, lets the kernel and the device agree on a session, and starts the workers.
    fn mount(
        self,
        tag: &str,
        dir: &Path,
        options: &Options,
        signals: SignalFd,
    ) -> Result<Supervisor> {
        let Bridge {
            device,
            mut queues,
            memory,
            fuse,
            room,
            spin,
        } = self;
        let mount = Mount::new(&fuse, tag, dir, options)?;
        let first = queues.requests.first_mut().context("no request queue")?;
        let watch = Watch {
            signals: &signals,
            device: &device,
        };
        let transfer = session::init(&fuse, first, &memory, room, &watch)
            .with_context(|| format!("cannot mount {tag} on {}", dir.display()))?;
        let call = queues.hiprio.call_fd().try_clone_to_owned()?;
        let workers = queues.requests.len();
        let answers = fuse.try_clone()?;
        let hiprio = Hiprio::new(&memory, queues.hiprio, answers, call, workers)
            .context("no memory for the high-priority queue")?;
        let shared = Arc::new(Shared {
            memory,
            hiprio,
            stop: AtomicBool::new(false),
            destroyed: AtomicBool::new(false),
            spin,
        });
        let mut supervisor = Supervisor::new(Arc::clone(&shared), mount, signals, device)?;
        for queue in queues.requests {
            let wake = Arc::new(EventFd::new().context("cannot make an event counter")?);
            let slots = Slots::new(&shared.memory, queue.depth(2).into(), transfer)
                .context("no memory for requests")?;
            let fd = kernel::clone_fuse(&fuse)?;
            let worker = Worker::new(Arc::clone(&shared), fd, queue, slots, Arc::clone(&wake))?;
            supervisor.spawn(worker, wake)?;
        }
        Ok(supervisor)
    }
}

/// Where to say that the mount is usable.
enum Ready {
    Stdout,
    File(File),
}

impl Ready {
    fn new(fd: Option<RawFd>) -> Result<Ready> {
        let Some(fd) = fd else {
            return Ok(Ready::Stdout);
        };
        ensure!(fd > 2, "--ready-fd must be above 2");
        // A name of the descriptor that does not take it away from anybody.
        let path = format!("/proc/self/fd/{fd}");
        let file = File::options().write(true).open(&path);
        let file = file.with_context(|| format!("cannot write to --ready-fd {fd}"))?;
        Ok(Ready::File(file))
    }

    fn say(&mut self, line: &str) -> Result<()> {
        let done = match self {
            Ready::Stdout => std::io::stdout().write_all(line.as_bytes()),
            Ready::File(file) => file.write_all(line.as_bytes()),
        };
        done.context("cannot say that the mount is usable")
    }
}
