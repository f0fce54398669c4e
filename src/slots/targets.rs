// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a ring entry finds its bit: one table per shard, made when slots change.

use core::ptr::NonNull;

use crate::bitmap::pool::ShardGuard;
use crate::bitmap::words::LINE_WORDS;
use crate::prefetch;
use crate::ring::entry::Entry;
use crate::ring::view::{LINE, Take};
use crate::slots::table::Table;
use crate::sync::{Plain, PlainU8, PlainU64};

/// Bytes of bits that fit into a near cache. For more, words are prefetched.
const CACHED_BYTES: u64 = 256 << 10;

/// Pages whose bits fill eight cache lines. Entries that are farther apart share no line that is prefetched.
const FAR_PAGES: u64 = 8 * 8 * 64;

/// Where one slot's bits of one shard are.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Target {
    words: NonNull<PlainU64>,
    touched: NonNull<PlainU8>,
    /// Zero where there is no slot, so that one check covers both.
    pages: u64,
}

/// The targets of one shard.
pub(crate) struct Targets {
    /// One address space after the other, each with a power of two of ids. The last target is that of no slot.
    targets: Box<[Target]>,
    /// How many bits of an id count, and the bits of a slot's number that no slot here has.
    id_bits: u32,
    foreign_bits: u32,
    /// Whether all slots are in address space 0.
    has_one_space: bool,
    /// Whether the bits are more than fits into a near cache.
    is_large: bool,
}

// SAFETY: the pointers are to `Sync` memory that lives as long as the table they were made of.
unsafe impl Send for Targets {}
// SAFETY: as above.
unsafe impl Sync for Targets {}

impl Targets {
    /// Builds the targets of shard `shard` over the slots of `table`.
    ///
    /// # Safety
    /// `table`, or another that holds the same slots, must outlive the result.
    pub(crate) unsafe fn new(table: &Table, shard: usize) -> Self {
        let none = Target {
            words: NonNull::dangling(),
            touched: NonNull::dangling(),
            pages: 0,
        };
        let raw = || table.slots().map(|slot| slot.id().raw());
        let bits = raw().fold(0, |bits, raw| bits | raw);
        let id_bits = u32::BITS - (bits & 0xffff).leading_zeros();
        let space_bits = u32::BITS - (bits >> 16).leading_zeros();
        let mut targets = vec![none; (1 << (space_bits + id_bits)) + 1];
        let place = |raw: u32| ((raw >> 16) << id_bits | raw & 0xffff) as usize;
        for slot in table.slots() {
            let (words, touched) = slot.shard_bits(shard).parts();
            targets[place(slot.id().raw())] = Target {
                words: NonNull::from(words).cast(),
                touched: NonNull::from(touched).cast(),
                pages: slot.pages(),
            };
        }
        Self {
            targets: targets.into(),
            id_bits,
            foreign_bits: !(((1 << space_bits) - 1) << 16 | ((1 << id_bits) - 1)),
            has_one_space: space_bits == 0,
            // Tests and models take the longer way.
            is_large: cfg!(test)
                || table.slots().map(|slot| slot.pages() / 8).sum::<u64>() > CACHED_BYTES,
        }
    }

    /// Returns the look-up, for the holder of the shard.
    pub(crate) fn lookup<'a>(&'a self, _held: &'a ShardGuard<'_>) -> Lookup<'a> {
        Lookup {
            targets: &self.targets,
            id_bits: self.id_bits,
            foreign_bits: self.foreign_bits,
            has_one_space: self.has_one_space,
            is_large: self.is_large,
        }
    }
}

/// A table of targets, as a pass uses it.
#[derive(Clone, Copy)]
pub(crate) struct Lookup<'a> {
    targets: &'a [Target],
    id_bits: u32,
    foreign_bits: u32,
    has_one_space: bool,
    is_large: bool,
}

/// Entries that have no bit, by reason.
#[derive(Default)]
pub(crate) struct Misses {
    pub(crate) unknown_slot: u64,
    pub(crate) out_of_range: u64,
}

