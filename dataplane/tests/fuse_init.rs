//! INIT in all its forms, and what a session allows before and after it.

mod fuse_support;

use ferry_dataplane::fsdev::Offer;
use ferry_dataplane::fuse::session::{BACKEND_FLAGS, SESSION_FLAGS, Session};
use ferry_shared::errno::Errno;
use fuse_support::cases::{init, request};
use fuse_support::scripted::Scripted;
use fuse_support::wire::{Wire, u32_at, wire};
use fuse_support::{Guest, Pieces, exchange};

const EBUSY: i32 = 16;
const EINVAL: i32 = 22;
const EPROTO: i32 = 71;
const ENOTCONN: i32 = 107;

const INIT: u32 = 26;
const MAX_PAGES: u64 = 1 << 22;
const SETXATTR_EXT: u64 = 1 << 29;
const INIT_EXT: u64 = 1 << 30;

fn guest() -> Guest<Scripted> {
    Guest::new(Scripted::default())
}

/// INIT of 16 bytes, as before protocol 7.36.
fn short_init(minor: u32, flags: u32) -> Vec<u8> {
    request(INIT, 0, &wire().u32(7).u32(minor).u32(4096).u32(flags).0)
}

fn granted(payload: &[u8]) -> u64 {
    u64::from(u32_at(payload, 12)) | u64::from(u32_at(payload, 32)) << 32
}

#[test]
fn every_minor_version_is_granted_capped_or_refused() {
    for minor in 0..=60 {
        let guest = guest();
        let answer = guest.send(&init(7, minor, 0));
        if minor < 27 {
            assert_eq!(answer.errno(), EPROTO, "7.{minor}");
            assert_eq!(guest.fs.taken(), [""; 0]);
            assert!(!guest.session.mounted());
            continue;
        }
        let payload = answer.payload();
        assert_eq!(payload.len(), 64, "7.{minor}");
        assert_eq!(u32_at(payload, 0), 7);
        assert_eq!(u32_at(payload, 4), minor.min(45));
        assert!(guest.session.mounted());
        assert_eq!(
            guest.fs.taken(),
            [format!("mount {} 0x0 131072", minor.min(45))]
        );
    }
}

#[test]
fn other_major_versions_are_refused_or_asked_to_try_again() {
    for major in [0, 1, 6] {
        assert_eq!(guest().send(&init(major, 45, 0)).errno(), EPROTO);
    }
    let guest = guest();
    // Only the version has to be there: the rest may have any layout.
    let newer = request(INIT, 0, &wire().u32(8).u32(0).0);
    let answer = guest.send(&newer);
    assert_eq!(answer.payload(), wire().u32(7).u32(45).zeros(56).0);
    assert!(!guest.session.mounted());
    assert_eq!(guest.send(&request(17, 1, &[])).errno(), ENOTCONN);
    assert_eq!(guest.send(&init(7, 45, 0)).errno(), 0);
    assert!(guest.session.mounted());
}

#[test]
fn the_reply_holds_the_backends_limits_byte_for_byte() {
    let guest = guest();
    let asked = MAX_PAGES | INIT_EXT | 1 << 34;
    let answer = guest.send(&init(7, 41, asked));
    let expected = wire()
        .u32(7)
        .u32(41)
        .u32(64 * 1024)
        .u32((MAX_PAGES | INIT_EXT) as u32)
        .u16(65535)
        .u16(49149)
        .u32(128 * 1024)
        .u32(1)
        .u16(32)
        .u16(0)
        .u32(1 << 2)
        .zeros(28);
    assert_eq!(answer.payload(), expected.0);
    assert_eq!(guest.fs.taken(), [format!("mount 41 {asked:#x} 131072")]);
}

