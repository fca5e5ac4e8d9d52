//! The memfd of the recovery memory: its header, its cells, and areas of any size.
//!
//! Areas are named ranges of the file, mapped on their own and zero when they are made. Their directory is in the file: an
//! entry counts when its state word says so, which is written last. The file is sparse, so what is never touched costs
//! nothing. An area that is given up goes back when the last user of its memory is gone.
// UNSAFETY: maps the memfd, and makes slices of atomics of ranges that are checked against the mapping.
#![expect(unsafe_code, reason = "maps the recovery memory")]

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use nix::sys::stat::fstat;
use zerocopy::FromBytes;

use super::cells::{self, CellError, Cells, Words};
use super::placed::{Keep, Placed};

/// Raised when what is in the region changes its meaning.
pub const VERSION: u64 = 1;

const MAGIC: u64 = u64::from_le_bytes(*b"FerryRec");
const PAGE: u64 = 4096;
const WORD: usize = size_of::<u64>();

/// Words of the header.
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 1;
const AT_LAYOUT: usize = 2;
const AT_GENERATION: usize = 3;
const AT_SERIAL: usize = 4;

/// Areas at a time.
const ENTRIES: usize = 4096;
/// Longest name of an area, in bytes.
pub const MAX_NAME: usize = 96;
const ENTRY_WORDS: usize = 16;
const ENTRIES_AT: usize = 512;
/// Words of an entry: state, offset, length, checksum, then the name.
const STATE: usize = 0;
const OFFSET: usize = 1;
const LENGTH: usize = 2;
const CHECKSUM: usize = 3;
const NAME: usize = 4;
/// `STATE` of an entry that counts.
const LIVE: u64 = u64::from_le_bytes(*b"area\0\0\0\x01");

const CELLS_AT: usize = ENTRIES_AT + ENTRIES * ENTRY_WORDS;
/// Words of what is always mapped: header, directory, cells.
const HEAD_WORDS: usize = CELLS_AT + cells::WORDS;
/// Where areas begin.
const AREAS_AT: u64 = ((HEAD_WORDS * WORD) as u64).next_multiple_of(1 << 20);
/// The end of the address space of areas.
const LIMIT: u64 = 1 << 46;

