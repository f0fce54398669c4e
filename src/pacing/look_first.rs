//! Looks at the rings, and empties them only if one would be full before the next look.

use core::time::Duration;

use super::{Observation, Pacing, PassCost, RingObservation};

/// Each number that [`LookFirst`] goes by, with the reason for its value.
///
/// | field | default | why |
/// |---|---|---|
/// | `half_life` | 5 s | 1 s forgets a burst before the next one comes: five times the full exits |
/// | `steps` | 8 | 4 to 16 do as well; fewer steps reap earlier, more look more often |
/// | `shortest` | 250 µs | what a wake-up is late by anyway |
/// | `longest` | 1 s | four wake-ups in three seconds cost an idle host nothing |
/// | `first_sight` | 4 000 000 entries/s | faster than any vCPU logs: the first look finds room left |
/// | `deviations` | 4 | of the lateness; its maximum instead of mean + 4 deviations makes 7 to 33 times the passes |
/// | `along` | 0.5 | a ring half full is taken along: it would be due before this pass's rings are again |
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Tuning {
    /// Time in which the highest rate seen loses half its weight.
    pub half_life: Duration,
    /// Steps into which the time to fill a ring is divided: a new burst must not go unseen for
    /// more than one, and no ring is emptied earlier than one before it would be full.
    pub steps: u32,
    /// Shortest time between two looks.
    pub shortest: Duration,
    /// Longest time between two looks.
    pub longest: Duration,
    /// The rate, in entries per second, that is reckoned with when nothing is known of the guest:
    /// after the start, a full exit, or a rate never seen before. From look to look it is halved.
    pub first_sight: f64,
    /// Deviations of the wake-ups' lateness, above its mean, that are reckoned with.
    pub deviations: f64,
    /// Share of the soft limit from which a ring is taken along when another one is due.
    pub along: f64,
}

impl Tuning {
    /// The defaults.
    pub const DEFAULT: Self = Self {
        half_life: Duration::from_secs(5),
        steps: 8,
        shortest: Duration::from_micros(250),
        longest: Duration::from_secs(1),
        first_sight: 4e6,
        deviations: 4.0,
        along: 0.5,
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
/// 2. *Slack.* How long before it is full a ring must be emptied: a step (a part of the time in
///    which a ring fills at that rate), how late wake-ups are, and what the pass takes.
/// 3. *Due* is a ring that would be full within the slack. If one is, it is emptied, and with it
///    each that is half full.
/// 4. *Sleep* until the fullest ring will be due: at least a step, and not past a horizon that
///    doubles from look to look until a full exit or a rate unheard of sets it back to a fraction
///    of a millisecond.
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

    /// Takes in what was seen.
    fn learn(&mut self, seen: &Observation<'_>, soft_limit: f64) {
        let tuning = &self.tuning;
        let elapsed = seen.elapsed.as_secs_f64();
        let most = seen.rings.iter().map(|ring| ring.logged).max();
        // A rate of next to no time would be noise.
        let now = most.unwrap_or(0) as f64 / elapsed.max(tuning.shortest.as_secs_f64());
        let faded = self.peak * (-elapsed / tuning.half_life.as_secs_f64()).exp2();

        let full_exits = seen.full_exits();
        let unheard_of = now > faded * UNHEARD_OF;
        let surprised = unheard_of || full_exits != self.full_exits;
        let at_first = soft_limit / tuning.first_sight;
        self.horizon = match surprised {
            true => at_first,
            false => (self.horizon * 2.0).max(at_first),
        };
        self.full_exits = full_exits;
        self.peak = faded.max(now).max(SLOWEST);
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
        let soft_limit = seen
            .rings
            .iter()
            .map(soft_limit)
            .fold(f64::INFINITY, f64::min);
        let Tuning {
            shortest, longest, ..
        } = self.tuning;
        if seen.rings.is_empty() {
            return longest;
        }
        self.learn(seen, soft_limit);
        let tuning = &self.tuning;
        let (shortest, longest) = (shortest.as_secs_f64(), longest.as_secs_f64());

        let waiting: u64 = seen.rings.iter().map(|ring| ring.waiting).sum();
        let pass = self.pass.of(waiting as f64);
        let to_fill = soft_limit / self.peak;
        let step = (to_fill / f64::from(tuning.steps.max(1)))
            .max(shortest)
            .min(longest);
        let slack = step + self.late.mean + tuning.deviations * self.late.deviation + pass;

        let half_full =
            |ring: &RingObservation| ring.waiting as f64 >= tuning.along * self::soft_limit(ring);
        let due = |ring: &RingObservation| {
            half_full(ring) && ring.waiting as f64 + self.peak * slack >= self::soft_limit(ring)
        };
        let any_due = seen.rings.iter().any(due);
        // Seconds until the first ring would be full.
        let mut left = to_fill;
        for (ring, reap) in seen.rings.iter().zip(reap) {
            *reap = any_due && half_full(ring);
            let waiting = match *reap {
                // What it logs during the pass.
                true => self.peak * pass,
                false => ring.waiting as f64,
            };
            left = left.min((self::soft_limit(ring) - waiting) / self.peak);
        }
        let sleep = (left - slack).max(step).min(self.horizon).min(longest);
        Duration::from_secs_f64(sleep.max(shortest))
    }
}

/// A rate so many times the highest one known is no noise, but something new.
const UNHEARD_OF: f64 = 1.5;
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
