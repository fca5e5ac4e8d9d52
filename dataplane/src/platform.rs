//! The emulated platform: which managers and PCIe functions exist.
//!
//! Owns the reading of the platform file, which stands for a DPU's firmware configuration. It is read once at start, by
//! `main`; nothing changes it afterwards. It never opens a socket: a function's socket exists while a device is started
//! on it.

use std::path::{Path, PathBuf};

use ferry_shared::errno::Errno;
use ferry_shared::limits::{MAX_MSIX_VECTORS, NAME_LEN};
use ferry_shared::msg::{Failure, Function, Manager};
use toml::{Table, Value};

/// What the data plane uses when no file is given.
const DEFAULT_TEXT: &str = include_str!("../../tools/deploy/platform.toml");

/// `VIRTIO_FS_EMULATION_NUM_PF` of the firmware: at most this many static functions.
const FIRMWARE_STATIC_FUNCTIONS: i64 = 2;
/// How far `max_static_functions` can extend that.
const MAX_STATIC_FUNCTIONS: i64 = 8;
/// Functions 0 and 1 of the device are its network ports.
const FIRST_FUNCTION: u16 = 2;

/// Why a platform file is refused.
#[derive(Debug, thiserror::Error)]
pub enum PlatformError {
    /// It cannot be read.
    #[error("cannot read platform file {path}: {error}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// It is not TOML.
    #[error("platform file {path} is not valid TOML: {error}")]
    Syntax {
        /// The file.
        path: String,
        /// Where and why.
        error: Box<toml::de::Error>,
    },
    /// A key or a value is wrong.
    #[error("platform file {path}: {place}: {problem}")]
    Content {
        /// The file.
        path: String,
        /// Which manager, which key.
        place: String,
        /// The value, and what is allowed.
        problem: String,
    },
}

/// The managers and functions, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    managers: Vec<EmulationManager>,
}

/// One emulation manager.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmulationManager {
    /// Device name.
    pub name: String,
    /// Hot-plug ports.
    pub hotplug_ports: u32,
    /// Its static functions.
    pub functions: Vec<StaticFunction>,
}

/// One static PCIe function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaticFunction {
    /// Vendor unique identifier.
    pub vuid: String,
    /// `dddd:bb:dd.f`.
    pub pci_address: String,
    /// Size of its MSI-X table; 0: no MSI-X.
    pub num_msix: u16,
    /// PCI subsystem vendor id.
    pub subsystem_vendor: u16,
    /// PCI subsystem id.
    pub subsystem: u16,
}

impl StaticFunction {
    /// Where its vfio-user socket is, when there is one.
    pub fn socket(&self, run_dir: &Path) -> PathBuf {
        run_dir.join("pci").join(format!("{}.sock", self.vuid))
    }
}

impl Platform {
    /// Reads the file, or takes the built-in default if there is none.
    pub fn load(file: Option<&Path>) -> Result<Platform, PlatformError> {
        let Some(path) = file else {
            return Platform::parse(Path::new("(built-in)"), DEFAULT_TEXT);
        };
        let text = std::fs::read_to_string(path).map_err(|error| PlatformError::Read {
            path: path.display().to_string(),
            error,
        })?;
        Platform::parse(path, &text)
    }

    /// Reads a platform out of a text; `path` is what errors name.
    pub fn parse(path: &Path, text: &str) -> Result<Platform, PlatformError> {
        let table = text
            .parse::<Table>()
            .map_err(|error| PlatformError::Syntax {
                path: path.display().to_string(),
                error: Box::new(error),
            })?;
        Platform::from_table(table).map_err(|Wrong { place, problem }| PlatformError::Content {
            path: path.display().to_string(),
            place,
            problem,
        })
    }

    fn from_table(table: Table) -> Result<Platform, Wrong> {
        let mut top = Section::new("top level".into(), table);
        let managers = match top.table.remove("manager") {
            None => Vec::new(),
            Some(Value::Array(list)) => list,
            Some(other) => {
                return Err(top.wrong("manager", format!("{other} is not a list of [[manager]]")));
            }
        };
        top.finish()?;
        let mut platform = Platform {
            managers: Vec::new(),
        };
        for (n, value) in managers.into_iter().enumerate() {
            let place = format!("manager number {}", n + 1);
            let Value::Table(table) = value else {
                return Err(Wrong {
                    place,
                    problem: format!("{value} is not a table"),
                });
            };
            let manager = read_manager(Section::new(place, table))?;
            platform.check_unique(&manager)?;
            platform.managers.push(manager);
        }
        Ok(platform)
    }

