//! `ferry fwconfig`: the emulated platform's firmware configuration, as `mlxconfig` shows and changes a DPU's.
//!
//! Also runs under the name `mlxconfig`. It shows three values of each parameter: the default, the one that the running
//! data plane took when it started (from the record in its run directory), and the one that the next start will take (from
//! the store, or else the platform file). It changes the store only, and only to what the next start will accept.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail, ensure};
use clap::{Parser, Subcommand};
use ferry_dataplane::platform::firmware::{
    self, Firmware, Origin, PARAMETERS, Parameter, Settings,
};
use ferry_dataplane::platform::{EmulationManager, Platform};

/// Name of the program under which the tool is this command.
pub const NAME: &str = "mlxconfig";

/// Show and change the firmware configuration of the emulated platform; the next start of the data plane takes it.
#[derive(Parser, Debug)]
#[command(name = "mlxconfig", version)]
pub struct Args {
    /// The manager: its name (mlx5_0), or mt41692_pciconf0 for the first one and mt41692_pciconf0.N for the others, also
    /// behind /dev/mst/. Without it, query shows all
    #[arg(short = 'd', long = "dev", value_name = "DEVICE")]
    device: Option<String>,
    /// Show defaults and current values (always done)
    #[arg(short = 'e', long)]
    enable_verbosity: bool,
    /// Do not ask (never done)
    #[arg(short = 'y', long)]
    yes: bool,
    /// Directory of the data plane's sockets
    #[arg(long, value_name = "DIR", default_value = "/run/ferry")]
    run_dir: PathBuf,
    /// Platform file [default: that of the data plane that runs, or else the built-in platform]
    #[arg(long, value_name = "FILE")]
    platform: Option<PathBuf>,
    /// Store of the settings [default: that of the data plane that runs, or else /etc/ferry/firmware.toml]
    #[arg(long, value_name = "FILE")]
    firmware: Option<PathBuf>,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// Show parameters, all or those named
    #[command(visible_alias = "q")]
    Query {
        /// Names
        names: Vec<String>,
    },
    /// Change parameters
    #[command(visible_alias = "s")]
    Set {
        /// The new values
        #[arg(required = true, value_name = "NAME=VALUE")]
        changes: Vec<String>,
    },
    /// Set parameters back to their defaults, all or those named
    #[command(visible_alias = "r")]
    Reset {
        /// Names
        names: Vec<String>,
    },
}

/// The words of a command line that calls the tool as `mlxconfig`.
pub fn requested(args: impl Iterator<Item = OsString>) -> Option<Vec<OsString>> {
    let args: Vec<OsString> = args.collect();
    let called = Path::new(args.first()?).file_name()?;
    (called == OsStr::new(NAME)).then_some(args)
}

/// Does what the command line says.
pub fn run(args: Args) -> anyhow::Result<()> {
    let place = Place::find(&args)?;
    let text = match &args.action {
        Action::Query { names } => place.query(args.device.as_deref(), &parameters(names)?)?,
        Action::Set { changes } => {
            let changes = changes
                .iter()
                .map(|c| assignment(c))
                .collect::<Result<Vec<_>, _>>()?;
            place.change(args.device.as_deref(), &changes)?
        }
        Action::Reset { names } => {
            let defaults: Vec<_> = parameters(names)?
                .into_iter()
                .map(|p| (p, p.default))
                .collect();
            place.change(args.device.as_deref(), &defaults)?
        }
    };
    io::stdout()
        .write_all(text.as_bytes())
        .context("cannot write to standard output")
}

fn parameter(name: &str) -> anyhow::Result<&'static Parameter> {
    Parameter::find(name).ok_or_else(|| {
        anyhow!("there is no parameter {name}; `ferry fwconfig query` shows all of them")
    })
}

fn parameters(names: &[String]) -> anyhow::Result<Vec<&'static Parameter>> {
    if names.is_empty() {
        return Ok(PARAMETERS.iter().collect());
    }
    names.iter().map(|name| parameter(name)).collect()
}

fn assignment(text: &str) -> anyhow::Result<(&'static Parameter, u32)> {
    let (name, value) = text
        .split_once('=')
        .with_context(|| format!("{text:?} is not of the form NAME=VALUE"))?;
    let parameter = parameter(name)?;
    let read = parameter.read(value).with_context(|| {
        let words = match parameter.words {
            [] => String::new(),
            words => format!(", or {}", words.join(" or ")),
        };
        format!(
            "{name} = {value:?} is not allowed, only an integer from {} to {}{words}",
            parameter.low, parameter.high
        )
    })?;
    Ok((parameter, read))
}

/// Where the settings are.
struct Place {
    /// The record of the data plane that runs, or ran last.
    current: Option<Firmware>,
    platform: Option<PathBuf>,
    store: PathBuf,
    delivered: Platform,
}

