//! The log of a process: to standard error, as the operator's environment says at first, and as an RPC says later.
//!
//! `main` calls [`init`] once; whoever receives a [`LogSpec`] calls [`set`]. A process that has not called `init`, such as a
//! test, takes every [`LogSpec`] and logs as it did before.

use std::env;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

use crate::errno::Errno;
use crate::msg::{Failure, LOG_FLAGS, LogLevel, LogSpec};

type Reload = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;

static RELOAD: OnceLock<Reload> = OnceLock::new();
static TIMESTAMPS: AtomicBool = AtomicBool::new(true);

/// The time, unless it is not wanted.
struct Timer;

impl FormatTime for Timer {
    fn format_time(&self, writer: &mut Writer<'_>) -> std::fmt::Result {
        if TIMESTAMPS.load(Ordering::Relaxed) {
            SystemTime.format_time(writer)
        } else {
            Ok(())
        }
    }
}

/// Begins to log. The environment variable holds the first filter, in the form of `tracing`; by default lifecycle and
/// what is worse is logged.
pub fn init(variable: &str) {
    let filter = env::var(variable)
        .ok()
        .and_then(|text| EnvFilter::try_new(text).ok())
        .unwrap_or_else(|| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_timer(Timer)
        .with_writer(io::stderr)
        .with_env_filter(filter)
        .with_filter_reloading();
    let handle = builder.reload_handle();
    builder.init();
    let reload = move |filter| handle.reload(filter).map_err(|error| error.to_string());
    // Set once: a second subscriber could not have been installed.
    let _ = RELOAD.set(Box::new(reload));
}

fn filter_of(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warning => LevelFilter::WARN,
        LogLevel::Notice => LevelFilter::INFO,
        LogLevel::Info => LevelFilter::DEBUG,
        LogLevel::Debug => LevelFilter::TRACE,
    }
}

/// The filter of a specification, in the form of `tracing`.
fn directives(spec: &LogSpec) -> Result<String, Failure> {
    let mut text = filter_of(spec.level).to_string();
    for flag in &spec.flags {
        let known = LOG_FLAGS.iter().find(|(name, _)| name == flag);
        let Some((_, targets)) = known else {
            return Err(Failure::new(
                Errno::EINVAL,
                format!("there is no log flag {flag:?}"),
            ));
        };
        for target in *targets {
            text.push_str(&format!(",{target}={}", filter_of(spec.flag_level)));
        }
    }
    Ok(text)
}

/// Logs as told from now on.
pub fn set(spec: &LogSpec) -> Result<(), Failure> {
    let filter = directives(spec)?;
    TIMESTAMPS.store(spec.timestamps, Ordering::Relaxed);
    let Some(reload) = RELOAD.get() else {
        return Ok(());
    };
    EnvFilter::try_new(&filter)
        .map_err(|error| error.to_string())
        .and_then(reload)
        .map_err(|error| Failure::new(Errno::EIO, format!("cannot log by {filter:?}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(level: LogLevel, flags: &[&str]) -> LogSpec {
        LogSpec {
            level,
            flag_level: LogLevel::Debug,
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
            timestamps: true,
        }
    }

    #[test]
    fn flags_open_the_modules_of_their_components_only() {
        assert_eq!(
            directives(&spec(LogLevel::Warning, &[])),
            Ok("warn".to_owned())
        );
        let text = directives(&spec(LogLevel::Notice, &["fsdev_aio"]));
        assert_eq!(
            text,
            Ok("info,ferry_dataplane::fsdev::passthrough=trace".to_owned())
        );
    }

    #[test]
    fn every_flag_makes_a_filter_and_no_other_does() {
        for (flag, _) in LOG_FLAGS {
            let text = directives(&spec(LogLevel::Error, &[flag])).unwrap();
            EnvFilter::try_new(&text).unwrap();
        }
        let failure = set(&spec(LogLevel::Error, &["bogus"])).unwrap_err();
        assert_eq!(failure.errno, Errno::EINVAL);
        assert!(failure.detail.contains("bogus"));
    }
}
