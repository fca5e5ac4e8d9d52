//! The firmware parameters of an emulation manager: names, ranges, defaults, and where values are kept.
//!
//! Owns the list of parameters and the form of two files: the *store* (what the next start of the data plane takes, as a
//! DPU's flash does) and the *record* (what the running data plane took). [`super::Platform`] reads both ways; the tool
//! `ferry fwconfig` shows and changes them. Nothing here knows what a parameter does.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ferry_shared::limits::{MAX_HOTPLUG_FUNCTIONS, MAX_MSIX_VECTORS};
use nix::fcntl::{Flock, FlockArg};
use toml::{Table, Value};

use super::PlatformError;

/// Where the store is when nobody names another place: not in a state directory, which the control plane may own.
pub const DEFAULT_STORE: &str = "/etc/ferry/firmware.toml";

/// The record's name in the run directory.
pub const RECORD: &str = "firmware.toml";

/// A parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// The firmware's name for it.
    pub name: &'static str,
    /// Its value after a reset of the configuration.
    pub default: u32,
    /// Its smallest value.
    pub low: u32,
    /// Its largest value.
    pub high: u32,
    /// What its values are called, if they have names.
    pub words: &'static [&'static str],
}

const SWITCH: &[&str] = &["False", "True"];

const fn number(name: &'static str, default: u32, high: u32) -> Parameter {
    let (low, words) = (0, &[] as &[&str]);
    Parameter {
        name,
        default,
        low,
        high,
        words,
    }
}

const fn switch(name: &'static str) -> Parameter {
    let (default, words) = (0, SWITCH);
    Parameter {
        default,
        words,
        ..number(name, default, 1)
    }
}

/// Whether the DPU's own processors run the emulation.
pub const INTERNAL_CPU_MODEL: &str = "INTERNAL_CPU_MODEL";
/// Whether there is a PCIe switch for hot-plugged functions.
pub const SWITCH_ENABLE: &str = "PCI_SWITCH_EMULATION_ENABLE";
/// Its ports; one of them belongs to the static functions.
pub const SWITCH_NUM_PORT: &str = "PCI_SWITCH_EMULATION_NUM_PORT";
/// Whether there are virtio-fs functions.
pub const EMULATION_ENABLE: &str = "VIRTIO_FS_EMULATION_ENABLE";
/// Static functions.
pub const NUM_PF: &str = "VIRTIO_FS_EMULATION_NUM_PF";
/// Virtual functions.
pub const NUM_VF: &str = "VIRTIO_FS_EMULATION_NUM_VF";
/// MSI-X vectors of a function.
pub const NUM_MSIX: &str = "VIRTIO_FS_EMULATION_NUM_MSIX";
/// PCI subsystem vendor id of a function.
pub const SUBSYSTEM_VENDOR_ID: &str = "VIRTIO_FS_EMU_SUBSYSTEM_VENDOR_ID";
/// PCI subsystem id of a function.
pub const SUBSYSTEM_ID: &str = "VIRTIO_FS_EMULATION_SUBSYSTEM_ID";

/// All parameters, in the order in which they are shown.
pub const PARAMETERS: [Parameter; 12] = [
    Parameter {
        default: 1,
        words: &["SEPARATED_HOST", "EMBEDDED_CPU"],
        ..switch(INTERNAL_CPU_MODEL)
    },
    switch(SWITCH_ENABLE),
    number(SWITCH_NUM_PORT, 0, MAX_HOTPLUG_FUNCTIONS + 1),
    switch(EMULATION_ENABLE),
    number(NUM_VF, 0, 0),
    number(NUM_PF, 0, 2),
    number(SUBSYSTEM_VENDOR_ID, 0x1af4, 0xffff),
    number(SUBSYSTEM_ID, 0x105a, 0xffff),
    number(NUM_MSIX, 2, MAX_MSIX_VECTORS),
    // Scalable functions are the network's: the values are kept, and nothing here acts on them.
    switch("PER_PF_NUM_SF"),
    number("PF_SF_BAR_SIZE", 0, 31),
    number("PF_TOTAL_SF", 0, 0xffff),
];

impl Parameter {
    /// Finds a parameter; names are case-sensitive.
    pub fn find(name: &str) -> Option<&'static Parameter> {
        PARAMETERS.iter().find(|p| p.name == name)
    }

    /// A value as it is shown.
    pub fn show(&self, value: u32) -> String {
        match self.words.get(value as usize) {
            Some(word) => format!("{word}({value})"),
            None => value.to_string(),
        }
    }

    /// Reads a value: a number, decimal or hexadecimal, or its name in letters of either case.
    pub fn read(&self, text: &str) -> Option<u32> {
        let named = self.words.iter().zip(0..);
        let named = named
            .filter(|(word, _)| word.eq_ignore_ascii_case(text))
            .map(|(_, n)| n);
        named.last().or_else(|| match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16).ok(),
            None => text.parse().ok(),
        })
    }
}

/// The values of all parameters of one manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings([u32; PARAMETERS.len()]);

impl Default for Settings {
    fn default() -> Settings {
        Settings(PARAMETERS.map(|p| p.default))
    }
}

impl Settings {
    /// The value of a parameter of [`PARAMETERS`].
    pub fn get(&self, name: &str) -> u32 {
        let found = PARAMETERS.iter().zip(self.0).find(|(p, _)| p.name == name);
        found.map_or(0, |(_, value)| value)
    }

