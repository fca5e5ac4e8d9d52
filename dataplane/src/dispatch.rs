//! From a request's bytes to the backend and back to a reply.
//!
//! One exhaustive match over the operations. Every error becomes one error reply here and nowhere else. A core calls
//! [`intake`] on the first bytes, copies what it says, calls [`execute`], and for submitted operations [`finish_io`]. A
//! backend's answer is not trusted with lengths: what goes to the guest never exceeds what was asked for.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used
    )
)]

mod noted;

use ferry_shared::errno::Errno;
use ferry_shared::limits::{
    MAX_DATA_BUFFER, MAX_TRANSFER, SYMLINK_MAX, XATTR_LIST_MAX, XATTR_SIZE_MAX,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::fsdev::{Caller, DirSink, FsDev, Io, IoOp, IoResult, Pin};
use crate::fuse::abi::{
    FUSE_BATCH_FORGET, FUSE_GETATTR_FH, FUSE_GETXATTR, FUSE_INIT, FUSE_IOCTL,
    FUSE_IOCTL_UNRESTRICTED, FUSE_LISTXATTR, FUSE_NOTIFY_REPLY, FUSE_READDIR, FUSE_READDIRPLUS,
    FUSE_READLINK, FUSE_WRITE, fuse_batch_forget_in, fuse_bmap_out, fuse_copy_file_range_in,
    fuse_copy_file_range_out, fuse_create_in, fuse_entry_out, fuse_getxattr_in, fuse_getxattr_out,
    fuse_in_header, fuse_ioctl_in, fuse_ioctl_out, fuse_lk_out, fuse_lseek_out, fuse_open_in,
    fuse_open_out, fuse_poll_out, fuse_read_in, fuse_release_in, fuse_statfs_out, fuse_write_in,
    fuse_write_out,
};
use crate::fuse::open_flags;
use crate::fuse::ops::{self, Op, ReplyKind, payload};
use crate::fuse::parse::{self, Ioctl, LinkTarget, LookupName, Name, Setxattr, Write, XattrName};
use crate::fuse::reply::{HEADER, Listing, Reply, fuse_created_out};
use crate::fuse::session::Session;
use crate::mem::Segments;
use crate::recovery::journal::{Journal, Place};

/// Bytes of a request that [`intake`] wants to see, unless the request is shorter.
pub use crate::fuse::parse::FIRST;

/// Most bytes of one COPY_FILE_RANGE, whose reply counts in 32 bits: whole pages of any guest.
const COPY_32_MAX: u64 = 0x7fff_0000;

/// How much of a request must be at hand before [`execute`] can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intake {
    /// Bytes to have out of guest memory, those that [`intake`] has seen included: headers, arguments and names; all of
    /// the request but the data of WRITE, the elements of BATCH_FORGET and the content of NOTIFY_REPLY.
    pub input: usize,
}

/// A request that cannot be taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// What to answer with.
    pub errno: Errno,
    /// The number of the request to answer to [`fail`] with; `None` where nothing may be answered: the number is not
    /// known, or the operation has no reply.
    pub unique: Option<u64>,
}

/// A request as the core hands it over.
#[derive(Debug)]
pub struct Incoming<'a> {
    /// The copied part, [`Intake::input`] bytes.
    pub input: &'a [u8],
    /// The guest's bytes after that: WRITE's data, for example.
    pub data: Segments<'a>,
    /// Where the reply goes.
    pub reply: Segments<'a>,
    /// Room to assemble the reply in, at least as long as [`scratch_needed`] says.
    pub scratch: &'a mut [u8],
    /// Where the request notes what it does; `None`: a crash ends everything.
    pub line: Option<Place<'a>>,
}

/// What has become of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Finished: so many bytes are in the reply segments (0 for operations without a reply).
    Done(u32),
    /// The core performs this and then calls [`finish_io`]. READ fills the reply's segments after the header
    /// ([`HEADER`] bytes), WRITE takes the request's data segments.
    Submit {
        /// What to submit; its length does not exceed the segments'.
        op: IoOp,
        /// Goes back to the backend afterwards.
        pin: Pin,
    },
    /// SETLKW met a conflicting lock: run the request again when a lock may have been released.
    Wait,
    /// INTERRUPT: the request with this number should end with `EINTR` if it waits; this one is finished, without a reply.
    Interrupt {
        /// The number of the request to interrupt.
        unique: u64,
    },
}

