//! File-system devices and the options of their library.

use ferry_shared::errno::Errno;
use ferry_shared::limits;
use ferry_shared::msg::Command;
use ferry_shared::msg::Failure;
use ferry_shared::msg::FsdevKind;
use ferry_shared::msg::FsdevSpec;
use ferry_shared::msg::Placement;

use super::Effect;
use super::Model;
use super::Step;
use super::Ticket;
use super::refuse;

/// A file-system device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fsdev {
    /// What it is.
    pub spec: FsdevSpec,
    pub(super) state: FsdevState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FsdevState {
    Creating,
    /// Exists in the data plane.
    Present,
    /// Wanted, but the data plane does not have it (it could not be created again after a restart).
    Missing,
    Deleting,
}

impl Fsdev {
    pub(super) fn is_being_created(&self) -> bool {
        self.state == FsdevState::Creating
    }
}

/// The options of the fsdev library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FsdevOptions {
    /// Objects in the request pool.
    pub io_pool_size: u32,
    /// Objects in each thread's cache.
    pub io_cache_size: u32,
}

impl Default for FsdevOptions {
    fn default() -> FsdevOptions {
        FsdevOptions {
            io_pool_size: limits::DEFAULT_IO_POOL_SIZE,
            io_cache_size: limits::DEFAULT_IO_CACHE_SIZE,
        }
    }
}

/// The name that `fsdev_get_fsdevs` gives to a kind.
pub(crate) fn module_name(kind: &FsdevKind) -> &'static str {
    match kind {
        FsdevKind::Aio(_) => "aio",
        FsdevKind::Null => "null",
        FsdevKind::Passthru { .. } => "passthru_external",
    }
}

/// How the names of a kind's methods begin.
pub(crate) fn method_stem(kind: &FsdevKind) -> &'static str {
    match kind {
        FsdevKind::Passthru { .. } => "fsdev_passthru_ext",
        FsdevKind::Aio(_) => "fsdev_aio",
        FsdevKind::Null => "fsdev_null",
    }
}

fn base_of(spec: &FsdevSpec) -> Option<&str> {
    match &spec.kind {
        FsdevKind::Passthru { base } => Some(base),
        FsdevKind::Aio(_) | FsdevKind::Null => None,
    }
}

/// Puts fsdevs in an order in which they can be created: each after the one that it hands on to.
pub(super) fn in_order(mut specs: Vec<FsdevSpec>) -> Vec<FsdevSpec> {
    let mut ordered: Vec<FsdevSpec> = Vec::with_capacity(specs.len());
    loop {
        let waits = |spec: &FsdevSpec, others: &[FsdevSpec]| {
            let base = base_of(spec);
            base.is_some_and(|base| others.iter().any(|other| other.name == base))
        };
        let (later, now): (Vec<_>, Vec<_>) = {
            let names = specs.clone();
            specs.into_iter().partition(|spec| waits(spec, &names))
        };
        if now.is_empty() {
            ordered.extend(later);
            return ordered;
        }
        ordered.extend(now);
        specs = later;
    }
}

const PLACEMENTS: [(&str, Placement); 3] = [
    ("inline", Placement::Inline),
    ("offload", Placement::Offload),
    ("auto", Placement::Auto),
];

/// The name of a way to make calls that may block.
pub(crate) fn placement_name(placement: Placement) -> &'static str {
    PLACEMENTS
        .into_iter()
        .find(|(_, known)| *known == placement)
        .map_or("auto", |(name, _)| name)
}

/// Looks such a name up.
pub(crate) fn parse_placement(name: &str) -> Result<Placement, Failure> {
    PLACEMENTS
        .into_iter()
        .find(|(known, _)| *known == name)
        .map(|(_, placement)| placement)
        .ok_or_else(|| {
            Failure::new(
                Errno::EINVAL,
                format!("metadata {name:?} is not one of inline, offload, auto"),
            )
        })
}

impl Model {
    fn fsdev_mut(&mut self, name: &str) -> Option<&mut Fsdev> {
        self.fsdevs.iter_mut().find(|fsdev| fsdev.spec.name == name)
    }

