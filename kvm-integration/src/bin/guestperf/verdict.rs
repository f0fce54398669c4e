//! Whether the crate's own way is the best.

use kvm_integration::guestperf::{ArmResult, Cell, CellResult, Figures, OURS};
use serde::Serialize;

/// So much worse than the best is as good.
pub const WITHIN: f64 = 1.05;
/// The arm that has no rings.
const BITMAP: &str = "bitmap";

/// What operators ask for.
struct Measure {
    name: &'static str,
    of: fn(&Figures) -> f64,
    /// Too little to tell apart.
    noise: f64,
    /// Whether an arm that gives up early must not win by it.
    needs_convergence: bool,
}

/// Of a drop, in seconds: a sample comes each 20 ms.
pub const DROP_NOISE: f64 = 0.02;
/// Of a stall, in milliseconds: threads that share a core wait for one another so long.
pub const STALL_NOISE: f64 = 4.0;

const MEASURES: [Measure; 4] = [
    Measure::new("drop s", |figures| figures.drop_seconds, DROP_NOISE),
    Measure::new("worst ms/GB", |figures| figures.worst_ms_per_gb, 0.0),
    Measure::new("longest stall ms", |f| f.longest_stall_ms, STALL_NOISE),
    Measure {
        needs_convergence: true,
        ..Measure::new("total s", |figures| figures.total_seconds, 0.0)
    },
];

impl Measure {
    const fn new(name: &'static str, of: fn(&Figures) -> f64, noise: f64) -> Self {
        Self {
            name,
            of,
            noise,
            needs_convergence: false,
        }
    }
}

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
    let compared = results.iter().filter(|result| result.arms.len() > 1);
    let of_cell = |result| {
        MEASURES
            .iter()
            .filter_map(move |measure| of(measure, result))
    };
    compared.flat_map(of_cell).collect()
}

fn of(measure: &Measure, result: &CellResult) -> Option<Verdict> {
    let anybody_converged = result.arms.iter().any(ArmResult::always_converged);
    // Figures of an arm that missed pages mean nothing.
    let counts = |arm: &ArmResult| {
        let in_time = arm.always_converged() || !anybody_converged;
        arm.missed_pages() == 0 && (in_time || !measure.needs_convergence)
    };
    let median = |arm: &ArmResult| Some((arm.arm, arm.spread(measure.of)?.median));
    let own = result.arms.iter().find(|arm| arm.arm == OURS)?;
    let (_, ours) = median(own)?;
    let best = |rings_only: bool| {
        let arms = result.arms.iter().filter(|arm| counts(arm));
        let arms = arms.filter(|arm| !rings_only || arm.arm != BITMAP);
        let best = arms.filter_map(median).min_by(|a, b| a.1.total_cmp(&b.1));
        best.map(|(arm, value)| Best {
            arm,
            value,
            reached: counts(own) && (ours <= WITHIN * value || ours <= value + measure.noise),
        })
    };
    Some(Verdict {
        cell: result.cell,
        measure: measure.name,
        ours,
        best: best(false)?,
        best_of_rings: best(true)?,
    })
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
    fn who_misses_pages_or_gives_up_does_not_win() {
        let with = |missed_pages, converged, total_seconds| Figures {
            missed_pages,
            converged,
            total_seconds,
            ..figures()
        };
        let reached = |ours: Figures, other: Figures| {
            let arms = [
                ("bitmap", &[figures()][..]),
                ("fixed", &[other]),
                (OURS, &[ours]),
            ];
            let verdicts = verdicts(&[cell_result(&arms)]);
            verdicts
                .iter()
                .map(|one| (one.best.arm, one.best.reached))
                .collect::<Vec<_>>()
        };
        // The other is fast, but missed a page; or gave up.
        assert_eq!(reached(figures(), with(1, true, 1.0))[3], ("bitmap", true));
        assert_eq!(reached(figures(), with(0, false, 1.0))[3], ("bitmap", true));
        assert_eq!(reached(figures(), with(0, true, 1.0))[3], ("fixed", false));
        // Ours did.
        assert_eq!(
            reached(with(0, false, 1.0), figures())[3],
            ("bitmap", false)
        );
        assert_eq!(reached(with(2, true, 1.0), figures())[0], ("bitmap", false));
    }

    #[test]
    fn alone_ours_is_not_compared() {
        assert_eq!(verdicts(&[cell_result(&[(OURS, &[figures()])])]), []);
        let others = cell_result(&[("bitmap", &[figures()]), ("fixed", &[figures()])]);
        assert_eq!(verdicts(&[others]), []);
    }
}
