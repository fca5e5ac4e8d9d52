//! Every operation, from bytes to the backend and back.

mod fuse_support;

use std::collections::BTreeSet;

use ferry_dataplane::fsdev::null::Null;
use ferry_dataplane::fuse::ops::{Class, ReplyKind, TABLE, info};
use ferry_dataplane::fuse::session::Session;
use ferry_shared::msg::Platform;
use fuse_support::cases::{self, Case, NODE, UNIQUE};
use fuse_support::scripted::{CONFLICTING, INTERNAL, SUBMITTED, Scripted};
use fuse_support::wire::{put_u32, wire};
use fuse_support::{Answer, FILE, Guest, HEADER, Pieces, UNTOUCHED, exchange};
use proptest::prelude::{ProptestConfig, Strategy, any, prop};
use proptest::{prop_assert_eq, proptest};

const ENOENT: i32 = 2;
const EIO: i32 = 5;
const EAGAIN: i32 = 11;
const EINVAL: i32 = 22;
const ENODEV: i32 = 19;
const ENOSPC: i32 = 28;
const ERANGE: i32 = 34;
const ENOSYS: i32 = 38;
const ENOTCONN: i32 = 107;

fn guest() -> Guest<Scripted> {
    let guest = Guest::mounted(Scripted::default());
    guest.fs.taken();
    guest
}

/// The reply's bytes, header included.
fn whole(payload: &[u8]) -> Vec<u8> {
    wire()
        .u32((HEADER + payload.len()) as u32)
        .u32(0)
        .u64(UNIQUE)
        .raw(payload)
        .0
}

fn expected(case: &Case) -> Answer {
    Answer::Reply(case.reply.as_deref().map_or(Vec::new(), whole))
}

#[test]
fn every_operation_reaches_the_backend_and_is_answered_byte_for_byte() {
    for case in cases::all() {
        let guest = guest();
        assert_eq!(
            guest.send(&case.request()),
            expected(&case),
            "{}",
            case.name
        );
        assert_eq!(guest.fs.taken(), case.calls, "{}", case.name);
    }
}

#[test]
fn every_row_of_the_table_has_a_case() {
    let cases: BTreeSet<u32> = cases::all().iter().map(|case| case.opcode).collect();
    let rows: BTreeSet<u32> = TABLE.iter().map(|row| row.opcode).collect();
    // INIT and INTERRUPT have tests of their own.
    let others = BTreeSet::from([26, 36]);
    assert_eq!(&rows - &cases, others);
    assert!(cases.is_subset(&rows));
    let numbers: BTreeSet<u32> = (1..=53).filter(|n| ![7, 19, 48, 49].contains(n)).collect();
    assert_eq!(rows, numbers, "all of 7.45 but the DAX window's");
}

#[test]
fn only_forgets_and_interrupts_travel_on_the_hiprio_queue() {
    for row in TABLE {
        let hiprio = [2, 36, 42].contains(&row.opcode);
        assert_eq!(row.class == Class::Hiprio, hiprio, "{}", row.name);
        let silent = hiprio || row.opcode == 41;
        assert_eq!(row.reply == ReplyKind::Silent, silent, "{}", row.name);
        assert_eq!(info(row.opcode), Some(row));
    }
}

#[test]
fn a_request_cut_anywhere_is_refused_before_the_backend_hears_of_it() {
    for case in cases::all() {
        let guest = guest();
        let request = case.request();
        for len in 0..request.len() {
            // The guest provides less than the header declares.
            let answer = guest.send(&request[..len]);
            if case.reply.is_none() && len >= 40 || len < 16 {
                assert!(answer.is_silent(), "{} cut to {len}", case.name);
            } else {
                assert_eq!(answer.errno(), EINVAL, "{} cut to {len}", case.name);
            }
        }
        for len in 40..40 + case.least {
            // The header declares less than the operation needs.
            let mut request = request[..len].to_vec();
            put_u32(&mut request, 0, len as u32);
            let answer = guest.send(&request);
            if case.reply.is_none() {
                assert!(answer.is_silent(), "{} of {len}", case.name);
            } else {
                assert_eq!(answer.errno(), EINVAL, "{} of {len}", case.name);
            }
        }
        assert_eq!(guest.fs.taken(), [""; 0], "{}", case.name);
    }
}

#[test]
fn bytes_after_the_declared_length_are_ignored() {
    for case in cases::all() {
        let guest = guest();
        let mut request = case.request();
        request.extend(b"and more from another request");
        assert_eq!(guest.send(&request), expected(&case), "{}", case.name);
        assert_eq!(guest.fs.taken(), case.calls, "{}", case.name);
    }
}

