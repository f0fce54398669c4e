//! A mean over the recent past.

/// So many of something a second, where what is long ago has little weight: both the amount and the
/// time that it took fade, so the quotient is a mean over what is known, however little that is.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct FadingMean {
    amount: f64,
    seconds: f64,
}

impl FadingMean {
    /// Takes in what the last `seconds` brought. What is `half_life` seconds old has half the
    /// weight.
    pub(crate) fn add(&mut self, amount: f64, seconds: f64, half_life: f64) {
        let weight = (-seconds / half_life).exp2();
        self.amount = self.amount * weight + amount;
        self.seconds = self.seconds * weight + seconds;
    }

    /// The mean.
    pub(crate) fn per_second(&self) -> f64 {
        self.amount / self.seconds.max(1e-6)
    }
}
