//! Commands that the client composes of requests: saving and loading configurations.

use std::io::Read;
use std::io::Write;
use std::path::Path;

use ferry_controlplane::config;
use ferry_controlplane::config::Entry;
use ferry_controlplane::rpc::table::ClientCommand;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use super::Failure;
use super::client::Client;
use super::print;

const START: &str = "framework_start_init";

pub(super) fn run(
    client: &mut Client,
    command: ClientCommand,
    params: &Map<String, Value>,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let text = |name: &str| params.get(name).and_then(Value::as_str);
    let indent = params
        .get("indent")
        .and_then(Value::as_i64)
        .and_then(|indent| i32::try_from(indent).ok())
        .unwrap_or(2);
    match command {
        ClientCommand::SaveConfig => {
            let saved = format!("{}\n", config::render(&save(client, out)?, indent));
            match text("output") {
                Some(path) => Ok(config::write_file(Path::new(path), &saved)?),
                None => print(out, &saved),
            }
        }
        ClientCommand::SaveSubsystemConfig => {
            let name = text("name").unwrap_or_default();
            let saved = json!({"subsystem": name, "config": subsystem(client, name, out)?});
            print(out, &format!("{}\n", config::render(&saved, indent)))
        }
        ClientCommand::LoadConfig => {
            let aliases = params
                .get("include_aliases")
                .and_then(Value::as_bool)
                .unwrap_or(false);
            let entries = config::parse(&read(client, text("json_conf"))?)?;
            load(client, entries, aliases, out)
        }
        ClientCommand::LoadSubsystemConfig => {
            let entries = config::parse_subsystem(&read(client, text("json_conf"))?)?;
            load(client, entries, false, out)
        }
    }
}

fn read(client: &Client, path: Option<&str>) -> Result<String, Failure> {
    if let Some(path) = path.filter(|path| *path != "-") {
        return Ok(config::read_file(Path::new(path))?);
    }
    if client.commands_on_stdin() {
        return Err(Failure::CommandsOnStdin);
    }
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(|error| Failure::Stream("cannot read standard input", error))?;
    Ok(text)
}

fn subsystem(client: &mut Client, name: &str, out: &mut dyn Write) -> Result<Value, Failure> {
    let mut params = Map::new();
    params.insert("name".to_owned(), json!(name));
    Ok(client
        .call("framework_get_config", &params, out)?
        .unwrap_or_default())
}

fn save(client: &mut Client, out: &mut dyn Write) -> Result<Value, Failure> {
    let listed = client
        .call("framework_get_subsystems", &Map::new(), out)?
        .unwrap_or_default();
    let mut all = Vec::new();
    for listed in listed.as_array().into_iter().flatten() {
        let name = listed
            .get("subsystem")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        let saved = subsystem(client, &name, out)?;
        all.push((name, saved));
    }
    Ok(config::document(all))
}

/// Names of the methods that may be called now or ever; `None` in a dry run.
fn methods(
    client: &mut Client,
    current: bool,
    aliases: bool,
    out: &mut dyn Write,
) -> Result<Option<Vec<String>>, Failure> {
    let mut params = Map::new();
    if current {
        params.insert("current".to_owned(), json!(true));
    }
    params.insert("include_aliases".to_owned(), json!(aliases));
    let listed = client.call("rpc_get_methods", &params, out)?;
    Ok(listed.map(|listed| {
        let names = listed
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str);
        names.map(str::to_owned).collect()
    }))
}

fn send(client: &mut Client, entries: &[Entry], out: &mut dyn Write) -> Result<(), Failure> {
    for entry in entries {
        client.call(
            &entry.method,
            &entry.params.clone().unwrap_or_default(),
            out,
        )?;
    }
    Ok(())
}

fn names<'a>(entries: impl Iterator<Item = &'a Entry>) -> String {
    entries
        .map(|entry| entry.method.as_str())
        .collect::<Vec<_>>()
        .join(", ")
}

/// Sends what may be sent now, starts the service when only later requests are left, and sends those.
fn load(
    client: &mut Client,
    mut entries: Vec<Entry>,
    aliases: bool,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let Some(known) = methods(client, false, aliases, out)? else {
        return send(client, &entries, out);
    };
    let unknown = names(
        entries
            .iter()
            .filter(|entry| !known.contains(&entry.method)),
    );
    if !unknown.is_empty() {
        return Err(Failure::NotApplicable(format!(
            "{unknown}: there is no such method"
        )));
    }
    while !entries.is_empty() {
        let allowed = methods(client, true, aliases, out)?.unwrap_or_default();
        let (now, later): (Vec<Entry>, Vec<Entry>) = entries
            .into_iter()
            .partition(|entry| allowed.contains(&entry.method));
        send(client, &now, out)?;
        entries = later;
        if entries.is_empty() {
            break;
        }
        if allowed.iter().any(|method| method == START) {
            client.call(START, &Map::new(), out)?;
        } else if now.is_empty() {
            let names = names(entries.iter());
            return Err(Failure::NotApplicable(format!(
                "{names} in its present state"
            )));
        }
    }
    Ok(())
}
