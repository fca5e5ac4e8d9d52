//! The data plane is killed, handed over and stopped under a mount in use. [`pauses`], and [`guests`] with Linux guests: nobody
//! there sees more than a pause.
//! [`once`]: what the host's kernel holds stays valid, and what it asked for happens once.

mod guests;
mod once;
mod pauses;

use anyhow::Result;

/// How often a test disturbs the data plane: `FERRY_KILLS`, or the usual number of times.
fn times(usual: usize) -> Result<usize> {
    match std::env::var("FERRY_KILLS") {
        Ok(times) => Ok(times.parse()?),
        Err(_) => Ok(usual),
    }
}
