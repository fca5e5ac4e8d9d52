//! How devices reach their drivers.

#[cfg(test)]
pub(crate) mod fake;
pub mod running;
pub mod vfio_user;
pub mod vhost_user;
