//! One emulated PCIe function: a complete modern virtio-pci device (virtio 1.3, section 4.1) around the device model.
//!
//! Owns the configuration space, the registers of both BARs, and which vector interrupts for what. It must never wait, and
//! any access of any length at any offset has an answer: what is not there reads as zeros and takes no writes.
//! [`super::conn`], which calls it, is the way to the client.

mod interrupts;
mod saved;

use std::sync::Arc;

use ferry_shared::msg::DeviceSpec;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

pub(crate) use saved::FunctionV1;

use super::common::{self, Common, Field};
use super::config::{self, ConfigSpace, Identity};
use super::irq::Interrupts;
use super::wire::region;
use crate::engine::Cores;
use crate::id::{CoreEvent, DeviceId, QueueIdx};
use crate::keeper::Keeper;
use crate::mem::{GuestMap, Iova};
use crate::os::eventfd::EventFd;
use crate::platform::EmulatedFunction;
use crate::transport::requests::Requests;
use crate::transport::running::{Notice, QueueSetup, RunningQueues};
use crate::virtio::device::{DeviceModel, QueueSettings, StatusEffect};
use crate::virtio::inflight::Inflight;
use crate::virtio::queue::QueueState;
use crate::virtio::spec::{Features, FsConfig, Status};

/// In a register that names a vector: none.
const NO_VECTOR: u16 = 0xffff;

/// The regions that are BARs of this function.
const VIRTIO_REGION: u32 = config::VIRTIO_BAR as u32;
const MSIX_REGION: u32 = config::MSIX_BAR as u32;

/// Features of the transport. The device's addresses are those of the bus, which an IOMMU may translate: the client opens
/// its windows at those addresses.
const FEATURES: Features = Features::RING_RESET
    .union(Features::ACCESS_PLATFORM)
    .union(Features::NOTIFICATION_DATA)
    .union(Features::NOTIF_CONFIG_DATA);

/// Bytes of the device's configuration structure.
const DEVICE_LEN: usize = size_of::<FsConfig>();

/// What the driver writes that is no part of the device model.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Registers {
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    isr: u8,
}

impl Registers {
    fn new(queues: usize) -> Registers {
        Registers {
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; queues],
            isr: 0,
        }
    }
}

/// A PCIe function.
#[derive(Debug)]
pub(crate) struct PciFunction {
    model: DeviceModel,
    config: ConfigSpace,
    registers: Registers,
    msix_table: Vec<u8>,
    /// The client has the driver's accesses to the table come here, so that its mask bits count. Others keep the table to
    /// themselves, and the one here stays as it is after a reset: all masked.
    table_used: bool,
    irqs: Interrupts,
    queues: RunningQueues,
    /// What kicks each queue.
    kicks: Vec<Arc<EventFd>>,
    /// Where each queue was last told to interrupt.
    calls: Vec<Option<Arc<EventFd>>>,
    /// The driver has reset the queue, and it has not stopped yet.
    queue_resets: Vec<bool>,
    /// The guest's memory. It stays through a reset of the device.
    map: Arc<GuestMap>,
    /// Where queues interrupt while the pin is in use; its owner calls [`PciFunction::pin_fired`].
    pin: Arc<EventFd>,
    /// A reset is under way: the driver's writes are ignored until the queues are stopped.
    resetting: bool,
    /// The record of requests in flight.
    requests: Option<Requests>,
    keeper: Keeper,
}

/// Copies the part of `data`, which begins at `at`, that overlaps `piece`, which begins at `start`; says whether there is one.
fn overlay(data: &mut [u8], at: usize, start: usize, piece: &[u8]) -> bool {
    let skip = at.saturating_sub(start);
    let from = start.saturating_sub(at);
    let (Some(piece), Some(data)) = (piece.get(skip..), data.get_mut(from..)) else {
        return false;
    };
    let n = piece.len().min(data.len());
    if let (Some(to), Some(from)) = (data.get_mut(..n), piece.get(..n)) {
        to.copy_from_slice(from);
    }
    n > 0
}

/// A table in which every vector is masked.
fn fresh_table(vectors: u16) -> Vec<u8> {
    let mut entry = [0; config::MSIX_ENTRY as usize];
    entry[12] = 1;
    entry.repeat(vectors.into())
}

