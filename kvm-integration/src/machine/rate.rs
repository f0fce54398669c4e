// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Speed limits: for what a guest writes, and for what a migration sends.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Time that was not used up is worth as much as this later on: it makes up for sleeps that end
/// late, and is too short for a burst worth the name.
const CREDIT: Duration = Duration::from_millis(20);

/// Less is not worth a sleep, whose end is late by a good part of a tenth of it.
const SHORTEST_SLEEP: Duration = Duration::from_millis(1);

/// A budget of so many units per second.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    per_second: f64,
    /// When what was taken so far is paid for.
    paid: Instant,
}

impl TokenBucket {
    /// A budget that begins `now`. `None` for 0, which stands for no limit.
    pub fn new(per_second: f64, now: Instant) -> Option<Self> {
        let paid = now;
        (per_second > 0.0).then_some(Self { per_second, paid })
    }

    /// Takes `units`, and says until when to wait before taking more.
    pub fn take(&mut self, now: Instant, units: u64) -> Option<Instant> {
        let oldest = now.checked_sub(CREDIT).unwrap_or(now);
        let cost = Duration::try_from_secs_f64(units as f64 / self.per_second);
        // A wait beyond what Instant can say is one for ever; a day will do for that.
        let cost = cost
            .unwrap_or(Duration::MAX)
            .min(Duration::from_secs(86_400));
        self.paid = self.paid.max(oldest) + cost;
        (self.paid >= now + SHORTEST_SLEEP).then_some(self.paid)
    }
}

/// Where threads sleep their debts off, and can be woken all together.
#[derive(Debug, Default)]
pub struct Dormitory {
    awake: Mutex<bool>,
    changed: Condvar,
}

impl Dormitory {
    /// Sleeps until `until`, or until someone says [`wake`](Self::wake), or not at all if someone
    /// has.
    pub fn sleep_until(&self, until: Instant) {
        let mut awake = self.lock();
        while !*awake {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let woken = self.changed.wait_timeout(awake, left);
            awake = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Wakes all, and keeps all awake.
    pub fn wake(&self) {
        *self.lock() = true;
        self.changed.notify_all();
    }

    /// Allows sleep again.
    pub fn calm(&self) {
        *self.lock() = false;
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        // One flag is always whole.
        self.awake.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Holds one vCPU's thread to its share of a write rate.
#[derive(Debug)]
pub struct Throttle {
    bucket: Option<TokenBucket>,
    dormitory: Arc<Dormitory>,
}

impl Throttle {
    /// So many stores a second, 0 for any number. It sleeps in `dormitory`.
    pub fn new(stores_per_second: f64, dormitory: &Arc<Dormitory>) -> Self {
        Self {
            bucket: TokenBucket::new(stores_per_second, Instant::now()),
            dormitory: Arc::clone(dormitory),
        }
    }

    /// Pays for stores that were done: sleeps if they came too fast.
    pub fn pay(&mut self, stores: u64) {
        if let Some(until) = self
            .bucket
            .as_mut()
            .and_then(|bucket| bucket.take(Instant::now(), stores))
        {
            self.dormitory.sleep_until(until);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_the_rate_however_late_sleeps_end() {
        let mut bucket = TokenBucket::new(1000.0, Instant::now()).unwrap();
        let start = bucket.paid;
        let (mut now, mut taken) = (start, 0);
        while now < start + Duration::from_secs(10) {
            taken += 5;
            if let Some(until) = bucket.take(now, 5) {
                // Late by 3 ms each time.
                now = until + Duration::from_millis(3);
            }
        }
        assert!((9_990..=10_030).contains(&taken), "{taken} in 10 s");
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let mut bucket = TokenBucket::new(1000.0, Instant::now()).unwrap();
        let later = bucket.paid + Duration::from_secs(5);
        assert_eq!(bucket.take(later, 20), None);
        let until = bucket.take(later, 100).unwrap();
        assert_eq!(until, later + Duration::from_millis(100));
    }

    #[test]
    fn no_rate_is_no_limit_and_a_tiny_one_no_overflow() {
        assert!(TokenBucket::new(0.0, Instant::now()).is_none());
        let mut bucket = TokenBucket::new(1e-30, Instant::now()).unwrap();
        assert!(bucket.take(Instant::now(), u64::MAX).is_some());
    }

    #[test]
    fn sleepers_can_be_woken() {
        let dormitory = Arc::<Dormitory>::default();
        let mut throttle = Throttle::new(0.001, &dormitory);
        let sleeper = std::thread::spawn(move || throttle.pay(100));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!sleeper.is_finished());
        dormitory.wake();
        sleeper.join().unwrap();
        // A thread that comes late does not sleep at all.
        dormitory.sleep_until(Instant::now() + Duration::from_secs(3600));
        dormitory.calm();
        dormitory.sleep_until(Instant::now() + Duration::from_millis(1));
    }
}
