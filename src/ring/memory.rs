// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory of a ring, and its lifetime.

use core::any::Any;
use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;

use super::entry::Entry;
use crate::sync::{Arc, AtomicBool, Ordering};

/// Entries that are harvested at once: a block of 1 KiB, or the whole ring if it is smaller.
pub(crate) const BLOCK: u32 = 64;

/// The memory of one ring, with its owner, which keeps it alive: a mapping of a vCPU's file descriptor, or the simulated kernel's
/// memory.
pub struct RingMemory {
    start: NonNull<Entry>,
    entries: u32,
    first_index: u32,
    /// A name that no other ring of the VM has.
    name: String,
    /// Whether the kernel has overrun it.
    broken: Arc<AtomicBool>,
    /// Dropped last, with the memory.
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the memory is shared with the kernel in the first place; every access goes through the
// atomics in `Entry`, and the owner is `Send` itself.
unsafe impl Send for RingMemory {}
// SAFETY: as above; `&RingMemory` gives out only `&Entry`, which is `Sync`.
unsafe impl Sync for RingMemory {}

impl RingMemory {
    /// Creates the ring of `entries` entries (a power of two) that starts at `start`.
    ///
    /// # Safety
    /// For as long as `owner` lives, `start` must point to `entries` initialised entries, aligned
    /// for [`Entry`], that are accessed only through `Entry`'s atomics, or as the kernel does.
    ///
    /// # Panics
    /// If `entries` is not a power of two.
    pub unsafe fn new(
        start: NonNull<Entry>,
        entries: u32,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Self {
        assert!(
            entries.is_power_of_two(),
            "a ring of {entries} entries: not a power of two"
        );
        Self {
            start,
            entries,
            first_index: 0,
            name: format!("{start:p}"),
            broken: Arc::new(AtomicBool::new(false)),
            owner: owner.into(),
        }
    }

    /// Creates a ring in ordinary memory, which a simulated kernel may share. Indices start at `first_index`.
    pub(crate) fn shared(memory: crate::sync::Arc<[Entry]>, first_index: u32) -> Self {
        let start = NonNull::from(&memory[..]).cast();
        let entries = memory.len() as u32;
        // SAFETY: the owner is the shared slice itself, which only `Entry`'s methods access.
        let ring = unsafe { Self::new(start, entries, Box::new(memory)) };
        Self {
            first_index,
            ..ring
        }
    }

    /// Returns another handle to the same ring.
    pub(crate) fn share(&self) -> Self {
        Self {
            name: self.name.clone(),
            broken: Arc::clone(&self.broken),
            owner: Arc::clone(&self.owner),
            ..*self
        }
    }

    /// Gives the ring a name that no other ring of its VM has, in place of its address.
    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn named(self, name: String) -> Self {
        Self { name, ..self }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Returns the size of the ring, in entries.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Returns the index at which both sides start: zero for every real ring.
    pub(crate) fn first_index(&self) -> u32 {
        self.first_index
    }

    /// Notes that the kernel has overrun the ring, or may have. This holds for good, as neither side can find the other's index any
    /// more. Returns false if it was noted before.
    pub(crate) fn note_broken(&self) -> bool {
        // Relaxed: the lock of the reset gate orders it before the reset that recycles what was overrun. So other threads see it before
        // they see entries free, which they read first.
        !self.broken.swap(true, Ordering::Relaxed)
    }

    pub(crate) fn is_broken(&self) -> bool {
        // Relaxed: as above.
        self.broken.load(Ordering::Relaxed)
    }

    /// Returns its entries in blocks.
    #[inline(always)]
    pub(crate) fn blocks(&self) -> Blocks<'_> {
        Blocks {
            start: self.start,
            entries: self.entries,
            ring: PhantomData,
        }
    }

    /// Returns the entry at `index`, which counts on for ever and wraps at 2^32.
    #[inline(always)]
    pub(crate) fn at(&self, index: u32) -> &Entry {
        // `entries` is a power of two, so the mask keeps the position inside the ring, and stays
        // in step where the index wraps.
        let position = index & (self.entries - 1);
        // SAFETY: position < entries, and `new`'s caller promised that many for `self`'s life.
        unsafe { self.start.add(position as usize).as_ref() }
    }
}

/// The place of a ring's blocks: a copy of what is needed to find them. Compilers see that no store to an entry can
/// change it.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<'a> {
    start: NonNull<Entry>,
    entries: u32,
    ring: PhantomData<&'a RingMemory>,
}

impl<'a> Blocks<'a> {
    /// Returns the entries from `index` to the end of its block: at least one, side by side.
    #[inline(always)]
    pub(crate) fn from(self, index: u32) -> &'a [Entry] {
        let position = index & (self.entries - 1);
        let block = self.entries.min(BLOCK);
        let len = block - (position & (block - 1));
        // SAFETY: both `entries` and `block` are powers of two, so no block reaches beyond the
        // ring's end; the caller of `RingMemory::new` promised `entries` entries for the ring's life.
        unsafe {
            let first = self.start.add(position as usize);
            core::slice::from_raw_parts(first.as_ptr(), len as usize)
        }
    }
}

impl fmt::Debug for RingMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingMemory")
            .field("entries", &self.entries)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::super::producer::Producer;

    #[test]
    fn a_shared_ring_is_the_same_ring() {
        let producer = Producer::new(8, 3);
        let ring = producer.memory().named("vCPU 1".to_owned());
        let other = ring.share();
        assert!(core::ptr::eq(ring.at(5), other.at(5)));
        assert_eq!(other.name(), "vCPU 1");
        assert_eq!((other.entries(), other.first_index()), (8, 3));
        assert_eq!(format!("{other:?}"), "RingMemory { entries: 8, .. }");
        assert_ne!(
            producer.memory().name(),
            Producer::new(8, 3).memory().name()
        );
    }
}
