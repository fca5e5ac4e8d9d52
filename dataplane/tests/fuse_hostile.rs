//! Names, extensions, lengths and plain noise from a guest that means no good.

mod fuse_support;

use ferry_dataplane::fsdev::null::Null;
use ferry_dataplane::fuse::ops::TABLE;
use fuse_support::Guest;
use fuse_support::cases::{self, NODE, extended, init, request};
use fuse_support::scripted::Scripted;
use fuse_support::wire::{Wire, put_u32, wire};
use proptest::prelude::{ProptestConfig, Strategy, any, prop};
use proptest::proptest;

const ENOENT: i32 = 2;
const E2BIG: i32 = 7;
const EINVAL: i32 = 22;
const ERANGE: i32 = 34;
const ENAMETOOLONG: i32 = 36;
const EOPNOTSUPP: i32 = 95;

const EXPORT_SUPPORT: u64 = 1 << 4;
const INIT_EXT: u64 = 1 << 30;
const SECURITY_CTX: u64 = 1 << 32;
const CREATE_SUPP_GROUP: u64 = 1 << 34;

fn guest() -> Guest<Scripted> {
    speaking(45, u64::MAX)
}

fn speaking(minor: u32, flags: u64) -> Guest<Scripted> {
    let guest = Guest::new(Scripted::default());
    assert_eq!(guest.send(&init(7, minor, flags)).errno(), 0);
    guest.fs.taken();
    guest
}

/// Each operation that takes names: the opcode, what comes before them, and how many there are.
fn named() -> Vec<(u32, usize, usize)> {
    vec![
        (1, 0, 1),
        (6, 0, 1),
        (8, 16, 1),
        (9, 8, 1),
        (10, 0, 1),
        (11, 0, 1),
        (12, 8, 2),
        (45, 16, 2),
        (13, 8, 1),
        (35, 16, 1),
    ]
}

/// A request with `bad` as its name number `place` and a good one elsewhere.
fn with_name(opcode: u32, before: usize, count: usize, place: usize, bad: &[u8]) -> Vec<u8> {
    let mut body = wire().zeros(before);
    for i in 0..count {
        let name = if i == place { bad } else { b"good" };
        body = body.raw(name).raw(&[0]);
    }
    if opcode == 6 {
        body = body.text("target");
    }
    request(opcode, NODE, &body.0)
}

#[test]
fn bad_names_are_refused_by_every_operation_that_takes_one() {
    let guest = guest();
    let long = [b'x'; 256];
    for (opcode, before, count) in named() {
        for place in 0..count {
            let send = |name: &[u8]| guest.send(&with_name(opcode, before, count, place, name));
            for name in [b"".as_slice(), b"/", b"a/b", b"/etc", b"../x", b"a/"] {
                assert_eq!(send(name).errno(), EINVAL, "opcode {opcode} {name:?}");
            }
            assert_eq!(send(&long).errno(), ENAMETOOLONG, "opcode {opcode}");
            for dots in [b".".as_slice(), b".."] {
                let errno = if opcode == 1 { 0 } else { EINVAL };
                assert_eq!(send(dots).errno(), errno, "opcode {opcode} {dots:?}");
            }
            guest.fs.taken();
            assert_eq!(send(&long[..255]).errno(), 0, "opcode {opcode}");
            assert_eq!(send(b"...").errno(), 0, "opcode {opcode}");
            assert_eq!(guest.fs.taken().len(), 2);
        }
    }
}

#[test]
fn names_without_an_end_are_refused() {
    let guest = guest();
    for (opcode, before, count) in named() {
        let mut request = with_name(opcode, before, count, 0, b"good");
        for byte in &mut request[40 + before..] {
            *byte = b'x';
        }
        // The NUL is there, but outside the request.
        request.push(0);
        assert_eq!(guest.send(&request).errno(), EINVAL, "opcode {opcode}");
    }
    assert_eq!(guest.fs.taken(), [""; 0]);
}

