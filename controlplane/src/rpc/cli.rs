//! The command line of `ferry rpc`, parsed by the table: words become a method and its parameters.
//!
//! Long options may be shortened as long as they stay unique, values may follow after `=`, and the value of a short
//! option may follow at once, as users of the original tool expect.

pub mod complete;
mod reference;

use core::fmt::Write;

use serde_json::Map;
use serde_json::Value;

use super::table;
use super::table::Kind;
use super::table::METHODS;
use super::table::Method;
use super::table::Param;
pub use reference::reference;

/// A command, ready to be sent.
pub struct Invocation {
    /// What to call.
    pub method: &'static Method,
    /// Its parameters; empty when none were given.
    pub params: Map<String, Value>,
}

/// What a command line asks for.
pub enum Parsed {
    /// To call a method.
    Call(Invocation),
    /// To explain one.
    Help(&'static Method),
}

/// Why words are not a command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CliError {
    /// There is no such method.
    #[error("there is no method {name}{}", hint(.nearest))]
    UnknownMethod {
        /// What was asked for.
        name: String,
        /// The method that was probably meant.
        nearest: Option<&'static str>,
    },
    /// The method has no such option.
    #[error("{method}: there is no option {option}{}; {method} -h lists the options", hint(.nearest))]
    UnknownOption {
        /// The method.
        method: &'static str,
        /// The option.
        option: String,
        /// The option that was probably meant.
        nearest: Option<&'static str>,
    },
    /// A shortened option fits several.
    #[error("{method}: option {option} is ambiguous: {}", .candidates.join(", "))]
    Ambiguous {
        /// The method.
        method: &'static str,
        /// The option.
        option: String,
        /// What it could be.
        candidates: Vec<&'static str>,
    },
    /// An option ends the line but needs a value.
    #[error("{method}: option {option} needs a value")]
    NoValue {
        /// The method.
        method: &'static str,
        /// The option.
        option: String,
    },
    /// A value that does not fit.
    #[error("{method}: {param}: {value:?} is not {expected}")]
    BadValue {
        /// The method.
        method: &'static str,
        /// The parameter.
        param: &'static str,
        /// What was given.
        value: String,
        /// What would fit.
        expected: &'static str,
    },
    /// More words than the method takes.
    #[error("{method}: {word:?} is one word too many")]
    TooMany {
        /// The method.
        method: &'static str,
        /// The first of them.
        word: String,
    },
    /// A mandatory parameter has not been given.
    #[error("{method}: {} must be given", .missing.join(", "))]
    Missing {
        /// The method.
        method: &'static str,
        /// How to give each.
        missing: Vec<String>,
    },
}

fn hint(nearest: &Option<&'static str>) -> String {
    nearest
        .map(|name| format!("; did you mean {name}?"))
        .unwrap_or_default()
}

impl CliError {
    /// Whether more words could complete the command.
    pub fn wants_more(&self) -> bool {
        matches!(self, CliError::NoValue { .. } | CliError::Missing { .. })
    }
}

struct Parser {
    method: &'static Method,
    params: Map<String, Value>,
    positional: usize,
}

/// Parses a method's name and what follows it.
pub fn parse(name: &str, words: &[String]) -> Result<Parsed, CliError> {
    let Some(method) = table::find(name) else {
        return Err(CliError::UnknownMethod {
            name: name.to_owned(),
            nearest: nearest(name),
        });
    };
    let mut parser = Parser {
        method,
        params: Map::new(),
        positional: 0,
    };
    let mut words = words.iter();
    let mut only_positional = false;
    while let Some(word) = words.next() {
        if only_positional || !is_option(word) {
            parser.take_positional(word)?;
        } else if word == "--" {
            only_positional = true;
        } else if word == "-h" || word == "--help" {
            return Ok(Parsed::Help(method));
        } else {
            parser.take_option(word, &mut words)?;
        }
    }
    parser.finish().map(Parsed::Call)
}

/// Negative numbers are values.
fn is_option(word: &str) -> bool {
    word.starts_with('-') && word.len() > 1 && word.parse::<f64>().is_err()
}

