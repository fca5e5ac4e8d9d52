//! `ferry completion`: completion of command lines in bash, zsh and fish.
//!
//! The shells ask the tool itself (`ferry complete -- WORDS`, the last of which is being typed), so what they offer is
//! what this build knows: the table of methods for `ferry rpc`, the command line's own description for the rest, and the
//! running service for the names of what there is. One candidate per line, a tab, and what it means; `:files` instead
//! leaves the word to the shell. Nothing here may make a shell wait, and no trouble is worth a message in one.

mod live;

use core::fmt::Write;
use std::ffi::OsString;
use std::io;
use std::path::Path;

use clap::Arg;
use clap::Command;
use clap::ValueEnum;
use clap::builder::StyledStr;
use ferry_controlplane::rpc::cli::complete;
use ferry_controlplane::rpc::cli::complete::Expected;
use ferry_controlplane::rpc::table::Method;
use ferry_controlplane::rpc::table::Param;

use crate::rpc;
use crate::rpc::Globals;

/// What the shell completes itself.
const FILES: &str = ":files";

/// The command line of `ferry completion`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The shell to print the script for; its first line says how to load it
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// The command line of `ferry complete`, which the scripts call.
#[derive(clap::Args, Debug)]
pub struct Words {
    /// The command line so far, with the name of the program
    #[arg(last = true)]
    words: Vec<OsString>,
}

/// Prints the script for a shell.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut called = std::env::args().next().unwrap_or_default();
    if called.contains('/') {
        // Found where it is now, wherever the shell will be.
        called = std::env::current_exe()?.to_string_lossy().into_owned();
    }
    print(&script(args.shell, &called)?)
}

