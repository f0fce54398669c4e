// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest under memory stress, as guestperf has it: each vCPU XORs its share
//! of the memory with random bytes, page by page, 8 bytes at a time, over and over.
//!
//! The random bytes are a page-sized window into a buffer, which moves on by 8 bytes with each pass:
//! with one and the same page, every second pass would undo the one before, and half of all stale
//! copies of a page would look whole. As it is, a page looks again as it did 1,024 passes before,
//! when each of the 512 windows has been there twice, and at no time in between.
//!
//! The longest gap is the longest time between two pages, in ticks of the guest's clock, since the host has
//! taken it away.

use crate::guest::memory::PAGE_SIZE;
use crate::guest::workload::Region;
use crate::random::SplitMix64;

/// Words of a page.
pub(crate) const WORDS: usize = (PAGE_SIZE / 8) as usize;
/// Words of the random buffer: a page and all places that the window moves to.
pub(crate) const RANDOM_WORDS: usize = 2 * WORDS - 1;

/// What one vCPU stresses, for ever, natively.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stress {
    /// Its share of the memory.
    pub share: Region,
    /// Where its random bytes come from.
    pub seed: u64,
}

impl Stress {
    /// The random buffer.
    pub(crate) fn random_words(&self) -> impl Iterator<Item = u64> {
        let mut random = SplitMix64(self.seed);
        (0..RANDOM_WORDS).map(move |_| random.next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A window must change what it is laid over, and no two windows in the same way.
    #[test]
    fn random_words_are_not_zero_and_differ() {
        let region = Region { gpa: 0, pages: 1 };
        let words = |seed| {
            let stress = Stress {
                share: region,
                seed,
            };
            stress.random_words().collect::<Vec<_>>()
        };
        let mut some = words(1);
        assert_eq!(some.len(), RANDOM_WORDS);
        assert_ne!(some, words(2));
        some.sort_unstable();
        some.dedup();
        assert_eq!(some.len(), RANDOM_WORDS);
        assert_ne!(some[0], 0);
    }
}
