use super::*;
use ferry_dataplane::fuse::abi::{FUSE_LOOKUP, FUSE_WRITE};

fn head(opcode: u32, args: &[u8]) -> Vec<u8> {
    let header = fuse_in_header {
        len: (IN_HEADER + args.len()) as u32,
        opcode,
        unique: 7,
        ..fuse_in_header::default()
    };
    [header.as_bytes(), args].concat()
}

fn route_of(opcode: u32, args: &[u8]) -> Route {
    let bytes = head(opcode, args);
    route(&header(&bytes).expect("a header"), &bytes)
}

#[test]
fn replies_of_variable_length_get_the_room_that_the_request_names() {
    let read = fuse_read_in {
        size: 1 << 20,
        ..fuse_read_in::default()
    };
    for opcode in [FUSE_READ, FUSE_READDIR, FUSE_READDIRPLUS] {
        let room = Route::Request(OUT_HEADER + (1 << 20));
        assert_eq!(route_of(opcode, read.as_bytes()), room);
    }
    let get = fuse_getxattr_in {
        size: 65_536,
        padding: 0,
    };
    for opcode in [FUSE_GETXATTR, FUSE_LISTXATTR] {
        let room = Route::Request(OUT_HEADER + 65_536);
        assert_eq!(route_of(opcode, get.as_bytes()), room);
    }
}

#[test]
fn every_other_reply_has_room_for_the_longest_fixed_one() {
    for opcode in [FUSE_LOOKUP, FUSE_WRITE, 9999] {
        let Route::Request(room) = route_of(opcode, &[]) else {
            panic!("opcode {opcode} has a reply");
        };
        assert!(room >= 304);
    }
}

#[test]
fn a_request_that_is_cut_short_still_has_a_route() {
    assert_eq!(route_of(FUSE_READ, &[1, 2, 3]), Route::Request(SHORT_REPLY));
    assert!(header(&[0; IN_HEADER - 1]).is_none());
}

#[test]
fn requests_without_a_reply_are_told_apart() {
    assert_eq!(route_of(FUSE_FORGET, &[0; 8]), Route::Hiprio);
    assert_eq!(route_of(FUSE_INTERRUPT, &[0; 8]), Route::Hiprio);
    assert_eq!(route_of(FUSE_NOTIFY_REPLY, &[]), Route::Silent);
}

#[test]
fn init_loses_the_features_that_cannot_cross_a_virtqueue_and_no_others() {
    let init = fuse_init_in {
        major: 7,
        minor: 45,
        flags: u32::MAX,
        flags2: u32::MAX,
        ..fuse_init_in::default()
    };
    let mut request = head(ferry_dataplane::fuse::abi::FUSE_INIT, init.as_bytes());
    filter_init(&mut request);
    let (left, _) = fuse_init_in::read_from_prefix(&request[IN_HEADER..]).expect("long enough");
    assert_eq!(left.flags, !(FUSE_MAP_ALIGNMENT as u32));
    let high = (FUSE_HAS_INODE_DAX | FUSE_PASSTHROUGH | FUSE_OVER_IO_URING) >> 32;
    assert_eq!(left.flags2, !(high as u32));
    assert_eq!((left.major, left.minor), (7, 45));
}

#[test]
fn a_short_init_of_an_old_kernel_keeps_its_length() {
    let mut request = head(26, &[0xff; 16]);
    filter_init(&mut request);
    assert_eq!(request.len(), IN_HEADER + 16);
    assert_eq!(request[IN_HEADER + 12 + 3], 0xfb);
}

fn filtered(out: fuse_init_out, room: usize) -> (fuse_init_out, usize) {
    let mut reply = [error_reply(1, 0).as_bytes(), out.as_bytes()].concat();
    let largest = filter_init_reply(&mut reply, room);
    let (out, _) = fuse_init_out::read_from_prefix(&reply[OUT_HEADER..]).expect("long enough");
    (out, largest)
}

#[test]
fn limits_of_the_init_reply_come_down_to_the_room_of_a_slot() {
    let out = fuse_init_out {
        flags: FUSE_MAX_PAGES as u32,
        max_write: 4 << 20,
        max_pages: 1024,
        ..fuse_init_out::default()
    };
    let (got, largest) = filtered(out, 1 << 20);
    assert_eq!((got.max_write, got.max_pages), (1 << 20, 256));
    assert_eq!(largest, 1 << 20);
}

#[test]
fn small_limits_stay_and_reads_count_as_well_as_writes() {
    let out = fuse_init_out {
        flags: FUSE_MAX_PAGES as u32,
        max_write: 8192,
        max_pages: 16,
        ..fuse_init_out::default()
    };
    let (got, largest) = filtered(out, 1 << 20);
    assert_eq!((got.max_write, got.max_pages), (8192, 16));
    assert_eq!(largest, 16 * FUSE_PAGE);
    let no_pages = fuse_init_out {
        flags: 0,
        max_write: 100,
        ..out
    };
    assert_eq!(filtered(no_pages, 1 << 20).1, DEFAULT_PAGES * FUSE_PAGE);
}

#[test]
fn a_long_batch_of_forgets_is_cut_without_losing_an_entry() {
    let entries = 1000;
    let header = fuse_in_header {
        len: (BATCH_HEAD + entries * ENTRY) as u32,
        opcode: FUSE_BATCH_FORGET,
        unique: 3,
        ..fuse_in_header::default()
    };
    let mut pieces = ForgetPieces::new(&header, 4096).expect("too long for one piece");
    let mut next = BATCH_HEAD;
    while let Some((head, at, bytes)) = pieces.piece() {
        assert_eq!(at, next);
        assert!(BATCH_HEAD + bytes <= 4096);
        let (header, rest) = fuse_in_header::read_from_prefix(&head).expect("long enough");
        assert_eq!(header.len as usize, BATCH_HEAD + bytes);
        let (batch, _) = fuse_batch_forget_in::read_from_prefix(rest).expect("long enough");
        assert_eq!(batch.count as usize * ENTRY, bytes);
        next += bytes;
        pieces.advance();
    }
    assert_eq!(next, BATCH_HEAD + entries * ENTRY);
}

#[test]
fn a_short_batch_stays_in_one_piece() {
    let header = fuse_in_header {
        len: 4096,
        opcode: FUSE_BATCH_FORGET,
        ..fuse_in_header::default()
    };
    assert!(ForgetPieces::new(&header, 4096).is_none());
}
