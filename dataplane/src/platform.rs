//! The emulated platform: which managers and PCIe functions exist.
//!
//! Owns the reading of the platform file, which stands for a DPU: its managers, what they were delivered with, and how to
//! reach the VMM that is their host. Values that `ferry fwconfig` has stored replace those that a manager was delivered
//! with ([`firmware`]). Everything is read once at start, by `main`; nothing changes afterwards. It never opens a socket: a
//! function's socket exists while a device is started on it.

pub mod firmware;

use std::path::{Path, PathBuf};

use ferry_shared::errno::Errno;
use ferry_shared::limits::{MAX_HOTPLUG_FUNCTIONS, NAME_LEN, SOCKET_PATH_LEN};
use ferry_shared::msg::{Failure, Function, HostLink, Manager, PlugState};
use toml::{Table, Value};

use self::firmware::{Firmware, Origin, Settings};

/// What the data plane uses when no file is given.
const DEFAULT_TEXT: &str = include_str!("../../tools/deploy/platform.toml");

/// `VIRTIO_FS_EMULATION_NUM_PF` of the firmware: at most this many static functions.
const FIRMWARE_STATIC_FUNCTIONS: u16 = 2;
/// How far `max_static_functions` can extend that.
const MAX_STATIC_FUNCTIONS: u16 = 8;
/// Functions 0 and 1 of the device are its network ports.
const FIRST_FUNCTION: u16 = 2;

/// Why a platform file, or the settings that go with it, is refused.
#[derive(Debug, thiserror::Error)]
pub enum PlatformError {
    /// It cannot be read.
    #[error("cannot read {what} {path}: {error}")]
    Read {
        /// What the file is.
        what: &'static str,
        /// The file.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// It is not TOML.
    #[error("{what} {path} is not valid TOML: {error}")]
    Syntax {
        /// What the file is.
        what: &'static str,
        /// The file.
        path: String,
        /// Where and why.
        error: Box<toml::de::Error>,
    },
    /// A key or a value is wrong.
    #[error("{what} {path}: {place}: {problem}")]
    Content {
        /// What the file is.
        what: &'static str,
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
    /// Its static functions.
    pub functions: Vec<EmulatedFunction>,
    /// What a function will be on each hot-plug port, in order.
    pub ports: Vec<EmulatedFunction>,
    /// How to reach the VMM that is its host.
    pub host_link: Option<HostLink>,
    /// The firmware's settings that it has all this from.
    pub settings: Settings,
    /// The most that the platform allows of [`firmware::NUM_PF`].
    pub most_pf: u32,
}

/// One PCIe function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmulatedFunction {
    /// Vendor unique identifier.
    pub vuid: String,
    /// `dddd:bb:dd.f`.
    pub pci_address: String,
    /// The hot-plug port that it is on, from 0; `None`: it is static.
    pub port: Option<u16>,
    /// Size of its MSI-X table; 0: no MSI-X.
    pub num_msix: u16,
    /// PCI subsystem vendor id.
    pub subsystem_vendor: u16,
    /// PCI subsystem id.
    pub subsystem: u16,
}

impl EmulatedFunction {
    /// Where its vfio-user socket is, when there is one.
    pub fn socket(&self, run_dir: &Path) -> PathBuf {
        run_dir.join("pci").join(format!("{}.sock", self.vuid))
    }

    /// The function, as the control plane is told. `plug` is for hot-pluggable ones.
    pub fn describe(&self, manager: &str, plug: PlugState, run_dir: &Path) -> Function {
        Function {
            manager: manager.to_owned(),
            vuid: self.vuid.clone(),
            pci_address: self.pci_address.clone(),
            port: self.port.map(u32::from),
            plug,
            socket: self.socket(run_dir).to_string_lossy().into_owned(),
        }
    }
}

impl Platform {
    /// Reads the file, or takes the built-in default if there is none, and what is in the store for it.
    pub fn load(file: Option<&Path>, store: &Path) -> Result<Platform, PlatformError> {
        let delivered = Platform::delivered(file)?;
        let most_pf = |manager: &str| delivered.most_pf(manager);
        match Firmware::load(store, most_pf)? {
            None => Ok(delivered),
            Some(settings) => Platform::with(file, store, &settings),
        }
    }

    /// As [`Platform::load`] for a process that goes on with the devices of a former one: `kept` is what that one had in
    /// effect, as [`Firmware::text`], and what has been stored since waits for the next new start.
    pub fn resume(file: Option<&Path>, kept: &str) -> Result<Platform, PlatformError> {
        let delivered = Platform::delivered(file)?;
        let origin = Path::new("(kept by the former process)");
        let settings = Firmware::parse(origin, kept, |manager| delivered.most_pf(manager))?;
        Platform::with(file, origin, &settings)
    }