/// Sets the bits of the entries that a pass takes.
///
/// It is built for few instructions per entry, for no wait for memory, and for no branch that depends on the order of
/// slots.
pub(crate) struct Setter<'a> {
    lookup: Lookup<'a>,
    pub(crate) misses: Misses,
}

impl<'a> Setter<'a> {
    pub(crate) fn new(lookup: Lookup<'a>) -> Self {
        let misses = Misses::default();
        Self { lookup, misses }
    }

    /// Sets the bits of `entries`, all of one slot, and marks them for reset.
    #[inline(always)]
    fn set_in(&mut self, target: &Target, entries: &[Entry]) {
        let target = *target;
        let lines = entries.chunks_exact(LINE);
        let rest = lines.remainder();
        for line in lines {
            let line: &[Entry; LINE] = line.try_into().expect("a line");
            match one_word(line, target.pages) {
                // One by one, each store would wait for the one before.
                Some((word, bits)) => {
                    target.merge(word, bits);
                    line.iter().for_each(Entry::mark_reset);
                }
                None => self.set(line, |_| target),
            }
        }
        self.set(rest, |_| target);
    }

    /// Sets the bits of `entries`, where `target` finds the slot of each, and marks them for reset.
    #[inline(always)]
    fn set(&mut self, entries: &[Entry], target: impl Fn(&Entry) -> Target) {
        for_each(entries, |entry| {
            target(entry).set(entry.page(), &mut self.misses);
            // Only now: from here on the kernel may overwrite the payload.
            entry.mark_reset();
        });
    }
}

/// Returns the word that has the bits of all pages of the line, and these bits; `None` if there is no such word, or if some
/// page is past the end of a slot of `pages` pages.
#[inline(always)]
fn one_word(line: &[Entry; LINE], pages: u64) -> Option<(u64, u64)> {
    let first = line[0].page();
    let is_one = line[1..].iter().all(|entry| entry.page() ^ first < 64);
    let word = first / 64;
    if !is_one || word >= pages / 64 {
        return None;
    }
    let bits = line.iter().map(|entry| 1 << (entry.page() % 64));
    Some((word, bits.fold(0, |all, bit: u64| all | bit)))
}

/// Passes each entry to `each`, the entries of a line in one step.
#[inline(always)]
fn for_each(entries: &[Entry], mut each: impl FnMut(&Entry)) {
    let lines = entries.chunks_exact(LINE);
    let rest = lines.remainder();
    for line in lines {
        line.iter().for_each(&mut each);
    }
    rest.iter().for_each(each);
}

/// Returns the slot of all entries; `None` if there is none, or if they are of several, which the first few show in most cases.
#[inline(always)]
fn slot_of_all(entries: &[Entry]) -> Option<u32> {
    let slot = entries.first()?.slot();
    let mut lines = entries.chunks_exact(LINE);
    let is = |entry: &Entry| entry.slot() == slot;
    let all = lines.all(|line| line.iter().all(is)) && lines.remainder().iter().all(is);
    all.then_some(slot)
}

impl Take for Setter<'_> {
    #[inline(always)]
    fn take(&mut self, entries: &[Entry]) {
        let lookup = self.lookup;
        // Most blocks are of one slot, so it is looked up once.
        if let Some(slot) = slot_of_all(entries) {
            self.set_in(lookup.target(slot), entries);
        } else if lookup.has_one_space {
            self.set(entries, |entry| *lookup.target_in_one_space(entry.slot()));
        } else {
            self.set(entries, |entry| *lookup.target(entry.slot()));
        }
    }

    #[inline(always)]
    fn ask(&mut self, entries: &[Entry]) {
        let lookup = self.lookup;
        if !lookup.is_large || entries.is_empty() {
            return;
        }
        // Four of them show what the others are like. Where entries come in runs, these are most of the words to prefetch.
        let third = entries.len() / 3;
        let some = [0, third, 2 * third, entries.len() - 1].map(|at| &entries[at]);
        for entry in some {
            lookup.target(entry.slot()).ask(entry.page());
        }
        let pages = some.map(Entry::page);
        let far = |pair: &[u64]| u32::from(pair[0].abs_diff(pair[1]) >= FAR_PAGES);
        if pages.windows(2).map(far).sum::<u32>() < 2 {
            return;
        }
        if lookup.has_one_space {
            for_each(entries, |entry| {
                lookup.target_in_one_space(entry.slot()).ask(entry.page());
            });
        } else {
            for_each(entries, |entry| {
                lookup.target(entry.slot()).ask(entry.page());
            });
        }
    }
}

