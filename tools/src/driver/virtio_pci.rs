//! A virtio PCI function (virtio 1.3, section 4.1) behind a vfio-user connection.

use std::thread;
use std::time::{Duration, Instant};

use ferry_dataplane::os::eventfd::EventFd;
use ferry_dataplane::transport::vfio_user::wire::region;
use ferry_dataplane::virtio::spec::{Features, FsConfig, PCI_DEVICE_ID_FS, PCI_VENDOR_ID, Status};
use zerocopy::{FromZeros, IntoBytes};

use super::config::DeviceConfig;
use super::error::{DriverError, Result};
use super::memory::DmaMemory;
use super::queue::Kick;
use super::ring::Ring;
use super::socket::Socket;
use super::vfio_user::{IoEvent, VfioUser};

/// Bytes of configuration that every device has: the tag and the number of request queues.
const CONFIG_BASE: usize = std::mem::offset_of!(FsConfig, notify_buf_size);
/// How long a device may take for a reset.
const RESET_PATIENCE: Duration = Duration::from_secs(5);

/// Registers and capabilities of the configuration space.
mod pci {
    pub(super) const COMMAND: u64 = 0x04;
    pub(super) const COMMAND_MEMORY: u16 = 1 << 1;
    pub(super) const COMMAND_MASTER: u16 = 1 << 2;
    pub(super) const COMMAND_NO_INTX: u16 = 1 << 10;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const FIRST_CAPABILITY: usize = 0x40;
    pub(super) const CAP_VENDOR: u8 = 0x09;
    pub(super) const CAP_EXPRESS: u8 = 0x10;
    /// The device control register in the PCI Express capability.
    pub(super) const DEVICE_CONTROL: u64 = 8;
    pub(super) const FUNCTION_RESET: u16 = 1 << 15;
    pub(super) const CAP_MSIX: u8 = 0x11;
    pub(super) const MSIX_ENABLE: u16 = 1 << 15;
    pub(super) const MSIX_SIZE: u16 = 0x7ff;
}

/// Kinds of virtio capability.
mod cap {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const DEVICE: u8 = 4;
}

/// Offsets in the common configuration.
mod common {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const NUM_QUEUES: u64 = 0x12;
    pub(super) const DEVICE_STATUS: u64 = 0x14;
    pub(super) const CONFIG_GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
    /// With `VIRTIO_F_RING_RESET` only.
    pub(super) const QUEUE_RESET: u64 = 0x3a;
    /// Length of the part that is used here.
    pub(super) const LEN: u32 = 0x38;
}

/// A structure in a BAR.
#[derive(Clone, Copy, Debug)]
struct Window {
    bar: u32,
    offset: u64,
    len: u32,
}

/// A virtio-fs function.
#[derive(Debug)]
pub(super) struct VirtioPci {
    vfio: VfioUser,
    common: Window,
    device: Window,
    notify: Window,
    notify_multiplier: u32,
    /// Offset of the MSI-X capability's control register, and the number of vectors.
    msix: (u64, u16),
    offered: Features,
    config: DeviceConfig,
    num_queues: u16,
    max_queue_size: u16,
    io_events: Vec<IoEvent>,
    /// Where the PCI Express capability is.
    express: Option<u64>,
    /// Notifications carry the queue's position.
    notification_data: bool,
    /// The memory that the device was given: its address and size.
    mapped: Option<(u64, u64)>,
}

impl VirtioPci {
    pub(super) fn open(vfio: VfioUser) -> Result<VirtioPci> {
        VirtioPci::find(vfio, None)
    }

    /// Resets the whole function, and finds out anew what is there.
    pub(super) fn reset_function(mut self) -> Result<VirtioPci> {
        let Some(express) = self.express else {
            let none = "it has no PCI Express capability, so it cannot be reset as a function";
            return Err(DriverError::Unusable(none.into()));
        };
        let at = express + pci::DEVICE_CONTROL;
        let mut control = [0u8; 2];
        self.vfio.read(region::CONFIG, at, &mut control)?;
        let control = u16::from_le_bytes(control) | pci::FUNCTION_RESET;
        self.vfio
            .write(region::CONFIG, at, &control.to_le_bytes())?;
        VirtioPci::find(self.vfio, self.mapped)
    }