#[test]
fn dots_are_looked_up_only_with_export_support() {
    let dots = request(1, NODE, b"..\0");
    assert_eq!(speaking(45, 0).send(&dots).errno(), EINVAL);
    assert_eq!(speaking(45, EXPORT_SUPPORT).send(&dots).errno(), 0);
}

#[test]
fn link_targets_are_any_text_up_to_path_max() {
    let guest = guest();
    let symlink =
        |target: &[u8]| guest.send(&request(6, NODE, &wire().text("n").raw(target).raw(&[0]).0));
    assert_eq!(symlink(b"").errno(), ENOENT);
    assert_eq!(symlink(b"../../a/../b").errno(), 0);
    assert_eq!(symlink(&[b't'; 4095]).errno(), 0);
    assert_eq!(symlink(&[b't'; 4096]).errno(), ENAMETOOLONG);
}

#[test]
fn attribute_names_and_values_have_the_limits_of_linux() {
    let guest = guest();
    let set = |name: &[u8], size: u32, value: &[u8]| {
        let body = wire().u32(size).zeros(12).raw(name).raw(&[0]).raw(value);
        guest.send(&request(21, NODE, &body.0))
    };
    assert_eq!(set(b"", 0, b"").errno(), ERANGE);
    assert_eq!(set(&[b'n'; 256], 0, b"").errno(), ERANGE);
    assert_eq!(set(b"user.empty", 0, b"").errno(), 0);
    assert_eq!(set(b"user.v", 4, b"val").errno(), EINVAL);
    assert_eq!(set(b"user.v", 65_536, &[1; 65_536]).errno(), 0);
    assert_eq!(set(b"user.v", 65_537, &[1; 65_537]).errno(), E2BIG);
    assert_eq!(set(b"user.v", u32::MAX, b"val").errno(), E2BIG);
}

#[test]
fn a_batch_may_not_forget_more_than_it_lists() {
    let guest = guest();
    let batch = |count: u32, bytes: usize| {
        guest.send(&request(42, 0, &wire().u32(count).u32(0).zeros(bytes).0))
    };
    for (count, bytes) in [(1, 15), (2, 31), (u32::MAX, 16), (0x1000_0001, 16)] {
        assert!(batch(count, bytes).is_silent());
        assert_eq!(guest.fs.taken(), [""; 0], "{count} in {bytes} bytes");
    }
    assert!(batch(1, 100).is_silent());
    assert_eq!(guest.fs.taken(), ["forget 0 0"]);
    let many = batch(40_000, 640_000);
    assert!(many.is_silent(), "longer than any buffer of ours");
    assert_eq!(guest.fs.taken().len(), 40_000);
    assert!(batch(65_537, 65_537 * 16).is_silent());
    assert_eq!(guest.fs.taken(), [""; 0], "would hold up the core");
}

#[test]
fn lengths_that_exceed_what_is_present_are_refused() {
    let guest = guest();
    for declared in [0, 1, 39, 46, u32::MAX] {
        let mut unlink = request(10, NODE, b"name\0");
        put_u32(&mut unlink, 0, declared);
        assert_eq!(guest.send(&unlink).errno(), EINVAL, "declared {declared}");
    }
    let long = request(10, NODE, &vec![b'x'; 300_000]);
    assert_eq!(guest.send(&long).errno(), E2BIG);
    assert_eq!(guest.fs.taken(), [""; 0]);
}

/// A group extension.
fn group(count: u32, gids: &[u32]) -> Vec<u8> {
    let gids = gids.iter().fold(wire().u32(count), |w, &gid| w.u32(gid));
    extension(32, &gids.0)
}

/// A security context extension of contexts that are given as name and value.
fn labels(contexts: &[(&str, &[u8])]) -> Vec<u8> {
    let content = contexts.iter().fold(wire(), |w, (name, value)| {
        let w = w.u32(value.len() as u32).u32(0).text(name).raw(value);
        let padding = w.0.len().next_multiple_of(8) - w.0.len();
        w.zeros(padding)
    });
    extension(contexts.len() as u32, &content.0)
}

