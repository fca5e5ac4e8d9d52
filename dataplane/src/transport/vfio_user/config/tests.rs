use super::*;
use proptest::prelude::*;

fn space(vectors: u16) -> ConfigSpace {
    ConfigSpace::new(&Identity {
        subsystem_vendor: 6900,
        subsystem: 4186,
        vectors,
        device_len: 44,
        notify_len: 36,
    })
}

fn read<const N: usize>(space: &ConfigSpace, at: usize) -> [u8; N] {
    let mut data = [0xaa; N];
    space.read(at, &mut data);
    data
}

fn u16_at(space: &ConfigSpace, at: usize) -> u16 {
    u16::from_le_bytes(read(space, at))
}

fn u32_at(space: &ConfigSpace, at: usize) -> u32 {
    u32::from_le_bytes(read(space, at))
}

/// The capabilities in list order, as (offset, id).
fn walk(space: &ConfigSpace) -> Vec<(usize, u8)> {
    let mut list = Vec::new();
    let [mut at] = read(space, 0x34);
    while at != 0 {
        assert!(list.len() < 48, "the list does not end");
        assert_eq!(at & 3, 0);
        let [id, next] = read(space, at.into());
        list.push((usize::from(at), id));
        at = next;
    }
    list
}

#[test]
fn the_function_is_a_modern_virtio_file_system() {
    let s = space(3);
    assert_eq!(u32_at(&s, 0), 0x105a_1af4);
    assert_eq!(u32_at(&s, 8), 0x0180_0001);
    assert_eq!(u32_at(&s, 0x2c), 0x105a_1af4);
    assert_eq!(u16_at(&s, STATUS) & 0x10, 0x10);
    assert_eq!(read::<1>(&s, 0x3d), [1]);
}

#[test]
fn the_capability_list_ends_and_names_every_structure() {
    let s = space(3);
    let list = walk(&s);
    let ids: Vec<u8> = list.iter().map(|c| c.1).collect();
    assert_eq!(ids, [0x10, 0x01, 0x11, 9, 9, 9, 9, 9]);
    let mut kinds = Vec::new();
    let mut end = 0x40;
    for (at, id) in list {
        assert!(at >= end, "capability at {at:#x} overlaps the one before");
        end = at
            + match id {
                0x10 => 60,
                0x01 => 8,
                0x11 => 12,
                _ => {
                    let [len, kind, bar] = read(&s, at + 2);
                    let (offset, bytes) = (u32_at(&s, at + 8), u32_at(&s, at + 12));
                    assert!(offset + bytes <= VIRTIO_BAR_SIZE && bar == VIRTIO_BAR);
                    kinds.push(kind);
                    usize::from(len)
                }
            };
    }
    assert!(end <= 256);
    assert_eq!(kinds, [1, 3, 4, 2, 5]);
}

#[test]
fn without_vectors_there_is_no_msix() {
    let mut s = space(0);
    assert!(walk(&s).iter().all(|c| c.1 != 0x11));
    assert_eq!(walk(&s).len(), 7);
    s.write(MSIX_CONTROL, &[0xff, 0xff]);
    assert!(!s.msix_enabled());
    s.write(0x18, &[0xff; 8]);
    assert_eq!(read::<8>(&s, 0x18), [0; 8]);
}

#[test]
fn bars_tell_their_sizes_and_keep_addresses() {
    let mut s = space(63);
    for (at, size) in [(0x10, VIRTIO_BAR_SIZE), (0x18, MSIX_BAR_SIZE)] {
        s.write(at, &[0xff; 8]);
        let value = u64::from_le_bytes(read(&s, at));
        // 64-bit and prefetchable.
        assert_eq!((value & 0xf, !(value & !0xf) + 1), (0xc, size.into()));
        s.write(at, &0x38_fe00_0000u64.to_le_bytes());
        assert_eq!(read::<8>(&s, at), 0x38_fe00_000cu64.to_le_bytes());
    }
    for at in [0x20, 0x24, 0x30] {
        s.write(at, &[0xff; 4]);
        assert_eq!(u32_at(&s, at), 0, "at {at:#x}");
    }
    const { assert!(63 * MSIX_ENTRY <= PBA_OFFSET) };
}

#[test]
fn the_reset_bit_asks_for_a_reset_and_reads_as_zero() {
    let mut s = space(3);
    assert_eq!(u32_at(&s, PCIE_CAP + 4) >> 28 & 1, 1);
    assert!(s.write(DEVICE_CONTROL, &[0x10, 0xa8]).reset);
    assert_eq!(u16_at(&s, DEVICE_CONTROL), 0x2810);
    assert!(!s.write(DEVICE_CONTROL, &[0x10, 0x28]).reset);
}

#[test]
fn interrupt_bits_are_reported_and_reset() {
    let mut s = space(3);
    assert_eq!(u16_at(&s, MSIX_CONTROL), 2);
    assert!(s.write(MSIX_CONTROL, &[0xff, 0xff]).interrupts);
    assert!(s.msix_enabled());
    assert_eq!(u16_at(&s, MSIX_CONTROL), 0xc002);
    assert!(s.write(COMMAND, &0x0406u16.to_le_bytes()).interrupts);
    assert!(s.intx_disabled());
    s.set_interrupt_status(true);
    assert_eq!(u16_at(&s, STATUS), 0x18);
    s.reset();
    assert!(!s.msix_enabled() && !s.intx_disabled());
    assert_eq!(u16_at(&s, STATUS), 0x10);
}

#[test]
fn the_access_capability_accepts_only_register_sizes() {
    let mut s = space(3);
    assert_eq!(s.access(), None);
    s.write(ACCESS_CAP + 8, &[4, 0, 0, 0, 4, 0, 0, 0]);
    let expected = Access {
        bar: 0,
        offset: 4,
        len: 4,
    };
    assert_eq!(s.access(), Some(expected));
    s.write(ACCESS_CAP + 8, &[2]);
    assert_eq!(s.access(), None);
    s.write(ACCESS_CAP + 12, &[3]);
    assert_eq!(s.access(), None);
    assert!(s.write(ACCESS_DATA, &[1]).access);
    assert!(ConfigSpace::touches_window(ACCESS_DATA - 1, 2));
    assert!(!ConfigSpace::touches_window(ACCESS_DATA - 1, 1));
    assert!(!ConfigSpace::touches_window(ACCESS_END, 1));
}

proptest! {
    #[test]
    fn any_access_is_answered_and_leaves_fixed_bits_alone(
        writes in proptest::collection::vec((0usize..5000, proptest::collection::vec(any::<u8>(), 0..300)), 0..20),
        at in 0usize..5000,
        len in 0usize..5000,
    ) {
        let mut s = space(3);
        let list = walk(&s);
        for (offset, data) in &writes {
            s.write(*offset, data);
        }
        s.write(usize::MAX, &[1, 2]);
        let mut data = vec![0xaa; len];
        s.read(at, &mut data);
        s.read(usize::MAX, &mut data);
        prop_assert_eq!(u32_at(&s, 0), 0x105a_1af4);
        prop_assert_eq!(walk(&s), list);
    }
}
