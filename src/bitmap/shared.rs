// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bits that any thread may set at any time: the writes of devices, and the pages under suspicion.

use super::pages::PageBits;
use super::words::{BLOCK_WORDS, block_words, blocks_for, masks, ones, words_for};
use crate::sync::{AtomicU64, Ordering, zeroed};

/// One slot's bits as shared atomics.
pub(crate) struct SharedBits {
    words: Box<[AtomicU64]>,
    /// One bit per block of words: set if any bit of the block may be.
    touched: Box<[AtomicU64]>,
}

impl SharedBits {
    /// For a slot of `pages` pages; `None` if there is no memory for it.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        let words = words_for(pages);
        Some(Self {
            words: zeroed(words)?,
            touched: zeroed(blocks_for(words).div_ceil(64))?,
        })
    }

    /// Sets the bits of `first .. first + pages`, which the caller has found to be in the slot.
    pub(crate) fn set(&self, first: u64, pages: u64) {
        for (word, mask) in masks(first, pages) {
            self.merge(word, mask);
        }
    }

    /// Adds `bits` to `word`. Returns which of them were set before.
    pub(crate) fn merge(&self, word: usize, bits: u64) -> u64 {
        // Release: pairs with the acquire swap in `take_into`. What the caller wrote to the pages before is visible to a thread that
        // takes the bits and then copies the pages.
        let before = self.words[word].fetch_or(bits, Ordering::Release);
        // Release: pairs with the acquire swap of the flag in `take_into`: a thread that takes the flag sees the bits. A
        // read-modify-write, not a store, so that the flags of several writers form one release sequence and the taker sees the
        // bits of all of them.
        let block = word / BLOCK_WORDS;
        self.touched[block / 64].fetch_or(1 << (block % 64), Ordering::Release);
        before & bits
    }

    /// Sets the bit of `page`, which is in the slot. Returns whether it was not set.
    pub(crate) fn insert(&self, page: u64) -> bool {
        self.merge((page / 64) as usize, 1 << (page % 64)) == 0
    }

    /// Returns whether the bit of `page`, which is in the slot, is set at this moment.
    pub(crate) fn contains(&self, page: u64) -> bool {
        // Relaxed: pairs with nothing. It is true of a moment, and no decision here depends on it.
        let word = self.words[(page / 64) as usize].load(Ordering::Relaxed);
        word >> (page % 64) & 1 == 1
    }

    /// Moves all bits into `into` and leaves none. Bits set meanwhile are moved now or next time.
    pub(crate) fn take_into(&self, into: &mut PageBits) {
        self.take(|word, bits| into.merge(word, bits));
    }

    /// The same, into bits of the same kind, while other threads may set some.
    pub(crate) fn move_to(&self, to: &Self) {
        self.take(|word, bits| _ = to.merge(word, bits));
    }

    /// Takes all bits, and passes those of each word to `each`.
    pub(crate) fn take(&self, mut each: impl FnMut(usize, u64)) {
        for (group, touched) in self.touched.iter().enumerate() {
            // Relaxed: a flag that is not visible yet is taken next time. A flag that the caller has to see was set before
            // (happens-before) its call.
            if touched.load(Ordering::Relaxed) == 0 {
                continue;
            }
            // Acquire: pairs with the release in `merge`. The flags are taken before the bits, so that a bit set after its word was taken
            // leaves the flag set.
            let flags = touched.swap(0, Ordering::Acquire);
            self.for_each_word(group, flags, |at, word| {
                // Relaxed: a bit that this misses comes with a flag that is still to be taken.
                if word.load(Ordering::Relaxed) != 0 {
                    // Acquire: pairs with the release in `merge`.
                    each(at, word.swap(0, Ordering::Acquire));
                }
            });
        }
    }

    /// Adds all bits to `into` and leaves them set.
    pub(crate) fn copy_into(&self, into: &mut PageBits) {
        self.for_each(|word, bits| into.merge(word, bits));
    }

    /// Passes each word that has bits to `each`, and leaves them set.
    pub(crate) fn for_each(&self, mut each: impl FnMut(usize, u64)) {
        for (group, touched) in self.touched.iter().enumerate() {
            // Acquire: pairs with the release in `merge`: a thread that sees the flag sees the bits.
            let flags = touched.load(Ordering::Acquire);
            self.for_each_word(group, flags, |at, word| {
                // Acquire: pairs with the release in `merge`.
                let bits = word.load(Ordering::Acquire);
                if bits != 0 {
                    each(at, bits);
                }
            });
        }
    }

    /// Returns whether any may be set.
    pub(crate) fn any(&self) -> bool {
        // Acquire: pairs with the release in `merge`.
        let touched = |touched: &AtomicU64| touched.load(Ordering::Acquire) != 0;
        self.touched.iter().any(touched)
    }

    /// Counts the bits that are set.
    pub(crate) fn count(&self) -> u64 {
        let mut count = 0;
        self.for_each(|_, bits| count += u64::from(bits.count_ones()));
        count
    }

    /// Returns the bits of `word`.
    pub(crate) fn word(&self, word: usize) -> u64 {
        // Acquire: pairs with the release in `merge`.
        self.words[word].load(Ordering::Acquire)
    }

    /// Visits the words of the blocks that are flagged in `flags`, those of group `group`.
    fn for_each_word(&self, group: usize, flags: u64, mut each: impl FnMut(usize, &AtomicU64)) {
        for block in ones(flags) {
            for word in block_words(group * 64 + block, self.words.len()) {
                each(word, &self.words[word]);
            }
        }
    }
}
