//! What came of the arms under one load.

use super::cell::Cell;
use super::measure::{Measured, Sample};

/// What came of one cell.
#[derive(Debug, Clone)]
pub struct CellResult {
    /// The load.
    pub cell: Cell,
    /// The arms that had their turns, in the order asked for.
    pub arms: Vec<ArmResult>,
}

/// What came of one arm.
#[derive(Debug, Clone)]
pub struct ArmResult {
    /// Its name.
    pub arm: &'static str,
    /// Each of its turns.
    pub rounds: Vec<Measured>,
    /// Times that a ring was found overrun: if any, its figures are none.
    pub overruns: u64,
    /// One turn in detail, if that was asked for.
    pub samples: Vec<Sample>,
}

impl ArmResult {
    /// An arm that has had no turn yet.
    pub fn new(arm: &'static str) -> Self {
        Self {
            arm,
            rounds: Vec::new(),
            overruns: 0,
            samples: Vec::new(),
        }
    }

    /// All turns together.
    pub fn total(&self) -> Measured {
        self.rounds.iter().sum()
    }

    /// The lowest and the highest of a figure among the turns.
    pub fn spread(&self, figure: impl Fn(&Measured) -> f64) -> Option<(f64, f64)> {
        let figures = self.rounds.iter().map(figure);
        let bounds = figures.map(|figure| (figure, figure));
        bounds.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)))
    }
}

impl CellResult {
    /// The arm of that name, if it had a turn.
    pub fn arm(&self, name: &str) -> Option<&ArmResult> {
        let mut arms = self.arms.iter().filter(|arm| !arm.rounds.is_empty());
        arms.find(|arm| arm.arm == name)
    }

    /// Page stores a second of the arm under which the guest did most.
    pub fn most_stores_per_second(&self) -> f64 {
        let stores = self.arms.iter().map(|arm| arm.total().stores_per_second());
        stores.fold(0.0, f64::max)
    }
}
