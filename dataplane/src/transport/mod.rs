//! How devices reach their drivers.

pub mod vfio_user;