/// What both processes must agree on besides the version.
const LAYOUT: u64 = {
    let numbers = [
        ENTRIES,
        ENTRIES_AT,
        ENTRY_WORDS,
        MAX_NAME,
        CELLS_AT,
        cells::CELLS,
        cells::WORDS,
        AREAS_AT as usize,
    ];
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut i = 0;
    while i < numbers.len() {
        hash = (hash ^ numbers[i] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
};

/// Why a region cannot be made, or not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The system refused.
    #[error("cannot {what} the recovery memory: {errno}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        errno: Errno,
    },
    /// Not a recovery memory.
    #[error(
        "the descriptor named \"recovery\" is no recovery memory of Ferry (it begins with {found:#018x}); remove it from the fd store and start without state"
    )]
    Magic {
        /// The first word.
        found: u64,
    },
    /// Another version's.
    #[error(
        "the recovery memory has version {found}, layout {layout:#x}; this build reads version {VERSION}, layout {LAYOUT:#x}; start the build that wrote it, or stop all devices' guests and start without state"
    )]
    Version {
        /// Its version.
        found: u64,
        /// Its layout.
        layout: u64,
    },
    /// The file is shorter than what it must hold.
    #[error("the recovery memory has {found} bytes and needs {need}")]
    Short {
        /// Bytes there.
        found: u64,
        /// Bytes needed.
        need: u64,
    },
    /// The directory does not hold together.
    #[error("entry {entry} of the recovery memory's directory is damaged: {what}")]
    Directory {
        /// The entry.
        entry: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// The cells do not hold together.
    #[error(transparent)]
    Cells(#[from] CellError),
    /// An area of this name exists, or its name is empty or too long.
    #[error("{name:?} cannot be the name of a new area of recovery memory")]
    Name {
        /// The name.
        name: String,
    },
    /// No room for another area.
    #[error("no room for {len} bytes of recovery memory")]
    Full {
        /// Bytes asked for.
        len: u64,
    },
    /// An area is shorter than what lies in it.
    #[error("the area {name:?} of {len} bytes has no room for {need} at {at}")]
    Place {
        /// The area.
        name: String,
        /// Its length.
        len: u64,
        /// Where something was to lie.
        at: u64,
        /// Its length.
        need: u64,
    },
}

fn system(what: &'static str) -> impl Fn(Errno) -> RegionError {
    move |errno| RegionError::System { what, errno }
}

/// A mapped range of the file.
#[derive(Debug)]
struct Mapped {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: an address range that this value owns until it is dropped.
unsafe impl Send for Mapped {}
// SAFETY: as above; its content is reached as atomics only.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn new(fd: impl AsFd, offset: u64, len: u64) -> Result<Mapped, RegionError> {
        let failed = system("map");
        let (Ok(len), Ok(start)) = (usize::try_from(len), i64::try_from(offset)) else {
            return Err(failed(Errno::EFBIG));
        };
        let length = NonZeroUsize::new(len).ok_or_else(|| failed(Errno::EINVAL))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let base = unsafe { mmap(None, length, access, flags, fd, start) }.map_err(failed)?;
        // SAFETY: the range was mapped right above. It would only make a core dump huge.
        let _ = unsafe { madvise(base, len, MmapAdvise::MADV_DONTDUMP) };
        Ok(Mapped {
            base: base.cast(),
            len,
        })
    }

    /// `count` records at byte `at`; `None` unless they lie inside and are aligned.
    fn records<T>(&self, at: usize, count: usize) -> Option<NonNull<[T]>> {
        let end = size_of::<T>().checked_mul(count)?.checked_add(at)?;
        // The mapping begins at a page, so that only `at` matters.
        if end > self.len || !at.is_multiple_of(align_of::<T>()) {
            return None;
        }
        // SAFETY: `at` <= `len`, so the result lies inside the mapping.
        let first = unsafe { self.base.add(at) };
        Some(NonNull::slice_from_raw_parts(first.cast(), count))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own; whoever uses its addresses keeps it.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

/// A part that is always mapped, as words.
type HeadWords = Placed<AtomicU64>;
/// The cells of a region.
pub type RegionCells = Cells<Placed<AtomicU64>>;

/// An area's place in the file.
#[derive(Clone, Copy, Debug)]
struct Extent {
    entry: usize,
    offset: u64,
    len: u64,
}

#[derive(Debug)]
struct Directory {
    areas: BTreeMap<String, Extent>,
}

/// What areas keep of the region.
#[derive(Debug)]
struct Inner {
    file: OwnedFd,
    head: HeadWords,
    directory: Mutex<Directory>,
}

/// The recovery memory.
#[derive(Debug)]
pub struct Region {
    inner: Arc<Inner>,
    cells: RegionCells,
}

impl Region {
    /// New, empty recovery memory.
    pub fn create() -> Result<Region, RegionError> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create(super::FD_NAME, flags).map_err(system("create"))?;
        nix::unistd::ftruncate(&file, AREAS_AT as i64).map_err(system("size"))?;
        let shrink = FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK);
        fcntl(&file, shrink).map_err(system("seal"))?;
        let head = map_head(&file)?;
        head.store(AT_VERSION, VERSION);
        head.store(AT_LAYOUT, LAYOUT);
        head.store(AT_GENERATION, 1);
        // Last: without it this is no region.
        head.store(AT_MAGIC, MAGIC);
        Region::new(file, head)
    }

    /// Takes over the memory of an earlier process. Nothing in it is changed unless all of it holds together.
    pub fn adopt(file: OwnedFd) -> Result<Region, RegionError> {
        let stat = fstat(&file).map_err(system("look at"))?;
        let found = u64::try_from(stat.st_size).unwrap_or(0);
        if found < AREAS_AT {
            let need = AREAS_AT;
            return Err(RegionError::Short { found, need });
        }
        let shrink = FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK);
        fcntl(&file, shrink).map_err(system("seal"))?;
        let head = map_head(&file)?;
        let magic = head.load(AT_MAGIC);
        if magic != MAGIC {
            return Err(RegionError::Magic { found: magic });
        }
        let (version, layout) = (head.load(AT_VERSION), head.load(AT_LAYOUT));
        if version != VERSION || layout != LAYOUT {
            let found = version;
            return Err(RegionError::Version { found, layout });
        }
        let region = Region::new(file, head)?;
        let head = &region.inner.head;
        head.store(AT_GENERATION, head.load(AT_GENERATION).wrapping_add(1));
        Ok(region)
    }

    fn new(file: OwnedFd, head: HeadWords) -> Result<Region, RegionError> {
        let areas = read_directory(&file, &head)?;
        let cells = Cells::adopt(map_cells(&file)?)?;
        let directory = Mutex::new(Directory { areas });
        Ok(Region {
            inner: Arc::new(Inner {
                file,
                head,
                directory,
            }),
            cells,
        })
    }

    /// The memfd, for the fd store.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.file.as_fd()
    }

    /// How many processes have used this memory, this one included.
    pub fn generation(&self) -> u64 {
        self.inner.head.load(AT_GENERATION)
    }

    /// The management thread's records.
    pub fn cells(&self) -> &RegionCells {
        &self.cells
    }

    /// The management thread's records, to be changed.
    pub fn cells_mut(&mut self) -> &mut RegionCells {
        &mut self.cells
    }

    /// A number that this has never given before, for names.
    pub fn next_serial(&self) -> u64 {
        let head = &self.inner.head;
        let serial = head.load(AT_SERIAL).wrapping_add(1);
        head.store(AT_SERIAL, serial);
        serial
    }

    /// The names of all areas.
    pub fn areas(&self) -> Vec<String> {
        self.inner.directory().areas.keys().cloned().collect()
    }

    /// Makes an area of at least `len` bytes, all zero.
    pub fn add_area(&self, name: &str, len: u64) -> Result<Area, RegionError> {
        let mut directory = self.inner.directory();
        let valid = !name.is_empty() && name.len() <= MAX_NAME;
        if !valid || directory.areas.contains_key(name) {
            return Err(RegionError::Name { name: name.into() });
        }
        let full = RegionError::Full { len };
        let extent = match directory.free_extent(len) {
            Some(extent) => extent,
            None => return Err(full),
        };
        let end = extent.offset + extent.len;
        let size = fstat(&self.inner.file).map_err(system("look at"))?.st_size;
        if (size as u64) < end {
            nix::unistd::ftruncate(&self.inner.file, end as i64).map_err(system("extend"))?;
        }
        self.inner.punch(extent)?;
        write_entry(&self.inner.head, name, extent);
        directory.areas.insert(name.into(), extent);
        drop(directory);
        self.map_area(name, extent)
    }

    /// The area of this name. It is mapped anew each time; whoever takes it over does so once.
    pub fn area(&self, name: &str) -> Result<Option<Area>, RegionError> {
        let extent = self.inner.directory().areas.get(name).copied();
        extent.map(|e| self.map_area(name, e)).transpose()
    }

    /// Gives up an area that nobody in this process has taken over.
    pub fn remove_area(&self, name: &str) {
        let extent = self.inner.directory().areas.get(name).copied();
        if let Some(extent) = extent {
            self.inner.release(name, extent);
        }
    }

    fn map_area(&self, name: &str, extent: Extent) -> Result<Area, RegionError> {
        Ok(Area(Arc::new(AreaInner {
            mapped: Mapped::new(&self.inner.file, extent.offset, extent.len)?,
            region: Arc::clone(&self.inner),
            name: name.into(),
            extent,
            discarded: AtomicBool::new(false),
        })))
    }
}

