//! A virtio-fs driver in user space: attaches to a function behind a vfio-user or vhost-user socket and gives its
//! virtqueues to the caller.
//!
//! [`Device::connect`] finds out what is there, [`Device::start`] negotiates and hands out a [`Queue`] for each virtqueue,
//! [`Device::reset`] gives the function up. Requests live in a [`DmaMemory`] that the caller makes and divides up before it
//! starts; submitting and completing requests allocates nothing. The device is another process: what it writes is
//! checked, and a device that breaks the rules is an error of the caller's call, never a panic.
//!
//! Used by `ferry mount`, the benchmarks and the tests; it knows nothing about FUSE.

mod config;
mod error;
mod memory;
mod queue;
mod ring;
mod socket;
mod vfio_user;
mod vhost_user;
mod virtio_pci;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ferry_dataplane::os::eventfd::EventFd;

pub use config::DeviceConfig;
pub use error::{DriverError, Result};
pub use ferry_dataplane::virtio::spec::Features;
pub use memory::{DmaMemory, DmaSlice, Pages};
pub use queue::Queue;
pub use ring::{Completion, MAX_PIECES, RingError, SubmitError};

use ring::{Ring, RingFeatures};
use socket::Socket;
use vfio_user::VfioUser;
use vhost_user::VhostUser;
use virtio_pci::VirtioPci;

/// How long a device may take to answer a message.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for an answer before concluding that the peer does not speak the protocol it was asked in.
const ASK_PATIENCE: Duration = Duration::from_millis(500);
/// What this driver can do beside rings; nobody gets it who does not ask for it.
const OTHER_FEATURES: Features = Features::RING_RESET.union(Features::NOTIFICATION_DATA);
/// What this driver can do with a ring.
const RING_FEATURES: Features = Features::EVENT_IDX
    .union(Features::INDIRECT_DESC)
    .union(Features::RING_PACKED);

/// The protocols under which a function can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Protocol {
    /// A PCI function.
    VfioUser,
    /// A virtio device without a bus.
    VhostUser,
}

#[derive(Debug)]
enum Transport {
    Vhost(VhostUser),
    Pci(Box<VirtioPci>),
}

/// How to start a device.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Request queues, at most [`Device::max_request_queues`].
    pub request_queues: u16,
    /// Entries of each queue; the device may have fewer.
    pub queue_size: u16,
    /// Features that may be used, if the device offers them.
    pub features: Features,
    /// MSI-X vectors of a PCI function to use. Queues that share one share the counter of its interrupts, so that one
    /// thread must look after all of them. `None`: one for each queue, and no more queues than there are vectors.
    pub vectors: Option<u16>,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            request_queues: 1,
            queue_size: 256,
            features: RING_FEATURES,
            vectors: None,
        }
    }
}

/// The virtqueues of a device that runs.
#[derive(Debug)]
pub struct Queues {
    /// For FORGET, BATCH_FORGET and INTERRUPT.
    pub hiprio: Queue,
    /// For everything else.
    pub requests: Vec<Queue>,
}

/// A virtio-fs device that this driver is connected to.
#[derive(Debug)]
pub struct Device {
    transport: Transport,
    /// The device can reach it until it has been reset.
    memory: Option<Arc<DmaMemory>>,
    /// What the queues were started with.
    rings: RingSetup,
}

/// How queues are made.
#[derive(Clone, Debug, Default)]
struct RingSetup {
    size: u16,
    features: RingFeatures,
    /// Where each vector's interrupts arrive, when queues share them.
    shared: Vec<Arc<EventFd>>,
}

impl Device {
    /// Connects to the function at `path`; without a protocol, finds out which one its peer speaks.
    pub fn connect(path: &Path, protocol: Option<Protocol>) -> Result<Device> {
        let transport = match protocol.or_else(|| protocol_by_place(path)) {
            Some(Protocol::VfioUser) => Transport::vfio_user(path)?,
            Some(Protocol::VhostUser) => Transport::vhost_user(path)?,
            None => Transport::ask(path)?,
        };
        let device = Device {
            transport,
            memory: None,
            rings: RingSetup::default(),
        };
        if !device.features().contains(Features::VERSION_1) {
            return Err(DriverError::Unusable(
                "it is a legacy device, without VIRTIO_F_VERSION_1".into(),
            ));
        }
        if device.max_request_queues() == 0 {
            return Err(DriverError::Unusable(
                "it has fewer than two virtqueues".into(),
            ));
        }
        Ok(device)
    }

    /// The device's configuration.
    pub fn config(&self) -> &DeviceConfig {
        match &self.transport {
            Transport::Vhost(device) => device.config(),
            Transport::Pci(device) => device.config(),
        }
    }

