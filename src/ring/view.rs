// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The consumer of one ring: harvest, and the indices.

use super::entry::Entry;
use super::gauge::Gauge;
use super::memory::{Blocks, RingMemory};
use super::reserve::half_reserve;
use crate::kernel::RESERVED_ENTRIES;
use crate::prefetch;

/// Entries in a cache line of 64 bytes.
pub(crate) const LINE: usize = 4;

/// The treatment of entries that are harvested.
pub(crate) trait Take {
    /// Reads the payload of each of these dirty entries, and then marks it for reset.
    fn take(&mut self, entries: &[Entry]);

    /// Prefetches the memory for these dirty entries, which are taken next.
    fn ask(&mut self, entries: &[Entry]);
}

impl<F: FnMut(&[Entry])> Take for F {
    fn take(&mut self, entries: &[Entry]) {
        self(entries);
    }

    fn ask(&mut self, _: &[Entry]) {}
}

/// The consumer of one ring.
///
/// Each ring has one: harvesting takes `&mut self`. It caches the index of the next entry, as the kernel does not publish its
/// own; an entry's flags show whether it is dirty.
#[derive(Debug)]
pub struct RingView {
    pub(super) memory: RingMemory,
    /// Index of the next entry to harvest. Wraps at 2^32, as the kernel's do.
    pub(super) head: u32,
    /// The kernel's reset index, at the first entry that waits for its reset, as of the last look.
    pub(super) reset_index: u32,
    /// Half of the kernel's reserve.
    pub(super) half_reserve: u32,
}

impl RingView {
    /// Creates a consumer that starts at the ring's first entry.
    pub fn new(memory: RingMemory) -> Self {
        Self::with_reserve(memory, RESERVED_ENTRIES)
    }

    /// The same, for a kernel that stops a vCPU `reserved` entries before its ring's end.
    pub(crate) fn with_reserve(memory: RingMemory, reserved: u32) -> Self {
        Self {
            half_reserve: half_reserve(reserved, memory.entries()),
            head: memory.first_index(),
            reset_index: memory.first_index(),
            memory,
        }
    }

    /// Returns whether a harvest has found that the kernel has overrun the ring, or may have.
    ///
    /// Entries are lost then, and more may be.
    pub fn is_broken(&self) -> bool {
        self.memory.is_broken()
    }

    /// Returns the size of the ring, in entries.
    pub fn entries(&self) -> u32 {
        self.memory.entries()
    }

    /// Returns whether at least `count` entries wait to be harvested. It costs one load.
    pub fn at_least(&self, count: u32) -> bool {
        Gauge::new(&self.memory, self.head).at_least(count)
    }

    /// Returns how many entries wait to be harvested.
    ///
    /// It costs one load per bit of the ring's size, or one load if the ring is empty. The vCPU may log more
    /// meanwhile.
    pub fn occupancy(&self) -> u32 {
        Gauge::new(&self.memory, self.head).occupancy()
    }

    /// Takes every dirty entry in ring order: passes its payload to `take`, and marks it for the next reset.
    ///
    /// Returns the number of entries.
    ///
    /// The payload is the memslot, with the address space in the upper 16 bits, and the page inside the memslot. It is unchecked: the
    /// content of the ring. If the kernel has overrun the ring, the harvest takes a whole ring, or up to a block more.
    pub fn harvest(&mut self, mut take: impl FnMut(u32, u64)) -> u32 {
        let mut each = |entries: &[Entry]| {
            for entry in entries {
                let (slot, page) = entry.payload();
                take(slot, page);
                // Only now: from here on the kernel may overwrite the payload.
                entry.mark_reset();
            }
        };
        self.harvest_blocks(&mut each).0
    }

    /// As [`harvest`](Self::harvest), in blocks of up to [`BLOCK`] entries side by side. Also returns whether this harvest has
    /// found the ring broken; nothing may be reset meanwhile.
    ///
    /// [`BLOCK`]: super::memory::BLOCK
    #[inline(always)]
    pub(crate) fn harvest_blocks(&mut self, taker: &mut impl Take) -> (u32, bool) {
        // Before anything moves the head.
        let mut overrun = self.is_filled_to_its_end();
        self.follow_reset_index();
        let taken = take_blocks(self.memory.blocks(), self.head, self.entries(), taker);
        self.head = self.head.wrapping_add(taken);
        // A kernel that keeps its reserve never lets a whole ring wait, taken now or before. So it has overrun the ring, maybe during
        // this harvest.
        overrun |= self.all_wait();
        // Entries behind a gap must come with this harvest, which may be the last.
        overrun |= self.has_gap();
        (taken, overrun && self.memory.note_broken())
    }

    /// Follows the kernel's reset index. Entries between it and the head wait for their reset; the others were recycled, and maybe
    /// filled again.
    pub(super) fn follow_reset_index(&mut self) {
        if self.all_recycled() {
            self.reset_index = self.head;
        }
        while self.reset_index != self.head && !self.memory.at(self.reset_index).awaits_reset() {
            self.reset_index = self.reset_index.wrapping_add(1);
        }
    }

