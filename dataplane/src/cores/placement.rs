//! Where queues are served: every queue that a device has ever started is a thread with a number and a set of CPUs, and
//! goes to the core among them that has the fewest queues.

use std::collections::HashMap;

use ferry_shared::counters::{CpuSet, QueuePlace};

use crate::id::{DeviceId, QueueIdx};

/// Names a queue of the service.
pub type QueueName = (DeviceId, QueueIdx);

struct Thread {
    number: u32,
    allowed: CpuSet,
}

/// The queues and their cores.
pub(super) struct Placement {
    /// The cores' CPUs.
    cpus: Vec<u32>,
    threads: HashMap<QueueName, Thread>,
    last: u32,
    /// Which core serves a running queue.
    placed: HashMap<QueueName, usize>,
    /// Queues per core.
    load: Vec<usize>,
}

impl Placement {
    /// No queues. The cores have the first numbers.
    pub(super) fn new(cpus: Vec<u32>) -> Placement {
        Placement {
            threads: HashMap::new(),
            last: u32::try_from(cpus.len()).unwrap_or(u32::MAX),
            placed: HashMap::new(),
            load: vec![0; cpus.len()],
            cpus,
        }
    }

    /// The core that serves a queue.
    pub(super) fn core_of(&self, queue: QueueName) -> Option<usize> {
        self.placed.get(&queue).copied()
    }

    /// The cores that serve queues of a device.
    pub(super) fn cores_of(&self, device: DeviceId) -> Vec<usize> {
        let of_device = self.placed.iter().filter(|((d, _), _)| *d == device);
        let mut cores: Vec<usize> = of_device.map(|(_, &core)| core).collect();
        cores.sort_unstable();
        cores.dedup();
        cores
    }

    /// The running queue of a number.
    pub(super) fn find(&self, number: u32) -> Option<QueueName> {
        let mut found = self
            .threads
            .iter()
            .filter(|(_, thread)| thread.number == number);
        let queue = found.next().map(|(queue, _)| *queue)?;
        self.placed.contains_key(&queue).then_some(queue)
    }

    /// Whether a queue may be served by a core.
    pub(super) fn allows(&self, queue: QueueName, core: usize) -> bool {
        let cpu = self.cpus.get(core).copied();
        let allowed = self.threads.get(&queue).map(|thread| thread.allowed);
        allowed.zip(cpu).is_some_and(|(set, cpu)| set.has(cpu))
    }

    /// Restricts a queue to CPUs, of which at least one must be a core's.
    pub(super) fn restrict(&mut self, queue: QueueName, allowed: CpuSet) {
        if let Some(thread) = self.threads.get_mut(&queue) {
            thread.allowed = allowed;
        }
    }

    /// Places a queue that starts on the core with the fewest queues, or on `wanted` if it may be there.
    pub(super) fn place(&mut self, queue: QueueName, wanted: Option<usize>) -> (usize, QueuePlace) {
        if !self.threads.contains_key(&queue) {
            self.last = self.last.wrapping_add(1);
            let thread = Thread {
                number: self.last,
                allowed: CpuSet::of(self.cpus.iter().copied()),
            };
            self.threads.insert(queue, thread);
        }
        let wanted = wanted.filter(|&core| self.allows(queue, core));
        let least = || {
            let cores = self.load.iter().enumerate();
            let may = cores.filter(|&(core, _)| self.allows(queue, core));
            may.min_by_key(|&(_, load)| load).map(|(core, _)| core)
        };
        let core = wanted.or_else(least).unwrap_or(0);
        if let Some(load) = self.load.get_mut(core) {
            *load = load.saturating_add(1);
        }
        self.placed.insert(queue, core);
        let thread = self.threads.get(&queue);
        let place = QueuePlace {
            thread: thread.map_or(0, |thread| thread.number),
            device: queue.0.0,
            index: queue.1.0,
            allowed: thread.map_or_else(CpuSet::default, |thread| thread.allowed),
        };
        (core, place)
    }

    /// A queue has stopped.
    pub(super) fn gone(&mut self, queue: QueueName) {
        if let Some(core) = self.placed.remove(&queue)
            && let Some(load) = self.load.get_mut(core)
        {
            *load = load.saturating_sub(1);
        }
    }

    /// A device has gone, and its queues with it.
    pub(super) fn forget(&mut self, device: DeviceId) {
        self.threads.retain(|(d, _), _| *d != device);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: DeviceId = DeviceId(1);

    fn queue(index: u16) -> QueueName {
        (DEVICE, QueueIdx(index))
    }

    #[test]
    fn queues_go_where_the_fewest_are_and_keep_their_numbers() {
        let mut all = Placement::new(vec![4, 6]);
        let first = all.place(queue(0), None);
        assert_eq!((first.0, first.1.thread), (0, 3));
        assert_eq!(all.place(queue(1), None).0, 1);
        assert_eq!(all.place(queue(2), Some(1)).0, 1);
        assert_eq!(all.find(4), Some(queue(1)));
        all.gone(queue(1));
        assert_eq!(all.find(4), None, "it does not run");
        assert_eq!(all.place(queue(1), None).1.thread, 4);
        assert_eq!(all.cores_of(DEVICE), [0, 1]);
        all.gone(queue(0));
        all.forget(DEVICE);
        assert_eq!(all.place(queue(0), None).1.thread, 6);
    }

    #[test]
    fn a_restricted_queue_goes_nowhere_else() {
        let mut all = Placement::new(vec![4, 6]);
        all.place(queue(0), None);
        all.restrict(queue(0), CpuSet::of([6]));
        all.gone(queue(0));
        let (core, place) = all.place(queue(0), Some(0));
        assert_eq!((core, place.allowed), (1, CpuSet::of([6])));
        assert!(all.allows(queue(0), 1) && !all.allows(queue(0), 0));
        assert!(!all.allows(queue(0), 2));
    }
}
