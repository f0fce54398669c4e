//! The pages of one slot that stay open: members of the writable working set.
//!
//! KVM does not log what is written to an open page, so from its joining on every sync reports it, until it was closed:
//! protected by other means than an entry of a ring.

use crate::bitmap::pages::PageBits;
use crate::bitmap::shared::SharedBits;

/// A bit a page for each thing that is known of it.
pub(crate) struct Members {
    /// Open now. Whoever leaves a page open sets its bit before the kernel learns of it.
    now: SharedBits,
    /// Being closed by a refresh: open until that has succeeded.
    leaving: SharedBits,
    /// Closed by the last refresh.
    closed: SharedBits,
    /// In bitmap mode: set at the last sync, and cleared by it.
    cleared: SharedBits,
}

impl Members {
    /// For a slot of `pages` pages; `None` if there is no memory for it.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        Some(Self {
            now: SharedBits::new(pages)?,
            leaving: SharedBits::new(pages)?,
            closed: SharedBits::new(pages)?,
            cleared: SharedBits::new(pages)?,
        })
    }

    /// Whether `page`, which is in the slot, stays open as far as anybody knows.
    pub(crate) fn has(&self, page: u64) -> bool {
        self.now.contains(page)
    }

    /// Lets `page`, which is in the slot, stay open. Whether it did not. Always called before an entry that is made void is
    /// marked: a refresh may have ended an older membership since `has`.
    pub(crate) fn join(&self, page: u64) -> bool {
        self.now.insert(page)
    }

    /// Whether there may be any: of pages that are on their way in and out, some may be missed.
    pub(crate) fn any(&self) -> bool {
        self.now.any() || self.leaving.any()
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        self.now.count() + self.leaving.count()
    }

    /// How many pages the last refresh closed, and how many of these are open again.
    pub(crate) fn closed_and_back(&self) -> (u64, u64) {
        let (mut closed, mut back) = (0, 0);
        self.closed.for_each(|word, bits| {
            closed += u64::from(bits.count_ones());
            back += u64::from((bits & self.now.word(word)).count_ones());
        });
        (closed, back)
    }

    /// Adds all of them to `into`.
    pub(crate) fn copy_into(&self, into: &mut PageBits) {
        self.now.copy_into(into);
        self.leaving.copy_into(into);
    }

    /// Adds those that are not in `except`.
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

    /// A refresh begins to close all of them. Under the lock on syncs.
    pub(crate) fn begin_leaving(&self) {
        self.now.move_to(&self.leaving);
        self.forget_closed();
    }

    /// It has closed them: they are protected, and `into` reports them once more. Under the lock on syncs.
    pub(crate) fn end_leaving(&self, into: &mut PageBits) {
        self.leaving.take(|word, bits| {
            self.closed.merge(word, bits);
            into.merge(word, bits);
        });
    }

    /// It has failed, or may have: the members stay open.
    pub(crate) fn stay(&self) {
        self.leaving.move_to(&self.now);
    }

    /// The slot's pages were all closed, or are not logged any more: `into` reports those that were open.
    pub(crate) fn end_into(&self, into: &mut PageBits) {
        self.now.take_into(into);
        self.leaving.take_into(into);
        self.forget();
    }

    /// Another refresh begins.
    pub(crate) fn forget_closed(&self) {
        self.closed.take(|_, _| ());
    }

    /// What is known beside who is one now goes: the slot's log was switched.
    pub(crate) fn forget(&self) {
        self.forget_closed();
        self.cleared.take(|_, _| ());
    }

    /// Of the bits of a slot's bitmap, in `words`, those of pages that stay open: members, and those that were cleared by the
    /// last sync and are set again, which join as long as `may_join` lets them. They are taken out of `words`: the others are
    /// to be cleared, and are remembered.
    pub(crate) fn keep(&self, words: &mut [u64], mut may_join: impl FnMut(u64) -> bool) {
        let again = |at: usize, word: u64| word & self.cleared.word(at);
        for (at, word) in words.iter_mut().enumerate().filter(|(_, word)| **word != 0) {
            let mut open = *word & self.now.word(at);
            let joining = again(at, *word) & !open;
            if joining != 0 && may_join(u64::from(joining.count_ones())) {
                self.now.merge(at, joining);
                open |= joining;
            }
            *word &= !open;
        }
        self.cleared.take(|_, _| ());
        for (at, &word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
            self.cleared.merge(at, word);
        }
    }

    /// Adds the bits of all of them to `words`.
    pub(crate) fn copy_to_words(&self, words: &mut [u64]) {
        for members in [&self.now, &self.leaving] {
            members.for_each(|at, bits| words[at] |= bits);
        }
    }
}
