//! Methods about how the data plane works: pools, the placement of queues, claims on CPUs, what it shows of itself.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::rc::Rc;

use ferry_shared::counters::CoreCounter;
use ferry_shared::cpumask::CpuMask;
use ferry_shared::errno::Errno;
use ferry_shared::limits;
use ferry_shared::msg::Balance;
use ferry_shared::msg::Command;
use ferry_shared::msg::Failure;
use ferry_shared::msg::PciDevice;
use ferry_shared::msg::Reply;
use ferry_shared::msg::Scheduler;
use ferry_shared::msg::Tuning;
use serde_json::Value;
use serde_json::json;

use super::RpcError;
use super::decode::Args;
use super::stats;
use super::table::Answer;
use crate::app::App;
use crate::model::Wishes;

const TRUE: Value = Value::Bool(true);

/// Bytes of a small buffer: a request's arguments and its reply, as far as they fit the slot.
const SMALL_BUFFER: u32 = (limits::SLOT_INPUT + limits::SLOT_OUTPUT) as u32;

fn invalid(text: impl Into<String>) -> RpcError {
    RpcError::new(RpcError::INVALID_PARAMS, text)
}

fn internal(text: impl Into<String>) -> RpcError {
    RpcError::new(RpcError::INTERNAL_ERROR, text)
}

// ---- scheduler ----

fn scheduler(args: &Args) -> Result<Scheduler, RpcError> {
    let default = Balance::default();
    let percent = |name: &str, default: u8| match args.number(name) {
        None => Ok(default),
        Some(number) => u8::try_from(number).map_err(|_| {
            invalid(format!(
                "Invalid parameters: {name} {number} is more than 100 per cent"
            ))
        }),
    };
    let scheduler = match args.required("name") {
        "static" => Scheduler::Static,
        "dynamic" => Scheduler::Dynamic(Balance {
            period_us: args.big("period").unwrap_or(default.period_us),
            load_limit: percent("load_limit", default.load_limit)?,
            core_limit: percent("core_limit", default.core_limit)?,
            core_busy: percent("core_busy", default.core_busy)?,
        }),
        other => {
            return Err(internal(format!(
                "Invalid argument: there is no scheduler {other:?}; the schedulers are static and dynamic"
            )));
        }
    };
    let refused = |failure: Failure| invalid(format!("Invalid parameters: {}", failure.detail));
    scheduler.check().map_err(refused)?;
    Ok(scheduler)
}

pub(super) fn framework_set_scheduler(app: Rc<App>, args: Args) -> Answer {
    Box::pin(async move {
        let scheduler = scheduler(&args)?;
        if app.is_linked() {
            app.send(Command::SetScheduler(scheduler)).await?;
        }
        let mut model = app.model_mut();
        let wishes = model.wishes();
        model.wish(Wishes {
            scheduler: Some(scheduler),
            ..wishes
        });
        Ok(TRUE)
    })
}

pub(super) fn framework_get_scheduler(app: Rc<App>, _: Args) -> Answer {
    Box::pin(async move {
        let tuning = app.tuning().await?;
        let first = app.counters()?.reader().core(0, CoreCounter::Cpu);
        let mut answer = json!({"scheduler_name": tuning.scheduler.name(), "scheduler_period": 0,
            "isolated_core_mask": "0", "scheduling_core": first});
        if let Scheduler::Dynamic(balance) = tuning.scheduler {
            answer["scheduler_period"] = json!(balance.period_us);
            answer["load_limit"] = json!(balance.load_limit);
            answer["core_limit"] = json!(balance.core_limit);
            answer["core_busy"] = json!(balance.core_busy);
        }
        Ok(answer)
    })
}

/// The requests that rebuild the subsystem.
pub(super) fn scheduler_config(app: &App) -> Vec<Value> {
    let scheduler = app.model().wishes().scheduler.unwrap_or_default();
    let mut params = json!({"name": scheduler.name()});
    if let Scheduler::Dynamic(balance) = scheduler {
        params["period"] = json!(balance.period_us);
        params["load_limit"] = json!(balance.load_limit);
        params["core_limit"] = json!(balance.core_limit);
        params["core_busy"] = json!(balance.core_busy);
    }
    vec![json!({"method": "framework_set_scheduler", "params": params})]
}

