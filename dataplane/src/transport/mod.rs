//! How devices reach their drivers.

pub mod vhost_user;
