//! How a directory is exported: what the guest may cache and write, which ids it sees, and how its extended attributes
//! are named in the host; and the texts that an operator writes for them.
//!
//! Every field is checked by both processes ([`ExportSpec::check`]). Used by the messages on the rings, by the control
//! plane's decoder, and by the `aio` file-system device.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::errno::Errno;
use crate::msg::Failure;

/// Most ranges of one id map.
pub const MAX_ID_RANGES: usize = 64;
/// Most rules about names of extended attributes.
pub const MAX_XATTR_RULES: usize = 64;
/// Longest name of an extended attribute.
pub const XATTR_NAME_MAX: usize = 255;
/// Shown for an id that has no counterpart, as Linux does.
pub const OVERFLOW_ID: u32 = 65_534;
/// A day: for caches that nobody but the guest changes.
const LONG_MS: u32 = 86_400_000;

fn invalid(detail: String) -> Failure {
    Failure::new(Errno::EINVAL, detail)
}

/// What the guest may keep in its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cache {
    /// Nothing: every read and write goes to the export.
    Never,
    /// Data while a file is open and unchanged.
    #[default]
    Auto,
    /// As `Auto`, and names and attributes for as long as they are said to be valid.
    Metadata,
    /// Everything, for an export that nobody else changes.
    Always,
}

impl Cache {
    const NAMES: [(&'static str, Cache); 4] = [
        ("never", Cache::Never),
        ("auto", Cache::Auto),
        ("metadata", Cache::Metadata),
        ("always", Cache::Always),
    ];

    /// The name that an operator uses.
    pub fn name(self) -> &'static str {
        name_of(&Self::NAMES, self)
    }

    /// The counterpart of [`Cache::name`].
    pub fn parse(text: &str) -> Result<Cache, Failure> {
        by_name("cache", &Self::NAMES, text)
    }

    const fn valid_ms(self) -> u32 {
        match self {
            Cache::Never | Cache::Auto => 0,
            Cache::Metadata | Cache::Always => LONG_MS,
        }
    }
}

/// Which users of the guest act as nobody in particular.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Squash {
    /// None of them.
    #[default]
    None,
    /// The superuser.
    Root,
    /// All of them.
    All,
}

impl Squash {
    const NAMES: [(&'static str, Squash); 3] = [
        ("none", Squash::None),
        ("root", Squash::Root),
        ("all", Squash::All),
    ];

    /// The name that an operator uses.
    pub fn name(self) -> &'static str {
        name_of(&Self::NAMES, self)
    }

    /// The counterpart of [`Squash::name`].
    pub fn parse(text: &str) -> Result<Squash, Failure> {
        by_name("squash", &Self::NAMES, text)
    }

    /// Whether this id of the guest is squashed.
    pub fn applies_to(self, id: u32) -> bool {
        match self {
            Squash::None => false,
            Squash::Root => id == 0,
            Squash::All => true,
        }
    }
}

