// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The terms of the last round, and what fits into it.

use core::time::Duration;

/// A rate that no link reaches, in pages a second. Faster links count as this one, so that all sums are finite.
const FASTEST: f64 = 1e15;

const NANOS_PER_SECOND: f64 = 1e9;

/// An amount of dirty memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extent {
    /// The number of pages.
    pub pages: u64,
    /// The number of runs, if a run has a cost of its own; otherwise any number.
    pub runs: u64,
}

impl Extent {
    /// Both together.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            pages: self.pages.saturating_add(other.pages),
            runs: self.runs.saturating_add(other.runs),
        }
    }
}

/// The rate of the link, and the time for which the guest may be stopped for the last round.
///
/// A rate that is not a number, or below zero, counts as zero. Then only an empty round fits.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Terms {
    /// Pages that the link sends in a second.
    pub pages_per_second: f64,
    /// The cost of a run beside its pages; zero by default. [`learn_run_cost`](Self::learn_run_cost) sets it.
    pub run_cost: Duration,
    /// How long the guest may be stopped. First subtract what else the last round costs: stopping the vCPUs, the sync, and sending
    /// their state.
    pub downtime: Duration,
}

impl Terms {
    /// Creates terms under which runs cost nothing.
    pub const fn new(pages_per_second: f64, downtime: Duration) -> Self {
        Self {
            pages_per_second,
            run_cost: Duration::ZERO,
            downtime,
        }
    }

    /// Sets [`run_cost`](Self::run_cost) from a round that was sent: what the round took longer than its pages take at
    /// [`pages_per_second`](Self::pages_per_second), divided by its runs. Take that rate from a round of long runs, such as
    /// the first one. Count as a run whatever has a cost of its own, such as a message. `took` ends when the last of it has
    /// arrived, not when a buffer has it.
    ///
    /// Many short runs overshoot the downtime otherwise. A link of 10,000 pages a second and 200 µs a message sends 400 pages
    /// in 40 ms as two messages, and in 120 ms as 400.
    ///
    /// A round without runs changes nothing. A round that was faster than the rate sets the cost to zero.
    ///
    /// ```
    /// use std::time::Duration;
    /// use kvm_dirty_ring::convergence::{Extent, Terms};
    ///
    /// // Round 0, of long runs, has shown 10,000 pages a second.
    /// let mut terms = Terms::new(10_000.0, Duration::from_millis(100));
    /// // Round 1 sent 1,000 pages in 500 messages. They arrived after 200 ms, and the pages alone take 100 ms.
    /// terms.learn_run_cost(Extent { pages: 1000, runs: 500 }, Duration::from_millis(200));
    /// assert_eq!(terms.run_cost, Duration::from_micros(200)); // a message
    /// ```
    pub fn learn_run_cost(&mut self, sent: Extent, took: Duration) {
        if sent.runs == 0 {
            return;
        }
        let nanos = sent.pages as f64 / self.rate() * NANOS_PER_SECOND;
        let more = (took.as_nanos() as f64 - nanos) / sent.runs as f64;
        // The cast saturates. It makes 0 of what is no number, as without a rate and without pages.
        self.run_cost = Duration::from_nanos(more as u64);
    }

    /// Returns the pages that the link takes within the downtime, without their runs: the most that may be left at the end.
    pub fn takes(&self) -> u64 {
        self.budget() as u64
    }

    /// Returns how many pages to leave open whatever they are: half of what the link [takes](Self::takes) within the downtime.
    ///
    /// The other half is for pages that are written again, and for the last round's others. If no refresh can be had, use it as the
    /// most members in all, too: members would never become fewer, and if they took the whole downtime nothing else would fit.
    pub fn places(&self) -> u64 {
        self.takes() / 2
    }

    /// What the link takes within the downtime, in pages and parts of a page.
    pub(super) fn budget(&self) -> f64 {
        self.sent_in(self.downtime)
    }

    /// The cost of sending memory, in pages that would take as long.
    pub(super) fn weight(&self, of: Extent) -> f64 {
        of.pages as f64 + of.runs as f64 * self.sent_in(self.run_cost)
    }

    /// The cost of so many pages of that memory, if its runs lie among them evenly.
    pub(super) fn weight_of_part(&self, pages: u64, of: Extent) -> f64 {
        pages as f64 * self.weight(of) / of.pages.max(1) as f64
    }

