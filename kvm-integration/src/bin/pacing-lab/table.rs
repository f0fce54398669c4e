// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tables of pacing-lab: figures of arms, targets, and what its constants are good for.

use kvm_integration::cli::markdown::{Table, figure};
use kvm_integration::lab::sim::constants;
use kvm_integration::lab::{ArmResult, CellResult, Measured};

use crate::targets::Verdict;

const ARMS: &str = "arm | full exits/s | stall ms/s | passes ÷ min | entries/pass | stores/s | ± % | \
                    ÷ best | a CPU second | reaper CPU % | beyond passes % | wake-ups/s | a pass";
const CONSTANTS: &str = "number | value | full exits/min | passes ÷ min | wake-ups/s";
const TARGETS: &str = "guest | target | arm | wanted | measured | ";

/// The figures of one guest, a row an arm.
pub fn figures(result: &CellResult) -> Table {
    let best = result.best(Measured::stores_per_second);
    Table::new(ARMS, result.arms.iter().map(|arm| row(arm, best)))
}

/// What spoils figures.
pub fn remarks(result: &CellResult) -> Vec<String> {
    let mut remarks = Vec::new();
    for ArmResult { arm, overruns, .. } in &result.arms {
        if *overruns > 0 {
            remarks.push(format!(
                "⚠ {arm}: rings were OVERRUN {overruns} times, its figures mean nothing"
            ));
        }
    }
    if let Some(others) = result.others.filter(|_| result.is_disturbed()) {
        let percent = others * 100.0;
        remarks.push(format!(
            "✗ others took {percent:.0} % of the machine: figures suffer"
        ));
    }
    if let Some(load) = result.reset_load.filter(|_| result.is_crowded()) {
        remarks.push(format!(
            "✗ resets would take {load:.1} s of each second: no policy helps"
        ));
    }
    let saturated = result.arms.iter().filter(|arm| arm.saturated > 0);
    remarks.extend(
        saturated.map(|arm| format!("✗ {}: saturated, passes take most of its time", arm.arm)),
    );
    remarks
}

/// All of that as text, under the guest's name.
pub fn text(result: &CellResult) -> String {
    let mut text = format!("### {result}\n\n{}", figures(result));
    for remark in remarks(result) {
        text += &format!("\n{remark}\n");
    }
    text
}

/// How many targets are met, and what spoils that.
pub fn summary(verdicts: &[Verdict], results: &[CellResult]) -> String {
    let met = verdicts.iter().filter(|verdict| verdict.met).count();
    let mut summary = match verdicts.len() {
        0 => "Targets: none for these guests and arms".into(),
        all => format!("Targets: {met} of {all} met"),
    };
    let disturbed = results.iter().filter(|result| result.is_disturbed());
    let others = disturbed.filter_map(|result| result.others);
    if let Some(others) = others.reduce(f64::max) {
        let percent = others * 100.0;
        summary += &format!("; others took up to {percent:.0} % of the machine: figures suffer");
    }
    summary
}

/// How figures compare to what is aimed at.
pub fn verdicts(verdicts: &[Verdict]) -> Table {
    let row = |verdict: &Verdict| {
        let fate = if verdict.met { "✓ met" } else { "✗ MISSED" };
        let measured = verdict.measured.map_or("without bound".into(), figure);
        vec![
            verdict.guest.clone(),
            verdict.target.into(),
            verdict.arm.into(),
            verdict.wanted.to_string(),
            measured,
            fate.into(),
        ]
    };
    Table::new(TARGETS, verdicts.iter().map(row))
}

/// What adaptive does with one of its numbers changed; a star marks the default.
pub fn constants(rows: impl Iterator<Item = constants::Row>) -> String {
    let row = |row: constants::Row| {
        let star = if row.is_default { " *" } else { "" };
        vec![
            row.name.into(),
            format!("{}{star}", figure(row.value)),
            figure(row.full_exits),
            format!("{:.3}", row.passes),
            format!("{:.0}", row.wakeups),
        ]
    };
    Table::new(CONSTANTS, rows.map(row)).to_string()
}

