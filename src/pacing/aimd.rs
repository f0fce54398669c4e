// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Half the delay after a rich pass, a little more after a poor one.

use core::time::Duration;

use super::fixed::Period;
use super::{Observation, Pacing, found};

const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(1);
const STEP: Duration = Duration::from_millis(20);
const RICH: f64 = 0.8;
const POOR: f64 = 0.2;

/// A rule from the review of [`RunLevels`](super::RunLevels), for comparison.
///
/// It reaps on a clock, too, and ignores full exits.
///
/// It empties all rings after a delay of 1 s at first. It divides what a pass found in all rings by the size of one. More than 0.8
/// halves the delay; 0.2 or less lengthens it by 20 ms. The delay stays within 100 ms and 1 s.
#[derive(Debug, Clone)]
pub struct Aimd {
    clock: Period,
}

impl Aimd {
    /// Creates the policy, with the longest delay first.
    pub const fn new() -> Self {
        let clock = Period::new(LONGEST);
        Self { clock }
    }
}

impl Default for Aimd {
    fn default() -> Self {
        Self::new()
    }
}

impl Pacing for Aimd {
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
        if self.clock.passes(seen) {
            reap.fill(true);
            let found = found(seen);
            let delay = &mut self.clock.length;
            if found > RICH {
                *delay /= 2;
            } else if found <= POOR {
                *delay += STEP;
            }
            *delay = (*delay).clamp(SHORTEST, LONGEST);
        }
        self.clock.left()
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::*;
    use crate::pacing::fixed::tests::AtEachPass;

    #[test]
    fn decisions_are_those_worked_out_by_hand() {
        let mut policy = AtEachPass::new(Aimd::new(), 1000);
        for (found, delay) in [
            (&[800][..], 1000), // not more than 0.8
            (&[801], 500),
            (&[201], 500),      // neither rich nor poor
            (&[400, 401], 250), // all rings, by the size of one
            (&[1000], 125),
            (&[1000], 100), // not 62.5
            (&[1000], 100),
            (&[200], 120),
            (&[0], 140),
            (&[500], 140),
            (&[900], 100), // not 70
        ] {
            assert_eq!(policy.pass(found, false), delay, "after {found:?}");
        }
    }

    #[test]
    fn creeps_up_to_a_second() {
        let mut policy = AtEachPass::new(Aimd::new(), 1000);
        assert_eq!(policy.pass(&[900], false), 500);
        for step in 1..=25 {
            assert_eq!(policy.pass(&[0], false), 500 + 20 * step);
        }
        assert_eq!(policy.pass(&[0], false), 1000);
    }

    #[test]
    fn full_exits_are_nothing_to_it() {
        let mut policy = AtEachPass::new(Aimd::new(), 1000);
        assert_eq!(policy.pass(&[0], true), 1000);
        assert_eq!(policy.pass(&[300], true), 1000);
    }
}