/// Decides how much of a request to copy. `first` are its first [`FIRST`] bytes or all of it, `readable` counts all the
/// bytes that the guest has provided; those after the length that the header declares are ignored.
pub fn intake(first: &[u8], readable: usize) -> Result<Intake, Malformed> {
    const BEFORE_UNIQUE: usize = 8;
    let Ok(header) = parse::header(first) else {
        let unique = first
            .get(BEFORE_UNIQUE..)
            .and_then(|rest| u64::read_from_prefix(rest).ok());
        return Err(Malformed {
            errno: Errno::EINVAL,
            unique: unique.map(|(unique, _)| unique),
        });
    };
    let refuse = |errno| {
        let silent = ops::info(header.opcode).is_some_and(|row| row.reply == ReplyKind::Silent);
        Err(Malformed {
            errno,
            unique: (!silent).then_some(header.unique),
        })
    };
    const ARGUMENTS: usize = size_of::<fuse_in_header>();
    let declared = usize::try_from(header.len).unwrap_or(usize::MAX);
    if declared < ARGUMENTS || declared > readable {
        return refuse(Errno::EINVAL);
    }
    let input = match header.opcode {
        FUSE_WRITE => declared.min(const { ARGUMENTS + size_of::<fuse_write_in>() }),
        FUSE_BATCH_FORGET => declared.min(const { ARGUMENTS + size_of::<fuse_batch_forget_in>() }),
        FUSE_NOTIFY_REPLY => ARGUMENTS,
        _ => declared,
    };
    if input > MAX_DATA_BUFFER as usize {
        return refuse(Errno::E2BIG);
    }
    Ok(Intake { input })
}

/// The opcode of a copied request; 0, which is none, if it is too short to have one.
pub fn opcode(input: &[u8]) -> u32 {
    parse::header(input).map_or(0, |header| header.opcode)
}

/// Opcode and number of a copied request; zeros if it is too short to have them.
#[inline]
pub fn identity(input: &[u8]) -> (u32, u64) {
    parse::header(input).map_or((0, 0), |header| (header.opcode, header.unique))
}

/// How many bytes of scratch [`execute`] needs for a copied request whose reply may be `reply` bytes long; at most
/// [`MAX_DATA_BUFFER`].
pub fn scratch_needed(input: &[u8], reply: usize) -> usize {
    let arguments = input.get(size_of::<fuse_in_header>()..).unwrap_or_default();
    let asked = match opcode(input) {
        FUSE_READLINK => return link_room(reply),
        FUSE_READDIR | FUSE_READDIRPLUS => size_field(arguments, |arg: &fuse_read_in| arg.size),
        FUSE_GETXATTR => {
            size_field(arguments, |arg: &fuse_getxattr_in| arg.size).min(XATTR_SIZE_MAX)
        }
        FUSE_LISTXATTR => {
            size_field(arguments, |arg: &fuse_getxattr_in| arg.size).min(XATTR_LIST_MAX)
        }
        FUSE_IOCTL => size_field(arguments, |arg: &fuse_ioctl_in| arg.out_size),
        _ => 0,
    };
    asked
        .min(reply.saturating_sub(HEADER))
        .min(MAX_DATA_BUFFER as usize)
}

fn size_field<T: FromBytes>(arguments: &[u8], field: fn(&T) -> u32) -> usize {
    T::read_from_prefix(arguments).map_or(0, |(arg, _)| field(&arg) as usize)
}

/// Room for a symbolic link's target: one byte more than the guest has, so that a cut target shows.
fn link_room(reply: usize) -> usize {
    reply
        .saturating_sub(HEADER)
        .saturating_add(1)
        .min(SYMLINK_MAX)
}

/// Answers request `unique` with an error; returns the bytes written, 0 if the guest has left no room even for that.
pub fn fail(unique: u64, reply: Segments<'_>, errno: Errno) -> u32 {
    Reply::new(unique, reply).error(errno)
}

/// Finishes a submitted operation: `result` is what it gave, bytes or a negative error number. Returns the bytes that are
/// in the reply segments.
pub fn finish_io<F: FsDev>(
    fs: &F,
    input: &[u8],
    reply: Segments<'_>,
    op: IoOp,
    pin: Pin,
    result: i32,
) -> u32 {
    fs.unpin(pin, op, result);
    let unique = parse::header(input).map_or(0, |header| header.unique);
    let reply = Reply::new(unique, reply);
    let Ok(count) = u32::try_from(result) else {
        return reply.error(Errno::from_raw(result.saturating_neg()));
    };
    match op {
        IoOp::Read { len, .. } => reply.in_place(count.min(len) as usize),
        IoOp::Write { len, .. } => reply.fixed::<payload::Write>(&written(count.min(len))),
        IoOp::Fsync { .. } | IoOp::Fallocate { .. } => reply.fixed::<()>(&()),
    }
}

