//! What came of a cell, as a table for people that is Markdown, too.

use kvm_integration::lab::{ArmResult, CellResult};

const HEAD: [&str; 11] = [
    "arm",
    "full exits/s",
    "stall ms/s",
    "passes ÷ min",
    "entries/pass",
    "stores/s",
    "÷ best",
    "reaper CPU %",
    "beyond passes",
    "wake-ups/s",
    "per pass",
];

/// The table of one cell, under its name.
pub fn table(result: &CellResult) -> String {
    let best = result.most_stores_per_second();
    let mut rows = vec![HEAD.map(String::from).to_vec()];
    rows.extend(result.arms.iter().map(|arm| row(arm, best)));
    let mut text = format!("### {}\n\n{}", result.cell, aligned(&rows));
    for arm in result.arms.iter().filter(|arm| arm.overruns > 0) {
        text += &format!(
            "\n{}: {} OVERRUNS of rings; its figures mean nothing\n",
            arm.arm, arm.overruns
        );
    }
    text
}

fn row(arm: &ArmResult, best: f64) -> Vec<String> {
    let all = arm.total();
    let or_none = |figure: Option<f64>| figure.map_or("-".into(), |figure| format!("{figure:.2}"));
    let share = all.stores_per_second() / best.max(1.0);
    vec![
        arm.arm.into(),
        figure(all.full_exits_per_second()),
        figure(all.stall_ms_per_second()),
        or_none(all.passes_by_minimum()),
        format!("{:.0}", all.entries_per_pass()),
        figure(all.stores_per_second()),
        if best > 0.0 {
            format!("{share:.3}")
        } else {
            "-".into()
        },
        format!("{:.2}", all.reaper_percent()),
        format!("{:.2}", all.overhead_percent()),
        figure(all.wakeups_per_second()),
        or_none(all.wakeups_per_pass()),
    ]
}

/// With about three digits that count.
fn figure(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        ..0.1 => format!("{value:.3}"),
        ..10.0 => format!("{value:.2}"),
        ..100.0 => format!("{value:.1}"),
        ..1e4 => format!("{value:.0}"),
        ..1e6 => format!("{:.1} k", value / 1e3),
        _ => format!("{:.1} M", value / 1e6),
    }
}

/// The first column to the left, the others to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let widths = rows.iter().map(|row| row[column].chars().count());
        widths.max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..rows.first().map_or(0, Vec::len)).map(width).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            text += &match column {
                0 => format!("| {cell:<width$} "),
                _ => format!("| {cell:>width$} "),
            };
        }
        text += "|\n";
        if number == 0 {
            for (column, width) in widths.iter().enumerate() {
                let line = "-".repeat(*width);
                text += &match column {
                    0 => format!("|-{line}-"),
                    _ => format!("|-{line}:"),
                };
            }
            text += "|\n";
        }
    }
    text
}
