//! Which interrupts a function sends, and how: by vectors with their masks, or by the pin.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;

use super::super::config;
use super::super::wire::IrqSet;
use super::PciFunction;
use crate::engine::{Cores, QueueIdx};
use crate::os::eventfd::EventFd;

/// ISR status: a queue has used buffers.
const ISR_QUEUE: u8 = 1;
/// ISR status: the device has something to say in its configuration or status.
const ISR_CONFIG: u8 = 2;

impl PciFunction {
    /// Properties and number of a kind of interrupt.
    pub(crate) fn irq_info(&self, index: u32) -> Option<(u32, u32)> {
        self.irqs.info(index)
    }

    /// Carries out a `SET_IRQS`.
    pub(crate) fn set_irqs(
        &mut self,
        set: &IrqSet,
        data: &[u8],
        fds: Vec<OwnedFd>,
        cores: &mut dyn Cores,
    ) -> Result<(), Errno> {
        self.irqs.set(set, data, fds)?;
        self.reroute(cores);
        Ok(())
    }

    /// Forgets where the client took interrupts.
    pub(crate) fn forget_irqs(&mut self, cores: &mut dyn Cores) {
        self.irqs.clear();
        self.reroute(cores);
    }

    /// Whether interrupts are MSI-X. A client that takes vectors has enabled it, even if it keeps the register to itself.
    fn uses_msix(&self) -> bool {
        self.config.msix_enabled() || self.irqs.any_vector()
    }

    /// Where a queue interrupts.
    pub(super) fn call(&self, index: QueueIdx) -> Option<Arc<EventFd>> {
        if !self.uses_msix() {
            return Some(Arc::clone(&self.pin));
        }
        let vector = self.registers.queue_vectors.get(usize::from(index.0))?;
        self.irqs.vector(*vector)
    }

    /// Vectors may have been masked or unmasked. A function that may not access memory sends no messages either.
    pub(super) fn update_masks(&mut self) {
        let all = self.config.msix_masked() || !self.config.may_master();
        let entry = config::MSIX_ENTRY as usize;
        let used = self.table_used;
        let table = &self.msix_table;
        self.irqs.mask_vectors(|n| {
            let control = n.checked_mul(entry).and_then(|at| table.get(at + 12));
            all || (used && control.is_some_and(|bits| bits & 1 != 0))
        });
    }

    /// How interrupts are delivered may have changed.
    pub(super) fn reroute(&mut self, cores: &mut dyn Cores) {
        for index in (0..self.model.num_queues()).map(QueueIdx) {
            let call = self.call(index);
            let Some(last) = self.calls.get_mut(usize::from(index.0)) else {
                continue;
            };
            let same = match (&*last, &call) {
                (None, None) => true,
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                _ => false,
            };
            if !same {
                last.clone_from(&call);
                self.queues.set_call(index, call, cores);
            }
        }
        self.update_pin();
    }

    /// A queue has signalled [`PciFunction::pin`].
    pub(crate) fn pin_fired(&mut self) {
        self.pin.drain();
        if !self.uses_msix() {
            self.registers.isr |= ISR_QUEUE;
            self.update_pin();
        }
    }

    pub(super) fn interrupt_config(&mut self) {
        if self.uses_msix() {
            if let Some(vector) = self.irqs.vector(self.registers.config_vector) {
                vector.signal();
            }
        } else {
            self.registers.isr |= ISR_CONFIG;
            self.update_pin();
        }
    }

    pub(super) fn update_pin(&mut self) {
        let pending = self.registers.isr != 0 && !self.uses_msix();
        self.config.set_interrupt_status(pending);
        if pending && !self.config.intx_disabled() && self.config.awake() {
            self.irqs.fire_pin();
        }
    }
}
