// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the guest may still dirty, where the migration would not come to its end.

use std::num::NonZeroU64;

/// Each limit is half the one before.
const TIGHTER: f64 = 0.5;

/// Limits the guest's dirty rate, more and more, for as long as there is no hope.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Throttling {
    /// Pages per second of the whole guest; none yet.
    limit: Option<f64>,
}

impl Throttling {
    /// What the guest may dirty from now on, given the rate that would do: a limit that is there
    /// already was not enough.
    pub(super) fn tighten(&mut self, would_do: NonZeroU64) -> f64 {
        let would_do = would_do.get() as f64;
        let tighter = self.limit.map(|limit| (limit * TIGHTER).max(1.0));
        *self
            .limit
            .insert(tighter.map_or(would_do, |limit| limit.min(would_do)))
    }
}

/// Each vCPU's share of so many pages a second: one at least.
pub(super) fn share(limit: f64, vcpus: usize) -> NonZeroU64 {
    let share = limit / vcpus.max(1) as f64;
    NonZeroU64::new(share as u64).unwrap_or(NonZeroU64::MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_begin_at_what_would_do_and_halve() {
        let mut throttling = Throttling::default();
        let mut tighten = |would_do| throttling.tighten(NonZeroU64::new(would_do).unwrap());
        assert_eq!(tighten(1000), 1000.0);
        assert_eq!(tighten(2000), 500.0);
        assert_eq!(tighten(100), 100.0);
        for _ in 0..100 {
            tighten(100);
        }
        assert_eq!(tighten(100), 1.0);
    }

    #[test]
    fn vcpus_share_alike() {
        assert_eq!(share(1000.0, 3).get(), 333);
        assert_eq!(share(0.5, 3).get(), 1);
        assert_eq!(share(9.0, 0).get(), 9);
    }
}
