// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A mean over the recent past.

/// A rate in which the distant past has little weight. Both the amount and the time fade, so the quotient is a mean over what
/// was measured, however little that is.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct FadingMean {
    amount: f64,
    seconds: f64,
}

impl FadingMean {
    /// Adds what the last `seconds` brought. An amount that is `half_life` seconds old has half the weight.
    pub(crate) fn add(&mut self, amount: f64, seconds: f64, half_life: f64) {
        let weight = (-seconds / half_life).exp2();
        self.amount = self.amount * weight + amount;
        self.seconds = self.seconds * weight + seconds;
    }

    /// Returns the mean, per second.
    pub(crate) fn per_second(&self) -> f64 {
        self.amount / self.seconds.max(1e-6)
    }
}
