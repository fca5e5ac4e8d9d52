//! The kinds of file-system devices, and how one is made from its specification.

use ferry_shared::errno::Errno;
use ferry_shared::msg::{Failure, FsdevKind, FsdevSpec};

use crate::dispatch::{self, Incoming, Outcome};
use crate::fsdev::null::Null;
use crate::fsdev::passthrough::Passthrough;
use crate::fsdev::{FsDev, IoOp, Pin};
use crate::fuse::session::Session;
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
    /// Makes the backend for one device.
    pub fn new(spec: &FsdevSpec) -> Result<AnyFsDev, Failure> {
        match &spec.kind {
            FsdevKind::Aio(aio) => {
                let name_it = |f: Failure| {
                    Failure::new(f.errno, format!("fsdev {}: {}", spec.name, f.detail))
                };
                let passthrough = Passthrough::new(aio).map_err(name_it)?;
                Ok(AnyFsDev::Aio(Box::new(passthrough)))
            }
            FsdevKind::Null => Ok(AnyFsDev::Null(Null)),
            FsdevKind::Passthru { base } => Err(Failure::new(
                Errno::ENODEV,
                format!("fsdev {} is nothing without fsdev {base}", spec.name),
            )),
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
