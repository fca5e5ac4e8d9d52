//! Guest memory and drivers' ends of both ring formats, for tests.
#![expect(
    unsafe_code,
    reason = "tests own the memory that they play the guest in"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

use super::queue::{QueueConfig, QueueState};
use super::spec::{DESC_SIZE, DescFlags};
use crate::mem::{GuestMap, Iova, Mapping, Region};

/// How regions are aligned.
const PAGE: usize = 4096;

#[derive(Debug)]
struct Block {
    /// The beginning and the length of the region, inside what was allocated.
    base: NonNull<u8>,
    len: usize,
    allocated: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory, accessed through raw pointers.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `Ram::new`.
        unsafe { dealloc(self.allocated.as_ptr(), self.layout) }
    }
}

#[derive(Clone, Debug)]
struct Guard(#[expect(dead_code, reason = "kept alive only")] Arc<Block>);
impl Mapping for Guard {}

/// Guest memory in regions of the given lengths; each begins where its `iova` says.
#[derive(Clone, Debug)]
pub(crate) struct Ram {
    regions: Vec<(u64, Arc<Block>)>,
    next: u64,
}

impl Ram {
    pub(crate) fn new(regions: &[(u64, usize)]) -> Ram {
        let block = |len: usize| {
            // Of memory that is aligned to no more than this, what is never touched costs nothing.
            let layout = Layout::from_size_align(len + PAGE, 16).unwrap();
            // SAFETY: the length is not 0.
            let allocated = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap();
            let skip = allocated.as_ptr().align_offset(PAGE);
            let base = NonNull::new(allocated.as_ptr().wrapping_add(skip)).unwrap();
            Arc::new(Block {
                base,
                len,
                allocated,
                layout,
            })
        };
        Ram {
            next: regions[0].0,
            regions: regions.iter().map(|&(at, len)| (at, block(len))).collect(),
        }
    }

    /// One region of 1 MiB that does not begin at 0.
    pub(crate) fn simple() -> Ram {
        Ram::new(&[(0x10_0000, 1 << 20)])
    }

    pub(crate) fn map(&self) -> Arc<GuestMap> {
        let regions = self
            .regions
            .iter()
            .map(|(at, b)| Region {
                iova: Iova(*at),
                len: b.len as u64,
                host: b.base,
                writable: true,
            })
            .collect();
        let guards: Vec<Box<dyn Mapping>> = self
            .regions
            .iter()
            .map(|(_, b)| Box::new(Guard(Arc::clone(b))) as Box<dyn Mapping>)
            .collect();
        // SAFETY: the blocks are alive as long as the guards, and nothing holds references into them.
        Arc::new(unsafe { GuestMap::new(regions, guards) }.unwrap())
    }

    /// Takes the next `len` bytes of the first region.
    pub(crate) fn alloc(&mut self, len: usize) -> u64 {
        let at = self.next.next_multiple_of(16);
        self.next = at + len as u64;
        let (start, block) = &self.regions[0];
        assert!(
            self.next <= start + block.len as u64,
            "guest memory is full"
        );
        at
    }

    fn host(&self, at: u64, len: usize) -> *mut u8 {
        for (start, block) in &self.regions {
            if at >= *start && at + len as u64 <= start + block.len as u64 {
                return block.base.as_ptr().wrapping_add((at - start) as usize);
            }
        }
        panic!("{at:#x} is not in the test's guest memory");
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        // SAFETY: `host` checked the range.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.host(at, bytes.len()), bytes.len())
        }
    }

    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(self.host(at, len), out.as_mut_ptr(), len) }
        out
    }

    pub(crate) fn put16(&self, at: u64, value: u16) {
        self.write(at, &value.to_le_bytes());
    }

    pub(crate) fn get16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at, 2).try_into().unwrap())
    }
}

/// One buffer of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buf {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) write: bool,
}

fn desc(buf: Buf, id_or_flags: (u16, u16)) -> [u8; DESC_SIZE] {
    let mut d = [0; DESC_SIZE];
    d[..8].copy_from_slice(&buf.addr.to_le_bytes());
    d[8..12].copy_from_slice(&buf.len.to_le_bytes());
    d[12..14].copy_from_slice(&id_or_flags.0.to_le_bytes());
    d[14..].copy_from_slice(&id_or_flags.1.to_le_bytes());
    d
}

