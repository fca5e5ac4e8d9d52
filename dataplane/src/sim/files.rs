//! The model file system: one flat directory in memory, with faults.
//!
//! All of it outlives the process, its files as those of a host do, and what it knows of lookups, handles and locks as if it
//! lay in recovery memory. What must not be done twice is noted as a real backend notes it.

use core::ffi::CStr;
use std::collections::{BTreeMap, BTreeSet};

use ferry_shared::errno::Errno;
use ferry_shared::limits::MAX_DATA_BUFFER;
use spin::Mutex;

use super::{Rng, fate};
use crate::fsdev::{Caller, DirSink, FsDev, Io, IoOp, IoResult, Negotiated, Offer, Pin};
use crate::fuse::abi::*;
use crate::mem::Segments;
use crate::recovery::journal::Before;

/// The file that all tasks lock.
pub(super) const SHARED: u64 = 2;
const DT_REG: u32 = 8;

#[derive(Default)]
struct Node {
    data: Vec<u8>,
    lookups: u64,
    /// Who holds its lock.
    owner: Option<u64>,
}

/// How often things go wrong: one time in so many, 0 for never.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    /// An operation is refused.
    pub(super) refuse: u64,
    /// A transfer moves less than was asked for.
    pub(super) short: u64,
    /// A transfer fails.
    pub(super) eio: u64,
    /// A transfer is interrupted before it has moved anything.
    pub(super) again: u64,
}

struct State {
    rng: Rng,
    nodes: BTreeMap<u64, Node>,
    names: BTreeMap<Vec<u8>, u64>,
    handles: BTreeMap<u64, u64>,
    last: u64,
    pins: BTreeSet<u64>,
    epoch: u64,
    /// The requests that were refused for no reason, and how.
    refused: BTreeMap<u64, Errno>,
    given_up: BTreeSet<u64>,
    /// What each execution of a listing has counted lookups for, by its number.
    plus: BTreeMap<u64, Vec<Vec<u64>>>,
    /// Lookups and handles that crashes may have left.
    leaks: u64,
    /// Lookups that are about to be taken away.
    forgetting: u64,
}

/// The file system.
pub(super) struct Files {
    state: Mutex<State>,
    seed: u64,
    faults: Faults,
    /// Operations that go to a helper.
    offload: BTreeSet<u32>,
}

impl State {
    fn draw(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn node(&mut self, id: u64) -> Result<&mut Node, Errno> {
        self.nodes.get_mut(&id).ok_or(Errno::ENOENT)
    }

    fn opened(&self, fh: u64) -> Result<u64, Errno> {
        self.handles.get(&fh).copied().ok_or(Errno::EBADF)
    }

    fn entry(&mut self, id: u64) -> fuse_entry_out {
        let node = self.nodes.get_mut(&id).expect("it has a name");
        node.lookups += 1;
        fuse_entry_out {
            nodeid: id,
            attr: attr(id, node),
            ..Default::default()
        }
    }

    fn open(&mut self, id: u64) -> fuse_open_out {
        let fh = self.draw();
        self.handles.insert(fh, id);
        fuse_open_out {
            fh,
            ..Default::default()
        }
    }

    /// Drops a node that nothing refers to.
    fn reap(&mut self, id: u64) {
        let named = self.names.values().any(|n| *n == id);
        let open = self.handles.values().any(|n| *n == id);
        let known = self.nodes.get(&id).is_some_and(|n| n.lookups > 0);
        if !named && !open && !known && id != SHARED {
            self.nodes.remove(&id);
        }
    }
}

fn attr(id: u64, node: &Node) -> fuse_attr {
    fuse_attr {
        ino: id,
        size: node.data.len() as u64,
        mode: 0o100_644,
        nlink: 1,
        ..Default::default()
    }
}

impl Files {
    pub(super) fn new(seed: u64, faults: Faults, offload: BTreeSet<u32>) -> Files {
        Files {
            state: Mutex::new(State {
                rng: Rng(seed),
                nodes: BTreeMap::from([(SHARED, Node::default())]),
                names: BTreeMap::new(),
                handles: BTreeMap::new(),
                last: SHARED,
                pins: BTreeSet::new(),
                epoch: 0,
                refused: BTreeMap::new(),
                given_up: BTreeSet::new(),
                plus: BTreeMap::new(),
                leaks: 0,
                forgetting: 0,
            }),
            seed,
            faults,
            offload,
        }
    }

