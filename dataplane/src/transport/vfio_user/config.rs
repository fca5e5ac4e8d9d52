//! A function's PCI configuration space: registers, their write masks, and the capability list.
//!
//! Owns the bytes. It must never touch the device behind them: a write returns what it asks for, and
//! [`super::pci::PciFunction`], which calls it, does that. Any access of any length at any offset has an answer: what is not
//! there reads as zeros, and read-only bits keep their values.

/// Bytes of the configuration space (PCI Express).
pub(crate) const CONFIG_SIZE: usize = 4096;

/// BAR with the virtio registers, and its size.
pub(crate) const VIRTIO_BAR: u8 = 0;
pub(crate) const VIRTIO_BAR_SIZE: u32 = 0x4000;
/// BAR with the MSI-X table and pending bits, and its size.
pub(crate) const MSIX_BAR: u8 = 2;
pub(crate) const MSIX_BAR_SIZE: u32 = 0x1000;

/// Where things are in [`VIRTIO_BAR`], and how long they are.
pub(crate) const COMMON_OFFSET: u32 = 0x0000;
pub(crate) const COMMON_LEN: u32 = 64;
pub(crate) const ISR_OFFSET: u32 = 0x1000;
pub(crate) const ISR_LEN: u32 = 4;
pub(crate) const DEVICE_OFFSET: u32 = 0x2000;
pub(crate) const NOTIFY_OFFSET: u32 = 0x3000;
/// Distance between the notification addresses of two queues.
pub(crate) const NOTIFY_MULTIPLIER: u32 = 4;
/// Where the pending bits are in [`MSIX_BAR`]; the table is at 0.
pub(crate) const PBA_OFFSET: u32 = 0x800;
/// Bytes of an entry of the MSI-X table.
pub(crate) const MSIX_ENTRY: u32 = 16;

const COMMAND: usize = 0x04;
const COMMAND_MASTER: u8 = 1 << 2;
const STATUS: usize = 0x06;
const INTERRUPT_STATUS: u8 = 1 << 3;
const BAR0: usize = 0x10;

const PCIE_CAP: usize = 0x40;
const DEVICE_CONTROL: usize = PCIE_CAP + 8;
const DEVICE_STATUS: usize = PCIE_CAP + 10;
const TRANSACTIONS_PENDING: u8 = 1 << 5;
const PM_CAP: usize = 0x7c;
/// Power management control and status; the low two bits are the power state.
const PM_CONTROL: usize = PM_CAP + 4;
const MSIX_CAP: usize = 0x84;
const MSIX_CONTROL: usize = MSIX_CAP + 2;
const COMMON_CAP: usize = 0x90;
const ISR_CAP: usize = 0xa0;
const DEVICE_CAP: usize = 0xb0;
const NOTIFY_CAP: usize = 0xc0;
const ACCESS_CAP: usize = 0xd4;
/// The window of the access capability.
const ACCESS_DATA: usize = ACCESS_CAP + 16;
const ACCESS_END: usize = ACCESS_DATA + 4;

// The upper bytes of registers, where the bits are that a write acts on.
const COMMAND_HIGH: usize = COMMAND + 1;
const DEVICE_CONTROL_HIGH: usize = DEVICE_CONTROL + 1;
const MSIX_CONTROL_HIGH: usize = MSIX_CONTROL + 1;

/// What the function is called.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    /// PCI subsystem vendor id.
    pub(crate) subsystem_vendor: u16,
    /// PCI subsystem id.
    pub(crate) subsystem: u16,
    /// Size of the MSI-X table; 0: no MSI-X.
    pub(crate) vectors: u16,
    /// Bytes of the device configuration.
    pub(crate) device_len: u32,
    /// Bytes of the notification area.
    pub(crate) notify_len: u32,
}

/// What a write asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Effect {
    /// A function-level reset.
    pub(crate) reset: bool,
    /// The bits that say how interrupts are delivered may have changed.
    pub(crate) interrupts: bool,
    /// The bits that say whether the function may access memory may have changed.
    pub(crate) mastering: bool,
    /// The window of the access capability was written.
    pub(crate) access: bool,
}

/// Where the access capability points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) bar: u8,
    pub(crate) offset: u32,
    pub(crate) len: usize,
}

/// The registers.
#[derive(Debug)]
pub(crate) struct ConfigSpace {
    bytes: [u8; 256],
    /// The bits that a write changes.
    writable: [u8; 256],
    /// The state after a reset.
    initial: [u8; 256],
}

impl ConfigSpace {
    pub(crate) fn new(id: &Identity) -> ConfigSpace {
        let mut b = Builder {
            bytes: [0; 256],
            writable: [0; 256],
        };
        b.header(id);
        b.capabilities(id);
        ConfigSpace {
            bytes: b.bytes,
            writable: b.writable,
            initial: b.bytes,
        }
    }

