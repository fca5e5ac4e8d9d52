//! The options before the method.

use core::time::Duration;
use std::path::PathBuf;

pub(super) const USAGE: &str = "\
usage: ferry rpc [-h] [-s SOCKET] [-t SECONDS] [-r RETRIES] [-v] [--verbose LEVEL] [--dry-run] [--plugin X]
                 [--server | --reference | METHOD [ARGUMENTS]]

Without a method, commands are read from standard input, one per line.

options:
  -s, --server-addr SOCKET  RPC socket of the control plane (default: /var/tmp/spdk.sock)
  -t, --timeout SECONDS     how long to wait for a response (default: 60)
  -r, --conn-retries N      how often to try again when nobody listens, every 0.2 s (default: 0)
  -v                        write requests and responses to standard error
  --verbose LEVEL           the same for INFO and DEBUG; ERROR does not
  --dry-run                 print requests instead of sending them
  --plugin X                accepted for compatibility: every method is built in
  --server                  read command lines from standard input, options included, and after each print its output
                            and then **STATUS=0 if it has succeeded, **STATUS=1 if not; a failure does not end it
  --reference               print the reference of all methods as Markdown
  METHOD -h                 explains a method
";

/// What the words before the method say.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Options {
    pub(super) socket: PathBuf,
    pub(super) timeout: Duration,
    pub(super) retries: u32,
    pub(super) verbose: bool,
    pub(super) dry_run: bool,
    pub(super) server: bool,
    pub(super) reference: bool,
    pub(super) help: bool,
    /// Whether standard input holds the commands, so that nothing else can be read there.
    pub(super) commands_on_stdin: bool,
}

/// Why they say nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OptionsError {
    /// Unknown option.
    #[error("there is no option {0} before the method; ferry rpc -h lists the options")]
    Unknown(String),
    /// Option without its value.
    #[error("option {0} needs a value")]
    NoValue(String),
    /// Value that does not fit.
    #[error("option {option}: {value:?} is not {expected}")]
    BadValue {
        /// The option.
        option: String,
        /// Its value.
        value: String,
        /// What would fit.
        expected: &'static str,
    },
    /// A TCP port.
    #[error("option {0}: the service listens on a UNIX socket only; name it with -s")]
    Port(String),
}

impl Options {
    pub(super) fn new() -> Options {
        Options {
            socket: PathBuf::from("/var/tmp/spdk.sock"),
            timeout: Duration::from_secs(60),
            retries: 0,
            verbose: false,
            dry_run: false,
            server: false,
            reference: false,
            help: false,
            commands_on_stdin: false,
        }
    }

    /// Parses the words before the method; gives the others.
    pub(super) fn parse(words: &[String]) -> Result<(Options, &[String]), OptionsError> {
        Options::new().and(words)
    }

    /// As `parse`, where what the words do not say is as here.
    pub(super) fn and(self, words: &[String]) -> Result<(Options, &[String]), OptionsError> {
        let mut options = self;
        let mut rest = words;
        while let [word, tail @ ..] = rest {
            if !word.starts_with('-') || word.len() == 1 {
                break;
            }
            rest = tail;
            let (option, attached) = split(word);
            let mut value = || match (attached, rest) {
                (Some(value), _) => Ok(value.to_owned()),
                (None, [value, tail @ ..]) => {
                    rest = tail;
                    Ok(value.clone())
                }
                (None, []) => Err(OptionsError::NoValue(option.to_owned())),
            };
            options.take(option, &mut value)?;
        }
        Ok((options, rest))
    }

    fn take(
        &mut self,
        option: &str,
        value: &mut dyn FnMut() -> Result<String, OptionsError>,
    ) -> Result<(), OptionsError> {
        let bad = |value: String, expected| OptionsError::BadValue {
            option: option.to_owned(),
            value,
            expected,
        };
        match option {
            "-h" | "--help" => self.help = true,
            "-s" | "--server-addr" | "--server_addr" => self.socket = value()?.into(),
            "-p" | "--port" => return Err(OptionsError::Port(option.to_owned())),
            "-t" | "--timeout" => {
                let text = value()?;
                let seconds = text
                    .parse()
                    .ok()
                    .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
                let seconds = seconds.filter(|seconds| !seconds.is_zero());
                self.timeout = seconds.ok_or_else(|| bad(text, "a number of seconds"))?;
            }
            "-r" | "--conn-retries" | "--conn_retries" => {
                let text = value()?;
                self.retries = text
                    .parse()
                    .map_err(|_| bad(text, "a number of attempts"))?;
            }
            "-v" => self.verbose = true,
            "--verbose" => {
                let text = value()?;
                self.verbose = match text.to_ascii_uppercase().as_str() {
                    "DEBUG" | "INFO" => true,
                    "ERROR" => false,
                    _ => return Err(bad(text, "DEBUG, INFO or ERROR")),
                };
            }
            "--dry-run" | "--dry_run" => self.dry_run = true,
            "--server" => self.server = true,
            "--reference" => self.reference = true,
            "--plugin" => drop(value()?),
            _ => return Err(OptionsError::Unknown(option.to_owned())),
        }
        Ok(())
    }
}

/// How far words before the method go, for completion.
pub(crate) enum Globals<'a> {
    /// The last of them is an option without its value.
    Value(String),
    /// They are whole.
    Complete {
        /// The socket that they name.
        socket: PathBuf,
        /// The method and its arguments.
        rest: &'a [String],
    },
}

/// Looks at the words before the method; `None` when they are wrong.
pub(crate) fn globals(words: &[String]) -> Option<Globals<'_>> {
    match Options::parse(words) {
        Ok((options, rest)) => Some(Globals::Complete {
            socket: options.socket,
            rest,
        }),
        Err(OptionsError::NoValue(option)) => Some(Globals::Value(option)),
        Err(_) => None,
    }
}

/// The options before the method, as the usage describes them, each by its last spelling.
pub(crate) fn described() -> impl Iterator<Item = (&'static str, &'static str)> {
    let lines = USAGE.lines().filter(|line| line.starts_with("  -"));
    lines.filter_map(|line| {
        let (names, help) = line.trim_start().split_once("  ")?;
        let last = names.rsplit(", ").next()?;
        Some((last.split(' ').next()?, help.trim_start()))
    })
}

/// Splits `--option=value` and `-ovalue`.
fn split(word: &str) -> (&str, Option<&str>) {
    if word.starts_with("--") {
        return match word.split_once('=') {
            Some((option, value)) => (option, Some(value)),
            None => (word, None),
        };
    }
    match word.char_indices().nth(2) {
        Some((position, _)) => {
            let (option, value) = word.split_at(position);
            (option, Some(value))
        }
        None => (word, None),
    }
}
