//! Methods about transports and devices.

use std::rc::Rc;

use serde_json::Value;
use serde_json::json;

use super::RpcError;
use super::decode::Args;
use super::table::Answer;
use crate::app::App;
use crate::model::Changes;
use crate::model::Device;
use crate::model::Model;
use crate::model::Transport;
use crate::model::TransportKind;

const TRUE: Value = Value::Bool(true);

pub(super) fn transport_create(app: &App, args: &Args) -> Result<Value, RpcError> {
    app.model_mut()
        .transport_create(args.required("transport_name"))?;
    Ok(TRUE)
}

pub(super) fn transport_destroy(app: &App, args: &Args) -> Result<Value, RpcError> {
    app.model_mut()
        .transport_destroy(args.required("transport_name"))?;
    Ok(TRUE)
}

pub(super) fn transport_start(app: &App, args: &Args) -> Result<Value, RpcError> {
    app.model_mut()
        .transport_start(args.required("transport_name"))?;
    Ok(TRUE)
}

pub(super) fn transport_stop(app: &App, args: &Args) -> Result<Value, RpcError> {
    app.model_mut()
        .transport_stop(args.required("transport_name"))?;
    Ok(TRUE)
}

pub(super) fn get_transports(app: &App, args: &Args) -> Result<Value, RpcError> {
    let model = app.model();
    let describe = |transport: &Transport| {
        let managers = match transport.kind {
            TransportKind::Doca => model.managers(),
            TransportKind::VhostUser => &[],
        };
        let managers: Vec<Value> = managers
            .iter()
            .map(|manager| json!({"name": manager.name}))
            .collect();
        json!({
            "name": transport.kind.name(),
            "state": if transport.started { "started" } else { "stopped" },
            "managers": managers,
        })
    };
    let listed = match args.text("transport_name") {
        Some(name) => vec![describe(model.transport(name)?)],
        None => model.transports().iter().map(describe).collect(),
    };
    Ok(Value::Array(listed))
}

fn changes(args: &Args) -> Changes {
    Changes {
        tag: args.text("tag").map(str::to_owned),
        fsdev: args.text("fsdev").map(str::to_owned),
        num_request_queues: args.number("num_request_queues"),
        queue_size: args.number("queue_size"),
        packed_vq: args.flag("packed_vq"),
        notification_vq: args.flag("notification_vq"),
        driver_platform: args.text("driver_platform").map(str::to_owned),
    }
}

fn warn_of_unknown_fsdev(model: &Model, args: &Args) {
    if let Some(fsdev) = args
        .text("fsdev")
        .filter(|fsdev| model.fsdev(fsdev).is_err())
    {
        let device = args.required("dev_name");
        tracing::warn!(
            device,
            fsdev,
            "there is no such fsdev yet; until there is one, the guest cannot mount the device"
        );
    }
}

/// A driver that is connected sees the new properties only at its next start.
pub(super) fn warn_of_driver(model: &Model, args: &Args) {
    let device = args.required("dev_name");
    let connected = |device: &Device| device.live.as_ref().is_some_and(|live| live.connected);
    if model.device(device).is_ok_and(connected) {
        tracing::warn!(
            device,
            "a driver is connected; unload it while the device is being changed"
        );
    }
}

pub(super) fn device_create(app: &App, args: &Args) -> Result<Value, RpcError> {
    let mut model = app.model_mut();
    model.device_create(
        args.required("transport_name"),
        args.required("dev_name"),
        changes(args),
    )?;
    warn_of_unknown_fsdev(&model, args);
    Ok(TRUE)
}

pub(super) fn device_modify(app: &App, args: &Args) -> Result<Value, RpcError> {
    let mut model = app.model_mut();
    warn_of_driver(&model, args);
    model.device_modify(args.required("dev_name"), changes(args))?;
    warn_of_unknown_fsdev(&model, args);
    Ok(TRUE)
}

pub(super) fn device_start(app: Rc<App>, args: Args) -> Answer {
    Box::pin(async move {
        let step = app.model_mut().device_start(args.required("dev_name"))?;
        app.carry_out(step).await?;
        Ok(TRUE)
    })
}

pub(super) fn device_stop(app: Rc<App>, args: Args) -> Answer {
    Box::pin(async move {
        let step = app.model_mut().device_stop(args.required("dev_name"))?;
        app.carry_out(step).await?;
        Ok(TRUE)
    })
}

pub(super) fn device_destroy(app: Rc<App>, args: Args) -> Answer {
    Box::pin(async move {
        let step = app.model_mut().device_destroy(args.required("dev_name"))?;
        app.carry_out(step).await?;
        Ok(TRUE)
    })
}

