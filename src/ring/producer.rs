// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's side of a ring, over ordinary memory, for the simulated kernel and the models.

use super::entry::Entry;
use super::memory::RingMemory;
use crate::sync::{Arc, AtomicU32, Ordering};

/// The kernel's state of one ring: `struct kvm_dirty_ring` in the kernel's include/linux/kvm_dirty_ring.h.
pub(crate) struct Producer {
    entries: Arc<[Entry]>,
    /// The index of the next push; written by the vCPU only.
    dirty_index: AtomicU32,
    /// The first entry not yet recycled; written by the reset only.
    reset_index: AtomicU32,
    first_index: u32,
}

impl Producer {
    /// Creates a ring of `entries` (a power of two) whose indices start at `first_index`. Values other than zero reach their wrap at
    /// 2^32.
    pub(crate) fn new(entries: u32, first_index: u32) -> Self {
        Self {
            entries: (0..entries).map(|_| Entry::free()).collect(),
            dirty_index: AtomicU32::new(first_index),
            reset_index: AtomicU32::new(first_index),
            first_index,
        }
    }

    /// Returns the same memory as userspace maps it.
    pub(crate) fn memory(&self) -> RingMemory {
        RingMemory::shared(Arc::clone(&self.entries), self.first_index)
    }

    fn at(&self, index: u32) -> &Entry {
        &self.entries[index as usize & (self.entries.len() - 1)]
    }

    /// Returns the entries pushed and not yet recycled, which the kernel compares with the soft limit.
    pub(crate) fn used(&self) -> u32 {
        // Relaxed, both: `kvm_dirty_ring_used` reads them so too; a stale reset index only makes
        // the ring look fuller.
        self.dirty_index
            .load(Ordering::Relaxed)
            .wrapping_sub(self.reset_index.load(Ordering::Relaxed))
    }

    /// `kvm_dirty_ring_push`, which checks for room no more than the kernel does.
    pub(crate) fn push(&self, slot: u32, offset: u64) {
        // Relaxed: only the vCPU writes this index.
        let index = self.dirty_index.load(Ordering::Relaxed);
        self.at(index).push(slot, offset);
        // Relaxed: the entry's flags publish the push, not the index.
        self.dirty_index
            .store(index.wrapping_add(1), Ordering::Relaxed);
    }

    /// Returns whether entries are harvested and not recycled.
    pub(crate) fn awaits_reset(&self) -> bool {
        // Relaxed: as in `recycle`.
        self.at(self.reset_index.load(Ordering::Relaxed))
            .awaits_reset()
    }

    /// The loop of `kvm_dirty_ring_reset`: frees harvested entries in ring order, at most `limit`, and passes each payload to `each`.
    /// Returns how many there were.
    pub(crate) fn recycle(&self, limit: u32, mut each: impl FnMut(u32, u64)) -> u32 {
        // Relaxed: only the reset, which its callers serialise, writes this index.
        let mut index = self.reset_index.load(Ordering::Relaxed);
        let mut recycled = 0;
        while recycled < limit {
            let Some((slot, offset)) = self.at(index).recycle() else {
                break;
            };
            each(slot, offset);
            index = index.wrapping_add(1);
            recycled += 1;
        }
        self.reset_index.store(index, Ordering::Relaxed);
        recycled
    }
}