impl Parser {
    fn set(&mut self, param: &Param, word: &str) -> Result<(), CliError> {
        let bad = |expected| CliError::BadValue {
            method: self.method.name,
            param: param.name,
            value: word.to_owned(),
            expected,
        };
        let value = match param.kind {
            Kind::Text => Value::from(word),
            Kind::Number => {
                Value::from(parse_number(word).ok_or_else(|| bad("a number from 0 to 4294967295"))?)
            }
            Kind::Big => Value::from(parse_big(word).ok_or_else(|| bad("a number"))?),
            Kind::Signed => Value::from(word.parse::<i32>().map_err(|_| bad("a whole number"))?),
            Kind::Flag | Kind::OldFlag => match word.to_ascii_lowercase().as_str() {
                "true" | "1" | "yes" | "on" => Value::Bool(true),
                "false" | "0" | "no" | "off" => Value::Bool(false),
                _ => return Err(bad("true or false")),
            },
        };
        self.params.insert(param.name.to_owned(), value);
        Ok(())
    }

    /// A word without an option goes to the next positional parameter that has not been given otherwise.
    fn take_positional(&mut self, word: &str) -> Result<(), CliError> {
        let params = self.method.params;
        while let Some(param) = params.get(self.positional) {
            self.positional += 1;
            if param.positional && !self.params.contains_key(param.name) {
                return self.set(param, word);
            }
        }
        Err(CliError::TooMany {
            method: self.method.name,
            word: word.to_owned(),
        })
    }

    fn take_option<'a>(
        &mut self,
        word: &str,
        rest: &mut impl Iterator<Item = &'a String>,
    ) -> Result<(), CliError> {
        let (option, mut value) = match word.split_once('=') {
            Some((option, value)) if word.starts_with("--") => (option, Some(value)),
            _ => (word, None),
        };
        let (param, on) = match self.find_option(option)? {
            Some(found) => found,
            None => {
                let (short, attached) = split_short(word).ok_or_else(|| self.unknown(word))?;
                value = Some(attached);
                self.exact_option(short).ok_or_else(|| self.unknown(word))?
            }
        };
        if matches!(param.kind, Kind::Flag | Kind::OldFlag) {
            return match value {
                None => {
                    self.params.insert(param.name.to_owned(), Value::Bool(on));
                    Ok(())
                }
                Some(value) if on => self.set(param, value),
                Some(_) => Err(self.unknown(word)),
            };
        }
        let value = match value {
            Some(value) => value,
            None => rest.next().ok_or_else(|| CliError::NoValue {
                method: self.method.name,
                option: word.to_owned(),
            })?,
        };
        self.set(param, value)
    }

    fn unknown(&self, option: &str) -> CliError {
        CliError::UnknownOption {
            method: self.method.name,
            option: option.to_owned(),
            nearest: closest(option, self.options().map(|(known, ..)| known)),
        }
    }

    fn options(&self) -> impl Iterator<Item = (&'static str, &'static Param, bool)> + use<> {
        let params = self.method.params.iter();
        params.flat_map(|param| {
            let on = param
                .options
                .iter()
                .map(move |option| (*option, param, true));
            on.chain(
                param
                    .off_options
                    .iter()
                    .map(move |option| (*option, param, false)),
            )
        })
    }

    fn exact_option(&self, option: &str) -> Option<(&'static Param, bool)> {
        self.options()
            .find(|(known, ..)| *known == option)
            .map(|(_, param, on)| (param, on))
    }

    fn find_option(&self, option: &str) -> Result<Option<(&'static Param, bool)>, CliError> {
        if let Some(found) = self.exact_option(option) {
            return Ok(Some(found));
        }
        if !option.starts_with("--") || option.len() < 3 {
            return Ok(None);
        }
        let fits: Vec<_> = self
            .options()
            .filter(|(known, ..)| known.starts_with(option))
            .collect();
        let Some((_, first, on)) = fits.first().copied() else {
            return Ok(None);
        };
        // Two spellings of one option are no ambiguity.
        if fits
            .iter()
            .all(|(_, param, other)| param.name == first.name && *other == on)
        {
            return Ok(Some((first, on)));
        }
        let candidates = fits.into_iter().map(|(known, ..)| known).collect();
        Err(CliError::Ambiguous {
            method: self.method.name,
            option: option.to_owned(),
            candidates,
        })
    }

    fn finish(self) -> Result<Invocation, CliError> {
        let lacks = |param: &&Param| param.mandatory && !self.params.contains_key(param.name);
        let missing: Vec<String> = self
            .method
            .params
            .iter()
            .filter(lacks)
            .map(how_to_give)
            .collect();
        if !missing.is_empty() {
            return Err(CliError::Missing {
                method: self.method.name,
                missing,
            });
        }
        Ok(Invocation {
            method: self.method,
            params: self.params,
        })
    }
}

