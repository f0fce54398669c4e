//! The bits that one harvesting thread writes without any other looking on.

use super::pages::PageBits;
use super::words::{BLOCK_WORDS, block_words, blocks_for, words_for};
use crate::sync::{Plain, PlainU8, PlainU64, lend, zeroed};

/// One slot's part of one shard: a bit a page, written by plain stores.
///
/// Whoever holds the shard (see [`ShardPool`](super::pool::ShardPool)) is alone with it.
pub(crate) struct ShardBits {
    words: Box<[PlainU64]>,
    /// One for each block of words: not zero if any of their bits may be set.
    touched: Box<[PlainU8]>,
}

impl ShardBits {
    /// For a slot of `pages` pages; `None` if there is no memory for it.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        let words = words_for(pages);
        Some(Self {
            words: zeroed(words)?,
            touched: zeroed(blocks_for(words))?,
        })
    }

    /// The words and the touched-flags, for whoever makes pointers to them.
    pub(crate) fn parts(&self) -> (&[PlainU64], &[PlainU8]) {
        (&self.words, &self.touched)
    }

    /// Whether the bit of `page`, which is in the slot, is set. For the holder of the shard.
    pub(crate) fn contains(&self, page: u64) -> bool {
        self.words[(page / 64) as usize].load() >> (page % 64) & 1 == 1
    }

    /// Sets the bit of `page`, which is in the slot. For the holder of the shard.
    pub(crate) fn insert(&self, page: u64) {
        let at = (page / 64) as usize;
        let word = &self.words[at];
        word.store(word.load() | 1 << (page % 64));
        self.touched[at / BLOCK_WORDS].store(1);
    }

    /// Moves all bits into `into` and leaves none.
    ///
    /// # Safety
    /// The caller holds the shard.
    pub(crate) unsafe fn take_into(&self, into: &mut PageBits) {
        let take = |block, words: &mut [u64]| {
            into.take_block(block, words);
            false
        };
        // SAFETY: the caller holds the shard.
        unsafe { self.for_each_block(take) }
    }

    /// Shows each word that is not zero to `each`.
    ///
    /// # Safety
    /// The caller holds the shard.
    pub(crate) unsafe fn for_each(&self, mut each: impl FnMut(usize, u64)) {
        let show = |block, words: &mut [u64]| {
            let start = block * BLOCK_WORDS;
            for (i, &bits) in words.iter().enumerate().filter(|(_, bits)| **bits != 0) {
                each(start + i, bits);
            }
            true
        };
        // SAFETY: the caller holds the shard.
        unsafe { self.for_each_block(show) }
    }

    /// Lends each touched block to `each`, which returns whether bits are left in it.
    ///
    /// # Safety
    /// The caller holds the shard.
    unsafe fn for_each_block(&self, mut each: impl FnMut(usize, &mut [u64]) -> bool) {
        let visit = |touched: &mut [u8]| {
            for (group, flags) in touched.chunks_mut(64).enumerate() {
                // Most are clean: seen of 64 at once.
                if flags.iter().fold(0, |all, flag| all | flag) == 0 {
                    continue;
                }
                for (i, flag) in flags.iter_mut().enumerate().filter(|(_, flag)| **flag != 0) {
                    let block = group * 64 + i;
                    let words = &self.words[block_words(block, self.words.len())];
                    // SAFETY: as below.
                    let left = unsafe { lend(words, |words| each(block, words)) };
                    *flag = u8::from(left);
                }
            }
        };
        // SAFETY: who holds the shard is alone with its words and flags.
        unsafe { lend(&self.touched, visit) }
    }
}