    /// The features that it offers.
    pub fn features(&self) -> Features {
        match &self.transport {
            Transport::Vhost(device) => device.offered(),
            Transport::Pci(device) => device.offered(),
        }
    }

    /// The protocol that it speaks.
    pub fn protocol(&self) -> Protocol {
        match &self.transport {
            Transport::Vhost(_) => Protocol::VhostUser,
            Transport::Pci(_) => Protocol::VfioUser,
        }
    }

    /// Request queues that can be used, each with interrupts of its own.
    pub fn max_request_queues(&self) -> u16 {
        self.request_queues(false)
    }

    fn request_queues(&self, sharing: bool) -> u16 {
        let queues = match &self.transport {
            Transport::Vhost(device) => device.max_queues(),
            Transport::Pci(device) if sharing => device.num_queues(),
            Transport::Pci(device) => device.num_queues().min(device.num_vectors()),
        };
        let requests = queues
            .saturating_sub(1)
            .min(self.config().num_request_queues);
        u16::try_from(requests).unwrap_or(u16::MAX)
    }

    /// Entries that a queue can have.
    pub fn max_queue_size(&self) -> u16 {
        match &self.transport {
            Transport::Vhost(device) => device.max_queue_size(),
            Transport::Pci(device) => device.max_queue_size(),
        }
    }

    /// Bytes of memory that [`Device::start`] will take for the virtqueues.
    pub fn memory_needed(&self, setup: &Setup) -> usize {
        let (size, ring) = self.ring(setup);
        (usize::from(setup.request_queues) + 1) * Ring::memory_needed(size, ring.indirect)
    }

    /// Negotiates, makes the virtqueues in `memory`, and lets the device begin.
    pub fn start(&mut self, setup: &Setup, memory: &Arc<DmaMemory>) -> Result<Queues> {
        let max = self.request_queues(setup.vectors.is_some());
        if setup.request_queues == 0 || setup.request_queues > max {
            return Err(DriverError::TooMany {
                what: "request queues",
                has: u32::from(max),
                wanted: u32::from(setup.request_queues),
            });
        }
        let usable = self.features() & setup.features & (RING_FEATURES | OTHER_FEATURES);
        let features = usable | Features::VERSION_1 | (self.features() & Features::ACCESS_PLATFORM);
        match &mut self.transport {
            Transport::Vhost(device) => device.begin(features, memory)?,
            Transport::Pci(device) => device.begin(features, memory)?,
        }
        self.memory = Some(Arc::clone(memory));
        self.rings = self.ring_setup(setup)?;
        let hiprio = self.start_queue(0, memory)?;
        let mut requests = Vec::with_capacity(usize::from(setup.request_queues));
        for index in 1..=setup.request_queues {
            requests.push(self.start_queue(index, memory)?);
        }
        match &mut self.transport {
            Transport::Vhost(device) => device.run()?,
            Transport::Pci(device) => device.run()?,
        }
        Ok(Queues { hiprio, requests })
    }

    /// Resets the device: afterwards it no longer touches the memory, and requests in flight are lost.
    pub fn reset(&mut self) -> Result<()> {
        match &mut self.transport {
            Transport::Vhost(device) => device.reset()?,
            Transport::Pci(device) => device.stop()?,
        }
        self.memory = None;
        Ok(())
    }

    /// Resets one virtqueue, and starts it again with a fresh ring; what was in flight on it is lost. `RING_RESET` must
    /// have been negotiated.
    pub fn restart_queue(&mut self, queue: Queue) -> Result<Queue> {
        let index = queue.index();
        let memory = self.memory.clone().ok_or(DriverError::NoRoom)?;
        match &mut self.transport {
            Transport::Vhost(device) => device.reset_queue(index)?,
            Transport::Pci(device) => device.reset_queue(index)?,
        }
        drop(queue);
        let queue = self.start_queue(index, &memory)?;
        if let Transport::Vhost(device) = &self.transport {
            device.enable_queue(index)?;
        }
        Ok(queue)
    }

    /// Resets a PCI function as a whole, and finds out anew what is there. Queues of before are of no use any more.
    pub fn reset_function(self) -> Result<Device> {
        let Transport::Pci(function) = self.transport else {
            return Err(DriverError::Unusable("it is not a PCI function".into()));
        };
        Ok(Device {
            transport: Transport::Pci(Box::new(function.reset_function()?)),
            memory: None,
            rings: RingSetup::default(),
        })
    }

