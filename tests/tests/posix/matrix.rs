//! Which suites run on which mounts, and the comparison with the directory behind each.

use crate::disk::{Backing, Disk};
use crate::outcome::{Outcome, Outcomes};
use crate::table;
use anyhow::{Context, Result, ensure};
use ferry_tests::{Device, HostMount, Service};
use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// How a guest reaches the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Transport {
    VfioUser,
    VhostUser,
}

pub(crate) const TRANSPORTS: [Transport; 2] = [Transport::VfioUser, Transport::VhostUser];

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::VfioUser => "vfio-user",
            Self::VhostUser => "vhost-user",
        })
    }
}

/// What is exported, and what its guest may cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Export {
    pub(crate) backing: Backing,
    pub(crate) cache: &'static str,
    pub(crate) writeback: bool,
}

/// Every cache, with write-back where that is allowed.
const CACHES: [(&str, bool); 7] = [
    ("never", false),
    ("auto", false),
    ("auto", true),
    ("metadata", false),
    ("metadata", true),
    ("always", false),
    ("always", true),
];

impl Export {
    /// Every cache on this file system.
    pub(crate) fn all_on(backing: Backing) -> impl Iterator<Item = Self> {
        CACHES.into_iter().map(move |(cache, writeback)| Self {
            backing,
            cache,
            writeback,
        })
    }

    /// All there are.
    pub(crate) fn all() -> Vec<Self> {
        Self::all_on(Backing::Ext4)
            .chain(Self::all_on(Backing::Tmpfs))
            .collect()
    }

    /// These: file system, cache, and whether with write-back.
    pub(crate) fn list(exports: &[(Backing, &'static str, bool)]) -> Vec<Self> {
        let of = |&(backing, cache, writeback)| Self {
            backing,
            cache,
            writeback,
        };
        exports.iter().map(of).collect()
    }

    fn parameters(self) -> String {
        let writeback = if self.writeback {
            " --enable-writeback-cache"
        } else {
            ""
        };
        format!("--cache {}{writeback}", self.cache)
    }
}

impl fmt::Display for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let writeback = if self.writeback { ", write-back" } else { "" };
        write!(f, "{}, cache {}{writeback}", self.backing, self.cache)
    }
}

/// Programs that nobody here wrote, as a number of named tests of a directory.
pub(crate) trait Suite: Sync {
    /// Its heading in the table.
    fn name(&self) -> &'static str;
    /// What the table says about it.
    fn about(&self) -> String;
    /// Where it runs.
    fn exports(&self) -> Vec<Export> {
        Export::all()
    }
    /// Fails when this machine lacks something.
    fn ready(&self) -> Result<()>;
    /// Whether a failure on the export itself is a fault of ours, because it leaves nothing to compare.
    fn must_pass_directly(&self) -> bool {
        true
    }
    /// Whether a test may come to this on a mount of `export` where the export itself comes to `direct`.
    fn agrees(&self, _: Export, _test: &str, here: &Outcome, direct: Option<&Outcome>) -> bool {
        here.agrees_with(direct)
    }
    /// Runs everything, or else a fixed part, in an empty directory.
    fn run(&self, dir: &Path) -> Result<Outcomes>;
}

/// Whether everything runs, or the fixed part.
pub(crate) fn full() -> bool {
    env::var_os("FERRY_POSIX_FULL").is_some()
}

/// What of [`Suite::exports`] runs, with its transports. Not everything: each cache somewhere, and each transport.
fn chosen(exports: &[Export]) -> Vec<(Export, Vec<Transport>)> {
    const PART: [(Backing, &str, bool, Transport); 5] = [
        (Backing::Ext4, "auto", false, Transport::VfioUser),
        (Backing::Ext4, "always", true, Transport::VhostUser),
        (Backing::Tmpfs, "never", false, Transport::VhostUser),
        (Backing::Tmpfs, "metadata", false, Transport::VfioUser),
        (Backing::Tmpfs, "auto", true, Transport::VfioUser),
    ];
    let only = env::var("FERRY_POSIX_ONLY").unwrap_or_default();
    let wanted = |export: &Export, transport: Transport| {
        let part = PART.contains(&(export.backing, export.cache, export.writeback, transport));
        (full() || part) && format!("{export}, {transport}").contains(&only)
    };
    exports
        .iter()
        .map(|export| {
            let transports = TRANSPORTS.into_iter().filter(|t| wanted(export, *t));
            (*export, transports.collect())
        })
        .filter(|(_, transports): &(Export, Vec<Transport>)| !transports.is_empty())
        .collect()
}

/// One row of the table.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) export: Export,
    pub(crate) direct: String,
    pub(crate) mounts: BTreeMap<Transport, String>,
}

/// Runs a suite wherever it is to run. Fails with everything that differs from the exports.
pub(crate) fn check(suite: &dyn Suite) -> Result<()> {
    check_with(suite, |rig, transport| {
        let mut found = Outcomes::default();
        rig.on(transport, |mount| {
            found = suite.run(&fresh(mount, &transport.to_string())?)?;
            Ok(())
        })?;
        Ok(found)
    })
}

