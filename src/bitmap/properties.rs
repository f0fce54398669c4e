// SPDX-License-Identifier: Apache-2.0 OR MIT
//! All bitmaps, compared with naive ones: maps from words to their bits.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::pages::PageBits;
use super::shard::ShardBits;
use super::shared::SharedBits;
use super::words::{LINE_WORDS, words_for};
use crate::sync::Plain;

/// Neighbouring words with the same bits. For places, see [`place`].
#[derive(Debug, Clone, Copy)]
struct Stretch {
    at: u32,
    words: usize,
    bits: u64,
}

#[derive(Debug, Clone, Copy)]
enum Deed {
    Merge(Stretch),
    /// As a pass does.
    Harvest(Stretch),
    /// As a device does: the first page, and how many.
    Write(u32, u64),
    TakeShard,
    TakeShared,
    CopyShared,
    Fill,
    Clear,
}

/// `at` among `of`: low numbers count from the start, high ones from the end.
fn place(at: u32, of: u64) -> u64 {
    let back = u32::MAX - at;
    match at < back {
        true => u64::from(at) % of,
        false => of - 1 - u64::from(back) % of,
    }
}

/// The bits of words that are not zero.
type Bits = BTreeMap<usize, u64>;

/// The machine under test and the naive one.
struct Bitmaps {
    pages: u64,
    owned: (PageBits, Bits),
    shard: (ShardBits, Bits),
    shared: (SharedBits, Bits),
}

impl Bitmaps {
    fn new(pages: u64) -> Self {
        Self {
            pages,
            owned: (PageBits::new(pages).unwrap(), Bits::new()),
            shard: (ShardBits::new(pages).unwrap(), Bits::new()),
            shared: (SharedBits::new(pages).unwrap(), Bits::new()),
        }
    }

    /// The bits that `word` has room for.
    fn room(&self, word: usize) -> u64 {
        let pages = self.pages - word as u64 * 64;
        u64::MAX >> 64u64.saturating_sub(pages)
    }

    fn stretch(&self, stretch: Stretch) -> Vec<(usize, u64)> {
        let words = words_for(self.pages);
        let first = place(stretch.at, words as u64) as usize;
        let stretched = first..words.min(first + stretch.words);
        let bits = stretched.map(|word| (word, stretch.bits & self.room(word)));
        bits.filter(|(_, bits)| *bits != 0).collect()
    }

    fn apply(&mut self, deed: Deed) {
        match deed {
            Deed::Merge(stretch) => {
                for (word, bits) in self.stretch(stretch) {
                    self.owned.0.merge(word, bits);
                    *self.owned.1.entry(word).or_default() |= bits;
                }
            }
            Deed::Harvest(stretch) => {
                for (word, bits) in self.stretch(stretch) {
                    let (words, touched) = self.shard.0.parts();
                    words[word].store(words[word].load() | bits);
                    touched[word / LINE_WORDS].store(1);
                    *self.shard.1.entry(word).or_default() |= bits;
                }
            }
            Deed::Write(first, pages) => {
                let first = place(first, self.pages);
                let pages = pages.min(self.pages - first);
                self.shared.0.set(first, pages);
                for page in first..first + pages {
                    *self.shared.1.entry((page / 64) as usize).or_default() |= 1 << (page % 64);
                }
            }
            Deed::TakeShard => {
                // SAFETY: no other thread has the shard.
                unsafe { self.shard.0.take_into(&mut self.owned.0) };
                add(&mut self.owned.1, &self.shard.1);
                self.shard.1.clear();
            }
            Deed::TakeShared => {
                self.shared.0.take_into(&mut self.owned.0);
                add(&mut self.owned.1, &self.shared.1);
                self.shared.1.clear();
            }
            Deed::CopyShared => {
                self.shared.0.copy_into(&mut self.owned.0);
                add(&mut self.owned.1, &self.shared.1);
            }
            Deed::Fill => {
                self.owned.0.fill();
                let all = (0..words_for(self.pages)).map(|word| (word, self.room(word)));
                self.owned.1 = all.collect();
            }
            Deed::Clear => {
                self.owned.0.clear();
                self.owned.1.clear();
            }
        }
    }

