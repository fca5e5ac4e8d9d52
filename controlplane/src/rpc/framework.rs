//! Methods about the process itself.

use std::rc::Rc;

use nix::sys::signal;
use nix::unistd::getpid;
use serde_json::Value;
use serde_json::json;

use super::RpcError;
use super::decode::Args;
use super::fsdev;
use super::table;
use super::table::Answer;
use super::tune;
use super::virtio_fs;
use crate::app::App;
use crate::app::Phase;
use crate::app::SUBSYSTEMS;
use crate::app::Subsystem;

const TRUE: Value = Value::Bool(true);

const VERSION: &str = concat!("Ferry v", env!("CARGO_PKG_VERSION"));

pub(super) fn spdk_get_version(_: &App, _: &Args) -> Result<Value, RpcError> {
    let number = |text: &str| text.parse::<u32>().unwrap_or_default();
    Ok(json!({
        // In one piece in the program too, where it can be looked for.
        "version": core::hint::black_box(VERSION),
        "fields": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "patch": number(env!("CARGO_PKG_VERSION_PATCH")),
            "suffix": env!("CARGO_PKG_VERSION_PRE"),
        },
    }))
}

pub(super) fn rpc_get_methods(app: &App, args: &Args) -> Result<Value, RpcError> {
    let current = args.flag("current").unwrap_or(false);
    let aliases = args.flag("include_aliases").unwrap_or(false);
    let mut names = Vec::new();
    for method in table::METHODS
        .iter()
        .filter(|method| method.is_remote() && app.offers(method))
    {
        if current && app.check_state(method).is_err() {
            continue;
        }
        names.push(method.name);
        if aliases {
            names.extend(method.aliases);
        }
    }
    Ok(json!(names))
}

pub(super) fn framework_start_init(app: Rc<App>, _: Args) -> Answer {
    Box::pin(async move {
        app.start_init().await?;
        Ok(TRUE)
    })
}

pub(super) fn framework_wait_init(app: Rc<App>, _: Args) -> Answer {
    Box::pin(async move {
        app.reached(Phase::Ready).await;
        Ok(TRUE)
    })
}

fn subsystem(name: &str) -> Result<&'static Subsystem, RpcError> {
    SUBSYSTEMS
        .iter()
        .find(|subsystem| subsystem.name == name)
        .ok_or_else(|| {
            RpcError::new(
                RpcError::INVALID_PARAMS,
                format!("Subsystem '{name}' not found"),
            )
        })
}

pub(super) fn framework_disable_subsystem(app: &App, args: &Args) -> Result<Value, RpcError> {
    let subsystem = subsystem(args.required("name"))?;
    let mut parents = SUBSYSTEMS
        .iter()
        .filter(|parent| parent.depends_on.contains(&subsystem.name));
    if let Some(parent) = parents.find(|parent| app.is_enabled(parent.name)) {
        return Err(RpcError::new(
            RpcError::INVALID_PARAMS,
            format!("Subsystem Parent '{}' is enabled", parent.name),
        ));
    }
    app.set_enabled(subsystem.name, false);
    Ok(TRUE)
}

pub(super) fn framework_enable_subsystem(app: &App, args: &Args) -> Result<Value, RpcError> {
    let subsystem = subsystem(args.required("name"))?;
    if let Some(needed) = subsystem
        .depends_on
        .iter()
        .find(|needed| !app.is_enabled(needed))
    {
        let text = format!("Subsystem Dependency '{needed}' is not enabled");
        return Err(RpcError::new(RpcError::INVALID_PARAMS, text));
    }
    app.set_enabled(subsystem.name, true);
    Ok(TRUE)
}

pub(super) fn framework_get_subsystems(app: &App, _: &Args) -> Result<Value, RpcError> {
    let describe = |subsystem: &Subsystem| {
        json!({
            "subsystem": subsystem.name,
            "enabled": app.is_enabled(subsystem.name),
            "depends_on": subsystem.depends_on,
        })
    };
    Ok(Value::Array(SUBSYSTEMS.iter().map(describe).collect()))
}

pub(super) fn framework_get_config(app: &App, args: &Args) -> Result<Value, RpcError> {
    let subsystem = subsystem(args.required("name"))?;
    if !app.is_enabled(subsystem.name) {
        let disable =
            json!({"method": "framework_disable_subsystem", "params": {"name": subsystem.name}});
        return Ok(json!([disable]));
    }
    Ok(Value::Array(match subsystem.name {
        "fsdev" => fsdev::config(app),
        "iobuf" => tune::iobuf_config(app),
        "scheduler" => tune::scheduler_config(app),
        _ => virtio_fs::config(app),
    }))
}

/// What ends this process in an orderly way ends the service, if somebody supervises it: that is the original's one
/// process. SIGKILL is a crash, after which this process comes back.
pub(super) fn spdk_kill_instance(app: &App, args: &Args) -> Result<Value, RpcError> {
    let known = [
        signal::SIGINT,
        signal::SIGTERM,
        signal::SIGQUIT,
        signal::SIGHUP,
        signal::SIGKILL,
        signal::SIGUSR1,
    ];
    let name = args.required("sig_name");
    let number = name.parse::<i32>().ok();
    let Some(chosen) = known
        .into_iter()
        .find(|known| known.as_str() == name || Some(*known as i32) == number)
    else {
        let names = known.map(signal::Signal::as_str).join(", ");
        let text =
            format!("Invalid parameters: sig_name {name:?} is not one of {names} or its number");
        return Err(RpcError::new(RpcError::INVALID_PARAMS, text));
    };
    if !matches!(chosen, signal::SIGKILL | signal::SIGUSR1) {
        app.end_asked.set(true);
    }
    signal::kill(getpid(), chosen).map_err(|errno| {
        RpcError::new(
            RpcError::INTERNAL_ERROR,
            format!("cannot send {chosen}: {errno}"),
        )
    })?;
    Ok(TRUE)
}
