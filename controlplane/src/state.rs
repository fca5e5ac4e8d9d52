//! The state directory: what the operator has asked for, kept across restarts.
//!
//! One file, replaced whole: a header line with the form's version, the length and the checksum of what follows, and then
//! JSON. The generation before is kept beside it. A file that is damaged, foreign or newer is refused and never touched.
//! The types here are the form on disk; [`crate::model`] turns them into a model and back.

use std::fs::DirBuilder;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use nix::fcntl::Flock;
use nix::fcntl::FlockArg;
use serde::Deserialize;
use serde::Serialize;

const MAGIC: &str = "ferry-state";
const VERSION: u32 = 1;
/// No state comes near this; a file that does is something else.
const MAX_BYTES: u64 = 64 << 20;

/// Everything that the operator has asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateV1 {
    /// The options of the fsdev library.
    pub options: OptionsV1,
    /// The fsdevs, oldest first.
    pub fsdevs: Vec<FsdevV1>,
    /// The transports, oldest first.
    pub transports: Vec<TransportV1>,
    /// The managers, oldest first.
    pub managers: Vec<ManagerV1>,
    /// The functions on hot-plug ports, oldest first; absent in older files.
    #[serde(default)]
    pub functions: Vec<FunctionV1>,
    /// The devices, oldest first.
    pub devices: Vec<DeviceV1>,
    /// Subsystems that were disabled before the start; absent in older files.
    #[serde(default)]
    pub disabled: Vec<String>,
    /// What is wanted of the data plane's own working; absent in older files.
    #[serde(default)]
    pub wishes: WishesV1,
}

/// What is wanted of the data plane's own working.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WishesV1 {
    /// Request slots of all cores together.
    pub small_pool_count: Option<u32>,
    /// Data buffers of all cores together.
    pub large_pool_count: Option<u32>,
    /// How queues are spread over the cores.
    pub scheduler: Option<SchedulerV1>,
}

/// How queues are spread over the cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum SchedulerV1 {
    /// They stay where they are.
    Static {},
    /// They go where there is room.
    Dynamic {
        /// Time between two looks at the loads, in µs.
        period_us: u64,
        /// Load of a queue that is worth moving, in per cent.
        load_limit: u8,
        /// Load of a core that gives queues away, in per cent.
        core_limit: u8,
        /// Most load that a core is given, in per cent.
        core_busy: u8,
    },
}

/// The options of the fsdev library.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptionsV1 {
    /// Objects in the request pool.
    pub fsdev_io_pool_size: u32,
    /// Objects in each thread's cache.
    pub fsdev_io_cache_size: u32,
}

/// A file-system device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsdevV1 {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: FsdevKindV1,
}

/// The kinds of file-system devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum FsdevKindV1 {
    /// A local directory.
    Aio {
        /// The directory.
        root_path: String,
        /// Whether extended attributes are served.
        enable_xattr: bool,
        /// Whether the guest may cache writes.
        enable_writeback_cache: bool,
        /// Largest READ or WRITE in bytes.
        max_xfer_size: u32,
        /// Largest read-ahead in bytes.
        max_readahead: u32,
        /// Whether READ and WRITE are skipped.
        skip_rw: bool,
        /// Validity of attributes in milliseconds, if it was given.
        attr_valid_ms: Option<u32>,
        /// Where calls that may block are made.
        metadata: String,
        /// How the directory is exported; absent in older files.
        #[serde(default)]
        export: Box<ExportV1>,
    },
    /// Answers everything, stores nothing.
    Null {},
    /// Hands everything on to another one.
    Passthru {
        /// The other one's name.
        base: String,
    },
}

