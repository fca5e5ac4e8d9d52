//! What of the model is kept on disk, and a model made of it.
//!
//! Requests under way count as not made: they have not been acknowledged. What is read is checked like what an operator
//! asks for, so a file that an older version has written cannot bring the model into a state that has no rules.

use ferry_shared::errno::Errno;
use ferry_shared::export::Cache;
use ferry_shared::export::ExportSpec;
use ferry_shared::export::IdMap;
use ferry_shared::export::OVERFLOW_ID;
use ferry_shared::export::Squash;
use ferry_shared::export::XattrMap;
use ferry_shared::msg;
use ferry_shared::msg::AioSpec;
use ferry_shared::msg::Attach;
use ferry_shared::msg::Balance;
use ferry_shared::msg::DeviceSpec;
use ferry_shared::msg::Failure;
use ferry_shared::msg::FsdevKind;
use ferry_shared::msg::FsdevSpec;
use ferry_shared::msg::Scheduler;

use super::Changes;
use super::Device;
use super::DeviceState;
use super::Fsdev;
use super::FsdevOptions;
use super::HotplugFunction;
use super::Live;
use super::Manager;
use super::Model;
use super::TransportKind;
use super::Wishes;
use super::fsdev::FsdevState;
use super::parse_placement;
use super::placement_name;
use super::refuse;
use crate::state::DeviceStateV1;
use crate::state::DeviceV1;
use crate::state::ExportV1;
use crate::state::FsdevKindV1;
use crate::state::FsdevV1;
use crate::state::FunctionV1;
use crate::state::ManagerV1;
use crate::state::OptionsV1;
use crate::state::SchedulerV1;
use crate::state::StateV1;
use crate::state::TransportV1;
use crate::state::WishesV1;

impl Model {
    /// What is to be kept.
    pub fn stored(&self) -> StateV1 {
        let Model {
            // The data plane's to tell.
            platform: _,
            transports,
            managers,
            devices,
            fsdevs: _,
            options,
            functions,
            wishes,
        } = self;
        StateV1 {
            options: OptionsV1 {
                fsdev_io_pool_size: options.io_pool_size,
                fsdev_io_cache_size: options.io_cache_size,
            },
            fsdevs: self.fsdevs().map(store_fsdev).collect(),
            transports: transports
                .iter()
                .map(|transport| TransportV1 {
                    name: transport.kind.name().to_owned(),
                    started: transport.started,
                })
                .collect(),
            managers: managers
                .iter()
                .map(|manager| ManagerV1 {
                    name: manager.name.clone(),
                    implicit: manager.implicit,
                })
                .collect(),
            functions: functions
                .iter()
                .map(|function| FunctionV1 {
                    manager: function.manager.clone(),
                    vuid: function.vuid.clone(),
                })
                .collect(),
            devices: devices.iter().map(store_device).collect(),
            disabled: Vec::new(),
            wishes: store_wishes(wishes),
        }
    }

    /// A model of what was kept. The data plane is taken to have what it had; [`Model::adopt`] sees to the truth.
    pub fn restore(state: StateV1) -> Result<Model, Failure> {
        let StateV1 {
            options,
            fsdevs,
            transports,
            managers,
            functions,
            devices,
            // The process's to know.
            disabled: _,
            wishes,
        } = state;
        let mut model = Model {
            wishes: restore_wishes(wishes)?,
            options: FsdevOptions {
                io_pool_size: options.fsdev_io_pool_size,
                io_cache_size: options.fsdev_io_cache_size,
            },
            ..Model::default()
        };
        for transport in transports {
            model.transport_create(&transport.name)?;
            if let Some(last) = model.transports.last_mut() {
                last.started = transport.started;
            }
        }
        for manager in managers {
            model.restore_manager(manager)?;
        }
        for function in functions {
            model.restore_function(function)?;
        }
        for fsdev in fsdevs {
            model.restore_fsdev(fsdev)?;
        }
        for device in devices {
            model.restore_device(device)?;
        }
        Ok(model)
    }

    fn restore_manager(&mut self, stored: ManagerV1) -> Result<(), Failure> {
        let ManagerV1 { name, implicit } = stored;
        msg::check_name("manager", &name)?;
        if self.has_manager(&name) {
            return refuse(Errno::EEXIST, format!("manager {name} is there twice"));
        }
        self.managers.push(Manager { name, implicit });
        Ok(())
    }