    /// Refuses a request now and then, and then always.
    fn chance(&self, caller: &Caller<'_>) -> Result<(), Errno> {
        let mut state = self.state.lock();
        let mut rng = Rng(self.seed ^ caller.unique);
        if rng.one_in(self.faults.refuse) {
            let errno =
                [Errno::ENOSPC, Errno::EIO, Errno::EINTR, Errno::EACCES][rng.below(4) as usize];
            state.refused.insert(caller.unique, errno);
            return Err(errno);
        }
        Ok(())
    }

    /// Whether an earlier execution may have done what this request is for; if not, the caller does so next, which `acts`
    /// says: what fails anyway leaves nothing to be looked at.
    fn is_begun(&self, caller: &Caller<'_>, acts: bool, fact: u64) -> Option<u64> {
        match caller.journal.before() {
            Before::Begun([fact, ..]) => Some(fact),
            Before::Nothing => {
                if acts {
                    caller.journal.begin([fact, 0, 0, 0]);
                }
                None
            }
        }
    }

    /// The process has died: nobody waits, and nothing is pinned.
    pub(super) fn crash(&self) {
        let mut state = self.state.lock();
        state.pins.clear();
        state.given_up.clear();
        // Between an act and its note, or the other way round for what is forgotten.
        state.leaks += 2 + core::mem::take(&mut state.forgetting);
    }

    /// How a request was refused, if it was.
    pub(super) fn refusal(&self, unique: u64) -> Option<Errno> {
        self.state.lock().refused.remove(&unique)
    }

    /// Carries out a transfer that was put on the ring.
    pub(super) fn transfer(&self, op: IoOp, segments: &mut [&mut [u8]]) -> i32 {
        let mut state = self.state.lock();
        let eio = state.rng.one_in(self.faults.eio);
        if state.rng.one_in(self.faults.again) {
            let again = [Errno::EINTR, Errno::EAGAIN][state.rng.below(2) as usize];
            return -again.raw();
        }
        let (fd, offset, len) = match op {
            IoOp::Read { fd, offset, len } | IoOp::Write { fd, offset, len } => {
                (fd, offset as usize, len as usize)
            }
            IoOp::Fsync { .. } | IoOp::Fallocate { .. } => {
                return if eio { -Errno::EIO.raw() } else { 0 };
            }
        };
        if eio {
            return -Errno::EIO.raw();
        }
        let short = state.rng.one_in(self.faults.short);
        let room: usize = segments.iter().map(|s| s.len()).sum();
        let mut len = len.min(room);
        if short && len > 1 {
            len = 1 + state.rng.below(len as u64 - 1) as usize;
        }
        let id = state.opened(fd as u64).expect("pinned");
        let data = &mut state.node(id).expect("pinned").data;
        let write = matches!(op, IoOp::Write { .. });
        if write && data.len() < offset + len {
            data.resize(offset + len, 0);
        }
        len = len.min(data.len().saturating_sub(offset));
        let mut done = 0;
        for segment in segments {
            let n = segment.len().min(len - done);
            if n == 0 {
                break;
            }
            let there = &mut data[offset + done..offset + done + n];
            if write {
                there.copy_from_slice(&segment[..n]);
            } else {
                segment[..n].copy_from_slice(there);
            }
            done += n;
        }
        len as i32
    }

    /// What must hold when nobody uses the file system any more.
    pub(super) fn assert_unused(&self) {
        let state = self.state.lock();
        assert!(state.pins.is_empty(), "pins are left: {:?}", state.pins);
        let handles = state.handles.len() as u64;
        let lookups: u64 = state.nodes.values().map(|node| node.lookups).sum();
        assert!(
            handles + lookups <= state.leaks,
            "{handles} handles and {lookups} lookups are left"
        );
        for (id, node) in &state.nodes {
            assert_eq!(node.owner, None, "node {id} is locked");
        }
        assert!(state.refused.is_empty(), "unseen: {:?}", state.refused);
    }

    fn submit(&self, fh: u64, op: impl FnOnce(i32) -> IoOp) -> IoResult {
        let mut state = self.state.lock();
        state.opened(fh)?;
        let pin = state.draw();
        state.pins.insert(pin);
        Ok(Io::Submit {
            op: op(fh as i32),
            pin: Pin(pin),
        })
    }
}

impl FsDev for Files {
    fn offer(&self) -> Offer {
        Offer {
            flags: FUSE_POSIX_LOCKS | FUSE_ATOMIC_O_TRUNC,
            max_write: MAX_DATA_BUFFER,
            max_readahead: 0,
        }
    }

    fn mount(&self, _: Negotiated) -> Result<(), Errno> {
        Ok(())
    }

    fn unmount(&self) {}

    fn may_block(&self, opcode: u32) -> bool {
        self.offload.contains(&opcode)
    }

