//! The running queues of one device, as its transport sees them: what should run, what does, and what it waits for.
//!
//! Both transports go through here, so that starting, stopping, pausing, resetting and changing guest memory have one
//! meaning. Nothing waits: calls ask the cores, and [`RunningQueues::event`] takes their answers.

use std::sync::Arc;

use crate::engine::{CoreEvent, Cores, DeviceId, QueueIdx, QueueKind, QueueStart};
use crate::mem::GuestMap;
use crate::os::eventfd::EventFd;
use crate::virtio::inflight::Inflight;
use crate::virtio::queue::{QueueConfig, QueueState};

/// What a queue is started with.
#[derive(Clone, Debug)]
pub struct QueueSetup {
    /// What travels on it.
    pub kind: QueueKind,
    /// Its rings, and where to begin.
    pub config: QueueConfig,
    /// Becomes readable when the driver notifies the queue.
    pub kick: Arc<EventFd>,
    /// Interrupts the driver.
    pub call: Option<Arc<EventFd>>,
    /// vhost-user's in-flight record of the queue.
    pub inflight: Option<Inflight>,
}

/// What has happened that the transport's own state machine may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A queue that the transport wanted stopped has stopped; [`RunningQueues::state`] says where.
    Stopped(QueueIdx),
    /// Guest memory has been replaced.
    MemoryReplaced,
    /// The reset is complete: nothing runs, the session has ended, all positions are forgotten.
    ResetDone,
    /// A queue has failed.
    Failed(QueueIdx),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Run {
    #[default]
    Stopped,
    Running,
    Stopping,
}

#[derive(Debug, Default)]
struct Slot {
    run: Run,
    /// What the driver wants to run; it is started as soon as the queue is stopped and the device not paused.
    wanted: Option<QueueSetup>,
    /// Where it stood when it last stopped.
    state: QueueState,
}

/// The queues of one device.
#[derive(Debug)]
pub struct RunningQueues {
    device: DeviceId,
    map: Arc<GuestMap>,
    slots: Vec<Slot>,
    paused: bool,
    /// The device may not access memory now.
    held: bool,
    resetting: bool,
    /// `set_memory` calls that the cores have not answered.
    maps_pending: u32,
}

impl RunningQueues {
    /// `count` queues, none of which runs, and no guest memory.
    pub fn new(device: DeviceId, count: u16) -> RunningQueues {
        RunningQueues {
            device,
            map: Arc::default(),
            slots: (0..count).map(|_| Slot::default()).collect(),
            paused: false,
            held: false,
            resetting: false,
            maps_pending: 0,
        }
    }

    /// The same for a device that may not access memory until [`hold`](Self::hold) says so.
    pub fn held(device: DeviceId, count: u16) -> RunningQueues {
        RunningQueues {
            held: true,
            ..RunningQueues::new(device, count)
        }
    }

    /// The guest's memory.
    pub fn map(&self) -> &Arc<GuestMap> {
        &self.map
    }

    /// Where a queue stood when it last stopped.
    pub fn state(&self, index: QueueIdx) -> QueueState {
        self.slot(index)
            .map(|s| s.state.clone())
            .unwrap_or_default()
    }

    /// Whether the driver wants a queue to run.
    pub fn wanted(&self, index: QueueIdx) -> bool {
        self.slot(index).is_some_and(|s| s.wanted.is_some())
    }

    fn slot(&self, index: QueueIdx) -> Option<&Slot> {
        self.slots.get(usize::from(index.0))
    }

    /// Runs a queue with this setup. One that runs already goes on with it from where it stands.
    pub fn start(&mut self, index: QueueIdx, setup: QueueSetup, cores: &mut dyn Cores) {
        let device = self.device;
        let Some(slot) = self.slots.get_mut(usize::from(index.0)) else {
            return;
        };
        slot.wanted = Some(setup);
        match slot.run {
            Run::Stopped => self.launch(index, cores),
            Run::Running => {
                slot.run = Run::Stopping;
                cores.stop_queue(device, index);
            }
            Run::Stopping => {}
        }
    }

    /// Starts a stopped queue that is wanted, unless something speaks against it.
    fn launch(&mut self, index: QueueIdx, cores: &mut dyn Cores) {
        let Some(slot) = self.slots.get_mut(usize::from(index.0)) else {
            return;
        };
        let Some(setup) = slot.wanted.clone() else {
            return;
        };
        if self.paused || self.held || self.resetting || slot.run != Run::Stopped {
            return;
        }
        slot.run = Run::Running;
        // A kick that an earlier run has consumed, or an earlier process lost, must not be missed.
        setup.kick.signal();
        cores.start_queue(QueueStart {
            device: self.device,
            index,
            kind: setup.kind,
            config: setup.config,
            map: Arc::clone(&self.map),
            kick: setup.kick,
            call: setup.call,
            inflight: setup.inflight,
        });
    }

    /// Stops a queue for good. True if it does not run; otherwise [`Notice::Stopped`] follows.
    pub fn stop(&mut self, index: QueueIdx, cores: &mut dyn Cores) -> bool {
        let device = self.device;
        let Some(slot) = self.slots.get_mut(usize::from(index.0)) else {
            return true;
        };
        if let Some(setup) = slot.wanted.take()
            && slot.run == Run::Stopped
        {
            // Wanted but never launched, because the device is paused.
            slot.state = setup.config.state;
        }
        if slot.run == Run::Running {
            slot.run = Run::Stopping;
            cores.stop_queue(device, index);
        }
        slot.run == Run::Stopped
    }

