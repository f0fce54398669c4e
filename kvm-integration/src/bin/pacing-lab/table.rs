//! Figures for people: tables that are aligned, and Markdown, too.

use kvm_integration::cli::markdown::{aligned, figure};
use kvm_integration::lab::sim::constants;
use kvm_integration::lab::{ArmResult, CellResult, Measured};

use crate::targets::Verdict;

/// What is told of an arm; `best` is the most stores a second that any arm has.
fn columns(arm: &ArmResult, best: f64) -> [(&'static str, String); 13] {
    let all = arm.total();
    let or_none = |figure: Option<f64>, digits| {
        figure.map_or("-".into(), |figure| format!("{figure:.digits$}"))
    };
    let stores = all.stores_per_second();
    let spread = arm.spread(Measured::stores_per_second);
    let by_cpu = all.stores_per_cpu_second();
    [
        ("arm", arm.arm.into()),
        ("full exits/s", figure(all.full_exits_per_second())),
        ("stall ms/s", figure(all.stall_ms_per_second())),
        ("passes ÷ min", or_none(all.passes_by_minimum(), 2)),
        ("entries/pass", format!("{:.0}", all.entries_per_pass())),
        ("stores/s", figure(stores)),
        ("± %", or_none(spread.map(|spread| spread * 100.0), 0)),
        ("÷ best", or_none((best > 0.0).then(|| stores / best), 3)),
        ("a CPU second", by_cpu.map_or("-".into(), figure)),
        ("reaper CPU %", format!("{:.2}", all.reaper_percent())),
        ("beyond passes %", format!("{:.2}", all.overhead_percent())),
        ("wake-ups/s", figure(all.wakeups_per_second())),
        ("a pass", or_none(all.wakeups_per_pass(), 2)),
    ]
}

const CONSTANTS: [&str; 5] = [
    "number",
    "value",
    "full exits/min",
    "passes ÷ min",
    "wake-ups/s",
];

const TARGETS: [&str; 6] = ["", "target", "guest", "arm", "wanted", "measured"];

/// The table of one guest, under its name.
pub fn table(result: &CellResult) -> String {
    let best = result.best(Measured::stores_per_second);
    let head = columns(&ArmResult::new(""), best).map(|(name, _)| name);
    let row = |arm| columns(arm, best).map(|(_, figure)| figure).to_vec();
    let rows = result.arms.iter().map(row).collect();
    let mut text = format!("### {result}\n\n{}", aligned(&head, rows));
    for arm in &result.arms {
        let ArmResult { arm, overruns, .. } = arm;
        if *overruns > 0 {
            text += &format!(
                "\n{arm}: rings were OVERRUN {overruns} times, its figures mean nothing\n"
            );
        }
    }
    if let Some(others) = result.others.filter(|_| result.is_disturbed()) {
        let percent = others * 100.0;
        text += &format!("\nothers took {percent:.0} % of the machine: figures suffer\n");
    }
    if let Some(load) = result.reset_load.filter(|_| result.is_crowded()) {
        text += &format!("\nresets would take {load:.1} s of each second: no policy helps\n");
    }
    for arm in result.arms.iter().filter(|arm| arm.saturated > 0) {
        text += &format!("\n{}: saturated, passes take most of its time\n", arm.arm);
    }
    text
}

/// How the figures of these results compare to what is aimed at.
pub fn verdicts(verdicts: &[Verdict], results: &[CellResult]) -> String {
    let met = verdicts.iter().filter(|verdict| verdict.met).count();
    let row = |verdict: &Verdict| {
        let fate = if verdict.met { "met" } else { "MISSED" };
        let measured = verdict.measured.map_or("without bound".into(), figure);
        vec![
            fate.into(),
            verdict.target.into(),
            verdict.guest.clone(),
            verdict.arm.into(),
            verdict.wanted.to_string(),
            measured,
        ]
    };
    let rows = verdicts.iter().map(row).collect();
    if verdicts.is_empty() {
        return "### Targets: none for these guests and arms\n".into();
    }
    let mut text = format!("### Targets: {met} of {} met\n", verdicts.len());
    let disturbed = results.iter().filter(|result| result.is_disturbed());
    let others = disturbed.filter_map(|result| result.others);
    if let Some(others) = others.reduce(f64::max) {
        let percent = others * 100.0;
        text += &format!("\nothers took up to {percent:.0} % of the machine: figures suffer\n");
    }
    text + "\n" + &aligned(&TARGETS, rows)
}

/// What look-first does with one of its numbers changed; a star marks the default.
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
    aligned(&CONSTANTS, rows.map(row).collect())
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
        let text = table(&result());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "### constant, 1 vCPU, rings of 4096");
        let cells = |line: &str| {
            let cells = line.trim_matches('|').split('|');
            cells
                .map(|cell| cell.trim().to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(cells(lines[2])[..2], ["arm", "full exits/s"]);
        let wanted = [
            "poll", "1.50", "0.50", "1.15", "4000", "500.0 k", "-", "1.000", "625.0 k", "2.00",
            "0.50", "50.0", "5.00",
        ];
        assert_eq!(cells(lines[4]), wanted);
        let wanted = [
            "no-reaper",
            "0",
            "0",
            "-",
            "0",
            "250.0 k",
            "-",
            "0.500",
            "-",
            "0.00",
            "0.00",
            "0",
            "-",
        ];
        assert_eq!(cells(lines[5]), wanted);
        assert!(
            text.contains("no-reaper: rings were OVERRUN 7 times"),
            "{text}"
        );
        assert!(text.contains("poll: saturated"), "{text}");
    }

    #[test]
    fn what_spoils_figures_is_said() {
        let remark = |others, reset_load| {
            let result = CellResult {
                others,
                reset_load,
                ..result()
            };
            let text = table(&result);
            (
                text.contains("others took 12 %"),
                text.contains("take 3.1 s"),
            )
        };
        assert_eq!(remark(None, None), (false, false));
        assert_eq!(remark(Some(0.02), Some(0.2)), (false, false));
        assert_eq!(remark(Some(0.12), Some(3.07)), (true, true));
    }

    #[test]
    fn columns_line_up() {
        let text = table(&result());
        let table: Vec<&str> = text.lines().filter(|line| line.starts_with('|')).collect();
        assert_eq!(table.len(), 4);
        let bars = |line: &str| {
            let bars = line.chars().enumerate().filter(|&(_, c)| c == '|');
            bars.map(|(at, _)| at).collect::<Vec<_>>()
        };
        for line in &table {
            assert_eq!(bars(line), bars(table[0]), "{text}");
        }
        assert!(table[1].starts_with("|-----------|") && table[1].ends_with("-:|"));
    }

    #[test]
    fn verdicts_say_what_was_wanted() {
        let verdict = |met, measured| Verdict {
            target: "idle",
            guest: "idle, 2 vCPUs, rings of 4096".into(),
            arm: "look-first",
            wanted: Bound::AtMost(4.0),
            measured,
            met,
        };
        let mut result = result();
        result.others = Some(0.4);
        let text = verdicts(
            &[verdict(true, Some(1.25)), verdict(false, None)],
            &[result],
        );
        assert!(text.contains("others took up to 40 %"), "{text}");
        assert!(text.starts_with("### Targets: 1 of 2 met\n"), "{text}");
        let line = "| met    | idle   | idle, 2 vCPUs, rings of 4096 | look-first | ≤ 4    | 1.25";
        assert!(text.contains(line), "{text}");
        assert!(text.contains("| MISSED | idle   |"), "{text}");
        assert!(verdicts(&[], &[]).contains("none"));
    }
}
