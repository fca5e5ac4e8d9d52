use super::*;

/// Flags that have the same value everywhere: `O_RDWR`, `O_CREAT`, `O_APPEND`, `O_CLOEXEC`.
const COMMON: u32 = 0o2 | 0o100 | 0o2_000 | 0o2_000_000;

/// (meaning, generic value, Arm value), from the kernel's `fcntl.h` of each architecture.
const TABLE: [(&str, u32, u32); 4] = [
    ("O_DIRECT", 0o40000, 0o200000),
    ("O_DIRECTORY", 0o200000, 0o40000),
    ("O_NOFOLLOW", 0o400000, 0o100000),
    ("O_LARGEFILE", 0o100000, 0o400000),
];

#[test]
fn every_combination_keeps_its_meaning_in_both_directions() {
    for set in 0..16u32 {
        let chosen = |pick: fn(&(&str, u32, u32)) -> u32| {
            (0..4)
                .filter(|bit| set & (1 << bit) != 0)
                .fold(COMMON, |flags, bit| flags | pick(&TABLE[bit]))
        };
        let generic = chosen(|row| row.1);
        let arm = chosen(|row| row.2);
        assert_eq!(translate(generic, GENERIC, ARM), arm, "set {set:04b}");
        assert_eq!(translate(arm, ARM, GENERIC), generic, "set {set:04b}");
        assert_eq!(translate(generic, GENERIC, GENERIC), generic);
        assert_eq!(translate(arm, ARM, ARM), arm);
    }
}

#[test]
fn each_platform_uses_the_layout_of_its_family() {
    let host_is_arm = HOST == ARM;
    for (platform, arm) in [
        (Platform::X86, false),
        (Platform::X86_64, false),
        (Platform::Aarch32, true),
        (Platform::Aarch64, true),
        (Platform::Native, host_is_arm),
    ] {
        for (name, generic_value, arm_value) in TABLE {
            let (guest, other) = if arm {
                (arm_value, generic_value)
            } else {
                (generic_value, arm_value)
            };
            let expected = if arm == host_is_arm { guest } else { other };
            assert_eq!(to_host(guest, platform), expected, "{name} of {platform:?}");
        }
    }
}