#[test]
fn short_and_cut_requests_are_told_apart() {
    for len in 0..64 {
        let whole = wire()
            .u32(7)
            .u32(45)
            .u32(4096)
            .u32(INIT_EXT as u32)
            .zeros(48);
        let answer = guest().send(&request(INIT, 0, &whole.0[..len]));
        assert_eq!(answer.errno(), EINVAL, "{len} bytes with INIT_EXT");
    }
    for len in 0..16 {
        let whole = wire().u32(7).u32(31).u32(4096).u32(0);
        let answer = guest().send(&request(INIT, 0, &whole.0[..len]));
        assert_eq!(answer.errno(), EINVAL, "{len} bytes");
    }
    for minor in [27, 31, 36, 45] {
        let guest = guest();
        let answer = guest.send(&short_init(minor, MAX_PAGES as u32));
        assert_eq!(answer.errno(), 0, "7.{minor}");
        assert_eq!(granted(answer.payload()), MAX_PAGES);
    }
    // Versions that had 8 bytes are refused for their age, not for their length.
    let ancient = request(INIT, 0, &wire().u32(7).u32(5).0);
    assert_eq!(guest().send(&ancient).errno(), EPROTO);
}

#[test]
fn flags2_counts_only_with_init_ext() {
    let upper = 1 << 32 | 1 << 34;
    let without = guest().send(&init(7, 45, upper));
    assert_eq!(granted(without.payload()), 0);
    let with = guest().send(&init(7, 45, upper | INIT_EXT));
    assert_eq!(granted(with.payload()), upper | INIT_EXT);
}

#[test]
fn a_flag_is_granted_if_asked_for_and_kept_by_the_session_or_the_backend() {
    let sets = |flags| {
        Guest::new(Scripted {
            offer: Offer {
                flags,
                ..Scripted::default().offer
            },
            ..Scripted::default()
        })
    };
    for bit in (0..64).filter(|bit| 1u64 << bit != INIT_EXT) {
        let flag = 1u64 << bit;
        let asked = init(7, 45, flag | INIT_EXT);
        let offered = granted(sets(u64::MAX).send(&asked).payload()) & flag;
        let not_offered = granted(sets(0).send(&asked).payload()) & flag;
        let not_asked = granted(sets(u64::MAX).send(&init(7, 45, INIT_EXT)).payload()) & flag;
        assert_eq!(not_asked, 0, "bit {bit}");
        assert_eq!(not_offered, flag & SESSION_FLAGS, "bit {bit}");
        assert_eq!(offered, flag & (SESSION_FLAGS | BACKEND_FLAGS), "bit {bit}");
    }
}

#[test]
fn what_nothing_here_can_keep_is_never_granted() {
    let guest = Guest::new(Scripted {
        offer: Offer {
            flags: u64::MAX,
            ..Scripted::default().offer
        },
        ..Scripted::default()
    });
    let answer = guest.send(&init(7, 45, u64::MAX));
    // SPLICE_*, NO_OPEN_SUPPORT, ABORT_ERROR, MAP_ALIGNMENT, HAS_INODE_DAX, HAS_EXPIRE_ONLY, PASSTHROUGH, HAS_RESEND,
    // OVER_IO_URING, REQUEST_TIMEOUT, and the reserved bits.
    let never: u64 = [2, 7, 8, 9, 17, 21, 26, 31, 33, 35, 37, 39, 41, 42]
        .into_iter()
        .chain(43..64)
        .fold(0, |flags, bit| flags | 1 << bit);
    assert_eq!(granted(answer.payload()) & never, 0);
    assert_eq!(granted(answer.payload()) | never, u64::MAX);
}

