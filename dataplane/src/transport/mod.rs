//! How devices reach their drivers.
//!
//! A transport owns a device's socket, its model and what the peer has handed over; the cores own the queues that run. The
//! management thread calls a transport when its socket is ready or the cores have something to say, and nothing in here
//! waits: what takes time goes on when its event comes.

#[cfg(test)]
pub(crate) mod fake;
pub(crate) mod link;
pub(crate) mod log_gate;
pub(crate) mod requests;
pub mod running;
pub(crate) mod saver;
pub(crate) mod staged;
pub mod vfio_user;
pub mod vhost_user;

use std::path::Path;
use std::sync::Arc;

use ferry_shared::msg::{DeviceSpec, Failure};

use self::vfio_user::VfioUser;
use self::vhost_user::VhostUser;
use crate::engine::{CoreEvent, Cores, DeviceId, QueueIdx};
use crate::keeper::Keeper;
use crate::os::poller::Poller;
use crate::platform::EmulatedFunction;

/// A device's way to its driver.
#[derive(Debug)]
pub enum Transport {
    /// Behind a vhost-user socket.
    VhostUser(Box<VhostUser>),
    /// An emulated PCIe function behind a vfio-user socket.
    VfioUser(Box<VfioUser>),
}

impl Transport {
    /// Listens on a vhost-user socket.
    pub fn open_vhost_user(
        spec: &DeviceSpec,
        id: DeviceId,
        socket: &Path,
        poller: Arc<Poller>,
        keeper: &Keeper,
    ) -> Result<Transport, Failure> {
        let device = VhostUser::open(spec, id, socket, poller, keeper)?;
        Ok(Transport::VhostUser(Box::new(device)))
    }

    /// Makes a function of the platform, and listens on its vfio-user socket if it is offered to the host.
    pub fn open_vfio_user(
        spec: &DeviceSpec,
        id: DeviceId,
        place: &EmulatedFunction,
        socket: &Path,
        offered: bool,
        poller: Arc<Poller>,
        keeper: &Keeper,
    ) -> Result<Transport, Failure> {
        let device = VfioUser::open(spec, id, place, socket, offered, poller, keeper)?;
        Ok(Transport::VfioUser(Box::new(device)))
    }

    /// Goes on with what a former process has left of the device. To be called once the cores know the device.
    pub fn adopt(&mut self, cores: &mut dyn Cores) {
        match self {
            Transport::VhostUser(device) => device.adopt(cores),
            Transport::VfioUser(device) => device.adopt(cores),
        }
    }

    /// Drops the device, and what is kept of it for a later process.
    pub fn forget(self) {
        match self {
            Transport::VhostUser(device) => device.forget(),
            Transport::VfioUser(device) => device.forget(),
        }
    }

    /// Something is ready that the transport has added to the poller as `local`.
    pub fn ready(&mut self, local: u32, cores: &mut dyn Cores) {
        match self {
            Transport::VhostUser(device) => device.ready(local, cores),
            Transport::VfioUser(device) => device.ready(local, cores),
        }
    }

    /// Takes what the cores report about this device.
    pub fn core_event(&mut self, event: CoreEvent, cores: &mut dyn Cores) {
        match self {
            Transport::VhostUser(device) => device.core_event(event, cores),
            Transport::VfioUser(device) => device.core_event(event, cores),
        }
    }

    /// Stops all queues where they are; connection and session stay. [`is_paused`](Self::is_paused) tells when.
    pub fn pause(&mut self, cores: &mut dyn Cores) {
        match self {
            Transport::VhostUser(device) => device.pause(cores),
            Transport::VfioUser(device) => device.pause(cores),
        }
    }

    /// Lets the queues run on.
    pub fn resume(&mut self, cores: &mut dyn Cores) {
        match self {
            Transport::VhostUser(device) => device.resume(cores),
            Transport::VfioUser(device) => device.resume(cores),
        }
    }

    /// Stops a running queue where it stands and starts it again, for the cores to place it anew.
    pub fn start_again(&mut self, index: QueueIdx, cores: &mut dyn Cores) {
        match self {
            Transport::VhostUser(device) => device.start_again(index, cores),
            Transport::VfioUser(device) => device.start_again(index, cores),
        }
    }

    /// The PCIe configuration space that the driver sees, if there is one.
    pub fn pci_config(&self) -> Option<[u8; 256]> {
        match self {
            Transport::VhostUser(_) => None,
            Transport::VfioUser(device) => Some(device.pci_config()),
        }
    }

    /// Disconnects the peer for good. [`is_quiet`](Self::is_quiet) tells when the device can be dropped.
    pub fn begin_close(&mut self, cores: &mut dyn Cores) {
        match self {
            Transport::VhostUser(device) => device.begin_close(cores),
            Transport::VfioUser(device) => device.begin_close(cores),
        }
    }

    /// Whether no queue runs and none is stopping.
    pub fn is_quiet(&self) -> bool {
        match self {
            Transport::VhostUser(device) => device.is_quiet(),
            Transport::VfioUser(device) => device.is_quiet(),
        }
    }

    /// Whether a pause is complete.
    pub fn is_paused(&self) -> bool {
        match self {
            Transport::VhostUser(device) => device.is_paused(),
            Transport::VfioUser(device) => device.is_paused(),
        }
    }

    /// Whether a peer is connected.
    pub fn connected(&self) -> bool {
        match self {
            Transport::VhostUser(device) => device.connected(),
            Transport::VfioUser(device) => device.connected(),
        }
    }

    /// The function, for what only functions do.
    pub fn function(&mut self) -> Option<&mut VfioUser> {
        match self {
            Transport::VhostUser(_) => None,
            Transport::VfioUser(device) => Some(device),
        }
    }
}