    /// Sets a parameter; `most_pf` is what the platform allows of [`NUM_PF`]. The refusal says what is allowed.
    pub fn set(&mut self, name: &str, value: i64, most_pf: u32) -> Result<(), String> {
        let Some((parameter, place)) = PARAMETERS
            .iter()
            .zip(&mut self.0)
            .find(|p| p.0.name == name)
        else {
            return Err(format!("unknown key {name} = {value}"));
        };
        let high = match name {
            NUM_PF => most_pf,
            _ => parameter.high,
        };
        let low = parameter.low;
        match u32::try_from(value) {
            Ok(value) if (low..=high).contains(&value) => {
                *place = value;
                Ok(())
            }
            _ => Err(format!(
                "{name} = {value} is not allowed, only {}",
                range(low, high)
            )),
        }
    }

    /// Sets what a table says; parameters that it does not name keep their values.
    pub(super) fn read(&mut self, table: Table, most_pf: u32) -> Result<(), String> {
        for (name, value) in table {
            let Some(parameter) = Parameter::find(&name) else {
                return Err(format!("unknown key {name} = {value}"));
            };
            let Value::Integer(value) = value else {
                let allowed = range(parameter.low, parameter.high);
                return Err(format!("{name} = {value} is not allowed, only {allowed}"));
            };
            self.set(&name, value, most_pf)?;
        }
        Ok(())
    }

    /// Checks the values against each other, as the firmware does before it takes them.
    pub fn check(&self) -> Result<(), String> {
        if self.get(INTERNAL_CPU_MODEL) == 0 {
            let needs = [EMULATION_ENABLE, SWITCH_ENABLE]
                .into_iter()
                .find(|name| self.get(name) != 0);
            if let Some(name) = needs {
                return Err(format!(
                    "{INTERNAL_CPU_MODEL} = 0 is not possible with {name} = 1, set it to 1"
                ));
            }
        }
        Ok(())
    }

    /// The parameters with their values.
    pub fn iter(&self) -> impl Iterator<Item = (&'static Parameter, u32)> {
        PARAMETERS.iter().zip(self.0)
    }
}

fn range(low: u32, high: u32) -> String {
    if low == high {
        low.to_string()
    } else {
        format!("an integer from {low} to {high}")
    }
}

/// The content of a store or a record: settings by the name of their manager.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firmware {
    /// In a record: the platform file and the store that were used.
    pub origin: Option<Origin>,
    /// The settings of each manager. In a store, one that is not here has those of the platform file.
    pub settings: BTreeMap<String, Settings>,
}

/// Where a data plane has its platform from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Its platform file; `None`: the built-in platform.
    pub platform: Option<PathBuf>,
    /// Its store.
    pub store: PathBuf,
}

impl Firmware {
    /// Reads a file; `None` if it is not there. `most_pf` says what each manager may have of [`NUM_PF`].
    pub fn load(
        path: &Path,
        most_pf: impl Fn(&str) -> u32,
    ) -> Result<Option<Firmware>, PlatformError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Firmware::parse(path, &text, most_pf).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(PlatformError::Read {
                what: "firmware settings",
                path: path.display().to_string(),
                error,
            }),
        }
    }

    /// Reads [`Firmware::text`]; `path` is what errors name.
    pub fn parse(
        path: &Path,
        text: &str,
        most_pf: impl Fn(&str) -> u32,
    ) -> Result<Firmware, PlatformError> {
        let shown = || path.display().to_string();
        let wrong = |place: String, problem: String| PlatformError::Content {
            what: "firmware settings",
            path: shown(),
            place,
            problem,
        };
        let table = text
            .parse::<Table>()
            .map_err(|error| PlatformError::Syntax {
                what: "firmware settings",
                path: shown(),
                error: Box::new(error),
            })?;
        let mut firmware = Firmware::default();
        for (key, value) in table {
            let origin = firmware.origin.get_or_insert_default();
            match (key.as_str(), value) {
                ("platform", Value::String(path)) => origin.platform = Some(path.into()),
                ("store", Value::String(path)) => origin.store = path.into(),
                ("manager", Value::Table(managers)) => {
                    for (name, values) in managers {
                        let place = format!("manager {name}");
                        let Value::Table(values) = values else {
                            return Err(wrong(place, format!("{values} is not a table")));
                        };
                        let mut settings = Settings::default();
                        let read = settings.read(values, most_pf(&name));
                        read.and_then(|()| settings.check())
                            .map_err(|problem| wrong(place, problem))?;
                        firmware.settings.insert(name, settings);
                    }
                }
                (key, value) => {
                    return Err(wrong(
                        "top level".into(),
                        format!("unknown key {key} = {value}"),
                    ));
                }
            }
        }
        firmware.origin = firmware.origin.filter(|o| !o.store.as_os_str().is_empty());
        Ok(firmware)
    }

    /// What a file of these settings holds.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |words: std::fmt::Arguments| {
            // Writing to a string cannot fail.
            let _ = text.write_fmt(words);
        };
        let quoted = |path: &Path| Value::String(path.to_string_lossy().into_owned());
        if let Some(Origin { platform, store }) = &self.origin {
            if let Some(platform) = platform {
                line(format_args!("platform = {}\n", quoted(platform)));
            }
            line(format_args!("store = {}\n", quoted(store)));
        }
        for (name, settings) in &self.settings {
            line(format_args!("\n[manager.{name}]\n"));
            for (parameter, value) in settings.iter() {
                line(format_args!("{} = {value}\n", parameter.name));
            }
        }
        text
    }

    /// Replaces a file whole or not at all.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".new");
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o644)
            .open(&temporary)?;
        file.write_all(self.text().as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        File::open(parent(path))?.sync_all()
    }
}

fn parent(path: &Path) -> &Path {
    path.parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Keeps others from changing a store until it is dropped; its directory is created if it is missing.
pub fn lock(store: &Path) -> io::Result<Flock<File>> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(parent(store))?;
    let mut path = store.as_os_str().to_owned();
    path.push(".lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

#[cfg(test)]
mod tests;