    fn find(mut vfio: VfioUser, mapped: Option<(u64, u64)>) -> Result<VirtioPci> {
        let mut space = [0u8; 256];
        vfio.read(region::CONFIG, 0, &mut space)?;
        let layout = Layout::parse(&space)?;
        let mut function = VirtioPci {
            vfio,
            common: layout.common,
            device: layout.device,
            notify: layout.notify,
            notify_multiplier: layout.notify_multiplier,
            msix: layout.msix,
            offered: Features::empty(),
            config: DeviceConfig::default(),
            num_queues: 0,
            max_queue_size: 0,
            io_events: Vec::new(),
            express: layout.express,
            notification_data: false,
            mapped,
        };
        let command = pci::COMMAND_MEMORY | pci::COMMAND_MASTER | pci::COMMAND_NO_INTX;
        function
            .vfio
            .write(region::CONFIG, pci::COMMAND, &command.to_le_bytes())?;
        function.reset()?;
        function.set_status(Status::ACKNOWLEDGE | Status::DRIVER)?;
        function.offered = function.read_features()?;
        function.config = function.read_config()?;
        function.num_queues = function.read_u16(common::NUM_QUEUES)?;
        function.write_u16(common::QUEUE_SELECT, 0)?;
        function.max_queue_size = function.read_u16(common::QUEUE_SIZE)?;
        function.io_events = function.vfio.io_events(function.notify.bar)?;
        Ok(function)
    }

    pub(super) fn offered(&self) -> Features {
        self.offered
    }

    pub(super) fn config(&self) -> &DeviceConfig {
        &self.config
    }

    pub(super) fn num_queues(&self) -> u32 {
        self.num_queues.into()
    }

    pub(super) fn num_vectors(&self) -> u32 {
        self.msix.1.into()
    }

    pub(super) fn max_queue_size(&self) -> u16 {
        self.max_queue_size
    }

    pub(super) fn socket(&self) -> &Socket {
        self.vfio.socket()
    }

    /// Agrees on `features` and gives the device the memory.
    pub(super) fn begin(&mut self, features: Features, memory: &DmaMemory) -> Result<()> {
        let bits = features.bits();
        for (select, half) in [(0u32, bits as u32), (1, (bits >> 32) as u32)] {
            self.write_common(common::DRIVER_FEATURE_SELECT, &select.to_le_bytes())?;
            self.write_common(common::DRIVER_FEATURE, &half.to_le_bytes())?;
        }
        let status = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
        self.set_status(status)?;
        if !self.status()?.contains(Status::FEATURES_OK) {
            return Err(DriverError::Unusable(format!(
                "it does not accept the features {bits:#x} out of {:#x}",
                self.offered.bits()
            )));
        }
        self.notification_data = features.contains(Features::NOTIFICATION_DATA);
        if let Some((address, size)) = self.mapped.take() {
            self.vfio.unmap_memory(address, size)?;
        }
        self.vfio.map_memory(memory)?;
        self.mapped = Some((memory.iova_base(), memory.size() as u64));
        Ok(())
    }

    /// Resets queue `index` and waits until it has stopped.
    pub(super) fn reset_queue(&mut self, index: u16) -> Result<()> {
        self.write_u16(common::QUEUE_SELECT, index)?;
        self.write_u16(common::QUEUE_RESET, 1)?;
        let deadline = Instant::now() + RESET_PATIENCE;
        while self.read_u16(common::QUEUE_RESET)? != 0 {
            if Instant::now() > deadline {
                return Err(DriverError::Silent("the reset of a queue"));
            }
            thread::yield_now();
        }
        if self.read_u16(common::QUEUE_ENABLE)? != 0 {
            let enabled = format!("virtqueue {index} is enabled after its reset");
            return Err(DriverError::Unusable(enabled));
        }
        Ok(())
    }

