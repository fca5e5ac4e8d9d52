//! What may come next on a command line of `ferry rpc`, by the table of methods.

use super::super::table;
use super::super::table::Kind;
use super::super::table::METHODS;
use super::super::table::Method;
use super::super::table::Param;
use super::is_option;

/// What a word may be completed to.
#[derive(Clone, Copy)]
pub enum Expected {
    /// The name of a method.
    Methods,
    /// An option of the method, or if it takes any by position the value of a parameter.
    Options(&'static Method, Option<&'static Param>),
    /// The value of a parameter of the method.
    Value(&'static Method, &'static Param),
}

/// An option or a method, and what it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The word.
    pub word: &'static str,
    /// One line about it.
    pub help: &'static str,
}

/// What the word after these may be; the first of them is the name of the method. `None` when nothing fits.
pub fn expected(words: &[String]) -> Option<Expected> {
    let Some((name, words)) = words.split_first() else {
        return Some(Expected::Methods);
    };
    let method = table::find(name)?;
    let mut given: Vec<&str> = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if !is_option(word) {
            given.extend(next_positional(method, &given).map(|param| param.name));
            continue;
        }
        // An option with its value attached, or one that is not known, needs no word after it.
        let Some(param) = option(method, word) else {
            continue;
        };
        given.push(param.name);
        let flag = matches!(param.kind, Kind::Flag | Kind::OldFlag);
        if !flag && words.next().is_none() {
            return Some(Expected::Value(method, param));
        }
    }
    Some(Expected::Options(method, next_positional(method, &given)))
}

/// The parameter that an option sets.
pub fn option(method: &'static Method, option: &str) -> Option<&'static Param> {
    method
        .params
        .iter()
        .find(|param| param.options.contains(&option) || param.off_options.contains(&option))
}

fn next_positional(method: &'static Method, given: &[&str]) -> Option<&'static Param> {
    method
        .params
        .iter()
        .find(|param| param.positional && !given.contains(&param.name))
}

/// The names of methods and client commands.
pub fn methods() -> impl Iterator<Item = Candidate> {
    METHODS.iter().map(|method| Candidate {
        word: method.name,
        help: method.help,
    })
}

/// The options of a method, each in its long form if it has one, as how it is written is the same otherwise.
pub fn options(method: &'static Method) -> impl Iterator<Item = Candidate> {
    let all = method.params.iter().flat_map(|param| {
        let long = param
            .options
            .iter()
            .find(|option| option.starts_with("--"))
            .or(param.options.first());
        let all = long.into_iter().chain(param.off_options);
        all.map(|word| Candidate {
            word,
            help: param.help,
        })
    });
    all.chain([Candidate {
        word: "--help",
        help: "explain the method",
    }])
}

/// The values that the help of a parameter lists: several single words, at its end behind a colon if there is more.
pub fn listed(param: &Param) -> Vec<&'static str> {
    let list = param.help.rsplit(": ").next().unwrap_or_default();
    let parts: Vec<&str> = list
        .split(", ")
        .flat_map(|part| part.split(" or "))
        .collect();
    let single = parts.iter().all(|part| !part.contains(' '));
    if single && parts.len() > 1 {
        parts
    } else {
        Vec::new()
    }
}
