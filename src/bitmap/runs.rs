// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bits as runs of bits.

use core::ops::Range;

use super::pages::PageBits;

impl PageBits {
    /// Returns the runs of set bits in `words`, ascending.
    pub(crate) fn runs(&self, words: Range<usize>) -> BitRuns<'_> {
        BitRuns::new(self, words)
    }
}

/// Runs of set bits as half-open ranges, ascending, each as long as possible.
#[derive(Clone)]
pub(crate) struct BitRuns<'a> {
    bits: &'a PageBits,
    /// The words up to the last of the range.
    words: &'a [u64],
    /// The current word, and the rest of it.
    at: usize,
    left: u64,
}

impl<'a> BitRuns<'a> {
    /// Returns the runs in `words`; a run that continues beyond is cut.
    fn new(bits: &'a PageBits, words: Range<usize>) -> Self {
        let end = words.end.min(bits.words().len());
        let mut runs = Self {
            bits,
            words: &bits.words()[..end],
            at: words.start,
            left: 0,
        };
        runs.seek(words.start);
        runs
    }

    /// Goes to the first word at or after `from` that is not zero; false at the end.
    #[inline]
    fn seek(&mut self, from: usize) -> bool {
        let word = self.bits.next_word(from);
        match word.and_then(|word| Some((word, *self.words.get(word)?))) {
            Some((word, left)) => {
                self.at = word;
                self.left = left;
                true
            }
            None => {
                self.at = self.words.len();
                self.left = 0;
                false
            }
        }
    }
}

impl Iterator for BitRuns<'_> {
    type Item = Range<u64>;

    #[inline]
    fn next(&mut self) -> Option<Range<u64>> {
        if self.left == 0 && !self.seek(self.at + 1) {
            return None;
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
        // The run reaches the word's end and continues through the words that follow.
        loop {
            self.at += 1;
            let word = self.words.get(self.at).copied().unwrap_or(0);
            if word != u64::MAX {
                let end = u64::from(word.trailing_ones());
                self.left = word & !0 << end;
                return Some(start..self.at as u64 * 64 + end);
            }
        }
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::*;

    /// Returns the runs among `words`, one bit at a time.
    fn oracle(words: &[u64]) -> Vec<Range<u64>> {
        let bit = |page: u64| words[(page / 64) as usize] >> (page % 64) & 1 == 1;
        let pages = words.len() as u64 * 64;
        let mut runs = Vec::new();
        let mut page = 0;
        while page < pages {
            if words[(page / 64) as usize] == 0 {
                page = (page / 64 + 1) * 64;
                continue;
            }
            let start = page;
            while page < pages && bit(page) {
                page += 1;
            }
            if page > start {
                runs.push(start..page);
            }
            page += 1;
        }
        runs
    }

    fn page_bits(words: &[u64]) -> PageBits {
        let mut bits = PageBits::new(words.len() as u64 * 64).unwrap();
        for (word, &set) in words.iter().enumerate().filter(|(_, set)| **set != 0) {
            bits.merge(word, set);
        }
        bits
    }

    #[test]
    fn every_pattern_around_a_word_border() {
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
                let bits = page_bits(&words);
                let runs: Vec<_> = bits.runs(0..4).collect();
                assert_eq!(runs, oracle(&words));
            }
        }
    }

    #[test]
    fn words_far_apart_and_parts() {
        // Two levels of summaries, and the end of each.
        let places = [0, 1, 63, 64, 65, 4095, 4096, 4159, 8191, 8192, 12_287];
        for chosen in 0..1 << places.len() {
            let mut words = vec![0; 12_288];
            for (i, &place) in places.iter().enumerate() {
                if chosen >> i & 1 == 1 {
                    words[place] = if i % 2 == 0 {
                        u64::MAX
                    } else {
                        0x8000_0000_0000_0001
                    };
                }
            }
            let mut bits = page_bits(&words);
            let expected = oracle(&words);
            assert_eq!(bits.runs(0..12_288).collect::<Vec<_>>(), expected);
            let pages =
                |runs: &[Range<u64>]| runs.iter().map(|run| run.end - run.start).sum::<u64>();
            assert_eq!(bits.count(0..12_288), pages(&expected));
            // Cut in two anywhere, the parts have the same pages.
            for cut in [1, 64, 4096, 8191] {
                let mut parts: Vec<_> = bits.runs(0..cut).collect();
                assert!(parts.iter().all(|run| run.end <= cut as u64 * 64));
                parts.extend(bits.runs(cut..12_288));
                assert_eq!(pages(&parts), pages(&expected));
                assert_eq!(
                    bits.count(0..cut) + bits.count(cut..12_288),
                    pages(&expected)
                );
            }
            bits.clear();
            assert!(bits.is_empty() && bits.words().iter().all(|&word| word == 0));
            assert_eq!(bits.runs(0..12_288).next(), None);
        }
    }
}
