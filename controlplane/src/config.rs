//! Saved configurations: a list of requests per subsystem, and scripts of commands.
//!
//! Files are replaced whole or not at all. What already exists is no mistake when a configuration is applied: after a
//! restart of the control plane alone, the data plane still has everything.

use std::fs::File;
use std::io;
use std::io::Write;
use std::path::Path;
use std::rc::Rc;

use ferry_shared::errno::Errno;
use serde::Serialize;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use crate::app::App;
use crate::rpc::RpcError;
use crate::rpc::cli;
use crate::rpc::cli::Invocation;
use crate::rpc::cli::Parsed;
use crate::rpc::decode::Params;
use crate::rpc::script::Script;
use crate::rpc::table;
use crate::rpc::table::ClientCommand;
use crate::rpc::table::Handler;
use crate::rpc::table::When;

/// One request of a configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The method.
    pub method: String,
    /// Its parameters, if any.
    pub params: Option<Map<String, Value>>,
}

impl Entry {
    /// When the method may be called; unknown ones are tried after the start.
    pub fn when(&self) -> When {
        table::find(&self.method).map_or(When::Runtime, |method| method.when)
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read or written.
    #[error("cannot {verb} {path}: {error}")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: String,
        /// The answer of the operating system.
        error: io::Error,
    },
    /// It is not JSON.
    #[error("the configuration is not JSON: {0}")]
    NotJson(serde_json::Error),
    /// It has another form.
    #[error("the configuration has an unexpected form: {0}")]
    Form(String),
    /// A request was refused.
    #[error("{method}: {error}")]
    Refused {
        /// The method.
        method: String,
        /// Why.
        error: RpcError,
    },
    /// A line of a script is wrong.
    #[error(transparent)]
    Script(#[from] crate::rpc::script::ScriptError),
}

/// Puts the configurations of the subsystems together.
pub fn document(subsystems: Vec<(String, Value)>) -> Value {
    let subsystems: Vec<Value> = subsystems
        .into_iter()
        .map(|(name, config)| json!({"subsystem": name, "config": config}))
        .collect();
    json!({"subsystems": subsystems})
}

/// Renders JSON; a negative indent gives one line.
pub fn render(value: &Value, indent: i32) -> String {
    let Ok(indent) = usize::try_from(indent) else {
        return value.to_string();
    };
    let blanks = vec![b' '; indent];
    let mut bytes = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(&blanks);
    let rendered = value.serialize(&mut serde_json::Serializer::with_formatter(
        &mut bytes, formatter,
    ));
    match (rendered, String::from_utf8(bytes)) {
        (Ok(()), Ok(text)) => text,
        _ => value.to_string(),
    }
}

/// Replaces a file whole or not at all.
pub fn write_file(path: &Path, text: &str) -> Result<(), ConfigError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        let directory = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        File::open(directory)?.sync_all()
    };
    write().map_err(|error| {
        // It exists only if the rename has not happened.
        let _ = std::fs::remove_file(&temporary);
        ConfigError::Io {
            verb: "write",
            path: path.display().to_string(),
            error,
        }
    })
}

/// Reads a file.
pub fn read_file(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|error| ConfigError::Io {
        verb: "read",
        path: path.display().to_string(),
        error,
    })
}

/// Blanks out comments, which the format of saved configurations allows.
fn without_comments(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(c) = rest.chars().next() {
        let taken = match c {
            '\\' if in_string => rest.chars().take(2).map(char::len_utf8).sum(),
            '/' if !in_string && rest.starts_with("//") => {
                rest = rest.split_once('\n').map_or("", |(_, after)| after);
                plain.push('\n');
                continue;
            }
            '/' if !in_string && rest.starts_with("/*") => {
                rest = rest.split_once("*/").map_or("", |(_, after)| after);
                plain.push(' ');
                continue;
            }
            '"' => {
                in_string = !in_string;
                1
            }
            c => c.len_utf8(),
        };
        let (head, tail) = rest.split_at(taken);
        plain.push_str(head);
        rest = tail;
    }
    plain
}

fn entries(config: &Value) -> Result<Vec<Entry>, ConfigError> {
    let form = |what: &str, value: &Value| ConfigError::Form(format!("{what}: {value}"));
    let listed = match config {
        Value::Null => &[],
        Value::Array(listed) => listed.as_slice(),
        // A disabled subsystem is saved like this by the original.
        one @ Value::Object(_) => core::slice::from_ref(one),
        other => return Err(form("not a list of requests", other)),
    };
    listed
        .iter()
        .map(|entry| {
            let method = entry.get("method").and_then(Value::as_str);
            let params = match entry.get("params") {
                None | Some(Value::Null) => Some(None),
                Some(Value::Object(params)) => Some(Some(params.clone())),
                Some(_) => None,
            };
            let (Some(method), Some(params)) = (method, params) else {
                return Err(form(
                    "not a request with a method and an object of params",
                    entry,
                ));
            };
            Ok(Entry {
                method: method.to_owned(),
                params,
            })
        })
        .collect()
}

fn from_json(text: &str) -> Result<Value, ConfigError> {
    serde_json::from_str(&without_comments(text)).map_err(ConfigError::NotJson)
}

