use super::*;

const STARTS: [Asked; 3] = [Asked::Start(0), Asked::Start(1), Asked::Start(2)];
const STOPS: [Asked; 3] = [Asked::Stop(0), Asked::Stop(1), Asked::Stop(2)];
const RESETS: [Asked; 3] = [Asked::Reset(0), Asked::Reset(1), Asked::Reset(2)];

const REPLACED: CoreEvent = CoreEvent::MemoryReplaced { device: DEVICE };

#[test]
fn status_reads_non_zero_until_every_queue_is_stopped() {
    let (mut rig, _events) = Rig::running();
    rig.set_common(STATUS, &[0]);
    assert_eq!(rig.cores.take(), RESETS);
    assert_eq!(rig.status(), 15);
    // Meanwhile the driver's writes have no effect.
    rig.set_common(STATUS, &[3]);
    rig.set_common(QUEUE_SELECT, &[1, 0]);
    rig.report(stopped(0, 5, 5));
    rig.report(stopped(1, 5, 5));
    assert_eq!(rig.status(), 15);
    rig.report(stopped(2, 5, 5));
    assert_eq!(rig.cores.take(), [Asked::EndSession]);
    assert_eq!(rig.status(), 0);
    assert_eq!(rig.common::<2>(QUEUE_SELECT), [0, 0]);
    assert_eq!(rig.common::<2>(QUEUE_ENABLE), [0, 0]);
    assert_eq!(rig.common::<2>(QUEUE_VECTOR), [0xff, 0xff]);

    // The guest's memory and interrupts stay, so that the driver can begin again.
    rig.bring_up(VERSION_1);
    let again = rig.cores.started.last().unwrap();
    assert!(again.call.is_some() && again.map.regions().len() == 1);
    assert_eq!(again.config.state.avail, 0);
}

#[test]
fn a_reset_with_nothing_running_is_immediate() {
    let mut rig = Rig::new(3);
    rig.set_common(STATUS, &[3]);
    rig.set_common(STATUS, &[0]);
    assert_eq!(rig.status(), 0);
    assert!(rig.call_with(command::DEVICE_RESET, &[], &[]).is_ok());
}

#[test]
fn a_function_level_reset_takes_registers_back() {
    let (mut rig, _events) = Rig::running();
    rig.write(region::CONFIG, 4, &[0x06, 0]);
    rig.write(region::CONFIG, 0x10, &0xfe00_0000u32.to_le_bytes());
    rig.write(region::BAR2, 0, &[1; 16]);
    rig.cores.take();
    // Device control is at 8 in the PCI Express capability, the first in the list.
    let [cap] = rig.read(region::CONFIG, 0x34);
    rig.write(region::CONFIG, u64::from(cap) + 8, &[0x10, 0xa8]);
    assert_eq!(rig.cores.take(), RESETS);
    assert_eq!(rig.read::<4>(region::CONFIG, 0x10), [0x0c, 0, 0, 0]);
    assert_eq!(rig.read::<1>(region::CONFIG, 4), [0]);
    let mut masked = [0; 16];
    masked[12] = 1;
    assert_eq!(rig.read::<16>(region::BAR2, 0), masked);
    assert_eq!(rig.status(), 15);
    rig.all_stopped();
    assert_eq!(rig.status(), 0);
}

#[test]
fn the_reset_command_is_answered_when_the_reset_is_complete() {
    let (mut rig, _events) = Rig::running();
    rig.send(command::DEVICE_RESET, &[], &[], 0);
    let id = rig.next_id;
    assert!(rig.reply().is_none());
    // Other commands are served meanwhile.
    assert_eq!(rig.status(), 15);
    rig.all_stopped();
    let (answered, got) = rig.reply().unwrap();
    assert_eq!(answered, id);
    assert!(got.is_ok());
}

#[test]
fn memory_is_given_back_only_when_no_core_uses_it() {
    let (mut rig, _events) = Rig::running();
    rig.open_window(0x200000, 0x1000);
    assert_eq!(rig.cores.take(), [Asked::SetMemory]);
    assert!(rig.reply().is_none());
    let map = rig.next_id;
    // More changes come while the cores are busy with the first: they go together.
    rig.open_window(0x300000, 0x1000);
    let unmap = dma_unmap(0x200000, 0x1000);
    rig.send(command::DMA_UNMAP, unmap.as_bytes(), &[], 0);
    assert_eq!(rig.cores.take(), []);
    rig.report(REPLACED);
    assert_eq!(rig.reply().unwrap().0, map);
    assert!(rig.reply().is_none());
    assert_eq!(rig.cores.take(), [Asked::SetMemory]);
    rig.report(REPLACED);
    assert_eq!(rig.reply().unwrap().0, map + 1);
    let (id, got) = rig.reply().unwrap();
    assert_eq!(id, map + 2);
    assert_eq!(got.unwrap().0, unmap.as_bytes());
    assert_eq!(rig.cores.take(), []);
}

