// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Looks at the rings, and empties them only if one would be full before the next look.

use core::time::Duration;

use super::{LONGEST_LOOK, Observation, Pacing, PassCost, RingObservation, SHORTEST_LOOK};

/// The numbers of [`Adaptive`]. `docs/pacing.md` shows the effect of other values.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Tuning {
    /// Time in which the highest rate seen loses half its weight. Take it long enough that the last burst is remembered when the
    /// next one comes. At least 1 ms.
    pub half_life: Duration,
    /// How many times the highest rate seen a vCPU is allowed for until the next look. A faster vCPU is a surprise, and may cost
    /// a full exit. 1 to 10.
    pub faster: f64,
    /// Steps into which the time to fill a ring is divided. Looks are at least one step apart. More steps mean more looks, and
    /// rings that are emptied later. 1 to 1,000.
    pub steps: f64,
    /// Deviations of the wake-ups' lateness, above its mean, that are allowed for. 0 to 100.
    pub deviations: f64,
    /// Share of the soft limit below which a ring is not emptied, however late wake-ups are. 0 to 1.
    pub least: f64,
    /// A ring is emptied together with a due one if its own vCPU would fill it within so many times the time in which the
    /// fastest fills one. A ring with a hot set does not grow, and is left. 0 to 1,000.
    pub along: f64,
    /// The assumed rate, in entries per second, while there is no better estimate: after the start, a full exit, or a surprise.
    /// It is halved from look to look. Take it faster than any vCPU logs, so that the first look finds room left. A thousand to a
    /// thousand million.
    pub first_sight: f64,
    /// Shortest time between two looks, not below [`SHORTEST_LOOK`].
    pub shortest: Duration,
    /// Longest time between two looks, not above [`LONGEST_LOOK`].
    pub longest: Duration,
}

impl Tuning {
    /// The defaults.
    pub const DEFAULT: Self = Self {
        half_life: Duration::from_secs(5),
        faster: 4.0 / 3.0,
        steps: 20.0,
        deviations: 3.0,
        least: 0.5,
        along: 4.0,
        first_sight: 4e6,
        shortest: Duration::from_micros(100),
        longest: Duration::from_secs(1),
    };
}

impl Tuning {
    /// Clamps every number to the range that its documentation names.
    fn sane(self) -> Self {
        let within = |value: f64, least: f64, default: f64, most: f64| match value.is_nan() {
            true => default,
            false => value.clamp(least, most),
        };
        let default = Self::DEFAULT;
        let shortest = self.shortest.clamp(SHORTEST_LOOK, LONGEST_LOOK);
        Self {
            half_life: self.half_life.max(Duration::from_millis(1)),
            faster: within(self.faster, 1.0, default.faster, 10.0),
            steps: within(self.steps, 1.0, default.steps, 1000.0),
            deviations: within(self.deviations, 0.0, default.deviations, 100.0),
            least: within(self.least, 0.0, default.least, 1.0),
            along: within(self.along, 0.0, default.along, 1000.0),
            first_sight: within(self.first_sight, 1e3, default.first_sight, 1e9),
            shortest,
            longest: self.longest.clamp(shortest, LONGEST_LOOK),
        }
    }
}