fn print(text: &str) -> anyhow::Result<()> {
    match io::Write::write_all(&mut io::stdout().lock(), text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

fn script(shell: Shell, called: &str) -> anyhow::Result<String> {
    let text = match shell {
        Shell::Bash => include_str!("completion/ferry.bash"),
        Shell::Zsh => include_str!("completion/ferry.zsh"),
        Shell::Fish => include_str!("completion/ferry.fish"),
    };
    let names = format!("ferry {}", rpc::NAMES.join(" "));
    Ok(text
        .replace("@FERRY@", &shlex::try_quote(called)?)
        .replace("@NAMES@", &names))
}

/// Prints what the last word may become; `commands` describes the command line of the tool.
pub fn complete(words: &Words, commands: &Command) -> anyhow::Result<()> {
    let lossy = |word: &OsString| word.to_string_lossy().into_owned();
    let words: Vec<String> = words.words.iter().map(lossy).collect();
    print(&candidates(words, commands).unwrap_or_default())
}

/// A word that may come, and what it means.
struct Candidate {
    word: String,
    help: String,
}

fn candidate(word: impl Into<String>, help: impl Into<String>) -> Candidate {
    Candidate {
        word: word.into(),
        help: help.into(),
    }
}

/// What may come.
enum Choice {
    Words(Vec<Candidate>),
    Files,
}

fn candidates(words: Vec<String>, commands: &Command) -> Option<String> {
    let (mut words, split) = join_values(words);
    let typed = words.pop()?;
    // An option with its value attached: the value is completed, and what goes before it stays.
    let (option, value) = match typed.split_once('=') {
        Some((option, value)) if option.starts_with("--") => (Some(option.to_owned()), value),
        _ => (None, typed.as_str()),
    };
    words.extend(option.clone());
    let os = words.iter().map(OsString::from);
    let choice = match rpc::requested(os) {
        Some(rest) => {
            let lossy = |word: &OsString| word.to_string_lossy().into_owned();
            let rest: Vec<String> = rest.iter().map(lossy).collect();
            rpc_choice(&rest, value, option.as_deref())
        }
        None => own_choice(words.get(1..)?, value, commands),
    }?;
    let Choice::Words(found) = choice else {
        return Some(format!("{FILES}\n"));
    };
    let before = match (&option, split) {
        (Some(option), false) => format!("{option}="),
        _ => String::new(),
    };
    let mut text = String::new();
    for Candidate { word, help } in found {
        if word.starts_with(value) {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{before}{word}\t{help}");
        }
    }
    Some(text)
}

/// Puts `--option = value` together again, which bash takes apart; says whether the last word was one.
fn join_values(words: Vec<String>) -> (Vec<String>, bool) {
    let mut joined: Vec<String> = Vec::new();
    let mut split = false;
    let mut after_sign = false;
    for word in words {
        let is_sign = word == "=";
        match joined.last_mut() {
            Some(last) if (is_sign || after_sign) && last.starts_with("--") => {
                last.push_str(&word);
                split = true;
            }
            _ => {
                joined.push(word);
                split = false;
            }
        }
        after_sign = is_sign;
    }
    (joined, split)
}

/// What may come in `ferry rpc` after these words, the last of them with a value attached or not.
fn rpc_choice(words: &[String], typed: &str, attached: Option<&str>) -> Option<Choice> {
    let (socket, rest) = match rpc::globals(words)? {
        Globals::Value(option) if option == "--verbose" => {
            return Some(fixed(["ERROR", "INFO", "DEBUG"]));
        }
        Globals::Value(option) if option.starts_with("--server") || option == "-s" => {
            return Some(Choice::Files);
        }
        Globals::Value(_) => return None,
        Globals::Complete { socket, rest } => (socket, rest),
    };
    match complete::expected(rest)? {
        Expected::Methods if typed.starts_with('-') => {
            let all = rpc::described();
            Some(Choice::Words(
                all.map(|(word, help)| candidate(word, help)).collect(),
            ))
        }
        Expected::Methods => Some(Choice::Words(
            complete::methods()
                .map(|of| candidate(of.word, of.help))
                .collect(),
        )),
        Expected::Value(method, param) => Some(value_choice(method, param, &socket)),
        // Of the options that need no value, flags take one that is attached.
        Expected::Options(method, _) if attached.is_some() => {
            let flag = attached.and_then(|option| complete::option(method, option));
            flag.map(|_| fixed(["true", "false"]))
        }
        Expected::Options(method, Some(param)) if !typed.starts_with('-') => {
            match value_choice(method, param, &socket) {
                Choice::Words(found) if found.is_empty() => Some(options(method)),
                choice => Some(choice),
            }
        }
        Expected::Options(method, _) => Some(options(method)),
    }
}

fn fixed<const N: usize>(words: [&str; N]) -> Choice {
    Choice::Words(words.map(|word| candidate(word, "")).into())
}

fn options(method: &'static Method) -> Choice {
    let all = complete::options(method);
    Choice::Words(all.map(|of| candidate(of.word, of.help)).collect())
}

/// Values of a parameter: files, what its help lists, or the names of what the service has.
fn value_choice(method: &Method, param: &Param, socket: &Path) -> Choice {
    if ["root_path", "json_conf", "output"].contains(&param.name) {
        return Choice::Files;
    }
    let mut words: Vec<Candidate> = complete::listed(param)
        .into_iter()
        .map(|word| candidate(word, ""))
        .collect();
    if words.is_empty() {
        let names = live::names(method, param, socket).into_iter();
        words.extend(names.map(|name| candidate(name, param.help)));
    }
    Choice::Words(words)
}

/// What may come in the other commands after these words.
fn own_choice(words: &[String], typed: &str, commands: &Command) -> Option<Choice> {
    let Some((name, words)) = words.split_first() else {
        let all = commands.get_subcommands().filter(|one| !one.is_hide_set());
        return Some(Choice::Words(
            all.map(|one| candidate(one.get_name(), about(one.get_about())))
                .collect(),
        ));
    };
    let command = commands
        .get_subcommands()
        .find(|one| one.get_name() == name)?;
    let names = |arg: &Arg, word: &str| {
        let long = word.strip_prefix("--");
        let short = word.strip_prefix('-').filter(|rest| rest.len() == 1);
        long.is_some_and(|long| {
            arg.get_long_and_visible_aliases()
                .is_some_and(|all| all.contains(&long))
        }) || short.is_some_and(|short| arg.get_short().is_some_and(|own| short.starts_with(own)))
    };
    let last = words
        .last()
        .and_then(|word| command.get_arguments().find(|arg| names(arg, word)));
    if let Some(arg) = last.filter(|arg| arg.get_action().takes_values()) {
        return Some(possible(arg));
    }
    if !typed.starts_with('-')
        && let Some(arg) = command.get_positionals().next()
    {
        return Some(possible(arg));
    }
    let all = command.get_arguments().filter(|arg| !arg.is_hide_set());
    Some(Choice::Words(
        all.filter_map(|arg| {
            Some(candidate(
                format!("--{}", arg.get_long()?),
                about(arg.get_help()),
            ))
        })
        .collect(),
    ))
}

fn about(text: Option<&StyledStr>) -> String {
    let text = text.map(StyledStr::to_string).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

/// The values of an argument that has a list of them; others may be files.
fn possible(arg: &Arg) -> Choice {
    let values = arg.get_possible_values();
    if values.is_empty() {
        return Choice::Files;
    }
    Choice::Words(
        values
            .iter()
            .map(|value| candidate(value.get_name(), about(value.get_help())))
            .collect(),
    )
}