#[test]
fn memory_that_changes_during_a_reset_does_not_hold_it_up() {
    let (mut rig, _events) = Rig::running();
    rig.set_common(STATUS, &[0]);
    let unmap = dma_unmap(0, 0x100000);
    rig.send(command::DMA_UNMAP, unmap.as_bytes(), &[], 0);
    rig.all_stopped();
    assert!(rig.reply().is_none());
    rig.report(REPLACED);
    assert!(rig.reply().unwrap().1.is_ok());
    assert_eq!(rig.status(), 0);
    rig.bring_up(VERSION_1);
    assert!(rig.cores.started.last().unwrap().map.regions().is_empty());
}

#[test]
fn windows_are_checked_and_those_without_a_file_are_out_of_reach() {
    let mut rig = Rig::new(3);
    let unmappable = dma_map(0, 0x1000);
    rig.call_with(command::DMA_MAP, unmappable.as_bytes(), &[])
        .unwrap();
    let refused = |rig: &mut Rig, map: DmaMap| {
        let memory = new_memfd("guest", 0x1000).unwrap();
        rig.call_with(command::DMA_MAP, map.as_bytes(), &[memory.as_fd()])
            .unwrap_err()
    };
    assert_eq!(refused(&mut rig, dma_map(0xfff, 2)), 17);
    assert_eq!(refused(&mut rig, dma_map(0x2000, 0x1001)), 22);
    let event = EventFd::new().unwrap();
    let fds = [event.as_fd(), event.as_fd()];
    let map = dma_map(0x2000, 8);
    let got = rig.call_with(command::DMA_MAP, map.as_bytes(), &fds[..1]);
    assert_eq!(got.unwrap_err(), 9);
    let got = rig.call_with(command::DMA_MAP, map.as_bytes(), &fds);
    assert_eq!(got.unwrap_err(), 22);
    let unmap = dma_unmap(0x2000, 8);
    let got = rig.call_with(command::DMA_UNMAP, unmap.as_bytes(), &[]);
    assert_eq!(got.unwrap_err(), 2);

    rig.open_window(0x10000, 0x10000);
    rig.reply().unwrap().1.unwrap();
    rig.bring_up(VERSION_1);
    let map = &rig.cores.started[0].map;
    let regions: Vec<_> = map.regions().iter().map(|r| r.iova.0).collect();
    assert_eq!(regions, [0x10000]);
}

#[test]
fn a_pause_keeps_registers_alive_and_queues_still() {
    let (mut rig, _events) = Rig::running();
    rig.device.pause(&mut rig.cores);
    assert_eq!(rig.cores.take(), STOPS);
    assert!(!rig.device.is_paused());
    rig.all_stopped();
    assert!(rig.device.is_paused() && rig.device.is_quiet());
    assert_eq!(rig.status(), 15);
    rig.device.resume(&mut rig.cores);
    assert_eq!(rig.cores.take(), STARTS);
    assert_eq!(rig.cores.started.last().unwrap().config.state.avail, 5);
}

#[test]
fn a_driver_that_begins_during_a_pause_runs_when_it_ends() {
    let mut rig = Rig::new(3);
    rig.open_window(0, 0x100000);
    rig.reply().unwrap().1.unwrap();
    rig.device.pause(&mut rig.cores);
    rig.bring_up(VERSION_1);
    assert_eq!(rig.status(), 15);
    assert_eq!(rig.cores.take(), []);
    rig.set_common(STATUS, &[0]);
    assert_eq!(rig.status(), 0);
    assert_eq!(rig.cores.take(), [Asked::EndSession]);
    rig.bring_up(VERSION_1);
    rig.device.resume(&mut rig.cores);
    assert_eq!(rig.cores.take(), STARTS);
}

#[test]
fn one_queue_can_be_reset_and_used_again() {
    let mut rig = Rig::new(3);
    rig.open_window(0, 0x100000);
    rig.reply().unwrap().1.unwrap();
    rig.bring_up(VERSION_1 | RING_RESET);
    rig.cores.take();
    rig.set_common(QUEUE_SELECT, &[1, 0]);
    rig.set_common(QUEUE_RESET, &[1, 0]);
    assert_eq!(rig.cores.take(), [Asked::Stop(1)]);
    assert_eq!(rig.common::<2>(QUEUE_RESET), [1, 0]);
    rig.report(stopped(1, 7, 7));
    assert_eq!(rig.common::<2>(QUEUE_RESET), [0, 0]);
    assert_eq!(rig.common::<2>(QUEUE_ENABLE), [0, 0]);
    assert_eq!(rig.common::<8>(0x20), [0; 8]);
    rig.set_common(0x20, &0x14000u64.to_le_bytes());
    rig.set_common(QUEUE_ENABLE, &[1, 0]);
    assert_eq!(rig.cores.take(), [Asked::Start(1)]);
    assert_eq!(rig.cores.started.last().unwrap().config.state.avail, 0);
}

#[test]
fn a_failed_queue_is_reported_once_through_the_configuration_vector() {
    let (mut rig, events) = Rig::running();
    rig.set_common(0x10, &[2, 0]);
    let failed = CoreEvent::QueueFailed {
        device: DEVICE,
        index: QueueIdx(1),
    };
    rig.report(failed.clone());
    assert_eq!(rig.status(), 15 | 64);
    assert!(fired(&events[2]));
    rig.report(failed);
    assert!(!fired(&events[2]));
}

