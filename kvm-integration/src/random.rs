// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Steele, Lea and Flood's SplitMix64: random numbers that are the same each time.

/// A stream of them, with its state.
#[derive(Debug, Clone)]
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    /// The stream `stream` of `seed`: streams have nothing to do with one another.
    pub fn stream(seed: u64, stream: u64) -> Self {
        let start = Self(seed).next();
        let start = Self(start ^ stream).next();
        Self(start)
    }

    /// The next one.
    #[allow(
        clippy::should_implement_trait,
        reason = "a stream without an end is no iterator"
    )]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, evenly enough.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// A number from 0 up to and not including 1.
    pub fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number that is 1 on average and at most `spread` off.
    pub fn around_one(&mut self, spread: f64) -> f64 {
        1.0 + spread * (2.0 * self.share() - 1.0)
    }

    /// A number of an exponential distribution whose mean is 1.
    pub fn exponential(&mut self) -> f64 {
        -(1.0 - self.share()).ln()
    }

    /// Puts the list into any order.
    pub fn shuffle(&mut self, list: &mut [u64]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.below(last as u64 + 1) as usize);
        }
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
        let mut random = SplitMix64::stream(1, 2);
        assert!((mean(|| random.share()) - 0.5).abs() < 0.02);
        assert!((mean(|| random.exponential()) - 1.0).abs() < 0.05);
        let off = (0..10_000).map(|_| (random.around_one(0.1) - 1.0).abs());
        assert!(off.fold(0.0, f64::max) <= 0.1);
    }

    #[test]
    fn streams_and_seeds_differ_and_repeat() {
        let first = |seed, stream| SplitMix64::stream(seed, stream).share();
        assert_eq!(first(1, 2), first(1, 2));
        assert_ne!(first(1, 2), first(2, 1));
        assert_ne!(first(1, 2), first(1, 3));
        assert_ne!(first(1, 2), first(3, 2));
    }
}
