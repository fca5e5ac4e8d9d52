//! What can go wrong between the driver and a device.

use std::io;

use ferry_shared::errno::Errno;

use super::ring::RingError;

/// Why the driver gave up. The text says what was being done, so that it can be shown to an operator as it is.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// Nothing to connect to.
    #[error("no connection: {cause}; {hint}")]
    Connect {
        /// The system's reason.
        cause: io::Error,
        /// What to do about it.
        hint: &'static str,
    },
    /// A system call failed.
    #[error("cannot {doing}: {cause}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The system's reason.
        cause: io::Error,
    },
    /// The device closed the connection.
    #[error("the device closed the connection in answer to {0}")]
    Closed(&'static str),
    /// The device closed the connection before it had answered anything.
    #[error(
        "the device turned the connection away: is another driver attached to it, or is it stopped?"
    )]
    TurnedAway,
    /// The device did not answer in time.
    #[error(
        "the device did not answer {0} in time; is the service stopped, or the socket's peer of another kind?"
    )]
    Silent(&'static str),
    /// The device answered with an error.
    #[error("the device refuses {request}: {errno}")]
    Refused {
        /// The message that it refuses.
        request: &'static str,
        /// Its reason.
        errno: Errno,
    },
    /// The device answered with something that the protocol does not allow.
    #[error("the device broke the protocol in answer to {request}: {problem}")]
    Protocol {
        /// The message that it answered.
        request: &'static str,
        /// What is wrong with the answer.
        problem: &'static str,
    },
    /// The device is not one that this driver can drive.
    #[error("not a usable virtio-fs device: {0}")]
    Unusable(String),
    /// More was asked of the device than it has.
    #[error("the device has {has} {what}, not {wanted}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many it has.
        has: u32,
        /// How many were asked for.
        wanted: u32,
    },
    /// The shared memory is too small for the rings.
    #[error("the driver's memory has no room for the virtqueues")]
    NoRoom,
    /// The device broke the rules of a ring.
    #[error("virtqueue {queue}: {broken}")]
    Ring {
        /// Which virtqueue.
        queue: u16,
        /// Which rule.
        broken: RingError,
    },
}

impl DriverError {
    /// For `map_err`: the system call's failure while `doing` something.
    pub(super) fn io<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> DriverError {
        move |cause| DriverError::Io {
            doing,
            cause: cause.into(),
        }
    }
}

/// A result of the driver.
pub type Result<T> = std::result::Result<T, DriverError>;