impl PciFunction {
    /// The function as it is after power-on.
    pub(crate) fn new(
        id: DeviceId,
        spec: &DeviceSpec,
        place: &EmulatedFunction,
        keeper: &Keeper,
    ) -> Result<PciFunction, Errno> {
        let size = u16::try_from(spec.queue_size).unwrap_or(u16::MAX);
        let model = DeviceModel::new(spec, FEATURES, size);
        let count = model.num_queues();
        let vectors = place.num_msix.min(count.saturating_add(1));
        let identity = Identity {
            subsystem_vendor: place.subsystem_vendor,
            subsystem: place.subsystem,
            vectors,
            device_len: DEVICE_LEN as u32,
            notify_len: u32::from(count) * config::NOTIFY_MULTIPLIER,
        };
        let mut function = PciFunction {
            model,
            config: ConfigSpace::new(&identity),
            registers: Registers::new(count.into()),
            msix_table: fresh_table(vectors),
            table_used: false,
            irqs: Interrupts::new(vectors, keeper.fds()),
            queues: RunningQueues::held(id, count),
            kicks: (0..count)
                .map(|_| EventFd::new().map(Arc::new))
                .collect::<Result<_, _>>()?,
            calls: vec![None; count.into()],
            queue_resets: vec![false; count.into()],
            map: Arc::default(),
            pin: Arc::new(EventFd::new()?),
            resetting: false,
            requests: None,
            keeper: keeper.clone(),
        };
        function.update_masks();
        Ok(function)
    }

    /// What queues signal instead of an interrupt while the pin is in use.
    pub(crate) fn pin(&self) -> &Arc<EventFd> {
        &self.pin
    }

    /// What kicks the queues, in order, and where in which region a driver does that.
    pub(crate) fn kicks(&self) -> impl Iterator<Item = (u64, &Arc<EventFd>)> {
        let step = config::NOTIFY_MULTIPLIER as usize;
        let offsets = (u64::from(config::NOTIFY_OFFSET)..).step_by(step);
        offsets.zip(&self.kicks)
    }

    /// The client is about to get the counters that kick the queues: they must outlive this process.
    pub(crate) fn keep_kicks(&self) {
        for kick in &self.kicks {
            kick.keep(self.keeper.fds());
        }
    }

    /// Size of a region; 0 if there is none of that number.
    pub(crate) fn region_size(&self, index: u32) -> u64 {
        match index {
            region::CONFIG => config::CONFIG_SIZE as u64,
            VIRTIO_REGION => config::VIRTIO_BAR_SIZE.into(),
            MSIX_REGION if !self.msix_table.is_empty() => config::MSIX_BAR_SIZE.into(),
            _ => 0,
        }
    }

    /// The whole configuration space.
    pub(crate) fn config_space(&self) -> [u8; 256] {
        let mut bytes = [0; 256];
        self.config.read(0, &mut bytes);
        bytes
    }

    /// Reads a region.
    pub(crate) fn read(&mut self, index: u32, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        if index == region::CONFIG {
            if ConfigSpace::touches_window(offset, data.len()) {
                self.read_window();
            }
            let pending = !self.config.may_master() && !self.queues.is_quiet();
            self.config.set_transactions_pending(pending);
            self.config.read(offset, data);
        } else {
            self.read_bar(index, offset, data);
        }
    }

    fn read_bar(&mut self, bar: u32, offset: usize, data: &mut [u8]) {
        if !self.config.awake() {
            // Nobody answers.
            return data.fill(0xff);
        }
        if bar == MSIX_REGION {
            overlay(data, offset, 0, &self.msix_table);
            let pending = self.irqs.pending();
            overlay(data, offset, config::PBA_OFFSET as usize, &pending);
        }
        if bar != VIRTIO_REGION {
            return;
        }
        let at = |o: u32| o as usize;
        overlay(
            data,
            offset,
            at(config::COMMON_OFFSET),
            &self.common().image(),
        );
        if overlay(data, offset, at(config::ISR_OFFSET), &[self.registers.isr]) {
            self.registers.isr = 0;
            self.update_pin();
        }
        let mut device = [0; DEVICE_LEN];
        self.model.read_config(0, &mut device);
        overlay(data, offset, at(config::DEVICE_OFFSET), &device);
    }