/// A thread is a core, which stays where it is, or a queue, which moves.
pub(super) fn thread_set_cpumask(app: Rc<App>, args: Args) -> Answer {
    Box::pin(async move {
        let text = args.required("cpumask");
        let wrong = || internal(format!("Invalid cpumask {text}"));
        let cpus = text.parse::<CpuMask>().map_err(|_| wrong())?.cpus();
        let id = args.big("id").unwrap_or_default();
        let none = || invalid(format!("Thread {id} does not exist"));
        let thread = u32::try_from(id).map_err(|_| none())?;
        let cores = stats::cpus(&app)?;
        if !cores.iter().any(|cpu| cpus.contains(cpu)) {
            let text = format!(
                "No CPU is selected from reactor mask {}\n",
                stats::mask_of(&cores)
            );
            return Err(internal(text));
        }
        let own = thread
            .checked_sub(1)
            .and_then(|core| cores.get(core as usize));
        if let Some(cpu) = own {
            if cpus.contains(cpu) {
                return Ok(TRUE);
            }
            let text = format!(
                "thread {id} is the core on CPU {cpu} itself, which stays there; move its queues, which are threads too"
            );
            return Err(internal(text));
        }
        match app.send(Command::PlaceThread { thread, cpus }).await {
            Ok(_) => Ok(TRUE),
            Err(Failure {
                errno: Errno::ESRCH,
                ..
            }) => Err(none()),
            Err(failure) => Err(RpcError::with_code(RpcError::INTERNAL_ERROR, failure)),
        }
    })
}

// ---- pools ----

/// A count of buffers, if one was given.
fn count(args: &Args, name: &str, least: u32) -> Result<Option<u32>, Failure> {
    let Some(given) = args.big(name) else {
        return Ok(None);
    };
    match u32::try_from(given) {
        Ok(count) if count >= least => Ok(Some(count)),
        _ => {
            let detail = format!("{name} {given} is outside {least} to {}", u32::MAX);
            Err(Failure::new(Errno::EINVAL, detail))
        }
    }
}

/// Refuses a size of buffers that they do not have; they are never smaller than they have to be.
fn check_size(args: &Args, name: &str, least: u32, most: u32) -> Result<(), Failure> {
    match args.number(name) {
        Some(size) if size < least || size > most => {
            let detail = format!("{name} {size} is outside {least} to {most}");
            Err(Failure::new(Errno::EINVAL, detail))
        }
        _ => Ok(()),
    }
}

/// Small buffers are the request slots, large ones the data buffers. Their sizes are fixed, so smaller ones are granted.
pub(super) fn iobuf_set_options(app: Rc<App>, args: Args) -> Answer {
    Box::pin(async move {
        let slots = count(&args, "small_pool_count", limits::MIN_SLOTS)?;
        let buffers = count(&args, "large_pool_count", limits::MIN_BUFFERS)?;
        check_size(&args, "small_bufsize", 4096, SMALL_BUFFER)?;
        check_size(&args, "large_bufsize", 8192, limits::MAX_DATA_BUFFER)?;
        if args.flag("enable_numa").unwrap_or(false) {
            let detail = "the pools are not divided among NUMA nodes: each core has its own";
            return Err(Failure::new(Errno::EOPNOTSUPP, detail).into());
        }
        let before = app.model().wishes();
        let wishes = Wishes {
            slots: slots.or(before.slots),
            buffers: buffers.or(before.buffers),
            ..before
        };
        if app.is_linked() {
            let pools = wishes.pools(app.tuning().await?.pools);
            app.send(Command::SetPools(pools)).await?;
        }
        app.model_mut().wish(wishes);
        Ok(TRUE)
    })
}

/// The requests that rebuild the subsystem.
pub(super) fn iobuf_config(app: &App) -> Vec<Value> {
    let wishes = app.model().wishes();
    let mut params = serde_json::Map::new();
    for (name, count) in [
        ("small_pool_count", wishes.slots),
        ("large_pool_count", wishes.buffers),
    ] {
        if let Some(count) = count {
            params.insert(name.to_owned(), json!(count));
        }
    }
    if params.is_empty() {
        return Vec::new();
    }
    vec![json!({"method": "iobuf_set_options", "params": params})]
}

// ---- CPUs ----

