// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a vCPU may dirty under a limit, and what it owes: arithmetic only, without clock or thread.

use core::num::NonZeroU64;
use core::time::Duration;

/// How long unused budget stays good. It makes up for sleeps that end late, by tens of milliseconds on a host with more threads
/// than cores. With more credit, a vCPU that was idle could begin with a long burst.
pub(super) const CREDIT: Duration = Duration::from_millis(250);

/// A smaller debt is left standing: kicking a vCPU out of the guest and putting its thread to sleep would cost more.
pub(super) const SHORTEST_STOP: Duration = Duration::from_millis(5);

/// One page in the unit of debts. The unit is chosen so that a nanosecond pays off the limit in pages a second: all numbers are
/// whole, and nothing is lost to rounding, however often it is counted.
const PAGE: i128 = 1_000_000_000;

/// A limit, and what has been dirtied under it.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    pages_per_second: NonZeroU64,
    /// Pages that were logged at the last count, and the time of that.
    logged: u64,
    counted: Duration,
    /// Below zero it is credit.
    owed: i128,
}

impl Budget {
    /// Starts at `now`, when `logged` pages are logged already; these are free.
    pub(super) fn new(pages_per_second: NonZeroU64, logged: u64, now: Duration) -> Self {
        Self {
            pages_per_second,
            logged,
            counted: now,
            owed: 0,
        }
    }

    pub(super) fn limit(&self) -> NonZeroU64 {
        self.pages_per_second
    }

    /// Sets another limit, from the last count on. The debt remains as many pages as it was.
    pub(super) fn set_limit(&mut self, pages_per_second: NonZeroU64) {
        self.pages_per_second = pages_per_second;
    }