    /// Fills the window of the access capability from where it points.
    fn read_window(&mut self) {
        let Some(access) = self.config.access() else {
            return;
        };
        let mut value = [0; 4];
        if let Some(value) = value.get_mut(..access.len) {
            self.read_bar(access.bar.into(), access.offset as usize, value);
        }
        self.config.window().copy_from_slice(&value);
    }

    /// The common configuration structure as the driver reads it.
    fn common(&self) -> Common {
        let r = &self.registers;
        let index = QueueIdx(r.queue_select);
        let half = |bits: u64, select: u32| match select {
            0 => bits as u32,
            1 => (bits >> 32) as u32,
            _ => 0,
        };
        let mut common = Common {
            device_feature_select: r.device_feature_select,
            device_feature: half(self.model.offered().bits(), r.device_feature_select),
            driver_feature_select: r.driver_feature_select,
            driver_feature: half(self.model.accepted().bits(), r.driver_feature_select),
            config_vector: r.config_vector,
            num_queues: self.model.num_queues(),
            device_status: self.model.status().bits(),
            queue_select: r.queue_select,
            queue_vector: NO_VECTOR,
            ..Common::default()
        };
        if let Some(queue) = self.model.queue(index) {
            common.queue_size = queue.size;
            common.queue_enable = queue.enabled.into();
            common.queue_notify_off = index.0;
            common.queue_desc = queue.desc.0;
            common.queue_driver = queue.avail.0;
            common.queue_device = queue.used.0;
            common.queue_notify_data = index.0;
            let reset = self.queue_resets.get(usize::from(index.0));
            common.queue_reset = reset.copied().unwrap_or(false).into();
            let vector = r.queue_vectors.get(usize::from(index.0));
            common.queue_vector = vector.copied().unwrap_or(NO_VECTOR);
        }
        common
    }

    /// Writes to a region.
    pub(crate) fn write(&mut self, index: u32, offset: u64, data: &[u8], cores: &mut dyn Cores) {
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        if index != region::CONFIG {
            self.write_bar(index, offset, data, cores);
            return;
        }
        let effect = self.config.write(offset, data);
        if effect.access
            && let Some(access) = self.config.access()
        {
            let window: Vec<u8> = self
                .config
                .window()
                .iter()
                .take(access.len)
                .copied()
                .collect();
            self.write_bar(access.bar.into(), access.offset as usize, &window, cores);
        }
        if effect.mastering {
            self.queues.hold(!self.config.may_master(), cores);
        }
        if effect.interrupts || effect.mastering {
            self.update_masks();
            self.reroute(cores);
        }
        if effect.reset {
            self.reset_function(cores);
        }
    }

    fn write_bar(&mut self, bar: u32, offset: usize, data: &[u8], cores: &mut dyn Cores) {
        if !self.config.awake() {
            return;
        }
        if bar == MSIX_REGION {
            for (n, byte) in data.iter().enumerate() {
                if let Some(place) = offset
                    .checked_add(n)
                    .and_then(|at| self.msix_table.get_mut(at))
                {
                    *place = *byte;
                    self.table_used = true;
                }
            }
            self.update_masks();
        }
        if bar != VIRTIO_REGION || data.is_empty() || self.resetting {
            return;
        }
        let common = offset.wrapping_sub(config::COMMON_OFFSET as usize);
        if common < config::COMMON_LEN as usize {
            for (field, value) in common::written(&self.common().image(), common, data) {
                self.write_field(field, value, cores);
            }
        }
        self.notify(offset, data.len());
    }

    /// Kicks the queues whose notification address a write touches.
    fn notify(&self, offset: usize, len: usize) {
        let start = config::NOTIFY_OFFSET as usize;
        let end = offset.saturating_add(len).saturating_sub(start);
        let step = config::NOTIFY_MULTIPLIER as usize;
        let first = offset.saturating_sub(start) / step;
        let kicks = self
            .kicks
            .get(first..end.div_ceil(step).min(self.kicks.len()));
        kicks.unwrap_or_default().iter().for_each(|k| k.signal());
    }

