//! What a run does: the kinds of work, and how they are written on the command line.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail, ensure};

/// One kind of work. An operation is what a program asks for: a pair such as open and release counts as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// READ at random places of open files.
    RandRead,
    /// READ from front to back.
    SeqRead,
    /// WRITE at random places of open files.
    RandWrite,
    /// WRITE from front to back.
    SeqWrite,
    /// GETATTR of known inodes.
    Getattr,
    /// LOOKUP of names that exist.
    Lookup,
    /// OPEN for reading, and RELEASE.
    Open,
    /// CREATE, RELEASE, UNLINK and FORGET.
    Create,
    /// A scan of a directory by READDIRPLUS, from the first entry to the last.
    Readdirplus,
    /// Seven in ten move data, 70 % of them READ and 30 % WRITE; of the rest half are GETATTR and half LOOKUP.
    Mixed,
}

impl Kind {
    const NAMES: [(&'static str, Kind); 10] = [
        ("randread", Kind::RandRead),
        ("read", Kind::SeqRead),
        ("randwrite", Kind::RandWrite),
        ("write", Kind::SeqWrite),
        ("getattr", Kind::Getattr),
        ("lookup", Kind::Lookup),
        ("open", Kind::Open),
        ("create", Kind::Create),
        ("readdirplus", Kind::Readdirplus),
        ("mixed", Kind::Mixed),
    ];

    /// Whether operations move `block` bytes of a file.
    pub(super) fn moves_data(self) -> bool {
        matches!(
            self,
            Kind::RandRead | Kind::SeqRead | Kind::RandWrite | Kind::SeqWrite | Kind::Mixed
        )
    }
}

/// A kind of work with its sizes: `KIND[:BLOCK[:DEPTH[:QUEUES]]]`, such as `randread:4k:32:1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Work {
    pub(super) kind: Kind,
    /// Bytes of a transfer, or of the room for a part of a listing.
    pub(super) block: u32,
    /// Operations in flight on each queue.
    pub(super) depth: u16,
    /// Request queues.
    pub(super) queues: u16,
}

const MAX_BLOCK: u32 = 1 << 20;

impl FromStr for Work {
    type Err = Error;

    fn from_str(text: &str) -> Result<Work> {
        let mut words = text.split(':');
        let name = words.next().unwrap_or_default();
        let Some(&(_, kind)) = Kind::NAMES.iter().find(|(n, _)| *n == name) else {
            let names = Kind::NAMES.map(|(n, _)| n).join(", ");
            bail!("there is no work `{name}`; there are {names}");
        };
        let usual = match kind {
            Kind::SeqRead | Kind::SeqWrite => "128k",
            Kind::Readdirplus => "32k",
            _ => "4k",
        };
        let block = bytes(words.next().unwrap_or(usual))?;
        let depth = words.next().unwrap_or("32").parse();
        let queues = words.next().unwrap_or("1").parse();
        let work = Work {
            kind,
            block: u32::try_from(block).unwrap_or(u32::MAX),
            depth: depth.with_context(|| format!("the depth in `{text}`"))?,
            queues: queues.with_context(|| format!("the queues in `{text}`"))?,
        };
        ensure!(words.next().is_none(), "`{text}` has more than four parts");
        ensure!(
            (512..=MAX_BLOCK).contains(&work.block),
            "a block in `{text}` must have 512 to {MAX_BLOCK} bytes"
        );
        ensure!(
            work.depth > 0 && work.queues > 0,
            "depth and queues in `{text}` must be above 0"
        );
        Ok(work)
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Kind::NAMES.iter().find(|(_, k)| *k == self.kind);
        let name = name.map_or("", |(name, _)| name);
        let (block, depth, queues) = (self.block, self.depth, self.queues);
        if block.is_multiple_of(1024) {
            write!(f, "{name}:{}k:{depth}:{queues}", block / 1024)
        } else {
            write!(f, "{name}:{block}:{depth}:{queues}")
        }
    }
}

/// A number of bytes, with `k`, `m` or `g` behind it for powers of 1,024.
pub(super) fn bytes(text: &str) -> Result<u64> {
    let (digits, shift) = match text.to_ascii_lowercase().strip_suffix(['k', 'm', 'g']) {
        None => (text.to_owned(), 0),
        Some(digits) => {
            let shift = match text.as_bytes().last() {
                Some(b'k' | b'K') => 10,
                Some(b'm' | b'M') => 20,
                _ => 30,
            };
            (digits.to_owned(), shift)
        }
    };
    let count: u64 = digits
        .parse()
        .with_context(|| format!("`{text}` is not a number of bytes such as 4096 or 4k"))?;
    count
        .checked_mul(1 << shift)
        .with_context(|| format!("`{text}` is too large"))
}

#[cfg(test)]
mod tests {
    use super::{Kind, Work, bytes};

    #[test]
    fn a_work_has_defaults_and_prints_as_it_is_written() {
        let work: Work = "randread".parse().expect("a work");
        assert_eq!(work.to_string(), "randread:4k:32:1");
        let work: Work = "write:256k:8:4".parse().expect("a work");
        assert_eq!((work.kind, work.block), (Kind::SeqWrite, 256 << 10));
        assert_eq!((work.depth, work.queues), (8, 4));
        for (text, kind) in Kind::NAMES.map(|(name, kind)| (name, kind)) {
            let work: Work = text.parse().expect("a work");
            assert_eq!(work.kind, kind);
            assert_eq!(work.to_string().parse::<Work>().expect("again"), work);
        }
    }

    #[test]
    fn nonsense_is_refused_with_what_is_wrong() {
        for (text, says) in [
            ("sleep", "there is no work `sleep`"),
            ("read:0", "512"),
            ("read:4k:0", "above 0"),
            ("read:4k:1:1:1", "four parts"),
            ("read:4x", "not a number of bytes"),
        ] {
            let error = text.parse::<Work>().expect_err(text);
            assert!(format!("{error:#}").contains(says), "{error:#}");
        }
        assert_eq!(bytes("2M").expect("bytes"), 2 << 20);
        assert!(bytes("99999999999999999999g").is_err());
    }
}
