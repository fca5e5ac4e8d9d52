//! `loopback OP COUNT`: a core's loop on the `null` file system, in one thread and without a system call, for so many
//! operations. For `tools/instructions`, which counts what they cost.
// UNSAFETY: plays the guest in memory of its own.
#![expect(unsafe_code, reason = "maps memory of its own as guest memory")]

use std::ptr::NonNull;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use ferry_dataplane::fsdev::IoOp;
use ferry_dataplane::fsdev::null::Null;
use ferry_dataplane::fuse::abi::*;
use ferry_dataplane::fuse::session::Session;
use ferry_dataplane::id::{CoreEvent, DeviceId, QueueIdx, QueueKind};
use ferry_dataplane::mem::{GuestMap, IoVec, Iova, Region};
use ferry_dataplane::pool::{DATA_BUFFER_STRIDE, DataPool, Slab};
use ferry_dataplane::reactor::{DeviceShared, Interrupted, Job, Reactor, StartQueue, System};
use ferry_dataplane::slot::SlotBody;
use ferry_dataplane::virtio::queue::{Queue, QueueConfig, QueueState};
use ferry_dataplane::virtio::spec::{Desc, DescFlags};
use ferry_shared::counters::QueuePlace;
use zerocopy::IntoBytes;

/// Requests that the core finds at once.
const BATCH: u16 = 32;
const SIZE: u16 = 64;
const PAGE: usize = 4096;
/// Guest addresses of the parts of the ring, and of the requests, of which each has two pages.
const AVAIL: usize = PAGE;
const USED: usize = 2 * PAGE;
const REQUESTS: usize = 4 * PAGE;
const MEMORY: usize = REQUESTS + 4 * PAGE * BATCH as usize;
/// Where the parts of a request are in it.
const ARGS: usize = 64;
const TABLE: usize = 512;
const REPLY: usize = 1024;
const PAYLOAD: usize = 1088;
const DATA: usize = 2 * PAGE;

/// The world: needs nothing.
struct Nothing;

impl System<Null> for Nothing {
    type Call = ();

    fn interrupt(&mut self, (): &()) {}
    fn submit(&mut self, _: u32, _: IoOp, _: &[IoVec]) -> bool {
        false
    }
    fn offload(&mut self, _: u32, _: Job<Null>) {}
    fn report(&mut self, _: CoreEvent) {}
    fn spread_interrupt(&mut self, _: Interrupted) {}
}

/// The guest's memory, never given back.
struct Guest(NonNull<u8>);

impl Guest {
    fn new() -> Guest {
        let pages = vec![[0u8; PAGE]; MEMORY / PAGE + 1].leak();
        let base = pages.as_mut_ptr().cast::<u8>();
        let skip = base.align_offset(PAGE);
        // SAFETY: one page more than needed was allocated, so that the aligned address is inside.
        Guest(unsafe { NonNull::from(&mut *base).add(skip) })
    }

    fn map(&self) -> Result<Arc<GuestMap>> {
        let all = Region {
            iova: Iova(0),
            len: MEMORY as u64,
            host: self.0,
            writable: true,
        };
        // SAFETY: the memory is leaked, so it outlives the map.
        let map = unsafe { GuestMap::new(vec![all], Vec::new()) };
        Ok(Arc::new(map.ok().context("one region")?))
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= MEMORY);
        // SAFETY: inside, as just checked; nothing refers to the memory.
        unsafe {
            self.0
                .add(at)
                .as_ptr()
                .copy_from(bytes.as_ptr(), bytes.len())
        }
    }

    fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        assert!(at + N <= MEMORY);
        let mut out = [0; N];
        // SAFETY: as in `write`.
        unsafe { self.0.add(at).as_ptr().copy_to(out.as_mut_ptr(), N) }
        out
    }
}

/// What is asked for.
struct Request {
    opcode: u32,
    nodeid: u64,
    args: Vec<u8>,
    /// Bytes of data that go along.
    data: usize,
    /// Bytes of the reply after its header, and whether that is data.
    reply: (usize, bool),
}

fn request(op: &str) -> Result<Request> {
    let read = |size: u32| fuse_read_in {
        fh: 2,
        size,
        ..Default::default()
    };
    let plain = |opcode, nodeid, args: &[u8], reply| Request {
        opcode,
        nodeid,
        args: args.to_vec(),
        data: 0,
        reply: (reply, false),
    };
    let name = b"zero0\0";
    Ok(match op {
        "init" => {
            let arg = fuse_init_in {
                major: 7,
                minor: 38,
                flags: u32::MAX,
                ..Default::default()
            };
            plain(FUSE_INIT, 0, arg.as_bytes(), size_of::<fuse_init_out>())
        }
        "getattr" => plain(FUSE_GETATTR, 2, &[0; 16], size_of::<fuse_attr_out>()),
        "lookup" => plain(FUSE_LOOKUP, 1, name, size_of::<fuse_entry_out>()),
        "open" => plain(
            FUSE_OPEN,
            2,
            &[2, 0, 0, 0, 0, 0, 0, 0],
            size_of::<fuse_open_out>(),
        ),
        "release" => {
            let arg = fuse_release_in {
                fh: 2,
                ..Default::default()
            };
            plain(FUSE_RELEASE, 2, arg.as_bytes(), 0)
        }
        "statfs" => plain(FUSE_STATFS, 1, &[], size_of::<fuse_statfs_out>()),
        "read" => Request {
            reply: (PAGE, true),
            ..plain(FUSE_READ, 2, read(PAGE as u32).as_bytes(), 0)
        },
        "write" => {
            let arg = fuse_write_in {
                fh: 2,
                size: PAGE as u32,
                ..Default::default()
            };
            Request {
                data: PAGE,
                ..plain(FUSE_WRITE, 2, arg.as_bytes(), size_of::<fuse_write_out>())
            }
        }
        "readdirplus" => {
            let arg = fuse_read_in {
                fh: 1,
                ..read(PAGE as u32)
            };
            Request {
                reply: (PAGE, true),
                ..plain(FUSE_READDIRPLUS, 1, arg.as_bytes(), 0)
            }
        }
        _ => bail!("there is no operation {op}"),
    })
}

