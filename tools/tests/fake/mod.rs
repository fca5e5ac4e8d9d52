//! Devices for the driver's tests: the other ends of vhost-user and vfio-user, written down from the specifications with
//! plain offsets and not with the project's own structures, so that both must be right to agree.
//!
//! A device answers requests with a function of the test's, and notes what the driver did to it.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub(crate) mod files;
pub(crate) mod vfio_user;
pub(crate) mod vhost_user;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// What a device does with a request: the bytes of its reply, or none.
pub(crate) type Answer = fn(&[u8]) -> Vec<u8>;

/// VERSION_1, EVENT_IDX and INDIRECT_DESC.
pub(crate) const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28;

/// What the device is like.
#[derive(Clone)]
pub(crate) struct Device {
    pub(crate) tag: &'static str,
    pub(crate) request_queues: u32,
    pub(crate) features: u64,
    pub(crate) answer: Answer,
    /// vfio-user: kicks come through event descriptors.
    pub(crate) io_events: bool,
    /// It closes the connection instead of answering this message.
    pub(crate) dies_at: Option<&'static str>,
    /// It refuses this message.
    pub(crate) refuses: Option<&'static str>,
}

impl Default for Device {
    fn default() -> Device {
        Device {
            tag: "fake",
            request_queues: 2,
            features: FEATURES,
            answer: |request| request.iter().rev().copied().collect(),
            io_events: false,
            dies_at: None,
            refuses: None,
        }
    }
}

impl Device {
    /// The configuration space.
    pub(crate) fn config(&self) -> Vec<u8> {
        let mut space = vec![0; 36];
        space[..self.tag.len()].copy_from_slice(self.tag.as_bytes());
        space.extend(self.request_queues.to_le_bytes());
        space
    }
}

/// What the driver did, in order.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    pub(crate) fn note(&self, what: String) {
        self.0
            .lock()
            .expect("no test panics while it holds it")
            .push(what);
    }

    /// All lines so far.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.0
            .lock()
            .expect("no test panics while it holds it")
            .clone()
    }

    /// Where the first line that begins with `start` is.
    pub(crate) fn position(&self, start: &str) -> Option<usize> {
        self.lines().iter().position(|line| line.starts_with(start))
    }
}

/// A directory of the test's own, removed at its end.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("ferry-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary directory");
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The driver's memory, reached through its file.
pub(crate) struct Memory {
    file: File,
    base: u64,
    size: u64,
}

impl Memory {
    pub(crate) fn new(fd: OwnedFd, base: u64, size: u64) -> Memory {
        Memory {
            file: fd.into(),
            base,
            size,
        }
    }

    fn offset(&self, address: u64, len: usize) -> u64 {
        let offset = address
            .checked_sub(self.base)
            .expect("above the memory's start");
        assert!(offset + len as u64 <= self.size, "inside the memory");
        offset
    }

    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file
            .read_exact_at(&mut bytes, self.offset(address, len))
            .expect("the memory's file is long enough");
        bytes
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.file
            .write_all_at(bytes, self.offset(address, bytes.len()))
            .expect("the memory's file is long enough");
    }

    fn u16(&self, address: u64) -> u16 {
        u16_at(&self.read(address, 2), 0)
    }
}

/// A split ring, the device's side. Addresses are the driver's.
#[derive(Clone, Default)]
pub(crate) struct Ring {
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    pub(crate) running: bool,
    seen: u16,
    done: u16,
}

impl Ring {
    /// Answers everything that is available; true if there was something.
    pub(crate) fn serve(&mut self, memory: &Memory, answer: Answer) -> bool {
        if !self.running {
            return false;
        }
        let before = self.done;
        loop {
            // Ask to be kicked for the next one, then look once more.
            let event = self.used + 4 + 8 * u64::from(self.size);
            memory.write(event, &self.seen.to_le_bytes());
            if memory.u16(self.avail + 2) == self.seen {
                return self.done != before;
            }
            let slot = u64::from(self.seen % self.size);
            let head = memory.u16(self.avail + 4 + 2 * slot);
            self.seen = self.seen.wrapping_add(1);
            let written = self.answer(memory, head, answer);
            let slot = u64::from(self.done % self.size);
            let mut elem = u32::from(head).to_le_bytes().to_vec();
            elem.extend((written as u32).to_le_bytes());
            memory.write(self.used + 4 + 8 * slot, &elem);
            self.done = self.done.wrapping_add(1);
            memory.write(self.used + 2, &self.done.to_le_bytes());
        }
    }

    fn answer(&self, memory: &Memory, head: u16, answer: Answer) -> usize {
        let (mut table, mut at) = (self.desc, u64::from(head));
        let mut request = Vec::new();
        let mut room = Vec::new();
        loop {
            let desc = memory.read(table + 16 * at, 16);
            let (address, len) = (u64_at(&desc, 0), u32_at(&desc, 8) as usize);
            let flags = u16_at(&desc, 12);
            match flags & 6 {
                4 => {
                    (table, at) = (address, 0);
                    continue;
                }
                2 => room.push((address, len)),
                _ => request.extend(memory.read(address, len)),
            }
            if flags & 1 == 0 {
                break;
            }
            at = u64::from(u16_at(&desc, 14));
        }
        let reply = answer(&request);
        let mut rest = reply.as_slice();
        for (address, len) in room {
            let (now, later) = rest.split_at(len.min(rest.len()));
            memory.write(address, now);
            rest = later;
        }
        reply.len() - rest.len()
    }
}

/// The rings of a device by number.
pub(crate) type Rings = BTreeMap<u16, Ring>;

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// A connection with descriptors.
pub(crate) mod stream {
    use std::io::{IoSlice, IoSliceMut};
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg,
    };

    /// Reads exactly `len` bytes, with the descriptors that come along; `None` at the end of the stream.
    pub(crate) fn read(stream: &UnixStream, len: usize, fds: &mut Vec<OwnedFd>) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            let mut space = nix::cmsg_space!([RawFd; 16]);
            let mut parts = [IoSliceMut::new(&mut bytes[done..])];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message =
                recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)
                    .ok()?;
            for control in message.cmsgs().ok()? {
                if let ControlMessageOwned::ScmRights(raw) = control {
                    fds.extend(raw.into_iter().map(own));
                }
            }
            if message.bytes == 0 {
                return None;
            }
            done += message.bytes;
        }
        Some(bytes)
    }

    #[expect(unsafe_code, reason = "recvmsg hands out descriptors as numbers")]
    fn own(fd: RawFd) -> OwnedFd {
        // SAFETY: recvmsg has just made it for this process.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }

    /// Writes a message with descriptors. A peer that has gone is noticed when reading.
    pub(crate) fn write(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[] } else { &rights[..] };
        let parts = [IoSlice::new(bytes)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        let _ = sendmsg::<UnixAddr>(stream.as_raw_fd(), &parts, control, flags, None);
    }
}
