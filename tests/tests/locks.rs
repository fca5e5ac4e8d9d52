//! Locks that wait. One that waits on one core ends with EINTR when the INTERRUPT comes to another, whichever of them is seen
//! first, and no INTERRUPT means a request of a later mount. One that waits for a process of this machine gets its turn.

use anyhow::{Context, Result, ensure};
use ferry_dataplane::fuse::abi::*;
use ferry_tests::{Service, ServiceConfig, need, two_cpus, wait_until};
use ferry_tools::driver::{Device, DmaMemory, DmaSlice, Pages, Queue, Setup};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

const LIMIT: Duration = Duration::from_secs(60);
const HEADER: usize = size_of::<fuse_in_header>();
const WRITE_LOCK: u32 = 1;
const UNLOCK: u32 = 2;

/// A request that has been sent, and where its answer will be.
struct Sent {
    queue: usize,
    unique: u64,
    reply: DmaSlice,
}

/// A driver of a device with two request queues that counts its requests itself.
struct Guest {
    _device: Device,
    memory: Arc<DmaMemory>,
    hiprio: Queue,
    requests: Vec<Queue>,
    /// The file that is locked, and its handle.
    file: (u64, u64),
}

impl Guest {
    fn connect(socket: &Path) -> Result<Guest> {
        let mut device = Device::connect(socket, None)?;
        let setup = Setup {
            request_queues: 2,
            ..Setup::default()
        };
        let room = device.memory_needed(&setup) + (4 << 20);
        let memory = Arc::new(DmaMemory::new(room, Pages::Normal)?);
        let queues = device.start(&setup, &memory)?;
        Ok(Guest {
            _device: device,
            memory,
            hiprio: queues.hiprio,
            requests: queues.requests,
            file: (0, 0),
        })
    }

    fn request(&self, opcode: u32, unique: u64, nodeid: u64, arg: &[u8]) -> Result<DmaSlice> {
        let len = HEADER + arg.len();
        let header = fuse_in_header {
            len: u32::try_from(len)?,
            opcode,
            unique,
            nodeid,
            ..Default::default()
        };
        let request = self.memory.alloc(len, 64).context("room for a request")?;
        self.memory.write(request, header.as_bytes());
        self.memory.write(request.after(HEADER), arg);
        Ok(request)
    }

    fn send(
        &mut self,
        queue: usize,
        opcode: u32,
        unique: u64,
        nodeid: u64,
        arg: &[u8],
    ) -> Result<Sent> {
        let request = self.request(opcode, unique, nodeid, arg)?;
        let reply = self.memory.alloc(256, 64).context("room for a reply")?;
        let requests = self.requests.get_mut(queue).context("no such queue")?;
        requests.submit(&[request], &[reply], unique)?;
        requests.kick()?;
        Ok(Sent {
            queue,
            unique,
            reply,
        })
    }

    fn interrupt(&mut self, unique: u64) -> Result<()> {
        let arg = fuse_interrupt_in { unique };
        let request = self.request(FUSE_INTERRUPT, unique | 1, 0, arg.as_bytes())?;
        self.hiprio.submit(&[request], &[], unique)?;
        self.hiprio.kick()?;
        wait_until("the INTERRUPT is given back", LIMIT, || {
            Ok(self.hiprio.pop()?.is_some())
        })
    }

    fn answered(&mut self, sent: &Sent) -> Result<bool> {
        let Some(done) = self.requests[sent.queue].pop()? else {
            return Ok(false);
        };
        ensure!(done.cookie == sent.unique, "another request is answered");
        Ok(true)
    }

    /// Waits for the answer: its error, and what follows its header.
    fn answer(&mut self, sent: &Sent) -> Result<(i32, Vec<u8>)> {
        wait_until("a request is answered", LIMIT, || self.answered(sent))?;
        let mut bytes = vec![0; sent.reply.len()];
        self.memory.read(sent.reply, &mut bytes);
        let (header, rest) = fuse_out_header::read_from_prefix(&bytes)
            .ok()
            .context("a short reply")?;
        ensure!(header.unique == sent.unique, "a reply to something else");
        Ok((header.error, rest.to_vec()))
    }

