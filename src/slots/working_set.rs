// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How much of what the guest writes may stay open, and the counts of it.

use crate::sync::Counter;

/// How many of the pages that the guest writes may stay open; see
/// [`DirtyLog::set_working_set`](crate::DirtyLog::set_working_set).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkingSet {
    /// Free places, in pages. While there are fewer members, a harvested page stays open. Half of what the link takes within the
    /// downtime is a good number. Bitmap mode has no places, because a page costs one fault a round there in any case.
    pub places: u64,
    /// The most members in all, in pages. Set it in a VMM that cannot [refresh](crate::DirtyLog::refresh), and so has to send all
    /// members within its downtime.
    pub most: u64,
}

impl WorkingSet {
    /// Allows `places` free places, in pages, and any number of pages that are written again.
    pub fn new(places: u64) -> Self {
        let most = u64::MAX;
        Self { places, most }
    }

    /// Limits the members in all to `most` pages, free places included.
    #[must_use]
    pub fn at_most(self, most: u64) -> Self {
        Self { most, ..self }
    }
}

const NEVER: u64 = 0;
const ON: u64 = 1;
const OFF: u64 = 2;

/// So many passes in a row switch the set off, if most of their entries name members, and these entries are more than twice as many as
/// the members: the kernel ignores void entries.
const VAIN_PASSES: u64 = 8;

/// The fewest entries that count as a pass for that. Shorter passes count together.
const TELLING_ENTRIES: u64 = 64;

/// The terms in force, and the counts. Only the guest's speed and the pages sent at the end depend on these numbers, so
/// any page may join, or not join, at any time.
#[derive(Default)]
pub(crate) struct Terms {
    /// Never on, on, or off again. If a sync finds it never on, no pass before it has found it on: both read one counter, and
    /// the shard's lock is between them.
    state: Counter,
    places: Counter,
    most: Counter,
    /// Whether a dirty limit is set: a vCPU must then pay for what it writes.
    limited: Counter,
    /// Whether the kernel ignores void entries.
    useless: Counter,
    vain_passes: Counter,
    /// Entries of members in these passes.
    vain_entries: Counter,
    /// Entries of passes that were too short to be judged one by one, and those among them that named members.
    short_entries: Counter,
    short_named: Counter,
    /// About how many members there are; each sync counts them.
    members: Counter,
    pub(crate) joined: Counter,
    pub(crate) refreshes: Counter,
    pub(crate) closed: Counter,
    pub(crate) refresh_ns: Counter,
}

impl Terms {
    /// Changes the terms. With `None` no page joins.
    pub(crate) fn set(&self, terms: Option<WorkingSet>) {
        let WorkingSet { places, most } = terms.unwrap_or(WorkingSet::new(0).at_most(0));
        self.places.set(places);
        self.most.set(most);
        match terms {
            Some(_) => self.state.set(ON),
            None if self.was_ever_on() => self.state.set(OFF),
            None => {}
        }
    }

    /// Returns whether there may be members, or may have been.
    #[inline]
    pub(crate) fn was_ever_on(&self) -> bool {
        self.state.get() != NEVER
    }

    /// Notes whether some vCPU has a dirty limit.
    pub(crate) fn set_limited(&self, limited: bool) {
        self.limited.set(limited.into());
    }

    /// Returns whether pages may join at all.
    #[inline]
    pub(crate) fn may_join(&self) -> bool {
        self.state.get() == ON && self.limited.get() == 0 && self.useless.get() == 0
    }

    /// Returns whether there is a free place, for a page that was not written before in this round.
    pub(crate) fn has_place(&self) -> bool {
        // A limit may have been set since the pass began.
        self.may_join() && self.members.get() < self.places.get().min(self.most.get())
    }

    /// Returns whether `pages` more may join.
    pub(crate) fn has_room(&self, pages: u64) -> bool {
        self.may_join() && self.members.get().saturating_add(pages) <= self.most.get()
    }

    /// Returns whether `pages` more join, and counts them.
    pub(crate) fn lets_join(&self, pages: u64) -> bool {
        let fits = self.has_room(pages);
        if fits {
            self.note_joined(pages);
        }
        fits
    }

    /// Counts pages that have joined.
    pub(crate) fn note_joined(&self, pages: u64) {
        self.members.add(pages);
        self.joined.add(pages);
    }

    /// Notes how many members a sync has counted.
    pub(crate) fn note_members(&self, members: u64) {
        self.members.set(members);
    }

