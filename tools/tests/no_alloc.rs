//! Requests through the driver allocate nothing once the queues run.

mod fake;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use fake::{Device as Fake, Log, Scratch};
use ferry_tools::driver::{Device, DmaMemory, Pages, Protocol, Setup};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

thread_local! {
    /// Allocations of this thread. The devices run in other threads and may allocate.
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes on to the system's allocator as it is.
#[expect(unsafe_code, reason = "counts allocations")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(address, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn ten_thousand_requests_with_kicks_and_interrupts_allocate_nothing() {
    for (protocol, io_events) in [
        (Protocol::VhostUser, false),
        (Protocol::VfioUser, false),
        (Protocol::VfioUser, true),
    ] {
        let dir = Scratch::new(&format!("alloc-{protocol:?}-{io_events}"));
        let socket = dir.0.join("s");
        let fake = Fake {
            io_events,
            ..Fake::default()
        };
        let server = match protocol {
            Protocol::VhostUser => fake::vhost_user::serve(&socket, fake, Log::default()),
            Protocol::VfioUser => fake::vfio_user::serve(&socket, fake, Log::default()),
        };
        let mut device = Device::connect(&socket, Some(protocol)).expect("a device");
        let setup = Setup::default();
        let needed = device.memory_needed(&setup) + 4096;
        let memory = Arc::new(DmaMemory::new(needed, Pages::Normal).expect("memory"));
        let mut queues = device.start(&setup, &memory).expect("a device that starts");
        let queue = &mut queues.requests[0];
        let request = memory.alloc(64, 8).expect("room");
        let reply = memory.alloc(64, 8).expect("room");

        let before = COUNT.get();
        let mut done = 0;
        while done < 10_000 {
            for cookie in 0..4 {
                let pieces = [request.part(0, 40), request.after(40)];
                queue.submit(&pieces, &[reply], cookie).expect("room");
            }
            queue.kick().expect("a device that listens");
            while queue.in_flight() > 0 {
                if !queue.enable_interrupts() {
                    let mut fds = [PollFd::new(queue.call_fd(), PollFlags::POLLIN)];
                    assert_eq!(poll(&mut fds, PollTimeout::from(10_000u16)), Ok(1));
                    queue.drain_interrupts();
                }
                while queue.pop().expect("sound").is_some() {
                    done += 1;
                }
            }
        }
        assert_eq!(COUNT.get(), before, "{protocol:?}");
        // Queues keep the connection, too.
        drop((device, queues));
        server.join().expect("the device had no complaints");
    }
}
