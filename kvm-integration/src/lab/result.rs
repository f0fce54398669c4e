// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What came of the arms under one load.

use std::fmt;

use super::measure::{Measured, Sample};

/// What came of one guest, real or simulated.
#[derive(Debug, Clone)]
pub struct CellResult {
    /// What it did, by name.
    pub workload: String,
    /// Its vCPUs.
    pub vcpus: u32,
    /// The size of each ring.
    pub ring_entries: u32,
    /// The arms that had their turns, in the order asked for.
    pub arms: Vec<ArmResult>,
    /// Share of the machine's CPU time that others took meanwhile; `None` if unknown, or of a
    /// simulated guest.
    pub others: Option<f64>,
    /// Time that resets take of every second if no vCPU ever waits for them; `None` if
    /// unknown, as of a real guest.
    pub reset_load: Option<f64>,
}

/// With resets that take more of the time than this, passes are under way for so much of a ring's
/// fill that no policy can make few of them.
const CROWDED: f64 = 0.25;

/// What came of one arm.
#[derive(Debug, Clone, Default)]
pub struct ArmResult {
    /// Its name.
    pub arm: &'static str,
    /// Each of its turns.
    pub rounds: Vec<Measured>,
    /// Times that a ring was found overrun: if any, the figures mean nothing.
    pub overruns: u64,
    /// Turns at whose end the reaper could not keep up.
    pub saturated: u32,
    /// One turn in detail, if that was asked for.
    pub samples: Vec<Sample>,
}

/// A share of the machine's CPU time that is not worth a word if others take it.
const QUIET: f64 = 0.03;

impl ArmResult {
    /// An arm that has had no turn yet.
    pub fn new(arm: &'static str) -> Self {
        Self {
            arm,
            ..Self::default()
        }
    }

    /// All turns together.
    pub fn total(&self) -> Measured {
        self.rounds.iter().sum()
    }

    /// By how much the turns differ in a figure: half of what is between the lowest and the
    /// highest, as a share of the average. `None` for a single turn, or where there is nothing.
    pub fn spread(&self, figure: impl Fn(&Measured) -> f64) -> Option<f64> {
        let figures: Vec<f64> = self.rounds.iter().map(figure).collect();
        let lowest = figures.iter().copied().fold(f64::INFINITY, f64::min);
        let highest = figures.iter().copied().fold(0.0, f64::max);
        let average = figures.iter().sum::<f64>() / figures.len() as f64;
        (figures.len() > 1 && average > 0.0).then(|| (highest - lowest) / 2.0 / average)
    }
}

impl CellResult {
    /// The arm of that name, if it had a turn whose figures mean something.
    pub fn arm(&self, name: &str) -> Option<&ArmResult> {
        let mut arms = self.arms.iter();
        arms.find(|arm| arm.arm == name && !arm.rounds.is_empty() && arm.overruns == 0)
    }

    /// Whether resets take too much time for any policy to do well.
    pub fn is_crowded(&self) -> bool {
        self.reset_load.is_some_and(|load| load > CROWDED)
    }

    /// Whether others took so much of the machine that times and rates suffer.
    pub fn is_disturbed(&self) -> bool {
        self.others.is_some_and(|others| others > QUIET)
    }

    /// The highest of a figure that any arm has.
    pub fn best(&self, figure: impl Fn(&Measured) -> f64) -> f64 {
        let figures = self.arms.iter().map(|arm| figure(&arm.total()));
        figures.fold(0.0, f64::max)
    }
}

/// `constant, 2 vCPUs, rings of 4096`
impl fmt::Display for CellResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        describe(f, &self.workload, self.vcpus, self.ring_entries)
    }
}

pub(super) fn describe(
    f: &mut fmt::Formatter<'_>,
    workload: &str,
    vcpus: u32,
    ring_entries: u32,
) -> fmt::Result {
    let noun = if vcpus == 1 { "vCPU" } else { "vCPUs" };
    write!(f, "{workload}, {vcpus} {noun}, rings of {ring_entries}")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn turns_add_up_and_differ() {
        let turn = |stores| Measured {
            time: Duration::from_secs(1),
            stores,
            minimum: 1.5,
            passes: 2,
            ..Measured::default()
        };
        let mut arm = ArmResult::new("fixed");
        assert_eq!(arm.spread(Measured::stores_per_second), None);
        arm.rounds = vec![turn(90)];
        assert_eq!(arm.spread(Measured::stores_per_second), None);
        arm.rounds = vec![turn(90), turn(110), turn(100)];
        assert_eq!(arm.spread(Measured::stores_per_second), Some(0.1));
        assert_eq!(arm.spread(Measured::full_exits_per_second), None);
        let total = arm.total();
        assert_eq!(total.stores_per_second(), 100.0);
        assert_eq!(total.passes_by_minimum(), Some(6.0 / 4.5));

        let overrun = ArmResult {
            overruns: 1,
            ..ArmResult::new("qemu")
        };
        let cell = CellResult {
            workload: "ramp".into(),
            vcpus: 1,
            ring_entries: 256,
            arms: vec![arm, overrun, ArmResult::new("poll")],
            others: None,
            reset_load: None,
        };
        assert_eq!(cell.to_string(), "ramp, 1 vCPU, rings of 256");
        assert!(cell.arm("fixed").is_some());
        assert!(cell.arm("qemu").is_none() && cell.arm("poll").is_none());
        assert_eq!(cell.best(Measured::stores_per_second), 100.0);
    }
}
