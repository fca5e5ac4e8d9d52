//! Where a function's interrupts go: the event descriptors that the client has set.
//!
//! Owns the descriptors, the masks of the vectors and the state of the pin. It must never decide which queue uses which
//! vector: that is [`super::pci::PciFunction`], which calls it; `SET_IRQS` messages come from [`super::conn`].

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::wire::{IrqSet, irq, irq_flags, irq_set_flags};
use crate::os::eventfd::EventFd;
use crate::os::fdstore::FdStore;

/// What a `SET_IRQS` has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changed {
    /// MSI-X vectors go elsewhere.
    pub(crate) vectors: bool,
    /// The pin goes elsewhere, or may fire again.
    pub(crate) pin: bool,
}

/// The event descriptors as they are kept.
#[derive(Serialize, Deserialize)]
pub(crate) struct InterruptsV1 {
    /// Descriptor, and whether the client has masked the vector.
    vectors: Vec<(Option<u64>, bool)>,
    pin: Option<u64>,
    pin_masked: bool,
    errors: Option<u64>,
    release: Option<u64>,
}

/// An MSI-X vector.
#[derive(Clone, Debug, Default)]
struct Vector {
    event: Option<Arc<EventFd>>,
    /// By a message of the client.
    client_masks: bool,
    /// By the function's registers.
    function_masks: bool,
}

impl Vector {
    /// Has the event follow the masks.
    fn apply(&self) {
        let Some(event) = &self.event else {
            return;
        };
        if self.client_masks || self.function_masks {
            event.mask();
        } else {
            event.unmask();
        }
    }

    fn is_pending(&self) -> bool {
        self.event.as_ref().is_some_and(|e| e.is_pending())
    }

    /// Goes to another event, or to none; an interrupt that waits goes along.
    fn assign(&mut self, event: Option<Arc<EventFd>>) {
        let pending = self.is_pending();
        self.event = event;
        self.apply();
        if let Some(event) = self.event.as_ref().filter(|_| pending) {
            event.signal();
        }
    }
}

/// The event descriptors of one client.
#[derive(Debug)]
pub(crate) struct Interrupts {
    /// Where they are kept for a later process.
    fds: Arc<FdStore>,
    vectors: Vec<Vector>,
    pin: Option<EventFd>,
    /// The pin has fired and waits for the client's unmask, or the client has masked it.
    pin_masked: bool,
    /// Errors: the client sets it, nothing here fires it.
    errors: Option<EventFd>,
    /// Asks the client to let go of the device.
    release: Option<EventFd>,
}

impl Interrupts {
    pub(crate) fn new(vectors: u16, fds: &Arc<FdStore>) -> Interrupts {
        Interrupts {
            fds: Arc::clone(fds),
            vectors: vec![Vector::default(); vectors.into()],
            pin: None,
            pin_masked: false,
            errors: None,
            release: None,
        }
    }

    /// What a later process needs.
    pub(crate) fn saved(&self) -> InterruptsV1 {
        let Interrupts {
            fds: _,
            vectors,
            pin,
            pin_masked,
            errors,
            release,
        } = self;
        let number = |event: &Option<EventFd>| event.as_ref().and_then(EventFd::number);
        // An interrupt that waits is not lost: every queue interrupts once when a later process starts it.
        let vector = |v: &Vector| {
            let number = v.event.as_ref().and_then(|e| e.number());
            (number, v.client_masks)
        };
        InterruptsV1 {
            vectors: vectors.iter().map(vector).collect(),
            pin: number(pin),
            pin_masked: *pin_masked,
            errors: number(errors),
            release: number(release),
        }
    }

