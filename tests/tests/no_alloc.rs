//! While it serves, the data plane takes no memory: a million mixed requests through a real queue, a real directory and
//! the real core and helper threads, under an allocator that counts what those threads ask for.
// UNSAFETY: a global allocator that counts and passes on.
#![expect(unsafe_code, reason = "a counting global allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use ferry_dataplane::cores::{CoreOptions, CoreSet, DEFAULT_SLOTS_PER_CORE, PollMode, core_memory};
use ferry_dataplane::fuse::abi::*;
use ferry_dataplane::keeper::Keeper;
use ferry_dataplane::os::arena::Arena;
use ferry_dataplane::os::poller::{Poller, Token};
use ferry_dataplane::platform::Platform;
use ferry_dataplane::service::Service;
use ferry_shared::msg::{AioSpec, Attach, Command, DeviceSpec, FsdevKind, FsdevSpec, Placement};
use ferry_tests::TempDir;
use ferry_tools::driver::{Device, DmaMemory, DmaSlice, Pages, Queue, Setup};
use zerocopy::{FromBytes, IntoBytes};

/// Requests that are counted; those before them warm up.
const REQUESTS: u64 = 1_000_000;
const WARM_UP: u64 = 20_000;
/// Bytes of one transfer.
const BLOCK: u32 = 4096;

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Whether this thread is one of the data plane's that serve: not known yet, no, or yes.
    static SERVES: Cell<Option<bool>> = const { Cell::new(None) };
}

struct Counter;

