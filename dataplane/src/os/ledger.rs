//! How far a stream socket has been read and written, known for certain even after this process was killed.
//!
//! Between a system call and the store that would note its outcome a process can die. Here the kernel notes the outcome
//! itself: recvmmsg(2) and sendmmsg(2) write the number of bytes into the caller's memory, in the same system call and with
//! no point in between at which a signal could end the process, and that memory lies in the recovery memory.
//!
//! Each direction has two entries and the number of the one that counts. An entry holds the bytes moved before its call,
//! and the kernel's record of the call. A call is prepared in the entry that does not count, which is then made to count by
//! one store, and only then it is made.
// UNSAFETY: system calls with message headers that lie in words of shared memory.
#![expect(unsafe_code, reason = "the kernel writes into shared memory")]

use core::mem::{offset_of, zeroed};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicU64, Ordering, compiler_fence};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;

use crate::recovery::placed::Placed;

/// Words of a message header as the kernel reads and writes it.
const HEADER_WORDS: usize = size_of::<libc::mmsghdr>() / size_of::<u64>();
/// Where in it the kernel writes the number of bytes.
const LENGTH_WORD: usize = offset_of!(libc::mmsghdr, msg_len) / size_of::<u64>();
/// An entry: bytes before the call, then the header.
const ENTRY_WORDS: usize = 1 + HEADER_WORDS;
/// A direction: the number of the entry that counts, then both entries.
const METER_WORDS: usize = 1 + 2 * ENTRY_WORDS;
/// Words that a ledger takes.
pub const WORDS: usize = 2 * METER_WORDS;

const _: () = {
    // The length is the first half of a word, and the header has no other part there.
    assert!(offset_of!(libc::mmsghdr, msg_len) % size_of::<u64>() == 0);
    assert!(size_of::<libc::mmsghdr>().is_multiple_of(size_of::<u64>()));
    assert!(align_of::<libc::mmsghdr>() <= align_of::<u64>());
};

/// The directions.
const RECEIVED: usize = 0;
const SENT: usize = METER_WORDS;

/// The ledger of one connection. Zeroed words are a fresh one.
#[derive(Debug)]
pub struct Ledger(Placed<AtomicU64>);

impl Ledger {
    /// A ledger in these words; `None` if they are too few.
    pub fn new(words: Placed<AtomicU64>) -> Option<Ledger> {
        (words.len() >= WORDS).then_some(Ledger(words))
    }

    /// Begins a new connection.
    pub fn clear(&self) {
        for word in self.0.iter() {
            word.store(0, Ordering::Relaxed);
        }
        compiler_fence(Ordering::SeqCst);
    }

    fn load(&self, at: usize) -> u64 {
        self.0.get(at).map_or(0, |w| w.load(Ordering::Relaxed))
    }

    fn store(&self, at: usize, value: u64) {
        if let Some(word) = self.0.get(at) {
            word.store(value, Ordering::Relaxed);
        }
        // The reader comes after this process: program order is enough.
        compiler_fence(Ordering::SeqCst);
    }

    /// Where the entry that counts begins.
    fn entry(&self, meter: usize) -> usize {
        meter + 1 + (self.load(meter) as usize & 1) * ENTRY_WORDS
    }

    fn moved(&self, meter: usize) -> u64 {
        let entry = self.entry(meter);
        let length = self.load(entry + 1 + LENGTH_WORD).to_ne_bytes();
        let [a, b, c, d, ..] = length;
        let last = u32::from_ne_bytes([a, b, c, d]);
        self.load(entry).wrapping_add(u64::from(last))
    }

    /// Bytes received since [`Ledger::clear`].
    pub fn received(&self) -> u64 {
        self.moved(RECEIVED)
    }

    /// Bytes sent since [`Ledger::clear`].
    pub fn sent(&self) -> u64 {
        self.moved(SENT)
    }

    /// Prepares a call; gives the header that the kernel is to write to.
    fn prepare(&self, meter: usize, header: &libc::msghdr) -> Result<*mut libc::mmsghdr, Errno> {
        let moved = self.moved(meter);
        let other = 1 - (self.load(meter) & 1);
        let entry = meter + 1 + other as usize * ENTRY_WORDS;
        let words = self.0.get(entry + 1..entry + ENTRY_WORDS);
        let place = words.and_then(|w| w.first()).ok_or(Errno::EFAULT)?.as_ptr();
        let place = place.cast::<libc::mmsghdr>();
        self.store(entry, moved);
        // SAFETY: `words` are as long as a header and at least as aligned, they are atomics, which may be written through
        // their own pointer, and nobody else uses them.
        unsafe {
            (&raw mut (*place).msg_len).write_volatile(0);
            (&raw mut (*place).msg_hdr).write_volatile(*header);
        }
        compiler_fence(Ordering::SeqCst);
        self.store(meter, other);
        Ok(place)
    }

    /// Receives bytes and closes the descriptors that come with them; 0 at the end of the stream.
    pub fn receive(&self, socket: BorrowedFd<'_>, buf: &mut [u8]) -> Result<usize, Errno> {
        let mut part = libc::iovec {
            iov_base: buf.as_mut_ptr().cast(),
            iov_len: buf.len(),
        };
        // SAFETY: all zeroes are an empty header.
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        let place = self.prepare(RECEIVED, &header)?;
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: the header names `buf`, which outlives the call, and no control area.
        let n = unsafe { libc::recvmmsg(socket.as_raw_fd(), place, 1, flags, null_mut()) };
        Errno::result(n)?;
        // SAFETY: valid as in `prepare`.
        Ok(unsafe { (&raw const (*place).msg_len).read_volatile() } as usize)
    }