fn describe_device(model: &Model, device: &Device) -> Value {
    let live = device.live.as_ref();
    let mut described = json!({
        "name": device.name,
        "transport_name": device.transport.name(),
        "state": device.state().name(),
        "fsdev": device.fsdev.as_deref().unwrap_or_default(),
        "tag": device.tag.as_deref().unwrap_or_default(),
        "queue_size": device.queue_size,
        "num_request_queues": device.num_request_queues,
        "packed_ring": device.packed_vq,
        "notification_vq": device.notification_vq,
        "driver_platform": device.platform_name(),
    });
    if device.transport == TransportKind::Doca {
        described["manager"] = json!(device.manager.as_deref().unwrap_or_default());
        described["vuid"] = json!(device.vuid.as_deref().unwrap_or_default());
    }
    if let Some(state) = model.plug_state(&device.name) {
        described["hotplug_state"] = json!(state.name());
    }
    described["socket"] = json!(model.device_socket(device).unwrap_or_default());
    described["connected"] = json!(live.is_some_and(|live| live.connected));
    described["mounted"] = json!(live.is_some_and(|live| live.mounted));
    described
}

pub(super) fn get_devices(app: &App, args: &Args) -> Result<Value, RpcError> {
    let model = app.model();
    let listed = match (args.text("transport_name"), args.text("dev_name")) {
        (Some(_), Some(_)) => {
            let text = "Invalid parameters: transport_name and dev_name exclude each other";
            return Err(RpcError::new(RpcError::INVALID_PARAMS, text));
        }
        (None, Some(device)) => vec![describe_device(&model, model.device(device)?)],
        (transport, None) => {
            let kind = transport
                .map(|name| model.transport(name))
                .transpose()?
                .map(|transport| transport.kind);
            let wanted = |device: &&Device| kind.is_none_or(|kind| device.transport == kind);
            model
                .devices()
                .iter()
                .filter(wanted)
                .map(|device| describe_device(&model, device))
                .collect()
        }
    };
    Ok(Value::Array(listed))
}

fn call(method: &str, params: Value) -> Value {
    json!({"method": method, "params": params})
}

fn device_config(device: &Device) -> Vec<Value> {
    let mut params = json!({
        "transport_name": device.transport.name(),
        "dev_name": device.name,
        "num_request_queues": device.num_request_queues,
        "queue_size": device.queue_size,
        "packed_vq": device.packed_vq,
        "notification_vq": device.notification_vq,
        "driver_platform": device.platform_name(),
    });
    for (key, value) in [("tag", &device.tag), ("fsdev", &device.fsdev)] {
        if let Some(value) = value {
            params[key] = json!(value);
        }
    }
    let mut requests = vec![call("virtio_fs_device_create", params)];
    let mut function = json!({"dev_name": device.name});
    for (key, value) in [("manager", &device.manager), ("vuid", &device.vuid)] {
        if let Some(value) = value {
            function[key] = json!(value);
        }
    }
    if device.manager.is_some() || device.vuid.is_some() {
        requests.push(call("virtio_fs_doca_device_modify", function));
    }
    if device.wanted {
        requests.push(call(
            "virtio_fs_device_start",
            json!({"dev_name": device.name}),
        ));
    }
    requests
}

/// The requests that rebuild the subsystem.
pub(super) fn config(app: &App) -> Vec<Value> {
    let model = app.model();
    let mut requests = Vec::new();
    for transport in model.transports() {
        let name = json!({"transport_name": transport.kind.name()});
        requests.push(call("virtio_fs_transport_create", name.clone()));
        if transport.kind == TransportKind::Doca {
            for manager in model.managers() {
                requests.push(call(
                    "virtio_fs_doca_manager_create",
                    json!({"manager": manager.name}),
                ));
            }
        }
        if transport.started {
            requests.push(call("virtio_fs_transport_start", name));
            let unwanted = model.platform().managers.first();
            if let Some(manager) = unwanted
                .filter(|_| transport.kind == TransportKind::Doca && model.managers().is_empty())
            {
                // The start creates it, and the operator has destroyed it.
                requests.push(call(
                    "virtio_fs_doca_manager_destroy",
                    json!({"manager": manager.name}),
                ));
            }
        }
    }
    let functions = model.hotplug_functions().iter();
    requests.extend(functions.map(|function| {
        let place = json!({"manager": function.manager, "vuid": function.vuid});
        call("virtio_fs_doca_function_create", place)
    }));
    requests.extend(model.devices().iter().flat_map(device_config));
    requests
}
