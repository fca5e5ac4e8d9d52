//! What a client has opened, as it is kept for a later process.

use serde::{Deserialize, Serialize};

use super::super::pci::FunctionV1;
use super::super::wire::{DmaMap, dma_flags};
use super::{Backing, Served};
use crate::engine::Cores;
use crate::keeper::Keeper;

/// A window of guest memory.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct WindowV1 {
    address: u64,
    size: u64,
    writable: bool,
    /// File, and where in it.
    file: Option<(u64, u64)>,
}

/// A function and the guest memory that its client has opened.
#[derive(Serialize, Deserialize)]
pub(crate) struct ServedV1 {
    function: FunctionV1,
    windows: Vec<WindowV1>,
}

impl Served {
    /// What a later process needs.
    pub(crate) fn saved(&self) -> ServedV1 {
        let window = |w: &super::Window<Backing>| WindowV1 {
            address: w.address,
            size: w.size,
            writable: w.writable,
            file: w
                .memory
                .as_ref()
                .and_then(|m| Some((m.file.as_ref()?.number(), m.offset))),
        };
        ServedV1 {
            function: self.function.saved(),
            windows: self.windows.iter().map(window).collect(),
        }
    }

    /// Takes over what a client has set up with a former process; `false` if that cannot be had any more.
    pub(crate) fn restore(&mut self, saved: ServedV1, keeper: &Keeper) -> bool {
        for window in saved.windows {
            let write = if window.writable { dma_flags::WRITE } else { 0 };
            let map = DmaMap {
                argsz: size_of::<DmaMap>() as u32,
                flags: dma_flags::READ | write,
                offset: window.file.map_or(0, |(_, offset)| offset),
                address: window.address,
                size: window.size,
            };
            let restored = self.windows.map(&map, || {
                let Some((number, _)) = window.file else {
                    return Ok(None);
                };
                let file = keeper.fds().adopt(number).ok_or(super::Errno::EBADF)?;
                Backing::new(&map, file.clone(), Some(file)).map(Some)
            });
            if restored.is_err() {
                return false;
            }
        }
        self.function.restore(saved.function, keeper)
    }

    /// Goes on with what a former process has left.
    pub(crate) fn resume(&mut self, cores: &mut dyn Cores) {
        let map = self.guest_map();
        self.function.resume(map, cores);
    }
}
