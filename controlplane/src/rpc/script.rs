//! Scripts of commands: one per line, blank lines and lines that begin with `#` skipped, words quoted as in a shell.
//!
//! A line may begin with `--plugin X` and `-v`, as in the guide. A command that cannot be complete yet goes on with the
//! next line, so that a script copied from a page that broke its lines still means the same: an option without its
//! value, a mandatory parameter not given, or a word broken after a hyphen.

use super::cli;
use super::cli::CliError;
use super::cli::Parsed;
use super::table;

/// A command of a script.
pub struct Line {
    /// Number of the line where it begins, from 1.
    pub number: usize,
    /// What it asks for.
    pub parsed: Parsed,
    /// Whether it asks to log requests and responses.
    pub verbose: bool,
}

/// Why a script cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {number}: {problem}")]
pub struct ScriptError {
    /// Number of the line where the command begins, from 1.
    pub number: usize,
    /// What is wrong.
    pub problem: Problem,
}

/// What can be wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A quote is not closed.
    #[error("a quote is not closed")]
    OpenQuote,
    /// Options but no method.
    #[error("there is no method")]
    NoMethod,
    /// The command is wrong.
    #[error(transparent)]
    Command(#[from] CliError),
}

/// Gives the commands of a script one by one; what follows a mistake is not looked at.
pub struct Script<'a> {
    lines: core::iter::Peekable<core::iter::Enumerate<core::str::Lines<'a>>>,
}

impl<'a> Script<'a> {
    /// The commands of `text`.
    pub fn new(text: &'a str) -> Script<'a> {
        Script {
            lines: text.lines().enumerate().peekable(),
        }
    }
}

impl Iterator for Script<'_> {
    type Item = Result<Line, ScriptError>;

    fn next(&mut self) -> Option<Result<Line, ScriptError>> {
        let (index, first) = self.lines.find(|(_, line)| !is_skipped(line))?;
        let number = index + 1;
        let mut text = first.trim().to_owned();
        loop {
            let problem = match command(&text) {
                Ok((parsed, verbose)) if !text.ends_with('-') => {
                    return Some(Ok(Line {
                        number,
                        parsed,
                        verbose,
                    }));
                }
                Ok(_) => None,
                Err(problem) => Some(problem),
            };
            let open = text.ends_with('-') || problem.as_ref().is_some_and(Problem::wants_more);
            let no_method = problem == Some(Problem::NoMethod);
            let fits = |line: &str| !is_skipped(line) && (no_method || !begins_command(line));
            let continuation = self.lines.next_if(|(_, line)| open && fits(line));
            match (continuation, problem) {
                (Some((_, line)), _) => {
                    if !text.ends_with('-') {
                        text.push(' ');
                    }
                    text.push_str(line.trim());
                }
                (None, Some(problem)) => return Some(Err(ScriptError { number, problem })),
                (None, None) => {
                    let (parsed, verbose) = command(&text).ok()?;
                    return Some(Ok(Line {
                        number,
                        parsed,
                        verbose,
                    }));
                }
            }
        }
    }
}

impl Problem {
    fn wants_more(&self) -> bool {
        match self {
            Problem::OpenQuote => false,
            Problem::NoMethod => true,
            Problem::Command(error) => error.wants_more(),
        }
    }
}

fn is_skipped(line: &str) -> bool {
    let line = line.trim();
    line.is_empty() || line.starts_with('#')
}

/// Whether a line cannot continue the one before.
fn begins_command(line: &str) -> bool {
    let first = line.split_whitespace().next().unwrap_or_default();
    first == "--plugin" || first == "-v" || table::find(first).is_some()
}

fn command(text: &str) -> Result<(Parsed, bool), Problem> {
    let words = split(text).ok_or(Problem::OpenQuote)?;
    let mut rest = words.as_slice();
    let mut verbose = false;
    loop {
        rest = match rest {
            [option, _, tail @ ..] if option == "--plugin" => tail,
            [option, tail @ ..] if option.starts_with("--plugin=") => tail,
            [option, tail @ ..] if option == "-v" => {
                verbose = true;
                tail
            }
            [] => return Err(Problem::NoMethod),
            [option] if option == "--plugin" => return Err(Problem::NoMethod),
            [name, tail @ ..] => return Ok((cli::parse(name, tail)?, verbose)),
        };
    }
}

/// Splits a line into words as a shell does: blanks separate, quotes and backslashes protect, `#` begins a comment.
pub fn split(line: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = line.chars();
    let mut quote = None;
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some('\''), '\'') | (Some('"'), '"') => quote = None,
            (Some('"') | None, '\\') => word.get_or_insert_default().push(chars.next()?),
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    quote.is_none().then_some(words)
}

#[cfg(test)]
mod tests;
