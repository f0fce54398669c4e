// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long an arm's turn takes.

use std::time::Duration;

use super::arm::Arm;
use super::cell::Cell;
use super::pattern::Pattern;

/// An arm's turn under a guest's load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// From the arm's start, with empty rings, until it does what it will go on doing.
    pub warm_up: Duration,
    /// From then on: what is measured.
    pub measure: Duration,
}

impl Turn {
    /// The turn of `arm`, measured for `wanted` if that is enough. The guest has once taken `tour`
    /// to store to all its pages: so much for how fast it is.
    pub fn new(cell: &Cell, arm: &Arm, wanted: Duration, tour: Duration) -> Self {
        let (pattern, ring_entries) = (cell.pattern, cell.ring_entries);
        let pages = pattern.pages_per_vcpu(ring_entries);
        let fill = tour.mul_f64(f64::from(ring_entries) / pages as f64);
        let (begin, enough) = match pattern {
            // All of the set must have faulted; then nothing fills any more.
            Pattern::HotSet => (tour.mul_f64(1.5), Duration::ZERO),
            _ => (2 * fill, 4 * fill),
        };
        Self {
            warm_up: begin + arm.settles.max(pattern.lesson()),
            measure: wanted.max(pattern.period(ring_entries)).max(enough),
        }
    }

    /// All of it.
    pub fn total(&self) -> Duration {
        self.warm_up + self.measure
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(pattern: Pattern, arm: &str, tour_ms: u64) -> [u128; 2] {
        let cell = Cell {
            pattern,
            vcpus: 1,
            ring_entries: 1000,
        };
        let arm = Arm::named(arm).unwrap();
        let ms = Duration::from_millis;
        let turn = Turn::new(&cell, &arm, ms(1000), ms(tour_ms));
        [turn.warm_up.as_millis(), turn.measure.as_millis()]
    }

    #[test]
    fn slow_guests_slow_policies_and_slow_loads_take_longer() {
        assert_eq!(turn(Pattern::Constant, "adaptive", 0), [500, 1000]);
        assert_eq!(turn(Pattern::Constant, "adaptive", 4000), [2500, 4000]);
        assert_eq!(turn(Pattern::Constant, "run-levels", 400), [2200, 1000]);
        assert_eq!(turn(Pattern::HotSet, "fixed", 1000), [2000, 1000]);
        assert_eq!(turn(Pattern::Idle, "fixed", 0), [2000, 3000]);
        assert_eq!(turn(Pattern::Bursts, "fixed", 0), [1060, 2120]);
        assert_eq!(turn(Pattern::Trickle, "fixed", 0), [500, 1100]);
    }
}
