//! Whether the crate's own way is the best.

use kvm_integration::guestperf::{ArmResult, Cell, CellResult, Figures, OURS};
use serde::Serialize;

/// So much worse than the best is as good.
const WITHIN: f64 = 1.05;
/// The arm that has no rings.
const BITMAP: &str = "bitmap";

/// What operators ask for.
struct Measure {
    name: &'static str,
    of: fn(&Figures) -> f64,
    /// Too little to tell apart.
    noise: f64,
}

const MEASURES: [Measure; 4] = [
    Measure {
        name: "drop s",
        of: |figures| figures.drop_seconds,
        // A sample comes each 20 ms.
        noise: 0.02,
    },
    Measure {
        name: "worst ms/GB",
        of: |figures| figures.worst_ms_per_gb,
        noise: 0.0,
    },
    Measure {
        name: "longest stall ms",
        of: |figures| figures.longest_stall_ms,
        // Threads that share a core wait for one another so long.
        noise: 4.0,
    },
    Measure {
        name: "total s",
        of: |figures| figures.total_seconds,
        noise: 0.0,
    },
];

/// How the crate's own way compares with others in a cell, by one measure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// The guest.
    #[serde(flatten)]
    pub cell: Cell,
    /// What is compared.
    pub measure: &'static str,
    /// What it was of ours, a median.
    pub ours: f64,
    /// The best of all arms.
    pub best: Best,
    /// The best of those with rings.
    pub best_of_rings: Best,
}

/// The best arm by one measure.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Best {
    /// Which.
    pub arm: &'static str,
    /// What it was of it, a median.
    pub value: f64,
    /// Whether ours is as good, or within 5 %, or can't be told apart.
    pub reached: bool,
}

/// All verdicts. A cell without ours, or with nothing to compare it with, has none.
pub fn verdicts(results: &[CellResult]) -> Vec<Verdict> {
    results.iter().flat_map(of_cell).collect()
}

fn of_cell(result: &CellResult) -> Vec<Verdict> {
    let verdict = |measure: &Measure| {
        let median = |arm: &ArmResult| Some((arm.arm, arm.spread(measure.of)?.median));
        let ours = result.arms.iter().find(|arm| arm.arm == OURS);
        let (_, ours) = ours.and_then(median)?;
        let best = |rings_only: bool| {
            let arms = result
                .arms
                .iter()
                .filter(|arm| !rings_only || arm.arm != BITMAP);
            let best = arms.filter_map(median).min_by(|a, b| a.1.total_cmp(&b.1));
            best.map(|(arm, value)| Best {
                arm,
                value,
                reached: ours <= WITHIN * value || ours <= value + measure.noise,
            })
        };
        Some(Verdict {
            cell: result.cell,
            measure: measure.name,
            ours,
            best: best(false)?,
            best_of_rings: best(true)?,
        })
    };
    match result.arms.len() {
        0 | 1 => Vec::new(),
        _ => MEASURES.iter().filter_map(verdict).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{cell_result, figures};

    #[test]
    fn the_best_is_found_and_ours_compared() {
        let with = |drop_seconds, longest_stall_ms| Figures {
            drop_seconds,
            longest_stall_ms,
            ..figures()
        };
        let result = cell_result(&[
            ("bitmap", &[with(0.5, 9.0)]),
            ("fixed", &[with(2.0, 2.0), with(1.0, 4.0), with(3.0, 3.0)]),
            (OURS, &[with(2.05, 6.5)]),
        ]);
        let verdicts = verdicts(&[result]);
        let told: Vec<_> = verdicts
            .iter()
            .map(|one| {
                let Verdict {
                    best,
                    best_of_rings: rings,
                    ..
                } = one;
                let (a, b) = ((best.arm, best.reached), (rings.arm, rings.reached));
                (one.measure, a, b)
            })
            .collect();
        let wanted = [
            ("drop s", ("bitmap", false), ("fixed", true)),
            ("worst ms/GB", ("bitmap", true), ("fixed", true)),
            ("longest stall ms", ("fixed", true), ("fixed", true)),
            ("total s", ("bitmap", true), ("fixed", true)),
        ];
        assert_eq!(told, wanted);
        assert_eq!((verdicts[0].ours, verdicts[0].best.value), (2.05, 0.5));
        assert_eq!(verdicts[0].best_of_rings.value, 2.0);
    }

    #[test]
    fn alone_ours_is_not_compared() {
        assert_eq!(verdicts(&[cell_result(&[(OURS, &[figures()])])]), []);
        let others = cell_result(&[("bitmap", &[figures()]), ("fixed", &[figures()])]);
        assert_eq!(verdicts(&[others]), []);
    }
}