/// As [`check`], for a suite that `reach`es the device in its own way.
pub(crate) fn check_with(
    suite: &dyn Suite,
    reach: impl Fn(&Rig, Transport) -> Result<Outcomes>,
) -> Result<()> {
    let mut differences = Vec::new();
    let mut direct: BTreeMap<Backing, Outcomes> = BTreeMap::new();
    for (export, transports) in chosen(&suite.exports()) {
        let disk = Disk::new(export.backing)?;
        let expected = match direct.get(&export.backing) {
            Some(known) => known.clone(),
            None => on_the_export(suite, export.backing, disk.path())?,
        };
        direct.insert(export.backing, expected.clone());
        let rig = Rig::new(disk.path(), &export.parameters())?;
        let mut row = Row {
            export,
            direct: expected.counts(),
            mounts: BTreeMap::new(),
        };
        for transport in transports {
            let at = format!("{} on {export}, {transport}", suite.name());
            let found = reach(&rig, transport).with_context(|| at.clone())?;
            println!("{at}: {}", found.counts());
            let agrees = |test: &str, here: &Outcome, direct: Option<&Outcome>| {
                suite.agrees(export, test, here, direct)
            };
            for difference in found.differing_from(&expected, agrees) {
                println!("  {difference}");
                differences.push(format!("{export}, {transport}: {difference}"));
            }
            row.mounts.insert(transport, found.counts());
        }
        if differences.is_empty() && full() && env::var_os("FERRY_POSIX_TABLE").is_some() {
            table::rewrite(suite, &[row])?;
        }
    }
    ensure!(
        differences.is_empty(),
        "{} comes to something else than on the export itself:\n{}",
        suite.name(),
        differences.join("\n")
    );
    Ok(())
}

fn on_the_export(suite: &dyn Suite, backing: Backing, disk: &Path) -> Result<Outcomes> {
    let found = suite.run(&fresh(disk, "direct")?)?;
    println!("{} on {backing}: {}", suite.name(), found.counts());
    for failure in found.failed() {
        println!("  {failure}");
    }
    ensure!(
        found.any_passed(),
        "{} passes nothing on the export itself",
        suite.name()
    );
    let failures: Vec<String> = found.failed().collect();
    ensure!(
        failures.is_empty() || !suite.must_pass_directly(),
        "{} fails on {backing} itself, so it tells nothing about a mount:\n{}",
        suite.name(),
        failures.join("\n")
    );
    Ok(found)
}

fn fresh(below: &Path, name: &str) -> Result<PathBuf> {
    let dir = below.join(name);
    fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
    Ok(dir)
}

const VFIO_USER_TAG: &str = "vfio";
const VHOST_USER_TAG: &str = "vhost";

/// A service with one exported directory and a device of each transport. The supervisor is stopped when dropped.
pub(crate) struct Rig {
    service: Service,
    export: PathBuf,
    vfio_user: PathBuf,
    vhost_user: PathBuf,
}

impl Rig {
    /// Exports a new directory below `base`.
    pub(crate) fn new(base: &Path, parameters: &str) -> Result<Self> {
        let service = Service::start()?;
        let export = fresh(base, "export")?;
        service.call(&format!(
            "fsdev_aio_create aio0 {} --enable-xattr {parameters}",
            export.display()
        ))?;
        let vfio_user = service.start_doca_device("vfio", VFIO_USER_TAG, "aio0")?;
        let vhost_user = service.start_vhost_user_device("vhost", VHOST_USER_TAG, "aio0")?;
        Ok(Self {
            service,
            export,
            vfio_user,
            vhost_user,
        })
    }

    pub(crate) fn export(&self) -> &Path {
        &self.export
    }

    /// The device of this transport, and its tag.
    pub(crate) fn device(&self, transport: Transport) -> (Device, &'static str) {
        let socket = self.socket(transport).to_path_buf();
        match transport {
            Transport::VfioUser => (Device::VfioUser(socket), VFIO_USER_TAG),
            Transport::VhostUser => {
                let tag = VHOST_USER_TAG.to_owned();
                (Device::VhostUser { socket, tag }, VHOST_USER_TAG)
            }
        }
    }

    fn socket(&self, transport: Transport) -> &Path {
        match transport {
            Transport::VfioUser => &self.vfio_user,
            Transport::VhostUser => &self.vhost_user,
        }
    }

    /// What the service has logged.
    pub(crate) fn log(&self) -> String {
        self.service.log()
    }

    /// Runs `check` on a mount.
    pub(crate) fn on(
        &self,
        transport: Transport,
        check: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let mount: HostMount = self.service.mount(self.socket(transport))?;
        check(mount.path()).with_context(|| format!("log of the service:\n{}", self.log()))?;
        mount.unmount()
    }
}