    /// Starts queue `index`, and says how to kick it.
    pub(super) fn start_queue(
        &mut self,
        index: u16,
        ring: &Ring,
        memory: &DmaMemory,
        (vector, call): (u16, &EventFd),
    ) -> Result<Kick> {
        self.vfio.set_msix(u32::from(vector), call)?;
        self.write_u16(common::QUEUE_SELECT, index)?;
        if ring.size() > self.read_u16(common::QUEUE_SIZE)? {
            return Err(DriverError::Unusable(format!(
                "virtqueue {index} has fewer than {} entries",
                ring.size()
            )));
        }
        self.write_u16(common::QUEUE_SIZE, ring.size())?;
        self.write_u16(common::QUEUE_MSIX_VECTOR, vector)?;
        if self.read_u16(common::QUEUE_MSIX_VECTOR)? != vector {
            return Err(DriverError::Unusable(format!(
                "it does not give virtqueue {index} an interrupt"
            )));
        }
        let areas = ring.areas();
        for (at, area) in [
            (common::QUEUE_DESC, areas.desc),
            (common::QUEUE_DRIVER, areas.avail),
            (common::QUEUE_DEVICE, areas.used),
        ] {
            let address = memory.iova(area);
            let [low, high] = [address as u32, (address >> 32) as u32];
            self.write_common(at, &low.to_le_bytes())?;
            self.write_common(at + 4, &high.to_le_bytes())?;
        }
        let offset =
            u64::from(self.read_u16(common::QUEUE_NOTIFY_OFF)?) * u64::from(self.notify_multiplier);
        let with_data = self.notification_data;
        let len = if with_data { 4 } else { 2 };
        if offset + len > u64::from(self.notify.len) {
            return Err(DriverError::Unusable(format!(
                "virtqueue {index} has its notification address outside the notification area"
            )));
        }
        self.write_u16(common::QUEUE_ENABLE, 1)?;
        let address = self.notify.offset + offset;
        let position = self
            .io_events
            .iter()
            .position(|event| !with_data && event.stands_for(address, index));
        match position {
            Some(at) => Ok(Kick::Event(self.io_events.swap_remove(at).into_event()?)),
            None => Ok(Kick::Doorbell(self.vfio.doorbell(
                self.notify.bar,
                address,
                index,
                with_data,
            ))),
        }
    }

    /// All queues are set up: lets the device begin.
    pub(super) fn run(&mut self) -> Result<()> {
        self.enable_msix(true)?;
        let all = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;
        self.set_status(all)
    }

    /// Gives the function up.
    pub(super) fn stop(&mut self) -> Result<()> {
        self.reset()?;
        self.enable_msix(false)?;
        self.vfio.clear_msix()
    }

    /// Resets the device and waits until it has happened.
    fn reset(&mut self) -> Result<()> {
        self.set_status(Status::empty())?;
        let deadline = Instant::now() + RESET_PATIENCE;
        while !self.status()?.is_empty() {
            if Instant::now() > deadline {
                return Err(DriverError::Silent("a reset"));
            }
            thread::yield_now();
        }
        Ok(())
    }

    fn enable_msix(&mut self, on: bool) -> Result<()> {
        let (at, _) = self.msix;
        let mut control = [0u8; 2];
        self.vfio.read(region::CONFIG, at, &mut control)?;
        let mut control = u16::from_le_bytes(control) & !pci::MSIX_ENABLE;
        if on {
            control |= pci::MSIX_ENABLE;
        }
        self.vfio.write(region::CONFIG, at, &control.to_le_bytes())
    }

    fn read_features(&mut self) -> Result<Features> {
        let mut bits = 0u64;
        for select in 0..2u32 {
            self.write_common(common::DEVICE_FEATURE_SELECT, &select.to_le_bytes())?;
            let mut half = [0u8; 4];
            self.read_common(common::DEVICE_FEATURE, &mut half)?;
            bits |= u64::from(u32::from_le_bytes(half)) << (32 * select);
        }
        Ok(Features::from_bits_retain(bits))
    }

    fn read_config(&mut self) -> Result<DeviceConfig> {
        let mut config = FsConfig::new_zeroed();
        let notification = self.offered.contains(Features::FS_NOTIFICATION);
        let wanted = if notification {
            size_of::<FsConfig>()
        } else {
            CONFIG_BASE
        };
        if (self.device.len as usize) < wanted {
            return Err(DriverError::Unusable(format!(
                "its configuration has {} bytes, not {wanted}",
                self.device.len
            )));
        }
        loop {
            let mut before = [0u8];
            self.read_common(common::CONFIG_GENERATION, &mut before)?;
            let space = &mut config.as_mut_bytes()[..wanted];
            self.vfio.read(self.device.bar, self.device.offset, space)?;
            let mut after = [0u8];
            self.read_common(common::CONFIG_GENERATION, &mut after)?;
            if before == after {
                return DeviceConfig::new(&config);
            }
        }
    }

