//! A device under load: its session, and the files that the work needs.

use std::ffi::{CStr, CString};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use ferry_dataplane::fuse::abi::{
    FUSE_OPEN, FUSE_OPENDIR, FUSE_RELEASE, FUSE_RELEASEDIR, FUSE_ROOT_ID,
};
use nix::time::ClockId;
use nix::unistd::Pid;

use super::client::Client;
use super::slot::Slot;
use super::work::Work;
use crate::driver::{Device, DmaMemory, Pages, Protocol, Queue, Queues, Setup};

/// Made in the export's root.
pub(super) const DIR: &CStr = c"ferry-bench";
/// Made there, for scans.
pub(super) const LIST_DIR: &CStr = c"list";
/// Files of the `null` file system, which need not be made.
const NULL_FILES: [&CStr; 4] = [c"zero0", c"zero1", c"zero2", c"zero3"];
/// Forgotten inodes on their way.
const FORGETS: usize = 128;

/// The files of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) files: u32,
    pub(super) file_size: u64,
    pub(super) entries: u32,
}

impl Layout {
    pub(super) fn file_name(number: u32) -> CString {
        CString::new(format!("file-{number}")).unwrap_or_default()
    }
}

/// A file with a session's names for it.
#[derive(Clone, Debug)]
pub(super) struct File {
    pub(super) name: CString,
    pub(super) nodeid: u64,
    pub(super) fh: u64,
    /// LOOKUPs not forgotten yet.
    pub(super) lookups: u64,
}

/// A device with a session.
pub(super) struct FuseTarget {
    device: Device,
    pub(super) memory: Arc<DmaMemory>,
    pub(super) hiprio: Queue,
    pub(super) requests: Vec<Queue>,
    /// By queue.
    pub(super) slots: Vec<Vec<Slot>>,
    pub(super) forget_slots: Vec<Slot>,
    control: Slot,
    pub(super) dir: u64,
    /// `None`: nothing can be made there.
    pub(super) list_dir: Option<u64>,
    pub(super) files: Vec<File>,
    pub(super) file_size: u64,
    /// The device's process.
    pub(super) cpu: Option<ClockId>,
}

fn shape(work: &Work, has: u16) -> (usize, usize) {
    let queues = work.queues.min(has).max(1);
    let depth = u32::from(work.depth) * u32::from(work.queues);
    (queues.into(), depth.div_ceil(queues.into()) as usize)
}

impl FuseTarget {
    /// Connects, begins a session, and makes what is missing of the files. `pid` is the server's process, if it is not the
    /// one that listens.
    pub(super) fn open(
        socket: &Path,
        protocol: Option<Protocol>,
        pid: Option<i32>,
        layout: &Layout,
        works: &[Work],
    ) -> Result<FuseTarget> {
        let mut device = Device::connect(socket, protocol)
            .with_context(|| format!("cannot attach to {}", socket.display()))?;
        let most = |of: fn(&Work) -> u32| works.iter().map(of).max().unwrap_or(1);
        let block = most(|w| w.block);
        let has = device.max_request_queues();
        let depth = works.iter().map(|w| shape(w, has).1).max().unwrap_or(1);
        let setup = Setup {
            request_queues: has.min(most(|w| u32::from(w.queues)) as u16),
            ..Setup::default()
        };
        let slots = usize::from(setup.request_queues) * depth;
        let needed = device.memory_needed(&setup)
            + Slot::memory_needed(slots + 1, block)
            + Slot::memory_needed(FORGETS, 0);
        let memory = DmaMemory::new(needed, Pages::Normal)
            .with_context(|| format!("cannot get {} MiB of memory", needed >> 20))?;
        let memory = Arc::new(memory);
        let Queues { hiprio, requests } = device.start(&setup, &memory)?;
        ensure!(
            usize::from(requests[0].depth(5)) >= depth,
            "the device's queues are too short for a depth of {depth}"
        );
        let make = |count: usize, block| -> Result<Vec<Slot>> {
            let slots = (0..count as u32).map(|n| Slot::new(&memory, n, block));
            slots
                .collect::<Option<_>>()
                .context("no memory for requests")
        };
        let pid = pid.or_else(|| device.peer_pid()).filter(|&pid| pid > 0);
        let mut target = FuseTarget {
            slots: (0..requests.len())
                .map(|_| make(depth, block))
                .collect::<Result<_>>()?,
            forget_slots: make(FORGETS, 0)?,
            control: make(1, block)?[0],
            cpu: pid.and_then(|pid| ClockId::pid_cpu_clock_id(Pid::from_raw(pid)).ok()),
            device,
            hiprio,
            requests,
            dir: 0,
            list_dir: None,
            files: Vec::new(),
            file_size: layout.file_size,
            memory,
        };
        target.prepare(layout)?;
        Ok(target)
    }

