//! Front ends that say what cannot be right, or anything at all.

use super::*;

#[test]
fn messages_that_cannot_be_right_close_their_connection_only() {
    let good = EventFd::new().unwrap();
    let fd = good.as_fd();
    let vring = |index, num| VringState { index, num }.as_bytes().to_vec();
    let cases: Vec<(Request, Vec<u8>, usize)> = vec![
        (Request::SetFeatures, vec![0; 7], 0),
        (Request::SetFeatures, vec![0; 9], 0),
        (Request::SetFeatures, u64::MAX.as_bytes().to_vec(), 0),
        (
            Request::SetProtocolFeatures,
            u64::MAX.as_bytes().to_vec(),
            0,
        ),
        (Request::SetMemTable, vec![], 0),
        (Request::SetMemTable, vec![9, 0, 0, 0, 0, 0, 0, 0], 0),
        (Request::SetMemTable, vec![1, 0, 0, 0, 0, 0, 0, 0], 1),
        (Request::SetMemTable, vec![0xff; 8], 0),
        (
            Request::SetMemTable,
            [&[1, 0, 0, 0, 0, 0, 0, 0][..], &[0; 32]].concat(),
            1,
        ),
        (Request::SetVringNum, vring(3, 64), 0),
        (Request::SetVringNum, vring(u32::MAX, 64), 0),
        (Request::SetVringNum, vring(0, 65), 0),
        (Request::SetVringNum, vring(0, 0), 0),
        (Request::SetVringNum, vring(0, 2048), 0),
        (Request::SetVringBase, vring(0, 0x1_0000), 0),
        (Request::GetVringBase, vring(255, 0), 0),
        (Request::SetVringEnable, vec![], 0),
        (Request::SetVringKick, 0u64.as_bytes().to_vec(), 0),
        (Request::SetVringKick, 0u64.as_bytes().to_vec(), 2),
        (Request::SetVringKick, 0x100u64.as_bytes().to_vec(), 1),
        (Request::SetVringCall, 9u64.as_bytes().to_vec(), 1),
        (Request::SetVringAddr, vec![0; 39], 0),
        (Request::SetLogBase, vec![0; 16], 1),
        (Request::SetStatus, 256u64.as_bytes().to_vec(), 0),
        (Request::GetInflightFd, vec![0xff; 20], 0),
        (Request::SetInflightFd, vec![0xff; 24], 1),
        (Request::IotlbMsg, vec![0; 8], 0),
    ];
    let mut rig = rig("wrong");
    for (request, payload, fds) in cases {
        rig.negotiate_features(FEATURES);
        rig.send(request, &payload, &vec![fd; fds]);
        assert!(!rig.device.connected(), "{request:?} {payload:x?}");
        rig.reconnect();
    }
}

#[test]
fn a_front_end_that_asks_hears_of_a_refusal_and_stays() {
    let mut rig = rig("refuse");
    rig.negotiate_features(FEATURES);
    assert_eq!(
        rig.ack(Request::SetFeatures, (1u64 << 41).as_bytes(), &[]),
        1
    );
    // A ring is to start without having been set up.
    rig.vring(Request::SetVringEnable, 0, 1);
    let kick = EventFd::new().unwrap();
    assert_eq!(
        rig.ack(Request::SetVringKick, 0u64.as_bytes(), &[kick.as_fd()]),
        1
    );
    // Its addresses are in no region.
    rig.set_memory();
    rig.set_up_ring(0);
    let mut addr = rig.addr(0);
    addr.used = 0x100;
    assert_eq!(rig.ack(Request::SetVringAddr, addr.as_bytes(), &[]), 0);
    assert_eq!(
        rig.ack(Request::SetVringKick, 0u64.as_bytes(), &[kick.as_fd()]),
        1
    );
    assert_eq!(rig.cores.take(), []);
    assert!(rig.device.connected());
}

#[test]
fn an_event_is_an_eventfd_or_a_pipe_but_no_file() {
    let mut rig = rig("event");
    rig.negotiate_features(FEATURES);
    let (pipe, _end) = nix::unistd::pipe().unwrap();
    let device = OwnedFd::from(std::fs::File::open("/dev/zero").unwrap());
    let memory = rig.memory.try_clone().unwrap();
    for (fd, refused) in [(pipe, 0), (device, 1), (memory, 1)] {
        for request in [
            Request::SetVringKick,
            Request::SetVringCall,
            Request::SetVringErr,
        ] {
            assert_eq!(rig.ack(request, 0u64.as_bytes(), &[fd.as_fd()]), refused);
        }
    }
}

#[test]
fn messages_need_their_protocol_feature() {
    let mut rig = rig("gate");
    rig.send(Request::GetQueueNum, &[], &[]);
    rig.assert_closed();
}