    /// The driver writes a field of the common configuration structure.
    fn write_field(&mut self, field: Field, value: u64, cores: &mut dyn Cores) {
        // The fields are at most as wide as the types that they are cut to here.
        let (word, short) = (value as u32, value as u16);
        let index = QueueIdx(self.registers.queue_select);
        match field {
            Field::DeviceFeatureSelect => self.registers.device_feature_select = word,
            Field::DriverFeatureSelect => self.registers.driver_feature_select = word,
            Field::DriverFeature => self.write_features(word),
            Field::ConfigVector => self.registers.config_vector = self.known_vector(short),
            Field::DeviceStatus => self.write_status(value as u8, cores),
            Field::QueueSelect => self.registers.queue_select = short,
            Field::QueueSize => {
                if let Ok(size) = self.model.check_size(index, short.into()) {
                    self.set_queue(index, |q| q.size = size);
                }
            }
            Field::QueueVector => {
                let vector = self.known_vector(short);
                if let Some(place) = self.registers.queue_vectors.get_mut(usize::from(index.0)) {
                    *place = vector;
                }
                self.reroute(cores);
            }
            Field::QueueEnable if short == 1 => {
                let running = self.model.status().contains(Status::DRIVER_OK);
                if self.model.enable_queue(index).is_ok() && running {
                    self.start_queue(index, false, cores);
                }
            }
            Field::QueueEnable => {}
            Field::QueueDesc => self.set_queue(index, |q| q.desc = Iova(value)),
            Field::QueueDriver => self.set_queue(index, |q| q.avail = Iova(value)),
            Field::QueueDevice => self.set_queue(index, |q| q.used = Iova(value)),
            Field::QueueReset if short == 1 => self.reset_queue(index, cores),
            Field::QueueReset => {}
        }
    }

    fn write_features(&mut self, word: u32) {
        let before = self.model.accepted().bits();
        let word = u64::from(word);
        match self.registers.driver_feature_select {
            0 => self.model.write_features(before & !0xffff_ffff | word),
            1 => self.model.write_features(before & 0xffff_ffff | word << 32),
            // There are no features past 64; a driver that accepts one is not served.
            _ if word != 0 => self.model.write_features(u64::MAX),
            _ => {}
        }
    }

