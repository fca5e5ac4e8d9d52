//! `ferry rpc`: the command line of the RPC methods, also under the names `spdk_rpc.py`, `spdk_rpc` and `rpc.py`.
//!
//! Parses words by the control plane's table of methods, sends one request at a time and prints results as the original
//! tool does: JSON with indent 2, a string without its quotes, and nothing for methods whose result only says that it
//! was done. Errors go to standard error; the exit status is 1 for a failure and 2 for a wrong command line.

mod client;
mod commands;
mod options;
mod server;
#[cfg(test)]
mod tests;

use std::ffi::OsStr;
use std::ffi::OsString;
use std::io::IsTerminal;
use std::io::Read;
use std::io::Write;
use std::process::ExitCode;

use ferry_controlplane::rpc::cli;
use ferry_controlplane::rpc::cli::CliError;
use ferry_controlplane::rpc::cli::Invocation;
use ferry_controlplane::rpc::cli::Parsed;
use ferry_controlplane::rpc::script::Script;
use ferry_controlplane::rpc::script::ScriptError;
use ferry_controlplane::rpc::table::Handler;
use ferry_controlplane::rpc::table::Output;
use serde_json::Value;

pub(crate) use client::CallError;
pub(crate) use client::Client;
pub(crate) use options::Globals;
use options::Options;
use options::OptionsError;
pub(crate) use options::described;
pub(crate) use options::globals;

/// Names of the program under which the tool is this command.
pub const NAMES: [&str; 3] = ["spdk_rpc.py", "spdk_rpc", "rpc.py"];

/// Why a run has failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The command line is wrong.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The command is wrong.
    #[error(transparent)]
    Command(#[from] CliError),
    /// A line of the script is wrong.
    #[error(transparent)]
    Script(#[from] ScriptError),
    /// A line of the script has failed.
    #[error("line {number}: {failure}")]
    Line {
        /// Number of the line where the command begins.
        number: usize,
        /// What has happened.
        failure: Box<Failure>,
    },
    /// A request has failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A configuration cannot be read or written.
    #[error(transparent)]
    Config(#[from] ferry_controlplane::config::ConfigError),
    /// A configuration names methods that the service does not have.
    #[error("the service cannot apply {0}")]
    NotApplicable(String),
    /// Standard input cannot be read or standard output not written.
    #[error("{0}: {1}")]
    Stream(&'static str, std::io::Error),
    /// A configuration would have to be read from where the commands come from.
    #[error(
        "standard input holds the commands, so no configuration can be read there; name its file with -j"
    )]
    CommandsOnStdin,
    /// A method beside an option that takes its methods from elsewhere.
    #[error("--server reads its methods from standard input; {0:?} cannot be given too")]
    TooMuch(String),
    /// Nothing to do.
    #[error("no method is given, and standard input is a terminal; ferry rpc -h lists the methods")]
    NothingToDo,
}

impl Failure {
    fn status(&self) -> u8 {
        match self {
            Failure::Options(_)
            | Failure::Command(_)
            | Failure::TooMuch(_)
            | Failure::NothingToDo => 2,
            _ => 1,
        }
    }
}

/// Whether the arguments of the process, its name first, ask for this command: the words after its name.
pub fn requested(mut args: impl Iterator<Item = OsString>) -> Option<Vec<OsString>> {
    let program = args.next()?;
    let name = std::path::Path::new(&program)
        .file_name()
        .and_then(OsStr::to_str);
    if name.is_some_and(|name| NAMES.contains(&name)) {
        return Some(args.collect());
    }
    (args.next()? == "rpc").then(|| args.collect())
}

/// Runs the command with the words after its name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let words: Vec<String> = args
        .into_iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let mut stdout = std::io::stdout().lock();
    match run_words(&words, &mut stdout) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = stdout.flush();
            eprintln!("{failure}");
            ExitCode::from(failure.status())
        }
    }
}

fn run_words(words: &[String], out: &mut dyn Write) -> Result<(), Failure> {
    let (mut options, rest) = Options::parse(words)?;
    if options.help {
        return print(
            out,
            &format!("{}\nmethods:\n{}", options::USAGE, cli::list()),
        );
    }
    if options.reference {
        return print(out, &cli::reference());
    }
    if options.server {
        return server::run(&options, rest, std::io::stdin().lock(), out);
    }
    if let [name, words @ ..] = rest {
        let mut client = Client::new(options);
        return execute(&mut client, cli::parse(name, words)?, out);
    }
    if std::io::stdin().is_terminal() {
        return Err(Failure::NothingToDo);
    }
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(|error| Failure::Stream("cannot read standard input", error))?;
    options.commands_on_stdin = true;
    run_script(&mut Client::new(options), &text, out)
}

/// Runs the commands of a script up to the first that fails.
fn run_script(client: &mut Client, text: &str, out: &mut dyn Write) -> Result<(), Failure> {
    for line in Script::new(text) {
        let line = line?;
        client.set_verbose(line.verbose);
        execute(client, line.parsed, out).map_err(|failure| Failure::Line {
            number: line.number,
            failure: Box::new(failure),
        })?;
    }
    Ok(())
}

fn execute(client: &mut Client, parsed: Parsed, out: &mut dyn Write) -> Result<(), Failure> {
    let invocation = match parsed {
        Parsed::Call(invocation) => invocation,
        Parsed::Help(method) => return print(out, &cli::help(method)),
    };
    let Invocation { method, params } = &invocation;
    if let Handler::Client(command) = method.handler {
        return commands::run(client, command, params, out);
    }
    match client.call(method.name, params, out)? {
        Some(result) if method.output == Output::Json => print_result(out, &result),
        Some(_) | None => Ok(()),
    }
}

/// JSON with indent 2; a string bare.
fn print_result(out: &mut dyn Write, result: &Value) -> Result<(), Failure> {
    match result {
        Value::String(text) => print(out, &format!("{text}\n")),
        result => print(out, &format!("{result:#}\n")),
    }
}

fn print(out: &mut dyn Write, text: &str) -> Result<(), Failure> {
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Failure::Stream("cannot write standard output", error))
}