    /// Begins to create an fsdev.
    pub fn fsdev_create(&mut self, spec: FsdevSpec) -> Result<Step, Failure> {
        spec.check()?;
        if self.fsdevs.iter().any(|fsdev| fsdev.spec.name == spec.name) {
            return refuse(Errno::EEXIST, format!("fsdev {} already exists", spec.name));
        }
        if let Some(base) = base_of(&spec) {
            self.fsdev(base)?;
        }
        self.fsdevs.push(Fsdev {
            spec: spec.clone(),
            state: FsdevState::Creating,
        });
        let effect = Effect::FsdevCreate(spec.name.clone());
        Ok(Step::Send(Box::new(Ticket {
            command: Command::FsdevCreate(spec),
            effect,
        })))
    }

    /// Begins to delete an fsdev of the given module.
    pub fn fsdev_delete(&mut self, name: &str, module: &str) -> Result<Step, Failure> {
        let found = self.fsdev_mut(name);
        let Some(fsdev) = found.filter(|fsdev| fsdev.state != FsdevState::Creating) else {
            return refuse(Errno::ENODEV, format!("there is no fsdev {name}"));
        };
        let actual = module_name(&fsdev.spec.kind);
        if actual != module {
            return refuse(
                Errno::ENODEV,
                format!(
                    "fsdev {name} is of module {actual}, not {module}; use {}_delete {name}",
                    method_stem(&fsdev.spec.kind)
                ),
            );
        }
        let state = fsdev.state;
        let mut others = self.fsdevs.iter();
        if let Some(above) = others.find(|other| base_of(&other.spec) == Some(name)) {
            let detail = format!(
                "fsdev {0} hands on to fsdev {name}; delete it first with {1}_delete {0}",
                above.spec.name,
                method_stem(&above.spec.kind)
            );
            return refuse(Errno::EBUSY, detail);
        }
        match state {
            FsdevState::Deleting => refuse(Errno::EBUSY, format!("fsdev {name} is being deleted")),
            FsdevState::Missing => {
                self.fsdevs.retain(|fsdev| fsdev.spec.name != name);
                Ok(Step::Done)
            }
            FsdevState::Present | FsdevState::Creating => {
                if let Some(fsdev) = self.fsdev_mut(name) {
                    fsdev.state = FsdevState::Deleting;
                }
                let command = Command::FsdevDelete {
                    name: name.to_owned(),
                };
                Ok(Step::Send(Box::new(Ticket {
                    command,
                    effect: Effect::FsdevDelete(name.to_owned()),
                })))
            }
        }
    }

    pub(super) fn fsdev_created(&mut self, name: &str, done: bool) {
        if done {
            if let Some(fsdev) = self.fsdev_mut(name) {
                fsdev.state = FsdevState::Present;
            }
        } else {
            self.fsdevs.retain(|fsdev| fsdev.spec.name != name);
        }
    }

    pub(super) fn fsdev_deleted(&mut self, name: &str, done: bool) {
        if done {
            self.fsdevs.retain(|fsdev| fsdev.spec.name != name);
        } else if let Some(fsdev) = self.fsdev_mut(name) {
            fsdev.state = FsdevState::Present;
        }
    }

    /// Finds an fsdev by name.
    pub fn fsdev(&self, name: &str) -> Result<&Fsdev, Failure> {
        self.fsdevs()
            .find(|fsdev| fsdev.spec.name == name)
            .ok_or_else(|| Failure::new(Errno::ENODEV, format!("there is no fsdev {name}")))
    }

    /// Sets the options of the fsdev library. The pool must fill the cache of every thread: the cores and the manager.
    pub fn set_options(&mut self, options: FsdevOptions) -> Result<(), Failure> {
        let threads = u64::from(self.platform.cores) + 1;
        let least = u64::from(options.io_cache_size) * threads;
        if u64::from(options.io_pool_size) < least || options.io_pool_size == 0 {
            return refuse(
                Errno::EINVAL,
                format!(
                    "fsdev_io_pool_size {} must be at least {least}, fsdev_io_cache_size {} for each of {threads} threads",
                    options.io_pool_size, options.io_cache_size
                ),
            );
        }
        self.options = options;
        Ok(())
    }
}
