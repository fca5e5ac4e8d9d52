//! vhost-user's record of requests in flight.

/// The part of the in-flight region that belongs to one queue.
#[derive(Debug)]
pub struct InflightQueue {}
