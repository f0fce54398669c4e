//! A pass every so often, whatever happens.

use core::time::Duration;

use super::{Decision, Observation, Pacing};

/// Empties the rings at a constant period. QEMU does so each second.
#[derive(Debug, Clone)]
pub struct Fixed {
    period: Duration,
    since_reap: Duration,
}

impl Fixed {
    /// A pass each `period`.
    pub const fn new(period: Duration) -> Self {
        Self {
            period,
            since_reap: Duration::ZERO,
        }
    }
}

impl Default for Fixed {
    /// A pass each second.
    fn default() -> Self {
        Self::new(Duration::from_secs(1))
    }
}

impl Pacing for Fixed {
    fn decide(&mut self, seen: &Observation<'_>) -> Decision {
        self.since_reap = self.since_reap.saturating_add(seen.elapsed);
        let reap = self.since_reap >= self.period;
        if reap {
            self.since_reap = Duration::ZERO;
        }
        Decision {
            reap,
            look_again: self.period - self.since_reap,
        }
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::*;

    #[test]
    fn reaps_once_a_period_however_often_it_is_woken() {
        let mut policy = Fixed::new(Duration::from_millis(100));
        let mut decide = |ms| policy.decide(&Observation::new(Duration::from_millis(ms), &[]));
        let wait = |ms| Decision {
            reap: false,
            look_again: Duration::from_millis(ms),
        };
        assert_eq!(decide(0), wait(100));
        assert_eq!(decide(30), wait(70));
        assert_eq!(decide(69), wait(1));
        let now = Decision {
            reap: true,
            look_again: Duration::from_millis(100),
        };
        assert_eq!(decide(1), now);
        assert_eq!(decide(99), wait(1));
        assert_eq!(decide(500), now);
    }
}