impl Inner {
    fn directory(&self) -> MutexGuard<'_, Directory> {
        // Nothing that holds it can leave it half changed.
        self.directory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a range zero and gives its memory back.
    fn punch(&self, extent: Extent) -> Result<(), RegionError> {
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (extent.offset as i64, extent.len as i64);
        fallocate(&self.file, how, offset, len).map_err(system("clear"))
    }

    fn release(&self, name: &str, extent: Extent) {
        let mut directory = self.directory();
        self.head.store(entry_at(extent.entry) + STATE, 0);
        if let Err(error) = self.punch(extent) {
            // The memory stays in use; the next area made there clears it again.
            tracing::warn!(%error, area = name, "recovery memory is not given back");
        }
        directory.areas.remove(name);
    }
}

impl Directory {
    /// A free entry, and the first free range that is long enough.
    fn free_extent(&self, len: u64) -> Option<Extent> {
        let len = len.max(1).checked_next_multiple_of(PAGE)?;
        let mut extents: Vec<Extent> = self.areas.values().copied().collect();
        let entry = (0..ENTRIES).find(|&e| extents.iter().all(|x| x.entry != e))?;
        extents.sort_unstable_by_key(|e| e.offset);
        let mut offset = AREAS_AT;
        for used in extents {
            if used.offset.saturating_sub(offset) >= len {
                break;
            }
            offset = used.offset + used.len;
        }
        let end = offset.checked_add(len)?;
        (end <= LIMIT).then_some(Extent { entry, offset, len })
    }
}