    fn status(&mut self) -> Result<Status> {
        let mut status = [0u8];
        self.read_common(common::DEVICE_STATUS, &mut status)?;
        Ok(Status::from_bits_retain(status[0]))
    }

    fn set_status(&mut self, status: Status) -> Result<()> {
        self.write_common(common::DEVICE_STATUS, &[status.bits()])
    }

    fn read_u16(&mut self, at: u64) -> Result<u16> {
        let mut value = [0u8; 2];
        self.read_common(at, &mut value)?;
        Ok(u16::from_le_bytes(value))
    }

    fn write_u16(&mut self, at: u64, value: u16) -> Result<()> {
        self.write_common(at, &value.to_le_bytes())
    }

    fn read_common(&mut self, at: u64, out: &mut [u8]) -> Result<()> {
        let Window { bar, offset, .. } = self.common;
        self.vfio.read(bar, offset + at, out)
    }

    fn write_common(&mut self, at: u64, data: &[u8]) -> Result<()> {
        let Window { bar, offset, .. } = self.common;
        self.vfio.write(bar, offset + at, data)
    }
}

/// Where a function's structures are, read from its configuration space.
#[derive(Debug)]
struct Layout {
    common: Window,
    device: Window,
    notify: Window,
    notify_multiplier: u32,
    msix: (u64, u16),
    express: Option<u64>,
}

impl Layout {
    fn parse(space: &[u8; 256]) -> Result<Layout> {
        let u16_at = |at: usize| u16::from_le_bytes([space[at], space[at + 1]]);
        let (vendor, device) = (u16_at(0), u16_at(2));
        if (vendor, device) != (PCI_VENDOR_ID, PCI_DEVICE_ID_FS) {
            return Err(DriverError::Unusable(format!(
                "its PCI id is {vendor:04x}:{device:04x}, not {PCI_VENDOR_ID:04x}:{PCI_DEVICE_ID_FS:04x}"
            )));
        }
        let mut windows = [None; 6];
        let mut multiplier = None;
        let mut msix = None;
        let mut express = None;
        for at in Capabilities::new(space) {
            match space[at] {
                pci::CAP_EXPRESS => express = Some(at as u64),
                pci::CAP_MSIX => {
                    let control = u16_at_checked(space, at + 2).unwrap_or(0);
                    msix.get_or_insert((at as u64 + 2, (control & pci::MSIX_SIZE) + 1));
                }
                pci::CAP_VENDOR => {
                    let Some((kind, window)) = virtio_capability(space, at) else {
                        continue;
                    };
                    // The first capability of a kind is the one to use.
                    if let Some(slot) = windows.get_mut(usize::from(kind))
                        && slot.is_none()
                    {
                        *slot = Some(window);
                        if kind == cap::NOTIFY {
                            multiplier = u32_at(space, at + 16);
                        }
                    }
                }
                _ => {}
            }
        }
        let window = |kind: u8, what: &str, least: u32| {
            windows[usize::from(kind)]
                .filter(|w: &Window| w.len >= least)
                .ok_or_else(|| DriverError::Unusable(format!("it has no {what} capability")))
        };
        Ok(Layout {
            common: window(cap::COMMON, "common configuration", common::LEN)?,
            device: window(cap::DEVICE, "device configuration", 1)?,
            notify: window(cap::NOTIFY, "notification", 2)?,
            notify_multiplier: multiplier.unwrap_or(0),
            express,
            msix: msix.ok_or_else(|| {
                DriverError::Unusable("it has no MSI-X, so it cannot tell of completions".into())
            })?,
        })
    }
}

/// The offsets of the capabilities; a list that goes in circles ends.
struct Capabilities<'a> {
    space: &'a [u8; 256],
    next: usize,
    left: usize,
}