    fn unpin(&self, pin: Pin, _: IoOp, _: i32) {
        assert!(self.state.lock().pins.remove(&pin.0), "unpinned twice");
    }

    fn wait_ended(&self, unique: u64) {
        self.state.lock().given_up.insert(unique);
    }

    fn lock_epoch(&self) -> u64 {
        self.state.lock().epoch
    }

    fn lookup(&self, caller: &Caller<'_>, _: u64, name: &CStr) -> Result<fuse_entry_out, Errno> {
        self.chance(caller)?;
        let mut state = self.state.lock();
        let id = state.names.get(name.to_bytes()).copied();
        Ok(state.entry(id.ok_or(Errno::ENOENT)?))
    }

    fn forget(&self, nodeid: u64, nlookup: u64) {
        self.state.lock().forgetting = nlookup;
        fate::store();
        let mut state = self.state.lock();
        state.forgetting = 0;
        let node = state.node(nodeid).expect("the guest knows it");
        node.lookups = node.lookups.checked_sub(nlookup).expect("forgotten twice");
        state.reap(nodeid);
    }

    fn getattr(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        _: Option<u64>,
    ) -> Result<fuse_attr_out, Errno> {
        self.chance(caller)?;
        let mut state = self.state.lock();
        let attr = attr(nodeid, state.node(nodeid)?);
        Ok(fuse_attr_out {
            attr,
            ..Default::default()
        })
    }

    fn setattr(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_setattr_in,
    ) -> Result<fuse_attr_out, Errno> {
        self.chance(caller)?;
        let mut state = self.state.lock();
        let node = state.node(nodeid)?;
        node.data.resize(arg.size as usize, 0);
        Ok(fuse_attr_out {
            attr: attr(nodeid, node),
            ..Default::default()
        })
    }

    fn unlink(&self, caller: &Caller<'_>, _: u64, name: &CStr) -> Result<(), Errno> {
        self.chance(caller)?;
        let found = self.state.lock().names.get(name.to_bytes()).copied();
        let begun = self.is_begun(caller, found.is_some(), found.unwrap_or(0));
        if begun.is_some() && begun != found {
            return Ok(());
        }
        fate::store();
        let mut state = self.state.lock();
        let id = state.names.remove(name.to_bytes()).ok_or(Errno::ENOENT)?;
        state.reap(id);
        drop(state);
        fate::store();
        Ok(())
    }

    fn rename(
        &self,
        caller: &Caller<'_>,
        _: u64,
        name: &CStr,
        _: u64,
        newname: &CStr,
        _: u32,
    ) -> Result<(), Errno> {
        self.chance(caller)?;
        let found = self.state.lock().names.get(name.to_bytes()).copied();
        let begun = self.is_begun(caller, found.is_some(), found.unwrap_or(0));
        if begun.is_some() && begun != found {
            return Ok(());
        }
        fate::store();
        let mut state = self.state.lock();
        let id = state.names.remove(name.to_bytes()).ok_or(Errno::ENOENT)?;
        let over = state.names.insert(newname.to_bytes().to_vec(), id);
        if let Some(over) = over {
            state.reap(over);
        }
        drop(state);
        fate::store();
        Ok(())
    }

    fn open(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        _: &fuse_open_in,
    ) -> Result<fuse_open_out, Errno> {
        self.chance(caller)?;
        let mut state = self.state.lock();
        state.node(nodeid)?;
        Ok(state.open(nodeid))
    }

    fn create(
        &self,
        caller: &Caller<'_>,
        _: u64,
        name: &CStr,
        _: &fuse_create_in,
    ) -> Result<(fuse_entry_out, fuse_open_out), Errno> {
        self.chance(caller)?;
        let found = self.state.lock().names.get(name.to_bytes()).copied();
        let begun = self.is_begun(caller, found.is_none(), 0);
        if found.is_some() && begun.is_none() {
            return Err(Errno::EEXIST);
        }
        fate::store();
        let mut state = self.state.lock();
        let id = match found {
            Some(id) => id,
            None => {
                let id = state.draw();
                state.nodes.insert(id, Node::default());
                state.names.insert(name.to_bytes().to_vec(), id);
                id
            }
        };
        drop(state);
        fate::store();
        let mut state = self.state.lock();
        let entry = state.entry(id);
        Ok((entry, state.open(id)))
    }

