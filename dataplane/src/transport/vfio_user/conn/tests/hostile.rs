use super::*;

const IDS: [u8; 4] = [0xf4, 0x1a, 0x5a, 0x10];

/// After whatever the last client did, a new one is served.
fn still_serves(rig: &mut Rig) {
    rig.client = connect(&rig.device);
    rig.pump();
    rig.hello();
    assert_eq!(rig.read::<4>(region::CONFIG, 0), IDS);
}

/// The same client is still served.
fn still_answers(rig: &mut Rig) -> Result<(), TestCaseError> {
    let access = RegionAccess {
        offset: 0,
        region: region::CONFIG,
        count: 4,
    };
    rig.send(command::REGION_READ, access.as_bytes(), &[], 0);
    let mut last = None;
    while let Some(reply) = rig.reply() {
        last = Some(reply);
    }
    let (payload, _) = last.expect("an answer").1.expect("a good one");
    prop_assert_eq!(&payload[16..], &IDS);
    Ok(())
}

#[test]
fn a_client_must_say_hello_first_and_once() {
    let mut rig = Rig::silent(3);
    rig.send(command::DEVICE_RESET, &[], &[], 0);
    assert!(rig.closed());
    still_serves(&mut rig);
    let again = Version { major: 0, minor: 0 };
    let got = rig.call_with(command::VERSION, again.as_bytes(), &[]);
    assert_eq!(got.unwrap_err(), 22);
    let mut rig = Rig::silent(3);
    let other = Version { major: 1, minor: 0 };
    rig.send(command::VERSION, other.as_bytes(), &[], 0);
    assert!(rig.closed());
    still_serves(&mut rig);
}

#[test]
fn a_malformed_stream_closes_only_that_connection() {
    let mut rig = Rig::new(3);
    rig.client.send(&[0xff; 64], &[]).unwrap();
    rig.pump();
    assert!(rig.closed());
    still_serves(&mut rig);
}

#[test]
fn short_payloads_and_unknown_commands_get_an_error() {
    let mut rig = Rig::new(3);
    for command in (2..=20).filter(|c| *c != command::DEVICE_RESET) {
        let got = rig.call_with(command, &[0; 3], &[]);
        assert!(got.is_err(), "command {command}");
    }
    // Room for the reply must be offered.
    let ask = DeviceInfo::default();
    let got = rig.call::<DeviceInfo>(command::DEVICE_GET_INFO, &ask);
    assert_eq!(got, Err(22));
}

#[test]
fn accesses_outside_a_region_get_an_error() {
    let mut rig = Rig::new(3);
    let cases = [
        (region::CONFIG, 4096, 1),
        (region::CONFIG, u64::MAX, 1),
        (region::CONFIG, u64::MAX, u32::MAX),
        (region::BAR0, 0x3fff, 2),
        (region::BAR0 + 1, 0, 1),
        (region::ROM, 0, 4),
        (region::VGA, 0, 4),
        (u32::MAX, 0, 4),
        (region::CONFIG, 0, MAX_DATA_XFER + 1),
    ];
    for (region, offset, count) in cases {
        let access = RegionAccess {
            offset,
            region,
            count,
        };
        let payload = [access.as_bytes(), &[0; 8]].concat();
        for command in [command::REGION_READ, command::REGION_WRITE] {
            let got = rig.call_with(command, &payload, &[]);
            assert_eq!(got.unwrap_err(), 22, "{access:?}");
        }
    }
    // Fewer bytes than the write announces.
    let short = RegionAccess {
        offset: 0,
        region: region::CONFIG,
        count: 4,
    };
    let payload = [short.as_bytes(), &[0; 3]].concat();
    let got = rig.call_with(command::REGION_WRITE, &payload, &[]);
    assert_eq!(got.unwrap_err(), 22);
}