    /// Returns whether the kernel has recycled everything that was harvested.
    ///
    /// It recycles in ring order, so the last harvested entry stands for all of them.
    pub(crate) fn all_recycled(&self) -> bool {
        !self.memory.at(self.head.wrapping_sub(1)).awaits_reset()
    }

    /// Returns the kernel's reset index, as far as entries show it.
    pub(crate) fn reset_index(&mut self) -> u32 {
        self.follow_reset_index();
        self.reset_index
    }

    /// Returns whether no entry at all waits for a reset, wherever another program may have left the indices. If so, no reset will ever
    /// recycle what was harvested so far. It looks at every entry.
    pub(crate) fn nothing_awaits_reset(&self) -> bool {
        (0..self.entries()).all(|index| !self.memory.at(index).awaits_reset())
    }

    /// Returns whether an entry of a memslot waits for a reset that names its page `first` or one after it, wherever another program
    /// may have left the indices. It looks at every entry.
    pub(crate) fn awaits_reset_of(&self, slot: u32, first: u64) -> bool {
        let mut named = self.awaiting_reset();
        named.any(|(named, page)| named == slot && page >= first)
    }

    /// Returns slot and page of all entries that wait for a reset, wherever another program may have left the indices. It looks at
    /// every entry.
    pub(crate) fn awaiting_reset(&self) -> impl Iterator<Item = (u32, u64)> {
        let entries = (0..self.entries()).map(|index| self.memory.at(index));
        // The vCPU may be filling the payload of any other entry.
        let waiting = entries.filter(|entry| entry.awaits_reset());
        waiting.map(Entry::payload)
    }

    /// Returns slot and page of the entries harvested last, the latest first: of as many as a vCPU that leaves half of the reserve
    /// free does not come round to. Nothing may be harvested meanwhile.
    pub(crate) fn last(&self) -> impl ExactSizeIterator<Item = (u32, u64)> {
        let before = |back| self.memory.at(self.head.wrapping_sub(back + 1));
        (0..self.half_reserve).map(move |back| before(back).payload())
    }
}

/// Takes dirty entries from `head` on, at most `most`, or up to a block more. Returns how many.
#[inline(always)]
fn take_blocks(blocks: Blocks<'_>, head: u32, most: u32, taker: &mut impl Take) -> u32 {
    let mut taken = 0;
    let mut block = blocks.from(head);
    if is_whole(block) {
        prefetch_lines(block);
        taker.ask(block);
    }
    while taken < most {
        if !is_whole(block) {
            let count = block.iter().take_while(|entry| entry.is_dirty()).count();
            taker.take(&block[..count]);
            return taken + count as u32;
        }
        // The next block is passed to `ask`, and the one after it prefetched, as far as they are complete. So the vCPU loses no line that
        // it has yet to fill, except those that are checked. Where the ring has few blocks, they are some that were taken, which
        // are not dirty, or this one.
        let index = head.wrapping_add(taken + block.len() as u32);
        let next = blocks.from(index);
        if is_whole(next) {
            let after = blocks.from(index.wrapping_add(next.len() as u32));
            if is_whole(after) {
                prefetch_lines(after);
            }
            taker.ask(next);
        }
        taker.take(block);
        taken += block.len() as u32;
        block = next;
    }
    taken
}

/// Whether every entry of the block is dirty. The kernel pushes in order, so entries between two dirty ones of a lap are dirty, too;
/// and the acquire load of the last one's flags orders the payloads of all.
#[inline(always)]
fn is_whole(block: &[Entry]) -> bool {
    block[0].is_dirty() && block[block.len() - 1].is_dirty()
}

#[inline(always)]
fn prefetch_lines(entries: &[Entry]) {
    // Four at a time, so that a block takes few steps.
    let groups = entries.chunks_exact(4 * LINE);
    let rest = groups.remainder();
    for group in groups {
        for line in 0..4 {
            prefetch::for_write(&group[line * LINE]);
        }
    }
    for entry in rest.iter().step_by(LINE) {
        prefetch::for_write(entry);
    }
}

#[cfg(all(test, not(feature = "modelled")))]
pub(super) mod tests {
    use super::super::memory::BLOCK;
    use super::super::producer::Producer;
    use super::*;

    pub(in crate::ring) const ENTRIES: u32 = 8;

    pub(in crate::ring) fn ring(first_index: u32) -> (Producer, RingView) {
        let producer = Producer::new(ENTRIES, first_index);
        let view = RingView::new(producer.memory());
        (producer, view)
    }

    pub(in crate::ring) fn push(producer: &Producer, pages: core::ops::Range<u64>) {
        for page in pages {
            producer.push(5, page);
        }
    }

