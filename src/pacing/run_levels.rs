// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Six delays, and a level up or down after each pass.

use core::time::Duration;

use super::fixed::Period;
use super::{Observation, Pacing, found};

/// Delays of the levels, in milliseconds.
const DELAYS_MS: [u64; 6] = [1000, 500, 250, 125, 100, 80];
/// A pass that finds less than this share of one ring's size asks for level 0, 1, ... 4; any other asks for 5.
const BELOW: [f64; 5] = [0.1, 0.2, 0.3, 0.4, 0.5];
/// Passes that ask for a lower level before the level falls.
const PATIENCE: u32 = 5;

/// The run levels that were proposed for QEMU in 2022 ("kvm: Dynamically adjust the rate of dirty ring reaper
/// thread", v2), for comparison.
///
/// They reap on a clock, whether or not rings are full.
///
/// All rings are emptied each 1000, 500, 250, 125, 100 or 80 ms, for level 0 to 5. After a pass, the entries of all rings together
/// are divided by the size of *one* ring. A share below 0.1, 0.2, 0.3, 0.4, 0.5 asks for level 0, 1, 2, 3, 4, and any other for
/// level 5.
///
/// The level rises by one if a vCPU has stopped on a full ring since the pass before, or if a higher level is asked for. It falls
/// by one after more than five passes that asked for a lower level since it last rose because a higher one was asked for.
#[derive(Debug, Clone)]
pub struct RunLevels {
    level: usize,
    /// Passes that asked for a lower level.
    down: u32,
    falls: bool,
    full_exits: Option<u64>,
    clock: Period,
}

impl RunLevels {
    /// Creates the policy as its author meant it.
    pub const fn as_meant() -> Self {
        Self {
            level: 0,
            down: 0,
            falls: true,
            full_exits: None,
            clock: Period::new(Duration::from_millis(DELAYS_MS[0])),
        }
    }

    /// Creates the policy as it was posted.
    ///
    /// A mistake in it never counts the passes that ask for a lower level, so the level never falls.
    pub const fn as_posted() -> Self {
        Self {
            falls: false,
            ..Self::as_meant()
        }
    }

    fn adjust(&mut self, found: f64, stopped: bool) {
        let wanted = BELOW.iter().take_while(|&&below| found >= below).count();
        let highest = DELAYS_MS.len() - 1;
        if stopped {
            self.level = (self.level + 1).min(highest);
        } else if wanted > self.level {
            self.level += 1;
            self.down = 0;
        } else if wanted < self.level && self.falls {
            self.down = self.down.saturating_add(1);
            if self.down > PATIENCE {
                self.level -= 1;
            }
        }
        self.clock.length = Duration::from_millis(DELAYS_MS[self.level]);
    }
}

impl Default for RunLevels {
    fn default() -> Self {
        Self::as_meant()
    }
}

impl Pacing for RunLevels {
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
        let full_exits = seen.full_exits();
        let before = *self.full_exits.get_or_insert(full_exits);
        if self.clock.passes(seen) {
            reap.fill(true);
            self.full_exits = Some(full_exits);
            self.adjust(found(seen), full_exits != before);
        }
        self.clock.left()
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::*;
    use crate::pacing::RingObservation;
    use crate::pacing::fixed::tests::AtEachPass;

    /// Returns the delay after each of a series of passes, which found so many of 1,000 entries, with or without a full exit
    /// before.
    fn delays(policy: RunLevels, passes: &[(u64, bool)]) -> Vec<u64> {
        let mut policy = AtEachPass::new(policy, 1000);
        passes
            .iter()
            .map(|&(found, stopped)| policy.pass(&[found], stopped))
            .collect()
    }

