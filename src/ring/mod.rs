//! The ring of dirtied pages that one vCPU shares with userspace.
//!
//! The kernel produces, one consumer at a time harvests. [`Entry`] holds every memory ordering of
//! the protocol; [`RingView`] is the consumer with its cached index.

use crate::prefetch;

mod entry;
mod memory;
#[cfg(any(test, feature = "test-utils"))]
pub(crate) mod producer;

pub use entry::Entry;
pub(crate) use memory::BLOCK;
pub use memory::RingMemory;

/// Entries in a cache line of 64 bytes.
const LINE: usize = 4;

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

    /// Takes every dirty entry in ring order, hands its payload (memslot with the address space in
    /// the upper 16 bits, page inside the memslot) to `take`, and marks it for the next reset.
    /// Returns how many entries there were, at most a whole ring of them.
    ///
    /// Nothing about a payload is checked: it is what the ring holds.
    pub fn harvest(&mut self, mut take: impl FnMut(u32, u64)) -> u32 {
        self.harvest_blocks(|entries| {
            for entry in entries {
                let (slot, page) = entry.payload();
                take(slot, page);
                // Only now: from here on the kernel may overwrite the payload.
                entry.mark_reset();
            }
        })
    }

    /// As [`harvest`](Self::harvest), in blocks of up to [`BLOCK`] entries side by side: `take`
    /// has to read the payload of each entry and then mark it for reset.
    #[inline(always)]
    pub(crate) fn harvest_blocks(&mut self, mut take: impl FnMut(&[Entry])) -> u32 {
        let mut taken = 0;
        while taken < self.entries() {
            let block = self.memory.block_from(self.head);
            // The kernel pushes in order, so what is between two dirty entries of a lap is dirty.
            // The acquire load of the last one's flags orders the payloads of all.
            let whole = block[0].is_dirty() && block[block.len() - 1].is_dirty();
            let dirty = if whole {
                self.prefetch_block(self.head.wrapping_add(block.len() as u32));
                block
            } else {
                let count = block.iter().take_while(|entry| entry.is_dirty()).count();
                &block[..count]
            };
            take(dirty);
            self.head = self.head.wrapping_add(dirty.len() as u32);
            taken += dirty.len() as u32;
            if !whole {
                break;
            }
        }
        taken
    }

    /// Asks for the lines of the block at `index` early, if it is complete: the vCPU loses no line
    /// that it has yet to fill, but for the one looked at.
    #[inline(always)]
    fn prefetch_block(&self, index: u32) {
        let block = self.memory.block_from(index);
        if block[block.len() - 1].is_dirty() {
            for entry in block.iter().step_by(LINE) {
                prefetch::for_write(entry);
            }
        }
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
