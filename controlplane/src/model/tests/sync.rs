//! What a data plane reports, and what one that starts anew lacks.

use super::*;

fn snapshot(name: &str, paused: bool) -> DeviceSnapshot {
    let spec = DeviceSpec {
        name: name.to_owned(),
        attach: Attach::Doca {
            manager: "mlx5_0".to_owned(),
            vuid: VUIDS[0].to_owned(),
        },
        tag: "docatag".to_owned(),
        num_request_queues: 8,
        queue_size: 256,
        fsdev: "aio0".to_owned(),
        packed_vq: false,
        notification_vq: false,
        driver_platform: Architecture::X86_64,
    };
    DeviceSnapshot {
        spec,
        paused,
        connected: true,
        mounted: true,
    }
}

#[test]
fn what_the_data_plane_has_is_taken_over_with_all_that_it_implies() {
    let mut items = platform();
    items.push(Item::Fsdev(aio("aio0")));
    items.push(Item::Device(snapshot("vfsdev0", true)));
    let mut model = Model::default();
    let adopted = model.adopt(items);
    assert_eq!(adopted.objects, ["fsdev aio0", "device vfsdev0"]);
    assert!(adopted.missing.is_empty());
    let device = model.device("vfsdev0").unwrap();
    assert_eq!(
        (
            device.state(),
            device.num_request_queues,
            device.platform_name()
        ),
        (DeviceState::Stopped, 8, "x86_64")
    );
    assert!(device.live.as_ref().unwrap().mounted);
    assert!(model.transport("DOCA").unwrap().started);
    assert!(model.manager("mlx5_0").is_ok());
    let step = model.device_start("vfsdev0").unwrap();
    done(&mut model, step);
    assert_eq!(
        model.device("vfsdev0").unwrap().state(),
        DeviceState::Running
    );
}

#[test]
fn what_a_restarted_data_plane_lacks_is_listed_fsdevs_first() {
    let mut model = running();
    let adopted = model.adopt(platform());
    let commands: Vec<Command> = adopted
        .missing
        .iter()
        .map(|ticket| ticket.command.clone())
        .collect();
    assert!(
        matches!(&commands[..], [Command::FsdevCreate(fsdev), Command::DeviceStart(device)]
        if fsdev.name == "aio0" && device.name == "vfsdev0")
    );
    for ticket in adopted.missing {
        model.finish_missing(ticket, true);
    }
    assert_eq!(model, running());
}

#[test]
fn an_fsdev_that_cannot_be_made_again_stays_wanted_and_can_be_deleted() {
    let mut model = started();
    for ticket in model.adopt(platform()).missing {
        model.finish_missing(ticket, false);
    }
    assert_eq!(model.adopt(platform()).missing.len(), 1, "not tried again");
    assert_eq!(model.fsdev_delete("aio0", "aio"), Ok(Step::Done));
    assert!(model.adopt(platform()).missing.is_empty());
}

#[test]
fn a_stopped_device_that_a_restarted_data_plane_lacks_is_idle() {
    let mut model = stopped();
    let missing = model.adopt(platform()).missing;
    assert_eq!(missing.len(), 1, "only the fsdev");
    assert_eq!(model.device("vfsdev0").unwrap().state(), DeviceState::Idle);
    assert_eq!(model.device_destroy("vfsdev0"), Ok(Step::Done));
}

#[test]
fn reports_of_the_data_plane_change_what_is_shown() {
    let mut model = running();
    model.event(Event::Connected {
        device: "vfsdev0".to_owned(),
        connected: true,
    });
    model.event(Event::Mounted {
        device: "vfsdev0".to_owned(),
        mounted: true,
    });
    model.event(Event::Mounted {
        device: "unknown".to_owned(),
        mounted: true,
    });
    let live = model.device("vfsdev0").unwrap().live.clone().unwrap();
    assert!(live.connected && live.mounted);
}
