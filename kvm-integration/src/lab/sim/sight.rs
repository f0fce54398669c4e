// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What looks have shown, and which rates a policy could know of.

use kvm_dirty_ring::pacing::RingObservation;

use super::clock::{Nanos, seconds};

/// Seconds in which a rate once seen loses half its weight.
const HALF_LIFE: f64 = 5.0;

/// Entries a second that no vCPU logs. What comes in less time than it would take at this rate to
/// fill a ring is a spurt, and not yet a rate.
const FASTEST: f64 = 4e6;

/// The highest rate seen, fading.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Known {
    rate: f64,
    at: Nanos,
}

impl Known {
    /// What it is by `now`.
    pub(super) fn by(&self, now: Nanos) -> f64 {
        let gone = seconds(now.saturating_sub(self.at));
        self.rate * (-gone / HALF_LIFE).exp2()
    }

    /// This rate is seen.
    pub(super) fn see(&mut self, now: Nanos, rate: f64) {
        self.rate = self.by(now).max(rate);
        self.at = now;
    }
}

/// A look at the rings, and what was known by then.
#[derive(Debug, Clone, Default)]
pub(super) struct Sight {
    /// Seconds that rates are measured over at least.
    shortest: f64,
    at: Nanos,
    /// What each vCPU had logged.
    logged: Vec<u64>,
    known: Known,
}

impl Sight {
    /// No look yet, at rings that stop their vCPUs at `soft_limit` entries.
    pub(super) fn new(soft_limit: u64) -> Self {
        Self {
            shortest: soft_limit as f64 / FASTEST,
            ..Self::default()
        }
    }

    /// What a look shows to those who know of the one before.
    pub(super) fn take(&mut self, before: &Self, now: Nanos, rings: &[RingObservation]) {
        self.at = now;
        self.logged.clear();
        let logged = rings.iter().map(|ring| ring.taken + ring.waiting);
        self.logged.extend(logged);
        self.known = before.known;
        // The first shows no rates.
        let each = self.logged.iter().zip(&before.logged);
        if let Some(most) = each.map(|(now, before)| now - before).max() {
            self.known.see(now, before.per_second(now, most as f64));
        }
    }

    /// The rate at which `vcpu`, which has `logged` so many entries by `now`, has logged them since
    /// this look; and the highest rate known of.
    pub(super) fn since(&self, now: Nanos, vcpu: usize, logged: f64) -> (f64, f64) {
        let before = self.logged.get(vcpu).copied().unwrap_or(0);
        let rate = self.per_second(now, logged - before as f64);
        (rate, self.known.by(now))
    }

    fn per_second(&self, now: Nanos, entries: f64) -> f64 {
        entries / seconds(now - self.at).max(self.shortest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_rate_counts_and_fades() {
        let mut known = Known::default();
        assert_eq!(known.by(7), 0.0);
        known.see(0, 800.0);
        assert_eq!(known.by(5_000_000_000), 400.0);
        known.see(5_000_000_000, 300.0);
        assert_eq!(known.by(10_000_000_000), 200.0);
        known.see(10_000_000_000, 300.0);
        assert_eq!(known.by(10_000_000_000), 300.0);
    }

    #[test]
    fn looks_show_the_rate_of_the_fastest() {
        let ring = |taken, waiting| {
            let mut ring = RingObservation::default();
            (ring.taken, ring.waiting) = (taken, waiting);
            ring
        };
        let [nothing, mut first, mut second] = [(); 3].map(|()| Sight::new(400));
        first.take(&nothing, 0, &[ring(5, 5), ring(0, 100)]);
        assert_eq!(first.since(1_000_000_000, 1, 300.0), (200.0, 0.0));
        second.take(&first, 500_000_000, &[ring(50, 20), ring(100, 20)]);
        // In no time at all, which counts as the 100 us in which a ring could fill.
        assert_eq!(second.since(500_000_000, 0, 71.0), (10_000.0, 120.0));
        assert_eq!(second.since(5_500_000_000, 1, 130.0), (2.0, 60.0));
    }
}
