//! Translation of the flags of open(2) between the guest's architecture and this machine's.
//!
//! Four flags have other values on Arm than on x86 and the generic ABI, and the values swap in pairs: what one side
//! calls `O_DIRECT` is the other's `O_DIRECTORY`. The result is therefore built from the original value, never edited in
//! place.

use ferry_shared::msg::Platform;

/// The flags whose values differ, in one architecture's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    direct: u32,
    directory: u32,
    nofollow: u32,
    largefile: u32,
}

/// x86 in both widths, and every architecture that uses the generic ABI.
const GENERIC: Layout = Layout {
    direct: 0o40_000,
    directory: 0o200_000,
    nofollow: 0o400_000,
    largefile: 0o100_000,
};

/// Arm in both widths.
const ARM: Layout = Layout {
    direct: 0o200_000,
    directory: 0o40_000,
    nofollow: 0o100_000,
    largefile: 0o400_000,
};

/// This machine's.
const HOST: Layout = if cfg!(any(target_arch = "arm", target_arch = "aarch64")) {
    ARM
} else {
    GENERIC
};

impl Layout {
    fn of(platform: Platform) -> Layout {
        match platform {
            Platform::Native => HOST,
            Platform::X86 | Platform::X86_64 => GENERIC,
            Platform::Aarch32 | Platform::Aarch64 => ARM,
        }
    }

    fn pairs(self, other: Layout) -> [(u32, u32); 4] {
        [
            (self.direct, other.direct),
            (self.directory, other.directory),
            (self.nofollow, other.nofollow),
            (self.largefile, other.largefile),
        ]
    }
}

fn translate(flags: u32, from: Layout, to: Layout) -> u32 {
    let pairs = from.pairs(to);
    let differing = pairs.iter().fold(0, |mask, (theirs, _)| mask | theirs);
    pairs
        .iter()
        .filter(|(theirs, _)| flags & theirs != 0)
        .fold(flags & !differing, |out, (_, ours)| out | ours)
}

/// The guest's open(2) flags in this machine's numbers.
pub fn to_host(flags: u32, guest: Platform) -> u32 {
    translate(flags, Layout::of(guest), HOST)
}

#[cfg(test)]
mod tests;
