// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A pass at a constant period.

use core::time::Duration;

use super::{LONGEST_LOOK, Observation, Pacing, SHORTEST_LOOK};

/// Empties all rings at a constant period. QEMU does so each second.
#[derive(Debug, Clone)]
pub struct Fixed {
    clock: Period,
}

impl Fixed {
    /// Creates the policy with a pass each `period`.
    pub const fn new(period: Duration) -> Self {
        let clock = Period::new(period);
        Self { clock }
    }
}

impl Default for Fixed {
    /// A pass each second.
    fn default() -> Self {
        Self::new(Duration::from_secs(1))
    }
}

impl Pacing for Fixed {
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
        if self.clock.passes(seen) {
            reap.fill(true);
        }
        self.clock.left()
    }
}

/// A delay between passes, from the end of each on. Looks in between do not change it.
#[derive(Debug, Clone)]
pub(super) struct Period {
    pub(super) length: Duration,
    gone: Duration,
}

impl Period {
    pub(super) const fn new(length: Duration) -> Self {
        let gone = Duration::ZERO;
        Self { length, gone }
    }

    /// Advances by the time since the look before. Returns whether the period is over; then another begins.
    pub(super) fn passes(&mut self, seen: &Observation<'_>) -> bool {
        let pass = seen.last_pass.map_or(Duration::ZERO, |pass| pass.took);
        let elapsed = seen.elapsed.saturating_sub(pass);
        self.gone = self.gone.saturating_add(elapsed);
        let over = self.gone >= self.length;
        if over {
            self.gone = Duration::ZERO;
        }
        over
    }

    /// Returns the rest of the period, within the longest delay.
    pub(super) fn left(&self) -> Duration {
        let left = self.length.saturating_sub(self.gone);
        left.clamp(SHORTEST_LOOK, LONGEST_LOOK)
    }
}

#[cfg(all(test, not(feature = "modelled")))]
pub(super) mod tests {
    use super::*;
    use crate::pacing::{PassCost, RingObservation};

    /// Drives a policy that empties all rings on a clock of its own, from pass to pass.
    pub(in crate::pacing) struct AtEachPass<P> {
        policy: P,
        entries: u64,
        full_exits: u64,
        delay: Duration,
    }

    impl<P: Pacing> AtEachPass<P> {
        /// For rings of `entries` entries.
        pub(in crate::pacing) fn new(mut policy: P, entries: u64) -> Self {
            let delay = policy.decide(&Observation::new(Duration::ZERO, &[]), &mut []);
            let full_exits = 0;
            Self {
                policy,
                entries,
                full_exits,
                delay,
            }
        }

        /// Returns the delay in ms after a pass that finds the rings like this.
        pub(in crate::pacing) fn pass(&mut self, found: &[u64], stopped: bool) -> u64 {
            self.full_exits += u64::from(stopped);
            let ring = |&waiting| RingObservation {
                entries: self.entries,
                waiting,
                full_exits: self.full_exits,
                ..RingObservation::default()
            };
            let rings: Vec<_> = found.iter().map(ring).collect();
            let mut reap = vec![false; found.len()];
            let seen = Observation::new(self.delay, &rings);
            self.delay = self.policy.decide(&seen, &mut reap);
            assert!(reap.iter().all(|&reaps| reaps), "no pass when it was due");
            self.delay.as_millis() as u64
        }
    }

    #[test]
    fn reaps_once_a_period_however_often_it_is_woken() {
        let mut policy = Fixed::new(Duration::from_millis(100));
        let mut decide = |ms| {
            let mut reap = [false; 2];
            let seen = Observation::new(Duration::from_millis(ms), &[]);
            let wait = policy.decide(&seen, &mut reap);
            assert_eq!(reap[0], reap[1]);
            (reap[0], wait.as_millis())
        };
        assert_eq!(decide(0), (false, 100));
        assert_eq!(decide(30), (false, 70));
        assert_eq!(decide(69), (false, 1));
        assert_eq!(decide(1), (true, 100));
        assert_eq!(decide(99), (false, 1));
        assert_eq!(decide(500), (true, 100));
    }

    /// The sleep is the whole delay, however long passes take, and whatever looks come meanwhile.
    #[test]
    fn the_period_begins_when_the_pass_is_over() {
        let ms = Duration::from_millis;
        for looks in [&[1600][..], &[900, 700], &[600, 999, 1]] {
            let mut policy = Fixed::default();
            policy.decide(&Observation::new(ms(0), &[]), &mut []);
            let mut reap = [false];
            policy.decide(&Observation::new(ms(1000), &[]), &mut reap);
            assert_eq!(reap, [true]);
            for (number, &look) in looks.iter().enumerate() {
                let mut seen = Observation::new(ms(look), &[]);
                // The pass took 600 ms.
                seen.last_pass = (number == 0).then_some(PassCost {
                    took: ms(600),
                    entries: 1,
                });
                let mut reap = [false];
                policy.decide(&seen, &mut reap);
                assert_eq!(reap, [number + 1 == looks.len()], "{looks:?}");
            }
        }
    }

    #[test]
    fn looks_within_bounds_whatever_the_period() {
        for (period, bound) in [
            (Duration::ZERO, SHORTEST_LOOK),
            (Duration::MAX, LONGEST_LOOK),
        ] {
            let mut policy = Fixed::new(period);
            for elapsed in [Duration::ZERO, Duration::MAX, Duration::MAX] {
                let wait = policy.decide(&Observation::new(elapsed, &[]), &mut []);
                assert_eq!(wait, bound);
            }
        }
    }
}
