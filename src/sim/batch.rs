// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The batches in which a reset protects pages.

use super::slot::SimSlot;

/// Pages of one slot that lie close together: the first, and which of the 64 from there on.
///
/// As in the kernel (`kvm_dirty_ring_reset`), entries next to each other in a ring make one batch while they name one slot and the
/// batch's pages fit into 64. A page before the first moves the batch, unless the last would fall out.
pub(super) struct Batch {
    pub(super) slot: u32,
    first: u64,
    pages: u64,
}

impl Batch {
    /// Adds the batches of the recycled entries of one ring.
    pub(super) fn of_ring(entries: &[(u32, u64)], batches: &mut Vec<Self>) {
        let mut begun: Option<Self> = None;
        for &(slot, page) in entries {
            if !begun.as_mut().is_some_and(|batch| batch.add(slot, page)) {
                let next = Self {
                    slot,
                    first: page,
                    pages: 1,
                };
                batches.extend(begun.replace(next));
            }
        }
        batches.extend(begun);
    }

    fn add(&mut self, slot: u32, page: u64) -> bool {
        if slot != self.slot {
            return false;
        }
        if let Some(ahead @ 0..64) = page.checked_sub(self.first) {
            self.pages |= 1 << ahead;
            return true;
        }
        match self.first.checked_sub(page) {
            Some(behind @ 1..64) if self.pages.leading_zeros() as u64 >= behind => {
                self.first = page;
                self.pages = self.pages << behind | 1;
                true
            }
            _ => false,
        }
    }

    /// Arms its pages in `slot`, or all from its first to its last. It arms none of them if the last is not in the slot
    /// (`kvm_reset_dirty_gfn`).
    pub(super) fn arm(&self, slot: &SimSlot, as_span: bool) {
        let last = u64::from(self.pages.ilog2());
        if self
            .first
            .checked_add(last)
            .is_none_or(|last| !slot.has(last))
        {
            return;
        }
        let pages = (0..=last).filter(|bit| as_span || self.pages >> bit & 1 != 0);
        pages.for_each(|bit| slot.arm(self.first + bit));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batches(entries: &[(u32, u64)]) -> Vec<(u32, u64, u64)> {
        let mut batches = Vec::new();
        Batch::of_ring(entries, &mut batches);
        let parts = |batch: Batch| (batch.slot, batch.first, batch.pages);
        batches.into_iter().map(parts).collect()
    }

    #[test]
    fn neighbours_in_the_ring_and_in_memory_are_one() {
        assert_eq!(batches(&[]), []);
        assert_eq!(batches(&[(1, 5), (1, 6), (1, 68)]), [(1, 5, 1 << 63 | 3)]);
        assert_eq!(batches(&[(1, 5), (1, 69)]), [(1, 5, 1), (1, 69, 1)]);
        assert_eq!(batches(&[(1, 5), (2, 6)]), [(1, 5, 1), (2, 6, 1)]);
        assert_eq!(batches(&[(1, 68), (1, 5)]), [(1, 5, 1 << 63 | 1)]);
        assert_eq!(batches(&[(1, 69), (1, 5)]), [(1, 69, 1), (1, 5, 1)]);
        assert_eq!(
            batches(&[(1, 9), (1, 72), (1, 8)]),
            [(1, 9, 1 << 63 | 1), (1, 8, 1)]
        );
        assert_eq!(
            batches(&[(1, u64::MAX), (1, 0)]),
            [(1, u64::MAX, 1), (1, 0, 1)]
        );
    }

    #[test]
    fn all_of_it_is_in_the_slot_or_none_is_armed() {
        let slot = SimSlot::new(64);
        let armed_by = |entries: &[(u32, u64)], as_span| {
            (0..64).for_each(|page| _ = slot.disarm(page));
            let mut batches = Vec::new();
            Batch::of_ring(entries, &mut batches);
            batches.iter().for_each(|batch| batch.arm(&slot, as_span));
            (0..64)
                .filter(|&page| slot.disarm(page) == Some(true))
                .collect::<Vec<_>>()
        };
        let armed = |entries: &[(u32, u64)]| armed_by(entries, false);
        assert_eq!(armed(&[(0, 60), (0, 63)]), [60, 63]);
        assert_eq!(armed_by(&[(0, 60), (0, 63)], true), [60, 61, 62, 63]);
        assert_eq!(armed_by(&[(0, 60), (0, 64)], true), [0u64; 0]);
        assert_eq!(armed(&[(0, 60), (0, 64)]), [0u64; 0]);
        assert_eq!(armed(&[(0, 64), (0, 60)]), [0u64; 0]);
        assert_eq!(armed(&[(0, 0), (0, 64), (0, u64::MAX)]), [0]);
    }
}
