//! A vhost-user device with a front end that says anything.

use ferry_dataplane::keeper::Keeper;
use ferry_dataplane::transport::Transport;
use ferry_dataplane::transport::vhost_user::wire::Request;
use ferry_shared::msg::Attach;

use crate::cores::DEVICE;
use crate::device::{World, spec};

/// A session. The input is a row of messages: number, flags, number of descriptors and whether they are memory (bit 7),
/// length of the payload, payload. A number above the known ones makes the device pause or go on.
pub fn messages(data: &[u8]) {
    let mut world = World::new(|socket, poller| {
        let keeper = Keeper::default();
        Transport::open_vhost_user(&spec(Attach::VhostUser), DEVICE, socket, poller, &keeper)
    });
    let mut rest = data;
    while let [number, flags, fds, len, more @ ..] = rest {
        let (payload, next) = more.split_at(more.len().min(usize::from(*len)));
        rest = next;
        match Request::from_raw(u32::from(*number)) {
            None if number % 4 == 3 => world.device.pause(&mut world.cores),
            None if number % 4 == 2 => world.device.resume(&mut world.cores),
            _ => {
                let header = [u32::from(*number), u32::from(*flags), payload.len() as u32];
                let mut bytes: Vec<u8> = header.iter().flat_map(|n| n.to_ne_bytes()).collect();
                bytes.extend_from_slice(payload);
                world.send(&bytes, fds & 3, fds & 0x80 != 0);
            }
        }
        world.settle();
    }
    world.close();
}