    /// What the file says, whatever is in a store.
    pub fn delivered(file: Option<&Path>) -> Result<Platform, PlatformError> {
        Platform::with(file, Path::new(""), &Firmware::default())
    }

    /// What the file says, with these settings instead of its own. An error in them is one of `store`.
    pub fn with(
        file: Option<&Path>,
        store: &Path,
        settings: &Firmware,
    ) -> Result<Platform, PlatformError> {
        let Some(path) = file else {
            return Platform::read(Path::new("(built-in)"), DEFAULT_TEXT, store, settings);
        };
        let text = std::fs::read_to_string(path).map_err(|error| PlatformError::Read {
            what: "platform file",
            path: path.display().to_string(),
            error,
        })?;
        Platform::read(path, &text, store, settings)
    }

    /// Reads a platform out of a text, without a store; `path` is what errors name.
    pub fn parse(path: &Path, text: &str) -> Result<Platform, PlatformError> {
        Platform::read(path, text, Path::new(""), &Firmware::default())
    }

    fn read(
        path: &Path,
        text: &str,
        store: &Path,
        settings: &Firmware,
    ) -> Result<Platform, PlatformError> {
        let table = text
            .parse::<Table>()
            .map_err(|error| PlatformError::Syntax {
                what: "platform file",
                path: path.display().to_string(),
                error: Box::new(error),
            })?;
        let content = |wrong: Wrong| {
            let (what, path) = if wrong.stored {
                ("firmware settings", store)
            } else {
                ("platform file", path)
            };
            PlatformError::Content {
                what,
                path: path.display().to_string(),
                place: wrong.place,
                problem: wrong.problem,
            }
        };
        Platform::from_table(table, settings).map_err(content)
    }

    fn from_table(table: Table, settings: &Firmware) -> Result<Platform, Wrong> {
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
                return Err(Wrong::new(place, format!("{value} is not a table")));
            };
            let manager = read_manager(Section::new(place, table), settings)?;
            platform.check_unique(&manager)?;
            platform.managers.push(manager);
        }
        Ok(platform)
    }

    fn check_unique(&self, new: &EmulationManager) -> Result<(), Wrong> {
        let wrong = |key: &str, value: &str| {
            Wrong::new(
                format!("manager {}", new.name),
                format!("{key} {value} is also that of another manager"),
            )
        };
        for old in &self.managers {
            if old.name == new.name {
                return Err(wrong("name", &new.name));
            }
            for a in old.all() {
                for b in new.all() {
                    if a.vuid == b.vuid {
                        return Err(wrong("VUID (from serial)", &a.vuid));
                    }
                    if a.pci_address == b.pci_address {
                        let key = "PCI address (from domain, bus and hot-plug ports)";
                        return Err(wrong(key, &a.pci_address));
                    }
                }
            }
        }
        Ok(())
    }

    /// The managers.
    pub fn managers(&self) -> &[EmulationManager] {
        &self.managers
    }

    /// Finds a manager.
    pub fn manager(&self, name: &str) -> Result<&EmulationManager, Failure> {
        let found = self.managers.iter().find(|m| m.name == name);
        found.ok_or_else(|| {
            Failure::new(
                Errno::ENODEV,
                format!("there is no emulation manager {name:?} on this platform"),
            )
        })
    }

    /// Finds a function, or says which of the two names is unknown. A port's function is found whether or not it has been
    /// created.
    pub fn find(&self, manager: &str, vuid: &str) -> Result<&EmulatedFunction, Failure> {
        let function = self.manager(manager)?.all().find(|f| f.vuid == vuid);
        function.ok_or_else(|| no_function(manager, vuid))
    }

    fn most_pf(&self, manager: &str) -> u32 {
        let found = self.managers.iter().find(|m| m.name == manager);
        // Settings of a manager that is gone have no effect.
        found.map_or(u32::from(MAX_STATIC_FUNCTIONS), |m| m.most_pf)
    }

    /// The managers, as the control plane is told.
    pub fn describe_managers(&self) -> impl Iterator<Item = Manager> + '_ {
        self.managers.iter().map(|m| Manager {
            name: m.name.clone(),
            hotplug_ports: m.ports.len() as u32,
            host_link: m.host_link.clone(),
        })
    }

    /// The static functions, as the control plane is told.
    pub fn describe_functions<'a>(
        &'a self,
        run_dir: &'a Path,
    ) -> impl Iterator<Item = Function> + 'a {
        let of = move |m: &'a EmulationManager| {
            let functions = m.functions.iter();
            functions.map(move |f| f.describe(&m.name, PlugState::PowerOn, run_dir))
        };
        self.managers.iter().flat_map(of)
    }

    /// What a data plane that runs on this platform leaves for `ferry fwconfig`.
    pub fn record(&self, platform: Option<&Path>, store: &Path) -> Firmware {
        let settings = self.managers.iter();
        Firmware {
            origin: Some(Origin {
                platform: platform.map(Path::to_owned),
                store: store.to_owned(),
            }),
            settings: settings.map(|m| (m.name.clone(), m.settings)).collect(),
        }
    }
}

