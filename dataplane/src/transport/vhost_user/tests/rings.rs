//! Rings: where they start, stop and go on.

use super::*;

#[test]
fn a_position_is_told_once_the_ring_has_stopped_and_nothing_is_read_before() {
    let mut rig = rig("base");
    rig.bring_up();
    let state = VringState { index: 1, num: 0 };
    rig.send(Request::GetVringBase, state.as_bytes(), &[]);
    rig.send(Request::GetFeatures, &[], &[]);
    assert_eq!(rig.cores.take(), [Asked::Stop(1)]);
    assert!(rig.reply().is_none());
    rig.event(stopped(0, 9, 9));
    assert!(rig.reply().is_none(), "another ring");
    rig.event(stopped(1, 7, 7));
    let (request, payload) = rig.reply().unwrap();
    assert_eq!(request, Request::GetVringBase);
    let state = VringState { index: 1, num: 7 };
    assert_eq!(payload, state.as_bytes());
    assert_eq!(rig.reply().unwrap().0, Request::GetFeatures);
    // It takes a new kick to start again, at the position that the front end then gives.
    rig.vring(Request::SetVringBase, 1, 3);
    rig.vring(Request::SetVringEnable, 1, 1);
    rig.cores.take();
    rig.kick(1);
    assert_eq!(rig.cores.take(), [Asked::Start(1)]);
    assert_eq!(rig.cores.started.last().unwrap().config.state.avail, 3);
}

#[test]
fn a_ring_that_never_ran_tells_the_position_that_it_was_given() {
    let mut rig = rig("never");
    rig.negotiate_features(FEATURES);
    rig.vring(Request::SetVringBase, 2, 44);
    let reply = rig.get(
        Request::GetVringBase,
        VringState { index: 2, num: 0 }.as_bytes(),
    );
    assert_eq!(reply, VringState { index: 2, num: 44 }.as_bytes());
}

#[test]
fn a_split_ring_resumes_at_the_used_index_in_its_memory() {
    let mut rig = rig("used");
    rig.negotiate_features(FEATURES);
    rig.set_memory();
    rig.set_up_ring(0);
    rig.vring(Request::SetVringBase, 0, 12);
    let at = GUEST + 0x2000 + 2;
    nix::sys::uio::pwrite(&rig.memory, &11u16.to_le_bytes(), at as i64).unwrap();
    rig.vring(Request::SetVringEnable, 0, 1);
    rig.kick(0);
    let state = &rig.cores.started[0].config.state;
    assert_eq!((state.avail, state.used), (12, 11));
}

#[test]
fn a_packed_ring_has_both_positions_and_wrap_counters() {
    let mut packed = spec();
    packed.packed_vq = true;
    let mut rig = rig_of("packed", &packed);
    rig.negotiate_features(FEATURES | 1 << 34);
    rig.set_memory();
    rig.set_up_ring(0);
    rig.vring(Request::SetVringBase, 0, 0x8005_0003);
    rig.vring(Request::SetVringEnable, 0, 1);
    rig.kick(0);
    let config = &rig.cores.started[0].config;
    assert!(config.packed);
    assert_eq!((config.state.avail, config.state.used), (3, 0x8005));
    rig.send(
        Request::GetVringBase,
        VringState { index: 0, num: 0 }.as_bytes(),
        &[],
    );
    rig.event(stopped(0, 0x8009, 0x0008));
    let (_, payload) = rig.reply().unwrap();
    let state = VringState {
        index: 0,
        num: 0x0008_8009,
    };
    assert_eq!(payload, state.as_bytes());
}

#[test]
fn a_packed_ring_at_0_is_fresh_unless_its_first_descriptor_has_been_used() {
    let mut packed = spec();
    packed.packed_vq = true;
    let mut rig = rig_of("packed0", &packed);
    rig.negotiate_features(FEATURES | 1 << 34);
    rig.set_memory();
    // Untouched, made available in a fresh ring, used in the first round.
    for (index, flags, start) in [(0, 0u16, 0x8000), (1, 0x80, 0x8000), (2, 0x8080, 0)] {
        let at = GUEST + u64::from(index) * 0x1_0000 + 14;
        nix::sys::uio::pwrite(&rig.memory, &flags.to_le_bytes(), at as i64).unwrap();
        rig.set_up_ring(index);
        rig.vring(Request::SetVringEnable, index, 1);
        rig.kick(index);
        let state = &rig.cores.started.last().unwrap().config.state;
        assert_eq!((state.avail, state.used), (start, start), "{flags:#x}");
    }
}

#[test]
fn disabling_a_ring_is_acknowledged_once_it_has_stopped_and_enabling_goes_on_there() {
    let mut rig = rig("disable");
    rig.bring_up();
    let off = VringState { index: 0, num: 0 };
    let flags = VERSION | FLAG_NEED_REPLY;
    rig.send_flags(Request::SetVringEnable, flags, off.as_bytes(), &[]);
    assert_eq!(rig.cores.take(), [Asked::Stop(0)]);
    assert!(rig.reply().is_none());
    nix::sys::uio::pwrite(&rig.memory, &5u16.to_le_bytes(), (GUEST + 0x2002) as i64).unwrap();
    rig.event(stopped(0, 5, 5));
    assert_eq!(rig.reply().unwrap().0, Request::SetVringEnable);
    rig.vring(Request::SetVringEnable, 0, 1);
    assert_eq!(rig.cores.take(), [Asked::Start(0)]);
    assert_eq!(rig.cores.started.last().unwrap().config.state.avail, 5);
}
