// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tables for people, on a terminal and on a page.

use kvm_integration::cli::markdown::{NONE, Table, figure};
use kvm_integration::guestperf::{ArmResult, CellResult, Spread};

use crate::column::{COLUMNS, Column};
use crate::verdict::{Best, Verdict};

/// A share of the machine's CPU time that is not worth a word if others take it.
const QUIET: f64 = 0.03;

/// The figures of one guest, a row an arm: medians, and what they range over.
pub fn figures(result: &CellResult) -> Table {
    let row = |arm: &ArmResult| {
        let mut row = vec![arm.arm.into(), converged(arm), missed(arm)];
        row.extend(COLUMNS.iter().map(|column| {
            let of = arm.spread(column.of);
            of.map_or(NONE.into(), |of| {
                column.sign(arm, result).to_string() + &spread(of)
            })
        }));
        row
    };
    let names = COLUMNS.map(|column| column.name).join(" | ");
    let head = format!("arm | converged | missed | {names}");
    Table::new(&head, result.arms.iter().map(row))
}

fn converged(arm: &ArmResult) -> String {
    let sign = if arm.always_converged() { "" } else { "✗ " };
    let converged = arm.migrations.iter().filter(|one| one.figures.converged);
    format!("{sign}{} of {}", converged.count(), arm.migrations.len())
}

/// Nobody is to overlook these.
fn missed(arm: &ArmResult) -> String {
    match arm.missed_pages() {
        0 => "0".into(),
        pages => format!("⚠ {pages} pages"),
    }
}

/// The median, and the range if there is one to speak of.
fn spread(of: Spread) -> String {
    let [median, least, most] = [of.median, of.least, of.most].map(figure);
    match least == most {
        true => median,
        false => format!("{median} ({least}–{most})"),
    }
}

/// What spoils figures.
pub fn remarks(result: &CellResult) -> Vec<String> {
    let lost = result.arms.iter().filter(|arm| arm.missed_pages() > 0);
    let lost = lost.map(|arm| {
        let (arm, pages) = (arm.arm, arm.missed_pages());
        format!("⚠ {arm} MISSED {pages} pages: its figures mean nothing")
    });
    let others = result.others.filter(|others| *others > QUIET);
    let others = others.map(|others| {
        let percent = others * 100.0;
        format!("✗ others took {percent:.0} % of the machine: figures suffer")
    });
    lost.chain(others).collect()
}

/// All of that as text, under the guest's name.
pub fn text(result: &CellResult) -> String {
    let mut text = format!("### {}\n\n{}\n", result.cell, figures(result));
    for remark in remarks(result) {
        text += &format!("{remark}\n");
    }
    let missed: u64 = result.arms.iter().map(ArmResult::missed_pages).sum();
    text + &format!("missed pages: {missed}\n")
}

/// How long the drop is, and the worst time for a GB, as the patch series that first asked showed it:
/// a row a guest, a column an arm.
pub fn overview(results: &[CellResult]) -> Table {
    let [drop, worst, ..] = &COLUMNS;
    let cell = |arm: &ArmResult, result: &CellResult| {
        if arm.missed_pages() > 0 {
            return missed(arm);
        }
        let median = |column: &Column| {
            let median = arm.spread(column.of).map(|of| figure(of.median));
            column.sign(arm, result).to_string() + &median.unwrap_or(NONE.into())
        };
        let remark = if arm.always_converged() {
            ""
        } else {
            " (not converged)"
        };
        format!("{} / {}{remark}", median(drop), median(worst))
    };
    let row = |result: &CellResult| {
        let mut row = vec![result.cell.to_string()];
        row.extend(result.arms.iter().map(|arm| cell(arm, result)));
        row
    };
    let arms = results.iter().take(1).flat_map(|result| &result.arms);
    let head = arms.fold("guest".into(), |head: String, arm| head + " | " + arm.arm);
    Table::new(&head, results.iter().map(row))
}