/// How a directory is exported. A text is what the parameter of the same name takes; an absent one stands for the default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExportV1 {
    /// What the guest may cache.
    pub cache: Option<String>,
    /// Validity of names in milliseconds.
    pub entry_valid_ms: Option<u32>,
    /// Validity of the absence of names in milliseconds.
    pub negative_valid_ms: Option<u32>,
    /// Whether the guest can change nothing.
    pub read_only: bool,
    /// User ids.
    pub map_uid: String,
    /// Group ids.
    pub map_gid: String,
    /// Which users are squashed.
    pub squash: Option<String>,
    /// The user that they act as.
    pub anon_uid: Option<u32>,
    /// The group that they act as.
    pub anon_gid: Option<u32>,
    /// Names of extended attributes.
    pub xattr_map: String,
}

/// A transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportV1 {
    /// Its name.
    pub name: String,
    /// Whether it has been started.
    pub started: bool,
}

/// An emulation manager.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManagerV1 {
    /// Its name.
    pub name: String,
    /// Whether something else needed it, rather than the operator.
    pub implicit: bool,
}

/// A function on a hot-plug port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionV1 {
    /// Its manager.
    pub manager: String,
    /// Its VUID.
    pub vuid: String,
}

/// How far a device is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceStateV1 {
    /// Not started.
    Idle,
    /// Started.
    Running,
    /// Started and stopped again.
    Stopped,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceV1 {
    /// Its name.
    pub name: String,
    /// Its transport's name.
    pub transport: String,
    /// How far it is to go.
    pub state: DeviceStateV1,
    /// The tag.
    pub tag: Option<String>,
    /// The fsdev.
    pub fsdev: Option<String>,
    /// Number of request queues.
    pub num_request_queues: u32,
    /// Largest size of every queue.
    pub queue_size: u32,
    /// Whether packed rings are offered.
    pub packed_vq: bool,
    /// Whether the notification queue is offered.
    pub notification_vq: bool,
    /// Architecture of the guest.
    pub driver_platform: String,
    /// Manager of its function.
    pub manager: Option<String>,
    /// VUID of its function.
    pub vuid: Option<String>,
}

/// Why the state cannot be kept or used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The operating system refuses.
    #[error("cannot {verb} {}: {error}; check the owner and the mode of the state directory, or choose another one with --state-dir", .path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// On which file.
        path: PathBuf,
        /// Its answer.
        error: io::Error,
    },
    /// Another control plane uses the directory.
    #[error("state directory {} is in use by another control plane; stop it or choose another directory with --state-dir", .0.display())]
    Locked(PathBuf),
    /// The file is of no use.
    #[error("{} {what}; it has not been touched: {}", .path.display(), advice(.path))]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

fn advice(path: &Path) -> String {
    let previous = sibling(path, ".prev");
    if previous.exists() {
        format!(
            "put the generation before it, {}, in its place, or move it away to begin with nothing",
            previous.display()
        )
    } else {
        "move it away to begin with nothing".to_owned()
    }
}

fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// The bytes of a file that holds `state`.
fn encode(state: &StateV1) -> Result<Vec<u8>, serde_json::Error> {
    let mut body = serde_json::to_vec_pretty(state)?;
    body.push(b'\n');
    let checksum = crc32fast::hash(&body);
    let mut bytes = format!("{MAGIC} {VERSION} {} {checksum:08x}\n", body.len()).into_bytes();
    bytes.append(&mut body);
    Ok(bytes)
}

