// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether the crate's own way is the best.

use kvm_integration::guestperf::{Cell, CellResult, OURS};
use serde::Serialize;

use crate::column::{COLUMNS, Column};

/// How the arms are called that have no rings.
const BITMAP: &str = "bitmap";

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
    /// Whether ours is as good, or within 5 %, or cannot be distinguished.
    pub reached: bool,
}

/// All verdicts. A cell without ours, or with nothing to compare it with, has none.
pub fn verdicts(results: &[CellResult]) -> Vec<Verdict> {
    let comparable = results.iter().filter(|result| result.arms.len() > 1);
    let all = comparable.flat_map(|result| COLUMNS.map(|column| of(&column, result)));
    all.flatten().collect()
}

fn of(column: &Column, result: &CellResult) -> Option<Verdict> {
    let own = result.arms.iter().find(|arm| arm.arm == OURS)?;
    let best = |rings_only: bool| {
        let arms = result.arms.iter();
        let arms = arms.filter(|arm| !rings_only || !arm.arm.starts_with(BITMAP));
        let counted = arms.filter_map(|arm| Some((arm.arm, column.counted(arm, result)?)));
        let (arm, value) = counted.min_by(|a, b| a.1.total_cmp(&b.1))?;
        let ours = column.counted(own, result);
        let reached = ours.is_some_and(|ours| column.reaches(ours, value));
        Some(Best {
            arm,
            value,
            reached,
        })
    };
    Some(Verdict {
        cell: result.cell,
        measure: column.name,
        ours: own.spread(column.of)?.median,
        best: best(false)?,
        best_of_rings: best(true)?,
    })
}

#[cfg(test)]
mod tests {
    use kvm_integration::guestperf::Figures;

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
        let told = verdicts.iter().map(|one| {
            let reached = |best: &Best| (best.arm, best.reached);
            (one.measure, reached(&one.best), reached(&one.best_of_rings))
        });
        let wanted = [
            ("drop s", ("bitmap", false), ("fixed", true)),
            ("worst ms/GB", ("bitmap", true), ("fixed", true)),
            ("longest stall ms", ("fixed", true), ("fixed", true)),
            ("total s", ("bitmap", true), ("fixed", true)),
        ];
        assert_eq!(told.collect::<Vec<_>>(), wanted);
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
            let [bitmap, other, ours] = [figures(), other, ours].map(|of| [of]);
            let arms = [("bitmap", &bitmap[..]), ("fixed", &other), (OURS, &ours)];
            let verdicts = verdicts(&[cell_result(&arms)]);
            let best = verdicts.iter().map(|one| (one.best.arm, one.best.reached));
            best.collect::<Vec<_>>()
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
