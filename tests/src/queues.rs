//! On which CPUs the queues of a service are served, as its RPCs show it.

use crate::Service;
use anyhow::{Context, Result, bail};
use ferry_shared::cpumask::CpuMask;
use std::fs;

/// A queue that runs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServedQueue {
    /// The number of its thread.
    pub thread: u64,
    /// The CPU that serves it.
    pub cpu: u32,
    /// The name of its thread.
    pub name: String,
}

/// Two CPUs that this process may use.
///
/// # Errors
/// When there is only one.
pub fn two_cpus() -> Result<[u32; 2]> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let list = line.context("no list of CPUs")?.trim();
    let mask: CpuMask = format!("[{list}]").parse().map_err(anyhow::Error::msg)?;
    match mask.cpus()[..] {
        [first, second, ..] => Ok([first, second]),
        _ => bail!("there are no two CPUs"),
    }
}

impl Service {
    /// The queues that run, in the order of their threads.
    ///
    /// # Errors
    /// When the service does not answer as it should.
    pub fn queues(&self) -> Result<Vec<ServedQueue>> {
        let answer = self.call("framework_get_reactors")?;
        let mut all = Vec::new();
        for reactor in answer["reactors"].as_array().context("no reactors")? {
            let cpu = u32::try_from(reactor["lcore"].as_u64().context("no lcore")?)?;
            for thread in reactor["lw_threads"].as_array().context("no threads")? {
                let name = thread["name"].as_str().context("a thread without a name")?;
                if !name.starts_with("core_") {
                    all.push(ServedQueue {
                        thread: thread["id"].as_u64().context("a thread without an id")?,
                        cpu,
                        name: name.to_owned(),
                    });
                }
            }
        }
        all.sort_unstable();
        Ok(all)
    }
}
