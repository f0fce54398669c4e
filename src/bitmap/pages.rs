//! The bits of one slot in the hands of one owner.

use super::words::{BLOCK_WORDS, BitRuns, block_words, blocks_for, masks, words_for};
use crate::sync::zeroed;

/// A bit a page, owned: what a sync collects and its caller reads.
pub(crate) struct PageBits {
    words: Box<[u64]>,
    touched: Box<[u8]>,
    pages: u64,
}

impl PageBits {
    /// For a slot of `pages` pages; `None` if there is no memory for it.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        let words = words_for(pages);
        Some(Self {
            words: zeroed(words)?,
            touched: zeroed(blocks_for(words))?,
            pages,
        })
    }

    /// Adds `bits` to `word`.
    pub(crate) fn merge(&mut self, word: usize, bits: u64) {
        self.words[word] |= bits;
        self.touched[word / BLOCK_WORDS] = 1;
    }

    /// Sets every bit.
    pub(crate) fn fill(&mut self) {
        for (word, mask) in masks(0, self.pages) {
            self.merge(word, mask);
        }
    }

    /// Clears every bit.
    pub(crate) fn clear(&mut self) {
        for block in 0..self.touched.len() {
            if core::mem::take(&mut self.touched[block]) != 0 {
                let words = block_words(block, self.words.len());
                self.words[words].fill(0);
            }
        }
    }

    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    pub(crate) fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    /// How many bits are set.
    pub(crate) fn count(&self) -> u64 {
        self.touched_words()
            .map(|words| words.iter().map(|w| u64::from(w.count_ones())).sum::<u64>())
            .sum()
    }

    fn touched_words(&self) -> impl Iterator<Item = &[u64]> {
        (0..self.touched.len())
            .filter(|&block| self.touched[block] != 0)
            .map(|block| &self.words[block_words(block, self.words.len())])
    }

    /// Runs of set bits, ascending.
    pub(crate) fn runs(&self) -> BitRuns<'_> {
        BitRuns::new(&self.words)
    }
}