    #[test]
    fn each_share_of_a_ring_wants_its_level() {
        // Seven passes are enough to rise from 0 to any level.
        let settled = |found| {
            *delays(RunLevels::as_meant(), &[(found, false); 7])
                .last()
                .unwrap()
        };
        for (found, delay) in [
            (0, 1000),
            (99, 1000),
            (100, 500),
            (199, 500),
            (200, 250),
            (299, 250),
            (300, 125),
            (399, 125),
            (400, 100),
            (499, 100),
            (500, 80),
            (1000, 80),
            (64_000, 80),
        ] {
            assert_eq!(settled(found), delay, "{found} of 1000 entries");
        }
    }

    #[test]
    fn levels_rise_one_by_one_and_fall_after_five_wants() {
        let mut passes = vec![(900, false); 6];
        passes.extend([(0, false); 12]);
        let meant = [
            500, 250, 125, 100, 80, 80, // up, and no further
            80, 80, 80, 80, 80, // five passes want less
            100, 125, 250, 500, 1000, 1000, 1000, // and from the sixth on the level falls
        ];
        assert_eq!(delays(RunLevels::as_meant(), &passes), meant);
        let posted = [500, 250, 125, 100, 80, 80]
            .into_iter()
            .chain([80; 12])
            .collect::<Vec<_>>();
        assert_eq!(delays(RunLevels::as_posted(), &passes), posted);
    }

    #[test]
    fn a_rise_that_was_wanted_clears_the_count_a_full_exit_does_not() {
        let mut passes = vec![(250, false); 2];
        passes.extend([(0, false); 5]); // counted: 5
        passes.extend([(450, false); 1]); // wanted, cleared
        passes.extend([(0, false); 5]); // counted: 5
        passes.extend([(0, true); 1]); // up, and not cleared
        passes.extend([(0, false); 1]); // counted: 6
        let expected = [
            500, 250, 250, 250, 250, 250, 250, 125, 125, 125, 125, 125, 125, 100, 125,
        ];
        assert_eq!(delays(RunLevels::as_meant(), &passes), expected);
    }

    #[test]
    fn an_equal_want_keeps_the_count() {
        let mut passes = vec![(150, false); 1];
        passes.extend([(0, false); 5]);
        passes.extend([(150, false); 3]);
        passes.extend([(0, false); 1]);
        let expected = [500, 500, 500, 500, 500, 500, 500, 500, 500, 1000];
        assert_eq!(delays(RunLevels::as_meant(), &passes), expected);
    }

    #[test]
    fn full_exits_raise_it_at_each_pass_up_to_the_last_level() {
        for policy in [RunLevels::as_meant(), RunLevels::as_posted()] {
            let expected = [500, 250, 125, 100, 80, 80, 80];
            assert_eq!(delays(policy, &[(0, true); 7]), expected);
        }
    }

    /// All rings' entries are divided by one ring's size.
    #[test]
    fn rings_add_up() {
        let mut policy = AtEachPass::new(RunLevels::as_meant(), 1000);
        assert_eq!(policy.pass(&[50, 49], false), 1000);
        assert_eq!(policy.pass(&[50, 50], false), 500);
    }

    /// A full exit wakes the reaper, and this policy sleeps on.
    #[test]
    fn a_full_exit_is_heeded_when_the_delay_is_over() {
        let mut policy = RunLevels::as_meant();
        let mut ring = RingObservation {
            entries: 1000,
            ..RingObservation::default()
        };
        let mut look = |ms, full_exits| {
            ring.full_exits = full_exits;
            let rings = [ring];
            let mut reap = [false];
            let seen = Observation::new(Duration::from_millis(ms), &rings);
            let wait = policy.decide(&seen, &mut reap);
            (reap[0], wait.as_millis())
        };
        // It ignores those from before its time.
        assert_eq!(look(0, 7), (false, 1000));
        assert_eq!(look(400, 7), (false, 600));
        assert_eq!(look(500, 8), (false, 100));
        assert_eq!(look(100, 8), (true, 500));
        assert_eq!(look(500, 8), (true, 500));
    }
}