    /// Becomes readable when the device goes away; [`Device::is_gone`] then says whether it has.
    pub fn hangup_fd(&self) -> BorrowedFd<'_> {
        self.transport.socket().as_fd()
    }

    /// The process that listens for the device's connections, as far as the kernel tells.
    pub fn peer_pid(&self) -> Option<i32> {
        self.transport.socket().peer_pid()
    }

    /// Whether the device has closed the connection.
    pub fn is_gone(&self) -> bool {
        self.transport.socket().is_closed()
    }

    /// The size and the features of the rings that `setup` leads to.
    fn ring(&self, setup: &Setup) -> (u16, RingFeatures) {
        let most = setup.queue_size.min(self.max_queue_size()).max(2);
        let size = if most.is_power_of_two() {
            most
        } else {
            most.next_power_of_two() / 2
        };
        let usable = self.features() & setup.features;
        let features = RingFeatures {
            event_idx: usable.contains(Features::EVENT_IDX),
            indirect: usable.contains(Features::INDIRECT_DESC),
            packed: usable.contains(Features::RING_PACKED),
        };
        (size, features)
    }

    /// What queues are made with. A PCI function has so many vectors at most; others have none.
    fn ring_setup(&self, setup: &Setup) -> Result<RingSetup> {
        let (size, features) = self.ring(setup);
        let vectors = match &self.transport {
            Transport::Vhost(_) => 0,
            Transport::Pci(device) => device.num_vectors(),
        };
        let shared = setup.vectors.map_or(0, |n| vectors.min(n.into()));
        let call = |_| new_event().map(Arc::new);
        Ok(RingSetup {
            size,
            features,
            shared: (0..shared).map(call).collect::<Result<_>>()?,
        })
    }

    fn start_queue(&mut self, index: u16, memory: &Arc<DmaMemory>) -> Result<Queue> {
        let RingSetup {
            size,
            features,
            shared,
        } = &self.rings;
        let ring = Ring::new(Arc::clone(memory), *size, *features).ok_or(DriverError::NoRoom)?;
        let vector = match shared.len() {
            0 => usize::from(index),
            n => usize::from(index) % n,
        };
        let call = match shared.get(vector) {
            Some(call) => Arc::clone(call),
            None => Arc::new(new_event()?),
        };
        let kick = match &mut self.transport {
            Transport::Vhost(device) => device.start_queue(index, &ring, memory, &call)?,
            Transport::Pci(device) => {
                device.start_queue(index, &ring, memory, (vector as u16, &*call))?
            }
        };
        Ok(Queue::new(index, ring, kick, call))
    }
}

fn new_event() -> Result<EventFd> {
    EventFd::new().map_err(DriverError::io("make an event counter"))
}

impl Transport {
    fn vfio_user(path: &Path) -> Result<Transport> {
        let socket = Socket::connect(path, PATIENCE)?;
        let client = VfioUser::open(socket).map_err(turned_away)?;
        Ok(Transport::Pci(Box::new(VirtioPci::open(client)?)))
    }

    fn vhost_user(path: &Path) -> Result<Transport> {
        let socket = Socket::connect(path, PATIENCE)?;
        let features = VhostUser::ask(&socket).map_err(turned_away)?;
        Ok(Transport::Vhost(VhostUser::open(socket, features)?))
    }

    /// Asks in vhost-user, whose first message is shorter than any of vfio-user's: a vfio-user server waits for the rest of
    /// it, or closes. The other way round is not possible, as vhost-user devices may end when they read nonsense.
    fn ask(path: &Path) -> Result<Transport> {
        let socket = Socket::connect(path, ASK_PATIENCE)?;
        match VhostUser::ask(&socket) {
            Ok(features) => {
                socket.set_patience(PATIENCE)?;
                Ok(Transport::Vhost(VhostUser::open(socket, features)?))
            }
            Err(DriverError::Silent(_) | DriverError::Closed(_) | DriverError::Protocol { .. }) => {
                drop(socket);
                Transport::vfio_user(path)
            }
            Err(e) => Err(e),
        }
    }

    fn socket(&self) -> &Socket {
        match self {
            Transport::Vhost(device) => device.socket(),
            Transport::Pci(device) => device.socket(),
        }
    }
}

/// A connection that is closed at the first message was never wanted.
fn turned_away(error: DriverError) -> DriverError {
    match error {
        DriverError::Closed("VERSION" | "GET_FEATURES") => DriverError::TurnedAway,
        other => other,
    }
}

/// In the service's run directory the kind of a socket shows in its place.
fn protocol_by_place(path: &Path) -> Option<Protocol> {
    match path.parent()?.file_name()?.to_str()? {
        "pci" => Some(Protocol::VfioUser),
        "vhost" => Some(Protocol::VhostUser),
        _ => None,
    }
}