/// Runs a request. `fs` is the backend of the device, `None` while it has none.
pub fn execute<F: FsDev>(fs: Option<&F>, session: &Session, rq: Incoming<'_>) -> Outcome {
    let Ok(header) = parse::header(rq.input) else {
        return Outcome::Done(0);
    };
    let reply = Reply::new(header.unique, rq.reply);
    match admit(fs, session, &header, &rq, &reply) {
        Ok(Some((fs, request))) => {
            let call = Call {
                fs,
                session,
                nodeid: header.nodeid,
                caller: caller(&request, noted::journal(session, &header, rq.line)),
                reply,
            };
            call.take_back(header.opcode);
            call.run(request.op, rq.data, rq.scratch)
                .unwrap_or_else(|errno| Outcome::Done(reply.error(errno)))
        }
        Ok(None) => Outcome::Done(0),
        Err(errno) => Outcome::Done(reply.error(errno)),
    }
}

/// Everything that is checked before a backend hears of a request. `None`: it is dropped without an answer, because its
/// operation has none or the guest has left no room for one.
fn admit<'f, 'r, F: FsDev>(
    fs: Option<&'f F>,
    session: &Session,
    header: &fuse_in_header,
    rq: &Incoming<'r>,
    reply: &Reply<'_>,
) -> Result<Option<(&'f F, parse::Request<'r>)>, Errno> {
    let row = ops::info(header.opcode);
    let silent = row.is_some_and(|row| row.reply == ReplyKind::Silent);
    if !silent && reply.is_hopeless() {
        return Ok(None);
    }
    let checked = (|| {
        let fs = fs.ok_or(Errno::ENODEV)?;
        let protocol = match session.protocol() {
            Some(protocol) => protocol,
            None if header.opcode == FUSE_INIT => parse::Protocol::default(),
            None => return Err(Errno::ENOTCONN),
        };
        let row = row.ok_or(Errno::ENOSYS)?;
        let request = parse::request(*header, rq.input, rq.data.len(), protocol)?;
        // Before it acts: a reply that cannot be delivered would leave a lookup count or a handle behind.
        if reply.room() < row.min_payload {
            return Err(Errno::EIO);
        }
        Ok((fs, request))
    })();
    match checked {
        Ok(pair) => Ok(Some(pair)),
        Err(_) if silent => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn caller<'a>(request: &parse::Request<'a>, journal: Journal<'a>) -> Caller<'a> {
    Caller {
        journal,
        unique: request.header.unique,
        uid: request.header.uid,
        gid: request.header.gid,
        pid: request.header.pid,
        supplementary_group: request.extensions.supplementary_group,
        security_context: request.extensions.security_context,
    }
}

fn written(size: u32) -> fuse_write_out {
    fuse_write_out { size, padding: 0 }
}

/// One admitted request.
struct Call<'a, F> {
    fs: &'a F,
    session: &'a Session,
    nodeid: u64,
    caller: Caller<'a>,
    reply: Reply<'a>,
}

impl<F: FsDev> Call<'_, F> {
    fn run(&self, op: Op<'_>, data: Segments<'_>, scratch: &mut [u8]) -> Result<Outcome, Errno> {
        let Call { fs, caller, .. } = self;
        let id = self.nodeid;
        match op {
            Op::Init { init } => self.fixed::<payload::Init>(self.session.init(*fs, &init)?),
            Op::Destroy {} => self.fixed::<payload::Destroy>(self.session.destroy(*fs)?),

            Op::Lookup {
                name: LookupName(name),
            } => self.fixed::<payload::Lookup>(self.entry(fs.lookup(caller, id, name)?)),
            Op::Forget { arg } => Ok(self.forget(arg.nlookup)),
            Op::BatchForget { batch } => Ok(self.batch_forget(batch, data)),
            Op::Getattr { arg } => {
                let fh = (arg.getattr_flags & FUSE_GETATTR_FH != 0).then_some(arg.fh);
                self.fixed::<payload::Getattr>(fs.getattr(caller, id, fh)?)
            }
            Op::Setattr { arg } => self.fixed::<payload::Setattr>(fs.setattr(caller, id, &arg)?),
            Op::Statx { arg } => self.fixed::<payload::Statx>(fs.statx(caller, id, &arg)?),
            Op::Access { arg } => self.fixed::<payload::Access>(fs.access(caller, id, arg.mask)?),
            Op::Statfs {} => {
                let st = fs.statfs(caller, id)?;
                self.fixed::<payload::Statfs>(fuse_statfs_out { st })
            }
            Op::Syncfs {} => self.fixed::<payload::Syncfs>(fs.syncfs(caller, id)?),

            Op::Readlink {} => self.readlink(scratch),
            Op::Symlink {
                name: Name(name),
                target: LinkTarget(target),
            } => self.fixed::<payload::Symlink>(self.entry(fs.symlink(caller, id, name, target)?)),
            Op::Mknod {
                arg,
                name: Name(name),
            } => self.fixed::<payload::Mknod>(self.entry(fs.mknod(caller, id, name, &arg)?)),
            Op::Mkdir {
                arg,
                name: Name(name),
            } => self.fixed::<payload::Mkdir>(self.entry(fs.mkdir(caller, id, name, &arg)?)),
            Op::Unlink { name: Name(name) } => {
                self.fixed::<payload::Unlink>(fs.unlink(caller, id, name)?)
            }
            Op::Rmdir { name: Name(name) } => {
                self.fixed::<payload::Rmdir>(fs.rmdir(caller, id, name)?)
            }
            Op::Rename {
                arg,
                name: Name(name),
                newname: Name(newname),
            } => {
                self.fixed::<payload::Rename>(fs.rename(caller, id, name, arg.newdir, newname, 0)?)
            }
            Op::Rename2 {
                arg,
                name: Name(name),
                newname: Name(newname),
            } => self.fixed::<payload::Rename2>(
                fs.rename(caller, id, name, arg.newdir, newname, arg.flags)?,
            ),
            Op::Link {
                arg,
                name: Name(name),
            } => {
                self.fixed::<payload::Link>(self.entry(fs.link(caller, id, arg.oldnodeid, name)?))
            }

            Op::Open { arg } => {
                self.fixed::<payload::Open>(self.opened(fs.open(caller, id, &self.host(arg))?))
            }
            Op::Create {
                arg,
                name: Name(name),
            } => self.fixed::<payload::Create>(created(self.both(fs.create(
                caller,
                id,
                name,
                &self.host(arg),
            )?))),
            Op::Tmpfile { arg, .. } => self.fixed::<payload::Tmpfile>(created(
                self.both(fs.tmpfile(caller, id, &self.host(arg))?),
            )),
            Op::Read { arg } => self.read(self.host(arg)),
            Op::Write {
                write: Write { arg },
            } => self.write(self.host(arg), data),
            Op::Flush { arg } => self.fixed::<payload::Flush>(fs.flush(caller, id, &arg)?),
            Op::Release { arg } => self
                .fixed::<payload::Release>(self.end(|| fs.release(caller, id, &self.host(arg)))?),
            Op::Fsync { arg } => self.status(fs.fsync(caller, id, &arg)),
            Op::Fallocate { arg } => self.status(fs.fallocate(caller, id, &arg)),
            Op::Lseek { arg } => {
                let offset = fs.lseek(caller, id, &arg)?;
                self.fixed::<payload::Lseek>(fuse_lseek_out { offset })
            }
            Op::CopyFileRange { arg } => {
                let copied = self.copy(arg, COPY_32_MAX)?;
                let size = u32::try_from(copied).map_err(|_| Errno::EIO)?;
                self.fixed::<payload::CopyFileRange>(written(size))
            }
            Op::CopyFileRange64 { arg } => {
                let bytes_copied = self.copy(arg, u64::MAX)?;
                self.fixed::<payload::CopyFileRange64>(fuse_copy_file_range_out { bytes_copied })
            }
            Op::Bmap { arg } => {
                let block = fs.bmap(caller, id, &arg)?;
                self.fixed::<payload::Bmap>(fuse_bmap_out { block })
            }
            Op::Ioctl { ioctl } => self.ioctl(ioctl, scratch),
            Op::Poll { arg } => {
                let revents = fs.poll(caller, id, &arg)?;
                self.fixed::<payload::Poll>(fuse_poll_out {
                    revents,
                    padding: 0,
                })
            }

            Op::Opendir { arg } => self.fixed::<payload::Opendir>(self.opened(fs.opendir(
                caller,
                id,
                &self.host(arg),
            )?)),
            Op::Readdir { arg } => self.readdir(self.host(arg), false, scratch),
            Op::Readdirplus { arg } => self.readdir(self.host(arg), true, scratch),
            Op::Releasedir { arg } => self.fixed::<payload::Releasedir>(
                self.end(|| fs.releasedir(caller, id, &self.host(arg)))?,
            ),
            Op::Fsyncdir { arg } => self.status(fs.fsyncdir(caller, id, &arg)),

            Op::Setxattr { set } => {
                let Setxattr {
                    flags,
                    setxattr_flags,
                    name,
                    value,
                } = set;
                self.fixed::<payload::Setxattr>(fs.setxattr(
                    caller,
                    id,
                    name,
                    value,
                    flags,
                    setxattr_flags,
                )?)
            }
            Op::Getxattr {
                arg,
                name: XattrName(name),
            } => self.sized(arg, XATTR_SIZE_MAX, scratch, |out| {
                fs.getxattr(caller, id, name, out)
            }),
            Op::Listxattr { arg } => self.sized(arg, XATTR_LIST_MAX, scratch, |out| {
                fs.listxattr(caller, id, out)
            }),
            Op::Removexattr {
                name: XattrName(name),
            } => self.fixed::<payload::Removexattr>(fs.removexattr(caller, id, name)?),

            Op::Getlk { arg } => {
                let lk = fs.getlk(caller, id, &arg)?;
                self.fixed::<payload::Getlk>(fuse_lk_out { lk })
            }
            Op::Setlk { arg } => self.fixed::<payload::Setlk>(fs.setlk(caller, id, &arg, false)?),
            Op::Setlkw { arg } => match fs.setlk(caller, id, &arg, true) {
                Err(Errno::EAGAIN) => Ok(Outcome::Wait),
                answer => self.fixed::<payload::Setlkw>(answer?),
            },

            Op::Interrupt { arg } => Ok(Outcome::Interrupt { unique: arg.unique }),
            Op::NotifyReply {} => Ok(Outcome::Done(0)),
        }
    }

    fn fixed<T: IntoBytes + Immutable>(&self, payload: T) -> Result<Outcome, Errno> {
        Ok(Outcome::Done(self.reply.fixed(&payload)))
    }

    /// The same structure with its open(2) flags in this machine's numbers.
    fn host<T: OpenFlags>(&self, mut arg: T) -> T {
        let flags = arg.flags();
        *flags = open_flags::to_host(*flags, self.session.platform());
        arg
    }

    fn read(&self, arg: fuse_read_in) -> Result<Outcome, Errno> {
        let dst = self.reply.payload().first(arg.size as usize);
        let size = u32::try_from(dst.len()).unwrap_or(u32::MAX);
        if size > MAX_TRANSFER {
            return Err(Errno::EINVAL);
        }
        let arg = fuse_read_in { size, ..arg };
        Ok(match self.fs.read(&self.caller, self.nodeid, &arg, dst)? {
            Io::Done(count) => Outcome::Done(self.reply.in_place(count.min(arg.size) as usize)),
            Io::Submit { op, pin } => submit(op, arg.size, pin),
        })
    }

    fn write(&self, arg: fuse_write_in, data: Segments<'_>) -> Result<Outcome, Errno> {
        let src = data.first(arg.size as usize);
        Ok(match self.fs.write(&self.caller, self.nodeid, &arg, src)? {
            Io::Done(count) => Outcome::Done(
                self.reply
                    .fixed::<payload::Write>(&written(count.min(arg.size))),
            ),
            Io::Submit { op, pin } => submit(op, arg.size, pin),
        })
    }

    /// COPY_FILE_RANGE of at most `most` bytes; fewer than asked for is a valid answer.
    fn copy(&self, arg: fuse_copy_file_range_in, most: u64) -> Result<u64, Errno> {
        let len = arg.len.min(most);
        let arg = fuse_copy_file_range_in { len, ..arg };
        let copied = self.fs.copy_file_range(&self.caller, self.nodeid, &arg)?;
        Ok(copied.min(len))
    }

    fn status(&self, answer: IoResult) -> Result<Outcome, Errno> {
        match answer? {
            Io::Done(_) => self.fixed::<()>(()),
            Io::Submit { op, pin } => Ok(submit(op, 0, pin)),
        }
    }

    fn readlink(&self, scratch: &mut [u8]) -> Result<Outcome, Errno> {
        let room = link_room(self.reply.room().saturating_add(HEADER));
        let out = cleared(scratch, room);
        let len = self.fs.readlink(&self.caller, self.nodeid, out)?;
        Ok(Outcome::Done(self.reply.bytes(filled(out, len)?)))
    }

    /// GETXATTR and LISTXATTR: a request for 0 bytes asks how long the answer would be.
    fn sized(
        &self,
        arg: fuse_getxattr_in,
        limit: usize,
        scratch: &mut [u8],
        get: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    ) -> Result<Outcome, Errno> {
        if arg.size == 0 {
            let size = u32::try_from(get(&mut [])?).map_err(|_| Errno::E2BIG)?;
            return self.fixed(fuse_getxattr_out { size, padding: 0 });
        }
        let room = (arg.size as usize).min(limit).min(self.reply.room());
        let out = cleared(scratch, room);
        if out.is_empty() {
            return Err(Errno::ERANGE);
        }
        let len = get(out)?;
        Ok(Outcome::Done(self.reply.bytes(filled(out, len)?)))
    }

    fn ioctl(&self, ioctl: Ioctl<'_>, scratch: &mut [u8]) -> Result<Outcome, Errno> {
        // Only an unrestricted server may ask the guest to copy other memory; Ferry is none.
        if ioctl.arg.flags & FUSE_IOCTL_UNRESTRICTED != 0 {
            return Err(Errno::EINVAL);
        }
        let room = self
            .reply
            .room()
            .saturating_sub(size_of::<fuse_ioctl_out>())
            .min(ioctl.arg.out_size as usize);
        let out = cleared(scratch, room);
        let (head, len) = self
            .fs
            .ioctl(&self.caller, self.nodeid, &ioctl.arg, ioctl.input, out)?;
        let head = fuse_ioctl_out {
            result: head.result,
            ..fuse_ioctl_out::default()
        };
        Ok(Outcome::Done(
            self.reply.parts(head.as_bytes(), filled(out, len)?),
        ))
    }

    fn readdir(&self, arg: fuse_read_in, plus: bool, scratch: &mut [u8]) -> Result<Outcome, Errno> {
        let room = self.reply.room().min(arg.size as usize).min(scratch.len());
        let mut listing = Listing::new(scratch.get_mut(..room).unwrap_or_default());
        let fill =
            |sink: &mut dyn DirSink| self.fs.readdir(&self.caller, self.nodeid, &arg, plus, sink);
        if plus && self.caller.journal.is_on() {
            return Ok(Outcome::Done(self.list(listing, fill)?));
        }
        fill(&mut listing)?;
        Ok(Outcome::Done(self.reply.bytes(listing.finish()?)))
    }
}

