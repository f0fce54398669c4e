//! Looks at the rings, and empties them only if one would be full before the next look.

use core::time::Duration;

use super::{Observation, Pacing, PassCost, RingObservation};

/// Each number that [`LookFirst`] goes by. `docs/pacing.md` shows what other values do.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Tuning {
    /// Time in which the highest rate seen loses half its weight.
    ///
    /// Long enough for the next burst to come while the last one is remembered.
    pub half_life: Duration,
    /// Steps into which the time to fill a ring is divided; looks are at least one apart.
    ///
    /// More of them look more often and empty later.
    pub steps: f64,
    /// Steps before it would be full that a ring is emptied.
    ///
    /// More than one, or a look that comes a moment too early would be the last one before the
    /// ring is full.
    pub slack: f64,
    /// Share of the time until a ring is due that may go by in one sleep.
    ///
    /// Less than all of it, for the guest may have become faster since the rate was measured.
    pub stride: f64,
    /// Deviations of the wake-ups' lateness, above its mean, that are reckoned with.
    pub deviations: f64,
    /// Share of the soft limit below which a ring is not emptied, however late wake-ups are.
    pub least: f64,
    /// A ring is taken along if its own vCPU would fill it within so many times the time in which
    /// the fastest fills one. One that holds a hot set, and does not grow, never is.
    pub along: f64,
    /// A rate so many times the highest one known is no noise, but something new.
    pub surprise: f64,
    /// The rate, in entries per second, that is reckoned with when nothing is known: after the
    /// start, a full exit, or a surprise. It is halved from look to look.
    ///
    /// Faster than any vCPU logs, so that the first look finds room left.
    pub first_sight: f64,
    /// Shortest time between two looks.
    pub shortest: Duration,
    /// Longest time between two looks.
    pub longest: Duration,
}

impl Tuning {
    /// The defaults.
    pub const DEFAULT: Self = Self {
        half_life: Duration::from_secs(5),
        steps: 24.0,
        slack: 1.5,
        stride: 0.75,
        deviations: 3.0,
        least: 0.5,
        along: 4.0,
        surprise: 1.5,
        first_sight: 4e6,
        shortest: Duration::from_micros(100),
        longest: Duration::from_secs(1),
    };
}

impl Default for Tuning {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Empties a ring when it would be full before the next look, and not before: each pass protects
/// pages anew, and the guest faults on every one of them again.
///
/// At each look:
///
/// 1. *Rate.* The highest at which any vCPU logs, now or, with a half-life of seconds, lately. One
///    rate for all rings, for vCPUs that share a core log in turns.
/// 2. *Slack.* How long before it is full a ring must be emptied: a part of the time in which a ring
///    fills at that rate, how late wake-ups are, and what the pass takes.
/// 3. *Due* is a ring that would be full within the slack. If one is, it is emptied, and with it
///    those that would be due soon after.
/// 4. *Sleep* for most of the time until the next ring is due; not past a horizon, which doubles
///    from look to look until a full exit or a rate unheard of sets it back to a fraction of a
///    millisecond.
#[derive(Debug, Clone)]
pub struct LookFirst {
    tuning: Tuning,
    /// Highest rate of any ring, in entries per second, fading.
    peak: f64,
    late: Lateness,
    pass: Cost,
    /// Seconds after which to look, should the guest do what it never did before.
    horizon: f64,
    full_exits: u64,
}

impl LookFirst {
    /// The policy with numbers of your own.
    pub const fn new(tuning: Tuning) -> Self {
        Self {
            tuning,
            peak: 0.0,
            late: Lateness {
                mean: 0.0,
                deviation: 0.0,
            },
            pass: Cost {
                seconds: 0.0,
                entries: 0.0,
                last: 0.0,
            },
            horizon: 0.0,
            full_exits: 0,
        }
    }