    /// Takes over what a client has set with a former process; `false` if that cannot be had any more.
    pub(crate) fn restore(&mut self, saved: InterruptsV1) -> bool {
        let InterruptsV1 {
            vectors,
            pin,
            pin_masked,
            errors,
            release,
        } = saved;
        let fds = Arc::clone(&self.fds);
        let adopt = |number: Option<u64>| number.map(|n| EventFd::adopt(n, &fds)).transpose();
        if vectors.len() != self.vectors.len() {
            return false;
        }
        for (to, (number, masked)) in self.vectors.iter_mut().zip(vectors) {
            let Ok(event) = adopt(number) else {
                return false;
            };
            to.client_masks = masked;
            to.assign(event.map(Arc::new));
        }
        let (Ok(pin), Ok(errors), Ok(release)) = (adopt(pin), adopt(errors), adopt(release)) else {
            return false;
        };
        (self.pin, self.errors, self.release) = (pin, errors, release);
        self.pin_masked = pin_masked;
        true
    }

    /// Forgets every descriptor; the client is gone.
    pub(crate) fn clear(&mut self) {
        let Interrupts {
            fds: _,
            vectors,
            pin,
            pin_masked,
            errors,
            release,
        } = self;
        vectors.fill(Vector::default());
        *pin = None;
        *pin_masked = false;
        *errors = None;
        *release = None;
    }

    /// Properties and number of a kind of interrupt.
    pub(crate) fn info(&self, index: u32) -> Option<(u32, u32)> {
        let flags = match index {
            irq::INTX => irq_flags::EVENTFD | irq_flags::MASKABLE | irq_flags::AUTOMASKED,
            irq::MSI => irq_flags::EVENTFD | irq_flags::NORESIZE,
            // Vectors can be added one by one, so MSI-X is not NORESIZE.
            irq::MSIX => irq_flags::EVENTFD | irq_flags::MASKABLE,
            irq::ERR | irq::REQ => irq_flags::EVENTFD,
            _ => return None,
        };
        Some((flags, self.count(index)))
    }

    fn count(&self, index: u32) -> u32 {
        match index {
            irq::INTX | irq::ERR | irq::REQ => 1,
            irq::MSIX => u32::try_from(self.vectors.len()).unwrap_or(0),
            _ => 0,
        }
    }

    /// Whether the client takes interrupts on any vector.
    pub(crate) fn any_vector(&self) -> bool {
        self.vectors.iter().any(|v| v.event.is_some())
    }

    /// Where a vector goes.
    pub(crate) fn vector(&self, vector: u16) -> Option<Arc<EventFd>> {
        self.vectors.get(usize::from(vector))?.event.clone()
    }

    /// Masks each vector that `masked` says, and no other.
    pub(crate) fn mask_vectors(&mut self, masked: impl Fn(usize) -> bool) {
        for (n, vector) in self.vectors.iter_mut().enumerate() {
            vector.function_masks = masked(n);
            vector.apply();
        }
    }

    /// The pending bits, as they are behind the table: a vector that has an interrupt to deliver and is masked.
    pub(crate) fn pending(&self) -> [u8; 8] {
        let set = self.vectors.iter().enumerate().filter(|v| v.1.is_pending());
        let bits = set.fold(0u64, |bits, (n, _)| {
            bits | 1u64.checked_shl(n as u32).unwrap_or(0)
        });
        bits.to_le_bytes()
    }

    /// Fires the pin, once until the client unmasks it.
    pub(crate) fn fire_pin(&mut self) {
        if let Some(pin) = self.pin.as_ref().filter(|_| !self.pin_masked) {
            pin.signal();
            self.pin_masked = true;
        }
    }

    /// Asks the client to let go of the device, if it takes such requests.
    pub(crate) fn ask_release(&self) {
        self.release.iter().for_each(EventFd::signal);
    }