/// How ours compares.
pub fn verdicts(verdicts: &[Verdict]) -> Table {
    let best = |best: &Best| {
        let sign = if best.reached { '✓' } else { '✗' };
        format!("{sign} {}: {}", best.arm, figure(best.value))
    };
    let row = |verdict: &Verdict| {
        vec![
            verdict.cell.to_string(),
            verdict.measure.into(),
            figure(verdict.ours),
            best(&verdict.best),
            best(&verdict.best_of_rings),
        ]
    };
    let head = "guest | measure | adaptive | best of all | best of rings";
    Table::new(head, verdicts.iter().map(row))
}

/// In how many cases ours is best.
pub fn summary(verdicts: &[Verdict]) -> String {
    let reached = |best: fn(&Verdict) -> &Best| {
        let reached = verdicts.iter().filter(|verdict| best(verdict).reached);
        format!("{} of {}", reached.count(), verdicts.len())
    };
    let (all, rings) = (reached(|one| &one.best), reached(|one| &one.best_of_rings));
    format!("adaptive is best or within 5 %: {all} of all arms, {rings} of those with rings")
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use kvm_integration::guestperf::Figures;

    use super::*;
    use crate::tests::{cell_result, figures};
    use crate::verdict;

    fn result() -> CellResult {
        let slow = Figures {
            drop_seconds: 4.5,
            converged: false,
            ..figures()
        };
        let lost = Figures {
            missed_pages: 3,
            ..figures()
        };
        cell_result(&[
            ("bitmap", &[figures()]),
            ("adaptive", &[figures(), slow, lost]),
        ])
    }

    #[test]
    fn rows_hold_medians_and_ranges() {
        let table = super::figures(&result());
        let wanted = [
            "bitmap", "1 of 1", "0", "★ 1.50", "★ 900", "400", "50", "★ 7", "★ 2.80", "12", "3",
            "5", "1000", "200", "20", "30 k", "250",
        ];
        assert_eq!(table.rows[0], wanted);
        assert_eq!(table.head.len(), wanted.len());
        let lost = ["adaptive", "✗ 2 of 3", "⚠ 3 pages", "1.50 (1.50–4.50)"];
        assert_eq!(table.rows[1][..4], lost);
        let text = text(&result());
        assert!(text.contains("⚠ adaptive MISSED 3 pages"), "{text}");
        assert!(text.contains("✗ others took 25 %"), "{text}");
        assert!(text.ends_with("missed pages: 3\n"), "{text}");
    }

    #[test]
    fn the_overview_has_a_column_an_arm() {
        let mut result = result();
        let table = overview(&[result.clone()]);
        assert_eq!(table.head, ["guest", "bitmap", "adaptive"]);
        assert_eq!(table.rows[0][1..], ["★ 1.50 / ★ 900", "⚠ 3 pages"]);
        result.arms[1].migrations.pop();
        let overview_of = |result: &CellResult| overview(from_ref(result)).rows[0][2].clone();
        assert_eq!(overview_of(&result), "3 / ★ 900 (not converged)");
        // Within 5 % of the best.
        result.arms[1].migrations.pop();
        result.arms[1].migrations[0].figures.worst_ms_per_gb = 940.0;
        assert_eq!(overview_of(&result), "★ 1.50 / ≈ 940");
        assert_eq!(overview(&[]).rows.len(), 0);
    }

    #[test]
    fn verdicts_are_counted() {
        let mut result = result();
        for migration in &mut result.arms[1].migrations {
            migration.figures.worst_ms_per_gb = 1000.0;
            (migration.figures.missed_pages, migration.figures.converged) = (0, true);
        }
        let all = verdict::verdicts(&[result]);
        let summary = summary(&all);
        assert!(summary.ends_with("3 of 4 of all arms, 4 of 4 of those with rings"));
        let table = verdicts(&all);
        assert_eq!(
            table.rows[1][2..],
            ["1000", "✗ bitmap: 900", "✓ adaptive: 1000"]
        );
        assert_eq!(table.to_string().matches('✗').count(), 1, "{table}");
    }
}
