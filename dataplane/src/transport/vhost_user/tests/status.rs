//! Status, resets, pauses and the end.

use super::*;

#[test]
fn a_failed_ring_is_told_by_its_error_event_and_the_status() {
    let mut rig = rig("failed");
    rig.bring_up();
    let err = EventFd::new().unwrap();
    assert_eq!(
        rig.ack(Request::SetVringErr, 1u64.as_bytes(), &[err.as_fd()]),
        0
    );
    rig.event(CoreEvent::QueueFailed {
        device: DEVICE,
        index: QueueIdx(1),
    });
    assert_eq!(nix::unistd::read(&err, &mut [0; 8]), Ok(8));
    assert_eq!(rig.get_u64(Request::GetStatus), 64);
}

#[test]
fn the_status_goes_up_step_by_step_and_back_by_a_full_reset_of_running_rings() {
    let mut rig = rig("status");
    rig.bring_up();
    for status in [1, 3, 11, 15] {
        rig.set(Request::SetStatus, status);
        assert_eq!(rig.get_u64(Request::GetStatus), status);
    }
    let flags = VERSION | FLAG_NEED_REPLY;
    rig.send_flags(Request::SetStatus, flags, 0u64.as_bytes(), &[]);
    assert_eq!(rig.cores.take(), [Asked::Reset(0), Asked::Reset(1)]);
    assert!(rig.reply().is_none());
    rig.event(stopped(0, 1, 1));
    rig.event(stopped(1, 1, 1));
    assert_eq!(rig.cores.take(), [Asked::EndSession]);
    assert_eq!(rig.reply().unwrap().0, Request::SetStatus);
    assert_eq!(rig.get_u64(Request::GetStatus), 0);
    assert_eq!(rig.device.queues.map().regions().len(), 1, "memory stays");
    // The driver can start over.
    rig.set_up_ring(0);
    rig.kick(0);
    rig.vring(Request::SetVringEnable, 0, 1);
    assert_eq!(rig.cores.take(), [Asked::Start(0)]);
}

#[test]
fn a_status_reset_with_all_rings_stopped_keeps_the_session() {
    let mut rig = rig("pause-vm");
    rig.bring_up();
    rig.set(Request::SetStatus, 15);
    for index in 0..2 {
        let state = VringState { index, num: 0 };
        rig.send(Request::GetVringBase, state.as_bytes(), &[]);
        rig.event(stopped(index as u16, 4, 4));
        rig.reply().unwrap();
    }
    rig.cores.take();
    rig.set(Request::SetStatus, 0);
    assert_eq!(rig.cores.take(), [], "the virtual machine is only paused");
}

#[test]
fn a_device_reset_stops_everything_and_ends_the_session() {
    let mut rig = rig("reset");
    rig.bring_up();
    let flags = VERSION | FLAG_NEED_REPLY;
    rig.send_flags(Request::ResetDevice, flags, &[], &[]);
    rig.event(stopped(1, 1, 1));
    rig.event(stopped(0, 1, 1));
    assert_eq!(
        rig.cores.take(),
        [Asked::Reset(0), Asked::Reset(1), Asked::EndSession]
    );
    assert_eq!(rig.reply().unwrap().1, 0u64.as_bytes());
}

#[test]
fn the_in_flight_record_is_made_and_taken_and_goes_to_the_queues() {
    let mut rig = rig("inflight");
    rig.negotiate_features(FEATURES);
    let wanted = Inflight {
        num_queues: 3,
        queue_size: 256,
        ..Inflight::default()
    };
    rig.send(Request::GetInflightFd, wanted.as_bytes(), &[]);
    let (_, payload, fds) = rig.reply_with_fds().unwrap();
    let given = Inflight::read_from_bytes(&payload).unwrap();
    assert_eq!(given.mmap_size, 3 * queue_record_len(256, false) as u64);
    assert_eq!((given.num_queues, given.queue_size), (3, 256));
    rig.send(Request::GetInflightFd, &wanted.as_bytes()[..20], &[]);
    assert_eq!(rig.reply_with_fds().unwrap().1.len(), 20);

    let mut short = given;
    short.mmap_size -= 1;
    let fd = fds[0].as_fd();
    assert_eq!(rig.ack(Request::SetInflightFd, short.as_bytes(), &[fd]), 1);
    let mut long = given;
    long.mmap_size += 4096;
    assert_eq!(rig.ack(Request::SetInflightFd, long.as_bytes(), &[fd]), 1);
    assert_eq!(rig.ack(Request::SetInflightFd, given.as_bytes(), &[fd]), 0);
    rig.set_memory();
    rig.set_up_ring(1);
    rig.kick(1);
    rig.vring(Request::SetVringEnable, 1, 1);
    let start = &rig.cores.started[0];
    assert!(start.inflight.is_some());
    let call = start.call.as_ref().unwrap();
    assert_eq!(
        nix::unistd::read(&**call, &mut [0; 8]),
        Ok(8),
        "interrupted once"
    );
}

#[test]
fn a_paused_device_keeps_its_front_end_and_goes_on_where_it_was() {
    let mut rig = rig("pause");
    rig.bring_up();
    rig.device.pause(&mut rig.cores);
    rig.event(stopped(0, 2, 2));
    assert!(!rig.device.is_paused());
    rig.event(stopped(1, 3, 3));
    assert!(rig.device.is_paused() && rig.device.connected());
    rig.cores.take();
    assert_eq!(rig.get_u64(Request::GetQueueNum), 3);
    let reply = rig.get(
        Request::GetVringBase,
        VringState { index: 0, num: 0 }.as_bytes(),
    );
    assert_eq!(reply, VringState { index: 0, num: 2 }.as_bytes());
    rig.device.resume(&mut rig.cores);
    assert_eq!(rig.cores.take(), [Asked::Start(1)]);
    assert_eq!(rig.cores.started.last().unwrap().config.state.avail, 3);
}

#[test]
fn a_closed_device_hangs_up_waits_for_its_queues_and_removes_its_socket() {
    let mut rig = rig("close");
    rig.bring_up();
    rig.device.begin_close(&mut rig.cores);
    rig.assert_closed();
    assert!(!rig.device.is_quiet());
    rig.event(stopped(0, 0, 0));
    rig.event(stopped(1, 0, 0));
    assert!(rig.device.is_quiet());
    assert!(!rig.device.connected());
    let other = rig_of("close2", &spec());
    let socket = rig.socket.clone();
    assert!(socket.exists());
    rig.device = VhostUser::open(
        &spec(),
        DEVICE,
        &other.socket.with_extension("third"),
        Arc::clone(&rig.poller),
        &Keeper::default(),
    )
    .unwrap();
    assert!(!socket.exists());
}
