//! From one process to the next: what a former one has left is brought back, and everything is left to a later one.

use std::time::{Duration, Instant};

use ferry_shared::msg::FsdevSpec;

use super::{DeviceV1, Next, Service, device_key, fsdev_key};
use crate::id::DeviceId;

impl Service {
    /// Brings back what a former process has left, and goes on where it stood.
    pub fn restore(&mut self) {
        for name in self.keeper.keys("fsdev/") {
            let spec: Option<FsdevSpec> = self.keeper.load(&fsdev_key(&name));
            if let Some(spec) = spec.filter(|spec| spec.name == name && spec.check().is_ok()) {
                self.fsdevs.insert(name, spec);
            }
        }
        self.restore_ports();
        let ids = self.keeper.keys("device/");
        let mut ids: Vec<u32> = ids.iter().filter_map(|id| id.parse().ok()).collect();
        ids.sort_unstable();
        for id in ids.into_iter().map(DeviceId) {
            self.last_id = self.last_id.max(id.0);
            let Some(DeviceV1 { spec, paused, .. }) = self.keeper.load(&device_key(id)) else {
                continue;
            };
            let name = spec.name.clone();
            let checked = spec.check().and_then(|()| self.check_start(&spec));
            if let Err(failure) = checked.and_then(|()| self.open(id, spec, paused)) {
                tracing::error!(
                    device = name,
                    errno = %failure.errno,
                    detail = failure.detail,
                    "cannot go on with a device of the former process; it is closed"
                );
                self.keeper.forget(&device_key(id));
            }
        }
        self.keeper.fds().discard_rest();
        self.settle();
    }

    /// Ends. With a service manager that keeps everything, a later process goes on with the devices; otherwise they are
    /// closed.
    pub fn shut_down(mut self) {
        self.keeper.fds().stopping();
        if self.keeper.is_on() {
            return self.hand_over();
        }
        for device in &mut self.devices {
            device.next = Some(Next::Close { seq: None });
            device.transport.begin_close(&mut self.cores);
        }
        self.wait_for_cores(|service| service.devices.is_empty());
        if self.devices.is_empty() {
            self.cores.shut_down();
        }
    }

    /// Completes what is in flight, and leaves everything as it is.
    fn hand_over(mut self) {
        let began = Instant::now();
        for device in &mut self.devices {
            device.transport.pause(&mut self.cores);
        }
        self.wait_for_cores(|service| service.devices.iter().all(|d| d.transport.is_paused()));
        let late = self.devices.iter().filter(|d| !d.transport.is_paused());
        for device in late {
            tracing::warn!(
                device = device.spec.name,
                "requests are still in flight; they are executed again by the next process"
            );
        }
        let ms = began.elapsed().as_millis();
        tracing::info!(devices = self.devices.len(), ms, "left to the next process");
        // The next process makes its own claim.
        let _ = self.lock_cpus(false);
        // Nothing is closed or removed: the next process has the same sockets.
        std::mem::forget(self);
    }

    /// Takes what the cores report until `done`. Requests on a file system that never answers cannot be waited for; the
    /// kernel ends them with the process.
    fn wait_for_cores(&mut self, done: impl Fn(&Service) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut ready = Vec::new();
        while !done(self) && Instant::now() < deadline {
            let timeout = if self.cores.prepare_sleep() { 100 } else { 0 };
            let _ = self.poller.wait(&mut ready, timeout);
            self.cores.awake();
            self.drain_cores();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::{VERSION, encode};
    use ferry_shared::msg::{Attach, DeviceSpec, Platform, PlugState};

    #[test]
    fn the_form_of_a_devices_record_belongs_to_the_version_of_records() {
        let spec = DeviceSpec {
            name: "vfsdev0".into(),
            attach: Attach::VhostUser,
            tag: "docatag".into(),
            num_request_queues: 2,
            queue_size: 64,
            fsdev: "aio0".into(),
            packed_vq: false,
            notification_vq: false,
            driver_platform: Platform::Native,
        };
        let record = DeviceV1 {
            spec,
            paused: true,
            plug: PlugState::PowerOn,
        };
        // Whoever changes the record has to raise the version, and then both numbers here.
        assert_eq!((VERSION, encode(&record).len()), (2, 30));
    }
}
