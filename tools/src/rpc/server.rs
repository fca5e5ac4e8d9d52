//! `ferry rpc --server`: command lines from standard input, each with a connection and a status of its own.
//!
//! For programs that send many commands through a pair of pipes. Every line gets exactly one status line, also a blank
//! one; what a failed request is answered goes to standard output, what is wrong with a command line to standard error.

use std::io::BufRead;
use std::io::Write;

use ferry_controlplane::rpc::cli;
use ferry_controlplane::rpc::script;
use ferry_controlplane::rpc::script::Problem;
use ferry_controlplane::rpc::script::ScriptError;

use super::Failure;
use super::client::Client;
use super::execute;
use super::options::Options;
use super::print;

/// Serves lines until there are no more.
pub(super) fn run(
    options: &Options,
    rest: &[String],
    lines: impl BufRead,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    if let Some(word) = rest.first() {
        return Err(Failure::TooMuch(word.clone()));
    }
    let mut defaults = options.clone();
    defaults.server = false;
    defaults.commands_on_stdin = true;
    for (index, line) in lines.split(b'\n').enumerate() {
        let line = line.map_err(|error| Failure::Stream("cannot read standard input", error))?;
        let line = String::from_utf8_lossy(&line);
        let status = match command(&defaults, index + 1, &line, out) {
            Ok(()) => 0,
            Err(failure @ Failure::Call(_)) => {
                print(out, &format!("{failure}\n"))?;
                1
            }
            Err(failure) => {
                eprintln!("{failure}");
                1
            }
        };
        print(out, &format!("**STATUS={status}\n"))?;
    }
    Ok(())
}

fn command(
    defaults: &Options,
    number: usize,
    line: &str,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let wrong = |problem| ScriptError { number, problem };
    let words = script::split(line).ok_or_else(|| wrong(Problem::OpenQuote))?;
    if words.is_empty() {
        return Ok(());
    }
    let (options, rest) = defaults.clone().and(&words)?;
    let [name, words @ ..] = rest else {
        return Err(wrong(Problem::NoMethod).into());
    };
    let parsed = cli::parse(name, words)?;
    execute(&mut Client::new(options), parsed, out)
}