#[test]
fn a_second_client_is_turned_away() {
    let (mut rig, _events) = Rig::running();
    let second = connect(&rig.device);
    rig.pump();
    let first = std::mem::replace(&mut rig.client, second);
    assert!(rig.closed());
    rig.client = first;
    assert_eq!(rig.status(), 15);
}

#[test]
fn a_client_that_leaves_is_forgotten_before_the_next_is_served() {
    let (mut rig, _events) = Rig::running();
    let next = connect(&rig.device);
    rig.client = next;
    rig.pump();
    rig.client = connect(&rig.device);
    rig.pump();
    assert!(!rig.device.connected());
    let calls = rig.cores.take();
    assert!(calls.contains(&Asked::Reset(2)), "{calls:?}");
    assert!(calls.ends_with(&[Asked::SetMemory]), "{calls:?}");
    rig.all_stopped();
    assert!(!rig.device.connected());
    rig.report(REPLACED);
    assert!(rig.device.connected());
    rig.hello();
    assert_eq!(rig.status(), 0);
    rig.bring_up(VERSION_1);
    let start = rig.cores.started.last().unwrap();
    assert!(start.map.regions().is_empty());
}

#[test]
fn closing_takes_the_socket_away_and_ends_quietly() {
    let (mut rig, _events) = Rig::running();
    let path = rig.device.listener.as_ref().unwrap().path().to_owned();
    rig.device.begin_close(&mut rig.cores);
    assert!(!path.exists() && rig.closed());
    assert!(!rig.device.is_quiet());
    rig.all_stopped();
    rig.report(REPLACED);
    assert!(rig.device.is_quiet());
    assert!(rig.cores.take().contains(&Asked::EndSession));
}

/// The capability of power management is the second; its control register is at 4.
fn power_control(rig: &mut Rig) -> u64 {
    let [first] = rig.read(region::CONFIG, 0x34);
    let [next] = rig.read(region::CONFIG, u64::from(first) + 1);
    assert_eq!(rig.read::<1>(region::CONFIG, next.into()), [1]);
    u64::from(next) + 4
}

/// The low byte of the device status register of the PCI Express capability.
fn device_status(rig: &mut Rig) -> u8 {
    let [cap] = rig.read(region::CONFIG, 0x34);
    rig.read::<1>(region::CONFIG, u64::from(cap) + 10)[0]
}

#[test]
fn a_function_that_may_not_master_the_bus_keeps_off_memory_until_it_may() {
    let (mut rig, events) = Rig::running();
    let call = rig.cores.started[1].call.clone().unwrap();
    rig.write(region::CONFIG, 4, &[0x02]);
    assert_eq!(rig.cores.take(), STOPS);
    assert_eq!(device_status(&mut rig) & 0x20, 0x20);
    // What the last requests have to say waits.
    call.signal();
    assert!(!fired(&events[1]));
    rig.all_stopped();
    assert_eq!(device_status(&mut rig) & 0x20, 0);
    assert_eq!(rig.status(), 15);
    rig.write(region::CONFIG, 4, &[0x06]);
    assert_eq!(rig.cores.take(), STARTS);
    assert!(fired(&events[1]));
    assert_eq!(rig.cores.started.last().unwrap().config.state.avail, 5);
}

#[test]
fn a_function_in_d3_answers_in_its_configuration_space_only_and_goes_on_in_d0() {
    let (mut rig, _events) = Rig::running();
    let power = power_control(&mut rig);
    rig.write(region::CONFIG, power, &[3]);
    assert_eq!(rig.cores.take(), STOPS);
    rig.all_stopped();
    assert_eq!(rig.status(), 0xff);
    rig.set_common(STATUS, &[0]);
    rig.write(region::BAR2, 0, &[0; 16]);
    assert_eq!(rig.read::<2>(region::CONFIG, 0), [0xf4, 0x1a]);
    rig.write(region::CONFIG, power, &[0]);
    assert_eq!(rig.status(), 15);
    assert_eq!(rig.read::<16>(region::BAR2, 0)[12], 1);
    assert_eq!(rig.cores.take(), STARTS);
}

#[test]
fn a_reset_drops_what_a_stopping_queue_waits_for() {
    let (mut rig, _events) = Rig::running();
    rig.write(region::CONFIG, 4, &[0x02]);
    assert_eq!(rig.cores.take(), STOPS);
    let [cap] = rig.read(region::CONFIG, 0x34);
    rig.write(region::CONFIG, u64::from(cap) + 8, &[0x10, 0xa8]);
    assert_eq!(rig.cores.take(), RESETS);
    rig.all_stopped();
    rig.write(region::CONFIG, 4, &[0x06]);
    assert_eq!(rig.status(), 0);
}

#[test]
fn the_form_of_a_functions_record_belongs_to_the_version_of_records() {
    use crate::keeper::{VERSION, encode};
    let (rig, _events) = Rig::running();
    let record = encode(&rig.device.served.saved());
    // Whoever changes the record has to raise the version, and then both numbers here.
    assert_eq!((VERSION, record.len()), (2, 388));
}
