use super::*;
use crate::id::QueueKind;
use crate::mem::Iova;

#[test]
fn the_device_describes_itself() {
    let mut rig = Rig::new(3);
    let ask = DeviceInfo {
        argsz: 16,
        ..DeviceInfo::default()
    };
    let info: DeviceInfo = rig.call(command::DEVICE_GET_INFO, &ask).unwrap();
    assert_eq!((info.flags, info.num_regions, info.num_irqs), (3, 9, 5));
    let mut sizes = Vec::new();
    for index in 0..9 {
        let ask = RegionInfo {
            argsz: 32,
            index,
            ..RegionInfo::default()
        };
        let info: RegionInfo = rig.call(command::DEVICE_GET_REGION_INFO, &ask).unwrap();
        assert_eq!((info.argsz, info.index), (32, index));
        assert_eq!(info.flags, if info.size > 0 { 3 } else { 0 });
        sizes.push(info.size);
    }
    assert_eq!(sizes, [0x4000, 0, 0x1000, 0, 0, 0, 0, 0x1000, 0]);
    let mut counts = Vec::new();
    for index in 0..5 {
        let ask = IrqInfo {
            argsz: 16,
            index,
            ..IrqInfo::default()
        };
        let info: IrqInfo = rig.call(command::DEVICE_GET_IRQ_INFO, &ask).unwrap();
        counts.push(info.count);
    }
    assert_eq!(counts, [1, 0, 3, 1, 1]);
    let tag: [u8; 8] = rig.read(region::BAR0, DEVICE_OFFSET.into());
    assert_eq!(&tag, b"docatag\0");
    let queues: [u8; 4] = rig.read(region::BAR0, u64::from(DEVICE_OFFSET) + 36);
    assert_eq!(queues, [2, 0, 0, 0]);
    assert_eq!(rig.common::<2>(0x12), QUEUES.to_le_bytes());
}

#[test]
fn a_driver_starts_the_queues_that_it_has_set_up() {
    let (mut rig, events) = Rig::running();
    let kinds: Vec<_> = rig.cores.started.iter().map(|s| s.kind).collect();
    assert_eq!(
        kinds,
        [
            QueueKind::HighPriority,
            QueueKind::Request,
            QueueKind::Request
        ]
    );
    let start = &rig.cores.started[1];
    assert_eq!((start.device, start.index), (DEVICE, QueueIdx(1)));
    let config = &start.config;
    assert_eq!(
        (config.size, config.desc, config.avail, config.used),
        (64, Iova(0x14000), Iova(0x15000), Iova(0x16000))
    );
    let ring = start.map.translate(Iova(0x14000), 64 * 16, 16, false);
    assert!(ring.is_ok());
    start.call.as_ref().unwrap().signal();
    assert!(!fired(&events[0]) && fired(&events[1]));

    // The driver notifies queue 2, and only queue 2.
    let kicks: Vec<_> = rig.cores.started.iter().map(|s| s.kick.clone()).collect();
    kicks.iter().for_each(|k| k.drain());
    rig.write(region::BAR0, u64::from(NOTIFY_OFFSET) + 8, &[2, 0]);
    let kicked: Vec<_> = kicks.iter().map(|k| fired(&**k)).collect();
    assert_eq!(kicked, [false, false, true]);
}

#[test]
fn settings_of_an_enabled_queue_do_not_change() {
    let (mut rig, _events) = Rig::running();
    rig.set_common(QUEUE_SELECT, &[1, 0]);
    rig.set_common(0x20, &[0xff; 8]);
    rig.set_common(0x18, &[8, 0]);
    assert_eq!(rig.common::<8>(0x20), 0x14000u64.to_le_bytes());
    assert_eq!(rig.common::<2>(0x18), [64, 0]);
    assert_eq!(rig.common::<2>(QUEUE_ENABLE), [1, 0]);
    // No such queue: size 0, no vector.
    rig.set_common(QUEUE_SELECT, &[9, 0]);
    assert_eq!(rig.common::<4>(0x18), [0, 0, 0xff, 0xff]);
}

#[test]
fn vectors_outside_the_table_read_back_as_none() {
    let mut rig = Rig::new(3);
    for (vector, expected) in [(2u16, 2u16), (3, 0xffff), (0xffff, 0xffff)] {
        for field in [0x10, QUEUE_VECTOR] {
            rig.set_common(field, &vector.to_le_bytes());
            assert_eq!(rig.common::<2>(field), expected.to_le_bytes());
        }
    }
}

