//! How a ring entry finds its bit: one table for each shard, made when slots change.

use core::mem::MaybeUninit;
use core::ptr::NonNull;

use crate::bitmap::pool::ShardGuard;
use crate::bitmap::words::BLOCK_WORDS;
use crate::prefetch;
use crate::ring::entry::Entry;
use crate::ring::memory::BLOCK;
use crate::slots::table::Table;
use crate::sync::{Plain, PlainU8, PlainU64};

/// Where one slot's bits of one shard are.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Target {
    words: NonNull<PlainU64>,
    touched: NonNull<PlainU8>,
    /// Zero where there is no slot, so that the check for the slot's end is the only one.
    pages: u64,
}

/// The targets of one shard.
pub(crate) struct Targets {
    /// Address space after address space, in each a power of two of ids; last, one that is none.
    targets: Box<[Target]>,
    /// How many bits of an id count, and the bits of a slot's number that no slot here has.
    id_bits: u32,
    foreign_bits: u32,
    /// Where bits go that have no place.
    nowhere: PlainU64,
}

// SAFETY: the pointers are to `Sync` memory that lives as long as the table they were made of.
unsafe impl Send for Targets {}
// SAFETY: as above.
unsafe impl Sync for Targets {}

impl Targets {
    /// Those of shard `shard` over the slots of `table`.
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
            nowhere: PlainU64::default(),
        }
    }

    /// Looks entries up, for the holder of the shard.
    pub(crate) fn lookup<'a>(&'a self, _held: &'a ShardGuard<'_>) -> Lookup<'a> {
        Lookup {
            targets: &self.targets,
            id_bits: self.id_bits,
            foreign_bits: self.foreign_bits,
            nowhere: &self.nowhere,
        }
    }
}

/// A table of targets in the hands of a pass.
#[derive(Clone, Copy)]
pub(crate) struct Lookup<'a> {
    targets: &'a [Target],
    id_bits: u32,
    foreign_bits: u32,
    nowhere: &'a PlainU64,
}

/// Entries that have no bit, by reason.
#[derive(Default)]
pub(crate) struct Misses {
    pub(crate) unknown_slot: u64,
    pub(crate) out_of_range: u64,
}

/// One bit to be set.
#[derive(Clone, Copy)]
struct Hit<'a> {
    word: &'a PlainU64,
    mask: u64,
}

/// The bits that a pass is about to set.
///
/// The bits of a block of entries are all looked up, and their memory asked for, before the first
/// of them is set; and they are set only when the next block's are looked up. So while one waits
/// for its memory, the others' is on its way.
pub(crate) struct Setter<'a> {
    lookup: Lookup<'a>,
    /// Two blocks in turn: one looked up, one to be set.
    hits: [[MaybeUninit<Hit<'a>>; BLOCK as usize]; 2],
    /// Which of them was looked up last, and how many it has.
    last: usize,
    len: usize,
    pub(crate) misses: Misses,
}

impl<'a> Setter<'a> {
    pub(crate) fn new(lookup: Lookup<'a>) -> Self {
        Self {
            lookup,
            hits: [[MaybeUninit::uninit(); BLOCK as usize]; 2],
            last: 0,
            len: 0,
            misses: Misses::default(),
        }
    }

    /// Looks up the bits of a block of dirty entries, at most [`BLOCK`], marks the entries for
    /// reset, and sets the bits of the block before.
    #[inline(always)]
    pub(crate) fn take(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else {
            return;
        };
        let next = 1 - self.last;
        let (lookup, hits, misses) = (self.lookup, &mut self.hits[next], &mut self.misses);
        let (slot, _) = first.payload();
        // Most blocks are of one slot, which then is looked up once. For the others no branch
        // depends on the slot: a cache of the last one would cost more by its misses than it saves.
        if entries.iter().all(|entry| entry.payload().0 == slot) {
            let target = *lookup.target(slot);
            for (entry, hit) in entries.iter().zip(hits) {
                hit.write(lookup.hit(&target, entry.payload().1, misses));
                // Only now: from here on the kernel may overwrite the payload.
                entry.mark_reset();
            }
        } else {
            for (entry, hit) in entries.iter().zip(hits) {
                let (slot, page) = entry.payload();
                hit.write(lookup.hit(lookup.target(slot), page, misses));
                // As above.
                entry.mark_reset();
            }
        }
        self.set();
        (self.last, self.len) = (next, entries.len());
    }

    /// Sets the bits that were looked up last, and forgets them.
    #[inline(always)]
    pub(crate) fn set(&mut self) {
        let mut word = self.lookup.nowhere;
        let mut mask = 0;
        for hit in &self.hits[self.last][..core::mem::take(&mut self.len)] {
            // SAFETY: `take` has written the first `len` of the block it looked up last.
            let hit = unsafe { hit.assume_init() };
            // Neighbours in one word are stored together: each store would wait for the one before.
            if !core::ptr::eq(word, hit.word) {
                word.store(word.load() | mask);
                word = hit.word;
                mask = 0;
            }
            mask |= hit.mask;
        }
        word.store(word.load() | mask);
    }
}

impl<'a> Lookup<'a> {
    /// Where the bits of the slot are that KVM calls `slot`.
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

    /// The bit of page `page`, asked for, and its block flagged as touched.
    #[inline(always)]
    fn hit(self, target: &Target, page: u64, misses: &mut Misses) -> Hit<'a> {
        if page >= target.pages {
            return self.miss(target, misses);
        }
        let word = (page / 64) as usize;
        // SAFETY: `page` is in the slot, whose shard has a word for each 64 pages and a flag for
        // each block of words; both live as long as the table (see `Targets::new`).
        let (word, touched) = unsafe {
            (
                target.words.add(word).as_ref(),
                target.touched.add(word / BLOCK_WORDS).as_ref(),
            )
        };
        prefetch::for_write(word);
        touched.store(1);
        Hit {
            word,
            mask: 1 << (page % 64),
        }
    }

    #[cold]
    fn miss(self, target: &Target, misses: &mut Misses) -> Hit<'a> {
        if target.pages == 0 {
            misses.unknown_slot += 1;
        } else {
            misses.out_of_range += 1;
        }
        Hit {
            word: self.nowhere,
            mask: 0,
        }
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::*;
    use crate::slot_id::SlotId;

    /// The flat table against the tree that it is made of, for every number a slot can have.
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
            let mut table = Table::default();
            for (pages, &(space, id)) in (1..).zip(ids) {
                table.add(SlotId::new(space, id), pages, None, 1).unwrap();
            }
            // SAFETY: the table lives to the end of the loop's body.
            let targets = unsafe { Targets::new(&table, 0) };
            let pool = crate::bitmap::pool::ShardPool::new(1);
            let shard = pool.acquire(0);
            let lookup = targets.lookup(&shard);
            for raw in (0..0x4_0000).chain((0..=u32::MAX).step_by(0xfff1)) {
                let expected = table.get(raw).map_or(0, |slot| slot.pages());
                assert_eq!(lookup.target(raw).pages, expected, "slot {raw:#x}");
            }
        }
    }
}