    /// Pages of that memory that the link sends in a second.
    pub(super) fn pace(&self, of: Extent) -> f64 {
        let weight = self.weight(of);
        match weight > 0.0 {
            true => self.rate() * of.pages as f64 / weight,
            false => self.rate(),
        }
    }

    fn rate(&self) -> f64 {
        match self.pages_per_second.is_nan() {
            true => 0.0,
            false => self.pages_per_second.clamp(0.0, FASTEST),
        }
    }

    /// In whole nanoseconds, so that round numbers stay round.
    fn sent_in(&self, time: Duration) -> f64 {
        self.rate() * time.as_nanos() as f64 / NANOS_PER_SECOND
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::*;

    fn terms(pages_per_second: f64, run_us: u64, downtime: Duration) -> Terms {
        Terms {
            run_cost: Duration::from_micros(run_us),
            ..Terms::new(pages_per_second, downtime)
        }
    }

    #[test]
    fn half_of_what_the_downtime_takes_are_places() {
        for (rate, ms, takes, places) in [
            (128_000.0, 300, 38_400, 19_200),
            (16_000.0, 10, 160, 80),
            (1_000.0, 7, 7, 3),
            (1_000.0, 0, 0, 0),
            (0.9, 1000, 0, 0),
        ] {
            let terms = Terms::new(rate, Duration::from_millis(ms));
            assert_eq!((terms.takes(), terms.places()), (takes, places));
        }
    }

    #[test]
    fn runs_cost_what_the_link_sends_meanwhile() {
        // 100 us are 10 pages.
        let terms = terms(100_000.0, 100, Duration::from_millis(10));
        let extent = Extent { pages: 60, runs: 4 };
        assert_eq!(terms.weight(extent), 100.0);
        assert_eq!(terms.weight_of_part(30, extent), 50.0);
        assert_eq!(terms.pace(extent), 60_000.0);
        assert_eq!(terms.pace(Extent::default()), 100_000.0);
        assert_eq!(terms.takes(), 1000);
    }

    #[test]
    fn what_a_run_costs_is_learnt_from_a_round() {
        let mut terms = terms(10_000.0, 7, Duration::from_millis(50));
        let mut learn = |pages, runs, ms| {
            terms.learn_run_cost(Extent { pages, runs }, Duration::from_millis(ms));
            terms.run_cost.as_micros()
        };
        assert_eq!(learn(400, 400, 120), 200);
        assert_eq!(learn(400, 0, 500), 200, "no run, nothing learnt");
        assert_eq!(learn(400, 2, 40), 0);
        assert_eq!(learn(400, 10, 20), 0, "faster than the rate");
    }

    #[test]
    fn no_round_teaches_nonsense() {
        let sent = Extent { pages: 9, runs: 3 };
        for rate in [f64::NAN, f64::INFINITY, -1.0, 0.0, f64::MIN_POSITIVE] {
            let mut terms = Terms::new(rate, Duration::from_secs(1));
            terms.learn_run_cost(sent, Duration::from_secs(3));
            assert!(terms.run_cost <= Duration::from_secs(1), "{terms:?}");
            terms.learn_run_cost(sent, Duration::MAX);
            assert!(terms.weight(sent).is_finite(), "{terms:?}");
        }
    }

    #[test]
    fn numbers_without_sense_are_finite() {
        let rates = [
            f64::NAN,
            f64::INFINITY,
            f64::NEG_INFINITY,
            -1.0,
            0.0,
            1e-300,
            f64::MAX,
        ];
        let most = Extent {
            pages: u64::MAX,
            runs: u64::MAX,
        };
        for rate in rates {
            for time in [Duration::ZERO, Duration::MAX] {
                let terms = Terms {
                    run_cost: time,
                    ..Terms::new(rate, time)
                };
                for extent in [Extent::default(), most, most.and(most)] {
                    assert!(terms.weight(extent).is_finite(), "{terms:?}");
                    assert!(terms.weight_of_part(u64::MAX, extent).is_finite());
                    assert!(terms.pace(extent).is_finite(), "{terms:?}");
                }
                assert!(terms.budget().is_finite() && terms.budget() >= 0.0);
                let _ = (terms.takes(), terms.places());
            }
        }
        for rate in [f64::NAN, -1.0, f64::NEG_INFINITY] {
            assert_eq!(Terms::new(rate, Duration::MAX).takes(), 0);
        }
    }
}
