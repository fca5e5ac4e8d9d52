//! How devices reach their drivers.
//!
//! A transport owns a device's socket, its model and what the peer has handed over; the cores own the queues that run. The
//! management thread calls a transport when its socket is ready or the cores have something to say, and nothing in here
//! waits: what takes time goes on when its event comes.

#[cfg(test)]
pub(crate) mod fake;
pub mod running;
pub mod vfio_user;
pub mod vhost_user;

use std::path::Path;
use std::sync::Arc;

use ferry_shared::msg::{DeviceSpec, Failure};

use crate::engine::{CoreEvent, Cores, DeviceId};
use crate::os::poller::Poller;
use crate::platform::StaticFunction;
use vfio_user::VfioUserDevice;
use vhost_user::VhostUser;

/// A device's way to its driver.
#[derive(Debug)]
pub enum Transport {
    /// A PCIe function behind a vfio-user socket.
    VfioUser {
        /// The device.
        device: Box<VfioUserDevice>,
        /// Where its descriptors are waited for.
        poller: Arc<Poller>,
    },
    /// A device behind a vhost-user socket.
    VhostUser(Box<VhostUser>),
}

impl Transport {
    /// Puts the device on a function.
    pub fn on_function(
        spec: &DeviceSpec,
        id: DeviceId,
        function: &StaticFunction,
        run_dir: &Path,
        poller: Arc<Poller>,
    ) -> Result<Transport, Failure> {
        let device = Box::new(VfioUserDevice::open(id, spec, function, run_dir, &poller)?);
        Ok(Transport::VfioUser { device, poller })
    }

    /// Puts the device behind a vhost-user socket.
    pub fn vhost_user(
        spec: &DeviceSpec,
        id: DeviceId,
        socket: &Path,
        poller: Arc<Poller>,
    ) -> Result<Transport, Failure> {
        let device = VhostUser::open(spec, id, socket, poller)?;
        Ok(Transport::VhostUser(Box::new(device)))
    }

    /// One of its descriptors is ready; `local` is the number that it chose for it.
    pub fn ready(&mut self, local: u32, cores: &mut dyn Cores) {
        match self {
            Transport::VfioUser { device, poller } => device.ready(local, poller, cores),
            Transport::VhostUser(device) => device.ready(local, cores),
        }
    }

    /// The cores have reported something about it.
    pub fn core_event(&mut self, event: CoreEvent, cores: &mut dyn Cores) {
        match self {
            Transport::VfioUser { device, poller } => device.core_event(event, poller, cores),
            Transport::VhostUser(device) => device.core_event(event, cores),
        }
    }

    /// Stops its queues where they stand; connection and session are kept.
    pub fn pause(&mut self, cores: &mut dyn Cores) {
        match self {
            Transport::VfioUser { device, .. } => device.pause(cores),
            Transport::VhostUser(device) => device.pause(cores),
        }
    }

    /// Lets its queues run on.
    pub fn resume(&mut self, cores: &mut dyn Cores) {
        match self {
            Transport::VfioUser { device, .. } => device.resume(cores),
            Transport::VhostUser(device) => device.resume(cores),
        }
    }

    /// Hangs up and takes the socket away; when [`Transport::is_quiet`], it can be dropped.
    pub fn begin_close(&mut self, cores: &mut dyn Cores) {
        match self {
            Transport::VfioUser { device, poller } => device.close(poller, cores),
            Transport::VhostUser(device) => device.begin_close(cores),
        }
    }

    /// Whether no core works for it.
    pub fn is_quiet(&self) -> bool {
        match self {
            Transport::VfioUser { device, .. } => device.is_quiet(),
            Transport::VhostUser(device) => device.is_quiet(),
        }
    }

    /// Whether a VMM or driver is connected.
    pub fn connected(&self) -> bool {
        match self {
            Transport::VfioUser { device, .. } => device.connected(),
            Transport::VhostUser(device) => device.connected(),
        }
    }
}
