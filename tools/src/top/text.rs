//! A frame as text, for files, pipes and tests.

use core::fmt::Write;

use super::view::Table;
use super::view::Tables;

fn table(text: &mut String, table: &Table) {
    let widths = table.widths();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut row = String::new();
        for ((cell, width), column) in cells.zip(&widths).zip(table.columns) {
            // Writing to a string does not fail.
            let _ = match column.word {
                true => write!(row, "{cell:width$}  "),
                false => write!(row, "{cell:>width$}  "),
            };
        }
        text.push_str(row.trim_end());
        text.push('\n');
    };
    line(&mut table.columns.iter().map(|column| column.name));
    for row in &table.rows {
        line(&mut row.iter().map(String::as_str));
    }
}

/// The status line and the tables.
pub(super) fn frame(status: &str, tables: &Tables) -> String {
    let mut text = format!("{status}\n");
    for part in [
        &tables.cores,
        &tables.devices,
        &tables.queues,
        &tables.operations,
    ] {
        if !part.rows.is_empty() {
            text.push('\n');
            table(&mut text, part);
        }
    }
    text
}