    fn restore_function(&mut self, stored: FunctionV1) -> Result<(), Failure> {
        let FunctionV1 { manager, vuid } = stored;
        msg::check_name("manager", &manager)?;
        if self.will_have(&manager, &vuid) {
            return refuse(Errno::EEXIST, format!("function {vuid} is there twice"));
        }
        self.functions.push(HotplugFunction { manager, vuid });
        Ok(())
    }

    fn restore_fsdev(&mut self, stored: FsdevV1) -> Result<(), Failure> {
        let spec = FsdevSpec {
            name: stored.name,
            kind: restore_kind(stored.kind)?,
        };
        spec.check()?;
        if self.fsdev(&spec.name).is_ok() {
            return refuse(Errno::EEXIST, format!("fsdev {} is there twice", spec.name));
        }
        self.fsdevs.push(Fsdev {
            spec,
            state: FsdevState::Present,
        });
        Ok(())
    }

    fn restore_device(&mut self, stored: DeviceV1) -> Result<(), Failure> {
        let DeviceV1 {
            name,
            transport,
            state,
            tag,
            fsdev,
            num_request_queues,
            queue_size,
            packed_vq,
            notification_vq,
            driver_platform,
            manager,
            vuid,
        } = stored;
        let changes = Changes {
            tag,
            fsdev,
            num_request_queues: Some(num_request_queues),
            queue_size: Some(queue_size),
            packed_vq: Some(packed_vq),
            notification_vq: Some(notification_vq),
            driver_platform: Some(driver_platform),
        };
        self.device_create(&transport, &name, changes)?;
        if manager.is_some() || vuid.is_some() {
            self.doca_device_modify(&name, manager, vuid)?;
        }
        let Some(device) = self.device_mut(&name) else {
            return Ok(());
        };
        let paused = match state {
            DeviceStateV1::Idle => return Ok(()),
            DeviceStateV1::Running => false,
            DeviceStateV1::Stopped => true,
        };
        let spec = started_with(device)?;
        spec.check()?;
        device.wanted = !paused;
        device.live = Some(Live {
            spec,
            paused,
            connected: false,
            mounted: false,
        });
        Ok(())
    }
}

/// What a device was started with, as far as its properties tell.
fn started_with(device: &Device) -> Result<DeviceSpec, Failure> {
    let lacks = |what: &str| {
        let detail = format!("device {} is started and has no {what}", device.name);
        Failure::new(Errno::EINVAL, detail)
    };
    let attach = match device.transport {
        TransportKind::VhostUser => Attach::VhostUser,
        TransportKind::Doca => Attach::Doca {
            manager: device.manager.clone().ok_or_else(|| lacks("manager"))?,
            vuid: device.vuid.clone().ok_or_else(|| lacks("vuid"))?,
        },
    };
    Ok(DeviceSpec {
        name: device.name.clone(),
        attach,
        tag: device.tag.clone().ok_or_else(|| lacks("tag"))?,
        num_request_queues: device.num_request_queues,
        queue_size: device.queue_size,
        fsdev: device.fsdev.clone().ok_or_else(|| lacks("fsdev"))?,
        packed_vq: device.packed_vq,
        notification_vq: device.notification_vq,
        driver_platform: device.driver_platform,
    })
}

fn store_wishes(wishes: &Wishes) -> WishesV1 {
    WishesV1 {
        small_pool_count: wishes.slots,
        large_pool_count: wishes.buffers,
        scheduler: wishes.scheduler.map(|scheduler| match scheduler {
            Scheduler::Static => SchedulerV1::Static {},
            Scheduler::Dynamic(Balance {
                period_us,
                load_limit,
                core_limit,
                core_busy,
            }) => SchedulerV1::Dynamic {
                period_us,
                load_limit,
                core_limit,
                core_busy,
            },
        }),
    }
}

fn restore_wishes(stored: WishesV1) -> Result<Wishes, Failure> {
    let scheduler = stored.scheduler.map(|scheduler| match scheduler {
        SchedulerV1::Static {} => Scheduler::Static,
        SchedulerV1::Dynamic {
            period_us,
            load_limit,
            core_limit,
            core_busy,
        } => Scheduler::Dynamic(Balance {
            period_us,
            load_limit,
            core_limit,
            core_busy,
        }),
    });
    if let Some(scheduler) = scheduler {
        scheduler.check()?;
    }
    Ok(Wishes {
        slots: stored.small_pool_count,
        buffers: stored.large_pool_count,
        scheduler,
    })
}

