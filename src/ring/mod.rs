//! The ring of dirtied pages that one vCPU shares with userspace.
//!
//! The kernel produces, one consumer at a time harvests. [`Entry`] holds every memory ordering of
//! the protocol; [`RingView`] is the consumer with its cached index.

mod entry;
mod memory;
#[cfg(any(test, feature = "test-utils"))]
pub(crate) mod producer;

use crate::prefetch;
pub use entry::Entry;
use memory::LINE;
pub use memory::RingMemory;

/// The consumer of one ring.
///
/// There is one for each ring: harvesting takes `&mut self`. The index of the next entry is cached
/// here, for the kernel tells nobody its own; that an entry is dirty is read off the entry.
#[derive(Debug)]
pub struct RingView {
    memory: RingMemory,
    /// Index of the next entry to harvest. Wraps at 2^32, as the kernel's do.
    head: u32,
}

impl RingView {
    /// A consumer that starts at the ring's first entry.
    pub fn new(memory: RingMemory) -> Self {
        Self {
            head: memory.first_index(),
            memory,
        }
    }

    /// Size of the ring, in entries.
    pub fn entries(&self) -> u32 {
        self.memory.entries()
    }

    /// Takes dirty entries in ring order, at most `limit`, hands each payload (memslot with the
    /// address space in the upper 16 bits, page inside the memslot) to `take`, and marks it for the
    /// next reset. Returns how many entries there were; fewer than `limit` if the ring is empty now.
    ///
    /// Nothing about a payload is checked: it is what the ring holds.
    #[inline(always)]
    pub fn harvest(&mut self, limit: u32, mut take: impl FnMut(u32, u64)) -> u32 {
        // If the last entry of the next stretch is dirty, all of it is: the kernel pushes in order.
        // Then its lines may be asked for early without taking any from the vCPU that still fills
        // them, but for the one looked at.
        let ahead = self.head.wrapping_add(limit);
        let more =
            limit < self.entries() / 2 && self.memory.at(ahead.wrapping_add(limit - 1)).is_dirty();
        let mut taken = 0;
        while taken < limit {
            if more {
                prefetch::for_write(self.memory.at(ahead.wrapping_add(taken)));
            }
            if self.head % LINE == 0 && limit - taken >= LINE && self.entries() >= LINE {
                let line = self.memory.line(self.head);
                if line.iter().all(Entry::is_dirty) {
                    for entry in line {
                        let (slot, page) = entry.payload();
                        take(slot, page);
                        // Only now: from here on the kernel may overwrite the payload.
                        entry.mark_reset();
                    }
                    self.head = self.head.wrapping_add(LINE);
                    taken += LINE;
                    continue;
                }
            }
            let entry = self.memory.at(self.head);
            if !entry.is_dirty() {
                break;
            }
            let (slot, page) = entry.payload();
            take(slot, page);
            entry.mark_reset();
            self.head = self.head.wrapping_add(1);
            taken += 1;
        }
        taken
    }

    /// Whether the kernel has filled the ring to the last entry, which its reserve forbids: then it
    /// may have overwritten entries, too.
    ///
    /// The entry behind the head was harvested a whole ring ago. If it is dirty again, the kernel's
    /// write index is at least a ring ahead of ours, and so of its own reset index.
    pub(crate) fn is_overrun(&self) -> bool {
        self.memory.at(self.head.wrapping_sub(1)).is_dirty()
    }

    /// Whether the kernel has recycled everything that was harvested.
    ///
    /// It recycles in ring order, so the last harvested entry tells for all of them.
    pub(crate) fn all_recycled(&self) -> bool {
        !self.memory.at(self.head.wrapping_sub(1)).awaits_reset()
    }

    /// Joins the consumer to the kernel again after the kernel overran the ring, and returns how
    /// many entries were passed over: zero where there was no gap.
    ///
    /// An overrun leaves the kernel's write index further along than the consumer can follow: the
    /// entry at the head stays free, entries behind it are dirty. The gap is marked for reset, so
    /// that the kernel's reset index crosses it too. Its payloads are old and name pages that are
    /// merely protected once more.
    pub(crate) fn rejoin(&mut self) -> u32 {
        let is_dirty = |ahead: u32| self.memory.at(self.head.wrapping_add(ahead)).is_dirty();
        let Some(gap) = (1..self.entries()).find(|&ahead| is_dirty(ahead)) else {
            return 0;
        };
        // The kernel pushes in order. Had it pushed at the head while we looked, the entry found
        // would have been pushed later still, and the head would show it now.
        if is_dirty(0) {
            return 0;
        }
        // The write index is beyond the dirty entry found: nothing past it is marked.
        for _ in 0..gap {
            self.memory.at(self.head).mark_reset();
            self.head = self.head.wrapping_add(1);
        }
        gap
    }
}
