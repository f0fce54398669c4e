// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which pages are yet to be sent: a bit a page, slot by slot.

use kvm_dirty_ring::{DirtyPages, Run, SlotId};

use crate::machine::GuestSlot;

/// A set of pages of a guest's slots.
#[derive(Debug, Clone, Default)]
pub struct PageSet {
    slots: Vec<Slot>,
}

#[derive(Debug, Clone)]
struct Slot {
    id: SlotId,
    /// Page p is bit p % 64 of word p / 64.
    words: Vec<u64>,
}

impl PageSet {
    /// An empty one for these slots.
    pub fn new(slots: &[GuestSlot]) -> Self {
        let slots = slots.iter().map(|slot| Slot {
            id: slot.id,
            words: vec![0; slot.region.pages.div_ceil(64) as usize],
        });
        Self {
            slots: slots.collect(),
        }
    }

    /// Adds what a sync has found.
    pub fn add(&mut self, dirty: &DirtyPages) {
        for slot in &mut self.slots {
            if let Some(words) = dirty.words(slot.id) {
                slot.add(words);
            }
        }
    }

    /// Adds pages of slot `id` as `KVM_GET_DIRTY_LOG` gives them; of another slot, none.
    pub fn add_words(&mut self, id: SlotId, words: &[u64]) {
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.id == id) {
            slot.add(words);
        }
    }

    /// Adds the pages of these runs; of another slot, none.
    pub fn add_runs(&mut self, runs: impl Iterator<Item = Run>) {
        for run in runs {
            if let Some(slot) = self.slots.iter_mut().find(|slot| slot.id == run.slot) {
                slot.add_run(run.first_page, run.pages);
            }
        }
    }

    /// Adds all of `other`, which is left empty.
    pub fn take(&mut self, other: &mut Self) {
        for slot in &other.slots {
            self.add_words(slot.id, &slot.words);
        }
        other.clear();
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        let words = self.slots.iter().flat_map(|slot| &slot.words);
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.slots.iter_mut().for_each(|slot| slot.words.fill(0));
    }

    /// The pages as runs, each as long as it can be, slot by slot and in order.
    pub fn runs(&self) -> impl Iterator<Item = Run> {
        self.slots.iter().flat_map(|slot| {
            let mut from = 0;
            std::iter::from_fn(move || {
                let first_page = slot.next(from, false)?;
                let end = slot.next(first_page, true).unwrap_or(slot.end());
                from = end;
                Some(Run {
                    slot: slot.id,
                    first_page,
                    pages: end - first_page,
                })
            })
        })
    }
}

impl Slot {
    fn add(&mut self, words: &[u64]) {
        for (mine, theirs) in self.words.iter_mut().zip(words) {
            *mine |= theirs;
        }
    }

    fn add_run(&mut self, first_page: u64, pages: u64) {
        let end = (first_page + pages).min(self.end());
        let mut page = first_page;
        while page < end {
            let here = (64 - page % 64).min(end - page);
            self.words[(page / 64) as usize] |= u64::MAX >> (64 - here) << (page % 64);
            page += here;
        }
    }

    fn end(&self) -> u64 {
        self.words.len() as u64 * 64
    }

    /// The first page at or after `from` that is in the set; or, if `absent`, that is not.
    fn next(&self, from: u64, absent: bool) -> Option<u64> {
        let mut mask = u64::MAX << (from % 64);
        for place in (from / 64) as usize..self.words.len() {
            let word = self.words[place] ^ if absent { u64::MAX } else { 0 };
            if word & mask != 0 {
                return Some(place as u64 * 64 + u64::from((word & mask).trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::guest::memory::GuestMemory;
    use crate::guest::workload::Region;

    fn slot(id: u16, pages: u64) -> GuestSlot {
        GuestSlot {
            id: SlotId::new(0, id),
            region: Region { gpa: 0, pages },
            memory: Arc::new(GuestMemory::new(pages).unwrap()),
        }
    }

    fn runs(set: &PageSet) -> Vec<(u32, u64, u64)> {
        let runs = set.runs();
        runs.map(|run| (run.slot.raw(), run.first_page, run.pages))
            .collect()
    }

    #[test]
    fn runs_are_the_pages_that_were_added() {
        let mut set = PageSet::new(&[slot(3, 192), slot(5, 70)]);
        assert_eq!((runs(&set), set.count()), (vec![], 0));
        set.add_words(SlotId::new(0, 3), &[0b1101, 1 << 63, u64::MAX]);
        set.add_words(SlotId::new(0, 5), &[1 << 63, 0b111111]);
        set.add_words(SlotId::new(0, 9), &[1]);
        let wanted = vec![(3, 0, 1), (3, 2, 2), (3, 127, 65), (5, 63, 7)];
        assert_eq!((runs(&set), set.count()), (wanted.clone(), 75));

        let mut by_runs = PageSet::new(&[slot(3, 192), slot(5, 70)]);
        by_runs.add_runs(set.runs());
        assert_eq!(runs(&by_runs), wanted);

        let mut other = PageSet::new(&[slot(3, 192), slot(5, 70)]);
        other.add_words(SlotId::new(0, 3), &[0b10]);
        other.take(&mut set);
        assert_eq!((runs(&set), set.count()), (vec![], 0));
        assert_eq!(runs(&other)[0], (3, 0, 4));
        assert_eq!(runs(&other)[1..], wanted[2..]);
    }
}