impl EmulationManager {
    /// Every function that there can be.
    fn all(&self) -> impl Iterator<Item = &EmulatedFunction> {
        self.functions.iter().chain(&self.ports)
    }
}

/// The refusal of a VUID that a manager does not have.
pub fn no_function(manager: &str, vuid: &str) -> Failure {
    Failure::new(
        Errno::ENODEV,
        format!("emulation manager {manager} has no function with VUID {vuid:?}"),
    )
}

/// What is wrong, and where.
struct Wrong {
    place: String,
    problem: String,
    /// In the settings of the store, not in the platform file.
    stored: bool,
}

impl Wrong {
    fn new(place: String, problem: String) -> Wrong {
        Wrong {
            place,
            problem,
            stored: false,
        }
    }
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
        Wrong::new(self.place.clone(), format!("{key} = {problem}"))
    }

    fn integer(&mut self, key: &str, low: u16, high: u16, default: u16) -> Result<u16, Wrong> {
        let allowed = || format!("only an integer from {low} to {high}");
        match self.table.remove(key) {
            None => Ok(default),
            Some(Value::Integer(n)) if (low.into()..=high.into()).contains(&n) => {
                Ok(u16::try_from(n).unwrap_or(default))
            }
            Some(other) => Err(self.wrong(key, format!("{other} is not allowed, {}", allowed()))),
        }
    }

    /// A table, empty if it is not there.
    fn table(&mut self, key: &str) -> Result<Option<Table>, Wrong> {
        match self.table.remove(key) {
            None => Ok(None),
            Some(Value::Table(table)) => Ok(Some(table)),
            Some(other) => Err(self.wrong(key, format!("{other} is not a table"))),
        }
    }

    /// The path of a socket.
    fn socket(&mut self, key: &str) -> Result<Option<String>, Wrong> {
        match self.table.remove(key) {
            None => Ok(None),
            Some(Value::String(s))
                if s.starts_with('/') && s.len() <= SOCKET_PATH_LEN && !s.contains('\0') =>
            {
                Ok(Some(s))
            }
            Some(other) => Err(self.wrong(
                key,
                format!(
                    "{other} is not allowed, only an absolute path of at most {SOCKET_PATH_LEN} bytes"
                ),
            )),
        }
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
            None => Err(Wrong::new(self.place.clone(), format!("{key} is missing"))),
        }
    }

    fn finish(self) -> Result<(), Wrong> {
        match self.table.iter().next() {
            None => Ok(()),
            Some((key, value)) => Err(Wrong::new(
                self.place,
                format!("unknown key {key} = {value}"),
            )),
        }
    }
}

fn read_manager(mut section: Section, stored: &Firmware) -> Result<EmulationManager, Wrong> {
    let name = section.word("name", NAME_LEN)?;
    section.place = format!("manager {name}");
    let serial = section.word("serial", 64)?;
    let domain = section.integer("domain", 0, u16::MAX, 0)?;
    let bus = section.integer("bus", 0, 255, 0)?;
    let most_pf = section.integer(
        "max_static_functions",
        FIRMWARE_STATIC_FUNCTIONS,
        MAX_STATIC_FUNCTIONS,
        FIRMWARE_STATIC_FUNCTIONS,
    )?;
    let most_pf = most_pf.into();
    let firmware = section.table("firmware")?.unwrap_or_default();
    let link = section.table("host_link")?;
    let place = section.place.clone();
    section.finish()?;
    let (host_link, port_msix) = match link {
        None => (None, true),
        Some(table) => {
            let (link, msix) = read_host_link(Section::new(format!("{place}, host_link"), table))?;
            (Some(link), msix)
        }
    };
    let mut settings = Settings::default();
    let read = settings.read(firmware, most_pf);
    read.and_then(|()| settings.check())
        .map_err(|problem| Wrong::new(format!("{place}, firmware"), problem))?;
    let kept = stored.settings.get(&name);
    let settings = kept.copied().unwrap_or(settings);
    let (functions, mut ports) =
        lay_out(&serial, domain, bus, &settings).map_err(|problem| Wrong {
            place,
            problem,
            stored: kept.is_some(),
        })?;
    if !port_msix {
        ports.iter_mut().for_each(|port| port.num_msix = 0);
    }
    Ok(EmulationManager {
        name,
        functions,
        ports,
        host_link,
        settings,
        most_pf,
    })
}