    /// The vector, if the table has it.
    fn known_vector(&self, vector: u16) -> u16 {
        let vectors = self.msix_table.len() / config::MSIX_ENTRY as usize;
        if usize::from(vector) < vectors {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// Settings of an enabled queue stay as they are; the driver finds out by reading them.
    fn set_queue(&mut self, index: QueueIdx, set: impl FnOnce(&mut QueueSettings)) {
        if let Ok(queue) = self.model.queue_mut(index) {
            set(queue);
        }
    }

    fn write_status(&mut self, bits: u8, cores: &mut dyn Cores) {
        match self.model.write_status(bits) {
            StatusEffect::None => {}
            StatusEffect::Reset => self.reset_device(cores),
            StatusEffect::DriverOk => {
                for index in (0..self.model.num_queues()).map(QueueIdx) {
                    if self.model.queue(index).is_some_and(|q| q.enabled) {
                        self.start_queue(index, false, cores);
                    }
                }
            }
        }
    }

    /// Starts a queue, from its beginning or, as `resume` says, from where a former process left it.
    fn start_queue(&mut self, index: QueueIdx, resume: bool, cores: &mut dyn Cores) {
        let (state, inflight) = self.position(index, resume);
        let call = self.call(index);
        let at = usize::from(index.0);
        // A queue without a purpose has no kind: it can be enabled, but nothing ever happens on it.
        if let (Some(kind), Some(config), Some(kick), Some(last)) = (
            self.model.queue_kind(index),
            self.model.queue_config(index, state),
            self.kicks.get(at),
            self.calls.get_mut(at),
        ) {
            last.clone_from(&call);
            let setup = QueueSetup {
                kind,
                config,
                kick: Arc::clone(kick),
                call,
                inflight,
            };
            self.queues.start(index, setup, cores);
        }
    }

    /// Where a queue begins, and its record of requests in flight.
    fn position(&mut self, index: QueueIdx, resume: bool) -> (QueueState, Option<Inflight>) {
        let packed = self.model.packed();
        let fresh = QueueState::fresh(packed);
        if self.requests.is_none() {
            self.requests = Requests::new(self.model.num_queues(), &self.keeper);
        }
        let Some(mut record) = self.requests.as_ref().and_then(|r| r.queue(index, packed)) else {
            return (fresh, None);
        };
        let queue = self.model.queue(index).filter(|_| resume);
        let mut used = [0; 2];
        let state = match queue {
            Some(q)
                if self
                    .map
                    .read(Iova(q.used.0.wrapping_add(2)), &mut used)
                    .is_ok() =>
            {
                record.resume(q.size, u16::from_le_bytes(used))
            }
            _ => {
                record.clear();
                fresh
            }
        };
        (state, Some(record))
    }

    fn reset_queue(&mut self, index: QueueIdx, cores: &mut dyn Cores) {
        let enabled = self.model.queue(index).is_some_and(|q| q.enabled);
        if !enabled || !self.model.accepted().contains(Features::RING_RESET) {
            return;
        }
        if self.queues.stop(index, cores) {
            self.finish_queue_reset(index);
        } else if let Some(pending) = self.queue_resets.get_mut(usize::from(index.0)) {
            *pending = true;
        }
    }

    fn finish_queue_reset(&mut self, index: QueueIdx) {
        if let Some(pending) = self.queue_resets.get_mut(usize::from(index.0)) {
            *pending = false;
        }
        if let Some(vector) = self.registers.queue_vectors.get_mut(usize::from(index.0)) {
            *vector = NO_VECTOR;
        }
        self.model.disable_queue(index);
        let size = self.model.max_queue_size();
        self.set_queue(index, |q| {
            *q = QueueSettings {
                size,
                desc: Iova(0),
                avail: Iova(0),
                used: Iova(0),
                enabled: false,
            }
        });
    }

    /// Resets the device, as status 0 asks: the status reads as before until no core works for it any more.
    fn reset_device(&mut self, cores: &mut dyn Cores) {
        self.resetting = true;
        if self.queues.reset(cores) {
            self.finish_reset(cores);
        }
    }

    /// Resets the whole function.
    pub(crate) fn reset_function(&mut self, cores: &mut dyn Cores) {
        self.config.reset();
        self.msix_table = fresh_table(
            u16::try_from(self.msix_table.len() / config::MSIX_ENTRY as usize).unwrap_or(0),
        );
        self.table_used = false;
        self.update_masks();
        self.reset_device(cores);
        self.queues.hold(true, cores);
    }

    /// The queues are stopped and the session has ended.
    fn finish_reset(&mut self, cores: &mut dyn Cores) {
        self.model.reset();
        self.registers = Registers::new(self.kicks.len());
        self.queue_resets.fill(false);
        self.resetting = false;
        self.queues.set_memory(Arc::clone(&self.map), cores);
        self.update_pin();
    }

    /// Whether the driver has said that it is ready.
    pub(crate) fn driver_ok(&self) -> bool {
        self.model.status().contains(Status::DRIVER_OK)
    }

    /// Asks the client to let go of the function.
    pub(crate) fn ask_release(&self) {
        self.irqs.ask_release();
    }

    /// Whether a reset is under way.
    pub(crate) fn resetting(&self) -> bool {
        self.resetting
    }

    /// The queues, to pause and resume them.
    pub(crate) fn queues(&mut self) -> &mut RunningQueues {
        &mut self.queues
    }

    /// Whether a pause is complete.
    pub(crate) fn is_paused(&self) -> bool {
        self.queues.is_paused()
    }

    /// Whether no core works for the function.
    pub(crate) fn is_quiet(&self) -> bool {
        self.queues.is_quiet()
    }

    /// Replaces the guest's memory; true if no core uses the old one any more. Otherwise the cores report that, and until
    /// then it must not be replaced again.
    pub(crate) fn set_memory(&mut self, map: Arc<GuestMap>, cores: &mut dyn Cores) -> bool {
        self.map = Arc::clone(&map);
        self.queues.set_memory(map, cores)
    }

    /// Takes what the cores report.
    pub(crate) fn event(&mut self, event: CoreEvent, cores: &mut dyn Cores) {
        match self.queues.event(event, cores) {
            Some(Notice::Stopped(index)) => self.finish_queue_reset(index),
            Some(Notice::ResetDone) => self.finish_reset(cores),
            Some(Notice::Failed(_)) if self.model.set_needs_reset() => self.interrupt_config(),
            Some(Notice::Failed(_) | Notice::MemoryReplaced) | None => {}
        }
    }
}