impl<'a> Capabilities<'a> {
    fn new(space: &'a [u8; 256]) -> Capabilities<'a> {
        Capabilities {
            space,
            next: usize::from(space[pci::CAPABILITIES] & !3),
            left: (space.len() - pci::FIRST_CAPABILITY) / 4,
        }
    }
}

impl Iterator for Capabilities<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.left = self.left.checked_sub(1)?;
        let at = self.next;
        if at < pci::FIRST_CAPABILITY {
            return None;
        }
        self.next = usize::from(self.space.get(at + 1)? & !3);
        Some(at)
    }
}

/// The kind and the place of the structure that a virtio capability describes.
fn virtio_capability(space: &[u8; 256], at: usize) -> Option<(u8, Window)> {
    let kind = *space.get(at + 3)?;
    let bar = u32::from(*space.get(at + 4)?);
    if bar > region::BAR5 {
        return None;
    }
    let offset = u64::from(u32_at(space, at + 8)?);
    let len = u32_at(space, at + 12)?;
    Some((kind, Window { bar, offset, len }))
}

fn u16_at_checked(space: &[u8; 256], at: usize) -> Option<u16> {
    let bytes = space.get(at..at + 2)?;
    Some(u16::from_le_bytes(bytes.try_into().ok()?))
}

fn u32_at(space: &[u8; 256], at: usize) -> Option<u32> {
    let bytes = space.get(at..at + 4)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::{Capabilities, Layout};

    /// A configuration space with an id and a list of capabilities, each given with its place.
    fn space(caps: &[(usize, &[u8])]) -> [u8; 256] {
        let mut space = [0u8; 256];
        space[..4].copy_from_slice(&[0xf4, 0x1a, 0x5a, 0x10]);
        space[0x34] = caps.first().map_or(0, |&(at, _)| at as u8);
        for &(at, bytes) in caps {
            space[at..at + bytes.len()].copy_from_slice(bytes);
        }
        space
    }

    const COMMON: &[u8] = &[9, 0x60, 16, 1, 4, 0, 0, 0, 0, 0, 0, 0, 0x38, 0, 0, 0];
    const NOTIFY: &[u8] = &[
        9, 0x80, 20, 2, 4, 0, 0, 0, 0, 0x30, 0, 0, 0, 4, 0, 0, 8, 0, 0, 0,
    ];
    const DEVICE: &[u8] = &[9, 0xa0, 16, 4, 4, 0, 0, 0, 0, 0x20, 0, 0, 40, 0, 0, 0];
    const MSIX: &[u8] = &[0x11, 0, 30, 0x80];

    #[test]
    fn structures_are_found_through_the_capability_list() {
        let all = [(0x40, COMMON), (0x60, NOTIFY), (0x80, DEVICE), (0xa0, MSIX)];
        let layout = Layout::parse(&space(&all)).expect("a virtio-fs function");
        assert_eq!((layout.notify.bar, layout.notify.offset), (4, 0x3000));
        assert_eq!(layout.notify_multiplier, 8);
        assert_eq!((layout.device.offset, layout.device.len), (0x2000, 40));
        assert_eq!(layout.msix, (0xa2, 31));
    }

    #[test]
    fn another_device_and_missing_structures_are_refused_by_name() {
        let all = [(0x40, COMMON), (0x60, NOTIFY), (0x80, DEVICE), (0xa0, MSIX)];
        let mut block = space(&all);
        block[2] = 0x42;
        let error = Layout::parse(&block).expect_err("a block device");
        assert!(error.to_string().contains("1af4:1042"), "{error}");
        for missing in 0..all.len() {
            let mut caps = space(&all);
            caps[all[missing].0] = 0x05;
            assert!(Layout::parse(&caps).is_err(), "without {missing}");
        }
    }

    #[test]
    fn a_capability_list_that_goes_in_circles_ends() {
        let circle = space(&[(0x40, &[9, 0x40])]);
        assert!(Capabilities::new(&circle).count() <= 48);
        assert!(Layout::parse(&circle).is_err());
    }

    #[test]
    fn a_capability_that_leaves_the_space_is_ignored() {
        let cut = space(&[(0xfc, &[9, 0, 16, 1])]);
        assert!(Layout::parse(&cut).is_err());
    }
}
