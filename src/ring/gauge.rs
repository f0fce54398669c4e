// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How full a ring is, read by other threads than its consumer.

use core::iter;

use super::entry::Entry;
use super::memory::RingMemory;
use super::reserve::half_reserve;
use crate::kernel::RESERVED_ENTRIES;

/// Looks at a ring beside its consumer. It reads flags only.
///
/// The result is true of some moment during the look. During a harvest it is true of the ring as if none of its entries were taken
/// yet; in a broken ring, as if all were. If the kernel pushes meanwhile, it is too low, by as many entries as are pushed.
pub(crate) struct Gauge<'a> {
    memory: &'a RingMemory,
    /// The consumer's place.
    head: u32,
}

impl<'a> Gauge<'a> {
    /// For a consumer at `head`.
    pub(crate) fn new(memory: &'a RingMemory, head: u32) -> Self {
        Self { memory, head }
    }

    /// Returns whether at least `count` entries wait: one load.
    pub(crate) fn at_least(&self, count: u32) -> bool {
        count == 0 || count <= self.memory.entries() && self.is_dirty(count - 1)
    }

    /// Returns whether all entries before the consumer are recycled: one load, as they are recycled in order.
    pub(crate) fn all_recycled(&self) -> bool {
        !self.at(self.memory.entries() - 1).awaits_reset()
    }

    /// Returns how many entries wait: one load if none does, else two and one for each bit of the ring's size.
    pub(crate) fn occupancy(&self) -> u32 {
        let first = self.memory.at(self.head);
        if first.is_free() {
            return 0;
        }
        // Entries are pushed in order, so those that wait are at the beginning.
        let waiting = self.first_not(self.memory.entries(), |ahead| self.is_dirty(ahead));
        if first.is_dirty() {
            return waiting;
        }
        // They are harvested in order, too, so a harvest has begun. No entry is recycled during one, but some may wait for an earlier
        // reset: they lie behind the head, beyond all that are free. In a broken ring both may lie anywhere, so take the low value.
        let free = self.some_free().filter(|_| !self.memory.is_broken());
        let Some(free) = free else {
            return 0;
        };
        let waiting = self.first_not(free, |ahead| !self.at(ahead).is_free());
        // Recycled: then the apparent end of the harvested entries may be, too.
        if first.is_free() { 0 } else { waiting }
    }

    /// Finds a free entry: the one behind the head, unless some wait for an earlier reset. Then it looks for one among groups of free
    /// entries. In a large ring it does not look at all of them, but at steps of half the kernel's reserve.
    fn some_free(&self) -> Option<u32> {
        let entries = self.memory.entries();
        let closest = half_reserve(RESERVED_ENTRIES, entries);
        let apart = iter::successors(Some(entries), |apart| Some(apart / 2));
        let apart = apart.take_while(|apart| *apart >= closest);
        let looked_at = apart.flat_map(|apart| (apart..entries).step_by(2 * apart as usize));
        let mut looked_at = iter::once(entries - 1).chain(looked_at);
        looked_at.find(|&ahead| self.at(ahead).is_free())
    }

    fn at(&self, ahead: u32) -> &Entry {
        self.memory.at(self.head.wrapping_add(ahead))
    }

    fn is_dirty(&self, ahead: u32) -> bool {
        self.at(ahead).is_dirty()
    }

    /// Finds the first entry for which `waits` is false, at most the one at `free`. It is true for entry 0.
    fn first_not(&self, mut free: u32, waits: impl Fn(u32) -> bool) -> u32 {
        let mut waiting = 1;
        while waiting < free {
            let middle = waiting + (free - waiting) / 2;
            match waits(middle) {
                true => waiting = middle + 1,
                false => free = middle,
            }
        }
        waiting
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::super::producer::Producer;
    use super::super::view::RingView;
    use super::*;

    /// Every fill, from every place in the ring.
    #[test]
    fn tells_how_many_entries_wait() {
        for entries in [2, 8, 64] {
            for first_index in (0..entries).chain(u32::MAX - 3..=u32::MAX) {
                let producer = Producer::new(entries, first_index);
                let memory = producer.memory();
                let gauge = Gauge::new(&memory, first_index);
                for waiting in 0..=entries {
                    assert_eq!(gauge.occupancy(), waiting);
                    for count in 0..=entries + 1 {
                        assert_eq!(gauge.at_least(count), count <= waiting);
                    }
                    assert!(!gauge.at_least(u32::MAX));
                    if waiting < entries {
                        producer.push(0, 0);
                    }
                }
            }
        }
    }

    /// Entries at the head that wait for their reset look like a harvest that has begun. In a broken ring they may be of any lap.
    #[test]
    fn a_broken_ring_is_not_guessed_at() {
        let producer = Producer::new(8, 0);
        (0..5).for_each(|page| producer.push(0, page));
        let memory = producer.memory();
        RingView::new(producer.memory()).harvest(|_, _| ());
        let gauge = Gauge::new(&memory, 0);
        assert_eq!(gauge.occupancy(), 5);
        assert!(memory.note_broken());
        assert_eq!(gauge.occupancy(), 0);
    }

    /// Entries that wait for an earlier reset do not count: during a harvest they are distinguished from what is harvested.
    #[test]
    fn what_waits_for_a_reset_does_not_count_during_a_harvest() {
        for entries in [8, 64, 256, 4096] {
            for before in [
                0,
                1,
                entries / 3,
                entries / 2,
                entries - 40.min(entries / 2),
            ] {
                // With nothing from before, the ring may be filled to the last entry but one.
                let room = if before > 0 {
                    (entries / 64).clamp(1, 32)
                } else {
                    1
                };
                let waiting = entries - room - before;
                let producer = Producer::new(entries, 5);
                let memory = producer.memory();
                let mut view = RingView::new(producer.memory());
                (0..before).for_each(|page| producer.push(0, page.into()));
                view.harvest(|_, _| ());
                (0..waiting).for_each(|page| producer.push(0, page.into()));
                let gauge = Gauge::new(&memory, 5 + before);
                view.harvest(|_, _| assert_eq!(gauge.occupancy(), waiting));
            }
        }
    }

    /// Entries that are harvested and not yet reset do not wait any more; during a harvest they still count.
    #[test]
    fn harvested_entries_count_until_the_head_is_known_to_have_moved() {
        for first_index in [0, 5, u32::MAX - 3] {
            let producer = Producer::new(8, first_index);
            let memory = producer.memory();
            let mut view = RingView::new(producer.memory());
            for page in 0..5 {
                producer.push(0, page);
            }
            view.harvest(|_, _| ());
            producer.push(0, 5);
            let behind = Gauge::new(&memory, first_index);
            assert_eq!(behind.occupancy(), 6);
            assert!(!behind.at_least(5) && behind.at_least(6));
            let there = Gauge::new(&memory, first_index.wrapping_add(5));
            assert_eq!(there.occupancy(), 1);
            producer.recycle(u32::MAX, |_, _| ());
            assert_eq!(there.occupancy(), 1);
            assert_eq!(behind.occupancy(), 0, "not the head any more");
        }
    }
}