    /// What a later process needs.
    pub(crate) fn saved(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes over what was written when a former process served the function; only writable bits can differ.
    pub(crate) fn restore(&mut self, saved: &[u8]) -> bool {
        self.write(0, saved);
        saved.len() == self.bytes.len()
    }

    /// Takes every register back to its state after power-on.
    pub(crate) fn reset(&mut self) {
        self.bytes = self.initial;
    }

    /// Reads; what lies outside reads as zeros.
    pub(crate) fn read(&self, offset: usize, data: &mut [u8]) {
        for (n, byte) in data.iter_mut().enumerate() {
            let at = offset.checked_add(n);
            *byte = at.and_then(|at| self.bytes.get(at)).copied().unwrap_or(0);
        }
    }

    /// Writes; only writable bits change.
    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) -> Effect {
        let mut effect = Effect::default();
        for (n, &value) in data.iter().enumerate() {
            let Some(at) = offset.checked_add(n) else {
                break;
            };
            let (Some(byte), Some(&mask)) = (self.bytes.get_mut(at), self.writable.get(at)) else {
                break;
            };
            *byte = (*byte & !mask) | (value & mask);
            match at {
                COMMAND_HIGH | MSIX_CONTROL_HIGH => effect.interrupts = true,
                COMMAND | PM_CONTROL => effect.mastering = true,
                // Bit 15 of the device control register, which always reads as 0.
                DEVICE_CONTROL_HIGH => effect.reset |= value & 0x80 != 0,
                ACCESS_DATA..ACCESS_END => effect.access = true,
                _ => {}
            }
        }
        effect
    }

    fn byte(&self, at: usize) -> u8 {
        self.bytes.get(at).copied().unwrap_or(0)
    }

    fn dword(&self, at: usize) -> u32 {
        let mut data = [0; 4];
        self.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    /// Whether the driver wants no interrupts on the pin.
    pub(crate) fn intx_disabled(&self) -> bool {
        self.byte(COMMAND_HIGH) & 0x04 != 0
    }

    /// Whether the driver has switched to MSI-X.
    pub(crate) fn msix_enabled(&self) -> bool {
        self.byte(MSIX_CONTROL_HIGH) & 0x80 != 0
    }

    /// Whether the driver has masked all vectors at once.
    pub(crate) fn msix_masked(&self) -> bool {
        self.msix_enabled() && self.byte(MSIX_CONTROL_HIGH) & 0x40 != 0
    }

    /// Whether the function is in power state D0; otherwise it answers in its configuration space only.
    pub(crate) fn awake(&self) -> bool {
        self.byte(PM_CONTROL) & 0x03 == 0
    }

    /// Whether the function may access memory.
    pub(crate) fn may_master(&self) -> bool {
        self.awake() && self.byte(COMMAND) & COMMAND_MASTER != 0
    }

    /// Shows whether accesses to memory are still under way though they may not be any more.
    pub(crate) fn set_transactions_pending(&mut self, pending: bool) {
        if let Some(byte) = self.bytes.get_mut(DEVICE_STATUS) {
            *byte &= !TRANSACTIONS_PENDING;
            if pending {
                *byte |= TRANSACTIONS_PENDING;
            }
        }
    }

    /// Shows whether an interrupt is pending on the pin.
    pub(crate) fn set_interrupt_status(&mut self, pending: bool) {
        if let Some(byte) = self.bytes.get_mut(STATUS) {
            *byte &= !INTERRUPT_STATUS;
            if pending {
                *byte |= INTERRUPT_STATUS;
            }
        }
    }

    /// Whether an access touches the window of the access capability.
    pub(crate) fn touches_window(offset: usize, len: usize) -> bool {
        offset < ACCESS_END && offset.saturating_add(len) > ACCESS_DATA
    }

    /// Where the access capability points, if it points to a register.
    pub(crate) fn access(&self) -> Option<Access> {
        let bar = self.byte(ACCESS_CAP + 4);
        let offset = self.dword(ACCESS_CAP + 8);
        let len = self.dword(ACCESS_CAP + 12);
        if !matches!(len, 1 | 2 | 4) || !offset.is_multiple_of(len) {
            return None;
        }
        Some(Access {
            bar,
            offset,
            len: len as usize,
        })
    }

    /// The window's content, and its change after a read through it.
    pub(crate) fn window(&mut self) -> &mut [u8] {
        self.bytes
            .get_mut(ACCESS_DATA..ACCESS_END)
            .unwrap_or_default()
    }
}

/// Puts the initial state together. Offsets are constants of this file, never a guest's.
struct Builder {
    bytes: [u8; 256],
    writable: [u8; 256],
}

impl Builder {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    fn header(&mut self, id: &Identity) {
        self.put(0x00, &0x1af4u16.to_le_bytes());
        self.put(0x02, &(0x1040u16 + 26).to_le_bytes());
        // Memory space, bus master, parity and SERR reporting, interrupt disable.
        self.allow(COMMAND, &0x0546u16.to_le_bytes());
        // There is a capability list.
        self.put(STATUS, &[0x10]);
        // Revision 1 (not transitional); class: mass storage, other.
        self.put(0x08, &[0x01, 0x00, 0x80, 0x01]);
        // Cache line size: has no effect, but keeps its value.
        self.allow(0x0c, &[0xff]);
        for (bar, size) in [(VIRTIO_BAR, VIRTIO_BAR_SIZE), (MSIX_BAR, MSIX_BAR_SIZE)] {
            if bar == MSIX_BAR && id.vectors == 0 {
                continue;
            }
            // 64-bit memory, prefetchable. The fixed low bits give the size.
            let at = BAR0 + 4 * usize::from(bar);
            self.put(at, &[0x0c]);
            self.allow(at, &(!(u64::from(size) - 1)).to_le_bytes());
        }
        self.put(0x2c, &id.subsystem_vendor.to_le_bytes());
        self.put(0x2e, &id.subsystem.to_le_bytes());
        self.put(0x34, &[PCIE_CAP as u8]);
        // Interrupt line, and pin A.
        self.allow(0x3c, &[0xff]);
        self.put(0x3d, &[1]);
    }