/// An extension header and its content, padded.
fn extension(kind: u32, content: &[u8]) -> Vec<u8> {
    let size = 8 + content.len();
    let padding = size.next_multiple_of(8) - size;
    let size = size.next_multiple_of(8) as u32;
    wire().u32(size).u32(kind).raw(content).zeros(padding).0
}

fn mkdir(extensions: &[u8]) -> Vec<u8> {
    let body = wire().u32(0o755).u32(0).text("dir");
    extended(9, NODE, &body.0, extensions)
}

const LABEL: (&str, &[u8]) = ("security.selinux", b"some_u:label");

#[test]
fn extensions_reach_the_backend_in_any_order() {
    let (group, label) = (group(1, &[55]), labels(&[LABEL]));
    let both = " group 55 label security.selinux=some_u:label";
    for (area, heard) in [
        (vec![], ""),
        (group.clone(), " group 55"),
        (label.clone(), " label security.selinux=some_u:label"),
        ([group.clone(), label.clone()].concat(), both),
        ([label, group].concat(), both),
        (labels(&[]), ""),
    ] {
        let guest = guest();
        assert_eq!(guest.send(&mkdir(&area)).errno(), 0);
        assert_eq!(
            guest.fs.taken(),
            [format!("mkdir 7 dir 755 0 by 1000/100/4242{heard}")]
        );
    }
}

#[test]
fn only_negotiated_extensions_reach_the_backend() {
    let area = [group(1, &[55]), labels(&[LABEL])].concat();
    for (flags, heard) in [
        (0, ""),
        (CREATE_SUPP_GROUP, " group 55"),
        (SECURITY_CTX, " label security.selinux=some_u:label"),
    ] {
        let guest = speaking(45, flags | INIT_EXT);
        assert_eq!(guest.send(&mkdir(&area)).errno(), 0);
        assert_eq!(
            guest.fs.taken(),
            [format!("mkdir 7 dir 755 0 by 1000/100/4242{heard}")]
        );
    }
}

#[test]
fn malformed_extensions_are_refused() {
    let guest = guest();
    let with = |change: fn(&mut Vec<u8>), mut area: Vec<u8>| {
        change(&mut area);
        guest.send(&mkdir(&area)).errno()
    };
    for size in [0, 7, 8, 15, 17, u32::MAX] {
        let mut area = group(1, &[5]);
        put_u32(&mut area, 0, size);
        assert_eq!(guest.send(&mkdir(&area)).errno(), EINVAL, "size {size}");
    }
    assert_eq!(guest.send(&mkdir(&extension(33, &[0; 8]))).errno(), EINVAL);
    assert_eq!(
        guest.send(&mkdir(&extension(u32::MAX, &[]))).errno(),
        EINVAL
    );
    let twice = |area: Vec<u8>| guest.send(&mkdir(&[area.clone(), area].concat())).errno();
    assert_eq!(twice(group(1, &[5])), EINVAL);
    assert_eq!(twice(labels(&[LABEL])), EINVAL);
    assert_eq!(guest.send(&mkdir(&group(2, &[5, 6]))).errno(), EOPNOTSUPP);
    assert_eq!(
        guest.send(&mkdir(&group(u32::MAX, &[5]))).errno(),
        EOPNOTSUPP
    );
    assert_eq!(with(|area| put_u32(area, 0, 12), group(1, &[])), EINVAL);
    assert_eq!(
        guest.send(&mkdir(&labels(&[LABEL, LABEL]))).errno(),
        EOPNOTSUPP
    );
    // The context's own length, then a name without an end, then more contexts than there are.
    assert_eq!(with(|area| put_u32(area, 8, 400), labels(&[LABEL])), EINVAL);
    assert_eq!(with(|area| area[16..].fill(b'x'), labels(&[LABEL])), EINVAL);
    assert_eq!(with(|area| put_u32(area, 4, 2), labels(&[LABEL])), EINVAL);
    assert_eq!(guest.fs.taken(), [""; 0]);
}

#[test]
fn the_declared_extension_area_must_fit_the_request() {
    let guest = guest();
    let mut request = mkdir(&group(1, &[5]));
    for units in [3, 4, 6, 0xffff] {
        request[36..38].copy_from_slice(&u16::to_le_bytes(units));
        assert_eq!(guest.send(&request).errno(), EINVAL, "{units} units");
    }
    assert_eq!(guest.fs.taken(), [""; 0]);
}

