// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long to wait after the kernel refused a reset.

use core::time::Duration;

const SHORTEST: Duration = Duration::from_millis(1);
const LONGEST: Duration = Duration::from_secs(1);

/// Refusals in a row. Each doubles the time until the next attempt. A VM that KVM has declared dead refuses for ever, and
/// a policy whose rings fill would try as often as it may.
#[derive(Default)]
pub(super) struct Backoff {
    refusals: u32,
}

impl Backoff {
    /// Notes the result of a pass: the entries taken, or `None` if it failed. A pass that finds nothing may have made no reset.
    pub(super) fn note(&mut self, taken: Option<u64>) {
        match taken {
            None => self.refusals = self.refusals.saturating_add(1),
            Some(0) => {}
            Some(_) => self.refusals = 0,
        }
    }

    /// Returns the least time to wait.
    pub(super) fn delay(&self) -> Duration {
        match self.refusals {
            0 => Duration::ZERO,
            refusals => (SHORTEST * (1 << (refusals - 1).min(16))).min(LONGEST),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_up_to_a_second_and_ends_with_a_reset() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.delay(), Duration::ZERO);
        for expected in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 1000] {
            backoff.note(None);
            backoff.note(Some(0));
            assert_eq!(backoff.delay(), Duration::from_millis(expected));
        }
        backoff.refusals = u32::MAX;
        backoff.note(None);
        assert_eq!(backoff.delay(), LONGEST);
        backoff.note(Some(1));
        assert_eq!(backoff.delay(), Duration::ZERO);
    }
}