    /// Judges the kernel by a pass of `entries` entries, of which `named` named members.
    ///
    /// Passes at the same time may take one another's numbers for their own, and so come to a verdict sooner or later.
    pub(crate) fn judge(&self, entries: u64, named: u64) {
        let (entries, named) = (
            entries + self.short_entries.get(),
            named + self.short_named.get(),
        );
        let is_telling = entries >= TELLING_ENTRIES;
        self.short_entries.set(if is_telling { 0 } else { entries });
        self.short_named.set(if is_telling { 0 } else { named });
        if !is_telling {
            return;
        }
        if named * 2 <= entries {
            self.vain_passes.set(0);
            self.vain_entries.set(0);
            return;
        }
        self.vain_passes.add(1);
        self.vain_entries.add(named);
        // Where KVM has dropped its mappings, as it does of all slots when one goes, each member is logged once more.
        let is_again_and_again = self.vain_entries.get() > 2 * self.members.get();
        if self.vain_passes.get() >= VAIN_PASSES && is_again_and_again {
            self.useless.set(1);
        }
    }

    /// Notes a refresh: it took `ns` nanoseconds and closed `closed` pages, all of them if it is `whole`.
    pub(crate) fn note_refresh(&self, closed: u64, ns: u64, whole: bool) {
        self.members.set(self.members.get().saturating_sub(closed));
        self.closed.add(closed);
        if whole {
            self.refreshes.add(1);
            self.refresh_ns.set(ns);
        }
    }

    /// Returns whether a refresh is due, where it would close `members` members.
    pub(crate) fn is_owed(&self, members: u64) -> bool {
        members > 0 && !self.may_join()
    }

    pub(crate) fn is_useless(&self) -> bool {
        self.useless.get() != 0
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::*;

    #[test]
    fn places_and_the_most_bound_what_joins() {
        let terms = Terms::default();
        assert!(!terms.may_join() && !terms.has_place() && !terms.has_room(0));
        terms.set(Some(WorkingSet::new(10).at_most(20)));
        assert!(terms.may_join() && terms.has_place() && terms.has_room(20));
        assert!(!terms.has_room(21));
        terms.note_joined(10);
        assert!(!terms.has_place() && terms.has_room(10) && !terms.has_room(11));
        terms.set(Some(WorkingSet::new(30).at_most(10)));
        assert!(!terms.has_place(), "the places are among the most");
        terms.note_members(3);
        assert!(terms.has_place());
    }

    #[test]
    fn a_refresh_is_owed_where_members_are_left_and_nothing_joins() {
        let terms = Terms::default();
        terms.set(Some(WorkingSet::new(10)));
        assert!(!terms.is_owed(1), "they may join again");
        terms.set_limited(true);
        assert!(terms.is_owed(1) && !terms.is_owed(0));
        assert!(!terms.has_place(), "a limit was set");
        terms.set_limited(false);
        assert!(!terms.is_owed(1) && terms.has_place());
        terms.set(None);
        assert!(terms.is_owed(1) && !terms.is_owed(0));
    }

    #[test]
    fn passes_in_vain_switch_it_off() {
        let terms = Terms::default();
        terms.set(Some(WorkingSet::new(1000)));
        terms.note_joined(100);
        for _ in 0..3 {
            for _ in 1..VAIN_PASSES {
                terms.judge(100, 51);
            }
            assert!(terms.may_join());
            terms.judge(100, 50);
        }
        for _ in 0..VAIN_PASSES {
            terms.judge(100, 51);
        }
        assert!(!terms.may_join() && terms.is_useless());
        terms.set(Some(WorkingSet::new(1000)));
        assert!(!terms.may_join(), "for good");

        let terms = Terms::default();
        terms.set(Some(WorkingSet::new(1000)));
        terms.note_joined(500);
        for _ in 0..10 {
            terms.judge(100, 100);
        }
        assert!(terms.may_join(), "each may have been logged twice");
        terms.judge(100, 1);
        for _ in 0..10 {
            terms.judge(100, 100);
        }
        assert!(terms.may_join(), "not in a row");
        terms.judge(100, 100);
        assert!(!terms.may_join());
    }

    #[test]
    fn short_passes_count_together() {
        let terms = Terms::default();
        terms.set(Some(WorkingSet::new(1000)));
        terms.note_joined(10);
        for _ in 0..2 {
            for _ in 1..VAIN_PASSES {
                terms.judge(100, 100);
            }
            // Two of these are one of 64 entries, few of which name members.
            terms.judge(TELLING_ENTRIES / 2, 0);
            terms.judge(TELLING_ENTRIES / 2, 1);
        }
        assert!(terms.may_join());
        for _ in 1..2 * VAIN_PASSES {
            terms.judge(TELLING_ENTRIES / 2, TELLING_ENTRIES / 2);
        }
        assert!(terms.may_join());
        terms.judge(TELLING_ENTRIES / 2, TELLING_ENTRIES / 2);
        assert!(!terms.may_join());
    }
}