    fn call(&mut self, opcode: u32, unique: u64, nodeid: u64, arg: &[u8]) -> Result<Vec<u8>> {
        let sent = self.send(0, opcode, unique, nodeid, arg)?;
        let (error, rest) = self.answer(&sent)?;
        ensure!(error == 0, "opcode {opcode} failed with {error}");
        Ok(rest)
    }

    /// Mounts, and opens the file.
    fn mount(&mut self) -> Result<()> {
        let init = fuse_init_in {
            major: 7,
            minor: 45,
            flags: u32::MAX,
            ..Default::default()
        };
        self.call(FUSE_INIT, 2, 0, init.as_bytes())?;
        let create = fuse_create_in {
            flags: 0o102,
            mode: 0o100_644,
            ..Default::default()
        };
        let arg = [create.as_bytes(), b"locked\0"].concat();
        let made = self.call(FUSE_CREATE, 4, FUSE_ROOT_ID, &arg)?;
        let (entry, rest) = fuse_entry_out::read_from_prefix(&made)
            .ok()
            .context("an entry")?;
        let (open, _) = fuse_open_out::read_from_prefix(rest)
            .ok()
            .context("a handle")?;
        self.file = (entry.nodeid, open.fh);
        Ok(())
    }

    fn lock(
        &mut self,
        queue: usize,
        unique: u64,
        owner: u64,
        kind: u32,
        wait: bool,
    ) -> Result<Sent> {
        let (nodeid, fh) = self.file;
        let arg = fuse_lk_in {
            fh,
            owner,
            lk: fuse_file_lock {
                end: 9,
                type_: kind,
                ..Default::default()
            },
            ..Default::default()
        };
        let opcode = if wait { FUSE_SETLKW } else { FUSE_SETLK };
        self.send(queue, opcode, unique, nodeid, arg.as_bytes())
    }

    fn lock_now(&mut self, unique: u64, owner: u64, kind: u32) -> Result<()> {
        let sent = self.lock(0, unique, owner, kind, false)?;
        let (error, _) = self.answer(&sent)?;
        ensure!(error == 0, "a lock failed with {error}");
        Ok(())
    }

    fn ends_with_eintr(&mut self, sent: &Sent) -> Result<()> {
        let (error, _) = self.answer(sent)?;
        ensure!(
            error == -(Errno::EINTR as i32),
            "an interrupted lock ended with {error}"
        );
        Ok(())
    }
}

/// Has one CPU serve a queue of the device.
fn place(service: &Service, queue: u16, cpu: u32) -> Result<()> {
    let name = format!("vfsdev0_q{queue}");
    let of = || -> Result<_> {
        let queues = service.queues()?;
        Ok(queues.into_iter().find(|q| q.name == name))
    };
    let mut found = None;
    wait_until(&format!("{name} runs"), LIMIT, || {
        found = of()?;
        Ok(found.is_some())
    })?;
    let thread = found.context("no queue")?.thread;
    service.call(&format!("thread_set_cpumask -i {thread} -m [{cpu}]"))?;
    wait_until(&format!("{name} is on CPU {cpu}"), LIMIT, || {
        Ok(of()?.is_some_and(|queue| queue.cpu == cpu))
    })
}

/// The lock waits in queue 2, served by `waits`; the INTERRUPT comes to queue 0, served by the other core.
fn interrupt(service: &Service, guest: &mut Guest, cpus: [u32; 2]) -> Result<()> {
    let [waits, interrupts] = cpus;
    for (queue, cpu) in [(0, interrupts), (1, interrupts), (2, waits)] {
        place(service, queue, cpu)?;
    }
    guest.mount()?;
    guest.lock_now(6, 1, WRITE_LOCK)?;
    for round in 0..100 {
        let unique = 100 + 4 * round;
        let waiting = guest.lock(1, unique, 2, WRITE_LOCK, true)?;
        guest.interrupt(unique)?;
        guest.ends_with_eintr(&waiting)?;
        let unique = unique + 2;
        guest.interrupt(unique)?;
        let late = guest.lock(1, unique, 2, WRITE_LOCK, true)?;
        guest.ends_with_eintr(&late)?;
    }
    // An INTERRUPT whose request has been answered already means nothing, now or after the next mount.
    let unique = 1000;
    guest.lock_now(unique, 1, WRITE_LOCK)?;
    guest.interrupt(unique)?;
    guest.call(FUSE_DESTROY, 1002, 0, &[])?;

    guest.mount()?;
    guest.lock_now(6, 1, WRITE_LOCK)?;
    let waiting = guest.lock(1, unique, 2, WRITE_LOCK, true)?;
    let other = guest.lock(1, 1004, 3, WRITE_LOCK, false)?;
    let (error, _) = guest.answer(&other).context("a lock that does not wait")?;
    ensure!(error == -(Errno::EAGAIN as i32), "{error}");
    guest.lock_now(1006, 1, UNLOCK)?;
    let (error, _) = guest.answer(&waiting)?;
    ensure!(
        error == 0,
        "a lock ended with {error} for an INTERRUPT of the mount before"
    );
    guest.call(FUSE_DESTROY, 1008, 0, &[]).map(drop)
}