    fn check_unique(&self, new: &EmulationManager) -> Result<(), Wrong> {
        let wrong = |key: &str, value: &str| Wrong {
            place: format!("manager {}", new.name),
            problem: format!("{key} {value} is also that of another manager"),
        };
        for old in &self.managers {
            if old.name == new.name {
                return Err(wrong("name", &new.name));
            }
            for (a, b) in old.functions.iter().zip(&new.functions) {
                if a.vuid == b.vuid {
                    return Err(wrong("VUID (from serial)", &a.vuid));
                }
                if a.pci_address == b.pci_address {
                    return Err(wrong("PCI address (from domain and bus)", &a.pci_address));
                }
            }
        }
        Ok(())
    }

    /// The managers.
    pub fn managers(&self) -> &[EmulationManager] {
        &self.managers
    }

    /// Finds a function, or says which of the two names is unknown.
    pub fn find(&self, manager: &str, vuid: &str) -> Result<&StaticFunction, Failure> {
        let Some(found) = self.managers.iter().find(|m| m.name == manager) else {
            return Err(Failure::new(
                Errno::ENODEV,
                format!("there is no emulation manager {manager:?} on this platform"),
            ));
        };
        let function = found.functions.iter().find(|f| f.vuid == vuid);
        function.ok_or_else(|| {
            Failure::new(
                Errno::ENODEV,
                format!("emulation manager {manager} has no function with VUID {vuid:?}"),
            )
        })
    }

    /// The managers, as the control plane is told.
    pub fn describe_managers(&self) -> impl Iterator<Item = Manager> + '_ {
        self.managers.iter().map(|m| Manager {
            name: m.name.clone(),
            hotplug_ports: m.hotplug_ports,
        })
    }

    /// The functions, as the control plane is told.
    pub fn describe_functions<'a>(
        &'a self,
        run_dir: &'a Path,
    ) -> impl Iterator<Item = Function> + 'a {
        let of = move |m: &'a EmulationManager| {
            m.functions.iter().map(move |f| Function {
                manager: m.name.clone(),
                vuid: f.vuid.clone(),
                pci_address: f.pci_address.clone(),
                hotplug: false,
                socket: f.socket(run_dir).to_string_lossy().into_owned(),
            })
        };
        self.managers.iter().flat_map(of)
    }
}

/// What is wrong, and where.
struct Wrong {
    place: String,
    problem: String,
}

/// A table of the file, taken apart key by key; what is left at the end is unknown.
struct Section {
    place: String,
    table: Table,
}

impl Section {
    fn new(place: String, table: Table) -> Section {
        Section { place, table }
    }

    fn wrong(&self, key: &str, problem: impl std::fmt::Display) -> Wrong {
        Wrong {
            place: self.place.clone(),
            problem: format!("{key} = {problem}"),
        }
    }

    fn integer(&mut self, key: &str, low: i64, high: i64, default: i64) -> Result<i64, Wrong> {
        match self.table.remove(key) {
            None => Ok(default),
            Some(Value::Integer(n)) if (low..=high).contains(&n) => Ok(n),
            Some(other) if low == high => {
                Err(self.wrong(key, format!("{other} is not allowed, only {low}")))
            }
            Some(other) => Err(self.wrong(
                key,
                format!("{other} is not allowed, only an integer from {low} to {high}"),
            )),
        }
    }

    /// As [`Section::integer`], for ranges that fit 16 bits.
    fn small(&mut self, key: &str, low: u16, high: u16, default: u16) -> Result<u16, Wrong> {
        let n = self.integer(key, low.into(), high.into(), default.into())?;
        Ok(u16::try_from(n).unwrap_or(default))
    }

    /// A name of letters, digits, `_` and `-`: it becomes part of a file name.
    fn word(&mut self, key: &str, max: usize) -> Result<String, Wrong> {
        let good = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
        match self.table.remove(key) {
            Some(Value::String(s)) if !s.is_empty() && s.len() <= max && s.bytes().all(good) => {
                Ok(s)
            }
            Some(other) => Err(self.wrong(
                key,
                format!("{other} is not allowed, only 1 to {max} letters, digits, '_' and '-'"),
            )),
            None => Err(Wrong {
                place: self.place.clone(),
                problem: format!("{key} is missing"),
            }),
        }
    }