fn created((entry, open): (fuse_entry_out, fuse_open_out)) -> fuse_created_out {
    fuse_created_out { entry, open }
}

/// The first `room` bytes of the scratch, emptied of what an earlier request has left there.
fn cleared(scratch: &mut [u8], room: usize) -> &mut [u8] {
    let room = room.min(scratch.len());
    let out = scratch.get_mut(..room).unwrap_or_default();
    out.fill(0);
    out
}

/// What a backend says it has filled; more than there was room for is its mistake.
fn filled(out: &[u8], len: usize) -> Result<&[u8], Errno> {
    out.get(..len).ok_or(Errno::EIO)
}

/// Submits an operation with its length cut to the segments that it works on.
fn submit(op: IoOp, room: u32, pin: Pin) -> Outcome {
    let op = match op {
        IoOp::Read { fd, offset, len } => IoOp::Read {
            fd,
            offset,
            len: len.min(room),
        },
        IoOp::Write { fd, offset, len } => IoOp::Write {
            fd,
            offset,
            len: len.min(room),
        },
        IoOp::Fsync { .. } | IoOp::Fallocate { .. } => op,
    };
    Outcome::Submit { op, pin }
}

/// An argument that carries open(2) flags.
trait OpenFlags {
    fn flags(&mut self) -> &mut u32;
}

macro_rules! open_flags {
    ($($arg:ty)*) => {$(
        impl OpenFlags for $arg {
            fn flags(&mut self) -> &mut u32 {
                &mut self.flags
            }
        }
    )*};
}

open_flags! { fuse_open_in fuse_create_in fuse_read_in fuse_write_in fuse_release_in }