#[test]
fn max_pages_follows_max_write_and_never_exceeds_the_data_buffer() {
    for (max_write, pages) in [
        (0, 1),
        (4096, 1),
        (5000, 1),
        (65536, 16),
        (131_072, 32),
        (261_120, 63),
        (1 << 20, 63),
        (u32::MAX, 63),
    ] {
        let guest = Guest::new(Scripted {
            offer: Offer {
                flags: 0,
                max_write,
                max_readahead: u32::MAX,
            },
            ..Scripted::default()
        });
        let answer = guest.send(&init(7, 45, MAX_PAGES));
        let payload = answer.payload();
        assert_eq!(u32_at(payload, 20), max_write.clamp(4096, 261_120));
        assert_eq!(u32_at(payload, 28), pages, "and map_alignment is 0");
        assert_eq!(u32_at(payload, 8), 1 << 20, "the guest's own wish");
        let without = guest.send(&init(7, 45, 0));
        assert_eq!(u32_at(without.payload(), 28), 0, "not asked for");
    }
}

#[test]
fn a_second_init_ends_the_first_mount() {
    let guest = guest();
    guest.send(&init(7, 45, 0));
    let epoch = guest.session.epoch();
    guest.send(&init(7, 30, SETXATTR_EXT));
    assert_eq!(
        guest.fs.taken(),
        [
            "mount 45 0x0 131072",
            "unmount",
            "mount 30 0x20000000 131072"
        ]
    );
    assert_eq!(guest.session.epoch(), epoch + 2);
    assert_eq!(
        guest.session.protocol().map(|p| (p.minor, p.flags)),
        Some((30, SETXATTR_EXT))
    );
    // A refused one ends it too: the guest has given it up.
    assert_eq!(guest.send(&init(7, 20, 0)).errno(), EPROTO);
    assert_eq!(guest.fs.taken(), ["unmount"]);
    assert!(!guest.session.mounted());
    assert_eq!(guest.session.negotiated(), None);
}

#[test]
fn a_backend_that_cannot_mount_leaves_the_session_unmounted() {
    let guest = Guest::new(Scripted {
        mount_error: Some(Errno::EBUSY),
        ..Scripted::default()
    });
    assert_eq!(guest.send(&init(7, 45, 0)).errno(), EBUSY);
    assert!(!guest.session.mounted());
    assert_eq!(guest.session.epoch(), 0);
}

#[test]
fn destroy_and_reset_unmount_once() {
    let guest = guest();
    guest.send(&init(7, 45, 0));
    assert_eq!(guest.send(&request(38, 0, &[])).errno(), 0);
    guest.session.reset(&guest.fs);
    assert_eq!(guest.send(&request(38, 0, &[])).errno(), ENOTCONN);
    assert_eq!(guest.fs.taken(), ["mount 45 0x0 131072", "unmount"]);
    guest.send(&init(7, 45, 0));
    guest.session.reset(&guest.fs);
    assert_eq!(guest.fs.taken(), ["mount 45 0x0 131072", "unmount"]);
    assert_eq!(guest.session.epoch(), 4);
}

#[test]
fn setxattr_is_read_in_the_layout_that_was_negotiated() {
    let long = |w: Wire| w.u32(2).u32(1).u32(1).u32(0).text("user.x").raw(b"vv");
    let short = |w: Wire| w.u32(2).u32(1).text("user.x").raw(b"vv");
    for (flags, body, call) in [
        (SETXATTR_EXT, long(wire()), "setxattr 7 user.x vv 1 1"),
        (0, short(wire()), "setxattr 7 user.x vv 1 0"),
    ] {
        let guest = guest();
        guest.send(&init(7, 45, flags));
        guest.fs.taken();
        assert_eq!(guest.send(&request(21, 7, &body.0)).errno(), 0);
        assert_eq!(guest.fs.taken(), [call]);
    }
}

#[test]
fn an_init_in_single_bytes_is_the_same_init() {
    let session = Session::default();
    let fs = Scripted::default();
    let ones = [1; 200];
    let request = Pieces::new(&init(7, 45, MAX_PAGES), &ones);
    let reply = Pieces::new(&[fuse_support::UNTOUCHED; 200], &ones);
    let answer = exchange(Some(&fs), &session, &request, &reply);
    assert_eq!(answer, guest().send(&init(7, 45, MAX_PAGES)));
}