    /// Notes that `logged` pages are logged by `now`. Returns how long it takes to pay for the debt then.
    pub(super) fn count(&mut self, logged: u64, now: Duration) -> Duration {
        let rate = i128::from(self.pages_per_second.get());
        let pays = |time: Duration| (time.as_nanos() as i128).saturating_mul(rate);
        let earned = pays(now.saturating_sub(self.counted));
        let spent = i128::from(logged.saturating_sub(self.logged)) * PAGE;
        // It is unknown when in that time the pages were written. So they are paid for before any credit expires.
        let owed = self.owed.saturating_add(spent).saturating_sub(earned);
        self.owed = owed.max(-pays(CREDIT));
        self.logged = self.logged.max(logged);
        self.counted = self.counted.max(now);
        let nanoseconds = (self.owed.max(0) + rate - 1) / rate;
        Duration::from_nanos(nanoseconds.try_into().unwrap_or(u64::MAX))
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limit(pages_per_second: u64) -> NonZeroU64 {
        NonZeroU64::new(pages_per_second).unwrap()
    }

    const SECOND: Duration = Duration::from_secs(1);

    /// Simulates a vCPU that writes as fast as it can, for `seconds`, and sleeps off its debt, late each time. It is looked at after
    /// each `burst` pages. Returns how many pages it has dirtied.
    fn hungry(
        budget: &mut Budget,
        seconds: u64,
        burst: u64,
        mut late: impl FnMut() -> Duration,
    ) -> u64 {
        let (first, start) = (budget.logged, budget.counted);
        let (mut now, mut logged) = (start, first);
        while now < start + SECOND * seconds as u32 {
            logged += burst;
            let debt = budget.count(logged, now);
            if debt >= SHORTEST_STOP {
                now += debt + late();
            }
        }
        logged - first
    }

    #[test]
    fn what_was_logged_before_is_free() {
        let mut budget = Budget::new(limit(1000), 5_000, SECOND);
        assert_eq!(budget.count(5_000, SECOND), Duration::ZERO);
        assert_eq!(budget.count(5_100, SECOND), SECOND / 10);
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let mut budget = Budget::new(limit(1000), 0, Duration::ZERO);
        budget.count(0, 100 * SECOND);
        assert_eq!(budget.count(1250, 100 * SECOND), SECOND);
    }

    /// A guest below its limit owes nothing, however long ago the last look was.
    #[test]
    fn a_long_time_pays_for_all_that_was_written_in_it() {
        let mut budget = Budget::new(limit(1000), 0, Duration::ZERO);
        assert_eq!(budget.count(4_000, 5 * SECOND), Duration::ZERO);
        assert_eq!(budget.count(6_000, 6 * SECOND), SECOND * 75 / 100);
    }

    #[test]
    fn a_debt_is_so_many_pages_under_any_limit() {
        let mut budget = Budget::new(limit(1000), 0, Duration::ZERO);
        assert_eq!(budget.count(3000, Duration::ZERO), 3 * SECOND);
        budget.set_limit(limit(500));
        assert_eq!(budget.count(3000, SECOND), 5 * SECOND);
        budget.set_limit(limit(u64::MAX));
        assert_eq!(budget.count(3000, SECOND), Duration::from_nanos(1));
    }

    /// Clocks that go back, counts that shrink, numbers beyond all measure.
    #[test]
    fn nonsense_is_survived() {
        for rate in [1, 3, u64::MAX] {
            let mut budget = Budget::new(limit(rate), 7, SECOND);
            budget.count(u64::MAX, Duration::ZERO);
            budget.count(0, Duration::MAX);
            budget.set_limit(limit(1));
            budget.count(u64::MAX, Duration::MAX);
            budget.count(0, Duration::ZERO);
        }
    }

    proptest! {
        /// The promise: if sleeps end no later than the credit makes up for, the vCPU gets what it may have, and no more.
        #[test]
        fn the_mean_is_the_limit(
            rate in prop_oneof![1u64..100, 100u64..2_000_000],
            burst in 1u64..5_000,
            late in prop::collection::vec(0u64..250_000_000, 1..50),
        ) {
            let mut late = late.into_iter().cycle().map(Duration::from_nanos);
            // No more than some thousand looks a second.
            let burst = burst.max(rate / 2_000);
            let mut budget = Budget::new(limit(rate), 0, Duration::ZERO);
            // Long enough for some hundred stops.
            let seconds = 20 + 100 * burst / rate;
            let dirtied = hungry(&mut budget, seconds, burst, || late.next().unwrap());
            let allowed = rate * seconds;
            // The last burst, what the smallest debt and the largest credit are worth.
            let most = allowed + burst + rate * 255 / 1000 + 1;
            let least = allowed - (rate * 250 / 1000).min(allowed);
            prop_assert!((least..=most).contains(&dirtied), "{least} {dirtied} {most}");
        }

        /// Compared with an account that keeps every event and computes the debt from the beginning: there is never more credit than
        /// allowed, and only credit above that is forgiven.
        #[test]
        fn the_debt_is_that_of_the_whole_history(
            // Mostly such as a burst makes more of than the largest credit pays for.
            rate in prop_oneof![1u64..10_000, 1u64..1_000_000],
            events in prop::collection::vec((0u64..3_000, 0u64..1_000_000_000), 1..60),
        ) {
            let mut budget = Budget::new(limit(rate), 0, Duration::ZERO);
            let (mut logged, mut now) = (0, 0);
            let mut steps = Vec::new();
            for (pages, nanoseconds) in events {
                logged += pages;
                now += nanoseconds;
                let debt = budget.count(logged, Duration::from_nanos(now));
                steps.push(i128::from(pages) * PAGE - i128::from(nanoseconds * rate));
                // Either the credit was never full, or it was, after some step, for the last time.
                let credit = i128::from(250_000_000 * rate);
                let since = |step: usize| steps[step..].iter().sum::<i128>();
                let full = (1..=steps.len()).map(|step| since(step) - credit).max();
                let owed = since(0).max(full.unwrap()).max(0);
                let exact = (owed + i128::from(rate) - 1) / i128::from(rate);
                prop_assert_eq!(debt.as_nanos() as i128, exact);
            }
        }
    }
}