fn write_flag(buf: Buf) -> u16 {
    if buf.write {
        DescFlags::WRITE.bits()
    } else {
        0
    }
}

/// The driver's end of a ring of either format.
#[derive(Clone, Debug)]
pub(crate) struct Driver {
    pub(crate) ram: Ram,
    pub(crate) config: QueueConfig,
    /// Split: free descriptors. Packed: free buffer ids.
    free: Vec<u16>,
    /// Ring descriptors of each head or buffer id.
    taken: Vec<Vec<u16>>,
    avail: u16,
    avail_wrap: bool,
    used: u16,
    used_wrap: bool,
}

impl Driver {
    pub(crate) fn new(mut ram: Ram, size: u16, packed: bool, event_idx: bool) -> Driver {
        let n = usize::from(size);
        let config = QueueConfig {
            size,
            desc: Iova(ram.alloc(16 * n)),
            avail: Iova(ram.alloc(6 + 2 * n)),
            used: Iova(ram.alloc(6 + 8 * n)),
            packed,
            event_idx,
            indirect: true,
            state: QueueState::fresh(packed),
        };
        Driver {
            ram,
            config,
            free: (0..size).rev().collect(),
            taken: vec![Vec::new(); n],
            avail: 0,
            avail_wrap: true,
            used: 0,
            used_wrap: true,
        }
    }

    /// How many ring descriptors can be added.
    pub(crate) fn room(&self) -> usize {
        let in_flight: usize = self.taken.iter().map(Vec::len).sum();
        usize::from(self.config.size) - in_flight
    }

    fn table(&mut self, bufs: &[Buf]) -> Buf {
        let addr = self.ram.alloc(16 * bufs.len());
        for (i, &buf) in bufs.iter().enumerate() {
            let more = i + 1 < bufs.len() && !self.config.packed;
            let d = if self.config.packed {
                desc(buf, (0, write_flag(buf)))
            } else {
                let next = u16::from(more);
                desc(buf, (write_flag(buf) | next, i as u16 + 1))
            };
            self.ram.write(addr + 16 * i as u64, &d);
        }
        Buf {
            addr,
            len: 16 * bufs.len() as u32,
            write: false,
        }
    }

    /// Makes a request available: its first `direct` buffers in the ring, the others in an indirect table. Returns the
    /// head or buffer id.
    pub(crate) fn add(&mut self, bufs: &[Buf], direct: usize) -> u16 {
        let (ring, table) = bufs.split_at(direct.min(bufs.len()));
        let mut entries: Vec<(Buf, u16)> = ring.iter().map(|&b| (b, write_flag(b))).collect();
        if !table.is_empty() {
            let buf = self.table(table);
            entries.push((buf, DescFlags::INDIRECT.bits()));
        }
        if self.config.packed {
            self.add_packed(&entries)
        } else {
            self.add_split(&entries)
        }
    }

    fn add_split(&mut self, entries: &[(Buf, u16)]) -> u16 {
        let at = self.free.len() - entries.len();
        let indexes: Vec<u16> = self.free.split_off(at).into_iter().rev().collect();
        for (i, &(buf, flags)) in entries.iter().enumerate() {
            let next = indexes.get(i + 1).copied();
            let flags = flags | u16::from(next.is_some());
            let d = desc(buf, (flags, next.unwrap_or(0)));
            self.ram
                .write(self.config.desc.0 + 16 * u64::from(indexes[i]), &d);
        }
        let head = indexes[0];
        self.taken[usize::from(head)] = indexes;
        self.offer_split(head);
        head
    }

