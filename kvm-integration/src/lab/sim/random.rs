//! Random numbers as the simulation needs them.

use crate::random::SplitMix64;

/// A stream of them.
#[derive(Debug, Clone)]
pub(super) struct Random(SplitMix64);

impl Random {
    /// The stream `stream` of `seed`: streams have nothing to do with one another.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let start = SplitMix64(seed).next();
        let start = SplitMix64(start ^ stream).next();
        Self(SplitMix64(start))
    }

    /// A number from 0 up to and not including 1.
    pub(super) fn share(&mut self) -> f64 {
        (self.0.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number that is 1 on average and at most `spread` off.
    pub(super) fn around_one(&mut self, spread: f64) -> f64 {
        1.0 + spread * (2.0 * self.share() - 1.0)
    }

    /// A number of an exponential distribution whose mean is 1.
    pub(super) fn exponential(&mut self) -> f64 {
        -(1.0 - self.share()).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean(mut draw: impl FnMut() -> f64) -> f64 {
        (0..10_000).map(|_| draw()).sum::<f64>() / 10_000.0
    }

    #[test]
    fn numbers_are_spread_as_they_should_be() {
        let mut random = Random::new(1, 2);
        assert!((mean(|| random.share()) - 0.5).abs() < 0.02);
        assert!((mean(|| random.exponential()) - 1.0).abs() < 0.05);
        let off = (0..10_000).map(|_| (random.around_one(0.1) - 1.0).abs());
        assert!(off.fold(0.0, f64::max) <= 0.1);
    }

    #[test]
    fn streams_and_seeds_differ_and_repeat() {
        let first = |seed, stream| Random::new(seed, stream).share();
        assert_eq!(first(1, 2), first(1, 2));
        assert_ne!(first(1, 2), first(2, 1));
        assert_ne!(first(1, 2), first(1, 3));
        assert_ne!(first(1, 2), first(3, 2));
    }
}