fn across_cores(poll: &str, start: fn(&Service) -> Result<PathBuf>) -> Result<()> {
    let cpus = two_cpus()?;
    let mut service = Service::start_with(&ServiceConfig {
        args: vec![
            format!("--cpumask=[{},{}]", cpus[0], cpus[1]),
            format!("--poll={poll}"),
        ],
        ..ServiceConfig::default()
    })?;
    let export = service.dir().make_dir("export");
    service.call(&format!("fsdev_aio_create aio0 {}", export.display()))?;
    let socket = start(&service)?;
    let mut guest = Guest::connect(&socket)?;
    for cpus in [cpus, [cpus[1], cpus[0]]] {
        interrupt(&service, &mut guest, cpus).with_context(|| service.log())?;
    }
    drop(guest);
    service.stop()
}

#[test]
fn a_waiting_lock_is_interrupted_through_another_core_over_vhost_user() {
    need!(two_cpus());
    need!(ferry_tests::binary("ferry"));
    across_cores("busy", |service| {
        service.start_vhost_user_device("vfsdev0", "tag", "aio0")
    })
    .unwrap();
}

#[test]
fn a_waiting_lock_is_interrupted_through_another_core_over_vfio_user() {
    need!(two_cpus());
    need!(ferry_tests::binary("ferry"));
    across_cores("interrupt", |service| {
        service.start_doca_device("vfsdev0", "tag", "aio0")
    })
    .unwrap();
}

/// Nothing tells the device that this process unlocks, and no other request comes that its core would have to wake for.
fn after_a_local_process(start: fn(&Service) -> Result<PathBuf>) -> Result<()> {
    let (mut service, export) = Service::start_exporting("")?;
    let socket = start(&service)?;
    let mut guest = Guest::connect(&socket)?;
    guest.mount()?;
    for round in 0..5 {
        let file = File::options()
            .read(true)
            .write(true)
            .open(export.join("locked"))?;
        let all = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_OFD_SETLK(&all))?;
        let unique = 100 + 6 * round;
        let waiting = guest.lock(1, unique, 2, WRITE_LOCK, true)?;
        // On the same queue, so it is answered after the other one has begun to wait.
        let other = guest.lock(1, unique + 2, 3, WRITE_LOCK, false)?;
        let (error, _) = guest.answer(&other)?;
        ensure!(error == -(Errno::EAGAIN as i32), "{error}");
        drop(file);
        let (error, _) = guest.answer(&waiting)?;
        ensure!(error == 0, "a lock that became free: {error}");
        guest.lock_now(unique + 4, 2, UNLOCK)?;
    }
    guest.call(FUSE_DESTROY, 1008, 0, &[])?;
    drop(guest);
    service.stop()
}

#[test]
fn a_lock_is_granted_when_a_local_process_unlocks_over_vhost_user() {
    need!(ferry_tests::binary("ferry"));
    after_a_local_process(|service| service.start_vhost_user_device("vfsdev0", "tag", "aio0"))
        .unwrap();
}

#[test]
fn a_lock_is_granted_when_a_local_process_unlocks_over_vfio_user() {
    need!(ferry_tests::binary("ferry"));
    after_a_local_process(|service| service.start_doca_device("vfsdev0", "tag", "aio0")).unwrap();
}
