// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The decision after each sync.

use core::num::NonZeroU64;

use super::{Decision, Extent, Observation, Terms};

/// More than this share of an earlier value is hardly less.
const HARDLY_LESS: f64 = 0.95;

/// At most this share of the value two syncs ago falls fast enough to wait for.
const FEWER: f64 = 0.7;

/// Refreshes in a row that may be in vain. A guest whose hot pages move may need more than one. A guest that needs more than
/// these writes faster than they help.
const MOST_IN_VAIN: u32 = 3;

/// Syncs to wait for one more. Each further one waits for twice as many.
const FIRST_WAIT: u32 = 8;

/// The share of the link's rate at which the guest may dirty pages. Each round is then half of the one before.
const WOULD_DO: f64 = 0.5;

/// Decides after each sync of a migration, by the rules of the [module](crate::convergence).
///
/// Use one for each migration, and pass it every sync in order: also the first, at which all pages are dirty, and those right
/// after a refresh. Make a new one after memory was plugged in.
#[derive(Debug, Clone, Default)]
pub struct Convergence {
    /// The last sync and the one before.
    last: Option<Found>,
    before: Option<Found>,
    /// Syncs since the last decision to refresh, counting the one right after it.
    since: Option<u32>,
    vain: Vain,
}

impl Convergence {
    /// Creates it for the start of a migration.
    pub fn new() -> Self {
        Self::default()
    }

    /// Decides what to do after the sync that has found this.
    pub fn decide(&mut self, seen: &Observation) -> Decision {
        let when = When::of(self.since);
        let decision = self.rules(seen, when);
        self.before = self.last;
        self.last = Some(Found {
            others: seen.others,
            members: seen.members,
        });
        self.since = self.since.map(|syncs| syncs.saturating_add(1));
        if decision == Decision::Refresh {
            self.since = Some(0);
            self.vain.note(seen);
        }
        decision
    }

    fn rules(&self, seen: &Observation, when: When) -> Decision {
        let terms = &seen.terms;
        let takes = terms.budget();
        let left = seen.left();
        let hopeless = || Decision::Hopeless {
            pages_per_second: would_do(terms, left),
        };
        if terms.weight(left) <= takes {
            return Decision::Finish;
        }
        // Of hot pages that have moved meanwhile about half are back.
        let [closed, back] = [seen.refresh.closed, seen.refresh.back].map(u128::from);
        let most_are_back = closed > 0
            && 3 * back > 2 * closed
            && terms.weight_of_part(seen.refresh.back, seen.members) > takes;
        // Another refresh would close them again, with no gain.
        let wanted = seen.refresh.owed || self.would_help(seen) && !most_are_back;
        if self.is_to_be_had(seen) && when != When::JustHad && wanted {
            return Decision::Refresh;
        }
        if most_are_back {
            return hopeless();
        }
        if when == When::Later && self.stands_still(seen) {
            return hopeless();
        }
        Decision::GoOn
    }

    /// Whether two rounds have made no progress, neither towards the end nor towards a refresh.
    fn stands_still(&self, seen: &Observation) -> bool {
        let Some(before) = self.before else {
            return false;
        };
        let terms = &seen.terms;
        let [others, others_before] = [seen.others, before.others].map(|of| terms.weight(of));
        let draws_near =
            self.is_to_be_had(seen) && others > terms.budget() && others <= FEWER * others_before;
        hardly_less(terms, seen.left(), Some(before.left())) && !draws_near
    }

    fn is_to_be_had(&self, seen: &Observation) -> bool {
        let pause = seen.refresh.pause;
        pause.is_some_and(|pause| pause <= seen.terms.downtime)
            && seen.members.pages > 0
            && self.vain.allows(seen, self.since)
    }

    fn would_help(&self, seen: &Observation) -> bool {
        let terms = &seen.terms;
        let fits = |extent| terms.weight(extent) <= terms.budget();
        fits(seen.others)
            && (!fits(seen.members) || hardly_less(terms, seen.left(), self.last.map(Found::left)))
    }
}

/// The result of a sync.
#[derive(Debug, Clone, Copy)]
struct Found {
    others: Extent,
    members: Extent,
}

impl Found {
    fn left(self) -> Extent {
        self.others.and(self.members)
    }
}

/// The place of a sync after the last refresh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// Right after it, or after the first round, which has sent what it had closed.
    JustHad,
    /// After the first round that is like any other.
    Second,
    /// After a later round, or where there was no refresh.
    Later,
}

impl When {
    fn of(syncs: Option<u32>) -> Self {
        match syncs {
            Some(0 | 1) => Self::JustHad,
            Some(2) => Self::Second,
            _ => Self::Later,
        }
    }
}

/// Refreshes without progress. Without a limit on these, a guest that writes as fast as ever would be stopped for them again and
/// again. For a guest that has fallen silent since, they become rarer and do not end. Only pages count as progress, whatever the
/// terms, and these can become fewer only so often.
#[derive(Debug, Clone, Default)]
struct Vain {
    /// Pages left at the last refresh with progress, or at the first.
    least: Option<u64>,
    /// Refreshes since, that one included.
    count: u32,
    /// Whether the last one was owed.
    owed: bool,
}

impl Vain {
    /// Whether there may be another refresh, at this sync after the last.
    fn allows(&self, seen: &Observation, since: Option<u32>) -> bool {
        // A guest that was throttled since the last refresh may behave differently. If that one was owed itself, nothing has
        // changed.
        let is_owed_anew = seen.refresh.owed && !self.owed;
        let Some(more) = self.count.checked_sub(MOST_IN_VAIN) else {
            return true;
        };
        let wait = FIRST_WAIT.saturating_mul(2_u32.saturating_pow(more));
        is_owed_anew || !self.is_vain(seen.left().pages) || since.is_some_and(|syncs| syncs >= wait)
    }

    fn note(&mut self, seen: &Observation) {
        let pages = seen.left().pages;
        self.owed = seen.refresh.owed;
        match self.is_vain(pages) {
            true => self.count = self.count.saturating_add(1),
            false => (self.least, self.count) = (Some(pages), 1),
        }
    }

    fn is_vain(&self, pages: u64) -> bool {
        let is_more = |least: u64| pages as f64 > HARDLY_LESS * least as f64;
        self.least.is_some_and(is_more)
    }
}

/// Whether `now` is hardly less than `then`; false if there was nothing before. Both are weighed by the terms of now. Otherwise a
/// link that has become slower would look like a guest that has become faster.
fn hardly_less(terms: &Terms, now: Extent, then: Option<Extent>) -> bool {
    then.is_some_and(|then| terms.weight(now) > HARDLY_LESS * terms.weight(then))
}

fn would_do(terms: &Terms, left: Extent) -> NonZeroU64 {
    let pages = terms.pace(left) * WOULD_DO;
    NonZeroU64::new(pages as u64).unwrap_or(NonZeroU64::MIN)
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests;