impl Default for Tuning {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Empties a ring when it would be full before the next look, and not earlier: each pass protects pages anew, and the guest
/// faults on every one of them again.
///
/// At each look:
///
/// 1. *Rate.* It takes the highest rate at which any vCPU logs, now or, with a half-life of seconds, lately. All rings share
///    one rate, because vCPUs that share a core log in turns.
/// 2. *Due.* A ring is due if it would be full after one more step (a part of the time in which a ring fills) at a third more
///    than that rate, the lateness of wake-ups, and the time of a pass.
/// 3. *Pass.* If a ring is due, it is emptied, together with those that will soon be due.
/// 4. *Sleep.* It sleeps for as long as the fullest ring has room at a third more than that rate, within a horizon. The
///    horizon doubles from look to look, until a full exit or a new highest rate sets it back to a fraction of a
///    millisecond.
#[derive(Debug, Clone)]
pub struct Adaptive {
    tuning: Tuning,
    /// The highest rate of any ring, in entries per second, fading.
    peak: f64,
    late: Lateness,
    pass: Cost,
    /// Seconds after which to look in case the guest does something new.
    horizon: f64,
    full_exits: u64,
}

impl Adaptive {
    /// Creates the policy with other numbers. Those out of range are clamped.
    pub fn new(tuning: Tuning) -> Self {
        Self {
            tuning: tuning.sane(),
            peak: 0.0,
            late: Lateness {
                mean: 0.0,
                deviation: 0.0,
            },
            pass: Cost::SUPPOSED,
            horizon: 0.0,
            full_exits: 0,
        }
    }

    /// Learns from an observation of rings, the smallest of which has this soft limit.
    fn learn(&mut self, seen: &Observation<'_>, soft_limit: f64) {
        let tuning = &self.tuning;
        let elapsed = seen.elapsed.as_secs_f64();
        // The fastest vCPU would fill a ring in this time.
        let at_first = soft_limit / tuning.first_sight;
        let most = seen.rings.iter().map(|ring| ring.logged).max();
        // Entries within a shorter time are a spurt, and not yet a rate.
        let now = most.unwrap_or(0) as f64 / elapsed.max(at_first);
        let known = self.peak * (-elapsed / tuning.half_life.as_secs_f64()).exp2();
        let full_exits = seen.full_exits();
        let surprised = now > known * tuning.faster || full_exits != self.full_exits;
        self.horizon = match surprised {
            true => at_first,
            false => (self.horizon * 2.0).max(at_first),
        };
        self.full_exits = full_exits;
        self.peak = known.max(now).max(SLOWEST);
        if let Some(lateness) = seen.lateness {
            self.late.learn(lateness.as_secs_f64());
        }
        if let Some(pass) = seen.last_pass {
            self.pass.learn(pass);
        }
    }
}

impl Default for Adaptive {
    fn default() -> Self {
        Self::new(Tuning::DEFAULT)
    }
}

impl Pacing for Adaptive {
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
        if seen.rings.is_empty() {
            return self.tuning.longest;
        }
        let smallest = seen.rings.iter().map(soft_limit).fold(f64::MAX, f64::min);
        self.learn(seen, smallest);
        let tuning = &self.tuning;
        let (shortest, longest) = (tuning.shortest.as_secs_f64(), tuning.longest.as_secs_f64());

        // All times are in seconds from here on, at the peak rate.
        let elapsed = seen.elapsed.as_secs_f64().max(shortest);
        let fill = smallest / self.peak;
        let step = (fill / tuning.steps).max(shortest).min(longest);
        let late = self.late.mean + tuning.deviations * self.late.deviation;
        let pass = self.pass.of(seen.waiting() as f64);
        let room = |ring: &RingObservation| soft_limit(ring) - ring.waiting as f64;
        let grows = |ring: &RingObservation| {
            // Lately, or since the last look.
            let pace = ring.rate.max(ring.logged as f64 / elapsed);
            ring.waiting > 0 && room(ring) <= pace * fill * tuning.along
        };
        let is_due = |ring: &RingObservation| {
            let enough = ring.waiting as f64 >= tuning.least * soft_limit(ring);
            // A hot set that does not grow may fill the ring, whatever the lateness.
            let slack = if grows(ring) { late + pass } else { 0.0 };
            enough && room(ring) <= self.peak * (tuning.faster * step + slack)
        };
        let any_due = seen.rings.iter().any(is_due);
        // Rings that the pass leaves alone lose the time that it takes.
        let busy = if any_due { pass } else { 0.0 };
        let mut left = fill;
        for (ring, reap) in seen.rings.iter().zip(reap) {
            *reap = any_due && (grows(ring) || is_due(ring));
            if !*reap {
                left = left.min(room(ring) / self.peak);
            }
        }
        let safe = (left - busy - late - pass) / tuning.faster;
        let sleep = safe.max(step).min(self.horizon).min(longest).max(shortest);
        let sleep = Duration::try_from_secs_f64(sleep).unwrap_or(tuning.longest);
        // Seconds in floating point may be a nanosecond off.
        sleep.clamp(tuning.shortest, tuning.longest)
    }
}