#[test]
fn features_beyond_the_offer_keep_features_ok_from_being_set() {
    let mut rig = Rig::new(3);
    rig.set_common(0, &1u32.to_le_bytes());
    // VIRTIO_F_VERSION_1, _ACCESS_PLATFORM, _NOTIFICATION_DATA, _NOTIF_CONFIG_DATA and _RING_RESET.
    assert_eq!(rig.common::<4>(4), [0x03 | 0xc0, 0x01, 0, 0]);
    rig.set_common(0, &2u32.to_le_bytes());
    assert_eq!(rig.common::<4>(4), [0; 4]);
    for (select, word) in [(1u32, 0xffff_ffffu32), (2, 1)] {
        rig.set_common(STATUS, &[0]);
        rig.set_common(STATUS, &[3]);
        rig.set_common(0x08, &1u32.to_le_bytes());
        rig.set_common(0x0c, &1u32.to_le_bytes());
        rig.set_common(0x08, &select.to_le_bytes());
        rig.set_common(0x0c, &word.to_le_bytes());
        rig.set_common(STATUS, &[11]);
        assert_eq!(rig.status(), 3, "feature word {select}");
    }
}

#[test]
fn moving_a_vector_moves_the_interrupts_of_its_queues() {
    let (mut rig, _events) = Rig::running();
    rig.set_events(irq::MSIX, 1, &[EventFd::new().unwrap()]);
    assert_eq!(rig.cores.take(), [Asked::SetCall(1, true)]);
    rig.set_common(QUEUE_SELECT, &[2, 0]);
    rig.set_common(QUEUE_VECTOR, &[0xff, 0xff]);
    assert_eq!(rig.cores.take(), [Asked::SetCall(2, false)]);
    // Several queues on one vector.
    rig.set_common(QUEUE_VECTOR, &[1, 0]);
    assert_eq!(rig.cores.take(), [Asked::SetCall(2, true)]);
    rig.set_events(irq::MSIX, 1, &[EventFd::new().unwrap()]);
    let both = [Asked::SetCall(1, true), Asked::SetCall(2, true)];
    assert_eq!(rig.cores.take(), both);
}

#[test]
fn without_vectors_queues_interrupt_by_the_pin() {
    let mut rig = Rig::new(0);
    let pin = [EventFd::new().unwrap()];
    rig.set_events(irq::INTX, 0, &pin);
    rig.open_window(0, 0x100000);
    rig.reply().unwrap().1.unwrap();
    rig.bring_up(VERSION_1);
    let call = rig.cores.started[1].call.clone().unwrap();
    assert_eq!(rig.common::<2>(QUEUE_VECTOR), [0xff, 0xff]);

    call.signal();
    rig.pump();
    assert!(fired(&pin[0]));
    assert_eq!(rig.read::<1>(region::CONFIG, 6)[0] & 8, 8);
    // A second interrupt before the client unmasks is remembered, not fired.
    call.signal();
    rig.pump();
    assert!(!fired(&pin[0]));
    let unmask = IrqSet {
        argsz: 20,
        flags: irq_set_flags::DATA_NONE | irq_set_flags::ACTION_UNMASK,
        index: irq::INTX,
        start: 0,
        count: 1,
    };
    rig.call_with(command::DEVICE_SET_IRQS, unmask.as_bytes(), &[])
        .unwrap();
    assert!(fired(&pin[0]));
    assert_eq!(rig.read::<1>(region::BAR0, ISR_OFFSET.into()), [1]);
    assert_eq!(rig.read::<1>(region::BAR0, ISR_OFFSET.into()), [0]);
    rig.call_with(command::DEVICE_SET_IRQS, unmask.as_bytes(), &[])
        .unwrap();
    assert!(!fired(&pin[0]));
    // The driver can turn the pin off.
    rig.write(region::CONFIG, 4, &0x0406u16.to_le_bytes());
    call.signal();
    rig.pump();
    assert!(!fired(&pin[0]));
}

#[test]
fn the_access_capability_reaches_the_registers() {
    let mut rig = Rig::new(3);
    let [mut at] = rig.read(region::CONFIG, 0x34);
    let cap = loop {
        let [id, next, _, kind]: [u8; 4] = rig.read(region::CONFIG, at.into());
        if id == 9 && kind == 5 {
            break u64::from(at);
        }
        at = next;
    };
    let point = |offset: u32, len: u32| [0u32, offset, len].map(u32::to_le_bytes).concat();
    rig.write(region::CONFIG, cap + 4, &point(0x12, 2));
    assert_eq!(rig.read::<4>(region::CONFIG, cap + 16), [3, 0, 0, 0]);
    rig.write(region::CONFIG, cap + 4, &point(0x14, 1));
    rig.write(region::CONFIG, cap + 16, &[1]);
    assert_eq!(rig.status(), 1);
    // Pointing at nothing changes nothing.
    rig.write(region::CONFIG, cap + 4, &point(0xffff_fffc, 4));
    rig.write(region::CONFIG, cap + 16, &[0]);
    assert_eq!(rig.read::<4>(region::CONFIG, cap + 16), [0; 4]);
    assert_eq!(rig.status(), 1);
}

