//! What the guest may still dirty, if it dirties faster than the link sends.

use std::num::NonZeroU64;

use super::outcome::Round;

/// The first limit lets the guest dirty a quarter of what the link sends meanwhile, so each round
/// is a quarter of the one before.
const FIRST: f64 = 0.25;

/// Each further one is half the one before.
const TIGHTER: f64 = 0.5;

/// A guest that dirties more than this share of what was sent meanwhile does not converge, or so
/// slowly that it is not worth waiting for: QEMU's threshold, too.
const ENOUGH: f64 = 0.5;

/// Limits the guest's dirty rate, more and more, until rounds become smaller.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Converge {
    /// Pages per second of the whole guest; none yet.
    limit: Option<f64>,
}

impl Converge {
    /// What the guest may dirty from now on, given the round that was sent and how many pages were
    /// dirtied since its sync; `None` if that stays as it is.
    pub(super) fn after(&mut self, sent: &Round, dirtied: u64) -> Option<f64> {
        if dirtied as f64 <= sent.pages as f64 * ENOUGH || sent.send.is_zero() {
            return None;
        }
        let limit = match self.limit {
            None => sent.pages as f64 / sent.send.as_secs_f64() * FIRST,
            Some(limit) => limit * TIGHTER,
        };
        self.limit = Some(limit.max(1.0));
        self.limit
    }
}

/// Each vCPU's share of so many pages a second: one at least.
pub(super) fn share(limit: f64, vcpus: usize) -> NonZeroU64 {
    let share = limit / vcpus.max(1) as f64;
    NonZeroU64::new(share as u64).unwrap_or(NonZeroU64::MIN)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn round(pages: u64, seconds: u64) -> Round {
        Round {
            pages,
            running: true,
            begin: Duration::ZERO,
            written_in: None,
            sync: Duration::ZERO,
            send: Duration::from_secs(seconds),
            limit: None,
        }
    }

    #[test]
    fn a_guest_that_converges_is_left_alone() {
        let mut converge = Converge::default();
        assert_eq!(converge.after(&round(1000, 1), 500), None);
        assert_eq!(converge.after(&round(0, 0), 0), None);
        assert_eq!(converge.after(&round(10, 0), 100), None);
    }

    #[test]
    fn limits_begin_at_a_quarter_of_the_link_and_halve() {
        let mut converge = Converge::default();
        assert_eq!(converge.after(&round(8000, 2), 4001), Some(1000.0));
        assert_eq!(converge.after(&round(4001, 1), 1000), None);
        assert_eq!(converge.after(&round(1000, 1), 600), Some(500.0));
        for _ in 0..100 {
            converge.after(&round(1000, 1), 600);
        }
        assert_eq!(converge.after(&round(1000, 1), 600), Some(1.0));
    }

    #[test]
    fn vcpus_share_alike() {
        assert_eq!(share(1000.0, 3).get(), 333);
        assert_eq!(share(0.5, 3).get(), 1);
        assert_eq!(share(9.0, 0).get(), 9);
    }
}