#[test]
fn before_7_38_security_contexts_follow_the_names_undeclared() {
    let create = wire().u32(0).u32(0).u32(0).u32(0);
    for minor in [36, 37] {
        for (opcode, body) in [
            (6, wire().text("n").text("target")),
            (8, wire().zeros(16).text("n")),
            (9, wire().zeros(8).text("n")),
            (35, create.clone().text("n")),
            (51, create.clone().text("/")),
        ] {
            let guest = speaking(minor, SECURITY_CTX | INIT_EXT);
            let labelled = body.clone().raw(&labels(&[LABEL]));
            assert_eq!(guest.send(&request(opcode, NODE, &labelled.0)).errno(), 0);
            let heard = guest.fs.taken();
            let label = "by 1000/100/4242 label security.selinux=some_u:label";
            assert!(heard[0].ends_with(label), "{opcode}: {heard:?}");

            let mut cut = labels(&[LABEL]);
            cut.truncate(20);
            let cut = body.clone().raw(&cut);
            assert_eq!(guest.send(&request(opcode, NODE, &cut.0)).errno(), EINVAL);
            assert_eq!(guest.fs.taken(), [""; 0]);

            let guest = speaking(minor, 0);
            assert_eq!(guest.send(&request(opcode, NODE, &labelled.0)).errno(), 0);
            assert!(guest.fs.taken()[0].ends_with("by 1000/100/4242"));
        }
    }
}

/// Noise in the shape of a request: a header whose length is right and whose opcode is known, and then anything.
fn shaped() -> impl Strategy<Value = Vec<u8>> {
    let opcodes: Vec<u32> = TABLE.iter().map(|row| row.opcode).collect();
    (
        prop::sample::select(opcodes),
        0u64..8,
        prop::collection::vec(any::<u8>(), 0..300),
        prop::sample::select(vec![0u16, 0, 0, 1, 2, 5, 100]),
    )
        .prop_map(|(opcode, nodeid, body, extension)| {
            let mut request = request(opcode, nodeid, &body);
            request[36..38].copy_from_slice(&extension.to_le_bytes());
            request
        })
}

/// A request of the table with a few bytes changed.
fn nearly_right() -> impl Strategy<Value = Vec<u8>> {
    let requests: Vec<Vec<u8>> = cases::all().iter().map(cases::Case::request).collect();
    (
        prop::sample::select(requests),
        prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    )
        .prop_map(|(mut request, changes)| {
            for (place, value) in changes {
                let place = place.index(request.len());
                request[place] = value;
            }
            request
        })
}

/// Sends noise to both backends; the rules for replies are checked on the way.
fn send_to_both(request: &[u8], room: usize) {
    guest().send_for(request, room);
    Guest::mounted(Null).send_for(request, room);
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        cases: 2_000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn noise_never_breaks_a_rule(bytes in prop::collection::vec(any::<u8>(), 0..300), room in 0usize..5000) {
        send_to_both(&bytes, room);
    }

    #[test]
    fn noise_behind_a_right_header_never_breaks_a_rule(bytes in shaped(), room in 0usize..5000) {
        send_to_both(&bytes, room);
    }

    #[test]
    fn requests_with_wrong_bytes_never_break_a_rule(bytes in nearly_right(), room in 0usize..5000) {
        send_to_both(&bytes, room);
    }
}

#[test]
fn extension_areas_cut_anywhere_are_refused_or_end_where_an_extension_ends() {
    let area: Wire = wire().raw(&group(1, &[5])).raw(&labels(&[LABEL]));
    for units in 0..=area.0.len() / 8 {
        let guest = guest();
        let answer = guest.send(&mkdir(&area.0[..units * 8]));
        let whole = [0, 2, area.0.len() / 8].contains(&units);
        assert_eq!(
            answer.errno(),
            if whole { 0 } else { EINVAL },
            "{units} units"
        );
    }
}