pub(super) fn enable_cpumask_locks(app: Rc<App>, _: Args) -> Answer {
    lock_cpus(app, true)
}

pub(super) fn disable_cpumask_locks(app: Rc<App>, _: Args) -> Answer {
    lock_cpus(app, false)
}

fn lock_cpus(app: Rc<App>, lock: bool) -> Answer {
    Box::pin(async move {
        let outcome = app.send(Command::LockCpus { lock }).await;
        outcome.map_err(|failure| match failure.errno {
            Errno::ENODEV => failure.into(),
            _ => internal(failure.detail),
        })?;
        Ok(TRUE)
    })
}

pub(super) fn monitor_context_switch(app: Rc<App>, args: Args) -> Answer {
    Box::pin(async move {
        if let Some(count) = args.flag("enabled") {
            app.send(Command::CountContextSwitches { count }).await?;
        }
        Ok(json!({"enabled": app.tuning().await?.context_switches}))
    })
}

// ---- what the data plane shows of itself ----

fn describe_pci(device: &PciDevice) -> Value {
    let mut config = String::with_capacity(2 * device.config.len());
    for byte in &device.config {
        // Writing to a string cannot fail.
        let _ = write!(config, "{byte:02x}");
    }
    json!({"address": device.address, "type": "virtio_fs", "config_space": config, "vuid": device.vuid,
        "device": device.device})
}

/// The functions that a host sees: those on which a device is started.
pub(super) fn get_pci_devices(app: Rc<App>, _: Args) -> Answer {
    Box::pin(async move {
        let mut all = Vec::new();
        let mut from = 0;
        loop {
            let reply = app.send(Command::PciDevices { from }).await?;
            let Reply::PciDevices { devices, next } = reply else {
                let detail = "the data plane has answered with something else than its PCI devices";
                return Err(Failure::new(Errno::EPROTO, detail).into());
            };
            all.extend(devices.iter().map(describe_pci));
            match next {
                Some(next) if next > from => from = next,
                _ => return Ok(Value::Array(all)),
            }
        }
    })
}

/// Writes a file that nobody else has prepared.
fn write_dump(text: &str) -> io::Result<PathBuf> {
    let dir = std::env::temp_dir();
    let path = dir.join(format!("ferry_mem_dump.{}.txt", std::process::id()));
    let temporary = dir.join(format!(".ferry_mem_dump.{}.tmp", std::process::id()));
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&temporary)?;
    file.write_all(text.as_bytes())?;
    std::fs::rename(&temporary, &path)?;
    Ok(path)
}

fn memory_report(app: &App, tuning: &Tuning) -> Result<String, RpcError> {
    let counters = app.counters()?;
    let reader = counters.reader();
    let pages = if tuning.hugepages {
        "hugepages of 2 MiB"
    } else {
        "normal pages"
    };
    let mut text = format!(
        "Memory of the data plane (process {})\n\nArena: {} bytes on {pages}\n\
         Request slots: {} of {} bytes\nData buffers: {} of {} bytes\n",
        app.model().platform().pid,
        tuning.arena_bytes,
        tuning.pools.slots,
        SMALL_BUFFER,
        tuning.pools.buffers,
        limits::MAX_DATA_BUFFER,
    );
    for core in 0..reader.cores() {
        let get = |counter| reader.core(core, counter);
        let pool = |all, free| {
            let (all, free) = (get(all), get(free));
            format!("{} in use, {free} free", all.saturating_sub(free))
        };
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "\nCore {core} on CPU {}\n  request slots: {}; found none: {} times\n  data buffers: {}; found none: {} times\n",
            get(CoreCounter::Cpu),
            pool(CoreCounter::Slots, CoreCounter::FreeSlots),
            get(CoreCounter::SlotWaits),
            pool(CoreCounter::Buffers, CoreCounter::FreeBuffers),
            get(CoreCounter::BufferWaits),
        );
    }
    Ok(text)
}

pub(super) fn get_mem_stats(app: Rc<App>, _: Args) -> Answer {
    Box::pin(async move {
        let tuning = app.tuning().await?;
        let report = memory_report(&app, &tuning)?;
        let path = write_dump(&report)
            .map_err(|error| internal(format!("Unable to open file for writing.\n{error}")))?;
        Ok(json!({"filename": path}))
    })
}