    /// Writes a head into the available ring.
    pub(crate) fn offer_split(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.config.size);
        self.ram.put16(self.config.avail.0 + 4 + 2 * slot, head);
        self.avail = self.avail.wrapping_add(1);
        self.ram.put16(self.config.avail.0 + 2, self.avail);
    }

    fn add_packed(&mut self, entries: &[(Buf, u16)]) -> u16 {
        let id = self.free.pop().unwrap();
        let mut first = None;
        for (i, &(buf, flags)) in entries.iter().enumerate() {
            let mut flags = flags;
            if i + 1 < entries.len() {
                flags |= DescFlags::NEXT.bits();
            }
            flags |= if self.avail_wrap {
                DescFlags::AVAIL.bits()
            } else {
                DescFlags::USED.bits()
            };
            let at = self.config.desc.0 + 16 * u64::from(self.avail);
            if i == 0 {
                first = Some((at, flags));
                self.ram.write(at, &desc(buf, (id, 0))[..14]);
            } else {
                self.ram.write(at, &desc(buf, (id, flags)));
            }
            self.avail += 1;
            if self.avail == self.config.size {
                self.avail = 0;
                self.avail_wrap = !self.avail_wrap;
            }
        }
        self.taken[usize::from(id)] = vec![0; entries.len()];
        let (at, flags) = first.unwrap();
        self.ram.put16(at + 14, flags);
        id
    }

    /// Whether the device has given something back.
    pub(crate) fn has_used(&self) -> bool {
        if self.config.packed {
            let at = self.config.desc.0 + 16 * u64::from(self.used) + 14;
            let flags = DescFlags::from_bits_retain(self.ram.get16(at));
            let both = [
                flags.contains(DescFlags::AVAIL),
                flags.contains(DescFlags::USED),
            ];
            both == [self.used_wrap; 2]
        } else {
            self.ram.get16(self.config.used.0 + 2) != self.used
        }
    }

    /// Takes what the device has given back: head or buffer id, and bytes written.
    pub(crate) fn take_used(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let (id, len);
        if self.config.packed {
            let d = self
                .ram
                .read(self.config.desc.0 + 16 * u64::from(self.used), 16);
            id = u16::from_le_bytes([d[12], d[13]]);
            len = u32::from_le_bytes(d[8..12].try_into().unwrap());
            self.used += self.taken[usize::from(id)].len() as u16;
            if self.used >= self.config.size {
                self.used -= self.config.size;
                self.used_wrap = !self.used_wrap;
            }
            self.free.push(id);
        } else {
            let slot = u64::from(self.used % self.config.size);
            let e = self.ram.read(self.config.used.0 + 4 + 8 * slot, 8);
            id = u16::from_le_bytes([e[0], e[1]]);
            len = u32::from_le_bytes(e[4..].try_into().unwrap());
            self.used = self.used.wrapping_add(1);
            let back = self.taken[usize::from(id)].clone();
            self.free.extend(back);
        }
        assert!(
            !self.taken[usize::from(id)].is_empty(),
            "{id} was not in flight"
        );
        self.taken[usize::from(id)].clear();
        Some((id, len))
    }

    /// Asks for an interrupt at the next used entry, in the form that EVENT_IDX gives it.
    pub(crate) fn want_event(&self, ahead: u16) {
        if self.config.packed {
            let at = self.used + ahead;
            let (at, wrap) = if at >= self.config.size {
                (at - self.config.size, !self.used_wrap)
            } else {
                (at, self.used_wrap)
            };
            self.ram
                .put16(self.config.avail.0, at | u16::from(wrap) << 15);
            self.ram.put16(self.config.avail.0 + 2, 2);
        } else {
            let at = self.config.avail.0 + 4 + 2 * u64::from(self.config.size);
            self.ram.put16(at, self.used.wrapping_add(ahead));
        }
    }

    /// Turns interrupts on or off, in the form without EVENT_IDX.
    pub(crate) fn set_interrupts(&self, on: bool) {
        let at = self.config.avail.0 + if self.config.packed { 2 } else { 0 };
        self.ram.put16(at, u16::from(!on));
    }

    /// Whether the device wants a kick for what was added since it had been `back` entries earlier.
    pub(crate) fn must_kick(&self, back: u16) -> bool {
        let c = &self.config;
        if c.packed {
            let flags = self.ram.get16(c.used.0 + 2);
            let off = self.ram.get16(c.used.0);
            match flags {
                0 => true,
                1 => false,
                _ => {
                    let wrap = off >> 15 == u16::from(self.avail_wrap);
                    let at = if wrap {
                        off & 0x7fff
                    } else {
                        (off & 0x7fff).wrapping_sub(c.size)
                    };
                    super::queue::need_event(at, self.avail, self.avail.wrapping_sub(back))
                }
            }
        } else if c.event_idx {
            let event = self.ram.get16(c.used.0 + 4 + 8 * u64::from(c.size));
            super::queue::need_event(event, self.avail, self.avail.wrapping_sub(back))
        } else {
            self.ram.get16(c.used.0) & 1 == 0
        }
    }
}