#[test]
fn several_writes_in_one_message_are_all_done() {
    let mut rig = Rig::new(3);
    let status = |value| MultiWrite {
        offset: u64::from(COMMON_OFFSET) + STATUS,
        region: region::BAR0,
        count: 1,
        data: [value, 0, 0, 0, 0, 0, 0, 0],
    };
    let message = |count: u64, writes: &[MultiWrite]| {
        [MultiCount { count }.as_bytes(), writes.as_bytes()].concat()
    };
    let multi = command::REGION_WRITE_MULTI;
    let payload = message(2, &[status(1), status(3)]);
    let (reply, _) = rig.call_with(multi, &payload, &[]).unwrap();
    assert_eq!(reply, 2u64.to_ne_bytes());
    assert_eq!(rig.status(), 3);
    let long = MultiWrite {
        count: 9,
        ..status(0)
    };
    let wrong = [
        message(u64::MAX, &[]),
        message(2, &[status(1)]),
        message(1, &[long]),
    ];
    for payload in wrong {
        assert_eq!(rig.call_with(multi, &payload, &[]).unwrap_err(), 22);
    }
}

#[test]
fn posted_writes_are_done_without_an_answer() {
    let mut rig = Rig::new(3);
    let access = RegionAccess {
        offset: u64::from(COMMON_OFFSET) + STATUS,
        region: region::BAR0,
        count: 1,
    };
    let payload = [access.as_bytes(), &[1]].concat();
    rig.send(command::REGION_WRITE, &payload, &[], header_flags::NO_REPLY);
    assert!(rig.reply().is_none());
    assert_eq!(rig.status(), 1);
}

#[test]
fn a_client_that_does_not_read_holds_up_only_itself() {
    let mut rig = Rig::new(3);
    let access = RegionAccess {
        offset: 0,
        region: region::CONFIG,
        count: 4096,
    };
    // Until neither side's buffers take any more.
    let mut sent = 0u16;
    loop {
        let header = Header {
            id: sent,
            command: command::REGION_READ,
            size: 32,
            flags: 0,
            error: 0,
        };
        let message = [header.as_bytes(), access.as_bytes()].concat();
        if rig.client.send(&message, &[]).is_err() {
            break;
        }
        sent += 1;
        rig.pump();
    }
    assert!(!rig.device.client.as_ref().unwrap().may_ask());
    for id in 0..sent {
        let (answered, got) = rig.reply().unwrap();
        assert_eq!(answered, id);
        assert_eq!(got.unwrap().0.len(), 16 + 4096);
        rig.pump();
    }
    assert!(rig.reply().is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_command_of_any_content_stops_the_service(
        commands in proptest::collection::vec(
            (0u16..20, proptest::collection::vec(any::<u8>(), 0..80), any::<bool>()),
            1..12,
        ),
    ) {
        let mut rig = Rig::new(3);
        for (command, payload, quiet) in commands {
            let flags = if quiet { header_flags::NO_REPLY } else { 0 };
            rig.send(command, &payload, &[], flags);
            while rig.reply().is_some() {}
        }
        still_answers(&mut rig)?;
    }

    #[test]
    fn registers_take_accesses_of_any_shape(
        writes in proptest::collection::vec(
            (
                prop_oneof![Just(region::BAR0), Just(region::BAR2), Just(region::CONFIG)],
                prop_oneof![0u64..0x50, 0xf00u64..0x1010, 0x2000u64..0x2040, 0x2ff0u64..0x3020],
                proptest::collection::vec(any::<u8>(), 1..64),
            ),
            1..60,
        ),
        finish in any::<bool>(),
    ) {
        let mut rig = Rig::new(3);
        rig.open_window(0, 0x1000);
        while rig.reply().is_some() {}
        for (region, offset, data) in writes {
            let access = RegionAccess { offset, region, count: data.len() as u32 };
            let payload = [access.as_bytes(), &data[..]].concat();
            rig.send(command::REGION_WRITE, &payload, &[], 0);
            rig.send(command::REGION_READ, access.as_bytes(), &[], 0);
            while rig.reply().is_some() {}
            if finish {
                rig.all_stopped();
            }
        }
        still_answers(&mut rig)?;
    }
}
