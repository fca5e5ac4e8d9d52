//! The VMM that functions are plugged into: telling it to take a function and to let go of one.
//!
//! Owns the talk with the VMM's control socket, and that alone: whether the guest's driver has taken the function, or the
//! VMM has really left it, is what the data plane sees on the function. Every step ends in bounded time; the VMM is
//! believed nothing but its words, and a message of any length or form is survived.

mod cloud_hypervisor;
mod qmp;

use core::time::Duration;

use ferry_shared::errno::Errno;
use ferry_shared::msg::Failure;
use ferry_shared::msg::Function;
use ferry_shared::msg::HostLink;
use serde_json::json;
use tokio::time::timeout;

use qmp::Qmp;

/// How long a VMM may take to answer one command.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Bytes of one message of a VMM.
const MESSAGE_LIMIT: usize = 1 << 20;

/// Why a VMM has not done what it was told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// Its socket cannot be used.
    #[error(
        "cannot talk to the VMM at {socket}: {error}; check that it runs, and that this process's user may connect"
    )]
    Socket {
        /// The socket.
        socket: String,
        /// The answer of the operating system.
        error: std::io::Error,
    },
    /// It does not answer.
    #[error("the VMM at {socket} has not answered for {} s", ANSWER_LIMIT.as_secs())]
    Silent {
        /// The socket.
        socket: String,
    },
    /// It speaks another protocol.
    #[error("the VMM at {socket} does not answer as its protocol demands: {what}")]
    Protocol {
        /// The socket.
        socket: String,
        /// What it said, or did not say.
        what: String,
    },
    /// It refuses.
    #[error("the VMM at {socket} refuses: {reason}")]
    Refused {
        /// The socket.
        socket: String,
        /// In its words.
        reason: String,
    },
    /// It does not have the function.
    #[error("the VMM at {socket} has no device {id}")]
    Unknown {
        /// The socket.
        socket: String,
        /// The name that the function would have there.
        id: String,
    },
    /// The guest does not want to let go.
    #[error(
        "the guest of the VMM at {socket} refuses to let go of device {id}; unmount it in the guest and try again"
    )]
    GuestRefused {
        /// The socket.
        socket: String,
        /// The function's name there.
        id: String,
    },
    /// No place is left for the function.
    #[error(
        "the host link names {buses} buses, and the function is on hot-plug port {port}; add a bus for it to the platform file"
    )]
    NoBus {
        /// How many are named.
        buses: usize,
        /// The port, counted from 1.
        port: u32,
    },
}

impl LinkError {
    fn errno(&self) -> Errno {
        match self {
            LinkError::Socket { error, .. } => {
                Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO.raw()))
            }
            LinkError::Silent { .. } => Errno::ETIMEDOUT,
            LinkError::Protocol { .. } => Errno::EPROTO,
            LinkError::Refused { .. } => Errno::EIO,
            LinkError::Unknown { .. } => Errno::ENODEV,
            LinkError::GuestRefused { .. } => Errno::EBUSY,
            LinkError::NoBus { .. } => Errno::ENOSPC,
        }
    }
}

impl From<LinkError> for Failure {
    fn from(error: LinkError) -> Failure {
        Failure::new(error.errno(), error.to_string())
    }
}

/// What a function is called in its VMM.
fn device_id(function: &Function) -> String {
    format!("ferry-{}", function.vuid)
}

async fn bounded<T>(
    socket: &str,
    step: impl Future<Output = Result<T, LinkError>>,
) -> Result<T, LinkError> {
    let socket = || socket.to_owned();
    timeout(ANSWER_LIMIT, step)
        .await
        .unwrap_or_else(|_| Err(LinkError::Silent { socket: socket() }))
}

/// Has the VMM attach to a function. It has done so when this returns.
pub(crate) async fn add(link: &HostLink, function: &Function) -> Result<(), LinkError> {
    let id = device_id(function);
    match link {
        HostLink::Qmp { socket, buses } => {
            let port = function.port.unwrap_or(0);
            let bus = usize::try_from(port).ok().and_then(|port| buses.get(port));
            let bus = bus.ok_or(LinkError::NoBus {
                buses: buses.len(),
                port: port.saturating_add(1),
            })?;
            let device = json!({
                "driver": "vfio-user-pci",
                "id": id,
                "bus": bus,
                "socket": {"type": "unix", "path": function.socket},
            });
            let step = async {
                let mut qmp = Qmp::connect(socket).await?;
                qmp.execute("device_add", &device).await
            };
            bounded(socket, step).await.map(drop)
        }
        HostLink::CloudHypervisor { socket } => {
            let device = json!({"id": id, "socket": function.socket});
            let step = cloud_hypervisor::put(socket, "vm.add-user-device", &device);
            bounded(socket, step).await
        }
    }
}

/// Has the VMM let go of a function. With `wait` it has done so when this returns, which takes as long as the guest wants;
/// otherwise it was told.
pub(crate) async fn remove(
    link: &HostLink,
    function: &Function,
    wait: bool,
) -> Result<(), LinkError> {
    let id = device_id(function);
    match link {
        HostLink::Qmp { socket, .. } => {
            let step = async {
                let mut qmp = Qmp::connect(socket).await?;
                qmp.delete(&id).await?;
                Ok(qmp)
            };
            let qmp = bounded(socket, step).await?;
            if wait {
                qmp.deleted(&id).await?;
            }
            Ok(())
        }
        HostLink::CloudHypervisor { socket } => {
            let device = json!({"id": id});
            let step = cloud_hypervisor::put(socket, "vm.remove-device", &device);
            bounded(socket, step).await
        }
    }
}

#[cfg(test)]
mod tests;
