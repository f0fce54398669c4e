// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a reset may have recycled last, and not protected.

use crate::ring::entry::NO_SLOT;
use crate::slots::table::{Slot, Table};
use crate::sync::Arc;

/// Puts the pages under suspicion that the kernel may have had in one batch with the last entry of a ring.
///
/// `last` is the payloads of the entries that were harvested last, the latest first; `is_all` whether there were no others.
/// A batch is entries side by side in the ring that name pages of one slot, of which no two are 64 or more apart
/// (`kvm_dirty_ring_reset`): the first entry that cannot be in it ends it. Only pages that its entries name can be
/// unprotected. If no entry ends it, as a vCPU may have filled what lies before again, it is every page that near.
pub(crate) fn suspect(slots: &Table, last: impl IntoIterator<Item = (u32, u64)>, is_all: bool) {
    let mut last = last.into_iter().peekable();
    let Some(&(_, latest)) = last.peek() else {
        return;
    };
    let mut batch = Batch {
        latest,
        slot: None,
        any_slot: false,
    };
    for (slot, page) in last {
        if !batch.may_hold(slot, page) {
            return;
        }
        for slot in named(slots, Some(slot)) {
            slot.suspect_page(page);
        }
    }
    if !is_all {
        let slot = batch.slot.filter(|_| !batch.any_slot);
        for slot in named(slots, slot) {
            slot.suspect_batch(latest);
        }
    }
}

/// The slot of that number; all of them, where none is known.
fn named(slots: &Table, slot: Option<u32>) -> impl Iterator<Item = &Arc<Slot>> {
    let slot = slot.filter(|&slot| slot != NO_SLOT);
    let one = slot.and_then(|slot| slots.get(slot));
    let all = slot.is_none().then(|| slots.slots());
    one.into_iter().chain(all.into_iter().flatten())
}

struct Batch {
    /// The page of its last entry.
    latest: u64,
    /// The slot that its entries name, but for void ones.
    slot: Option<u32>,
    /// Whether an entry was made void. A kernel that does not look at payloads has it in the batch, in whatever slot it was.
    any_slot: bool,
}

impl Batch {
    /// Whether the entry before may be in it, too.
    fn may_hold(&mut self, slot: u32, page: u64) -> bool {
        let is_near = page.abs_diff(self.latest) < u64::from(u64::BITS);
        if slot == NO_SLOT {
            self.any_slot = true;
            return is_near;
        }
        is_near && *self.slot.get_or_insert(slot) == slot
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::bitmap::pages::PageBits;
    use crate::slot_id::SlotId;

    const PAGES: u64 = 1000;

    /// The suspects of slots 0 and 1 by slot and page, after these entries.
    fn suspects(last: &[(u32, u64)], is_all: bool) -> Vec<(u32, u64)> {
        let mut table = Table::default();
        for id in 0..2 {
            let slot = SlotId::new(0, id);
            table.add(slot, PAGES, None, 1).unwrap();
        }
        suspect(&table, last.iter().copied(), is_all);
        let pages = table.slots().flat_map(|slot| {
            let mut bits = PageBits::new(PAGES).unwrap();
            slot.copy_suspects_into(&mut bits);
            let raw = slot.id().raw();
            let pages = (0..PAGES).filter(move |&page| bits.contains(page));
            pages.map(move |page| (raw, page))
        });
        pages.collect()
    }

    #[test]
    fn what_an_entry_ends_is_the_pages_that_are_named() {
        assert_eq!(suspects(&[], true), []);
        assert_eq!(suspects(&[(0, 500), (0, 600)], false), [(0, 500)]);
        assert_eq!(suspects(&[(0, 500), (1, 501)], false), [(0, 500)]);
        let near = [(0, 500), (0, 563), (0, 437), (0, 564)];
        assert_eq!(suspects(&near, false), [(0, 437), (0, 500), (0, 563)]);
        let ended = [(0, 500), (0, 436), (0, 501)];
        assert_eq!(suspects(&ended, false), [(0, 500)]);
    }

    #[test]
    fn what_no_entry_ends_is_all_that_is_near() {
        let entries = [(1, 500), (1, 501)];
        assert_eq!(suspects(&entries, true), [(1, 500), (1, 501)]);
        let near = (437..564).map(|page| (1, page));
        assert!(suspects(&entries, false).into_iter().eq(near));
        let at_the_end = (936..PAGES).map(|page| (0, page));
        assert!(suspects(&[(0, 999)], false).into_iter().eq(at_the_end));
        assert_eq!(suspects(&[(0, PAGES)], false), []);
    }

    /// In whatever slot it was.
    #[test]
    fn a_void_entry_is_of_any_slot() {
        let entries = [(NO_SLOT, 500), (1, 501), (0, 502)];
        let named = [(0, 500), (1, 500), (1, 501)];
        assert_eq!(suspects(&entries, false), named);
        let near = |slot| (437..564).map(move |page| (slot, page));
        let wanted = near(0).chain(near(1));
        assert!(suspects(&entries[..2], false).into_iter().eq(wanted));
    }

    proptest! {
        /// The bound that the documentation gives.
        #[test]
        fn a_ring_puts_no_more_than_127_pages_of_a_slot_under_suspicion(
            last in vec((prop_oneof![8 => Just(0), 1 => Just(1), 1 => Just(NO_SLOT)], 300u64..500), 1..300),
            is_all: bool,
        ) {
            let found = suspects(&last, is_all);
            for slot in 0..2 {
                let count = found.iter().filter(|&&(named, _)| named == slot).count();
                prop_assert!(count <= 127, "{} pages of slot {}", count, slot);
            }
            let is_void = last.iter().any(|&(slot, _)| slot == NO_SLOT);
            let first = found.first().map(|&(slot, _)| slot);
            prop_assert!(is_void || found.iter().all(|&(slot, _)| Some(slot) == first));
        }
    }
}