/// The static functions, and those of the hot-plug ports.
fn lay_out(
    serial: &str,
    domain: u16,
    bus: u16,
    settings: &Settings,
) -> Result<(Vec<EmulatedFunction>, Vec<EmulatedFunction>), String> {
    // The ranges of the parameters fit.
    let get = |name| u16::try_from(settings.get(name)).unwrap_or(0);
    if get(firmware::EMULATION_ENABLE) == 0 {
        return Ok((Vec::new(), Vec::new()));
    }
    let function = |vuid, pci_address, port| EmulatedFunction {
        vuid,
        pci_address,
        port,
        num_msix: get(firmware::NUM_MSIX),
        subsystem_vendor: get(firmware::SUBSYSTEM_VENDOR_ID),
        subsystem: get(firmware::SUBSYSTEM_ID),
    };
    let functions = (FIRST_FUNCTION..)
        .take(get(firmware::NUM_PF).into())
        .map(|n| {
            // From the eighth function on the address is that of the next device, as with ARI.
            let (at, n) = (n / 8, n % 8);
            let vuid = format!("{serial}VFSS0D{at}F{n}");
            function(vuid, format!("{domain:04x}:{bus:02x}:{at:02x}.{n}"), None)
        });
    // One port is that of the static functions.
    let ports = match get(firmware::SWITCH_ENABLE) {
        0 => 0,
        _ => get(firmware::SWITCH_NUM_PORT).saturating_sub(1),
    };
    // Every port is a bridge with a bus of its own behind it.
    if bus + ports > 255 {
        return Err(format!(
            "{} = {} needs the {ports} buses that follow bus {bus}, and bus numbers end at 255; lower bus or the ports",
            firmware::SWITCH_NUM_PORT,
            ports + 1
        ));
    }
    let behind = (0..ports).map(|port| {
        let slot = port + 1;
        let address = format!("{domain:04x}:{:02x}:00.0", bus + slot);
        function(format!("{serial}VFSS{slot}D0F0"), address, Some(port))
    });
    Ok((functions.collect(), behind.collect()))
}

/// The link, and whether functions that go over it have MSI-X. For QEMU they have it only if that is asked for, because its
/// vfio-user-pci aborts when it lets go of a device with MSI-X (10.1 to 11.1 at least).
fn read_host_link(mut section: Section) -> Result<(HostLink, bool), Wrong> {
    let qmp = section.socket("qmp")?;
    let cloud_hypervisor = section.socket("cloud_hypervisor")?;
    let msix = match section.table.remove("msix") {
        None => qmp.is_none(),
        Some(Value::Boolean(msix)) => msix,
        Some(other) => {
            return Err(section.wrong("msix", format!("{other} is neither true nor false")));
        }
    };
    let buses = match section.table.remove("buses") {
        None => Vec::new(),
        Some(Value::Array(list)) if list.len() <= MAX_HOTPLUG_FUNCTIONS as usize => list,
        Some(other) => {
            let problem = format!(
                "{other} is not allowed, only a list of at most {MAX_HOTPLUG_FUNCTIONS} names"
            );
            return Err(section.wrong("buses", problem));
        }
    };
    let buses = buses
        .into_iter()
        .map(|bus| {
            let place = section.place.clone();
            let table = Table::from_iter([("buses".to_owned(), bus)]);
            Section::new(place, table).word("buses", NAME_LEN)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let place = section.place.clone();
    section.finish()?;
    let problem = match (qmp, cloud_hypervisor) {
        (Some(socket), None) if !buses.is_empty() => {
            return Ok((HostLink::Qmp { socket, buses }, msix));
        }
        (None, Some(socket)) if buses.is_empty() => {
            return Ok((HostLink::CloudHypervisor { socket }, msix));
        }
        (Some(_), None) => {
            "qmp needs buses, the ids of the VMM's pcie-root-port devices, one for each hot-plug port"
        }
        (None, Some(_)) => "buses goes with qmp, and cloud-hypervisor finds places itself",
        _ => "exactly one of qmp and cloud_hypervisor is needed",
    };
    Err(Wrong::new(place, problem.to_owned()))
}

#[cfg(test)]
mod tests;
