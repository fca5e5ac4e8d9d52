//! The two requests of a session that the bridge handles itself, one at a time: INIT, whose reply decides how large the
//! workers' buffers must be, and DESTROY, which the kernel does not send for this kind of mount.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferry_dataplane::fuse::abi::{
    FUSE_DESTROY, FUSE_INIT, fuse_in_header, fuse_init_in, fuse_init_out, fuse_out_header,
};
use ferry_shared::errno::Errno as FuseErrno;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;
use zerocopy::{FromBytes, IntoBytes};

use super::request::{self, IN_HEADER, OUT_HEADER};
use super::slots::Slots;
use crate::driver::{Device, DmaMemory, DmaSlice, Queue};

/// How long the device may take for INIT.
const INIT_PATIENCE: Duration = Duration::from_secs(30);
/// How long it may take for DESTROY, after which it is reset anyway.
const DESTROY_PATIENCE: Duration = Duration::from_secs(10);
const INIT_LEN: usize = IN_HEADER + size_of::<fuse_init_in>();
const INIT_REPLY_LEN: usize = OUT_HEADER + size_of::<fuse_init_out>();

/// What else to look at while waiting for the device.
pub(super) struct Watch<'a> {
    pub(super) signals: &'a SignalFd,
    pub(super) device: &'a Device,
}

/// Takes the kernel's INIT to the device and the reply back. Returns the largest transfer that may follow, at most `room`
/// bytes.
pub(super) fn init(
    fuse: &OwnedFd,
    queue: &mut Queue,
    memory: &DmaMemory,
    room: usize,
    watch: &Watch<'_>,
) -> Result<usize> {
    let mut slots = Slots::new(memory, 1, 0).context("no memory for INIT")?;
    let slot = slots.take().context("no slot for INIT")?;
    let buffer = slots.request(slot);
    wait_for(fuse.as_fd(), watch, INIT_PATIENCE).context("waiting for the kernel's INIT")?;
    let len = memory
        .read_from(fuse.as_fd(), buffer)
        .context("cannot read the kernel's INIT")?;
    let mut bytes = [0u8; INIT_LEN];
    let bytes = &mut bytes[..len.min(INIT_LEN)];
    memory.read(buffer, bytes);
    let header = request::header(bytes).context("the kernel's first request is too short")?;
    ensure!(
        header.opcode == FUSE_INIT,
        "the kernel's first request is not INIT but {}",
        header.opcode
    );
    request::filter_init(bytes);
    memory.write(buffer, bytes);

    let reply = slots
        .reply(slot, len, INIT_REPLY_LEN)
        .context("no room for the reply to INIT")?;
    let written = exchange(queue, buffer.part(0, len), reply, INIT_PATIENCE, watch)
        .context("the device did not take INIT")?;
    let mut answer = [0u8; INIT_REPLY_LEN];
    memory.read(reply, &mut answer);
    let out = fuse_out_header::read_from_bytes(&answer[..OUT_HEADER]).ok();
    let out = out
        .filter(|out| {
            out.unique == header.unique && (OUT_HEADER..=written).contains(&(out.len as usize))
        })
        .context("the device's reply to INIT is malformed")?;
    if out.error != 0 {
        let errno = FuseErrno::from_raw(out.error.saturating_neg());
        refuse_init(fuse, header.unique, errno);
        bail!("the device refuses the session: {errno}; has it a file system behind it?");
    }
    let answer = &mut answer[..out.len as usize];
    let largest = request::filter_init_reply(answer, room);
    nix::unistd::write(fuse, answer)
        .context("the kernel does not take the device's reply to INIT")?;
    Ok(largest)
}

/// Lets the kernel know, so that nobody waits for the mount to become usable.
fn refuse_init(fuse: &OwnedFd, unique: u64, errno: FuseErrno) {
    let reply = request::error_reply(unique, errno.raw());
    let _ = nix::unistd::write(fuse, reply.as_bytes());
}

/// Ends the session.
pub(super) fn destroy(
    queue: &mut Queue,
    slots: &mut Slots,
    memory: &DmaMemory,
    watch: &Watch<'_>,
) -> Result<()> {
    let slot = slots.take().context("all requests are in flight")?;
    let header = fuse_in_header {
        len: IN_HEADER as u32,
        opcode: FUSE_DESTROY,
        unique: u64::MAX - 1,
        ..fuse_in_header::default()
    };
    let request = slots.request(slot).part(0, IN_HEADER);
    memory.write(request, header.as_bytes());
    let reply = slots
        .reply(slot, IN_HEADER, OUT_HEADER)
        .context("no room for the reply to DESTROY")?;
    exchange(queue, request, reply, DESTROY_PATIENCE, watch)?;
    Ok(())
}

/// Sends one request and waits for its reply; returns the bytes written. Completions of other requests are dropped.
fn exchange(
    queue: &mut Queue,
    request: DmaSlice,
    reply: DmaSlice,
    patience: Duration,
    watch: &Watch<'_>,
) -> Result<usize> {
    /// No slot has this cookie.
    const COOKIE: u64 = u64::MAX;
    queue.submit(&[request], &[reply], COOKIE)?;
    queue.kick()?;
    let deadline = Instant::now() + patience;
    loop {
        while let Some(done) = queue.pop()? {
            if done.cookie == COOKIE {
                queue.disable_interrupts();
                return Ok(done.len as usize);
            }
        }
        if queue.enable_interrupts() {
            continue;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        wait_for(queue.call_fd(), watch, left)?;
        queue.drain_interrupts();
    }
}

/// Waits until `fd` is readable; fails when the device goes, when a signal comes, and when it takes too long.
fn wait_for(fd: BorrowedFd<'_>, watch: &Watch<'_>, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [
            PollFd::new(fd, PollFlags::POLLIN),
            PollFd::new(watch.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(watch.device.hangup_fd(), PollFlags::POLLIN),
        ];
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let found = match poll(&mut fds, left) {
            Ok(found) => found,
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(e).context("cannot wait for the device"),
        };
        ensure!(found > 0, "no answer for {} s", patience.as_secs());
        let ready = fds.map(|fd| fd.any().unwrap_or(true));
        if ready[0] {
            return Ok(());
        }
        ensure!(!ready[1], "stopped by a signal");
        ensure!(
            !(ready[2] && watch.device.is_gone()),
            "the device has gone away"
        );
    }
}