fn store_fsdev(fsdev: &Fsdev) -> FsdevV1 {
    let kind = match &fsdev.spec.kind {
        FsdevKind::Null => FsdevKindV1::Null {},
        FsdevKind::Passthru { base } => FsdevKindV1::Passthru { base: base.clone() },
        FsdevKind::Aio(aio) => {
            let AioSpec {
                root_path,
                enable_xattr,
                enable_writeback_cache,
                max_xfer_size,
                max_readahead,
                skip_rw,
                metadata,
                export,
            } = aio;
            FsdevKindV1::Aio {
                root_path: root_path.clone(),
                enable_xattr: *enable_xattr,
                enable_writeback_cache: *enable_writeback_cache,
                max_xfer_size: *max_xfer_size,
                max_readahead: *max_readahead,
                skip_rw: *skip_rw,
                attr_valid_ms: export.attr_valid_ms,
                metadata: placement_name(*metadata).to_owned(),
                export: Box::new(store_export(export)),
            }
        }
    };
    FsdevV1 {
        name: fsdev.spec.name.clone(),
        kind,
    }
}

fn store_export(export: &ExportSpec) -> ExportV1 {
    ExportV1 {
        cache: Some(export.cache.name().to_owned()),
        entry_valid_ms: export.entry_valid_ms,
        negative_valid_ms: export.negative_valid_ms,
        read_only: export.read_only,
        map_uid: export.map_uid.to_string(),
        map_gid: export.map_gid.to_string(),
        squash: Some(export.squash.name().to_owned()),
        anon_uid: Some(export.anon_uid),
        anon_gid: Some(export.anon_gid),
        xattr_map: export.xattr_map.to_string(),
    }
}

fn restore_export(export: ExportV1, attr_valid_ms: Option<u32>) -> Result<ExportSpec, Failure> {
    Ok(ExportSpec {
        cache: export
            .cache
            .as_deref()
            .map_or(Ok(Cache::default()), Cache::parse)?,
        attr_valid_ms,
        entry_valid_ms: export.entry_valid_ms,
        negative_valid_ms: export.negative_valid_ms,
        read_only: export.read_only,
        map_uid: IdMap::parse("map_uid", &export.map_uid)?,
        map_gid: IdMap::parse("map_gid", &export.map_gid)?,
        squash: export
            .squash
            .as_deref()
            .map_or(Ok(Squash::None), Squash::parse)?,
        anon_uid: export.anon_uid.unwrap_or(OVERFLOW_ID),
        anon_gid: export.anon_gid.unwrap_or(OVERFLOW_ID),
        xattr_map: XattrMap::parse(&export.xattr_map)?,
    })
}

fn restore_kind(kind: FsdevKindV1) -> Result<FsdevKind, Failure> {
    Ok(match kind {
        FsdevKindV1::Null {} => FsdevKind::Null,
        FsdevKindV1::Passthru { base } => FsdevKind::Passthru { base },
        FsdevKindV1::Aio {
            root_path,
            enable_xattr,
            enable_writeback_cache,
            max_xfer_size,
            max_readahead,
            skip_rw,
            attr_valid_ms,
            metadata,
            export,
        } => FsdevKind::Aio(AioSpec {
            root_path,
            enable_xattr,
            enable_writeback_cache,
            max_xfer_size,
            max_readahead,
            skip_rw,
            metadata: parse_placement(&metadata)?,
            export: restore_export(*export, attr_valid_ms)?,
        }),
    })
}

fn store_device(device: &Device) -> DeviceV1 {
    let state = match device.state() {
        DeviceState::Stopped => DeviceStateV1::Stopped,
        DeviceState::Idle | DeviceState::Running if device.wanted => DeviceStateV1::Running,
        DeviceState::Idle | DeviceState::Running => DeviceStateV1::Idle,
    };
    DeviceV1 {
        name: device.name.clone(),
        transport: device.transport.name().to_owned(),
        state,
        tag: device.tag.clone(),
        fsdev: device.fsdev.clone(),
        num_request_queues: device.num_request_queues,
        queue_size: device.queue_size,
        packed_vq: device.packed_vq,
        notification_vq: device.notification_vq,
        driver_platform: device.platform_name().to_owned(),
        manager: device.manager.clone(),
        vuid: device.vuid.clone(),
    }
}

#[cfg(test)]
mod tests;
