//! Fuzz targets as plain functions: libFuzzer runs them through `fuzz_targets/`, and a test replays the committed seeds in
//! `corpus/` through them on stable Rust. A target panics when a rule is broken and returns otherwise.

mod cores;
mod device;
pub mod fuse;
pub mod platform;
pub mod queue;
pub mod rings;
pub mod rpc;
pub mod vfio_user;
pub mod vhost_user;

/// A fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its folder in `corpus/`.
    pub name: &'static str,
    /// Runs one input.
    pub run: fn(&[u8]),
}

/// Every target.
pub const TARGETS: &[Target] = &[
    Target {
        name: "fuse_parse",
        run: fuse::parse,
    },
    Target {
        name: "fuse_ops",
        run: fuse::ops,
    },
    Target {
        name: "split",
        run: queue::split,
    },
    Target {
        name: "packed",
        run: queue::packed,
    },
    Target {
        name: "vfio_user",
        run: vfio_user::commands,
    },
    Target {
        name: "vhost_user",
        run: vhost_user::messages,
    },
    Target {
        name: "control_rings",
        run: rings::control,
    },
    Target {
        name: "rpc",
        run: rpc::stream,
    },
    Target {
        name: "configuration",
        run: rpc::configuration,
    },
    Target {
        name: "state",
        run: rpc::state,
    },
    Target {
        name: "platform",
        run: platform::file,
    },
];
