//! The names of what the running service has, for completion. A service that does not answer at once has none.

use core::time::Duration;
use std::path::Path;

use ferry_controlplane::rpc::table::Method;
use ferry_controlplane::rpc::table::Param;
use serde_json::Map;
use serde_json::Value;

use crate::rpc::Client;

const PATIENCE: Duration = Duration::from_millis(300);

/// What lists the values of a parameter, and the key of the names in its answer; `None` when the name is a new one.
fn source(method: &Method, param: &Param) -> Option<(&'static str, &'static str)> {
    let fsdev = method.name.starts_with("fsdev_");
    let new = method.name.ends_with("_create");
    match param.name {
        "dev_name" if method.name != "virtio_fs_device_create" => {
            Some(("virtio_fs_get_devices", "name"))
        }
        "manager" => Some(("virtio_fs_doca_get_possible_managers", "name")),
        "vuid" => Some(("virtio_fs_doca_get_functions", "vuid")),
        "fsdev" => Some(("fsdev_get_fsdevs", "name")),
        "name" if fsdev && !new => Some(("fsdev_get_fsdevs", "name")),
        "name" if method.name.contains("subsystem") || method.name == "framework_get_config" => {
            Some(("framework_get_subsystems", "subsystem"))
        }
        _ => None,
    }
}

/// The names that a parameter may have now.
pub(super) fn names(method: &Method, param: &Param, socket: &Path) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((lists, key)) = source(method, param) {
        let mut client = Client::to(socket, PATIENCE);
        // In a command line that is being typed there is no place for the reason of a failure.
        let answer = client.call(lists, &Map::new(), &mut std::io::sink());
        collect(&answer.ok().flatten().unwrap_or_default(), key, &mut names);
    }
    names
}

/// Every string under the key, wherever it is.
fn collect(value: &Value, key: &str, names: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                match value {
                    Value::String(text) if name == key => names.push(text.clone()),
                    _ => collect(value, key, names),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, key, names)),
        _ => {}
    }
}
