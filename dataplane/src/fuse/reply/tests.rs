use super::*;

#[test]
fn padding_is_zero_even_over_stale_bytes() {
    for len in 1..=17usize {
        let name = vec![b'n'; len];
        let mut buffer = [0xff; 200];
        let mut listing = Listing::new(&mut buffer);
        assert!(listing.entry(&name, 1, 2, 3));
        let packed = listing.finish().expect("one entry");
        assert_eq!(packed.len(), (24 + len).next_multiple_of(8));
        assert!(packed[24 + len..].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn a_listing_that_refused_its_first_entry_is_not_taken_for_the_end() {
    let name = b"name";
    let ways: [fn(&mut Listing<'_>) -> bool; 3] = [
        |out| out.entry(b"name", 1, 2, 3),
        |out| out.entry_plus(b"name", 1, 2, &fuse_entry_out::default()),
        |out| out.fits_plus(4),
    ];
    for refuse in ways {
        let mut small = [0; 31];
        let mut listing = Listing::new(&mut small);
        assert!(!refuse(&mut listing));
        assert_eq!(listing.finish(), Err(Errno::EINVAL));
    }
    let mut exact = [0; 32];
    let mut listing = Listing::new(&mut exact);
    assert!(listing.entry(name, 1, 2, 3));
    assert!(!listing.entry(name, 1, 2, 3));
    assert_eq!(listing.finish().map(<[u8]>::len), Ok(32));
    assert_eq!(Listing::new(&mut []).finish(), Ok([].as_slice()));
}

#[test]
fn fits_plus_agrees_with_entry_plus() {
    let entry = fuse_entry_out::default();
    for len in 0..400 {
        for name in [1usize, 8, 9, 255] {
            let mut buffer = vec![0; len];
            let mut listing = Listing::new(&mut buffer);
            let fits = listing.fits_plus(name);
            assert_eq!(fits, len >= (152 + name).next_multiple_of(8));
            assert_eq!(listing.entry_plus(&vec![b'n'; name], 1, 8, &entry), fits);
        }
    }
}

#[test]
fn a_reply_to_no_room_at_all_is_no_reply() {
    let reply = Reply::new(1, Segments::empty());
    assert!(reply.is_hopeless());
    assert_eq!(reply.room(), 0);
    assert_eq!(reply.error(Errno::EIO), 0);
    assert_eq!(reply.fixed(&()), 0);
    assert_eq!(reply.bytes(b"payload"), 0);
    assert_eq!(reply.in_place(0), 0);
}
