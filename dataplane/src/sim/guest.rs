//! The model guest: tasks that work on files of their own and know what every answer must be.

use core::fmt;
use std::collections::BTreeMap;

use ferry_shared::errno::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Rng;
use super::files::{F_UNLCK, F_WRLCK, SHARED};
use crate::fuse::abi::*;

/// Bytes of a file, at most.
const LONGEST: u64 = 20_000;

/// A file as its task knows it.
#[derive(Default)]
struct File {
    data: Vec<u8>,
    node: u64,
    lookups: u64,
    /// Another task's, met in a listing.
    foreign: bool,
}

/// What an answer must be like.
#[derive(Debug)]
enum Expect {
    Lookup {
        name: Vec<u8>,
    },
    Create {
        name: Vec<u8>,
    },
    Open {
        file: usize,
    },
    Release,
    Read {
        file: usize,
        offset: u64,
        size: u32,
    },
    Write {
        file: usize,
        offset: u64,
        data: Vec<u8>,
    },
    Getattr {
        file: usize,
    },
    Truncate {
        file: usize,
        size: u64,
    },
    Unlink {
        name: Vec<u8>,
    },
    Rename {
        from: Vec<u8>,
        to: Vec<u8>,
    },
    Fsync,
    Statfs,
    Getxattr {
        len: usize,
    },
    Forget,
    Opendir,
    Readdir {
        fh: u64,
        plus: bool,
    },
    Releasedir,
    Lock,
    Unlock,
}

/// A request as a task wants it sent.
pub(super) struct Wish {
    pub(super) opcode: u32,
    pub(super) nodeid: u64,
    pub(super) arg: Vec<u8>,
    /// Bytes of room for the reply; 0 when there is none.
    pub(super) room: u32,
}

/// One task.
pub(super) struct Task {
    id: usize,
    files: Vec<File>,
    names: BTreeMap<Vec<u8>, usize>,
    handles: Vec<(u64, usize)>,
    expect: Option<Expect>,
    /// The request on its way.
    unique: u64,
    /// An open directory: its handle, the cookie to go on from, and the files seen.
    listing: Option<(u64, u64, Vec<u64>)>,
    pub(super) holds: bool,
    pub(super) may_be_interrupted: bool,
}

fn is<T>(value: T) -> Vec<u8>
where
    T: IntoBytes + Immutable,
{
    value.as_bytes().to_vec()
}

fn out<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> T {
    T::read_from_prefix(body).expect("a whole answer").0
}

fn named(name: &[u8]) -> Vec<u8> {
    [name, b"\0"].concat()
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let holds = if self.holds { ", holds the lock" } else { "" };
        write!(f, "{} waits for {:?}{holds}", self.unique, self.expect)
    }
}