impl Target {
    /// Sets the bit of page `page`, if the slot has that page.
    #[inline(always)]
    fn set(&self, page: u64, misses: &mut Misses) {
        if page >= self.pages {
            misses.count(self);
            return;
        }
        self.merge(page / 64, 1 << (page % 64));
    }

    /// Adds `bits` to `word`, which is one of the slot's.
    #[inline(always)]
    fn merge(&self, word: u64, bits: u64) {
        debug_assert!(word < self.pages.div_ceil(64));
        let word = word as usize;
        // SAFETY: the slot's shard has a word for each 64 pages and a flag for each line of words;
        // both live as long as the table (see `Targets::new`).
        let (word, touched) = unsafe {
            (
                self.words.add(word).as_ref(),
                self.touched.add(word / LINE_WORDS).as_ref(),
            )
        };
        word.store(word.load() | bits);
        touched.store(1);
    }

    /// Prefetches the word of page `page`; it need not exist.
    #[inline(always)]
    fn ask(&self, page: u64) {
        prefetch::for_write(self.words.as_ptr().wrapping_add((page / 64) as usize));
    }
}

impl Misses {
    #[cold]
    fn count(&mut self, target: &Target) {
        if target.pages == 0 {
            self.unknown_slot += 1;
        } else {
            self.out_of_range += 1;
        }
    }
}

