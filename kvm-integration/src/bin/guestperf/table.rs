//! Tables for people.

use kvm_integration::cli::markdown::{aligned, figure};
use kvm_integration::guestperf::{ArmResult, CellResult, Figures, Spread};

use crate::verdict::{Best, Verdict};

/// One number of a migration.
type Figure = fn(&Figures) -> f64;

/// What is told of each arm, between its name and how often it converged.
const FIGURES: [(&str, Figure); 14] = [
    ("drop s", |f| f.drop_seconds),
    ("worst ms/GB", |f| f.worst_ms_per_gb),
    ("median", |f| f.median_ms_per_gb),
    ("quiet", |f| f.quiet_ms_per_gb),
    ("longest stall ms", |f| f.longest_stall_ms),
    ("full exits", |f| f.full_exits as f64),
    ("in them ms", |f| f.full_exit_ms),
    ("resets", |f| f.resets as f64),
    ("entries", |f| f.entries as f64),
    ("a reset", Figures::entries_per_reset),
    ("reaper CPU ms", |f| f.reaper_cpu_ms),
    ("pages sent", |f| f.pages_sent as f64),
    ("downtime ms", |f| f.downtime_ms),
    ("total s", |f| f.total_seconds),
];

fn head() -> Vec<&'static str> {
    let figures = FIGURES.iter().map(|(name, _)| *name);
    ["arm"]
        .into_iter()
        .chain(figures)
        .chain(["converged"])
        .collect()
}

/// The table of one guest, under its name: medians, and what they range over.
pub fn table(result: &CellResult) -> String {
    let rows = result.arms.iter().map(row).collect();
    let mut text = format!("### {}\n\n{}", result.cell, aligned(&head(), rows));
    for arm in result.arms.iter().filter(|arm| arm.missed_pages() > 0) {
        let (pages, arm) = (arm.missed_pages(), arm.arm);
        text += &format!("\n{arm}: {pages} PAGES WERE MISSED\n");
    }
    let missed: u64 = result.arms.iter().map(ArmResult::missed_pages).sum();
    text += &format!("\nmissed pages: {missed}\n");
    if let Some(others) = result.others {
        let percent = others * 100.0;
        text += &format!("others took {percent:.0} % of the machine\n");
    }
    text
}

fn row(arm: &ArmResult) -> Vec<String> {
    let converged = arm.migrations.iter().filter(|one| one.figures.converged);
    let mut row = vec![arm.arm.into()];
    row.extend(FIGURES.map(|(_, get)| arm.spread(get).map_or("-".into(), spread)));
    row.push(format!("{} of {}", converged.count(), arm.migrations.len()));
    row
}

/// The median, and the range if there is one to speak of.
fn spread(of: Spread) -> String {
    let [median, least, most] = [of.median, of.least, of.most].map(figure);
    match least == most {
        true => median,
        false => format!("{median} ({least}–{most})"),
    }
}

/// The table in the layout of the patch series that first asked: how long the drop is, and the worst
/// time for a GB, per guest, a column an arm.
pub fn overview(results: &[CellResult]) -> String {
    let Some(first) = results.first() else {
        return String::new();
    };
    let mut head = vec!["vCPUs and memory, stressed"];
    head.extend(first.arms.iter().map(|arm| arm.arm));
    let row = |result: &CellResult| {
        let cell = &result.cell;
        let gb = |mib: u64| format!("{}G", figure(mib as f64 / 1024.0));
        let mut row = vec![format!(
            "{}C {}, {}, ring {}",
            cell.vcpus,
            gb(cell.memory_mib),
            gb(cell.stress_mib),
            cell.ring_entries
        )];
        row.extend(result.arms.iter().map(|arm| {
            let median = |get: Figure| {
                let spread = arm.spread(get);
                spread.map_or("-".into(), |spread| figure(spread.median))
            };
            let drop = median(|figures| figures.drop_seconds);
            format!("{drop} / {}", median(|figures| figures.worst_ms_per_gb))
        }));
        row
    };
    let rows = results.iter().map(row).collect();
    let table = aligned(&head, rows);
    format!("### Drop in seconds / worst ms per GB\n\n{table}")
}

/// How ours compares.
pub fn verdicts(verdicts: &[Verdict]) -> String {
    let reached = |best: fn(&Verdict) -> &Best| {
        let reached = verdicts.iter().filter(|verdict| best(verdict).reached);
        format!("{} of {}", reached.count(), verdicts.len())
    };
    let all = reached(|verdict| &verdict.best);
    let rings = reached(|verdict| &verdict.best_of_rings);
    let head = [
        "guest",
        "measure",
        "look-first",
        "best of all",
        "",
        "best of rings",
        "",
    ];
    let best = |best: &Best| {
        let said = if best.reached { "reached" } else { "MISSED" };
        [format!("{}: {}", best.arm, figure(best.value)), said.into()]
    };
    let row = |verdict: &Verdict| {
        let mut row = vec![
            verdict.cell.to_string(),
            verdict.measure.into(),
            figure(verdict.ours),
        ];
        row.extend(best(&verdict.best));
        row.extend(best(&verdict.best_of_rings));
        row
    };
    let rows = verdicts.iter().map(row).collect();
    format!(
        "### look-first is best or within 5 %: {all} of all arms, {rings} of those with rings\n\n{}",
        aligned(&head, rows)
    )
}

#[cfg(test)]
mod tests {
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
            ("look-first", &[figures(), slow, lost]),
        ])
    }

    #[test]
    fn rows_hold_medians_and_ranges() {
        let text = table(&result());
        let cells = |line: usize| -> Vec<String> {
            let line = text.lines().nth(line).unwrap().trim_matches('|');
            line.split('|').map(|cell| cell.trim().into()).collect()
        };
        assert_eq!(cells(2), head());
        let wanted = [
            "bitmap", "1.50", "900", "400", "50.0", "7.00", "12.0", "3.00", "5.00", "1000", "200",
            "20.0", "30.0 k", "250", "2.80", "1 of 1",
        ];
        assert_eq!(cells(4), wanted);
        assert_eq!(cells(5)[1], "1.50 (1.50–4.50)");
        assert_eq!(cells(5)[15], "2 of 3");
        assert!(text.contains("look-first: 3 PAGES WERE MISSED"), "{text}");
        assert!(text.contains("missed pages: 3\nothers took 25 %"), "{text}");
    }

    #[test]
    fn the_overview_has_a_column_an_arm() {
        let text = overview(&[result()]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[2].contains("|     bitmap | look-first |"), "{text}");
        let wanted = "| 2C 1.00G, 0.50G, ring 4096 | 1.50 / 900 | 1.50 / 900 |";
        assert_eq!(lines[4].replace("  ", ""), wanted);
        assert_eq!(overview(&[]), "");
    }

    #[test]
    fn verdicts_are_counted() {
        let mut result = result();
        for migration in &mut result.arms[1].migrations {
            migration.figures.worst_ms_per_gb = 1000.0;
            (migration.figures.missed_pages, migration.figures.converged) = (0, true);
        }
        let text = verdicts(&verdict::verdicts(&[result]));
        assert!(
            text.contains("3 of 4 of all arms, 4 of 4 of those with rings"),
            "{text}"
        );
        assert!(text.contains("| bitmap: 900 "), "{text}");
        assert_eq!(text.matches("MISSED").count(), 1, "{text}");
    }
}
