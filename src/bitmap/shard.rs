// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bits that one harvesting thread writes while no other thread reads them.

use super::pages::PageBits;
use super::words::{BLOCK_WORDS, LINE_WORDS, Lines, ones, words_for};
use crate::prefetch;
use crate::sync::{Plain, PlainU8, PlainU64, lend};

/// Flags of a block: as many as a word has bits, and a cache line bytes.
const BLOCK_FLAGS: usize = BLOCK_WORDS / LINE_WORDS;
const _: () = assert!(BLOCK_FLAGS == 64);

/// Lines that are prefetched before the first of them is moved: at least a block's, and few enough for a near cache.
const MOST_ASKED: usize = 2 * BLOCK_FLAGS;

/// One slot's part of one shard: one bit per page, written by plain stores.
///
/// Only the holder of the shard (see [`ShardPool`](super::pool::ShardPool)) accesses it.
pub(crate) struct ShardBits {
    words: Lines<PlainU64>,
    /// One for each line of whole blocks: 1 if any of its bits are set, else 0.
    touched: Lines<PlainU8>,
}

impl ShardBits {
    /// For a slot of `pages` pages; `None` if there is no memory for it.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        let words = words_for(pages);
        Some(Self {
            words: Lines::zeroed(words)?,
            touched: Lines::zeroed(words.div_ceil(BLOCK_WORDS) * BLOCK_FLAGS)?,
        })
    }

    /// Returns the words and the touched-flags, for pointers to them.
    pub(crate) fn parts(&self) -> (&[PlainU64], &[PlainU8]) {
        (&self.words, &self.touched)
    }

    /// Returns whether the bit of `page`, which is in the slot, is set. For the holder of the shard.
    pub(crate) fn contains(&self, page: u64) -> bool {
        self.words[(page / 64) as usize].load() >> (page % 64) & 1 == 1
    }

    /// Sets the bit of `page`, which is in the slot. For the holder of the shard.
    pub(crate) fn insert(&self, page: u64) {
        let at = (page / 64) as usize;
        let word = &self.words[at];
        word.store(word.load() | 1 << (page % 64));
        self.touched[at / LINE_WORDS].store(1);
    }

    /// Moves all bits into `into` and leaves none.
    ///
    /// # Safety
    /// The caller holds the shard.
    pub(crate) unsafe fn take_into(&self, into: &mut PageBits) {
        let take = |touched: &mut [u8], words: &mut [u64]| {
            // Lines are found, and prefetched from wherever they are, then moved, some at a time. So the processor waits for many at once, and
            // no move depends on another.
            let mut asked = [0; MOST_ASKED];
            let mut count = 0;
            for (group, touched) in touched.chunks_mut(64 * BLOCK_FLAGS).enumerate() {
                for i in ones(touched_blocks(touched)) {
                    let block = group * 64 + i;
                    let flags = touched[i * BLOCK_FLAGS..].first_chunk_mut::<BLOCK_FLAGS>();
                    let flags = core::mem::replace(flags.expect("a block"), [0; BLOCK_FLAGS]);
                    for line in touched_lines(flags) {
                        let at = block * BLOCK_WORDS + line * LINE_WORDS;
                        prefetch::for_write(&words[at]);
                        into.ask(at);
                        asked[count] = at;
                        count += 1;
                    }
                    if count > MOST_ASKED - BLOCK_FLAGS {
                        into.take_lines(&asked[..count], words);
                        count = 0;
                    }
                }
            }
            into.take_lines(&asked[..count], words);
        };
        // SAFETY: the caller holds the shard.
        unsafe { self.lend(take) }
    }

    /// Passes each word that is not zero to `each`.
    ///
    /// # Safety
    /// The caller holds the shard.
    pub(crate) unsafe fn for_each(&self, mut each: impl FnMut(usize, u64)) {
        let show = |touched: &mut [u8], words: &mut [u64]| {
            for (line, _) in touched.iter().enumerate().filter(|(_, flag)| **flag != 0) {
                let first = line * LINE_WORDS;
                let words = words[first..].iter().take(LINE_WORDS).enumerate();
                for (i, &bits) in words.filter(|(_, bits)| **bits != 0) {
                    each(first + i, bits);
                }
            }
        };
        // SAFETY: the caller holds the shard.
        unsafe { self.lend(show) }
    }

    /// Lends the touched-flags and the words.
    ///
    /// # Safety
    /// The caller holds the shard.
    unsafe fn lend(&self, borrower: impl FnOnce(&mut [u8], &mut [u64])) {
        let with_words = |touched: &mut [u8]| {
            // SAFETY: as below.
            unsafe { lend(&self.words, |words| borrower(touched, words)) }
        };
        // SAFETY: only the holder of the shard accesses its words and flags.
        unsafe { lend(&self.touched, with_words) }
    }
}

/// Returns which blocks of up to 64 are touched, without a branch that depends on it.
fn touched_blocks(flags: &[u8]) -> u64 {
    let blocks = flags
        .chunks_exact(BLOCK_FLAGS)
        .enumerate()
        .map(|(i, flags)| {
            let any = eights(flags).fold(0, |any, eight| any | eight);
            u64::from(any != 0) << i
        });
    blocks.fold(0, |all, block| all | block)
}

/// Returns the lines of a block that are touched, in an order of their own.
fn touched_lines(flags: [u8; BLOCK_FLAGS]) -> impl Iterator<Item = usize> {
    // A flag is the lowest bit of its byte. The bits above it have room for the flags of the other seven eights.
    let set = eights(&flags)
        .enumerate()
        .fold(0, |set, (i, eight)| set | eight << i);
    ones(set).map(|bit| bit % 8 * 8 + bit / 8)
}

/// Eight flags at a time, the first of them the lowest byte.
fn eights(flags: &[u8]) -> impl Iterator<Item = u64> {
    let eights = flags.chunks_exact(8);
    eights.map(|flags| u64::from_le_bytes(flags.try_into().expect("eight")))
}
