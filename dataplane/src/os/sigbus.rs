//! Survives memory that a peer takes away.
//!
//! A file that backs shared memory can be shortened by whoever shares it, and touching the lost pages raises `SIGBUS`. One
//! VMM must not end the service for all others that way: in a registered range the handler puts a private page of zeros
//! where the lost one was, and the access goes on. That peer's guest has broken its own memory, and nobody else's.
//!
//! Only [`super::mmap`] registers ranges. A fault anywhere else ends the process, as it should.
// UNSAFETY: a signal handler, and the mapping that it makes.
#![expect(
    unsafe_code,
    reason = "handles SIGBUS and maps pages at fixed addresses"
)]

use core::ffi::c_void;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Ranges that can be registered at a time: 64 devices with all the memory regions that each may have.
const RANGES: usize = 64 * ferry_shared::limits::MAX_MEMORY_REGIONS;

/// A registered range. `unit` is 0 while the entry is free, and is written last.
#[derive(Debug)]
struct Entry {
    start: AtomicUsize,
    end: AtomicUsize,
    unit: AtomicUsize,
}

static TABLE: [Entry; RANGES] = [const {
    Entry {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        unit: AtomicUsize::new(0),
    }
}; RANGES];

/// In `unit`: taken, but not complete.
const TAKEN: usize = usize::MAX;

/// Keeps a range registered.
#[derive(Debug)]
pub(super) struct Registered(&'static Entry);

impl Registered {
    /// Registers the mapping of `len` bytes at `start`, whose pages have `unit` bytes.
    pub(super) fn new(start: usize, len: usize, unit: usize) -> Result<Registered, Errno> {
        install()?;
        let free = |e: &&Entry| {
            e.unit
                .compare_exchange(0, TAKEN, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        };
        let entry = TABLE.iter().find(free).ok_or(Errno::ENOSPC)?;
        entry.start.store(start, Ordering::Relaxed);
        entry
            .end
            .store(start.saturating_add(len), Ordering::Relaxed);
        // Release pairs with the Acquire in `replace`.
        entry.unit.store(unit, Ordering::Release);
        Ok(Registered(entry))
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.0.unit.store(0, Ordering::Release);
    }
}

/// Installs the handler, once.
fn install() -> Result<(), Errno> {
    static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
        let action = SigAction::new(SigHandler::SigAction(on_sigbus), flags, SigSet::empty());
        // SAFETY: the handler makes system calls only, touches atomics only, and does not unwind.
        unsafe { sigaction(Signal::SIGBUS, &action) }.map(|_| ())
    })
}

extern "C" fn on_sigbus(_signal: i32, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel gives a valid record with SA_SIGINFO.
    let address = unsafe { (*info).si_addr() }.addr();
    if replace(address) {
        return;
    }
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: taking a handler away is always sound. The access is repeated and ends the process.
    let _ = unsafe { sigaction(Signal::SIGBUS, &default) };
}

/// Puts zeros in place of the page at `address`, if that lies in a registered range.
fn replace(address: usize) -> bool {
    let hit = TABLE.iter().find_map(|entry| {
        let unit = entry.unit.load(Ordering::Acquire);
        let start = entry.start.load(Ordering::Relaxed);
        let inside = address >= start && address < entry.end.load(Ordering::Relaxed);
        (unit != 0 && unit != TAKEN && inside).then_some(unit)
    });
    let Some(unit) = hit else {
        return false;
    };
    let page = core::ptr::without_provenance_mut(address & !(unit.wrapping_sub(1)));
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the page lies in a mapping that `SharedMap` owns, whose start and length are multiples of `unit`, and which
    // only raw pointers refer to.
    let made = unsafe { libc::mmap(page, unit, access, flags, -1, 0) };
    if made == libc::MAP_FAILED {
        return false;
    }
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::Relaxed) {
        let line = b"a peer has shortened the file behind its guest's memory; what is lost reads as zeros\n";
        // SAFETY: a static buffer and its length; write(2) may be called in a signal handler.
        let _ = unsafe { libc::write(2, line.as_ptr().cast(), line.len()) };
    }
    true
}
