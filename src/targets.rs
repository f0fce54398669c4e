//! How a ring entry finds its bit: one table for each shard, made when slots change.

use core::mem::MaybeUninit;
use core::ptr::NonNull;

use crate::bitmap::pool::ShardGuard;
use crate::bitmap::words::BLOCK_WORDS;
use crate::memslots::Table;
use crate::sync::{PlainU8, PlainU64};

/// Where one slot's bits of one shard are.
#[derive(Clone, Copy)]
struct Target {
    words: NonNull<PlainU64>,
    touched: NonNull<PlainU8>,
    /// Zero where there is no slot, so that the check for the slot's end is the only one.
    pages: u64,
}

/// The targets of one shard, by address space and id. Lookup is two loads and two comparisons that
/// always come out the same: no cache of the last slot, whose misses would cost more.
pub(crate) struct Targets {
    spaces: Vec<Vec<Target>>,
}

// SAFETY: the pointers are to `Sync` memory that lives as long as the table they were made of.
unsafe impl Send for Targets {}
// SAFETY: as above.
unsafe impl Sync for Targets {}

/// One bit to be set.
#[derive(Clone, Copy)]
pub(crate) struct Hit<'a> {
    word: &'a PlainU64,
    mask: u64,
}

/// Why an entry has no bit.
pub(crate) enum Miss {
    UnknownSlot,
    OutOfRange,
}

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
        let mut spaces = Vec::<Vec<Target>>::new();
        for slot in table.slots() {
            let (space, id) = (slot.id().address_space(), usize::from(slot.id().id()));
            spaces.resize_with(spaces.len().max(usize::from(space) + 1), Vec::new);
            let space = &mut spaces[usize::from(space)];
            space.resize(space.len().max(id + 1), none);
            let bits = slot.shard_bits(shard);
            let (words, touched) = bits.parts();
            space[id] = Target {
                words: NonNull::from(words).cast(),
                touched: NonNull::from(touched).cast(),
                pages: slot.pages(),
            };
        }
        Self { spaces }
    }

    /// The bit of page `page` of the slot that KVM calls `slot`, its block flagged as touched.
    ///
    /// The caller holds the shard; the bit is not set yet.
    #[inline(always)]
    pub(crate) fn hit<'a>(
        &'a self,
        _held: &'a ShardGuard<'_>,
        slot: u32,
        page: u64,
    ) -> Result<Hit<'a>, Miss> {
        let space = self.spaces.get((slot >> 16) as usize);
        let target = space.and_then(|space| space.get((slot & 0xffff) as usize));
        let Some(target) = target else {
            return Err(Miss::UnknownSlot);
        };
        if page >= target.pages {
            return Err(match target.pages {
                0 => Miss::UnknownSlot,
                _ => Miss::OutOfRange,
            });
        }
        let word = (page / 64) as usize;
        // SAFETY: `page` is in the slot, whose shard has a word for each 64 pages and a flag for
        // each block of words; both live as long as the table (see `new`).
        let (word, touched) = unsafe {
            (
                target.words.add(word).as_ref(),
                target.touched.add(word / BLOCK_WORDS).as_ref(),
            )
        };
        touched.store(1);
        Ok(Hit {
            word,
            mask: 1 << (page % 64),
        })
    }
}

/// Entries that are looked up before the first of their bits is set: while one waits for its
/// memory, the others' is on its way.
pub(crate) const STRETCH: usize = 64;

/// A stretch of bits to be set.
pub(crate) struct Stretch<'a> {
    hits: [MaybeUninit<Hit<'a>>; STRETCH],
    /// So many of them are there.
    len: usize,
}

impl<'a> Stretch<'a> {
    pub(crate) fn new() -> Self {
        Self {
            hits: [MaybeUninit::uninit(); STRETCH],
            len: 0,
        }
    }

    /// Adds a bit, of which there are at most [`STRETCH`] between two calls of `set_all`, and asks
    /// for its memory.
    #[inline(always)]
    pub(crate) fn push(&mut self, hit: Hit<'a>) {
        crate::prefetch::for_write(hit.word);
        self.hits[self.len] = MaybeUninit::new(hit);
        self.len += 1;
    }

    /// Sets all bits, and forgets them.
    #[inline(always)]
    pub(crate) fn set_all(&mut self) {
        for hit in &self.hits[..core::mem::take(&mut self.len)] {
            // SAFETY: `push` has written the first `len`.
            let hit = unsafe { hit.assume_init() };
            hit.word.store(hit.word.load() | hit.mask);
        }
    }
}