/// Entries per second below which a vCPU's rate counts as none.
const SLOWEST: f64 = 1.0;

fn soft_limit(ring: &RingObservation) -> f64 {
    ring.soft_limit.max(1) as f64
}

/// The lateness of wake-ups, in seconds: smoothed as TCP smooths its round-trip time (RFC 6298), from the first sample on, with
/// weights 1/8 for the mean and 1/4 for the deviation.
#[derive(Debug, Clone)]
struct Lateness {
    mean: f64,
    deviation: f64,
}

impl Lateness {
    fn learn(&mut self, late: f64) {
        if self.mean == 0.0 {
            (self.mean, self.deviation) = (late, late / 2.0);
            return;
        }
        let off = late - self.mean;
        self.mean += off / 8.0;
        self.deviation += (off.abs() - self.deviation) / 4.0;
    }
}

/// The cost of passes: sums over the last few, the older ones fading.
#[derive(Debug, Clone)]
struct Cost {
    seconds: f64,
    entries: f64,
    /// Entries of the last one.
    last: f64,
}

impl Cost {
    /// Until a pass has been seen: 100 ns per entry.
    const SUPPOSED: Self = Self {
        seconds: 1e-4,
        entries: 1e3,
        last: 0.0,
    };

    fn learn(&mut self, pass: PassCost) {
        const FADING: f64 = 0.75;
        self.last = pass.entries as f64;
        self.entries = self.entries * FADING + self.last;
        self.seconds = self.seconds * FADING + pass.took.as_secs_f64();
    }