#[test]
fn a_reply_never_exceeds_the_room_that_the_guest_left() {
    for case in cases::all() {
        let Some(payload) = &case.reply else {
            continue;
        };
        for room in 0..HEADER + payload.len() {
            let guest = guest();
            let answer = guest.send_for(&case.request(), room);
            let calls = guest.fs.taken();
            if room < HEADER {
                assert!(answer.is_silent(), "{} with {room}", case.name);
                assert_eq!(calls, [""; 0], "{} with {room}", case.name);
                continue;
            }
            let row = info(case.opcode).expect("a row");
            match case.name {
                // As much of the file or directory as fits.
                "READ" | "READDIR" | "READDIRPLUS" => {
                    assert!([0, EINVAL].contains(&answer.errno()))
                }
                "GETXATTR" | "LISTXATTR" | "IOCTL" if room > HEADER + row.min_payload => {
                    assert_eq!(answer.errno(), ERANGE, "{} with {room}", case.name);
                }
                _ => {
                    assert!([EIO, ERANGE].contains(&answer.errno()) || answer.payload().is_empty())
                }
            }
            if row.reply == ReplyKind::Fixed {
                assert_eq!(answer.errno(), EIO, "{} with {room}", case.name);
                assert_eq!(calls, [""; 0], "{} with {room}", case.name);
            }
        }
    }
}

fn splits() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(0usize..70, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_split_of_request_and_reply_gives_the_same_result(
        request in splits(),
        reply in splits(),
        which in any::<prop::sample::Index>(),
    ) {
        let cases = cases::all();
        let case = which.get(&cases);
        let guest = guest();
        let answer = guest.send_split(&case.request(), &request, 8192, &reply);
        prop_assert_eq!(answer, expected(case));
        prop_assert_eq!(guest.fs.taken(), &case.calls[..]);
    }
}

#[test]
fn single_byte_pieces_give_the_same_result() {
    for case in cases::all() {
        let guest = guest();
        let ones = [1; 2048];
        let answer = guest.send_split(&case.request(), &ones, 1024, &ones);
        assert_eq!(answer, expected(&case), "{}", case.name);
        assert_eq!(guest.fs.taken(), case.calls, "{}", case.name);
    }
}

#[test]
fn unknown_and_unsupported_opcodes_get_enosys() {
    let guest = guest();
    for opcode in [0, 7, 19, 48, 49, 54, 4096, 1_048_576, 436_207_616, u32::MAX] {
        let answer = guest.send(&cases::request(opcode, NODE, &[0; 64]));
        assert_eq!(answer.errno(), ENOSYS, "opcode {opcode}");
    }
    assert_eq!(guest.fs.taken(), [""; 0]);
}

#[test]
fn requests_before_init_and_after_destroy_get_enotconn() {
    let fresh = Guest::new(Scripted::default());
    let destroyed = guest();
    assert_eq!(destroyed.send(&cases::request(38, 0, &[])).errno(), 0);
    destroyed.fs.taken();
    for guest in [fresh, destroyed] {
        for case in cases::all() {
            let answer = guest.send(&case.request());
            if case.reply.is_some() {
                assert_eq!(answer.errno(), ENOTCONN, "{}", case.name);
            } else {
                assert!(answer.is_silent(), "{}", case.name);
            }
        }
        let interrupt = cases::request(36, 0, &wire().u64(5).0);
        assert!(guest.send(&interrupt).is_silent());
        assert_eq!(guest.fs.taken(), [""; 0]);
    }
}

#[test]
fn a_device_without_a_backend_answers_enodev() {
    let session = Session::default();
    for (request, silent) in [
        (cases::init(7, 45, 0), false),
        (cases::request(17, NODE, &[]), false),
        (cases::request(2, NODE, &[1; 8]), true),
    ] {
        let reply = Pieces::new(&[UNTOUCHED; 256], &[]);
        let answer = exchange::<Null>(None, &session, &Pieces::new(&request, &[]), &reply);
        if silent {
            assert!(answer.is_silent());
        } else {
            assert_eq!(answer.errno(), ENODEV);
        }
    }
}

#[test]
fn interrupt_names_the_request_to_stop() {
    let guest = guest();
    let answer = guest.send(&cases::request(36, 0, &wire().u64(0xdead_beef).0));
    assert_eq!(answer, Answer::Interrupts(0xdead_beef));
    assert!(guest.send(&cases::request(36, 0, &[0; 7])).is_silent());
}

#[test]
fn only_setlkw_waits_for_a_conflicting_lock() {
    let guest = guest();
    let setlk = guest.send(&cases::lock_request(32, CONFLICTING));
    assert_eq!(setlk.errno(), EAGAIN);
    let setlkw = guest.send(&cases::lock_request(33, CONFLICTING));
    assert_eq!(setlkw, Answer::Waits);
}

