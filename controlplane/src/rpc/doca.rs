//! Methods about emulation managers, their functions, and devices on them.

use std::rc::Rc;

use serde_json::Value;
use serde_json::json;

use ferry_shared::msg::Function;
use ferry_shared::msg::Reply;

use super::RpcError;
use super::decode::Args;
use super::method::Answer;
use super::virtio_fs;
use crate::app::App;
use crate::hotplug;
use crate::model::Device;

pub(super) fn get_managers(app: &App, _: &Args) -> Result<Value, RpcError> {
    let model = app.model();
    let describe = |name: &str| {
        let hotplug = model
            .offered_manager(name)
            .is_ok_and(|manager| manager.hotplug_ports > 0);
        json!({"name": name, "hotplug_supported": hotplug})
    };
    Ok(Value::Array(
        model
            .managers()
            .iter()
            .map(|manager| describe(&manager.name))
            .collect(),
    ))
}

pub(super) fn get_possible_managers(app: &App, _: &Args) -> Result<Value, RpcError> {
    let model = app.model();
    Ok(Value::Array(
        model
            .platform()
            .managers
            .iter()
            .map(|manager| json!({"name": manager.name}))
            .collect(),
    ))
}

pub(super) fn manager_create(app: &App, args: &Args) -> Result<Value, RpcError> {
    app.model_mut().manager_create(args.required("manager"))?;
    Ok(Value::Bool(true))
}

pub(super) fn manager_destroy(app: &App, args: &Args) -> Result<Value, RpcError> {
    app.model_mut().manager_destroy(args.required("manager"))?;
    Ok(Value::Bool(true))
}

/// Clients know these keys with their blanks, and the flag as a string.
fn describe_function((function, device): (&Function, Option<&Device>)) -> Value {
    let mut described = json!({
        "hot pluggable": if function.port.is_some() { "true" } else { "false" },
        "pci_address": function.address(),
        "vuid": function.vuid,
        "function_type": "PF",
        "socket": function.socket,
    });
    if let Some(device) = device {
        described["device"] = json!(device.name);
    }
    if function.port.is_some() {
        described["hotplug_state"] = json!(function.plug.name());
    }
    described
}

pub(super) fn get_functions(app: &App, args: &Args) -> Result<Value, RpcError> {
    let model = app.model();
    let managers = match args.text("manager") {
        Some(name) => vec![model.manager(name)?],
        None => model.managers().iter().collect(),
    };
    let describe = |name: &str| {
        let functions: Vec<Value> = model.functions(name).map(describe_function).collect();
        json!({"manager": name, "Function List": functions})
    };
    Ok(Value::Array(
        managers
            .into_iter()
            .map(|manager| describe(&manager.name))
            .collect(),
    ))
}

pub(super) fn function_create(app: Rc<App>, args: Args) -> Answer {
    Box::pin(async move {
        let (manager, vuid) = (args.required("manager"), args.text("vuid"));
        let step = app.model().function_create(manager, vuid);
        match app.carry_out(step?).await? {
            Reply::Function(function) => Ok(Value::String(function.vuid)),
            _ => {
                let text = "Internal error: the data plane has named no function";
                Err(RpcError::new(RpcError::INTERNAL_ERROR, text))
            }
        }
    })
}

pub(super) fn function_destroy(app: Rc<App>, args: Args) -> Answer {
    Box::pin(async move {
        let (manager, vuid) = (args.required("manager"), args.required("vuid"));
        let step = app.model().function_destroy(manager, vuid);
        app.carry_out(step?).await?;
        Ok(Value::Bool(true))
    })
}

pub(super) fn device_modify(app: &App, args: &Args) -> Result<Value, RpcError> {
    let text = |name| args.text(name).map(str::to_owned);
    let device = args.required("dev_name");
    let mut model = app.model_mut();
    virtio_fs::warn_of_driver(&model, args);
    model.doca_device_modify(device, text("manager"), text("vuid"))?;
    if let Some(vuid) = args.text("vuid").filter(|vuid| !model.knows_vuid(vuid)) {
        tracing::warn!(
            device,
            vuid,
            "no manager has such a function; unless one appears, the device cannot be started"
        );
    }
    Ok(Value::Bool(true))
}

pub(super) fn device_hotplug(app: Rc<App>, args: Args) -> Answer {
    Box::pin(async move {
        let wait = args.flag("wait_for_done").unwrap_or(false);
        hotplug::plug(&app, args.required("dev_name"), wait).await?;
        Ok(Value::Bool(true))
    })
}

pub(super) fn device_hotunplug(app: Rc<App>, args: Args) -> Answer {
    Box::pin(async move {
        let wait = args.flag("wait_for_done").unwrap_or(false);
        hotplug::unplug(&app, args.required("dev_name"), wait).await?;
        Ok(Value::Bool(true))
    })
}