    /// Changes where a queue's interrupts go.
    pub fn set_call(&mut self, index: QueueIdx, call: Option<Arc<EventFd>>, cores: &mut dyn Cores) {
        let Some(slot) = self.slots.get_mut(usize::from(index.0)) else {
            return;
        };
        if let Some(setup) = &mut slot.wanted {
            setup.call.clone_from(&call);
        }
        if slot.run == Run::Running {
            cores.set_call(self.device, index, call);
        }
    }

    /// Replaces guest memory. True if that is done; otherwise [`Notice::MemoryReplaced`] follows, and until then the old
    /// memory is in use.
    pub fn set_memory(&mut self, map: Arc<GuestMap>, cores: &mut dyn Cores) -> bool {
        self.map = Arc::clone(&map);
        if self.slots.iter().all(|s| s.run == Run::Stopped) {
            return true;
        }
        self.maps_pending += 1;
        cores.set_memory(self.device, map);
        false
    }

    /// Stops all queues, drops what waits, ends the session, and forgets all positions and the guest's memory. True if that
    /// is done; otherwise [`Notice::ResetDone`] follows.
    pub fn reset(&mut self, cores: &mut dyn Cores) -> bool {
        self.resetting = true;
        for (slot, index) in self.slots.iter_mut().zip(0..) {
            slot.wanted = None;
            // One that stops already may wait for a request; now it drops that.
            if slot.run != Run::Stopped {
                slot.run = Run::Stopping;
                cores.reset_queue(self.device, QueueIdx(index));
            }
        }
        self.try_finish_reset(cores)
    }

    fn try_finish_reset(&mut self, cores: &mut dyn Cores) -> bool {
        if !self.resetting || !self.idle() {
            return false;
        }
        let RunningQueues {
            device,
            map,
            slots,
            paused: _,
            held: _,
            resetting,
            maps_pending: _,
        } = self;
        cores.end_session(*device);
        *map = Arc::default();
        slots.fill_with(Slot::default);
        *resetting = false;
        true
    }

    /// Nothing runs and nothing is awaited.
    fn idle(&self) -> bool {
        self.maps_pending == 0 && self.slots.iter().all(|s| s.run == Run::Stopped)
    }

    /// Stops a running queue where it stands and starts it again, for the cores to place it anew.
    pub fn start_again(&mut self, index: QueueIdx, cores: &mut dyn Cores) {
        let device = self.device;
        let slot = self.slots.get_mut(usize::from(index.0));
        if let Some(slot) = slot.filter(|slot| slot.run == Run::Running) {
            slot.run = Run::Stopping;
            cores.stop_queue(device, index);
        }
    }

    /// Stops all queues where they are; what the driver wants is remembered. [`is_paused`](Self::is_paused) tells when.
    pub fn pause(&mut self, cores: &mut dyn Cores) {
        self.paused = true;
        self.stop_all(cores);
    }

    fn stop_all(&mut self, cores: &mut dyn Cores) {
        for (slot, index) in self.slots.iter_mut().zip(0..) {
            if slot.run == Run::Running {
                slot.run = Run::Stopping;
                cores.stop_queue(self.device, QueueIdx(index));
            }
        }
    }

    /// Takes back a pause.
    pub fn resume(&mut self, cores: &mut dyn Cores) {
        self.paused = false;
        self.launch_all(cores);
    }

    /// Says whether the device must keep off memory: all queues then stop where they are until it may access it again.
    pub fn hold(&mut self, held: bool, cores: &mut dyn Cores) {
        if self.held == held {
            return;
        }
        self.held = held;
        if held {
            self.stop_all(cores);
        } else {
            self.launch_all(cores);
        }
    }

    fn launch_all(&mut self, cores: &mut dyn Cores) {
        for index in 0..self.slots.len() as u16 {
            self.launch(QueueIdx(index), cores);
        }
    }

    /// Whether a pause was asked for and is complete.
    pub fn is_paused(&self) -> bool {
        self.paused && self.is_quiet()
    }

    /// Whether nothing runs and no reset is under way.
    pub fn is_quiet(&self) -> bool {
        !self.resetting && self.idle()
    }

    /// Takes what the cores report about this device.
    pub fn event(&mut self, event: CoreEvent, cores: &mut dyn Cores) -> Option<Notice> {
        match event {
            CoreEvent::QueueStopped { index, state, .. } => self.stopped(index, state, cores),
            CoreEvent::MemoryReplaced { .. } => {
                self.maps_pending = self.maps_pending.saturating_sub(1);
                if self.resetting {
                    return self.try_finish_reset(cores).then_some(Notice::ResetDone);
                }
                (self.maps_pending == 0).then_some(Notice::MemoryReplaced)
            }
            CoreEvent::QueueFailed { index, .. } => {
                (!self.resetting).then_some(Notice::Failed(index))
            }
            CoreEvent::Mounted { .. } => None,
        }
    }

    fn stopped(
        &mut self,
        index: QueueIdx,
        state: QueueState,
        cores: &mut dyn Cores,
    ) -> Option<Notice> {
        let slot = self.slots.get_mut(usize::from(index.0))?;
        slot.run = Run::Stopped;
        slot.state = state;
        if self.resetting {
            return self.try_finish_reset(cores).then_some(Notice::ResetDone);
        }
        let Some(setup) = &mut slot.wanted else {
            return Some(Notice::Stopped(index));
        };
        setup.config.state = slot.state.clone();
        self.launch(index, cores);
        None
    }
}

#[cfg(test)]
mod tests;
