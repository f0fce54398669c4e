// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pages as bits of 64-bit words: the arithmetic that all bitmaps share.

use core::ops::{Deref, DerefMut, Range};

use crate::sync::{Zero, zeroed};

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// Words that fill a cache line: 512 pages, 2 MiB of guest memory.
pub(crate) const LINE_WORDS: usize = 8;

/// Words of a block, 64 lines: 4 KiB of bits, 32,768 pages, 128 MiB of guest memory.
pub(crate) const BLOCK_WORDS: usize = 64 * LINE_WORDS;

/// Memory that starts at a cache line, so that a line of words is one.
///
/// The alignment is not requested from the allocator, which would then write zeroes where it has zero pages to give.
pub(crate) struct Lines<T> {
    memory: Box<[T]>,
    ours: Range<usize>,
}

impl<T: Zero> Lines<T> {
    /// `len` zeroes; `None` if there is no memory for them.
    pub(crate) fn zeroed(len: usize) -> Option<Self> {
        let spare = (LINE_BYTES / size_of::<T>()).saturating_sub(1);
        let memory: Box<[T]> = zeroed(len.checked_add(spare)?)?;
        // A model's stand-in for an integer may have no place at the start of a line.
        let start = memory.as_ptr().align_offset(LINE_BYTES).min(spare);
        let ours = start..start + len;
        Some(Self { memory, ours })
    }
}

impl<T> Deref for Lines<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        &self.memory[self.ours.clone()]
    }
}

impl<T> DerefMut for Lines<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.ours.clone()]
    }
}

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

/// Returns the words that `first .. first + pages` reaches into, and which of their bits.
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

/// Returns the positions of the ones of `word`, ascending.
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
    fn lines_are_cache_lines() {
        for len in [0, 1, 7, 8, 9, 512, 100_000] {
            let words = Lines::<u64>::zeroed(len).unwrap();
            let bytes = Lines::<u8>::zeroed(len).unwrap();
            assert_eq!((words.len(), bytes.len()), (len, len));
            assert_eq!(words.as_ptr().addr() % LINE_BYTES, 0);
            assert_eq!(bytes.as_ptr().addr() % LINE_BYTES, 0);
        }
    }

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