    /// Takes in what was seen of rings of which the smallest has this soft limit.
    fn learn(&mut self, seen: &Observation<'_>, soft_limit: f64) {
        let tuning = &self.tuning;
        let elapsed = seen.elapsed.as_secs_f64();
        let most = seen.rings.iter().map(|ring| ring.logged).max();
        // A rate of next to no time would be noise.
        let now = most.unwrap_or(0) as f64 / elapsed.max(tuning.shortest.as_secs_f64());
        let known = self.peak * (-elapsed / tuning.half_life.as_secs_f64()).exp2();
        let full_exits = seen.full_exits();
        let surprised = now > known * tuning.surprise || full_exits != self.full_exits;
        let at_first = soft_limit / tuning.first_sight;
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

impl Default for LookFirst {
    fn default() -> Self {
        Self::new(Tuning::DEFAULT)
    }
}

impl Pacing for LookFirst {
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
        if seen.rings.is_empty() {
            return self.tuning.longest;
        }
        let smallest = seen.rings.iter().map(soft_limit).fold(f64::MAX, f64::min);
        self.learn(seen, smallest);
        let tuning = &self.tuning;
        let (shortest, longest) = (tuning.shortest.as_secs_f64(), tuning.longest.as_secs_f64());

        // All times are in seconds from now on.
        let fill = smallest / self.peak;
        let step = (fill / tuning.steps).max(shortest).min(longest);
        let late = self.late.mean + tuning.deviations * self.late.deviation;
        let waiting: u64 = seen.rings.iter().map(|ring| ring.waiting).sum();
        let pass = self.pass.of(waiting as f64);
        let slack = tuning.slack * step + late + pass;

        let room = |ring: &RingObservation| soft_limit(ring) - ring.waiting as f64;
        let is_due = |ring: &RingObservation, slack: f64| {
            let enough = ring.waiting as f64 >= tuning.least * soft_limit(ring);
            enough && room(ring) <= self.peak * slack
        };
        let any_due = seen.rings.iter().any(|ring| is_due(ring, slack));
        // The time that a pass takes is lost to the rings that it leaves alone.
        let busy = if any_due { pass } else { 0.0 };
        let mut left = fill;
        for (ring, reap) in seen.rings.iter().zip(reap) {
            let grows = ring.waiting > 0 && room(ring) <= ring.rate * fill * tuning.along;
            *reap = any_due && (grows || is_due(ring, slack + busy));
            if !*reap {
                left = left.min(room(ring) / self.peak);
            }
        }
        let left = left - busy;
        let sleep = (left - slack).min(left * tuning.stride).max(step);
        let sleep = sleep.min(self.horizon).min(longest).max(shortest);
        Duration::try_from_secs_f64(sleep).unwrap_or(tuning.longest)
    }
}

/// Entries per second below which a vCPU's rate is no different from none.
const SLOWEST: f64 = 1.0;

fn soft_limit(ring: &RingObservation) -> f64 {
    ring.soft_limit.max(1) as f64
}

/// How late wake-ups are, in seconds: smoothed as TCP smooths its round-trip time, with weights
/// 1/8 for the mean and 1/4 for the deviation.
#[derive(Debug, Clone)]
struct Lateness {
    mean: f64,
    deviation: f64,
}

impl Lateness {
    fn learn(&mut self, late: f64) {
        let off = late - self.mean;
        self.mean += off / 8.0;
        self.deviation += (off.abs() - self.deviation) / 4.0;
    }
}

/// What passes cost: sums over the last few, the older ones fading.
#[derive(Debug, Clone)]
struct Cost {
    seconds: f64,
    entries: f64,
    /// Entries of the last one.
    last: f64,
}

impl Cost {
    fn learn(&mut self, pass: PassCost) {
        const FADING: f64 = 0.75;
        self.last = pass.entries as f64;
        self.entries = self.entries * FADING + self.last;
        self.seconds = self.seconds * FADING + pass.took.as_secs_f64();
    }

    /// Seconds that the next pass will take, which finds these entries or as many as the last.
    fn of(&self, waiting: f64) -> f64 {
        self.seconds / self.entries.max(1.0) * waiting.max(self.last)
    }
}