    fn finish(self) -> Result<(), Wrong> {
        match self.table.iter().next() {
            None => Ok(()),
            Some((key, value)) => Err(Wrong {
                place: self.place,
                problem: format!("unknown key {key} = {value}"),
            }),
        }
    }
}

/// The firmware parameters of a manager.
struct Firmware {
    enabled: bool,
    num_pf: u16,
    num_msix: u16,
    subsystem_vendor: u16,
    subsystem: u16,
}

fn read_manager(mut section: Section) -> Result<EmulationManager, Wrong> {
    let name = section.word("name", NAME_LEN)?;
    section.place = format!("manager {name}");
    let serial = section.word("serial", 64)?;
    let domain = section.small("domain", 0, u16::MAX, 0)?;
    let bus = section.small("bus", 0, 255, 0)?;
    let most = section.integer(
        "max_static_functions",
        FIRMWARE_STATIC_FUNCTIONS,
        MAX_STATIC_FUNCTIONS,
        FIRMWARE_STATIC_FUNCTIONS,
    )?;
    let firmware = match section.table.remove("firmware") {
        None => Table::new(),
        Some(Value::Table(table)) => table,
        Some(other) => return Err(section.wrong("firmware", format!("{other} is not a table"))),
    };
    let place = format!("{}, firmware", section.place);
    section.finish()?;
    let firmware = read_firmware(Section::new(place, firmware), most)?;
    let count = if firmware.enabled { firmware.num_pf } else { 0 };
    let functions = (FIRST_FUNCTION..)
        .take(count.into())
        .map(|n| {
            // From the eighth function on the address is that of the next device, as with ARI.
            let (device, function) = (n / 8, n % 8);
            StaticFunction {
                vuid: format!("{serial}VFSS0D{device}F{function}"),
                pci_address: format!("{domain:04x}:{bus:02x}:{device:02x}.{function}"),
                num_msix: firmware.num_msix,
                subsystem_vendor: firmware.subsystem_vendor,
                subsystem: firmware.subsystem,
            }
        })
        .collect();
    Ok(EmulationManager {
        name,
        hotplug_ports: 0,
        functions,
    })
}

fn read_firmware(mut section: Section, most: i64) -> Result<Firmware, Wrong> {
    let internal = section.integer("INTERNAL_CPU_MODEL", 0, 1, 1)?;
    let switch = section.integer("PCI_SWITCH_EMULATION_ENABLE", 0, 1, 0)?;
    if switch != 0 {
        return Err(section.wrong(
            "PCI_SWITCH_EMULATION_ENABLE",
            "1 is refused: hot-plug is not supported by this version, set it to 0",
        ));
    }
    // Accepted with the firmware's range, because the firmware keeps it while the switch is off; the ports do not exist.
    section.integer("PCI_SWITCH_EMULATION_NUM_PORT", 0, 32, 0)?;
    let enabled = section.integer("VIRTIO_FS_EMULATION_ENABLE", 0, 1, 0)? != 0;
    if enabled && internal == 0 {
        return Err(section.wrong(
            "INTERNAL_CPU_MODEL",
            "0 is not possible with VIRTIO_FS_EMULATION_ENABLE = 1, set it to 1",
        ));
    }
    let num_pf = section.integer("VIRTIO_FS_EMULATION_NUM_PF", 0, most, 0)?;
    section.integer("VIRTIO_FS_EMULATION_NUM_VF", 0, 0, 0)?;
    let num_msix = section.small(
        "VIRTIO_FS_EMULATION_NUM_MSIX",
        0,
        MAX_MSIX_VECTORS as u16,
        2,
    )?;
    let subsystem_vendor = section.small("VIRTIO_FS_EMU_SUBSYSTEM_VENDOR_ID", 0, u16::MAX, 6900)?;
    let subsystem = section.small("VIRTIO_FS_EMULATION_SUBSYSTEM_ID", 0, u16::MAX, 4186)?;
    section.finish()?;
    Ok(Firmware {
        enabled,
        num_pf: u16::try_from(num_pf).unwrap_or(0),
        num_msix,
        subsystem_vendor,
        subsystem,
    })
}

#[cfg(test)]
mod tests;