/// Writes the same request to every slot of the batch, behind an indirect table as Linux makes it.
fn prepare(guest: &Guest, request: &Request) {
    for head in 0..usize::from(BATCH) {
        let at = REQUESTS + head * 4 * PAGE;
        let header = fuse_in_header {
            len: (size_of::<fuse_in_header>() + request.args.len() + request.data) as u32,
            opcode: request.opcode,
            unique: 2,
            nodeid: request.nodeid,
            ..Default::default()
        };
        guest.write(at, header.as_bytes());
        guest.write(at + ARGS, &request.args);
        let (reply, is_data) = request.reply;
        let pieces = [
            (at, size_of::<fuse_in_header>(), false),
            (at + ARGS, request.args.len(), false),
            (at + DATA, request.data, false),
            (at + REPLY, size_of::<fuse_out_header>(), true),
            (at + if is_data { DATA } else { PAYLOAD }, reply, true),
        ];
        let pieces: Vec<_> = pieces.into_iter().filter(|p| p.1 > 0).collect();
        for (n, &(place, len, write)) in pieces.iter().enumerate() {
            let mut flags = DescFlags::empty();
            flags.set(DescFlags::WRITE, write);
            flags.set(DescFlags::NEXT, n + 1 < pieces.len());
            let desc = Desc {
                addr: (place as u64).into(),
                len: (len as u32).into(),
                flags: flags.bits().into(),
                next: (n as u16 + 1).into(),
            };
            guest.write(at + TABLE + n * size_of::<Desc>(), desc.as_bytes());
        }
        let table = Desc {
            addr: ((at + TABLE) as u64).into(),
            len: ((pieces.len() * size_of::<Desc>()) as u32).into(),
            flags: DescFlags::INDIRECT.bits().into(),
            next: 0.into(),
        };
        guest.write(head * size_of::<Desc>(), table.as_bytes());
    }
}

fn core(guest: &Guest) -> Result<Reactor<Null, Nothing>> {
    let map = guest.map()?;
    let config = QueueConfig {
        size: SIZE,
        desc: Iova(0),
        avail: Iova(AVAIL as u64),
        used: Iova(USED as u64),
        packed: false,
        event_idx: true,
        indirect: true,
        state: QueueState::fresh(false),
    };
    let buffers = vec![0u8; DATA_BUFFER_STRIDE].leak();
    // SAFETY: the leaked memory has room for one buffer, and nothing else refers to it.
    let pool = unsafe { DataPool::new(NonNull::from(buffers).cast(), 1, None) };
    let bodies = Slab::on_heap((0..u32::from(SIZE)).map(|_| SlotBody::new()));
    let mut core = Reactor::new(bodies, pool, 1);
    let start = StartQueue {
        device: DeviceId(1),
        index: QueueIdx(1),
        kind: QueueKind::Request,
        queue: Queue::new(config, &map, None)?,
        call: None,
        shared: Arc::new(DeviceShared::new(Session::default(), Some(Arc::new(Null)))),
        place: QueuePlace::default(),
    };
    core.start(start, &mut Nothing);
    Ok(core)
}

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let (Some(op), Some(count)) = (words.next(), words.next()) else {
        bail!("say OP COUNT");
    };
    let count: u64 = count.parse()?;
    let guest = Guest::new();
    let mut core = core(&guest)?;
    let mut idx = 0u16;
    let mut turn = |requests: u16| -> Result<()> {
        for n in 0..requests {
            let entry = AVAIL + 4 + 2 * usize::from(idx.wrapping_add(n) % SIZE);
            guest.write(entry, &n.to_le_bytes());
        }
        idx = idx.wrapping_add(requests);
        guest.write(AVAIL + 2, &idx.to_le_bytes());
        core.turn(&mut Nothing);
        ensure!(
            guest.read(USED + 2) == idx.to_le_bytes(),
            "a request is not answered"
        );
        Ok(())
    };
    prepare(&guest, &request("init")?);
    turn(1)?;
    prepare(&guest, &request(&op)?);
    for _ in 0..count / u64::from(BATCH) {
        turn(BATCH)?;
        let error = guest.read(REQUESTS + REPLY + 4);
        ensure!(
            error == [0; 4],
            "{op} fails with {}",
            i32::from_le_bytes(error)
        );
    }
    Ok(())
}
