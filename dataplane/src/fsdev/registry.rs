//! The kinds of file-system devices, and how one is made from its specification.

use ferry_shared::errno::Errno;
use ferry_shared::msg::{AioSpec, Failure, FsdevKind, FsdevSpec};

use crate::dispatch::{self, Incoming, Outcome};
use crate::fsdev::null::Null;
use crate::fsdev::passthrough::{Capacity, Passthrough};
use crate::fsdev::{FsDev, IoOp, Pin};
use crate::fuse::session::Session;
use crate::keeper::Keeper;
use crate::mem::Segments;
use crate::reactor::Backend;

/// A backend of any kind. The kind is looked at once per request; what follows is static.
pub enum AnyFsDev {
    /// A local directory.
    Aio(Box<Passthrough>),
    /// Answers without doing anything.
    Null(Null),
}

impl AnyFsDev {
    /// Makes the backend for one device, gone with the process.
    pub fn new(spec: &FsdevSpec) -> Result<AnyFsDev, Failure> {
        AnyFsDev::make(spec, Passthrough::new)
    }

    /// Makes the backend of the device that has this name in the recovery memory: the one that an earlier process has left,
    /// or a new one. Whether it goes on with what was there.
    pub fn lasting(
        spec: &FsdevSpec,
        device: &str,
        keeper: &Keeper,
    ) -> Result<(AnyFsDev, bool), Failure> {
        // A backend without tables has nothing that could be missing.
        let mut adopted = true;
        let backend = AnyFsDev::make(spec, |aio| {
            let Some(region) = keeper.region() else {
                adopted = false;
                return Passthrough::new(aio);
            };
            let capacity = Capacity::default();
            let failed =
                |error: &dyn std::fmt::Display| Failure::new(Errno::ENOMEM, error.to_string());
            let prefix = format!("fs/{device}/");
            let names = region.areas();
            let there = names.iter().rfind(|name| name.starts_with(&prefix));
            adopted = there.is_some();
            let area = match there {
                Some(name) => region.area(name).map_err(|e| failed(&e))?,
                None => {
                    let len = Passthrough::area_len(&capacity).unwrap_or(u64::MAX);
                    let name = format!("{prefix}{}", region.next_serial());
                    Some(region.add_area(&name, len).map_err(|e| failed(&e))?)
                }
            };
            let area = area.ok_or_else(|| failed(&"the recovery memory has lost an area"))?;
            drop(region);
            Passthrough::in_area(aio, capacity, &area, Some(keeper.fds().clone()))
        })?;
        Ok((backend, adopted))
    }

    fn make(
        spec: &FsdevSpec,
        aio: impl FnOnce(&AioSpec) -> Result<Passthrough, Failure>,
    ) -> Result<AnyFsDev, Failure> {
        match &spec.kind {
            FsdevKind::Aio(of) => {
                let name_it = |f: Failure| {
                    Failure::new(f.errno, format!("fsdev {}: {}", spec.name, f.detail))
                };
                Ok(AnyFsDev::Aio(Box::new(aio(of).map_err(name_it)?)))
            }
            FsdevKind::Null => Ok(AnyFsDev::Null(Null)),
            FsdevKind::Passthru { base } => Err(Failure::new(
                Errno::ENODEV,
                format!("fsdev {} is nothing without fsdev {base}", spec.name),
            )),
        }
    }

    /// Nobody needs it any more: its recovery memory goes with it.
    pub fn discard(&self) {
        match self {
            AnyFsDev::Aio(fs) => fs.discard(),
            AnyFsDev::Null(_) => {}
        }
    }

    /// Goes on with the mount that the session's record says an earlier process had.
    pub fn resume(&self, session: &Session) {
        match self {
            AnyFsDev::Aio(fs) => session.resume(&**fs),
            AnyFsDev::Null(fs) => session.resume(fs),
        }
    }
}

impl Backend for AnyFsDev {
    fn execute(&self, session: &Session, rq: Incoming<'_>) -> Outcome {
        match self {
            AnyFsDev::Aio(fs) => dispatch::execute(Some(&**fs), session, rq),
            AnyFsDev::Null(fs) => dispatch::execute(Some(fs), session, rq),
        }
    }

    fn finish_io(&self, input: &[u8], reply: Segments<'_>, done: (IoOp, Pin, i32)) -> u32 {
        match self {
            AnyFsDev::Aio(fs) => fs.finish_io(input, reply, done),
            AnyFsDev::Null(fs) => fs.finish_io(input, reply, done),
        }
    }

    fn may_block(&self, opcode: u32) -> bool {
        match self {
            AnyFsDev::Aio(fs) => FsDev::may_block(&**fs, opcode),
            AnyFsDev::Null(fs) => FsDev::may_block(fs, opcode),
        }
    }

    fn lock_epoch(&self) -> u64 {
        match self {
            AnyFsDev::Aio(fs) => FsDev::lock_epoch(&**fs),
            AnyFsDev::Null(fs) => FsDev::lock_epoch(fs),
        }
    }

    fn wait_ended(&self, unique: u64) {
        match self {
            AnyFsDev::Aio(fs) => FsDev::wait_ended(&**fs, unique),
            AnyFsDev::Null(fs) => FsDev::wait_ended(fs, unique),
        }
    }

    fn reset(&self, session: &Session) {
        match self {
            AnyFsDev::Aio(fs) => session.reset(&**fs),
            AnyFsDev::Null(fs) => session.reset(fs),
        }
    }
}