    fn capabilities(&mut self, id: &Identity) {
        // PCI Express endpoint, version 2.
        self.put(PCIE_CAP, &[0x10, PM_CAP as u8, 0x02, 0x00]);
        // Role-based error reporting; function-level reset.
        self.put(PCIE_CAP + 4, &0x1000_8000u32.to_le_bytes());
        self.put(DEVICE_CONTROL, &0x2810u16.to_le_bytes());
        self.allow(DEVICE_CONTROL, &0x7fffu16.to_le_bytes());
        // Link: 2.5 GT/s, one lane.
        self.put(PCIE_CAP + 0x0c, &0x11u32.to_le_bytes());
        self.allow(PCIE_CAP + 0x10, &0x01c3u16.to_le_bytes());
        self.put(PCIE_CAP + 0x12, &0x11u16.to_le_bytes());

        // Power management, version 3; the state survives D3 (no soft reset).
        let after_pm = if id.vectors == 0 {
            COMMON_CAP
        } else {
            MSIX_CAP
        };
        self.put(PM_CAP, &[0x01, after_pm as u8, 0x03, 0x00, 0x08]);
        self.allow(PM_CONTROL, &[0x03]);

        if let Some(last) = id.vectors.checked_sub(1) {
            self.put(MSIX_CAP, &[0x11, COMMON_CAP as u8]);
            self.put(MSIX_CONTROL, &(last & 0x7ff).to_le_bytes());
            self.allow(MSIX_CONTROL, &0xc000u16.to_le_bytes());
            self.put(MSIX_CAP + 4, &u32::from(MSIX_BAR).to_le_bytes());
            self.put(
                MSIX_CAP + 8,
                &(PBA_OFFSET | u32::from(MSIX_BAR)).to_le_bytes(),
            );
        }

        let common = (COMMON_OFFSET, COMMON_LEN);
        self.virtio(COMMON_CAP, ISR_CAP, 16, 1, common);
        self.virtio(ISR_CAP, DEVICE_CAP, 16, 3, (ISR_OFFSET, ISR_LEN));
        let device = (DEVICE_OFFSET, id.device_len);
        self.virtio(DEVICE_CAP, NOTIFY_CAP, 16, 4, device);
        let notify = (NOTIFY_OFFSET, id.notify_len);
        self.virtio(NOTIFY_CAP, ACCESS_CAP, 20, 2, notify);
        self.put(NOTIFY_CAP + 16, &NOTIFY_MULTIPLIER.to_le_bytes());
        self.virtio(ACCESS_CAP, 0, 20, 5, (0, 0));
        self.allow(ACCESS_CAP + 4, &[0xff]);
        self.allow(ACCESS_CAP + 8, &[0xff; 12]);
    }

    /// A virtio vendor capability (virtio 1.3, section 4.1.4) for a piece of [`VIRTIO_BAR`].
    fn virtio(&mut self, at: usize, next: usize, len: u8, kind: u8, (offset, bytes): (u32, u32)) {
        self.put(at, &[0x09, next as u8, len, kind, VIRTIO_BAR]);
        self.put(at + 8, &offset.to_le_bytes());
        self.put(at + 12, &bytes.to_le_bytes());
    }
}

#[cfg(test)]
mod tests;
