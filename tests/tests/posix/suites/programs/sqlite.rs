//! sqlite: a mix of statements with each of its journals, and a writer that is killed.

use super::Places;
use crate::matrix::full;
use crate::outcome::output_of;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

const JOURNALS: [&str; 4] = ["delete", "truncate", "persist", "wal"];

fn sql(database: &Path, script: &str) -> Result<String> {
    let output = output_of(
        Command::new("sqlite3")
            .arg("-bail")
            .arg(database)
            .arg(script),
    )?;
    Ok(output.trim().to_owned())
}

/// Rows made of numbers, so that every run makes the same.
fn statements(journal: &str, rows: u32) -> String {
    format!(
        "PRAGMA journal_mode={journal};
         CREATE TABLE a(id INTEGER PRIMARY KEY, n INTEGER, t TEXT);
         BEGIN;
         WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM c WHERE i<{rows})
             INSERT INTO a SELECT i, (i*7919)%{rows}, printf('row %d of %x', i, i*i) FROM c;
         COMMIT;
         CREATE INDEX by_n ON a(n);
         CREATE TABLE b AS SELECT n, count(*) AS c, group_concat(t) AS ts FROM a GROUP BY n%97;
         UPDATE a SET t = t || ' changed' WHERE n BETWEEN {rows}/4 AND {rows}/2;
         DELETE FROM a WHERE id%5=0;
         INSERT INTO a(n,t) SELECT n, upper(t) FROM a WHERE id%3=0;
         CREATE TABLE big(data BLOB);
         INSERT INTO big SELECT zeroblob(300000) FROM a LIMIT 8;
         UPDATE big SET data = CAST(printf('%.200000c', 'x') AS BLOB) WHERE rowid%2=0;
         DELETE FROM big WHERE rowid%4=1;
         SAVEPOINT s; DELETE FROM a; ROLLBACK TO s; RELEASE s;
         VACUUM;
         PRAGMA wal_checkpoint(TRUNCATE);
         PRAGMA integrity_check;"
    )
}

pub(super) fn mix(places: &Places<'_>) -> Result<String> {
    let rows = if full() { 50_000 } else { 5_000 };
    let mut found = String::new();
    for journal in JOURNALS {
        let database = places.dir.join(journal);
        let said = sql(&database, &statements(journal, rows))?;
        ensure!(said.ends_with("ok"), "the integrity check says: {said}");
        let sums = "SELECT count(*), sum(n), sum(length(t)) FROM a;
            SELECT count(*), sum(c), sum(length(ts)) FROM b;
            SELECT count(*), sum(length(data)) FROM big;
            SELECT t FROM a ORDER BY n, id LIMIT 1 OFFSET 1000;";
        found = format!("{found} {journal}: {said} {}", sql(&database, sums)?).replace('\n', " ");
        fs::remove_file(&database)?;
    }
    Ok(found)
}

/// Reads what the writer has committed until there are `enough`; gives the last one.
fn committed(writer: &mut Child, enough: u32) -> Result<u32> {
    let out = writer.stdout.take().context("the writer's output")?;
    let mut last = 0;
    for line in BufReader::new(out).lines() {
        let Ok(number) = line?.parse() else { continue };
        last = number;
        if last >= enough {
            break;
        }
    }
    Ok(last)
}

pub(super) fn killed(places: &Places<'_>) -> Result<String> {
    let enough = if full() { 1_000 } else { 100 };
    let database = places.dir.join("database");
    sql(
        &database,
        "PRAGMA journal_mode=wal; CREATE TABLE t(id INTEGER PRIMARY KEY, data BLOB);",
    )?;
    let mut writer = Command::new("stdbuf")
        .args(["-oL", "sqlite3", "-bail"])
        .arg(&database)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start sqlite3")?;
    let mut statements = writer.stdin.take().context("the writer's input")?;
    let feeder = thread::spawn(move || {
        // it ends when the writer is gone
        let mut id = 0_u64;
        let mut more =
            statements.write_all(b"PRAGMA synchronous=full; PRAGMA wal_autocheckpoint=50;\n");
        while more.is_ok() {
            id += 1;
            more = writeln!(
                statements,
                "BEGIN; INSERT INTO t VALUES({id}, zeroblob(3000)); UPDATE t SET data=data WHERE id={id}/2; COMMIT; SELECT {id};"
            );
        }
    });
    let last = committed(&mut writer, enough);
    writer.kill()?;
    writer.wait()?;
    let _ = feeder.join();
    let last = last?;
    ensure!(
        last >= enough,
        "the writer ended by itself after {last} rows"
    );
    let check = sql(
        &database,
        "PRAGMA integrity_check; SELECT count(*) = max(id), max(id) FROM t;",
    )?;
    let mut lines = check.lines();
    ensure!(
        lines.next() == Some("ok"),
        "the integrity check says: {check}"
    );
    let (whole, there) = lines
        .next()
        .and_then(|line| line.split_once('|'))
        .context("no count of rows")?;
    ensure!(whole == "1", "there are rows missing in the middle");
    let there: u32 = there.parse()?;
    ensure!(
        there >= last,
        "{last} rows were committed, {there} are there"
    );
    Ok("all that was committed".into())
}