/// Reads a whole configuration: the requests of all subsystems in their order.
pub fn parse(text: &str) -> Result<Vec<Entry>, ConfigError> {
    let document = from_json(text)?;
    let Some(subsystems) = document.get("subsystems").and_then(Value::as_array) else {
        return Err(ConfigError::Form(
            "there is no list \"subsystems\"".to_owned(),
        ));
    };
    let mut all = Vec::new();
    for subsystem in subsystems {
        all.extend(entries(subsystem.get("config").unwrap_or(&Value::Null))?);
    }
    Ok(all)
}

/// Reads the configuration of one subsystem.
pub fn parse_subsystem(text: &str) -> Result<Vec<Entry>, ConfigError> {
    let document = from_json(text)?;
    entries(document.get("config").unwrap_or(&Value::Null))
}

/// Whether a refusal means that the wanted state is there already.
fn is_already_there(method: &str, error: &RpcError) -> bool {
    match error.errno {
        Some(Errno::EEXIST | Errno::EALREADY) => true,
        // Only a device that is running refuses to be modified.
        Some(Errno::EBUSY) => matches!(
            method,
            "virtio_fs_device_modify" | "virtio_fs_doca_device_modify"
        ),
        Some(Errno::ENODEV) => method == "virtio_fs_doca_manager_destroy",
        _ => false,
    }
}

async fn request(app: &Rc<App>, method: &str, params: Params) -> Result<(), ConfigError> {
    match app.call(method, &params).await {
        Ok(_) => Ok(()),
        Err(error) if is_already_there(method, &error) => {
            tracing::info!(method, error = error.message, "already there");
            Ok(())
        }
        Err(error) => Err(ConfigError::Refused {
            method: method.to_owned(),
            error,
        }),
    }
}

/// Applies those requests of a configuration that may be called at `when`.
pub async fn apply(
    app: &Rc<App>,
    entries: &[Entry],
    when: impl Fn(When) -> bool,
    ignore_errors: bool,
) -> Result<(), ConfigError> {
    for entry in entries.iter().filter(|entry| when(entry.when())) {
        let params = entry.params.clone().map_or(Params::Absent, Params::from);
        match request(app, &entry.method, params).await {
            Err(error) if ignore_errors => tracing::warn!(%error, "ignored"),
            outcome => outcome?,
        }
    }
    Ok(())
}

/// Collects the whole configuration.
async fn collect(app: &Rc<App>) -> Result<Value, RpcError> {
    let subsystems = app
        .call("framework_get_subsystems", &Params::Absent)
        .await?;
    let mut all = Vec::new();
    for subsystem in subsystems.as_array().into_iter().flatten() {
        let name = subsystem
            .get("subsystem")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let params = Params::Object(vec![("name".to_owned(), json!(name))]);
        all.push((
            name.to_owned(),
            app.call("framework_get_config", &params).await?,
        ));
    }
    Ok(document(all))
}

async fn client_command(
    app: &Rc<App>,
    command: ClientCommand,
    invocation: &Invocation,
) -> Result<(), ConfigError> {
    let text = |name: &str| invocation.params.get(name).and_then(Value::as_str);
    let refused = |error| ConfigError::Refused {
        method: invocation.method.name.to_owned(),
        error,
    };
    let form = |what: &str| {
        ConfigError::Form(format!(
            "{} in a script needs {what}",
            invocation.method.name
        ))
    };
    match command {
        ClientCommand::SaveConfig => {
            let indent = invocation
                .params
                .get("indent")
                .and_then(Value::as_i64)
                .and_then(|i| i32::try_from(i).ok());
            let saved = render(&collect(app).await.map_err(refused)?, indent.unwrap_or(2));
            let path = text("output").ok_or_else(|| form("-o FILE"))?;
            write_file(Path::new(path), &format!("{saved}\n"))
        }
        ClientCommand::LoadConfig | ClientCommand::LoadSubsystemConfig => {
            let path = text("json_conf").ok_or_else(|| form("-j FILE"))?;
            let text = read_file(Path::new(path))?;
            let entries = match command {
                ClientCommand::LoadConfig => parse(&text)?,
                _ => parse_subsystem(&text)?,
            };
            apply(app, &entries, |when| when != When::Startup, false).await
        }
        ClientCommand::SaveSubsystemConfig => Err(form("a terminal; use save_config -o FILE")),
    }
}

/// Runs a script of commands; stops at the first failure.
pub async fn run_script(app: &Rc<App>, text: &str) -> Result<(), ConfigError> {
    for line in Script::new(text) {
        let line = line?;
        let invocation = match line.parsed {
            Parsed::Call(invocation) => invocation,
            Parsed::Help(method) => {
                tracing::info!("{}", cli::help(method));
                continue;
            }
        };
        tracing::info!(
            line = line.number,
            method = invocation.method.name,
            "init script"
        );
        if let Handler::Client(command) = invocation.method.handler {
            client_command(app, command, &invocation).await?;
        } else {
            let params = if invocation.params.is_empty() {
                Params::Absent
            } else {
                invocation.params.into()
            };
            request(app, invocation.method.name, params).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