    pub(in crate::ring) fn harvest(view: &mut RingView) -> Vec<u64> {
        let mut pages = Vec::new();
        let taken = view.harvest(|slot, page| {
            assert_eq!(slot, 5);
            pages.push(page);
        });
        assert_eq!(taken as usize, pages.len());
        pages
    }

    pub(in crate::ring) fn recycle(producer: &Producer) -> Vec<u64> {
        let mut pages = Vec::new();
        let recycled = producer.recycle(u32::MAX, |_, page| pages.push(page));
        assert_eq!(recycled as usize, pages.len());
        pages
    }

    #[test]
    fn a_harvest_takes_what_is_dirty_in_order() {
        let (producer, mut view) = ring(0);
        assert_eq!(harvest(&mut view), [0u64; 0]);
        push(&producer, 0..3);
        assert_eq!(harvest(&mut view), [0, 1, 2]);
        // They wait for their reset, and are not taken twice.
        assert_eq!(harvest(&mut view), [0u64; 0]);
        push(&producer, 3..5);
        assert_eq!(harvest(&mut view), [3, 4]);
        assert_eq!(recycle(&producer), [0, 1, 2, 3, 4]);
        assert_eq!(harvest(&mut view), [0u64; 0]);
    }

    #[test]
    fn payloads_are_handed_over_whole() {
        let (producer, mut view) = ring(0);
        producer.push(0xffff_0001, u64::MAX);
        let mut seen = None;
        view.harvest(|slot, page| seen = Some((slot, page)));
        assert_eq!(seen, Some((0xffff_0001, u64::MAX)));
    }

    #[test]
    fn indices_wrap() {
        for before in 0..20 {
            let (producer, mut view) = ring(u32::MAX - before);
            for round in 0..10 {
                let pages = round * 5..round * 5 + 5;
                push(&producer, pages.clone());
                assert_eq!(producer.used(), 5);
                assert!(harvest(&mut view).into_iter().eq(pages.clone()));
                assert_eq!(view.reset_index(), view.head.wrapping_sub(5));
                assert!(recycle(&producer).into_iter().eq(pages));
                assert_eq!(view.reset_index(), view.head);
            }
        }
    }

    /// Blocks of 64: every place of the head in its block, every length, over the ring's end and the
    /// index's wrap.
    #[test]
    fn harvests_begin_and_end_anywhere() {
        for entries in [64, 128, 256] {
            for first_index in (0..70).chain(u32::MAX - 70..=u32::MAX) {
                let producer = Producer::new(entries, first_index);
                let mut view = RingView::new(producer.memory());
                let mut next = 0;
                for count in [1, 2, 3, 5, 61, 62, 63, 64, 65, 127, 130, 200, 255] {
                    let count = count.min(u64::from(entries) - 1);
                    push(&producer, next..next + count);
                    assert!(harvest(&mut view).into_iter().eq(next..next + count));
                    assert!(harvest(&mut view).is_empty());
                    assert!(recycle(&producer).into_iter().eq(next..next + count));
                    next += count;
                }
                assert!(!view.memory.is_broken());
            }
        }
    }

    #[test]
    fn a_harvest_ends_even_if_the_kernel_never_stops() {
        // Two blocks, and a page pushed for each that is taken: behind the head, all is dirty again.
        let producer = Producer::new(2 * BLOCK, 0);
        let mut view = RingView::new(producer.memory());
        push(&producer, 0..2 * u64::from(BLOCK) - 1);
        let (taken, breaks) = view.harvest_blocks(&mut |entries: &[Entry]| {
            for entry in entries {
                producer.push(5, 0);
                entry.mark_reset();
            }
        });
        assert_eq!(taken, 2 * BLOCK);
        assert!(breaks && view.memory.is_broken(), "not seen");
    }

    #[test]
    fn the_last_harvested_entry_tells_whether_all_are_recycled() {
        for first_index in [0, u32::MAX] {
            let (producer, mut view) = ring(first_index);
            assert!(view.all_recycled());
            push(&producer, 0..3);
            assert!(view.all_recycled());
            harvest(&mut view);
            assert!(!view.all_recycled());
            producer.recycle(2, |_, _| ());
            assert!(!view.all_recycled());
            push(&producer, 3..4);
            assert!(!view.all_recycled());
            producer.recycle(1, |_, _| ());
            assert!(view.all_recycled());
        }
    }

    #[test]
    fn what_waits_is_known_by_its_slot_and_page() {
        let (producer, mut view) = ring(3);
        push(&producer, 2..4);
        assert!(!view.awaits_reset_of(5, 0), "it is not harvested yet");
        harvest(&mut view);
        assert!(view.awaits_reset_of(5, 0) && view.awaits_reset_of(5, 3));
        assert!(!view.awaits_reset_of(5, 4), "no page is as far as that");
        assert!(!view.awaits_reset_of(6, 0), "it is another slot's");
        recycle(&producer);
        assert!(!view.awaits_reset_of(5, 0));
    }
}