impl Task {
    pub(super) fn new(id: usize) -> Task {
        Task {
            id,
            files: Vec::new(),
            names: BTreeMap::new(),
            handles: Vec::new(),
            expect: None,
            unique: 0,
            listing: None,
            holds: false,
            may_be_interrupted: false,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.expect.is_none()
    }

    /// Whether there is nothing that it could give back.
    pub(super) fn has_nothing(&self) -> bool {
        !self.holds
            && self.listing.is_none()
            && self.handles.is_empty()
            && self.files.iter().all(|f| f.lookups == 0)
    }

    /// Whether it waits for the lock, and under which number.
    pub(super) fn wants_lock(&self) -> Option<u64> {
        matches!(self.expect, Some(Expect::Lock)).then_some(self.unique)
    }

    fn name(&self, rng: &mut Rng) -> Vec<u8> {
        format!("t{}-{}", self.id, rng.below(6)).into_bytes()
    }

    fn handle(&self, rng: &mut Rng) -> Option<(u64, usize)> {
        let at = rng.below(self.handles.len() as u64) as usize;
        self.handles.get(at).copied()
    }

    fn known(&self, rng: &mut Rng) -> Option<usize> {
        let known: Vec<usize> = (0..self.files.len())
            .filter(|f| self.files[*f].lookups > 0 && !self.files[*f].foreign)
            .collect();
        known.get(rng.below(known.len() as u64) as usize).copied()
    }

    /// The next request, with `unique` as its number; one that may wait for others only if it `may_wait`.
    pub(super) fn next(&mut self, rng: &mut Rng, unique: u64, may_wait: bool) -> Wish {
        self.unique = unique;
        let (expect, wish) = loop {
            match self.choose(rng) {
                Some((Expect::Lock, _)) if !may_wait => {}
                Some(choice) => break choice,
                None => {}
            }
        };
        self.expect = Some(expect);
        wish
    }

    fn choose(&mut self, rng: &mut Rng) -> Option<(Expect, Wish)> {
        let wish = |opcode, nodeid, arg, room| Wish {
            opcode,
            nodeid,
            arg,
            room,
        };
        let root = FUSE_ROOT_ID;
        Some(match rng.below(20) {
            0 => {
                let name = self.name(rng);
                let w = wish(FUSE_LOOKUP, root, named(&name), 144);
                (Expect::Lookup { name }, w)
            }
            1 | 2 => {
                let name = self.name(rng);
                let arg = [is(fuse_create_in::default()), named(&name)].concat();
                (Expect::Create { name }, wish(FUSE_CREATE, root, arg, 160))
            }
            3 => {
                let file = self.known(rng)?;
                let node = self.files[file].node;
                let w = wish(FUSE_OPEN, node, is(fuse_open_in::default()), 32);
                (Expect::Open { file }, w)
            }
            4 => {
                let at = rng.below(self.handles.len() as u64) as usize;
                self.handles.get(at)?;
                self.release(at)
            }
            5..=7 => {
                let (fh, file) = self.handle(rng)?;
                let (offset, size) = (rng.below(LONGEST), 1 + rng.below(9000) as u32);
                let arg = is(fuse_read_in {
                    fh,
                    offset,
                    size,
                    ..Default::default()
                });
                let w = wish(FUSE_READ, self.files[file].node, arg, 16 + size);
                (Expect::Read { file, offset, size }, w)
            }
            8..=10 => {
                let (fh, file) = self.handle(rng)?;
                let offset = rng.below(LONGEST / 2);
                let len = 1 + rng.below(LONGEST / 2);
                let data: Vec<u8> = (0..len).map(|_| rng.draw() as u8).collect();
                let arg = fuse_write_in {
                    fh,
                    offset,
                    size: len as u32,
                    ..Default::default()
                };
                let w = wish(
                    FUSE_WRITE,
                    self.files[file].node,
                    [is(arg), data.clone()].concat(),
                    24,
                );
                (Expect::Write { file, offset, data }, w)
            }
            11 => {
                let file = self.known(rng)?;
                let arg = is(fuse_getattr_in::default());
                let w = wish(FUSE_GETATTR, self.files[file].node, arg, 120);
                (Expect::Getattr { file }, w)
            }
            12 => {
                let file = self.known(rng)?;
                let size = rng.below(LONGEST);
                let arg = is(fuse_setattr_in {
                    valid: FATTR_SIZE,
                    size,
                    ..Default::default()
                });
                let w = wish(FUSE_SETATTR, self.files[file].node, arg, 120);
                (Expect::Truncate { file, size }, w)
            }
            13 => {
                let name = self.name(rng);
                let w = wish(FUSE_UNLINK, root, named(&name), 16);
                (Expect::Unlink { name }, w)
            }
            14 => {
                let (from, to) = (self.name(rng), self.name(rng));
                if from == to {
                    return None;
                }
                let arg = [is(FUSE_ROOT_ID), named(&from), named(&to)].concat();
                (
                    Expect::Rename { from, to },
                    wish(FUSE_RENAME, root, arg, 16),
                )
            }
            15 => {
                let (fh, file) = self.handle(rng)?;
                let arg = is(fuse_fsync_in {
                    fh,
                    ..Default::default()
                });
                (
                    Expect::Fsync,
                    wish(FUSE_FSYNC, self.files[file].node, arg, 16),
                )
            }
            16 if rng.one_in(2) => (Expect::Statfs, wish(FUSE_STATFS, root, Vec::new(), 96)),
            16 => {
                let len = 1 + rng.below(60_000) as usize;
                let arg = fuse_getxattr_in {
                    size: len as u32,
                    ..Default::default()
                };
                let arg = [is(arg), named(b"user.x")].concat();
                let w = wish(FUSE_GETXATTR, root, arg, 16 + len as u32);
                (Expect::Getxattr { len }, w)
            }
            17 => {
                let file = self.known(rng)?;
                let nlookup = 1 + rng.below(self.files[file].lookups);
                self.forget(file, nlookup, rng.one_in(2))
            }
            18 => self.list(rng),
            _ if self.holds => self.unlock(),
            _ => {
                let opcode = FUSE_SETLKW;
                (Expect::Lock, wish(opcode, SHARED, self.lock(F_WRLCK), 16))
            }
        })
    }

    fn lock(&self, type_: u32) -> Vec<u8> {
        is(fuse_lk_in {
            fh: 1,
            owner: self.id as u64,
            lk: fuse_file_lock {
                end: i64::MAX as u64,
                type_,
                ..Default::default()
            },
            ..Default::default()
        })
    }

    fn unlock(&self) -> (Expect, Wish) {
        let wish = Wish {
            opcode: FUSE_SETLK,
            nodeid: SHARED,
            arg: self.lock(F_UNLCK),
            room: 16,
        };
        (Expect::Unlock, wish)
    }

    fn release(&mut self, at: usize) -> (Expect, Wish) {
        let (fh, file) = self.handles.swap_remove(at);
        let wish = Wish {
            opcode: FUSE_RELEASE,
            nodeid: self.files[file].node,
            arg: is(fuse_release_in {
                fh,
                ..Default::default()
            }),
            room: 16,
        };
        (Expect::Release, wish)
    }

    fn forget(&mut self, file: usize, nlookup: u64, batch: bool) -> (Expect, Wish) {
        let nodeid = self.files[file].node;
        self.files[file].lookups -= nlookup;
        let (opcode, arg) = if batch {
            let one = fuse_forget_one { nodeid, nlookup };
            let head = fuse_batch_forget_in { count: 1, dummy: 0 };
            (FUSE_BATCH_FORGET, [is(head), is(one)].concat())
        } else {
            (FUSE_FORGET, is(fuse_forget_in { nlookup }))
        };
        let wish = Wish {
            opcode,
            nodeid: if batch { 0 } else { nodeid },
            arg,
            room: 0,
        };
        (Expect::Forget, wish)
    }

    fn list(&mut self, rng: &mut Rng) -> (Expect, Wish) {
        let Some((fh, offset, _)) = self.listing else {
            let wish = Wish {
                opcode: FUSE_OPENDIR,
                nodeid: FUSE_ROOT_ID,
                arg: is(fuse_open_in::default()),
                room: 32,
            };
            return (Expect::Opendir, wish);
        };
        let size = 256 + rng.below(2000) as u32;
        let plus = rng.one_in(2);
        let wish = Wish {
            opcode: if plus { FUSE_READDIRPLUS } else { FUSE_READDIR },
            nodeid: FUSE_ROOT_ID,
            arg: is(fuse_read_in {
                fh,
                offset,
                size,
                ..Default::default()
            }),
            room: 16 + size,
        };
        (Expect::Readdir { fh, plus }, wish)
    }

    /// What gives everything back, until nothing is left.
    pub(super) fn wind_up(&mut self, unique: u64) -> Option<Wish> {
        self.unique = unique;
        let (expect, wish) = if self.holds {
            self.unlock()
        } else if let Some((fh, ..)) = self.listing.take() {
            let wish = Wish {
                opcode: FUSE_RELEASEDIR,
                nodeid: FUSE_ROOT_ID,
                arg: is(fuse_release_in {
                    fh,
                    ..Default::default()
                }),
                room: 16,
            };
            (Expect::Releasedir, wish)
        } else if !self.handles.is_empty() {
            self.release(0)
        } else {
            let file = self.files.iter().position(|f| f.lookups > 0)?;
            self.forget(file, self.files[file].lookups, false)
        };
        self.expect = Some(expect);
        Some(wish)
    }

    fn met(&mut self, name: &[u8], entry: &fuse_entry_out) {
        let file = self.names[name];
        let known = &mut self.files[file];
        assert!(
            known.node == 0 || known.node == entry.nodeid,
            "{} has become another file",
            String::from_utf8_lossy(name)
        );
        known.node = entry.nodeid;
        known.lookups += 1;
        self.check_size(file, entry.attr.size);
    }

    fn check_size(&self, file: usize, size: u64) {
        assert_eq!(size, self.files[file].data.len() as u64, "size");
    }

    /// Takes an answer. `refused` is how the file system refused the request, if it did.
    pub(super) fn answered(&mut self, error: i32, body: &[u8], refused: Option<Errno>) {
        let expect = self.expect.take().expect("it asked for something");
        if let Some(errno) = refused {
            assert_eq!(error, -errno.raw(), "{expect:?} was refused");
            return;
        }
        let missing = |names: &BTreeMap<_, _>, name: &Vec<u8>| {
            if names.contains_key(name) {
                0
            } else {
                -Errno::ENOENT.raw()
            }
        };
        let wanted = match &expect {
            Expect::Lookup { name }
            | Expect::Unlink { name }
            | Expect::Rename { from: name, .. } => missing(&self.names, name),
            Expect::Create { name } if self.names.contains_key(name) => -Errno::EEXIST.raw(),
            Expect::Lock if error == -Errno::EINTR.raw() && self.may_be_interrupted => error,
            // So many wait already.
            Expect::Lock if error == -Errno::ENOLCK.raw() => error,
            // The file system's only fault once a transfer has begun.
            Expect::Read { .. } | Expect::Write { .. } | Expect::Fsync
                if error == -Errno::EIO.raw() =>
            {
                error
            }
            _ => 0,
        };
        assert_eq!(error, wanted, "{expect:?}");
        if error == 0 {
            self.succeeded(expect, body);
        }
    }

    fn succeeded(&mut self, expect: Expect, body: &[u8]) {
        match expect {
            Expect::Lookup { name } => self.met(&name, &out(body)),
            Expect::Create { name } => {
                self.files.push(File::default());
                self.names.insert(name.clone(), self.files.len() - 1);
                self.met(&name, &out(body));
                let opened: fuse_open_out = out(&body[size_of::<fuse_entry_out>()..]);
                self.handles.push((opened.fh, self.files.len() - 1));
            }
            Expect::Open { file } => {
                let opened: fuse_open_out = out(body);
                self.handles.push((opened.fh, file));
            }
            Expect::Read { file, offset, size } => self.check_data(file, offset, size, body),
            Expect::Write { file, offset, data } => self.wrote(file, offset, &data, out(body)),
            Expect::Getattr { file } => {
                let attr: fuse_attr_out = out(body);
                self.check_size(file, attr.attr.size);
            }
            Expect::Truncate { file, size } => self.files[file].data.resize(size as usize, 0),
            Expect::Unlink { name } => drop(self.names.remove(&name)),
            Expect::Rename { from, to } => {
                let file = self.names.remove(&from).expect("it was there");
                self.names.insert(to, file);
            }
            Expect::Getxattr { len } => {
                assert_eq!(body, vec![FUSE_ROOT_ID as u8; len]);
            }
            Expect::Opendir => {
                let opened: fuse_open_out = out(body);
                self.listing = Some((opened.fh, 0, Vec::new()));
            }
            Expect::Readdir { fh, plus } => self.listed(fh, plus, body),
            Expect::Lock => self.holds = true,
            Expect::Unlock => self.holds = false,
            Expect::Release
            | Expect::Releasedir
            | Expect::Fsync
            | Expect::Statfs
            | Expect::Forget => {}
        }
    }

    fn check_data(&self, file: usize, offset: u64, size: u32, body: &[u8]) {
        let data = &self.files[file].data;
        let from = data.len().min(offset as usize);
        let to = data.len().min(from + size as usize);
        assert!(body == &data[from..to], "wrong data at {offset}");
    }

    fn wrote(&mut self, file: usize, offset: u64, data: &[u8], answer: fuse_write_out) {
        let (from, n) = (offset as usize, answer.size as usize);
        assert!(
            0 < n && n <= data.len(),
            "wrote {n} bytes of {}",
            data.len()
        );
        let known = &mut self.files[file];
        if known.data.len() < from + n {
            known.data.resize(from + n, 0);
        }
        known.data[from..from + n].copy_from_slice(&data[..n]);
    }

    fn listed(&mut self, fh: u64, plus: bool, body: &[u8]) {
        let (_, mut offset, mut seen) = self.listing.take().expect("it is open");
        let mut rest = body;
        while !rest.is_empty() {
            let entry = plus.then(|| out::<fuse_entry_out>(rest));
            let at = if plus { size_of::<fuse_entry_out>() } else { 0 };
            let head: fuse_dirent = out(&rest[at..]);
            let name = rest[at + 24..at + 24 + head.namelen as usize].to_vec();
            if self.names.contains_key(&name) {
                if let Some(entry) = entry {
                    self.met(&name, &entry);
                }
            } else if let Some(entry) = entry {
                self.met_foreign(entry.nodeid);
            }
            offset = head.off;
            seen.push(head.ino);
            rest = &rest[(at + 24 + head.namelen as usize).next_multiple_of(8)..];
        }
        let end = body.is_empty();
        if !end {
            self.listing = Some((fh, offset, seen));
            return;
        }
        // At the end: nothing twice.
        let mut sorted = seen.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(sorted.len(), seen.len(), "a file is listed twice");
        self.listing = Some((fh, 0, Vec::new()));
    }

    /// A file of another task was looked up for this one by READDIRPLUS.
    fn met_foreign(&mut self, node: u64) {
        let known = self.files.iter().position(|f| f.node == node);
        let file = known.unwrap_or_else(|| {
            self.files.push(File {
                node,
                foreign: true,
                ..Default::default()
            });
            self.files.len() - 1
        });
        self.files[file].lookups += 1;
    }
}