fn name_of<T: Copy + PartialEq>(names: &[(&'static str, T)], value: T) -> &'static str {
    names
        .iter()
        .find(|(_, other)| *other == value)
        .map_or("", |(name, _)| name)
}

fn by_name<T: Copy>(what: &str, names: &[(&'static str, T)], text: &str) -> Result<T, Failure> {
    let found = names.iter().find(|(name, _)| *name == text);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let known: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
        invalid(format!(
            "{what} {text:?} is not one of {}",
            known.join(", ")
        ))
    })
}

/// Ids of the guest from `guest` on that are ids of the host from `host` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// First id in the guest.
    pub guest: u32,
    /// First id in the host.
    pub host: u32,
    /// How many.
    pub count: u32,
}

/// Which ids of the guest are which of the host; without ranges, all are the same in both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap(pub Vec<IdRange>);

/// `id` moved from one range to the other.
fn moved(id: u32, from: u32, to: u32, count: u32) -> Option<u32> {
    let at = id.checked_sub(from).filter(|at| *at < count)?;
    to.checked_add(at)
}

impl IdMap {
    /// Whether ids are the same on both sides.
    pub fn is_identity(&self) -> bool {
        self.0.is_empty()
    }

    /// The host's id for the guest's `id`; `None` when it has none.
    pub fn to_host(&self, id: u32) -> Option<u32> {
        if self.is_identity() {
            return Some(id);
        }
        self.0
            .iter()
            .find_map(|r| moved(id, r.guest, r.host, r.count))
    }

    /// The guest's id for the host's `id`, or [`OVERFLOW_ID`].
    pub fn to_guest(&self, id: u32) -> u32 {
        if self.is_identity() {
            return id;
        }
        self.0
            .iter()
            .find_map(|r| moved(id, r.host, r.guest, r.count))
            .unwrap_or(OVERFLOW_ID)
    }

    /// Reads `guest:host:count,...`.
    pub fn parse(what: &str, text: &str) -> Result<IdMap, Failure> {
        let wrong = || {
            invalid(format!(
                "{what} {text:?} must be GUEST:HOST:COUNT, several of them separated by commas"
            ))
        };
        let mut ranges = Vec::new();
        for range in text.split(',').filter(|_| !text.is_empty()) {
            let mut numbers = range.split(':').map(str::parse::<u32>);
            let mut next = || numbers.next().and_then(Result::ok).ok_or_else(wrong);
            let (guest, host, count) = (next()?, next()?, next()?);
            if numbers.next().is_some() {
                return Err(wrong());
            }
            ranges.push(IdRange { guest, host, count });
        }
        let map = IdMap(ranges);
        map.check(what)?;
        Ok(map)
    }

    fn check(&self, what: &str) -> Result<(), Failure> {
        if self.0.len() > MAX_ID_RANGES {
            return Err(invalid(format!(
                "{what} has more than {MAX_ID_RANGES} ranges"
            )));
        }
        for (at, range) in self.0.iter().enumerate() {
            // The last number is nobody's id.
            let last = |first: u32| first.checked_add(range.count).is_some();
            if range.count == 0 || !last(range.guest) || !last(range.host) {
                return Err(invalid(format!(
                    "{what} has the range {range}, which is empty or goes past 4294967294"
                )));
            }
            let others = self.0.iter().take(at);
            for other in others {
                let meet = |a: u32, b: u32| {
                    a < b.saturating_add(other.count) && b < a.saturating_add(range.count)
                };
                if meet(range.guest, other.guest) || meet(range.host, other.host) {
                    return Err(invalid(format!(
                        "{what} has the ranges {other} and {range}, which overlap"
                    )));
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for IdRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.guest, self.host, self.count)
    }
}

fn comma_separated<T: fmt::Display>(items: &[T], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (at, item) in items.iter().enumerate() {
        let comma = if at == 0 { "" } else { "," };
        write!(f, "{comma}{item}")?;
    }
    Ok(())
}

impl fmt::Display for IdMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        comma_separated(&self.0, f)
    }
}

/// One rule about names of extended attributes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct XattrRule {
    /// What the guest's name begins with.
    pub guest: String,
    /// What the host's name has instead; `None` when the guest has no such names.
    pub host: Option<String>,
}

/// How the guest's extended attributes are named in the host. The first rule whose guest prefix fits decides; a name
/// without a rule is the same in both. The host's side of a rule belongs to that rule: a guest cannot name it otherwise.
/// Names that begin with `system.` are the kernel's own and can be denied, not renamed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct XattrMap(pub Vec<XattrRule>);

/// Stands for "denied" in the text of a rule.
const DENIED: &str = "!";
const KERNEL_PREFIX: &str = "system.";

impl XattrMap {
    /// Reads `prefix=host-prefix,prefix=!,...`.
    pub fn parse(text: &str) -> Result<XattrMap, Failure> {
        let mut rules = Vec::new();
        for rule in text.split(',').filter(|_| !text.is_empty()) {
            let (guest, host) = rule.split_once('=').ok_or_else(|| {
                invalid(format!(
                    "the rule {rule:?} of xattr_map must be PREFIX=HOST_PREFIX, or PREFIX=! to deny"
                ))
            })?;
            rules.push(XattrRule {
                guest: guest.to_string(),
                host: (host != DENIED).then(|| host.to_string()),
            });
        }
        let map = XattrMap(rules);
        map.check()?;
        Ok(map)
    }

    fn check(&self) -> Result<(), Failure> {
        if self.0.len() > MAX_XATTR_RULES {
            return Err(invalid(format!(
                "xattr_map has more than {MAX_XATTR_RULES} rules"
            )));
        }
        let proper = |text: &str| {
            text.len() < XATTR_NAME_MAX
                && text
                    .bytes()
                    .all(|b| b.is_ascii_graphic() && b != b',' && b != b'=')
        };
        for (at, rule) in self.0.iter().enumerate() {
            let host = rule.host.as_deref();
            if !proper(&rule.guest) || !host.is_none_or(proper) || host == Some(DENIED) {
                return Err(invalid(format!(
                    "the rule {rule} of xattr_map is not made of names of attributes"
                )));
            }
            let kernels = |text: &str| text.starts_with(KERNEL_PREFIX);
            if host.is_some_and(|host| kernels(host) || kernels(&rule.guest)) {
                return Err(invalid(format!(
                    "the rule {rule} of xattr_map renames {KERNEL_PREFIX} names, which the kernel interprets; they can only be denied"
                )));
            }
            let same = |other: &XattrRule| {
                other.guest == rule.guest || (host.is_some() && other.host.as_deref() == host)
            };
            if let Some(other) = self.0.iter().take(at).find(|other| same(other)) {
                return Err(invalid(format!(
                    "the rules {other} and {rule} of xattr_map have the same prefix"
                )));
            }
        }
        Ok(())
    }
}

impl fmt::Display for XattrRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}={}",
            self.guest,
            self.host.as_deref().unwrap_or(DENIED)
        )
    }
}

