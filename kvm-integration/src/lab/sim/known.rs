//! Which rates a policy could know of.

use super::clock::{Nanos, seconds};

/// Seconds in which a rate once seen loses half its weight.
const HALF_LIFE: f64 = 5.0;

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
}