    fn read(&self, caller: &Caller<'_>, _: u64, arg: &fuse_read_in, dst: Segments<'_>) -> IoResult {
        self.chance(caller)?;
        let mut state = self.state.lock();
        if state.rng.one_in(3) {
            let id = state.opened(arg.fh)?;
            let data = &state.node(id)?.data;
            let from = data.len().min(arg.offset as usize);
            let to = data.len().min(from + arg.size as usize);
            let n = dst.write(&data[from..to]);
            return Ok(Io::Done(n as u32));
        }
        drop(state);
        let (offset, len) = (arg.offset, arg.size);
        self.submit(arg.fh, |fd| IoOp::Read { fd, offset, len })
    }

    fn write(&self, caller: &Caller<'_>, _: u64, arg: &fuse_write_in, _: Segments<'_>) -> IoResult {
        self.chance(caller)?;
        let (offset, len) = (arg.offset, arg.size);
        self.submit(arg.fh, |fd| IoOp::Write { fd, offset, len })
    }

    fn fsync(&self, caller: &Caller<'_>, _: u64, arg: &fuse_fsync_in) -> IoResult {
        self.chance(caller)?;
        let datasync = false;
        self.submit(arg.fh, |fd| IoOp::Fsync { fd, datasync })
    }

    fn release(&self, _: &Caller<'_>, _: u64, arg: &fuse_release_in) -> Result<(), Errno> {
        fate::store();
        let mut state = self.state.lock();
        let id = state.handles.remove(&arg.fh).ok_or(Errno::EBADF)?;
        state.reap(id);
        Ok(())
    }

    fn statfs(&self, caller: &Caller<'_>, _: u64) -> Result<fuse_kstatfs, Errno> {
        self.chance(caller)?;
        Ok(fuse_kstatfs {
            bsize: 4096,
            ..Default::default()
        })
    }

    fn getxattr(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        _: &CStr,
        out: &mut [u8],
    ) -> Result<usize, Errno> {
        self.chance(caller)?;
        out.fill(nodeid as u8);
        Ok(out.len())
    }

    fn opendir(&self, _: &Caller<'_>, id: u64, _: &fuse_open_in) -> Result<fuse_open_out, Errno> {
        Ok(self.state.lock().open(id))
    }

    fn readdir(
        &self,
        caller: &Caller<'_>,
        _: u64,
        arg: &fuse_read_in,
        plus: bool,
        out: &mut dyn DirSink,
    ) -> Result<(), Errno> {
        let mut state = self.state.lock();
        let mut counted = Vec::new();
        let executions = state.plus.entry(caller.unique).or_default();
        let last = executions.len();
        executions.push(Vec::new());
        // The cookie is the node's number: the order of creation, which no change of other names disturbs.
        let mut all: Vec<(u64, Vec<u8>)> =
            state.names.iter().map(|(n, id)| (*id, n.clone())).collect();
        all.sort();
        for (id, name) in all.into_iter().filter(|(id, _)| *id > arg.offset) {
            let added = if !plus {
                out.entry(&name, id, id, DT_REG)
            } else if out.fits_plus(name.len()) {
                let entry = state.entry(id);
                counted.push(id);
                let executions = state.plus.entry(caller.unique).or_default();
                executions[last].clone_from(&counted);
                out.entry_plus(&name, id, DT_REG, &entry)
            } else {
                false
            };
            if !added {
                break;
            }
        }
        let executions = &state.plus[&caller.unique];
        // Only the second execution can tell what the first one has counted, and only if the directory begins the same.
        let lost = match &executions[..last] {
            [] => 0,
            [first] if counted.starts_with(first) => 0,
            all => all.iter().map(Vec::len).sum(),
        };
        state.leaks += lost as u64;
        Ok(())
    }

    fn releasedir(&self, caller: &Caller<'_>, id: u64, arg: &fuse_release_in) -> Result<(), Errno> {
        self.release(caller, id, arg)
    }

    fn setlk(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        arg: &fuse_lk_in,
        _: bool,
    ) -> Result<(), Errno> {
        let mut state = self.state.lock();
        assert!(
            !state.given_up.contains(&caller.unique),
            "tried again after it was given up"
        );
        let node = state.node(nodeid)?;
        match (node.owner, arg.lk.type_ == F_UNLCK) {
            (Some(owner), true) if owner == arg.owner => {
                node.owner = None;
                state.epoch += 1;
                Ok(())
            }
            (_, true) => Ok(()),
            (Some(owner), false) if owner != arg.owner => Err(Errno::EAGAIN),
            (_, false) => {
                node.owner = Some(arg.owner);
                Ok(())
            }
        }
    }
}

/// `F_UNLCK` of this machine.
pub(super) const F_UNLCK: u32 = 2;
/// `F_WRLCK` of this machine.
pub(super) const F_WRLCK: u32 = 1;