fn map_head(file: &OwnedFd) -> Result<HeadWords, RegionError> {
    map_words(file, 0, CELLS_AT)
}

fn map_cells(file: &OwnedFd) -> Result<HeadWords, RegionError> {
    map_words(file, CELLS_AT, cells::WORDS)
}

fn map_words(file: &OwnedFd, from: usize, count: usize) -> Result<HeadWords, RegionError> {
    const { assert!((CELLS_AT * WORD).is_multiple_of(PAGE as usize)) }
    let mapped = Mapped::new(file, (from * WORD) as u64, (count * WORD) as u64)?;
    let words = mapped
        .records::<AtomicU64>(0, count)
        .ok_or_else(|| system("map")(Errno::EINVAL))?;
    // SAFETY: inside the mapping and aligned, see `records`; atomics may hold anything; the mapping is kept.
    Ok(unsafe { Placed::new(words, Arc::new(mapped)) })
}

const fn entry_at(entry: usize) -> usize {
    ENTRIES_AT + entry * ENTRY_WORDS
}

fn write_entry(head: &HeadWords, name: &str, extent: Extent) {
    let at = entry_at(extent.entry);
    head.store(at + OFFSET, extent.offset);
    head.store(at + LENGTH, extent.len);
    let name = padded(name);
    for (i, word) in name.as_chunks::<WORD>().0.iter().enumerate() {
        head.store(at + NAME + i, u64::from_ne_bytes(*word));
    }
    head.store(at + CHECKSUM, checksum(&name, extent));
    // Last: from here on the area exists.
    head.store(at + STATE, LIVE);
}

fn padded(name: &str) -> [u8; MAX_NAME] {
    let mut bytes = [0; MAX_NAME];
    for (to, from) in bytes.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    bytes
}

fn checksum(name: &[u8; MAX_NAME], extent: Extent) -> u64 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&extent.offset.to_ne_bytes());
    hasher.update(&extent.len.to_ne_bytes());
    hasher.update(name);
    u64::from(hasher.finalize())
}