/// Numbers may be hexadecimal: the guide writes sizes so.
fn parse_number(word: &str) -> Option<u32> {
    parse_big(word).and_then(|number| u32::try_from(number).ok())
}

fn parse_big(word: &str) -> Option<u64> {
    match word.strip_prefix("0x").or_else(|| word.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => word.parse().ok(),
    }
}

/// `-tDOCA` is `-t DOCA`.
fn split_short(word: &str) -> Option<(&str, &str)> {
    let split = word.char_indices().nth(2).map(|(position, _)| position)?;
    (!word.starts_with("--")).then(|| word.split_at(split))
}

fn how_to_give(param: &Param) -> String {
    let option = param
        .options
        .iter()
        .find(|option| option.starts_with("--"))
        .or(param.options.first());
    option.map_or_else(|| param.name.to_owned(), |option| (*option).to_owned())
}

/// The method whose name is closest, if any is close.
pub fn nearest(name: &str) -> Option<&'static str> {
    closest(name, METHODS.iter().map(|method| method.name))
}

/// Which of these names is closest, if any is close.
fn closest(name: &str, known: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let limit = name.len() / 3 + 1;
    known
        .map(|known| (distance(name, known), known))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, known)| known)
}

/// Edit distance by bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(b.bytes()) {
            let best = (diagonal + usize::from(x != y))
                .min(left + 1)
                .min(*cell + 1);
            diagonal = *cell;
            *cell = best;
            left = best;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

/// The help of one method.
pub fn help(method: &Method) -> String {
    let mut text = format!("usage: ferry rpc {} [-h]", method.name);
    for param in method.params {
        let value = if matches!(param.kind, Kind::Flag | Kind::OldFlag) {
            String::new()
        } else {
            format!(" {}", param.name.to_uppercase())
        };
        let option = how_to_give(param);
        let usage = match (param.options.is_empty(), param.mandatory) {
            (true, true) => param.name.to_owned(),
            (true, false) => format!("[{}]", param.name),
            (false, true) => format!("{option}{value}"),
            (false, false) => format!("[{option}{value}]"),
        };
        let _ = write!(text, " {usage}");
    }
    let _ = write!(text, "\n\n{}\n", method.help);
    if !method.params.is_empty() {
        text.push_str("\nparameters:\n");
    }
    for param in method.params {
        let mut names: Vec<&str> = Vec::new();
        if param.positional {
            names.push(param.name);
        }
        names.extend(param.options);
        names.extend(param.off_options);
        let _ = write!(text, "  {}\n        {}", names.join(", "), param.help);
        if !param.default.is_empty() {
            let _ = write!(text, " (default: {})", param.default);
        }
        text.push('\n');
    }
    text
}

/// One line per method.
pub fn list() -> String {
    let mut methods: Vec<&Method> = METHODS.iter().collect();
    methods.sort_by_key(|method| method.name);
    let width = methods
        .iter()
        .map(|method| method.name.len())
        .max()
        .unwrap_or_default();
    methods.iter().fold(String::new(), |mut text, method| {
        let _ = writeln!(text, "  {:width$}  {}", method.name, method.help);
        text
    })
}

#[cfg(test)]
mod tests;