    /// Sends bytes, and descriptors with the first of them; says how many.
    pub fn send(
        &self,
        socket: BorrowedFd<'_>,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<usize, Errno> {
        let mut part = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let mut control = rights(fds);
        // SAFETY: all zeroes are an empty header.
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        if !fds.is_empty() {
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = control.len() * size_of::<u64>();
        }
        let place = self.prepare(SENT, &header)?;
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the header names `bytes` and `control`, which outlive the call; sending only reads them.
        let n = unsafe { libc::sendmmsg(socket.as_raw_fd(), place, 1, flags) };
        Errno::result(n)?;
        // SAFETY: valid as in `prepare`.
        Ok(unsafe { (&raw const (*place).msg_len).read_volatile() } as usize)
    }
}

/// A control area that passes descriptors, in words so that it is aligned.
fn rights(fds: &[BorrowedFd<'_>]) -> Vec<u64> {
    const WORD: usize = size_of::<u64>();
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let len = size_of::<libc::cmsghdr>() + size_of_val(&raw[..]);
    let header_words = size_of::<libc::cmsghdr>() / WORD;
    let mut area = vec![0u64; header_words];
    // SAFETY: all zeroes are an empty header.
    let mut header: libc::cmsghdr = unsafe { zeroed() };
    header.cmsg_len = len;
    header.cmsg_level = libc::SOL_SOCKET;
    header.cmsg_type = libc::SCM_RIGHTS;
    // SAFETY: the area has as many bytes, and words are aligned enough.
    unsafe { area.as_mut_ptr().cast::<libc::cmsghdr>().write(header) };
    for pair in raw.chunks(2) {
        let mut word = [0; WORD];
        for (to, from) in word.chunks_mut(size_of::<RawFd>()).zip(pair) {
            to.copy_from_slice(&from.to_ne_bytes());
        }
        area.push(u64::from_ne_bytes(word));
    }
    area
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::eventfd::EventFd;
    use crate::os::socket::{Received, Stream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn pair() -> (Stream, Stream) {
        let (a, b) = UnixStream::pair().unwrap();
        (Stream::new(a).unwrap(), Stream::new(b).unwrap())
    }

    fn ledger() -> Ledger {
        Ledger::new(Placed::on_heap(WORDS).unwrap()).unwrap()
    }

    #[test]
    fn the_kernel_notes_what_it_has_moved() {
        let (near, far) = pair();
        let ledger = ledger();
        let mut buf = [0; 16];
        for round in 0..5u64 {
            assert_eq!((ledger.sent(), ledger.received()), (round * 5, round * 3));
            assert_eq!(ledger.send(near.as_fd(), b"hello", &[]), Ok(5));
            assert_eq!(ledger.receive(near.as_fd(), &mut buf), Err(Errno::EAGAIN));
            assert_eq!(ledger.received(), round * 3);
            far.send(b"you", &[]).unwrap();
            assert_eq!(ledger.receive(near.as_fd(), &mut buf), Ok(3));
            assert_eq!(&buf[..3], b"you");
        }
        let mut unread = [0; 64];
        let _ = far.receive(&mut unread, &mut Vec::new(), 0).unwrap();
        drop(far);
        assert_eq!(ledger.receive(near.as_fd(), &mut buf), Ok(0));
        assert_eq!(ledger.send(near.as_fd(), b"x", &[]), Err(Errno::EPIPE));
        assert_eq!((ledger.sent(), ledger.received()), (25, 15));
        ledger.clear();
        assert_eq!((ledger.sent(), ledger.received()), (0, 0));
    }

    #[test]
    fn a_full_socket_takes_a_part_and_that_is_noted() {
        let (near, _far) = pair();
        let ledger = ledger();
        let mut sent = 0;
        loop {
            match ledger.send(near.as_fd(), &[7; 100_000], &[]) {
                Ok(n) => sent += n as u64,
                Err(error) => {
                    assert_eq!(error, Errno::EAGAIN);
                    break;
                }
            }
            assert_eq!(ledger.sent(), sent);
        }
        assert_eq!(ledger.sent(), sent);
    }

    #[test]
    fn descriptors_go_along_and_those_that_are_not_wanted_are_closed() {
        let (near, far) = pair();
        let ledger = ledger();
        let events: Vec<_> = (0..3).map(|_| EventFd::new().unwrap()).collect();
        let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
        assert_eq!(ledger.send(near.as_fd(), b"abc", &fds), Ok(3));
        let mut got = Vec::new();
        let received = far.receive(&mut [0; 8], &mut got, 8);
        assert_eq!(received, Ok(Received::Bytes(3)));
        assert_eq!(got.len(), 3);
        EventFd::from_peer(got.remove(1)).unwrap().signal();
        assert_eq!(nix::unistd::read(&events[1], &mut [0; 8]), Ok(8));
        far.send(b"de", &fds).unwrap();
        assert_eq!(ledger.receive(near.as_fd(), &mut [0; 8]), Ok(2));
    }

    #[test]
    fn a_call_that_was_prepared_and_never_made_has_moved_nothing() {
        let (near, _far) = pair();
        let ledger = ledger();
        ledger.send(near.as_fd(), b"abcd", &[]).unwrap();
        // SAFETY: all zeroes are an empty header.
        let header = unsafe { zeroed() };
        ledger.prepare(SENT, &header).unwrap();
        assert_eq!(ledger.sent(), 4);
        // Half of a preparation: the entry that counts is untouched.
        let other = SENT + 1 + (1 - ledger.load(SENT) as usize) * ENTRY_WORDS;
        ledger.store(other, 77);
        assert_eq!(ledger.sent(), 4);
    }
}
