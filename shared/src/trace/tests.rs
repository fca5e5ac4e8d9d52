use super::*;

fn leaked(cores: usize) -> (&'static Traces, std::os::fd::OwnedFd) {
    let (traces, file) = Traces::create(cores).unwrap();
    (Box::leak(Box::new(traces)), file)
}

#[test]
fn records_are_read_through_the_file_and_the_oldest_are_lost() {
    let (traces, file) = leaked(2);
    let core = CoreTrace::new(traces.words(), 1).unwrap();
    assert!(CoreTrace::new(traces.words(), 2).is_none());
    let reading = Traces::open(&file).unwrap();
    assert_eq!(
        (reading.cores(), reading.records(1, 0)),
        (2, (Vec::new(), 0))
    );
    let more = 5;
    for number in 0..RECORDS as u64 + more {
        let record = Record {
            ns: number,
            device: 7,
            queue: 3,
            args: [number, 9],
            ..Record::default()
        };
        core.write(Point::FuseDone, &record);
    }
    let (records, next) = reading.records(1, 0);
    assert_eq!((records.len(), next), (RECORDS, RECORDS as u64 + more));
    let first = records[0];
    assert_eq!((first.ns, first.point), (more, Point::FuseDone as u8));
    assert_eq!((first.device, first.queue, first.args), (7, 3, [more, 9]));
    assert!(reading.records(1, next).0.is_empty());
    assert!(reading.records(0, 0).0.is_empty());
}

#[test]
fn points_are_turned_on_by_their_bits_and_unknown_bits_are_none() {
    let (traces, _) = leaked(1);
    let core = CoreTrace::new(traces.words(), 0).unwrap();
    assert!(!core.on(Point::Sleep));
    set_mask(traces.words(), u64::MAX);
    assert_eq!(mask(traces.words()), all_points());
    set_mask(traces.words(), group_mask(3));
    assert!(core.on(Point::Sleep) && core.on(Point::Wake) && !core.on(Point::FuseStart));
}

#[test]
fn every_point_has_a_name_in_its_group() {
    use Point::*;
    let points = [
        RequestTaken,
        RequestReturned,
        Interrupt,
        QueueStarted,
        QueueStopped,
        FuseStart,
        FuseDone,
        IoSubmit,
        IoDone,
        Offload,
        OffloadDone,
        Sleep,
        Wake,
    ];
    let named: usize = GROUPS.iter().map(|group| group.points.len()).sum();
    assert_eq!(named, points.len());
    assert!(
        points
            .iter()
            .all(|point| all_points() & (1 << *point as u8) != 0)
    );
}

#[test]
fn what_is_read_while_it_is_written_is_whole() {
    let (traces, file) = leaked(1);
    let core = CoreTrace::new(traces.words(), 0).unwrap();
    let writer = std::thread::spawn(move || {
        for number in 0..4 * RECORDS as u64 {
            let record = Record {
                ns: number,
                args: [number, !number],
                ..Record::default()
            };
            core.write(Point::Wake, &record);
        }
    });
    let reading = Traces::open(&file).unwrap();
    let mut next = 0;
    while next < 4 * RECORDS as u64 {
        let (records, after) = reading.records(0, next);
        for record in records {
            assert_eq!(record.args, [record.ns, !record.ns]);
            assert!(record.ns >= next, "record {} after {next}", record.ns);
        }
        next = after;
    }
    writer.join().unwrap();
}
