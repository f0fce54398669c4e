//! Pages as bits of 64-bit words: the arithmetic that every bitmap here shares.

use core::ops::Range;

/// Words that share one touched-flag: 4 KiB of bits, 32,768 pages, 128 MiB of guest memory.
pub(crate) const BLOCK_WORDS: usize = 512;

/// Words that hold `pages` bits.
pub(crate) fn words_for(pages: u64) -> usize {
    pages.div_ceil(64) as usize
}

/// Touched-flags for `words` words.
pub(crate) fn blocks_for(words: usize) -> usize {
    words.div_ceil(BLOCK_WORDS)
}

/// The words of `block` in a bitmap of `words` words.
pub(crate) fn block_words(block: usize, words: usize) -> Range<usize> {
    let start = block * BLOCK_WORDS;
    start..words.min(start + BLOCK_WORDS)
}

/// The words that `first .. first + pages` reaches into, and which of their bits.
pub(crate) fn masks(first: u64, pages: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = first + pages;
    let mut next = first;
    core::iter::from_fn(move || {
        if next == end {
            return None;
        }
        let (word, bit) = ((next / 64) as usize, next % 64);
        let bits = (end - next).min(64 - bit);
        next += bits;
        Some((word, (u64::MAX >> (64 - bits)) << bit))
    })
}

/// Runs of set bits as half-open ranges, ascending, each as long as it can be.
#[derive(Debug, Clone)]
pub(crate) struct BitRuns<'a> {
    words: &'a [u64],
    /// The word looked at, and what of it is left.
    at: usize,
    left: u64,
}

impl<'a> BitRuns<'a> {
    pub(crate) fn new(words: &'a [u64]) -> Self {
        let left = words.first().copied().unwrap_or(0);
        Self { words, at: 0, left }
    }

    /// Goes on to the next word; false at the end.
    fn advance(&mut self) -> bool {
        self.at += 1;
        match self.words.get(self.at) {
            Some(&word) => {
                self.left = word;
                true
            }
            None => {
                self.left = 0;
                false
            }
        }
    }
}

impl Iterator for BitRuns<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        while self.left == 0 {
            if !self.advance() {
                return None;
            }
        }
        let begin = u64::from(self.left.trailing_zeros());
        let start = self.at as u64 * 64 + begin;
        // Zeroes below the run read as ones, so that the run's end is the first zero.
        let filled = self.left | ((1 << begin) - 1);
        if filled != u64::MAX {
            let end = u64::from(filled.trailing_ones());
            self.left &= !0 << end;
            return Some(start..self.at as u64 * 64 + end);
        }
        // The run reaches the word's end: it goes on through the ones that follow.
        loop {
            if !self.advance() {
                return Some(start..self.words.len() as u64 * 64);
            }
            if self.left != u64::MAX {
                let end = u64::from(self.left.trailing_ones());
                self.left &= !0 << end;
                return Some(start..self.at as u64 * 64 + end);
            }
        }
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::*;

    #[test]
    fn masks_cover_exactly_the_range() {
        for first in 0..130 {
            for pages in 0..200 {
                let mut bits = [0u64; 6];
                for (word, mask) in masks(first, pages) {
                    assert_eq!(bits[word], 0, "each word comes once");
                    bits[word] = mask;
                }
                for page in 0..384u64 {
                    let set = bits[(page / 64) as usize] >> (page % 64) & 1 == 1;
                    assert_eq!(set, (first..first + pages).contains(&page));
                }
            }
        }
    }

    #[test]
    fn runs_equal_the_bit_at_a_time_oracle() {
        // Every pattern of the two middle bytes around a word border, alone and amid ones.
        for pattern in 0..=u16::MAX {
            for around in [0, u64::MAX] {
                let low = u64::from(pattern & 0xff);
                let high = u64::from(pattern >> 8);
                let words = [
                    around,
                    around >> 8 | low << 56,
                    around << 8 | high,
                    around >> 1,
                ];
                let bit = |page: u64| words[(page / 64) as usize] >> (page % 64) & 1 == 1;
                let mut expected = Vec::new();
                let mut page = 0;
                while page < 256 {
                    let start = page;
                    while page < 256 && bit(page) {
                        page += 1;
                    }
                    if page > start {
                        expected.push(start..page);
                    }
                    page += 1;
                }
                assert_eq!(BitRuns::new(&words).collect::<Vec<_>>(), expected);
            }
        }
    }
}