    /// How many queues a work uses here, and how many operations are in flight on each: as many in all as it says.
    pub(super) fn shape(&self, work: &Work) -> (usize, usize) {
        shape(work, self.requests.len() as u16)
    }

    pub(super) fn client(&mut self) -> Client<'_> {
        Client {
            memory: &self.memory,
            queue: &mut self.requests[0],
            slot: self.control,
        }
    }

    fn prepare(&mut self, layout: &Layout) -> Result<()> {
        let mut client = self.client();
        let max_write = client.init().context("no session")?;
        ensure!(
            max_write >= 4096,
            "it allows WRITEs of {max_write} bytes only"
        );
        let room = client.slot.data_len();
        let (dir, list_dir, files) = match client.directory(FUSE_ROOT_ID, DIR)? {
            None => (FUSE_ROOT_ID, None, NULL_FILES.map(CStr::to_owned).to_vec()),
            Some(dir) => {
                let list = client
                    .directory(dir, LIST_DIR)?
                    .context("nothing can be made")?;
                for number in 0..layout.entries {
                    let name = CString::new(format!("entry-{number:06}"))?;
                    let nodeid = client.file(list, &name, 0)?;
                    client.forget(nodeid, 1)?;
                }
                (
                    dir,
                    Some(list),
                    (0..layout.files).map(Layout::file_name).collect(),
                )
            }
        };
        ensure!(
            room <= max_write,
            "it allows WRITEs of {max_write} bytes only"
        );
        let mut known = Vec::with_capacity(files.len());
        for name in files {
            let nodeid = client.file(dir, &name, layout.file_size)?;
            let fh = client.open(FUSE_OPEN, nodeid, libc::O_RDWR)?;
            known.push(File {
                name,
                nodeid,
                fh,
                lookups: 1,
            });
        }
        if known.is_empty() {
            bail!("a run needs a file");
        }
        (self.dir, self.list_dir, self.files) = (dir, list_dir, known);
        Ok(())
    }

    /// Opens the directory of scans once more.
    pub(super) fn open_list(&mut self) -> Result<(u64, u64)> {
        let nodeid = self.list_dir.unwrap_or(FUSE_ROOT_ID);
        let fh = self.client().open(FUSE_OPENDIR, nodeid, 0)?;
        Ok((nodeid, fh))
    }

    pub(super) fn close_list(&mut self, fh: u64) -> Result<()> {
        let nodeid = self.list_dir.unwrap_or(FUSE_ROOT_ID);
        self.client().release(FUSE_RELEASEDIR, nodeid, fh)
    }

    /// Ends the session, with nothing left behind.
    pub(super) fn close(mut self) -> Result<()> {
        for file in std::mem::take(&mut self.files) {
            let mut client = self.client();
            client.release(FUSE_RELEASE, file.nodeid, file.fh)?;
            client.forget(file.nodeid, file.lookups)?;
        }
        self.client().destroy()?;
        self.device.reset()?;
        Ok(())
    }
}
