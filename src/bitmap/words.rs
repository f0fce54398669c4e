//! Pages as bits of 64-bit words: the arithmetic that every bitmap here shares.

use core::ops::Range;

/// Words that share one touched-flag: 4 KiB of bits, 32,768 pages, 128 MiB of guest memory.
pub(crate) const BLOCK_WORDS: usize = 512;

/// Words that hold `pages` bits.
pub(crate) fn words_for(pages: u64) -> usize {
    pages.div_ceil(64) as usize
}

/// Blocks of `words` words.
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

/// The positions of the ones of `word`, ascending.
pub(crate) fn ones(mut word: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let position = (word != 0).then(|| word.trailing_zeros() as usize)?;
        word &= word - 1;
        Some(position)
    })
}

#[cfg(all(test, not(feature = "modelled")))]
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
}