/// Reads what [`encode`] has written; says what is wrong otherwise.
fn decode(bytes: &[u8]) -> Result<StateV1, String> {
    let foreign = || "is not a state file of Ferry".to_owned();
    let torn = |why: String| format!("is damaged: {why}");
    let magic = format!("{MAGIC} ");
    let rest = bytes.strip_prefix(magic.as_bytes()).ok_or_else(|| {
        let beginning = !bytes.is_empty() && magic.as_bytes().starts_with(bytes);
        if bytes.is_empty() || beginning {
            torn("it ends within its header".to_owned())
        } else {
            foreign()
        }
    })?;
    let end = rest.iter().position(|byte| *byte == b'\n');
    let (header, body) = end
        .and_then(|end| Some((rest.get(..end)?, rest.get(end.checked_add(1)?..)?)))
        .ok_or_else(|| torn("it ends within its header".to_owned()))?;
    let header = core::str::from_utf8(header).map_err(|_| foreign())?;
    let mut fields = header.split(' ');
    let version: u32 = fields
        .next()
        .and_then(|field| field.parse().ok())
        .ok_or_else(foreign)?;
    if version != VERSION {
        return Err(format!(
            "has form {version} and this version knows form {VERSION} only; it was written by another version of Ferry"
        ));
    }
    let length: Option<usize> = fields.next().and_then(|field| field.parse().ok());
    let checksum = fields
        .next()
        .and_then(|field| u32::from_str_radix(field, 16).ok());
    let (Some(length), Some(checksum), None) = (length, checksum, fields.next()) else {
        return Err(torn("its header has another form".to_owned()));
    };
    if body.len() != length {
        return Err(torn(format!(
            "{} bytes follow the header, which says {length}",
            body.len()
        )));
    }
    let actual = crc32fast::hash(body);
    if actual != checksum {
        return Err(torn(format!(
            "its checksum is {actual:08x} and the header says {checksum:08x}"
        )));
    }
    serde_json::from_slice(body).map_err(|error| torn(error.to_string()))
}

/// A state directory that this process alone uses.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    path: PathBuf,
    /// What the file holds; empty while there is none.
    written: Vec<u8>,
    _lock: Flock<File>,
}

impl Store {
    /// Takes a directory over, which is created if only it is missing, and reads the state in it.
    pub fn open(dir: &Path) -> Result<(Store, Option<StateV1>), StateError> {
        let io = |verb, path: &Path| {
            let path = path.to_owned();
            move |error| StateError::Io { verb, path, error }
        };
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(io("create state directory", dir)(error));
            }
            Ok(()) | Err(_) => {}
        }
        let lock_path = dir.join("state.lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(io("open", &lock_path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| StateError::Locked(dir.to_owned()))?;
        let path = dir.join("state");
        let mut bytes = Vec::new();
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io("open", &path)(error)),
            Ok(file) => {
                file.take(MAX_BYTES)
                    .read_to_end(&mut bytes)
                    .map_err(io("read", &path))?;
                if bytes.is_empty() {
                    let what = "is damaged: it is empty".to_owned();
                    return Err(StateError::Unusable { path, what });
                }
            }
        }
        let state = if bytes.is_empty() {
            None
        } else {
            let unusable = |what| StateError::Unusable {
                path: path.clone(),
                what,
            };
            Some(decode(&bytes).map_err(unusable)?)
        };
        let store = Store {
            dir: dir.to_owned(),
            path,
            written: bytes,
            _lock: lock,
        };
        Ok((store, state))
    }

    /// The refusal of a state that is well formed and makes no sense.
    pub fn senseless(&self, what: String) -> StateError {
        StateError::Unusable {
            path: self.path.clone(),
            what: format!("makes no sense: {what}"),
        }
    }

    /// Replaces the state if it has changed. When this returns, it survives a loss of power.
    pub fn save(&mut self, state: &StateV1) -> Result<(), StateError> {
        let failed = |error| StateError::Io {
            verb: "write",
            path: self.path.clone(),
            error,
        };
        let bytes = encode(state).map_err(|error| failed(error.into()))?;
        if bytes == self.written {
            return Ok(());
        }
        self.replace(&bytes).map_err(failed)?;
        self.written = bytes;
        Ok(())
    }

    fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let temporary = sibling(&self.path, ".tmp");
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        // At every moment there is a whole state under the one name, and after the first time under the other one too.
        let previous = sibling(&self.path, ".prev");
        let second = sibling(&self.path, ".prev.tmp");
        match std::fs::remove_file(&second) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        match std::fs::hard_link(&self.path, &second) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(()) => std::fs::rename(&second, &previous)?,
        }
        std::fs::rename(&temporary, &self.path)?;
        File::open(&self.dir)?.sync_all()
    }
}

#[cfg(test)]
mod tests;