#[test]
fn submitted_reads_and_writes_are_finished_with_what_the_ring_gave() {
    let guest = guest();
    let read = guest.send(&cases::read_request(SUBMITTED, 0, 8));
    assert_eq!(read.payload(), &FILE[..8], "cut to what was asked for");
    let read = guest.send(&cases::read_request(SUBMITTED, 0, 100));
    assert_eq!(read.payload(), FILE);
    let failed = guest.send(&cases::read_request(SUBMITTED, u64::MAX, 100));
    assert_eq!(failed.errno(), EIO);
    let write = guest.send(&cases::write_request(SUBMITTED, 4, b"data"));
    assert_eq!(write.payload(), wire().u32(4).u32(0).0);
    let fsync = guest.send(&cases::request(20, NODE, &wire().u64(SUBMITTED).u64(1).0));
    assert_eq!(fsync.payload(), b"");
    let fallocate = wire().u64(SUBMITTED).u64(1).u64(2).u64(0).0;
    assert_eq!(
        guest.send(&cases::request(43, NODE, &fallocate)).errno(),
        ENOSPC
    );
    let calls = guest.fs.taken();
    let unpinned: Vec<_> = calls.iter().filter(|c| c.starts_with("unpin")).collect();
    assert_eq!(unpinned.len(), 6, "{calls:?}");
    assert_eq!(unpinned[0], "unpin 3 Read { fd: 9, offset: 0, len: 8 } 8");
}

#[test]
fn a_read_is_cut_to_the_room_in_the_reply() {
    let guest = guest();
    let answer = guest.send_for(&cases::read_request(0xf1, 0, 4096), HEADER + 3);
    assert_eq!(answer.payload(), b"hel");
    let answer = guest.send_for(&cases::read_request(SUBMITTED, 0, u32::MAX), HEADER + 4);
    assert_eq!(answer.payload(), b"from");
}

#[test]
fn a_copy_never_overflows_the_reply_that_counts_it() {
    let guest = guest();
    let copy = |opcode: u32| {
        let body = wire().zeros(40).u64(u64::MAX).u64(0).0;
        guest.send(&cases::request(opcode, NODE, &body))
    };
    assert_eq!(copy(47).payload(), wire().u32(0x7fff_0000).u32(0).0);
    assert_eq!(copy(53).payload(), wire().u64(u64::MAX).0);
}

#[test]
fn transfers_that_no_driver_asks_for_are_refused() {
    let guest = guest();
    let most = 63 * 64 * 1024;
    let read = |size: u32| {
        let request = cases::read_request(SUBMITTED, 0, size);
        guest.send_for(&request, HEADER + 2 * most)
    };
    assert_eq!(read(most as u32).payload(), FILE);
    assert_eq!(read(most as u32 + 1).errno(), EINVAL);
    let write = |size: usize| {
        let data = vec![0; size];
        guest.send(&cases::write_request(SUBMITTED, size as u32, &data))
    };
    assert_eq!(write(most).errno(), 0);
    assert_eq!(write(most + 1).errno(), EINVAL);
}

#[test]
fn a_write_hands_over_exactly_its_data() {
    let guest = guest();
    guest.send(&cases::write_request(0xf1, 4, b"data and a tail"));
    assert_eq!(guest.fs.taken(), ["write 7 241 0 4 2 2748 2 data"]);
    assert_eq!(
        guest.send(&cases::write_request(0xf1, 5, b"data")).errno(),
        EINVAL
    );
    assert_eq!(guest.fs.taken(), [""; 0]);
}

#[test]
fn listings_hold_whole_entries_only() {
    let guest = guest();
    for (opcode, first, second) in [(28, 32, 40), (44, 160, 168)] {
        let size = |size| guest.send(&cases::readdir_request(opcode, 0, size));
        assert_eq!(size(first - 1).errno(), EINVAL, "not even one");
        assert_eq!(size(first).payload().len(), first as usize);
        assert_eq!(size(first + second - 1).payload().len(), first as usize);
        assert_eq!(
            size(first + second).payload().len(),
            (first + second) as usize
        );
        let end = guest.send(&cases::readdir_request(opcode, 3, 4096));
        assert_eq!(end.payload(), b"", "the end of the directory");
        let end = guest.send(&cases::readdir_request(opcode, 3, 0));
        assert_eq!(end.errno(), 0);
    }
}