fn read_directory(
    file: &OwnedFd,
    head: &HeadWords,
) -> Result<BTreeMap<String, Extent>, RegionError> {
    const { assert!(NAME * WORD + MAX_NAME <= ENTRY_WORDS * WORD) }
    let size = fstat(file).map_err(system("look at"))?.st_size as u64;
    let mut areas = BTreeMap::new();
    for entry in 0..ENTRIES {
        let at = entry_at(entry);
        let damaged = |what| RegionError::Directory { entry, what };
        match head.load(at + STATE) {
            0 => continue,
            LIVE => {}
            _ => return Err(damaged("its state is impossible")),
        }
        let extent = Extent {
            entry,
            offset: head.load(at + OFFSET),
            len: head.load(at + LENGTH),
        };
        let mut name = [0; MAX_NAME];
        for (i, chunk) in name.as_chunks_mut::<WORD>().0.iter_mut().enumerate() {
            *chunk = head.load(at + NAME + i).to_ne_bytes();
        }
        if head.load(at + CHECKSUM) != checksum(&name, extent) {
            return Err(damaged("the checksum does not match"));
        }
        let aligned = extent.offset.is_multiple_of(PAGE) && extent.len.is_multiple_of(PAGE);
        let end = extent.offset.checked_add(extent.len);
        if !aligned || extent.len == 0 || extent.offset < AREAS_AT || end.is_none_or(|e| e > size) {
            return Err(damaged("it lies outside the file"));
        }
        let text = name.split(|&b| b == 0).next().unwrap_or_default();
        let text = core::str::from_utf8(text).map_err(|_| damaged("its name is not text"))?;
        if text.is_empty() || areas.insert(text.to_owned(), extent).is_some() {
            return Err(damaged("its name is empty, or taken"));
        }
    }
    let mut extents: Vec<&Extent> = areas.values().collect();
    extents.sort_unstable_by_key(|e| e.offset);
    for pair in extents.windows(2) {
        if let [a, b] = pair
            && a.offset + a.len > b.offset
        {
            let entry = b.entry;
            let what = "it overlaps another one";
            return Err(RegionError::Directory { entry, what });
        }
    }
    Ok(areas)
}

#[derive(Debug)]
struct AreaInner {
    mapped: Mapped,
    region: Arc<Inner>,
    name: String,
    extent: Extent,
    discarded: AtomicBool,
}

impl Drop for AreaInner {
    fn drop(&mut self) {
        if *self.discarded.get_mut() {
            self.region.release(&self.name, self.extent);
        }
    }
}

/// A named range of the region.
#[derive(Clone, Debug)]
pub struct Area(Arc<AreaInner>);

impl Area {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.0.extent.len
    }

    /// Whether it has no bytes; never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `count` records at byte `at`.
    ///
    /// # Safety
    ///
    /// Every field of `T` that is ever written is an atomic, and no other type is placed over the same bytes.
    pub unsafe fn place<T: FromBytes + Sync>(
        &self,
        at: u64,
        count: usize,
    ) -> Result<Placed<T>, RegionError> {
        let need = (size_of::<T>() as u64).saturating_mul(count as u64);
        let records = usize::try_from(at)
            .ok()
            .and_then(|at| self.0.mapped.records::<T>(at, count))
            .ok_or_else(|| RegionError::Place {
                name: self.0.name.clone(),
                len: self.len(),
                at,
                need,
            })?;
        let keep: Keep = Arc::clone(&self.0) as Keep;
        // SAFETY: inside the mapping and aligned, see `records`; any bytes are valid (`FromBytes`) and only atomics change
        // them, by the contract; the mapping is kept.
        Ok(unsafe { Placed::new(records, keep) })
    }

    /// `count` words at byte `at`.
    ///
    /// # Errors
    ///
    /// Unless they lie inside. Whoever calls this places nothing else over them.
    pub fn words(&self, at: u64, count: usize) -> Result<Placed<AtomicU64>, RegionError> {
        // SAFETY: words are atomics, and every area has one user, whose layout says where its words are.
        unsafe { self.place(at, count) }
    }

    /// Gives the area up: it goes when the last [`Placed`] and clone of it are gone.
    pub fn discard(&self) {
        self.0.discarded.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
