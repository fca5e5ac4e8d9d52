//! What the tests of a suite came to, here and there.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fmt;
use std::process::Command;

/// What one test came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It passed, and found this: the same wherever it runs.
    Passed(String),
    /// It failed, and this is why.
    Failed(String),
    /// It did not apply.
    Skipped,
}

impl Outcome {
    pub(crate) fn of(result: Result<String>) -> Self {
        match result {
            Ok(found) => Self::Passed(found),
            Err(why) => Self::Failed(format!("{why:#}")),
        }
    }

    /// Whether a mount may come to this where the export itself comes to `direct`.
    pub(crate) fn agrees_with(&self, direct: Option<&Self>) -> bool {
        match (self, direct) {
            (Self::Passed(here), Some(Self::Passed(there))) => here == there,
            (Self::Failed(_), Some(Self::Passed(_) | Self::Skipped) | None) => false,
            (Self::Skipped, Some(Self::Passed(_)) | None) => false,
            (Self::Passed(_) | Self::Failed(_) | Self::Skipped, _) => true,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed(found) if found.is_empty() => write!(f, "passed"),
            Self::Passed(found) => write!(f, "passed, found {found}"),
            Self::Failed(why) => write!(f, "failed: {why}"),
            Self::Skipped => write!(f, "was skipped"),
        }
    }
}

/// The outcome of each test of a suite.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcomes(BTreeMap<String, Outcome>);

impl Outcomes {
    pub(crate) fn add(&mut self, test: impl Into<String>, outcome: Outcome) {
        self.0.insert(test.into(), outcome);
    }

    /// The tests that came to something else than on the export itself, by what `agrees` says, each with both outcomes.
    pub(crate) fn differing_from(
        &self,
        direct: &Self,
        agrees: impl Fn(&str, &Outcome, Option<&Outcome>) -> bool,
    ) -> Vec<String> {
        let other = self
            .0
            .iter()
            .filter(|(test, here)| !agrees(test, here, direct.0.get(*test)))
            .map(|(test, here)| match (here, direct.0.get(test)) {
                (Outcome::Passed(here), Some(Outcome::Passed(there))) => {
                    format!("{test} passed, but {}", first_difference(here, there))
                }
                (here, Some(there)) => format!("{test} {here}\n  on the export it {there}"),
                (here, None) => format!("{test} {here}\n  on the export it is missing"),
            });
        let missing = direct
            .0
            .keys()
            .filter(|test| !self.0.contains_key(*test))
            .map(|test| format!("{test} is missing"));
        other.chain(missing).collect()
    }

    /// The tests that failed, with the reason.
    pub(crate) fn failed(&self) -> impl Iterator<Item = String> {
        self.0
            .iter()
            .filter(|(_, outcome)| matches!(outcome, Outcome::Failed(_)))
            .map(|(test, outcome)| format!("{test} {outcome}"))
    }

    pub(crate) fn any_passed(&self) -> bool {
        let mut outcomes = self.0.values();
        outcomes.any(|outcome| matches!(outcome, Outcome::Passed(_)))
    }

    /// How many came to what, as the table shows it.
    pub(crate) fn counts(&self) -> String {
        let count = |wanted: fn(&Outcome) -> bool| self.0.values().filter(|o| wanted(o)).count();
        let passed = count(|outcome| matches!(outcome, Outcome::Passed(_)));
        let mut text = format!("{passed} passed");
        for (number, what) in [
            (
                count(|outcome| matches!(outcome, Outcome::Failed(_))),
                "failed",
            ),
            (count(|outcome| *outcome == Outcome::Skipped), "skipped"),
        ] {
            if number > 0 {
                text.push_str(&format!(", {number} {what}"));
            }
        }
        text
    }
}

impl FromIterator<(String, Outcome)> for Outcomes {
    fn from_iter<T: IntoIterator<Item = (String, Outcome)>>(tests: T) -> Self {
        Self(tests.into_iter().collect())
    }
}

/// The lines where two findings part.
fn first_difference(here: &str, there: &str) -> String {
    let mut lines = here.lines().zip(there.lines()).enumerate();
    match lines.find(|(_, (here, there))| here != there) {
        Some((number, (here, there))) => {
            let line = number + 1;
            format!("found '{here}' in line {line}, and on the export '{there}'")
        }
        None => format!(
            "found {} lines, and on the export {}",
            here.lines().count(),
            there.lines().count()
        ),
    }
}

/// What a program prints that must succeed.
pub(crate) fn output_of(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("run {command:?}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(
        output.status.success(),
        "{command:?} ended with {}:\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    Ok(text(&output.stdout))
}

#[cfg(test)]
mod tests {
    use super::{Outcome, Outcomes};

    fn outcomes(list: &[(&str, Outcome)]) -> Outcomes {
        list.iter()
            .map(|(test, outcome)| ((*test).to_owned(), outcome.clone()))
            .collect()
    }

    #[test]
    fn only_what_the_export_does_better_is_a_difference() {
        let passed = || Outcome::Passed("1".into());
        let failed = || Outcome::Failed("no".into());
        let direct = outcomes(&[
            ("better", failed()),
            ("found other things", passed()),
            ("lost", passed()),
            ("same", passed()),
            ("same failure", failed()),
            ("same skip", Outcome::Skipped),
            ("skipped here", passed()),
            ("worse", passed()),
        ]);
        let here = outcomes(&[
            ("better", passed()),
            ("found other things", Outcome::Passed("2".into())),
            ("new failure", failed()),
            ("same", passed()),
            ("same failure", failed()),
            ("same skip", Outcome::Skipped),
            ("skipped here", Outcome::Skipped),
            ("worse", failed()),
        ]);
        let names: Vec<String> = here
            .differing_from(&direct, |_, here, direct| here.agrees_with(direct))
            .iter()
            .map(|line| line.split(" passed").next().unwrap_or_default().to_owned())
            .map(|line| line.lines().next().unwrap_or_default().to_owned())
            .collect();
        assert_eq!(
            names,
            [
                "found other things",
                "new failure failed: no",
                "skipped here was skipped",
                "worse failed: no",
                "lost is missing",
            ]
        );
        assert_eq!(here.counts(), "3 passed, 3 failed, 2 skipped");
    }
}
