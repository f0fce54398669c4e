// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Figures for people: tables that are aligned, and Markdown, too.

use std::fmt;

/// What stands where there is no figure.
pub const NONE: &str = "–";

/// With about three digits that count; small whole numbers as they are.
pub fn figure(value: f64) -> String {
    match value {
        _ if !value.is_finite() => NONE.into(),
        9999.5.. if value < 999_500.0 => figure(value / 1e3) + " k",
        9999.5.. => figure(value / 1e6) + " M",
        _ if value.fract() == 0.0 => format!("{value:.0}"),
        ..0.0995 => format!("{value:.3}"),
        ..9.995 => format!("{value:.2}"),
        ..99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// A table. Its cells may begin with a sign: ★ the best, ≈ nearly so, ✓ good, ✗ not, ⚠ alarming.
#[derive(Debug)]
pub struct Table {
    /// The names of the columns.
    pub head: Vec<String>,
    /// The rows, each with a cell for each column.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// Under a head such as `name | size`.
    pub fn new(head: &str, rows: impl IntoIterator<Item = Vec<String>>) -> Self {
        Self {
            head: head.split(" | ").map(String::from).collect(),
            rows: rows.into_iter().collect(),
        }
    }
}

/// Words to the left, figures to the right: a column has one or the other.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_figure = |text: &str| {
            let text = text.trim_start_matches(['★', '≈', ' ']);
            text.starts_with(|c: char| c.is_ascii_digit() || "-–".contains(c))
        };
        let column = |column: usize| {
            let cells = || self.rows.iter().map(|row| &row[column]);
            let all = cells().chain([&self.head[column]]);
            let width = all.map(|cell| cell.chars().count()).max();
            (
                width.unwrap_or_default(),
                cells().all(|cell| is_figure(cell)),
            )
        };
        let columns: Vec<(usize, bool)> = (0..self.head.len()).map(column).collect();
        let line = |row: &Vec<String>| {
            let cell = |(cell, &(width, figures)): (&String, &(usize, bool))| match figures {
                true => format!("| {cell:>width$} "),
                false => format!("| {cell:<width$} "),
            };
            row.iter().zip(&columns).map(cell).collect::<String>() + "|\n"
        };
        f.write_str(&line(&self.head))?;
        for &(width, figures) in &columns {
            let end = if figures { ':' } else { '-' };
            write!(f, "|{}{end}", "-".repeat(width + 1))?;
        }
        f.write_str("|\n")?;
        for row in &self.rows {
            f.write_str(&line(row))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits() {
        let cases = [
            (0.0, "0"),
            (0.0123, "0.012"),
            (1.0, "1"),
            (1.25, "1.25"),
            (9.999, "10.0"),
            (45.67, "45.7"),
            (4567.8, "4568"),
            (45_678.0, "45.7 k"),
            (10_000.0, "10 k"),
            (999_990.0, "1.00 M"),
            (123_456_789.0, "123 M"),
            (f64::NAN, NONE),
            (f64::INFINITY, NONE),
        ];
        for (value, text) in cases {
            assert_eq!(figure(value), text);
        }
    }
    #[test]
    fn columns_line_up() {
        let row = |a: &str, b: &str| vec![a.into(), b.into()];
        let table = Table::new("a | ÷", [row("word", "★ 1.50"), row("1", "–")]);
        let lines = [
            "| a    |      ÷ |",
            "|------|-------:|",
            "| word | ★ 1.50 |",
            "| 1    |      – |",
        ];
        assert_eq!(table.to_string(), lines.join("\n") + "\n");
    }
}
