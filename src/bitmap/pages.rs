// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bits of one slot, with one owner.

use core::ops::Range;

use super::words::{LINE_WORDS, Lines, masks, ones, words_for};
use crate::prefetch;
use crate::sync::zeroed;

/// Up to so many non-zero words of 64 are cleared one by one, more all at once.
const FEW: u32 = 8;

/// One bit per page: what a sync collects and its caller reads.
///
/// Two levels of summaries lie over the words, so that clean parts cost nothing: an idle guest of 1 TiB is 1,024 words of the upper
/// one.
pub(crate) struct PageBits {
    words: Lines<u64>,
    /// One bit per word: set if the word is not zero.
    summary: Box<[u64]>,
    /// One bit per word of `summary`: set if that is not zero.
    top: Box<[u64]>,
    pages: u64,
}

impl PageBits {
    /// For a slot of `pages` pages; `None` if there is no memory for it.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        let words = words_for(pages);
        Some(Self {
            words: Lines::zeroed(words)?,
            summary: zeroed(words.div_ceil(64))?,
            top: zeroed(words.div_ceil(64 * 64))?,
            pages,
        })
    }

    /// Adds `bits`, some of which are set, to `word`.
    #[inline]
    pub(crate) fn merge(&mut self, word: usize, bits: u64) {
        self.words[word] |= bits;
        self.summary[word / 64] |= 1 << (word % 64);
        self.top[word / (64 * 64)] |= 1 << (word / 64 % 64);
    }

    /// Prefetches `word` and those beside it, for a write.
    #[inline(always)]
    pub(crate) fn ask(&self, word: usize) {
        prefetch::for_write(&self.words[word]);
    }

    /// Moves the bits of the lines of `source` that begin at the words `lines` here, and clears them there.
    pub(crate) fn take_lines(&mut self, lines: &[usize], source: &mut [u64]) {
        for &at in lines {
            let (words, source) = (&mut self.words[at..], &mut source[at..]);
            let line = words.first_chunk_mut::<LINE_WORDS>();
            let (Some(words), Some(source)) = (line, source.first_chunk_mut::<LINE_WORDS>()) else {
                // The slot's end.
                let bits = source.iter_mut().map(core::mem::take).enumerate();
                let bits = bits.filter(|(_, bits)| *bits != 0);
                bits.for_each(|(i, bits)| self.merge(at + i, bits));
                continue;
            };
            // It is unpredictable which words of a line have bits, so all are moved, without a branch.
            let mut moved = 0;
            for i in 0..LINE_WORDS {
                words[i] |= source[i];
                moved |= u64::from(source[i] != 0) << i;
                source[i] = 0;
            }
            self.summary[at / 64] |= moved << (at % 64);
            self.top[at / (64 * 64)] |= u64::from(moved != 0) << (at / 64 % 64);
        }
    }

    /// Passes each word that is not zero to `each`.
    pub(crate) fn for_each(&self, mut each: impl FnMut(usize, u64)) {
        let mut next = 0;
        while let Some(word) = self.next_word(next) {
            each(word, self.words[word]);
            next = word + 1;
        }
    }

    /// Adds the bits of `from`, which has as many pages.
    pub(crate) fn add(&mut self, from: &Self) {
        from.for_each(|word, bits| self.merge(word, bits));
    }

    /// Adds the bits of `from` that are not in `without`; both have as many pages.
    pub(crate) fn add_without(&mut self, from: &Self, without: &Self) {
        from.for_each(|word, bits| {
            let bits = bits & !without.words[word];
            if bits != 0 {
                self.merge(word, bits);
            }
        });
    }

    /// Adds these words of `from`, which has as many pages.
    pub(crate) fn add_words(&mut self, from: &Self, words: Range<usize>) {
        let mut next = words.start;
        while let Some(word) = from.next_word(next).filter(|word| *word < words.end) {
            self.merge(word, from.words[word]);
            next = word + 1;
        }
    }

    /// Removes the bits that are set in `these`, which has as many pages.
    pub(crate) fn remove_all(&mut self, these: &Self) {
        these.for_each(|word, bits| self.clear_in(word, bits));
    }

    /// Removes the bits of `first .. first + pages`, which are in the slot.
    pub(crate) fn remove(&mut self, first: u64, pages: u64) {
        for (word, mask) in masks(first, pages) {
            self.clear_in(word, mask);
        }
    }

    /// Removes `bits` from `word`.
    fn clear_in(&mut self, word: usize, bits: u64) {
        if self.words[word] & bits == 0 {
            return;
        }
        self.words[word] &= !bits;
        if self.words[word] == 0 {
            let group = word / 64;
            self.summary[group] &= !(1 << (word % 64));
            if self.summary[group] == 0 {
                self.top[group / 64] &= !(1 << (group % 64));
            }
        }
    }

    /// Sets every bit.
    pub(crate) fn fill(&mut self) {
        for (word, mask) in masks(0, self.pages) {
            self.merge(word, mask);
        }
    }

    /// Clears every bit.
    pub(crate) fn clear(&mut self) {
        for top in 0..self.top.len() {
            for i in ones(core::mem::take(&mut self.top[top])) {
                let group = top * 64 + i;
                let summary = core::mem::take(&mut self.summary[group]);
                let words = &mut self.words[group * 64..];
                if summary.count_ones() <= FEW {
                    ones(summary).for_each(|word| words[word] = 0);
                } else {
                    let len = words.len().min(64);
                    words[..len].fill(0);
                }
            }
        }
    }

    /// Returns the words; the last may have room for more pages than there are.
    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    /// Finds the first word at or after `from` that is not zero.
    #[inline]
    pub(crate) fn next_word(&self, from: usize) -> Option<usize> {
        // First the rest of the group of 64 words, then of the groups' group, then all others.
        let group = from / 64;
        let left = self.summary.get(group)? & (!0 << (from % 64));
        if left != 0 {
            return Some(group * 64 + left.trailing_zeros() as usize);
        }
        let group = self.next_group(group + 1)?;
        Some(group * 64 + self.summary[group].trailing_zeros() as usize)
    }

    fn next_group(&self, from: usize) -> Option<usize> {
        let left = self.top.get(from / 64)? & (!0 << (from % 64));
        if left != 0 {
            return Some(from / 64 * 64 + left.trailing_zeros() as usize);
        }
        let rest = &self.top[from / 64 + 1..];
        let skipped = rest.iter().position(|&top| top != 0)?;
        let bit = rest[skipped].trailing_zeros() as usize;
        Some((from / 64 + 1 + skipped) * 64 + bit)
    }

    /// Returns the last page whose bit is set in `words`.
    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn last_in(&self, words: Range<usize>) -> Option<u64> {
        let words = words.start..words.end.min(self.words.len());
        let highest = |word: u64| u64::from(u64::BITS - 1 - word.leading_zeros());
        for group in (words.start / 64..words.end.div_ceil(64)).rev() {
            let in_words = |word: &usize| words.contains(word);
            let set = ones(self.summary[group]).map(|word| group * 64 + word);
            if let Some(word) = set.filter(in_words).last() {
                return Some(word as u64 * 64 + highest(self.words[word]));
            }
        }
        None
    }

    pub(crate) fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.top.iter().all(|&top| top == 0)
    }

    /// Counts the bits that are set in `words`.
    pub(crate) fn count(&self, words: Range<usize>) -> u64 {
        let mut count = 0;
        let mut from = words.start;
        while let Some(word) = self.next_word(from).filter(|&word| word < words.end) {
            count += u64::from(self.words[word].count_ones());
            from = word + 1;
        }
        count
    }
}
