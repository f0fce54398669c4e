// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is left open, and what is done after each sync: by what is known of the link and of the guest.

use std::time::Duration;

use kvm_dirty_ring::WorkingSet;
use kvm_dirty_ring::convergence::{Convergence, Decision, Extent, Observation, Terms};

use super::outcome::Limits;
use super::places::Places;
use super::tracker::Open;

/// A MiB's pages.
const PAGES_PER_MIB: f64 = 256.0;

/// Steers one migration.
#[derive(Debug)]
pub(super) struct Steering {
    convergence: Convergence,
    places: Places,
    terms: Terms,
    /// For how long the last refresh stopped the guest; zero before the first, which is made to measure it.
    pause: Duration,
}

impl Steering {
    /// By what is asked for. Nothing is known of the link but what it may take.
    pub(super) fn new(limits: &Limits) -> Self {
        let is_bounded = limits.bandwidth_mib > 0 && !limits.downtime.is_zero();
        Self {
            convergence: Convergence::new(),
            places: match limits.places {
                Places::Auto if !is_bounded => Places::Off,
                places => places,
            },
            terms: Terms::new(limits.bandwidth_mib as f64 * PAGES_PER_MIB, limits.downtime),
            pause: Duration::ZERO,
        }
    }

    /// The link has taken `time` for so many pages.
    pub(super) fn measured(&mut self, pages: u64, time: Duration) {
        self.terms.pages_per_second = pages as f64 / time.as_secs_f64();
    }

    /// A refresh has stopped the guest for so long.
    pub(super) fn refreshed(&mut self, pause: Duration) {
        self.pause = pause;
    }

    /// What may stay open, by all that is known by now.
    pub(super) fn working_set(&self) -> Option<WorkingSet> {
        let places = match self.places {
            Places::Off => return None,
            Places::Auto => self.terms.places(),
            Places::Pages(pages) => pages,
        };
        let terms = WorkingSet::new(places);
        Some(match self.pause <= self.terms.downtime {
            true => terms,
            // Nothing closes them any more: all of them are to fit.
            false => terms.at_most(self.terms.places()),
        })
    }

    /// The first sync is over, at which all is to be sent. That is done in any case: nothing else
    /// measures the link as well.
    pub(super) fn begin(&mut self, pages: u64) {
        let seen = Observation::new(self.terms, extent(pages), extent(0));
        let _ = self.convergence.decide(&seen);
    }

    /// The link broke: what is found next is more than it would be, and shows nothing of the guest.
    pub(super) fn begin_again(&mut self) {
        self.convergence = Convergence::new();
    }

    /// What to do after a sync, with so many pages to be sent next.
    pub(super) fn decide(&mut self, others: u64, open: &Open) -> Decision {
        let mut seen = Observation::new(self.terms, extent(others), extent(open.members));
        seen.refresh = open.refresh;
        seen.refresh.pause = Some(self.pause);
        self.convergence.decide(&seen)
    }
}

/// The simulated link takes so many pages a second however long their runs are, and [`Terms::run_cost`] stays zero: then the
/// number of runs changes nothing. A real link's messages cost something beside their pages, and are to be counted.
fn extent(pages: u64) -> Extent {
    Extent { pages, runs: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The link takes 2,560 pages within the downtime.
    const LIMITS: Limits = Limits {
        bandwidth_mib: 100,
        max_rounds: 5,
        downtime: Duration::from_millis(100),
        converge: false,
        places: Places::Auto,
        break_after: None,
    };

    fn places(limits: Limits) -> Option<WorkingSet> {
        Steering::new(&limits).working_set()
    }

    #[test]
    fn half_of_what_the_link_takes_stays_open() {
        assert_eq!(places(LIMITS), Some(WorkingSet::new(1280)));
        let no_downtime = Limits {
            downtime: Duration::ZERO,
            ..LIMITS
        };
        let no_bandwidth = Limits {
            bandwidth_mib: 0,
            ..LIMITS
        };
        let off = Limits {
            places: Places::Off,
            ..LIMITS
        };
        for limits in [no_downtime.clone(), no_bandwidth, off] {
            assert_eq!(places(limits), None);
        }
        let asked_for = Limits {
            places: Places::Pages(7),
            ..no_downtime
        };
        assert_eq!(places(asked_for), Some(WorkingSet::new(7)));
    }

    #[test]
    fn what_the_link_has_taken_corrects_it() {
        let mut steering = Steering::new(&LIMITS);
        steering.measured(1000, Duration::from_millis(250));
        assert_eq!(steering.working_set(), Some(WorkingSet::new(200)));
    }

    #[test]
    fn where_a_refresh_takes_too_long_all_that_is_open_is_to_fit() {
        let mut steering = Steering::new(&LIMITS);
        steering.refreshed(LIMITS.downtime);
        assert_eq!(steering.working_set(), Some(WorkingSet::new(1280)));
        steering.refreshed(LIMITS.downtime + Duration::from_nanos(1));
        let at_most = WorkingSet::new(1280).at_most(1280);
        assert_eq!(steering.working_set(), Some(at_most));
    }

    #[test]
    fn what_is_open_counts_and_is_closed_where_that_is_owed() {
        let mut steering = Steering::new(&LIMITS);
        steering.begin(10_000);
        let mut open = Open {
            members: 1280,
            ..Open::default()
        };
        assert_eq!(steering.decide(1280, &open), Decision::Finish);
        open.refresh.owed = true;
        assert_eq!(steering.decide(1281, &open), Decision::Refresh);
        assert_eq!(steering.decide(2561, &Open::default()), Decision::GoOn);
    }
}