impl Place {
    fn find(args: &Args) -> anyhow::Result<Place> {
        let record = args.run_dir.join(firmware::RECORD);
        let current = Firmware::load(&record, |_| u32::MAX)?;
        let origin = current.as_ref().and_then(|c| c.origin.clone());
        let Origin { platform, store } = origin.unwrap_or(Origin {
            platform: None,
            store: firmware::DEFAULT_STORE.into(),
        });
        let platform = args.platform.clone().or(platform);
        Ok(Place {
            current,
            store: args.firmware.clone().unwrap_or(store),
            delivered: Platform::delivered(platform.as_deref())?,
            platform,
        })
    }

    /// What the store holds.
    fn stored(&self) -> anyhow::Result<Firmware> {
        let most_pf = |name: &str| {
            let mut managers = self.delivered.managers().iter();
            let found = managers.find(|m| m.name == name);
            found.map_or(u32::MAX, |m| m.most_pf)
        };
        Ok(Firmware::load(&self.store, most_pf)?.unwrap_or_default())
    }

    /// The managers that a device name stands for.
    fn managers(&self, device: Option<&str>) -> anyhow::Result<Vec<&EmulationManager>> {
        let all = self.delivered.managers();
        let Some(device) = device else {
            return Ok(all.iter().collect());
        };
        let word = device.strip_prefix("/dev/mst/").unwrap_or(device);
        let number =
            word.strip_prefix("mt41692_pciconf0")
                .and_then(|rest| match rest.strip_prefix('.') {
                    Some(number) => number.parse().ok(),
                    None => rest.is_empty().then_some(0),
                });
        let found = all
            .iter()
            .find(|m| m.name == word)
            .or_else(|| all.get(number?));
        let names = || all.iter().map(|m| m.name.as_str()).collect::<Vec<_>>();
        found.map(|m| vec![m]).with_context(|| {
            format!(
                "the platform has no manager {device}; it has {}",
                names().join(", ")
            )
        })
    }

    fn query(&self, device: Option<&str>, wanted: &[&Parameter]) -> anyhow::Result<String> {
        let stored = self.stored()?;
        let mut text = String::new();
        for manager in self.managers(device)? {
            let next = stored.settings.get(&manager.name);
            let next = next.unwrap_or(&manager.settings);
            let current = self.current.as_ref();
            let current = current.and_then(|c| c.settings.get(&manager.name));
            let _ = writeln!(text, "\nDevice: {}\n", manager.name);
            show(&mut text, wanted, current, next);
        }
        Ok(text)
    }

    /// Changes what the next start takes. Everything is checked before anything is written.
    fn change(
        &self,
        device: Option<&str>,
        changes: &[(&'static Parameter, u32)],
    ) -> anyhow::Result<String> {
        let managers = self.managers(device)?;
        let [manager] = managers[..] else {
            bail!("the platform has several managers; name one with -d");
        };
        let cannot = || format!("cannot change {}", self.store.display());
        let _lock = firmware::lock(&self.store).with_context(cannot)?;
        let mut stored = self.stored()?;
        let before = stored.settings.get(&manager.name).copied();
        let before = before.unwrap_or(manager.settings);
        let mut after = before;
        for (parameter, value) in changes {
            let set = after.set(parameter.name, (*value).into(), manager.most_pf);
            set.map_err(|refusal| anyhow!(refusal))?;
        }
        after.check().map_err(|refusal| anyhow!(refusal))?;
        stored.settings.insert(manager.name.clone(), after);
        Platform::with(self.platform.as_deref(), &self.store, &stored)?;
        stored.save(&self.store).with_context(cannot)?;
        ensure!(
            self.stored()? == stored,
            "{} did not keep the change",
            self.store.display()
        );
        let mut text = format!("\nDevice: {}\n\n", manager.name);
        let _ = writeln!(
            text,
            "{:<42}{:<20}{:<20}",
            "Configurations:", "Next Boot", "New"
        );
        for ((parameter, old), (_, new)) in before.iter().zip(after.iter()) {
            if changes.iter().any(|(changed, _)| *changed == parameter) {
                let (old, new) = (parameter.show(old), parameter.show(new));
                let _ = writeln!(text, "        {:<34}{old:<20}{new}", parameter.name);
            }
        }
        text.push_str("\nStored. The data plane takes it when it starts the next time.\n");
        Ok(text)
    }
}

/// The table of five columns: a star where a value is not the default, the name, and the three values.
fn show(text: &mut String, wanted: &[&Parameter], current: Option<&Settings>, next: &Settings) {
    let _ = writeln!(
        text,
        "{:<42}{:<20}{:<20}Next Boot",
        "Configurations:", "Default", "Current"
    );
    for parameter in wanted {
        let name = parameter.name;
        let next = next.get(name);
        let now = current.map(|c| c.get(name));
        let changed = next != parameter.default || now.is_some_and(|n| n != parameter.default);
        let star = if changed { '*' } else { ' ' };
        let default = parameter.show(parameter.default);
        let now = now.map_or("-".to_owned(), |n| parameter.show(n));
        let next = parameter.show(next);
        let _ = writeln!(text, "{star:<8}{name:<34}{default:<20}{now:<20}{next}");
    }
}

#[cfg(test)]
mod tests;