#[test]
fn kicks_are_handed_out_to_a_client_with_room_for_them() {
    let mut rig = Rig::new(3);
    let ask = |index, argsz| RegionIoFds {
        argsz,
        index,
        ..RegionIoFds::default()
    };
    let io_fds = command::DEVICE_GET_REGION_IO_FDS;
    let short: RegionIoFds = rig.call(io_fds, &ask(0, 16)).unwrap();
    assert_eq!((short.count, short.argsz), (3, 16 + 3 * 40));
    let full = ask(0, short.argsz);
    let (payload, fds) = rig.call_with(io_fds, full.as_bytes(), &[]).unwrap();
    assert_eq!(fds.len(), 3);
    let (last, _) = IoEventFd::read_from_prefix(&payload[16 + 80..]).unwrap();
    let place = u64::from(NOTIFY_OFFSET) + 8;
    assert_eq!((last.offset, last.fd_index), (place, 2));
    rig.open_window(0, 0x100000);
    rig.reply();
    rig.bring_up(VERSION_1);
    let kick = rig.cores.started[2].kick.clone();
    kick.drain();
    let mine = fds.into_iter().next_back().unwrap();
    EventFd::from_peer(mine).unwrap().signal();
    assert!(fired(&*kick));
    let other: RegionIoFds = rig.call(io_fds, &ask(2, 16)).unwrap();
    assert_eq!(other.count, 0);
    assert_eq!(rig.call::<RegionIoFds>(io_fds, &ask(9, 16)), Err(22));
}

/// The MSI-X capability is the third; its control register is at 2.
fn msix_control(rig: &mut Rig) -> u64 {
    let [mut at] = rig.read(region::CONFIG, 0x34);
    loop {
        let [id, next]: [u8; 2] = rig.read(region::CONFIG, at.into());
        if id == 0x11 {
            return u64::from(at) + 2;
        }
        at = next;
    }
}

#[test]
fn interrupts_of_masked_vectors_wait_in_the_pending_bits() {
    let (mut rig, events) = Rig::running();
    let calls: Vec<_> = rig.cores.started.iter().map(|s| s.call.clone()).collect();
    let signal = |queue: usize| calls[queue].as_ref().unwrap().signal();
    // A client that keeps the table to itself.
    signal(1);
    assert!(fired(&events[1]));
    // One that does not: the driver unmasks vector 1 only.
    let unmasked = [[0; 12].as_slice(), &[0; 4]].concat();
    rig.write(region::BAR2, 16, &unmasked);
    signal(1);
    signal(2);
    assert!(fired(&events[1]) && !fired(&events[2]));
    assert_eq!(rig.read::<8>(region::BAR2, 0x800), [4, 0, 0, 0, 0, 0, 0, 0]);
    rig.write(region::BAR2, 32, &unmasked);
    assert!(fired(&events[2]));
    assert_eq!(rig.read::<8>(region::BAR2, 0x800), [0; 8]);
    // The function's mask holds back all.
    let control = msix_control(&mut rig);
    rig.write(region::CONFIG, control, &[2, 0xc0]);
    signal(1);
    signal(2);
    assert!(!fired(&events[1]) && !fired(&events[2]));
    assert_eq!(rig.read::<1>(region::BAR2, 0x800), [6]);
    rig.write(region::CONFIG, control, &[2, 0x80]);
    assert!(fired(&events[1]) && fired(&events[2]));
    assert_eq!(rig.read::<1>(region::BAR2, 0x800), [0]);
}

#[test]
fn a_notification_may_carry_more_than_the_number_of_the_queue() {
    let (mut rig, _events) = Rig::running();
    let kicks: Vec<_> = rig.cores.started.iter().map(|s| s.kick.clone()).collect();
    kicks.iter().for_each(|k| k.drain());
    rig.write(region::BAR0, u64::from(NOTIFY_OFFSET) + 4, &[1, 0, 9, 0x80]);
    let kicked: Vec<_> = kicks.iter().map(|k| fired(&**k)).collect();
    assert_eq!(kicked, [false, true, false]);
}