    /// Returns the seconds that the next pass will take, if it finds these entries or as many as the last.
    fn of(&self, waiting: f64) -> f64 {
        self.seconds / self.entries.max(1.0) * waiting.max(self.last)
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::*;

    const SOFT_LIMIT: u64 = 4000;

    fn ring(waiting: u64, logged: u64) -> RingObservation {
        RingObservation {
            soft_limit: SOFT_LIMIT,
            waiting,
            logged,
            ..RingObservation::default()
        }
    }

    fn growing(waiting: u64) -> RingObservation {
        RingObservation {
            rate: 40_000.0,
            ..ring(waiting, 0)
        }
    }

    /// A tenth as fast: it grows by itself from 2,400 entries on.
    fn slow(waiting: u64) -> RingObservation {
        RingObservation {
            rate: 4_000.0,
            ..ring(waiting, 0)
        }
    }

    fn look(policy: &mut Adaptive, us: u64, rings: &[RingObservation]) -> (Vec<bool>, u128) {
        let mut reap = vec![false; rings.len()];
        let seen = Observation::new(Duration::from_micros(us), rings);
        let wait = policy.decide(&seen, &mut reap);
        (reap, wait.as_micros())
    }

    /// A policy that has seen a guest log 40,000 entries a second, so that a ring fills in 100 ms, with no doubt left.
    fn acquainted() -> Adaptive {
        Adaptive {
            peak: 40_000.0,
            horizon: 10.0,
            pass: Cost {
                seconds: 0.0,
                ..Cost::SUPPOSED
            },
            ..Adaptive::default()
        }
    }

    /// The step is 100 ms / 20 = 5 ms, the slack four thirds of it: 6.667 ms, or 266.7 entries.
    #[test]
    fn a_ring_is_due_when_it_would_be_full_within_the_slack() {
        for (waiting, due) in [(3733, false), (3734, true), (4000, true), (u64::MAX, true)] {
            let (reap, _) = look(&mut acquainted(), 0, &[ring(waiting, 0)]);
            assert_eq!(reap, [due], "{waiting} of {SOFT_LIMIT} entries");
        }
    }

    #[test]
    fn it_sleeps_for_as_long_as_there_is_room_at_a_third_more_than_the_rate() {
        for (waiting, sleep) in [
            (0, 75_000),    // of 100 ms
            (1000, 56_250), // of 75 ms
            (3400, 11_250), // of 15 ms
            (3730, 5_062),  // of 6.75 ms
            (4000, 75_000), // emptied now
        ] {
            let rings = [ring(0, 0), ring(waiting, 0)];
            let (_, wait) = look(&mut acquainted(), 0, &rings);
            assert_eq!(wait, sleep, "{waiting} of {SOFT_LIMIT} entries");
        }
    }

    #[test]
    fn late_wake_ups_and_long_passes_make_it_earlier() {
        let mut policy = acquainted();
        // 2.5 us for each entry that waits; the last pass found fewer.
        policy.late = Lateness {
            mean: 0.002,
            deviation: 0.001,
        };
        policy.pass = Cost {
            seconds: 0.010,
            entries: 4000.0,
            last: 100.0,
        };
        // This time it was not late: mean 1.75 ms, deviation 1.25 ms. The slack is 6.667 ms, 1.75 + 3 x
        // 1.25 ms, and, with 3,194 entries, 7.985 ms for the pass; they leave 806, or 20.15 ms.
        for (waiting, due) in [(3193, false), (3194, true)] {
            let (reap, _) = look(&mut policy.clone(), 0, &[growing(waiting)]);
            assert_eq!(reap, [due], "{waiting} of {SOFT_LIMIT} entries");
        }
        // However late they are, a ring less than half full is left alone.
        policy.late.mean = 1.0;
        for (waiting, due) in [(1999, false), (2000, true)] {
            let (reap, _) = look(&mut policy.clone(), 0, &[growing(waiting)]);
            assert_eq!(reap, [due], "{waiting} of {SOFT_LIMIT} entries");
        }
        // And so is one that holds a hot set.
        let (reap, _) = look(&mut policy, 0, &[ring(3733, 0)]);
        assert_eq!(reap, [false]);
    }

    #[test]
    fn a_ring_is_taken_along_if_its_vcpu_would_soon_fill_it() {
        let with = |waiting, rate| RingObservation {
            rate,
            ..ring(waiting, 0)
        };
        for (ring, along) in [
            (with(100, 40_000.0), true),
            (with(100, 9_750.0), true), // full within 400 ms
            (with(100, 9_749.0), false),
            (with(3000, 2_500.0), true),
            (with(3000, 2_499.0), false),
            (with(3733, 0.0), false), // a hot set that fits
            (with(0, 40_000.0), false),
        ] {
            let alone = look(&mut acquainted(), 0, &[ring]).0;
            assert_eq!(alone, [false]);
            let due = with(3900, 0.0);
            let beside = look(&mut acquainted(), 0, &[due, ring]).0;
            assert_eq!(beside, [true, along], "{ring:?}");
        }
    }

    /// A pass takes 5 ms for 4,000 entries.
    #[test]
    fn the_time_of_a_pass_is_lost_to_the_rings_that_it_leaves() {
        let mut policy = acquainted();
        policy.pass = Cost {
            seconds: 0.005,
            entries: 4000.0,
            last: 4000.0,
        };
        let rings = |other| [growing(4000), slow(other)];
        // Three quarters of 100 ms less a pass.
        assert_eq!(look(&mut policy.clone(), 0, &rings(0)[1..]).1, 71_250);
        // Less two.
        let (reap, wait) = look(&mut policy.clone(), 0, &rings(0));
        assert_eq!((reap, wait), (vec![true, false], 67_500));
    }

    #[test]
    fn at_first_it_looks_soon_and_then_ever_more_seldom() {
        let mut policy = Adaptive::default();
        let mut wait = 0;
        for expected in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 1000] {
            let (reap, next) = look(&mut policy, wait, &[ring(0, 0)]);
            assert_eq!((reap, next), (vec![false], expected * 1000));
            wait = next as u64;
        }
        // A full exit, and it is awake again.
        let full = RingObservation {
            full_exits: 1,
            ..ring(0, 0)
        };
        assert_eq!(look(&mut policy, 500, &[full]).1, 1000);
        assert_eq!(look(&mut policy, 1000, &[full]).1, 2000);
        // So it is by a rate that is new to it: 100 entries in 2 ms.
        assert_eq!(look(&mut policy, 2000, &[ring(100, 100)]).1, 1000);
        assert_eq!(look(&mut policy, 1000, &[ring(150, 50)]).1, 2000);
    }

