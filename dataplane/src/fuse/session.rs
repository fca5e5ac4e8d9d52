//! A FUSE session: from INIT to DESTROY.

/// The state of a device's FUSE session, shared by the cores.
#[derive(Debug, Default)]
pub struct Session {}
