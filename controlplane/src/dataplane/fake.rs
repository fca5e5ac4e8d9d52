//! A data plane for tests: has what it is given, agrees to everything it is not told to refuse.

use core::cell::Cell;
use core::cell::RefCell;
use std::rc::Rc;

use ferry_shared::msg::Command;
use ferry_shared::msg::Failure;
use ferry_shared::msg::Function;
use ferry_shared::msg::Item;
use ferry_shared::msg::Manager;
use ferry_shared::msg::PlugState;
use ferry_shared::msg::PoolSpec;
use ferry_shared::msg::Reply;
use ferry_shared::msg::Scheduler;
use ferry_shared::msg::Service;
use ferry_shared::msg::Tuning;

use super::Link;
use super::Outcome;

pub(crate) const VUID: &str = "MT2251XZ02WZVFSS0D0F3";

/// A platform with one manager and one function, in pages of one item.
#[derive(Default)]
pub(crate) struct FakeLink {
    /// Commands that have arrived, snapshots apart.
    pub(crate) commands: RefCell<Vec<Command>>,
    /// How the next command is refused.
    pub(crate) refusal: RefCell<Option<Failure>>,
    /// What exists beyond the platform.
    pub(crate) existing: Vec<Item>,
    /// Trace points that are on.
    pub(crate) traced: Cell<u64>,
}

pub(crate) const POOLS: PoolSpec = PoolSpec {
    slots: 256,
    buffers: 32,
};

pub(crate) fn platform() -> Vec<Item> {
    vec![
        Item::Service(Service {
            version: "0.1.0".to_owned(),
            pid: 1,
            cores: vec![0],
            run_dir: "/run/ferry".to_owned(),
        }),
        Item::Manager(Manager {
            name: "mlx5_0".to_owned(),
            hotplug_ports: 0,
            host_link: None,
        }),
        Item::Function(Function {
            manager: "mlx5_0".to_owned(),
            vuid: VUID.to_owned(),
            pci_address: "0000:29:00.2".to_owned(),
            port: None,
            plug: PlugState::PowerOn,
            socket: format!("/run/ferry/pci/{VUID}.sock"),
        }),
    ]
}

impl FakeLink {
    pub(crate) fn new() -> Rc<FakeLink> {
        Rc::default()
    }

    pub(crate) fn answer(&self, command: Command) -> Result<Reply, Failure> {
        if let Command::Snapshot { from } = command {
            let all: Vec<Item> = platform()
                .into_iter()
                .chain(self.existing.iter().cloned())
                .collect();
            let next = from + 1;
            let more = (next as usize) < all.len();
            let items = all.into_iter().skip(from as usize).take(1).collect();
            return Ok(Reply::Snapshot {
                items,
                next: more.then_some(next),
            });
        }
        match &command {
            Command::Tuning => {
                return Ok(Reply::Tuning(Tuning {
                    pools: POOLS,
                    arena_bytes: 8 << 20,
                    hugepages: false,
                    scheduler: Scheduler::Static,
                    trace_file: "/proc/1/fd/3".to_owned(),
                    trace_mask: self.traced.get(),
                    cpu_locks: false,
                    context_switches: false,
                }));
            }
            Command::SetTrace { mask } => self.traced.set(*mask),
            _ => {}
        }
        self.commands.borrow_mut().push(command);
        match self.refusal.borrow_mut().take() {
            Some(failure) => Err(failure),
            None => Ok(Reply::Done),
        }
    }
}

impl Link for FakeLink {
    fn call(&self, command: Command) -> Outcome {
        let answer = self.answer(command);
        Box::pin(async move { answer })
    }
}