impl fmt::Display for XattrMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        comma_separated(&self.0, f)
    }
}

/// Name of an extended attribute being assembled, without allocating.
pub struct XattrName {
    bytes: [u8; XATTR_NAME_MAX],
    len: usize,
}

impl XattrName {
    fn join(prefix: &[u8], rest: &[u8]) -> Option<XattrName> {
        let len = prefix.len().checked_add(rest.len())?;
        let mut bytes = [0; XATTR_NAME_MAX];
        let (head, tail) = bytes.get_mut(..len)?.split_at_mut_checked(prefix.len())?;
        head.copy_from_slice(prefix);
        tail.copy_from_slice(rest);
        Some(XattrName { bytes, len })
    }

    /// The name, without a NUL.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl XattrMap {
    /// Whether names are the same on both sides.
    pub fn is_identity(&self) -> bool {
        self.0.is_empty()
    }

    fn forward(&self, name: &[u8]) -> Option<XattrName> {
        let kernels = name.starts_with(KERNEL_PREFIX.as_bytes());
        for rule in self.0.iter().filter(|rule| !kernels || rule.host.is_none()) {
            if let Some(rest) = name.strip_prefix(rule.guest.as_bytes()) {
                return XattrName::join(rule.host.as_ref()?.as_bytes(), rest);
            }
        }
        XattrName::join(name, &[])
    }

    fn backward(&self, name: &[u8]) -> Option<XattrName> {
        // The longest prefix owns a name.
        let owner = self
            .0
            .iter()
            .filter_map(|rule| Some((rule.host.as_ref()?, &rule.guest)))
            .filter(|(host, _)| name.starts_with(host.as_bytes()))
            .filter(|_| !name.starts_with(KERNEL_PREFIX.as_bytes()))
            .max_by_key(|(host, _)| host.len());
        match owner {
            Some((host, guest)) => {
                XattrName::join(guest.as_bytes(), name.strip_prefix(host.as_bytes())?)
            }
            None => XattrName::join(name, &[]),
        }
    }

    /// The host's name for the guest's; `None` when the guest has no such name.
    pub fn to_host(&self, name: &[u8]) -> Option<XattrName> {
        let host = self.forward(name)?;
        (self.backward(host.bytes())?.bytes() == name).then_some(host)
    }

