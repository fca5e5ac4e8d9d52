//! `tests/POSIX.md`: what the suites came to, one section for each, one row for each export.

use crate::matrix::{Export, Row, Suite, TRANSPORTS};
use crate::suites::SUITES;
use anyhow::{Context, Result, bail, ensure};
use ferry_tests::repository;
use std::fs;
use std::path::PathBuf;

const HEAD: &str = "# The mount against the directory behind it

Each suite ran on the export itself and on mounts of it through `ferry mount`. A test that comes to something else on a
mount than on the export is a failure of the suite's test, so the columns of a row differ only where the mount does better. What
has not run since a suite changed is `not run`.
`FERRY_POSIX_FULL=1 FERRY_POSIX_TABLE=1 tools/test posix` writes this file.
";
const COLUMNS: &str = "| export | cache | write-back | directly | vfio-user | vhost-user |\n|---|---|---|---|---|---|\n";

fn path() -> PathBuf {
    repository().join("tests/POSIX.md")
}

fn heading(suite: &dyn Suite) -> String {
    format!("\n## {}\n", suite.name())
}

fn cells_of(line: &str) -> Vec<&str> {
    line.trim_matches('|').split('|').map(str::trim).collect()
}

/// The line of an export: what has run now, and else what an earlier run has left there.
fn line(export: &Export, new: &[Row], old: &str) -> String {
    let key = cells(export);
    let before = old
        .lines()
        .map(cells_of)
        .find(|cells| cells.starts_with(&key.each_ref().map(String::as_str)));
    let kept = |column: usize| {
        let cells = before.as_ref()?;
        cells.get(key.len() + column).map(|cell| (*cell).to_owned())
    };
    let now = new.iter().find(|row| row.export == *export);
    let mut counts = vec![now.map(|row| row.direct.clone()).or_else(|| kept(0))];
    for (number, transport) in TRANSPORTS.into_iter().enumerate() {
        let ran = now.and_then(|row| row.mounts.get(&transport).cloned());
        counts.push(ran.or_else(|| kept(1 + number)));
    }
    let counts = counts
        .into_iter()
        .map(|count| count.unwrap_or_else(|| NOT_RUN.into()));
    let all: Vec<String> = key.into_iter().chain(counts).collect();
    format!("| {} |\n", all.join(" | "))
}

fn cells(export: &Export) -> [String; 3] {
    [
        export.backing.to_string(),
        export.cache.to_owned(),
        if export.writeback { "on" } else { "off" }.to_owned(),
    ]
}

/// The text of each suite's section, empty where there is none yet.
fn sections(text: &str) -> Vec<(&'static dyn Suite, String)> {
    SUITES
        .into_iter()
        .map(|suite| {
            let body = text
                .split_once(&heading(suite))
                .map(|(_, rest)| rest.split("\n## ").next().unwrap_or_default())
                .unwrap_or_default();
            (suite, body.trim().to_owned())
        })
        .collect()
}

/// Brings the section of one suite up to date with what has run.
pub(crate) fn rewrite(suite: &dyn Suite, rows: &[Row]) -> Result<()> {
    let old = fs::read_to_string(path()).unwrap_or_default();
    let mut text = HEAD.to_owned();
    for (other, body) in sections(&old) {
        let new = if other.name() == suite.name() {
            rows
        } else {
            &[]
        };
        let exports = other.exports();
        let lines: String = exports.iter().map(|e| line(e, new, &body)).collect();
        text.push_str(&format!(
            "{}\n{}\n\n{COLUMNS}{lines}",
            heading(other),
            other.about()
        ));
    }
    fs::write(path(), text).context("write the table")
}

/// What stands where there is no number yet.
const NOT_RUN: &str = "not run";

/// Whether a cell says how many tests passed, and nothing else than numbers.
fn is_count(cell: &str) -> bool {
    let mut parts = cell.split(", ").map(|part| part.split_once(' '));
    let passed = parts.next().flatten();
    let number = |text: &str| text.parse::<u32>().is_ok_and(|number| number > 0);
    passed.is_some_and(|(count, what)| what == "passed" && number(count))
        && parts.all(|part| {
            part.is_some_and(|(count, what)| number(count) && ["failed", "skipped"].contains(&what))
        })
}

fn check_section(suite: &dyn Suite, body: &str) -> Result<()> {
    ensure!(
        body.starts_with(&suite.about()),
        "its text is not what the suite says about itself"
    );
    let Some((_, rows)) = body.split_once(COLUMNS) else {
        bail!("it has no table with the usual columns");
    };
    let rows: Vec<Vec<&str>> = rows.lines().map(cells_of).collect();
    let named: Vec<[String; 3]> = rows
        .iter()
        .filter_map(|row| match row[..] {
            [backing, cache, writeback, ..] => {
                Some([backing.to_owned(), cache.to_owned(), writeback.to_owned()])
            }
            _ => None,
        })
        .collect();
    let wanted: Vec<[String; 3]> = suite.exports().iter().map(cells).collect();
    ensure!(
        named == wanted,
        "its rows are {named:?}, the suite runs on {wanted:?}"
    );
    for row in rows {
        let counts = row.get(3..).unwrap_or_default();
        ensure!(
            counts.len() == 1 + TRANSPORTS.len()
                && counts.iter().all(|cell| is_count(cell) || *cell == NOT_RUN),
            "the row {row:?} has something else than counts in its columns"
        );
    }
    Ok(())
}

#[test]
fn the_table_has_a_row_for_every_suite_and_export_of_the_matrix() {
    let text = fs::read_to_string(path()).unwrap();
    assert!(text.starts_with(HEAD), "the head of the table is another");
    assert_eq!(
        text.matches("\n## ").count(),
        SUITES.len(),
        "the table has sections that are no suites"
    );
    for (suite, body) in sections(&text) {
        check_section(suite, &body)
            .with_context(|| format!("the section {} of {}", suite.name(), path().display()))
            .unwrap();
    }
}

#[test]
fn counts_are_told_from_other_text() {
    for good in [
        "1 passed",
        "40 passed, 2 failed",
        "9 passed, 1 failed, 3 skipped",
    ] {
        assert!(is_count(good), "{good}");
    }
    for bad in [
        "",
        "not run",
        "0 passed",
        "passed",
        "1 failed",
        "3 passed, 2",
        "3 passed, 0 failed",
    ] {
        assert!(!is_count(bad), "{bad}");
    }
}
