// SPDX-License-Identifier: Apache-2.0 OR MIT
//! When a vCPU stores and when it waits.

use std::time::Duration;

/// How a vCPU's speed is limited.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rhythm {
    /// Not at all.
    Unlimited,
    /// To so many page stores a second.
    Steady(f64),
    /// Full speed for [`BURST`](Self::BURST) of every [`BURST_PERIOD`](Self::BURST_PERIOD), nothing
    /// in between.
    Bursts,
    /// From [`RAMP_BOTTOM`](Self::RAMP_BOTTOM) to [`RAMP_TOP`](Self::RAMP_TOP) page stores a second
    /// within [`RAMP_PERIOD`](Self::RAMP_PERIOD), then from the bottom again.
    Ramp,
}

/// Holds a vCPU to its rhythm.
#[derive(Debug, Clone)]
pub struct Gait {
    rhythm: Rhythm,
    /// When the stores so far are paid for.
    paid: Duration,
}

impl Rhythm {
    /// The length of a burst.
    pub const BURST: Duration = Duration::from_millis(200);
    /// From one burst's start to the next one's: no round number, or a policy with a round period
    /// would meet all bursts at the same point.
    pub const BURST_PERIOD: Duration = Duration::from_millis(530);
    /// Page stores a second at a ramp's start.
    pub const RAMP_BOTTOM: f64 = 500.0;
    /// Page stores a second at a ramp's end: a little less than a native guest of `kvm_pvm` can do.
    pub const RAMP_TOP: f64 = 40_000.0;
    /// How long a ramp takes.
    pub const RAMP_PERIOD: Duration = Duration::from_secs(4);
}

impl Gait {
    /// At its very beginning.
    pub fn new(rhythm: Rhythm) -> Self {
        let paid = Duration::ZERO;
        Self { rhythm, paid }
    }

    /// Takes `stores` that were done by `now`, a time since the rhythm's start. Until when to wait,
    /// if at all.
    pub fn step(&mut self, now: Duration, stores: u32) -> Option<Duration> {
        let per_second = match self.rhythm {
            Rhythm::Unlimited => return None,
            Rhythm::Steady(per_second) => per_second,
            Rhythm::Bursts => {
                let gone = rest(now, Rhythm::BURST_PERIOD);
                return (gone >= Rhythm::BURST).then(|| now - gone + Rhythm::BURST_PERIOD);
            }
            Rhythm::Ramp => {
                let gone = rest(now, Rhythm::RAMP_PERIOD);
                let share = gone.as_secs_f64() / Rhythm::RAMP_PERIOD.as_secs_f64();
                Rhythm::RAMP_BOTTOM + (Rhythm::RAMP_TOP - Rhythm::RAMP_BOTTOM) * share
            }
        };
        // Makes up for sleeps that end late, and is too short for a burst worth the name.
        let oldest = now.saturating_sub(Duration::from_millis(20));
        let cost = Duration::from_secs_f64(f64::from(stores) / per_second);
        self.paid = self.paid.max(oldest) + cost;
        // Shorter sleeps end late by a good part of themselves.
        (self.paid >= now + Duration::from_millis(1)).then_some(self.paid)
    }
}

fn rest(time: Duration, period: Duration) -> Duration {
    Duration::from_nanos((time.as_nanos() % period.as_nanos()) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stores done within `seconds` by a vCPU that takes 20 µs for each.
    fn stores(rhythm: Rhythm, seconds: u64) -> u64 {
        let (mut gait, mut now, mut stores) = (Gait::new(rhythm), Duration::ZERO, 0);
        while now < Duration::from_secs(seconds) {
            stores += 128;
            now += 128 * Duration::from_micros(20);
            now = gait.step(now, 128).unwrap_or(now);
        }
        stores
    }

    #[test]
    fn rates_are_held() {
        assert!((499_000..501_000).contains(&stores(Rhythm::Unlimited, 10)));
        assert!((19_800..20_400).contains(&stores(Rhythm::Steady(2000.0), 10)));
        // Half of the top, on average.
        assert!((235_000..250_000).contains(&stores(Rhythm::Ramp, 12)));
        // 19 bursts of 10,000 stores, each a chunk longer at most.
        assert!((190_000..193_000).contains(&stores(Rhythm::Bursts, 10)));
    }

    #[test]
    fn bursts_begin_together() {
        let mut gait = Gait::new(Rhythm::Bursts);
        let ms = Duration::from_millis;
        assert_eq!(gait.step(ms(199), 1), None);
        assert_eq!(gait.step(ms(200), 1), Some(ms(530)));
        assert_eq!(gait.step(ms(529), 1), Some(ms(530)));
        assert_eq!(gait.step(ms(530), 1), None);
        assert_eq!(gait.step(ms(1000), 1), Some(ms(1060)));
    }
}