    #[test]
    fn the_highest_rate_is_remembered_and_fades() {
        let mut policy = acquainted();
        look(&mut policy, 1_000, &[ring(0, 10), ring(0, 50)]);
        assert_eq!(policy.peak, 50_000.0);
        look(&mut policy, 5_000_000, &[ring(0, 60), ring(0, 1000)]);
        assert_eq!(policy.peak, 25_000.0);
        // A spurt counts as if it had taken a millisecond.
        look(&mut policy, 1, &[ring(0, 20), ring(0, 30)]);
        assert_eq!(policy.peak.round(), 30_000.0);
    }

    #[test]
    fn lateness_and_cost_are_learnt() {
        let mut policy = acquainted();
        let rings = [ring(0, 0)];
        let mut seen = Observation::new(Duration::from_millis(1), &rings);
        seen.lateness = Some(Duration::from_millis(8));
        seen.last_pass = Some(PassCost {
            took: Duration::from_millis(4),
            entries: 2000,
        });
        policy.decide(&seen, &mut [false]);
        let late = |policy: &Adaptive| (policy.late.mean, policy.late.deviation);
        assert_eq!(late(&policy), (0.008, 0.004));
        // Of 750 entries that were supposed, at no time, and 2,000.
        let price = 0.004 / 2750.0;
        assert_eq!(policy.pass.of(0.0), price * 2000.0);
        assert_eq!(policy.pass.of(4000.0), price * 4000.0);
        seen.lateness = Some(Duration::ZERO);
        seen.last_pass = None;
        policy.decide(&seen, &mut [false]);
        assert_eq!(late(&policy), (0.007, 0.005));
        // A full exit has woken it: nothing is learnt about lateness.
        seen.lateness = None;
        policy.decide(&seen, &mut [false]);
        assert_eq!(late(&policy), (0.007, 0.005));
    }

    /// Whatever its numbers, it empties a full ring and returns delays within bounds.
    #[test]
    fn numbers_without_sense_do_no_harm() {
        let numbers = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 0.0, 1e300];
        let times = [Duration::ZERO, Duration::from_nanos(1), Duration::MAX];
        for number in numbers {
            for time in times {
                let tuning = Tuning {
                    half_life: time,
                    faster: number,
                    steps: number,
                    deviations: number,
                    least: number,
                    along: number,
                    first_sight: number,
                    shortest: time,
                    longest: time,
                };
                let mut policy = Adaptive::new(tuning);
                for us in [0, 1000, 1000, 5_000_000] {
                    let mut reap = [false];
                    let rings = [growing(SOFT_LIMIT)];
                    let seen = Observation::new(Duration::from_micros(us), &rings);
                    let wait = policy.decide(&seen, &mut reap);
                    assert!((SHORTEST_LOOK..=LONGEST_LOOK).contains(&wait), "{tuning:?}");
                    assert_eq!(reap, [true], "{tuning:?}");
                }
            }
        }
    }

    #[test]
    fn without_rings_it_sleeps() {
        assert_eq!(look(&mut acquainted(), 0, &[]).1, 1_000_000);
    }
}