impl Counter {
    fn count() {
        if !COUNTING.load(Ordering::Relaxed) {
            return;
        }
        let serves = SERVES.with(|cell| {
            cell.get().unwrap_or_else(|| {
                // Asking for the name allocates too.
                cell.set(Some(false));
                let name = nix::sys::prctl::get_name();
                let name = name.as_ref().map_or(&b""[..], |n| n.to_bytes());
                let serves = name.starts_with(b"ferry-core") || name.starts_with(b"ferry-help");
                cell.set(Some(serves));
                serves
            })
        });
        if serves {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: passes every call on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Counter::count();
        // SAFETY: the caller's promise is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Counter::count();
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTER: Counter = Counter;

/// A guest that sends one request at a time.
struct Guest {
    memory: Arc<DmaMemory>,
    queue: Queue,
    request: DmaSlice,
    reply: DmaSlice,
    unique: u64,
    answer: Vec<u8>,
}

impl Guest {
    /// Sends a request and returns what follows the reply's header.
    fn call(&mut self, opcode: u32, nodeid: u64, arg: &[u8], room: u32) -> Result<&[u8]> {
        self.unique += 2;
        let len = size_of::<fuse_in_header>() + arg.len();
        let header = fuse_in_header {
            len: u32::try_from(len)?,
            opcode,
            unique: self.unique,
            nodeid,
            ..Default::default()
        };
        self.memory.write(self.request, header.as_bytes());
        self.memory.write(self.request.after(40), arg);
        let reply = self.reply.part(0, 16 + room as usize);
        let request = self.request.part(0, len);
        let writable = if opcode == FUSE_FORGET {
            &[][..]
        } else {
            &[reply][..]
        };
        self.queue.submit(&[request], writable, self.unique)?;
        self.queue.kick()?;
        let done = loop {
            if let Some(done) = self.queue.pop()? {
                break done;
            }
            std::hint::spin_loop();
        };
        if opcode == FUSE_FORGET {
            ensure!(done.len == 0, "FORGET has no reply");
            return Ok(&[]);
        }
        self.answer.resize(done.len as usize, 0);
        self.memory.read(reply, &mut self.answer);
        let (out, rest) = fuse_out_header::read_from_prefix(&self.answer)
            .ok()
            .context("a short reply")?;
        ensure!(out.error == 0, "opcode {opcode} failed with {}", out.error);
        ensure!(
            out.unique == self.unique && out.len == done.len,
            "a reply to something else"
        );
        Ok(rest)
    }

    fn entry(&mut self, opcode: u32, nodeid: u64, arg: &[u8]) -> Result<u64> {
        let entry = self.call(opcode, nodeid, arg, 256)?;
        Ok(fuse_entry_out::read_from_prefix(entry)
            .ok()
            .context("an entry")?
            .0
            .nodeid)
    }

    fn forget(&mut self, nodeid: u64) -> Result<()> {
        self.call(
            FUSE_FORGET,
            nodeid,
            fuse_forget_in { nlookup: 1 }.as_bytes(),
            0,
        )
        .map(drop)
    }
}

fn spec(root: &Path) -> (FsdevSpec, DeviceSpec) {
    let aio = AioSpec {
        root_path: root.to_string_lossy().into_owned(),
        enable_xattr: true,
        enable_writeback_cache: false,
        max_xfer_size: 128 * 1024,
        max_readahead: 128 * 1024,
        skip_rw: false,
        export: ferry_shared::export::ExportSpec::default(),
        metadata: Placement::Auto,
    };
    let device = DeviceSpec {
        name: "vfsdev0".into(),
        attach: Attach::VhostUser,
        tag: "counted".into(),
        num_request_queues: 1,
        queue_size: 64,
        fsdev: "aio0".into(),
        packed_vq: false,
        notification_vq: false,
        driver_platform: ferry_shared::msg::Platform::Native,
    };
    (
        FsdevSpec {
            name: "aio0".into(),
            kind: FsdevKind::Aio(aio),
        },
        device,
    )
}

/// The management thread's part, until told to stop.
fn manage(mut service: Service, poller: &Poller, stop: &AtomicBool) {
    let mut ready: Vec<Token> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        service.drain_cores();
        if poller.wait(&mut ready, 10).is_err() {
            break;
        }
        for &token in &ready {
            service.ready(token);
        }
    }
    service.shut_down();
}

/// One round over the operations that a busy guest sends; returns how many requests it took.
fn round(guest: &mut Guest, file: u64, fh: u64, dir_fh: u64, block: &[u8]) -> Result<u64> {
    let before = guest.unique;
    for step in 0..8u64 {
        let offset = step * u64::from(BLOCK);
        let write = fuse_write_in {
            fh,
            offset,
            size: BLOCK,
            ..Default::default()
        };
        guest.call(FUSE_WRITE, file, &[write.as_bytes(), block].concat(), 16)?;
        let read = fuse_read_in {
            fh,
            offset,
            size: BLOCK,
            ..Default::default()
        };
        let data = guest.call(FUSE_READ, file, read.as_bytes(), BLOCK)?;
        ensure!(data == block, "other bytes than were written");
        guest.call(
            FUSE_GETATTR,
            file,
            fuse_getattr_in::default().as_bytes(),
            128,
        )?;
        let again = guest.entry(FUSE_LOOKUP, FUSE_ROOT_ID, b"file\0")?;
        ensure!(again == file, "another node for the same file");
        guest.forget(file)?;
    }
    let create = fuse_create_in {
        flags: 0o102,
        mode: 0o100_644,
        ..Default::default()
    };
    let made = guest.call(
        FUSE_CREATE,
        FUSE_ROOT_ID,
        &[create.as_bytes(), b"new\0"].concat(),
        256,
    )?;
    let (entry, rest) = fuse_entry_out::read_from_prefix(made)
        .ok()
        .context("an entry")?;
    let (open, _) = fuse_open_out::read_from_prefix(rest)
        .ok()
        .context("a handle")?;
    let chmod = fuse_setattr_in {
        valid: FATTR_MODE,
        mode: 0o600,
        ..Default::default()
    };
    guest.call(FUSE_SETATTR, entry.nodeid, chmod.as_bytes(), 128)?;
    let lock = fuse_lk_in {
        fh: open.fh,
        owner: 7,
        lk: fuse_file_lock {
            end: 9,
            type_: 1,
            ..Default::default()
        },
        ..Default::default()
    };
    guest.call(FUSE_SETLK, entry.nodeid, lock.as_bytes(), 0)?;
    let flush = fuse_flush_in {
        fh: open.fh,
        lock_owner: 7,
        ..Default::default()
    };
    guest.call(FUSE_FLUSH, entry.nodeid, flush.as_bytes(), 0)?;
    guest.call(
        FUSE_FSYNC,
        entry.nodeid,
        fuse_fsync_in {
            fh: open.fh,
            ..Default::default()
        }
        .as_bytes(),
        0,
    )?;
    guest.call(
        FUSE_RELEASE,
        entry.nodeid,
        fuse_release_in {
            fh: open.fh,
            ..Default::default()
        }
        .as_bytes(),
        0,
    )?;
    let rename = fuse_rename2_in {
        newdir: FUSE_ROOT_ID,
        ..Default::default()
    };
    guest.call(
        FUSE_RENAME2,
        FUSE_ROOT_ID,
        &[rename.as_bytes(), b"new\0newer\0"].concat(),
        0,
    )?;
    guest.call(FUSE_UNLINK, FUSE_ROOT_ID, b"newer\0", 0)?;
    guest.forget(entry.nodeid)?;
    let set = fuse_setxattr_in {
        size: 3,
        ..Default::default()
    };
    guest.call(
        FUSE_SETXATTR,
        file,
        &[set.as_bytes(), b"user.a\0abc"].concat(),
        0,
    )?;
    let get = fuse_getxattr_in {
        size: 8192,
        ..Default::default()
    };
    guest.call(
        FUSE_GETXATTR,
        file,
        &[get.as_bytes(), b"user.a\0"].concat(),
        8192,
    )?;
    let list = fuse_read_in {
        fh: dir_fh,
        size: 32 * 1024,
        ..Default::default()
    };
    guest.call(FUSE_READDIR, FUSE_ROOT_ID, list.as_bytes(), 32 * 1024)?;
    guest.call(FUSE_STATFS, FUSE_ROOT_ID, &[], 128)?;
    Ok((guest.unique - before) / 2)
}

fn connect(socket: &Path) -> Result<(Device, Guest, Queue)> {
    let mut device = Device::connect(socket, None)?;
    let setup = Setup::default();
    let room = device.memory_needed(&setup) + (1 << 20);
    let memory = Arc::new(DmaMemory::new(room, Pages::Normal)?);
    let request = memory.alloc(64 * 1024, 4096).context("room for requests")?;
    let reply = memory.alloc(64 * 1024, 4096).context("room for replies")?;
    let mut queues = device.start(&setup, &memory)?;
    let queue = queues.requests.remove(0);
    let guest = Guest {
        memory,
        queue,
        request,
        reply,
        unique: 0,
        answer: Vec::new(),
    };
    Ok((device, guest, queues.hiprio))
}

#[test]
fn a_million_mixed_requests_allocate_nothing() -> Result<()> {
    let dir = TempDir::new();
    let (root, run_dir) = (dir.make_dir("export"), dir.make_dir("run"));
    std::fs::create_dir(run_dir.join("vhost"))?;
    let mut arena = Arena::new(core_memory(DEFAULT_SLOTS_PER_CORE, 4), false)?;
    let options = CoreOptions {
        cpus: vec![0],
        mode: PollMode::Adaptive,
        slots: DEFAULT_SLOTS_PER_CORE,
        buffers: 4,
    };
    let cores = CoreSet::start(&options, &mut arena)?;
    let poller = Arc::new(Poller::new()?);
    let events = Token {
        device: Token::SERVICE,
        local: 0,
    };
    poller.add(cores.event_fd(), events)?;
    let mut service = Service::new(
        Platform::delivered(None)?,
        run_dir.clone(),
        vec![0],
        cores,
        Arc::clone(&poller),
        Keeper::default(),
    );
    let (fsdev, device) = spec(&root);
    service.command(1, Command::FsdevCreate(fsdev));
    service.command(2, Command::DeviceStart(device));
    for (seq, answer) in service.take_answers() {
        answer.map_err(|f| anyhow::anyhow!("command {seq}: {} ({})", f.detail, f.errno))?;
    }

    let stop = Arc::new(AtomicBool::new(false));
    let manager = {
        let (poller, stop) = (Arc::clone(&poller), Arc::clone(&stop));
        std::thread::spawn(move || manage(service, &poller, &stop))
    };
    let (mut device, mut guest, hiprio) = connect(&run_dir.join("vhost/vfsdev0.sock"))?;
    let init = fuse_init_in {
        major: 7,
        minor: 45,
        flags: u32::MAX,
        ..Default::default()
    };
    guest.call(FUSE_INIT, 0, init.as_bytes(), 64)?;
    let create = fuse_create_in {
        flags: 0o102,
        mode: 0o100_644,
        ..Default::default()
    };
    let made = guest.call(
        FUSE_CREATE,
        FUSE_ROOT_ID,
        &[create.as_bytes(), b"file\0"].concat(),
        256,
    )?;
    let (entry, rest) = fuse_entry_out::read_from_prefix(made)
        .ok()
        .context("an entry")?;
    let (open, _) = fuse_open_out::read_from_prefix(rest)
        .ok()
        .context("a handle")?;
    let dir_open = guest.call(
        FUSE_OPENDIR,
        FUSE_ROOT_ID,
        fuse_open_in::default().as_bytes(),
        16,
    )?;
    let (dir_open, _) = fuse_open_out::read_from_prefix(dir_open)
        .ok()
        .context("a handle")?;
    let block = vec![0x5a; BLOCK as usize];

    let mut served = 0;
    while served < WARM_UP {
        served += round(&mut guest, entry.nodeid, open.fh, dir_open.fh, &block)?;
    }
    COUNTING.store(true, Ordering::SeqCst);
    served = 0;
    while served < REQUESTS {
        served += round(&mut guest, entry.nodeid, open.fh, dir_open.fh, &block)?;
    }
    COUNTING.store(false, Ordering::SeqCst);
    let allocations = ALLOCATIONS.load(Ordering::SeqCst);

    device.reset()?;
    drop((device, guest, hiprio));
    stop.store(true, Ordering::Relaxed);
    manager
        .join()
        .map_err(|_| anyhow::anyhow!("the management thread panicked"))?;
    println!("{served} requests, {allocations} allocations by cores and helpers");
    ensure!(
        allocations == 0,
        "{allocations} allocations while serving {served} requests"
    );
    Ok(())
}