    /// The guest's name for the host's; `None` when the guest must not see it.
    pub fn to_guest(&self, name: &[u8]) -> Option<XattrName> {
        let guest = self.backward(name)?;
        (self.forward(guest.bytes())?.bytes() == name).then_some(guest)
    }
}

/// How a directory is exported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportSpec {
    /// What the guest may cache.
    pub cache: Cache,
    /// How long it may trust attributes, in milliseconds; by default as `cache` says.
    pub attr_valid_ms: Option<u32>,
    /// How long it may trust names; by default as long as attributes.
    pub entry_valid_ms: Option<u32>,
    /// How long it may trust that a name does not exist; by default not at all, or long where `cache` is `always`.
    pub negative_valid_ms: Option<u32>,
    /// Whether the guest can change nothing.
    pub read_only: bool,
    /// The guest's user ids.
    pub map_uid: IdMap,
    /// The guest's group ids.
    pub map_gid: IdMap,
    /// Which users act as `anon_uid` and `anon_gid`, with their rights only.
    pub squash: Squash,
    /// The host's user id for squashed users.
    pub anon_uid: u32,
    /// The host's group id for squashed users.
    pub anon_gid: u32,
    /// Names of extended attributes.
    pub xattr_map: XattrMap,
}

impl Default for ExportSpec {
    fn default() -> ExportSpec {
        ExportSpec {
            cache: Cache::default(),
            attr_valid_ms: None,
            entry_valid_ms: None,
            negative_valid_ms: None,
            read_only: false,
            map_uid: IdMap::default(),
            map_gid: IdMap::default(),
            squash: Squash::None,
            anon_uid: OVERFLOW_ID,
            anon_gid: OVERFLOW_ID,
            xattr_map: XattrMap::default(),
        }
    }
}

impl ExportSpec {
    /// How long attributes are valid, in milliseconds.
    pub fn attr_ms(&self) -> u32 {
        self.attr_valid_ms.unwrap_or(self.cache.valid_ms())
    }

    /// How long names are valid.
    pub fn entry_ms(&self) -> u32 {
        self.entry_valid_ms.unwrap_or(self.attr_ms())
    }

    /// How long the absence of a name is valid.
    pub fn negative_ms(&self) -> u32 {
        self.negative_valid_ms.unwrap_or(match self.cache {
            Cache::Always => self.entry_ms(),
            _ => 0,
        })
    }

    /// Checks the fields, and that they agree with each other and with the rest of the device's.
    pub fn check(&self, enable_writeback_cache: bool, enable_xattr: bool) -> Result<(), Failure> {
        self.map_uid.check("map_uid")?;
        self.map_gid.check("map_gid")?;
        self.xattr_map.check()?;
        let refuse = |wrong: bool, detail: &str| {
            if wrong {
                Err(invalid(detail.to_string()))
            } else {
                Ok(())
            }
        };
        let times = self.attr_ms() | self.entry_ms() | self.negative_ms();
        let squashes = self.squash != Squash::None;
        refuse(
            self.cache == Cache::Never && enable_writeback_cache,
            "enable_writeback_cache contradicts cache never; choose another cache or leave it out",
        )?;
        refuse(
            self.cache == Cache::Never && times != 0,
            "attr_valid_ms, entry_valid_ms and negative_valid_ms must be 0 with cache never; choose another cache or leave them out",
        )?;
        refuse(
            self.read_only && enable_writeback_cache,
            "enable_writeback_cache contradicts read_only, which leaves nothing to write; leave one of them out",
        )?;
        refuse(
            squashes && enable_writeback_cache,
            "enable_writeback_cache contradicts squash, because the guest's kernel writes back as its superuser; leave one of them out",
        )?;
        refuse(
            !self.xattr_map.is_identity() && !enable_xattr,
            "xattr_map needs enable_xattr",
        )?;
        refuse(
            self.anon_uid == u32::MAX || self.anon_gid == u32::MAX,
            "anon_uid and anon_gid must be at most 4294967294",
        )
    }
}

#[cfg(test)]
mod tests;
