// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How late the reaper's wake-ups are.

use std::time::Duration;

use crate::random::SplitMix64;

/// A distribution of lateness: exponential, and cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lateness {
    /// Mean, were it not for the cut.
    pub mean: Duration,
    /// No wake-up is later.
    pub most: Duration,
}

impl Lateness {
    /// Always in time.
    pub const NONE: Self = Self::new(0, 0);
    /// A core is idle: a hundredth of the wake-ups are later than 0.28 ms.
    pub const IDLE_CORE: Self = Self::new(60, 1_000);
    /// vCPUs fill all cores: a hundredth of the wake-ups are later than 4.6 ms.
    pub const BUSY_CORES: Self = Self::new(1_000, 10_000);
    /// A `SCHED_FIFO` thread.
    pub const FIFO: Self = Self::new(20, 100);

    const fn new(mean_us: u64, most_us: u64) -> Self {
        Self {
            mean: Duration::from_micros(mean_us),
            most: Duration::from_micros(most_us),
        }
    }

    pub(super) fn draw(&self, random: &mut SplitMix64) -> Duration {
        self.mean.mul_f64(random.exponential()).min(self.most)
    }
}
