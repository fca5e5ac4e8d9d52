//! A function as it is kept for a later process: everything that its client or its driver has set.

use serde::{Deserialize, Serialize};

use super::super::irq::InterruptsV1;
use super::{PciFunction, Registers};
use crate::engine::{Cores, QueueIdx};
use crate::keeper::Keeper;
use crate::mem::GuestMap;
use crate::os::eventfd::EventFd;
use crate::transport::requests::{Requests, RequestsV1};
use crate::virtio::device::DeviceModelV1;
use crate::virtio::spec::Status;

use std::sync::Arc;

/// A function that a client has set up.
#[derive(Serialize, Deserialize)]
pub(crate) struct FunctionV1 {
    model: DeviceModelV1,
    config: Vec<u8>,
    registers: Registers,
    msix_table: Vec<u8>,
    table_used: bool,
    irqs: InterruptsV1,
    /// Those that the client has.
    kicks: Vec<Option<u64>>,
    queue_resets: Vec<bool>,
    resetting: bool,
    requests: Option<RequestsV1>,
}

impl PciFunction {
    /// What a later process needs.
    pub(crate) fn saved(&self) -> FunctionV1 {
        let PciFunction {
            model,
            config,
            registers,
            msix_table,
            table_used,
            irqs,
            queues: _,
            kicks,
            calls: _,
            queue_resets,
            map: _,
            pin: _,
            resetting,
            requests,
            keeper: _,
        } = self;
        FunctionV1 {
            model: model.saved(),
            config: config.saved(),
            registers: registers.clone(),
            msix_table: msix_table.clone(),
            table_used: *table_used,
            irqs: irqs.saved(),
            kicks: kicks.iter().map(|kick| kick.number()).collect(),
            queue_resets: queue_resets.clone(),
            resetting: *resetting,
            requests: requests.as_ref().map(Requests::saved),
        }
    }

    /// Takes over what a client has set up with a former process; `false` if it does not fit this function, which can then
    /// not be used.
    pub(crate) fn restore(&mut self, saved: FunctionV1, keeper: &Keeper) -> bool {
        let count = self.kicks.len();
        let fits = saved.msix_table.len() == self.msix_table.len()
            && saved.kicks.len() == count
            && saved.queue_resets.len() == count
            && saved.registers.queue_vectors.len() == count;
        let queues = self.model.num_queues();
        // There is none before the first queue has started.
        let requests = saved.requests.map(|r| Requests::restore(r, queues, keeper));
        if !fits || matches!(requests, Some(None)) || !self.model.restore(&saved.model) {
            return false;
        }
        for (kick, number) in self.kicks.iter_mut().zip(saved.kicks) {
            match number.map(|number| EventFd::adopt(number, keeper.fds())) {
                None => {}
                Some(Ok(adopted)) => *kick = Arc::new(adopted),
                Some(Err(_)) => return false,
            }
        }
        self.requests = requests.flatten();
        self.registers = saved.registers;
        self.msix_table = saved.msix_table;
        self.table_used = saved.table_used;
        self.queue_resets = saved.queue_resets;
        self.resetting = saved.resetting;
        if !self.config.restore(&saved.config) || !self.irqs.restore(saved.irqs) {
            return false;
        }
        self.update_masks();
        true
    }

    /// Starts what ran in a former process, and ends what it had not ended.
    pub(crate) fn resume(&mut self, map: Arc<GuestMap>, cores: &mut dyn Cores) {
        self.map = Arc::clone(&map);
        // Nothing runs yet, so that this is done at once.
        self.queues.set_memory(map, cores);
        self.queues.hold(!self.config.may_master(), cores);
        if self.resetting {
            return self.reset_device(cores);
        }
        let running = self.model.status().contains(Status::DRIVER_OK);
        for index in (0..self.model.num_queues()).map(QueueIdx) {
            let resets = self.queue_resets.get(usize::from(index.0)).copied();
            let enabled = self.model.queue(index).is_some_and(|q| q.enabled);
            if resets == Some(true) {
                self.finish_queue_reset(index);
            } else if running && enabled {
                self.start_queue(index, true, cores);
            }
        }
        self.update_pin();
    }
}