#[test]
fn an_attribute_that_does_not_fit_is_erange_and_never_cut() {
    let guest = guest();
    let get = |size| cases::request(22, NODE, &wire().u32(size).u32(0).text("user.a").0);
    assert_eq!(guest.send(&get(10)).errno(), ERANGE);
    assert_eq!(guest.send(&get(11)).payload(), b"value of it");
    assert_eq!(guest.send_for(&get(64), HEADER + 10).errno(), ERANGE);
    assert_eq!(guest.send_for(&get(64), HEADER).errno(), ERANGE);
    assert_eq!(guest.send_for(&get(0), HEADER + 7).errno(), EIO);
    assert_eq!(guest.send(&get(u32::MAX)).payload(), b"value of it");
}

#[test]
fn a_link_target_that_does_not_fit_is_an_error_and_never_cut() {
    let guest = guest();
    let request = cases::request(5, NODE, &[]);
    assert_eq!(guest.send_for(&request, HEADER + 11).errno(), EIO);
    assert_eq!(
        guest.send_for(&request, HEADER + 12).payload(),
        b"../elsewhere"
    );
}

#[test]
fn a_backend_that_claims_too_much_leaks_nothing() {
    let liar = |claimed| {
        let guest = Guest::mounted(Scripted {
            claimed: Some(claimed),
            ..Scripted::default()
        });
        cases::all()
            .into_iter()
            .filter(|case| ["READLINK", "GETXATTR", "LISTXATTR", "IOCTL"].contains(&case.name))
            .map(|case| guest.send(&case.request()))
            .collect::<Vec<_>>()
    };
    for answer in liar(1 << 20) {
        assert_eq!(answer.errno(), EIO);
    }
    for answer in liar(40) {
        // Longer than what was filled, but inside the room: zeros, not what an earlier request left behind.
        assert_eq!(answer.errno(), 0);
        assert!(!answer.payload().contains(&0x5a));
    }
}

#[test]
fn error_numbers_of_the_kernels_own_become_eio() {
    let guest = guest();
    let answer = guest.send(&cases::request(1, INTERNAL, b"name\0"));
    assert_eq!(answer.errno(), EIO);
}

#[test]
fn unrestricted_ioctls_are_refused() {
    let guest = guest();
    let answer = guest.send(&cases::ioctl_request(2, 0, 0, b""));
    assert_eq!(answer.errno(), EINVAL);
    assert_eq!(
        guest.send(&cases::ioctl_request(0, 6, 0, b"given")).errno(),
        EINVAL
    );
    assert_eq!(guest.fs.taken(), [""; 0]);
}

#[test]
fn open_flags_of_an_arm_guest_reach_the_backend_in_this_machines_numbers() {
    if cfg!(any(target_arch = "arm", target_arch = "aarch64")) {
        return;
    }
    let guest = Guest {
        fs: Scripted::default(),
        session: Session::new(Platform::Aarch64),
    };
    guest.send(&cases::init(7, 45, 0));
    guest.fs.taken();
    // O_DIRECT and O_DIRECTORY at once, then O_NOFOLLOW and O_LARGEFILE at once, as Arm numbers them.
    guest.send(&cases::request(14, NODE, &wire().u32(0o200000).u32(0).0));
    guest.send(&cases::request(14, NODE, &wire().u32(0o240000).u32(0).0));
    guest.send(&cases::request(27, NODE, &wire().u32(0o440000).u32(0).0));
    let create = wire().u32(0o500102).u32(0).u32(0).u32(0).text("n").0;
    guest.send(&cases::request(35, NODE, &create));
    assert_eq!(
        guest.fs.taken(),
        [
            "open 7 40000 0",
            "open 7 240000 0",
            "opendir 7 300000",
            "create 7 n 500102 0 0 0 by 1000/100/4242",
        ]
    );
}

#[test]
fn the_null_backend_answers_every_operation_and_reads_zeros() {
    let guest = Guest::mounted(Null);
    for case in cases::all() {
        guest.send(&case.request());
        guest.send(&cases::init(7, 45, u64::MAX));
    }
    let lookup = guest.send(&cases::request(1, 1, b"zero2\0"));
    assert_eq!(fuse_support::wire::u64_at(lookup.payload(), 0), 4);
    assert_eq!(
        guest.send(&cases::request(1, 1, b"nothing\0")).errno(),
        ENOENT
    );
    let read = |offset: u64, size: u32| {
        let body = wire().u64(4).u64(offset).u32(size).zeros(20).0;
        guest.send(&cases::request(15, 4, &body))
    };
    assert_eq!(read(5, 100_000).payload(), vec![0; 100_000]);
    assert_eq!(read((1 << 30) - 10, 4096).payload(), [0; 10]);
    assert_eq!(read(1 << 30, 4096).payload(), b"");
    assert_eq!(read(u64::MAX, 4096).payload(), b"");
}