    fn check(&self) {
        let mut shown = Bits::new();
        // SAFETY: no other thread has the shard.
        unsafe {
            self.shard
                .0
                .for_each(|word, bits| assert!(shown.insert(word, bits).is_none()))
        };
        assert!(shown == self.shard.1, "{shown:x?} for {:x?}", self.shard.1);

        let (bits, expected) = &self.owned;
        let set = bits.words().iter().copied().enumerate();
        let set: Bits = set.filter(|(_, bits)| *bits != 0).collect();
        assert!(set == *expected, "{set:x?} for {expected:x?}");
        assert_eq!(bits.is_empty(), expected.is_empty());
        assert_eq!(bits.words().len(), words_for(self.pages));

        // Wherever something begins or ends, and the borders of groups.
        let ends = expected
            .keys()
            .flat_map(|&word| [word.saturating_sub(1), word, word + 1]);
        let borders = [0, 1, 63, 64, 4095, 4096, 8192, words_for(self.pages)];
        let mut last = 0;
        for from in ends.take(100).chain(borders) {
            let next = expected.range(from..).next().map(|(&word, _)| word);
            assert_eq!(bits.next_word(from), next, "from {from}");
            let (low, high) = (last.min(from), last.max(from));
            let count: u32 = expected
                .range(low..high)
                .map(|(_, bits)| bits.count_ones())
                .sum();
            assert_eq!(bits.count(low..high), u64::from(count));
            last = from;
            for page in from as u64 * 64..(from as u64 + 1) * 64 {
                let word = expected.get(&from).copied().unwrap_or(0);
                let is_set = word >> (page % 64) & 1 == 1;
                assert_eq!(bits.contains(page), is_set, "page {page}");
            }
        }
        assert!(!bits.contains(self.pages));
    }
}

fn add(to: &mut Bits, from: &Bits) {
    for (&word, bits) in from {
        *to.entry(word).or_default() |= bits;
    }
}

/// Sizes about the borders of words, lines, blocks, and groups of each.
fn size() -> impl Strategy<Value = u64> {
    let border = prop::sample::select(&[64, 512, 4096, 32_768, 262_144, 2_097_152][..]);
    prop_oneof![
        2 => 1u64..200,
        4 => (border, 0u64..600).prop_map(|(border, beyond)| border + beyond),
        1 => (1u64..70_000).prop_map(|pages| pages * 8),
    ]
}

fn deed() -> impl Strategy<Value = Deed> {
    // Mostly where all sizes have words, and in the last of their groups.
    let back = (0u32..20).prop_map(|back| u32::MAX - back);
    let at = prop_oneof![0u32..20, 500u32..520, back, any::<u32>()].boxed();
    let bits = prop_oneof![Just(u64::MAX), Just(1), Just(1 << 63), any::<u64>()];
    let stretch = (at.clone(), 1usize..30, bits);
    let stretch = stretch.prop_map(|(at, words, bits)| Stretch { at, words, bits });
    let stretch = stretch.boxed();
    prop_oneof![
        3 => stretch.clone().prop_map(Deed::Merge),
        6 => stretch.prop_map(Deed::Harvest),
        4 => (at, 0u64..300).prop_map(|(first, pages)| Deed::Write(first, pages)),
        3 => Just(Deed::TakeShard),
        2 => Just(Deed::TakeShared),
        1 => Just(Deed::CopyShared),
        2 => Just(Deed::Clear),
    ]
}

/// Many lines of a block and of many blocks, more than are prefetched at once.
#[test]
fn lines_are_taken_however_many_there_are() {
    for pages in [64 * 700 + 5, 64 * 512 * 64 + 64 * 9 + 3] {
        for apart in [1, 3, 7, 8, 65, 513] {
            let mut bitmaps = Bitmaps::new(pages);
            for at in (0..words_for(pages)).step_by(apart) {
                let (at, words, bits) = (at as u32, 1, u64::MAX);
                bitmaps.apply(Deed::Harvest(Stretch { at, words, bits }));
            }
            for deed in [Deed::TakeShard, Deed::TakeShard, Deed::Clear] {
                bitmaps.apply(deed);
                bitmaps.check();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn bits_are_where_they_were_set(
        pages in size(),
        deeds in vec(deed(), 1..40),
        filled in any::<bool>(),
    ) {
        let mut bitmaps = Bitmaps::new(pages);
        let fill = [Deed::Fill, Deed::Clear];
        let fill = fill.iter().filter(|_| filled);
        for deed in fill.chain(&deeds) {
            bitmaps.apply(*deed);
            bitmaps.check();
        }
    }
}