impl<'a> Lookup<'a> {
    /// The same in fewer steps, where all slots are in address space 0.
    #[inline(always)]
    fn target_in_one_space(self, slot: u32) -> &'a Target {
        debug_assert!(self.has_one_space);
        let none = self.targets.len() - 1;
        // The ids come first, as many as there are targets but the last.
        let place = (slot as usize).min(none);
        // SAFETY: a table has at least the target that is none, which is its last.
        unsafe { self.targets.get_unchecked(place) }
    }

    /// Returns the target of the slot with KVM's number `slot`.
    #[inline(always)]
    fn target(self, slot: u32) -> &'a Target {
        let none = self.targets.len() - 1;
        let id_mask = (1 << self.id_bits) - 1;
        let place = ((slot >> 16) << self.id_bits | slot & id_mask) as usize;
        let place = if slot & self.foreign_bits == 0 {
            place
        } else {
            none
        };
        // SAFETY: without foreign bits the place is below 2^(bits of spaces + bits of ids), and
        // there is one target more than that.
        unsafe { self.targets.get_unchecked(place) }
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::bitmap::pages::PageBits;
    use crate::slot_id::SlotId;

    /// Runs `deed` with slots, their only shard, and the look-up.
    fn with_slots<T>(
        slots: impl Iterator<Item = ((u16, u16), u64)>,
        deed: impl FnOnce(&Table, &ShardGuard<'_>, Lookup<'_>) -> T,
    ) -> T {
        let mut table = Table::default();
        for ((space, id), pages) in slots {
            table.add(SlotId::new(space, id), pages, None, 1).unwrap();
        }
        // SAFETY: the table lives until the deed is done.
        let targets = unsafe { Targets::new(&table, 0) };
        let pool = crate::bitmap::pool::ShardPool::new(1);
        let shard = pool.acquire(0);
        deed(&table, &shard, targets.lookup(&shard))
    }

    /// Compares the flat table with the tree that it is made of, for every number that a slot can have.
    #[test]
    fn every_slot_number_finds_its_own() {
        let sets: [&[(u16, u16)]; 6] = [
            &[],
            &[(0, 0)],
            &[(1, 0)],
            &[(0, 1), (0, 2), (1, 2)],
            &[(0, 0), (0, 5), (1, 3), (0, 32_763)],
            &[(0, 65_535), (1, 65_535), (1, 0)],
        ];
        for ids in sets {
            let slots = ids.iter().copied().zip(1..);
            with_slots(slots, |table, _, lookup| {
                for raw in (0..0x4_0000).chain((0..=u32::MAX).step_by(0xfff1)) {
                    let expected = table.get(raw).map_or(0, |slot| slot.pages());
                    assert_eq!(lookup.target(raw).pages, expected, "slot {raw:#x}");
                    if lookup.has_one_space {
                        let found = lookup.target_in_one_space(raw).pages;
                        assert_eq!(found, expected, "slot {raw:#x} of one space");
                    }
                }
            });
        }
    }

    /// Entries of a slot in the table or of another, near one another or far apart, within the slot or past its end.
    fn entries() -> impl Strategy<Value = Vec<(u32, u64)>> {
        let slot = prop_oneof![Just(0u32), 0..5u32, Just(0x1_0001), any::<u32>()];
        let page = prop_oneof![0..300u64, 0..1u64 << 22, any::<u64>()];
        let run = (slot, page, 1..9u64, prop_oneof![Just(1u64), 0..70u64]);
        let pages = |(slot, first, count, apart): (u32, u64, u64, u64)| {
            (0..count).map(move |i| (slot, first.wrapping_add(i * apart)))
        };
        vec(run, 0..24).prop_map(move |runs| runs.into_iter().flat_map(pages).collect())
    }

    /// Sets the bits of `entries`, as they are or as if all were of one slot, and compares.
    fn set_one_by_one(
        entries: &[(u32, u64)],
        is_of_one_slot: bool,
        table: &Table,
        shard: &ShardGuard<'_>,
        lookup: Lookup<'_>,
    ) -> Result<(), TestCaseError> {
        let mut setter = Setter::new(lookup);
        let (mut found, mut unknown, mut past) = (BTreeSet::new(), 0, 0);
        for block in entries.chunks(crate::ring::memory::BLOCK as usize) {
            let block: Vec<(u32, u64)> = match is_of_one_slot {
                true => block.iter().map(|&(_, page)| (block[0].0, page)).collect(),
                false => block.to_vec(),
            };
            let ring: Vec<Entry> = block.iter().map(|_| Entry::free()).collect();
            for (entry, &(slot, page)) in ring.iter().zip(&block) {
                entry.push(slot, page);
                match table.get(slot).map(|slot| slot.pages()) {
                    None => unknown += 1,
                    Some(pages) if page >= pages => past += 1,
                    Some(_) => drop(found.insert((slot, page))),
                }
            }
            setter.ask(&ring);
            setter.take(&ring);
            prop_assert!(ring.iter().all(Entry::awaits_reset));
        }
        let misses = setter.misses;
        prop_assert_eq!((misses.unknown_slot, misses.out_of_range), (unknown, past));
        let mut set = BTreeSet::new();
        for slot in table.slots() {
            let mut bits = PageBits::new(slot.pages()).unwrap();
            slot.take_shard_into(shard, &mut bits);
            let runs = bits.runs(0..bits.words().len()).flatten();
            set.extend(runs.map(|page| (slot.id().raw(), page)));
        }
        prop_assert_eq!(set, found);
        Ok(())
    }

    proptest! {
        /// Blocks, lines and words, compared with one entry at a time.
        #[test]
        fn bits_are_set_as_one_by_one(entries in entries(), has_spaces: bool, is_of_one_slot: bool) {
            let sizes: &[((u16, u16), u64)] = match has_spaces {
                true => &[((0, 0), 200), ((0, 1), 1 << 22), ((0, 3), 64), ((1, 1), 70)],
                false => &[((0, 0), 200), ((0, 1), 1 << 22), ((0, 3), 64)],
            };
            let check = |table: &Table, shard: &ShardGuard<'_>, lookup: Lookup<'_>| {
                set_one_by_one(&entries, is_of_one_slot, table, shard, lookup)
            };
            with_slots(sizes.iter().copied(), check)?;
        }
    }
}
