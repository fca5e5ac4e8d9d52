//! How devices reach their drivers.

pub mod vfio_user;
pub mod vhost_user;
