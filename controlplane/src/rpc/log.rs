//! Methods about what both processes log.
//!
//! The log level says what is logged at all, the print level what of it is printed. There is one place to log to, standard
//! error, so the lower of the two counts. INFO and DEBUG concern the components whose flag is set.

use std::rc::Rc;

use ferry_shared::msg::LOG_FLAGS;
use ferry_shared::msg::LogLevel;
use ferry_shared::msg::LogSpec;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use super::RpcError;
use super::decode::Args;
use super::table::Answer;
use crate::app::App;

const TRUE: Value = Value::Bool(true);

/// What the operator has asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogSettings {
    level: LogLevel,
    print_level: LogLevel,
    flags: Vec<&'static str>,
    timestamps: bool,
}

impl Default for LogSettings {
    fn default() -> LogSettings {
        LogSettings {
            level: LogLevel::Notice,
            print_level: LogLevel::Info,
            flags: Vec::new(),
            timestamps: true,
        }
    }
}

impl LogSettings {
    /// What they mean for a process.
    pub fn spec(&self) -> LogSpec {
        // What is said without a flag ends with NOTICE. A higher level is for those who set a flag, or all of them.
        let most = self.level.min(self.print_level);
        LogSpec {
            level: most.min(LogLevel::Notice),
            flag_level: most,
            flags: self.flags.iter().map(|flag| (*flag).to_owned()).collect(),
            timestamps: self.timestamps,
        }
    }
}

fn change(
    app: Rc<App>,
    change: impl FnOnce(&mut LogSettings) -> Result<(), RpcError> + 'static,
) -> Answer {
    Box::pin(async move {
        let mut settings = app.log_settings();
        change(&mut settings)?;
        app.set_log(settings).await?;
        Ok(TRUE)
    })
}

fn level(args: &Args) -> Result<LogLevel, RpcError> {
    let name = args.required("level");
    LogLevel::parse(name).ok_or_else(|| {
        let text = format!(
            "invalid log level {name:?}; the levels are ERROR, WARNING, NOTICE, INFO and DEBUG"
        );
        RpcError::new(RpcError::INVALID_PARAMS, text)
    })
}

pub(super) fn set_level(app: Rc<App>, args: Args) -> Answer {
    change(app, move |settings| {
        settings.level = level(&args)?;
        Ok(())
    })
}

pub(super) fn set_print_level(app: Rc<App>, args: Args) -> Answer {
    change(app, move |settings| {
        settings.print_level = level(&args)?;
        Ok(())
    })
}

pub(super) fn get_level(app: &App, _: &Args) -> Result<Value, RpcError> {
    Ok(json!(app.log_settings().level.name()))
}

pub(super) fn get_print_level(app: &App, _: &Args) -> Result<Value, RpcError> {
    Ok(json!(app.log_settings().print_level.name()))
}

/// Whether a pattern of `*`, `?` and other characters fits a whole name.
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), first) => {
            fits(rest, name) || first.is_some_and(|(_, name)| fits(pattern, name))
        }
        (Some((b'?', pattern)), Some((_, name))) => fits(pattern, name),
        (Some((byte, pattern)), Some((other, name))) => byte == other && fits(pattern, name),
        (None, Some(_)) | (Some(_), None) => false,
    }
}

/// A pattern can cost the product of the lengths for every star, so it must not be long.
const MAX_PATTERN: usize = 32;

fn flags(args: &Args) -> Result<Vec<&'static str>, RpcError> {
    let pattern = args.required("flag");
    let chosen: Vec<&'static str> = LOG_FLAGS
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| {
            pattern == "all"
                || (pattern.len() <= MAX_PATTERN && fits(pattern.as_bytes(), name.as_bytes()))
        })
        .collect();
    if chosen.is_empty() {
        let names: Vec<&str> = LOG_FLAGS.iter().map(|(name, _)| *name).collect();
        let text = format!(
            "invalid log flag {pattern:?}; the flags are all, {}",
            names.join(", ")
        );
        return Err(RpcError::new(RpcError::INVALID_PARAMS, text));
    }
    Ok(chosen)
}

pub(super) fn set_flag(app: Rc<App>, args: Args) -> Answer {
    change(app, move |settings| {
        for flag in flags(&args)? {
            if !settings.flags.contains(&flag) {
                settings.flags.push(flag);
            }
        }
        Ok(())
    })
}

pub(super) fn clear_flag(app: Rc<App>, args: Args) -> Answer {
    change(app, move |settings| {
        let cleared = flags(&args)?;
        settings.flags.retain(|flag| !cleared.contains(flag));
        Ok(())
    })
}

pub(super) fn get_flags(app: &App, _: &Args) -> Result<Value, RpcError> {
    let settings = app.log_settings();
    let all: Map<String, Value> = LOG_FLAGS
        .iter()
        .map(|(name, _)| ((*name).to_owned(), json!(settings.flags.contains(name))))
        .collect();
    Ok(Value::Object(all))
}

pub(super) fn enable_timestamps(app: Rc<App>, args: Args) -> Answer {
    change(app, move |settings| {
        settings.timestamps = args.flag("enabled").unwrap_or(true);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_as_those_of_file_names() {
        let cases = [
            ("fsdev", "fsdev", true),
            ("fsdev*", "fsdev_aio", true),
            ("*_user", "vfio_user", true),
            ("v?io_user", "vfio_user", true),
            ("*s*v*", "fsdev", true),
            ("fsdev", "fsdev_aio", false),
            ("?", "", false),
            ("", "x", false),
        ];
        for (pattern, name, expected) in cases {
            assert_eq!(
                fits(pattern.as_bytes(), name.as_bytes()),
                expected,
                "{pattern} {name}"
            );
        }
    }

    #[test]
    fn the_lower_level_counts_and_details_need_a_flag() {
        let mut settings = LogSettings::default();
        assert_eq!(settings.spec().level, LogLevel::Notice);
        settings.level = LogLevel::Debug;
        settings.flags.push("fsdev");
        let spec = settings.spec();
        assert_eq!(
            (spec.level, spec.flag_level),
            (LogLevel::Notice, LogLevel::Info)
        );
        settings.print_level = LogLevel::Error;
        let spec = settings.spec();
        assert_eq!(
            (spec.level, spec.flag_level),
            (LogLevel::Error, LogLevel::Error)
        );
    }
}
