//! The bits that one harvesting thread writes without any other looking on.

use super::pages::PageBits;
use super::words::{block_words, blocks_for, words_for};
use crate::sync::{PlainU8, PlainU64, zeroed};

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

    /// Hands each non-zero word to `each` and leaves the word as what `each` returns.
    fn for_each_word(&self, mut each: impl FnMut(usize, u64) -> u64) {
        for (block, touched) in self.touched.iter().enumerate() {
            if touched.load() == 0 {
                continue;
            }
            let mut left = 0;
            for word in block_words(block, self.words.len()) {
                let bits = self.words[word].load();
                if bits != 0 {
                    let keep = each(word, bits);
                    self.words[word].store(keep);
                    left |= keep;
                }
            }
            touched.store(u8::from(left != 0));
        }
    }

    /// Moves all bits into `into` and leaves none.
    pub(crate) fn take_into(&self, into: &mut PageBits) {
        self.for_each_word(|word, bits| {
            into.merge(word, bits);
            0
        });
    }

    /// Shows each non-zero word to `each`.
    pub(crate) fn for_each(&self, mut each: impl FnMut(usize, u64)) {
        self.for_each_word(|word, bits| {
            each(word, bits);
            bits
        });
    }
}