    /// Carries out a `SET_IRQS`. `data` is what followed the structure.
    pub(crate) fn set(
        &mut self,
        set: &IrqSet,
        data: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<Changed, Errno> {
        use irq_set_flags::*;
        let (start, count) = (set.start, set.count);
        if set.index >= irq::COUNT || set.flags & !(DATA_MASK | ACTION_KIND) != 0 {
            return Err(Errno::EINVAL);
        }
        let kind = set.flags & DATA_MASK;
        let action = set.flags & ACTION_KIND;
        if count == 0 {
            // All interrupts of the kind go.
            if kind != DATA_NONE || action != ACTION_TRIGGER || start != 0 {
                return Err(Errno::EINVAL);
            }
            return self.assign(set.index, 0, self.count(set.index), Vec::new());
        }
        let end = start.checked_add(count).ok_or(Errno::EINVAL)?;
        if end > self.count(set.index) {
            return Err(Errno::EINVAL);
        }
        if kind == DATA_EVENTFD {
            // Events when an interrupt is masked or unmasked are not offered: the client must send messages.
            if action != ACTION_TRIGGER || !(fds.is_empty() || fds.len() == count as usize) {
                return Err(Errno::EINVAL);
            }
            return self.assign(set.index, start, count, fds);
        }
        let chosen: Vec<u32> = match kind {
            DATA_NONE => (start..end).collect(),
            DATA_BOOL => {
                let data = data.get(..count as usize).ok_or(Errno::EINVAL)?;
                (start..end)
                    .zip(data)
                    .filter(|c| *c.1 != 0)
                    .map(|c| c.0)
                    .collect()
            }
            _ => return Err(Errno::EINVAL),
        };
        self.act(set.index, action, &chosen)
    }

    /// Sets where a range goes; no descriptors: nowhere.
    fn assign(
        &mut self,
        index: u32,
        start: u32,
        count: u32,
        fds: Vec<OwnedFd>,
    ) -> Result<Changed, Errno> {
        let new = fds
            .into_iter()
            .map(EventFd::from_peer)
            .collect::<Result<Vec<_>, _>>()?;
        new.iter().for_each(|event| event.keep(&self.fds));
        let mut new = new.into_iter();
        let mut changed = Changed::default();
        match index {
            irq::INTX => {
                self.pin = new.next();
                self.pin_masked = false;
                changed.pin = true;
            }
            irq::MSIX => {
                let range = self
                    .vectors
                    .iter_mut()
                    .skip(start as usize)
                    .take(count as usize);
                for vector in range {
                    vector.assign(new.next().map(Arc::new));
                }
                changed.vectors = true;
            }
            irq::ERR => self.errors = new.next(),
            irq::REQ => self.release = new.next(),
            _ => {}
        }
        Ok(changed)
    }

    /// Fires, masks or unmasks the chosen interrupts of a kind.
    fn act(&mut self, index: u32, action: u32, chosen: &[u32]) -> Result<Changed, Errno> {
        use irq_set_flags::{ACTION_MASK, ACTION_TRIGGER, ACTION_UNMASK};
        let mut changed = Changed::default();
        match (index, action) {
            (irq::INTX, ACTION_MASK) => self.pin_masked |= !chosen.is_empty(),
            (irq::INTX, ACTION_UNMASK) => {
                self.pin_masked &= chosen.is_empty();
                changed.pin = true;
            }
            (irq::MSIX, ACTION_MASK | ACTION_UNMASK) => {
                for &n in chosen {
                    if let Some(vector) = self.vectors.get_mut(n as usize) {
                        vector.client_masks = action == ACTION_MASK;
                        vector.apply();
                    }
                }
            }
            (_, ACTION_TRIGGER) => {
                for &n in chosen {
                    match index {
                        irq::MSIX => self
                            .vectors
                            .get(n as usize)
                            .and_then(|v| v.event.as_ref())
                            .into_iter()
                            .for_each(|event| event.signal()),
                        irq::INTX => self.fire_pin(),
                        irq::ERR => self.errors.iter().for_each(EventFd::signal),
                        _ => self.release.iter().for_each(EventFd::signal),
                    }
                }
            }
            _ => return Err(Errno::EINVAL),
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests;
