//! An emulated PCIe function with a client that says anything.

use ferry_dataplane::keeper::Keeper;
use ferry_dataplane::platform::EmulatedFunction;
use ferry_dataplane::transport::Transport;
use ferry_dataplane::transport::vfio_user::wire::{command, header_flags};
use ferry_shared::msg::Attach;

use crate::cores::DEVICE;
use crate::device::{World, spec};

fn function() -> World {
    let spec = spec(Attach::Doca {
        manager: "manager".into(),
        vuid: "vuid".into(),
    });
    let place = EmulatedFunction {
        vuid: "vuid".into(),
        pci_address: "0000:00:00.2".into(),
        port: None,
        num_msix: 3,
        subsystem_vendor: 0x1af4,
        subsystem: 0x105a,
    };
    World::new(|socket, poller| {
        let keeper = Keeper::default();
        Transport::open_vfio_user(&spec, DEVICE, &place, socket, true, poller, &keeper)
    })
}

fn message(number: u8, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::from(0u16.to_ne_bytes());
    bytes.extend_from_slice(&u16::from(number).to_ne_bytes());
    for word in [16 + payload.len() as u32, flags, 0] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// A session. The input is a row of commands. A byte below 128 is a command's number; after it come flags (bit 0: no
/// reply, bits 1 and 2: number of descriptors, bit 7: they are memory), the length of the payload, and the payload. Numbers
/// 64 and 65 make the device pause and go on. From 128 on the lowest three bits name a region that is written; after it
/// come a 16-bit offset, the length of the data, and the data.
pub fn commands(data: &[u8]) {
    let mut world = function();
    let mut rest = data;
    while let [number, a, b, more @ ..] = rest {
        let (payload, next) = if *number < 128 {
            more.split_at(more.len().min(usize::from(*b)))
        } else {
            let len = more.first().map_or(0, |n| usize::from(*n));
            let more = more.get(1..).unwrap_or_default();
            more.split_at(more.len().min(len))
        };
        rest = next;
        match *number {
            64 => world.device.pause(&mut world.cores),
            65 => world.device.resume(&mut world.cores),
            0..128 => {
                let flags = if a & 1 != 0 {
                    header_flags::NO_REPLY
                } else {
                    0
                };
                let bytes = message(*number, flags, payload);
                world.send(&bytes, a >> 1 & 3, a & 0x80 != 0);
            }
            _ => {
                let mut access = u64::from(u16::from_le_bytes([*a, *b]))
                    .to_ne_bytes()
                    .to_vec();
                access.extend_from_slice(&u32::from(number & 7).to_ne_bytes());
                access.extend_from_slice(&(payload.len() as u32).to_ne_bytes());
                access.extend_from_slice(payload);
                world.send(&message(command::REGION_WRITE as u8, 0, &access), 0, false);
            }
        }
        world.settle();
    }
    world.close();
}
