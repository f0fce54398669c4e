//! How full a ring is, for onlookers.

use super::{Entry, RingMemory};

/// Looks at a ring beside its consumer: reads flags, and nothing else.
///
/// What it sees is true of some moment during the look, or, where a harvest runs meanwhile, of the
/// ring as if none of its entries were taken yet. A kernel that pushes on makes it an
/// underestimate, by as many entries as it pushes.
pub(crate) struct Gauge<'a> {
    memory: &'a RingMemory,
    /// Where the consumer is.
    head: u32,
}

impl<'a> Gauge<'a> {
    /// For a consumer at `head`.
    pub(crate) fn new(memory: &'a RingMemory, head: u32) -> Self {
        Self { memory, head }
    }

    /// Whether at least `count` entries wait: one load.
    pub(crate) fn at_least(&self, count: u32) -> bool {
        count == 0 || count <= self.memory.entries() && self.is_dirty(count - 1)
    }

    /// How many entries wait: one load if none does, else a load for each bit of the ring's size,
    /// and two.
    pub(crate) fn occupancy(&self) -> u32 {
        let first = self.memory.at(self.head);
        if first.is_free() {
            return 0;
        }
        // Entries are pushed in order, so those that wait are the first so many.
        let waiting = self.first_not(|ahead| self.is_dirty(ahead));
        if first.is_dirty() {
            return waiting;
        }
        // They are harvested in order, too: a harvest has begun. No entry is recycled during one.
        self.first_not(|ahead| !self.at(ahead).is_free())
    }

    fn at(&self, ahead: u32) -> &Entry {
        self.memory.at(self.head.wrapping_add(ahead))
    }

    fn is_dirty(&self, ahead: u32) -> bool {
        self.at(ahead).is_dirty()
    }

    /// The first entry of which `waits` is false, given that it is true of entry 0.
    fn first_not(&self, waits: impl Fn(u32) -> bool) -> u32 {
        let (mut waiting, mut free) = (1, self.memory.entries());
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
    use super::super::RingView;
    use super::super::producer::Producer;
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

    /// What was harvested and not yet reset waits no more; during a harvest it still counts.
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