fn row(arm: &ArmResult, best: f64) -> Vec<String> {
    let all = arm.total();
    let or_none =
        |figure: Option<f64>| figure.map_or_else(|| "-".into(), |figure| format!("{figure:.2}"));
    let share = (best > 0.0).then(|| all.stores_per_second() / best);
    let spread = arm.spread(Measured::stores_per_second);
    vec![
        arm.arm.into(),
        figure(all.full_exits_per_second()),
        figure(all.stall_ms_per_second()),
        or_none(all.passes_by_minimum()),
        format!("{:.0}", all.entries_per_pass()),
        figure(all.stores_per_second()),
        spread.map_or_else(|| "-".into(), |spread| format!("{:.0}", spread * 100.0)),
        share.map_or_else(|| "-".into(), |share| format!("{share:.3}")),
        all.stores_per_cpu_second().map_or("-".into(), figure),
        format!("{:.2}", all.reaper_percent()),
        format!("{:.2}", all.overhead_percent()),
        figure(all.wakeups_per_second()),
        or_none(all.wakeups_per_pass()),
    ]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::targets::Bound;

    fn result() -> CellResult {
        let measured = Measured {
            time: Duration::from_secs(2),
            full_exits: 3,
            stall: Duration::from_millis(1),
            passes: 23,
            minimum: 20.0,
            entries: 92_000,
            stores: 1_000_000,
            vcpu_cpu: Duration::from_millis(1600),
            reaper_cpu: Duration::from_millis(40),
            pass_time: Duration::from_millis(30),
            wakeups: 100,
            reaper_passes: 20,
        };
        let idle = Measured {
            time: Duration::from_secs(2),
            stores: 500_000,
            ..Measured::default()
        };
        CellResult {
            workload: "constant".into(),
            vcpus: 1,
            ring_entries: 4096,
            others: None,
            reset_load: None,
            arms: vec![
                ArmResult {
                    rounds: vec![measured.clone()],
                    saturated: 1,
                    ..ArmResult::new("poll")
                },
                ArmResult {
                    rounds: vec![idle],
                    overruns: 7,
                    ..ArmResult::new("no-reaper")
                },
            ],
        }
    }

    #[test]
    fn figures_are_those_measured() {
        let table = figures(&result());
        let poll = "poll 1.50 0.50 1.15 4000 500_k - 1.000 625_k 2.00 0.50 50 5.00";
        let none = "no-reaper 0 0 - 0 250_k - 0.500 - 0.00 0.00 0 -";
        for (row, wanted) in table.rows.iter().zip([poll, none]) {
            let row: Vec<_> = row.iter().map(|cell| cell.replace(' ', "_")).collect();
            assert_eq!(row.join(" "), wanted);
        }
    }

    #[test]
    fn what_spoils_figures_is_said() {
        let said = |others, reset_load| {
            let result = CellResult {
                others,
                reset_load,
                ..result()
            };
            text(&result)
        };
        for (others, reset_load) in [(None, None), (Some(0.02), Some(0.2))] {
            let text = said(others, reset_load);
            assert!(text.starts_with("### constant, 1 vCPU, rings of 4096\n"));
            assert!(text.contains("no-reaper: rings were OVERRUN 7 times"));
            assert!(text.contains("poll: saturated"), "{text}");
            assert!(
                !text.contains("others") && !text.contains("resets"),
                "{text}"
            );
        }
        let text = said(Some(0.12), Some(3.07));
        assert!(text.contains("others took 12 %"), "{text}");
        assert!(text.contains("take 3.1 s"), "{text}");
    }

    #[test]
    fn verdicts_say_what_was_wanted() {
        let verdict = |met, measured| Verdict {
            target: "idle",
            guest: "idle, 2 vCPUs, rings of 4096".into(),
            arm: "adaptive",
            wanted: Bound::AtMost(4.0),
            measured,
            met,
        };
        let all = [verdict(true, Some(1.25)), verdict(false, None)];
        let mut result = result();
        result.others = Some(0.4);
        let summary = super::summary(&all, &[result]);
        assert!(summary.starts_with("Targets: 1 of 2 met; others took up to 40 %"));
        let rows = verdicts(&all).rows;
        assert_eq!(rows[0][3..], ["≤ 4", "1.25", "✓ met"]);
        assert_eq!(rows[1][3..], ["≤ 4", "without bound", "✗ MISSED"]);
        assert!(super::summary(&[], &[]).contains("none"));
    }
}
