// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The pages of one slot that stay open: members of the writable working set.
//!
//! KVM does not log writes to an open page. So from its joining on every sync reports the page, until it was closed, that is,
//! protected by other means than an entry of a ring.

use crate::bitmap::pages::PageBits;
use crate::bitmap::shared::SharedBits;
use crate::sync::Counter;

/// Up to so many syncs after a refresh, a page that it has closed joins again as soon as it is written: until the sync that reports it,
/// which comes at once, and the round after that.
const FRESH_SYNCS: u64 = 2;

/// One bit per page for each state.
pub(crate) struct Members {
    /// Open now. A pass that leaves a page open sets its bit before the kernel can see the void entry.
    now: SharedBits,
    /// Being closed by a refresh: open until that has succeeded.
    leaving: SharedBits,
    /// Closed by the last refresh.
    closed: SharedBits,
    /// In bitmap mode: set at the last sync, and cleared by it or on demand since.
    cleared: SharedBits,
    /// How many of the [`FRESH_SYNCS`] are to come. Written under the lock on syncs. Passes read it without a lock, because it only decides
    /// whether a page joins now or at its next write.
    fresh_syncs: Counter,
}

impl Members {
    /// For a slot of `pages` pages; `None` if there is no memory for it.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        Some(Self {
            now: SharedBits::new(pages)?,
            leaving: SharedBits::new(pages)?,
            closed: SharedBits::new(pages)?,
            cleared: SharedBits::new(pages)?,
            fresh_syncs: Counter::default(),
        })
    }

    /// Returns whether `page`, which is in the slot, is a member at this moment.
    pub(crate) fn has(&self, page: u64) -> bool {
        self.now.contains(page)
    }

    /// Returns whether `page`, which is in the slot, was closed by a refresh just now. A write to it then counts as its second.
    pub(crate) fn was_closed(&self, page: u64) -> bool {
        self.is_fresh() && self.closed.contains(page)
    }

    fn is_fresh(&self) -> bool {
        self.fresh_syncs.get() > 0
    }

    /// Notes that a sync has reported the members.
    pub(crate) fn note_sync(&self) {
        let fresh_syncs = self.fresh_syncs.get();
        self.fresh_syncs.set(fresh_syncs.saturating_sub(1));
    }

    /// Makes `page`, which is in the slot, a member; returns whether it was none. A pass calls this before it marks any entry that
    /// it made void: a refresh may have ended an older membership since `has`.
    pub(crate) fn join(&self, page: u64) -> bool {
        self.now.insert(page)
    }

    /// Returns whether there may be members. It may miss pages that join or leave at this moment.
    pub(crate) fn any(&self) -> bool {
        self.now.any() || self.leaving.any()
    }

    /// Counts the members.
    pub(crate) fn count(&self) -> u64 {
        self.now.count() + self.leaving.count()
    }

    /// Returns how many pages the last refresh closed, and how many of these are open again.
    pub(crate) fn closed_and_back(&self) -> (u64, u64) {
        let (mut closed, mut back) = (0, 0);
        self.closed.for_each(|word, bits| {
            closed += u64::from(bits.count_ones());
            back += u64::from((bits & self.now.word(word)).count_ones());
        });
        (closed, back)
    }

    /// Adds all members to `into`.
    pub(crate) fn copy_into(&self, into: &mut PageBits) {
        self.now.copy_into(into);
        self.leaving.copy_into(into);
    }

    /// Adds the members that are not in `except`.
    pub(crate) fn copy_but(&self, except: &SharedBits, into: &mut PageBits) {
        for members in [&self.now, &self.leaving] {
            members.for_each(|word, bits| {
                let bits = bits & !except.word(word);
                if bits != 0 {
                    into.merge(word, bits);
                }
            });
        }
    }

    /// Begins a refresh, which closes all of them. Under the lock on syncs.
    pub(crate) fn begin_leaving(&self) {
        self.now.move_to(&self.leaving);
    }

    /// Ends a refresh that has closed them: they are protected, and `into` reports them once more. Under the lock on syncs.
    pub(crate) fn end_leaving(&self, into: &mut PageBits) {
        self.forget_closed();
        self.leaving.take(|word, bits| {
            self.closed.merge(word, bits);
            into.merge(word, bits);
        });
        self.fresh_syncs.set(FRESH_SYNCS);
    }

    /// Ends a refresh that failed, or may have: the members stay open.
    pub(crate) fn stay(&self) {
        self.leaving.move_to(&self.now);
    }

    /// Notes that the slot's pages were all closed, or are not logged any more; `into` reports those that were open.
    pub(crate) fn end_into(&self, into: &mut PageBits) {
        self.now.take_into(into);
        self.leaving.take_into(into);
        self.forget();
    }

    /// Notes that a refresh begins. Until it has closed something, what the last one has closed counts.
    pub(crate) fn refresh_begins(&self) {
        self.fresh_syncs.set(0);
    }

    /// Notes that a refresh has succeeded, of this slot or of others only.
    pub(crate) fn refresh_ends(&self) {
        if !self.is_fresh() {
            self.forget_closed();
        }
    }

    fn forget_closed(&self) {
        self.closed.take(|_, _| ());
        self.fresh_syncs.set(0);
    }

    /// Forgets all but the members, as the slot's log was switched.
    pub(crate) fn forget(&self) {
        self.forget_closed();
        self.forget_cleared();
    }

    /// Removes pages that stay open from `words`, the bits of a slot's bitmap: members, and pages that were cleared by the last
    /// sync, or by a refresh just now, and are set again, which join while `may_join` allows. The bits that are left are to be cleared,
    /// and [noted](Self::note_cleared) then; what was cleared before is forgotten.
    pub(crate) fn keep(&self, words: &mut [u64], mut may_join: impl FnMut(u64) -> bool) {
        let is_fresh = self.is_fresh();
        let again = |at: usize, word: u64| {
            let closed = if is_fresh { self.closed.word(at) } else { 0 };
            word & (self.cleared.word(at) | closed)
        };
        for (at, word) in words.iter_mut().enumerate().filter(|(_, word)| **word != 0) {
            let mut open = *word & self.now.word(at);
            let joining = again(at, *word) & !open;
            if joining != 0 && may_join(u64::from(joining.count_ones())) {
                self.now.merge(at, joining);
                open |= joining;
            }
            *word &= !open;
        }
        self.forget_cleared();
    }

    /// Notes that these of the kernel's bits were cleared.
    pub(crate) fn note_cleared(&self, words: &[u64]) {
        for (at, &word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
            self.cleared.merge(at, word);
        }
    }

    /// Forgets which bits the last sync has cleared, as another one takes all of them.
    pub(crate) fn forget_cleared(&self) {
        self.cleared.take(|_, _| ());
    }

    /// Adds the bits of all members to `words`.
    pub(crate) fn copy_to_words(&self, words: &mut [u64]) {
        for members in [&self.now, &self.leaving] {
            members.for_each(|at, bits| words[at] |= bits);
        }
    }
}
