// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Everything that a `DirtyPages` promises of itself, checked a page at a time.

use std::collections::{BTreeMap, BTreeSet};

use kvm_dirty_ring::{DirtyPages, DirtyPart, Run, SlotId};

/// Pages by slot; slots without pages are left out.
pub type PageSet = BTreeMap<SlotId, BTreeSet<u64>>;

/// The pages of a part.
pub fn part_of(part: &DirtyPart<'_>) -> PageSet {
    let mut pages = PageSet::new();
    for run in part.runs() {
        let set = pages.entry(run.slot).or_default();
        set.extend(run.first_page..run.first_page + run.pages);
    }
    let count: usize = pages.values().map(BTreeSet::len).sum();
    assert_eq!(part.page_count(), count as u64);
    pages
}

/// Checks every view of `dirty` against the others and returns the pages. `tracked` are the slots
/// that were in the log at the sync, with their sizes.
pub fn pages_of(dirty: &DirtyPages, tracked: &BTreeMap<SlotId, u64>) -> PageSet {
    let runs: Vec<Run> = dirty.runs().collect();
    for pair in runs.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        let ascending =
            a.slot < b.slot || (a.slot == b.slot && a.first_page + a.pages < b.first_page);
        assert!(
            ascending,
            "{a:?} and {b:?}: out of order, or one run in two"
        );
    }
    let mut pages = PageSet::new();
    for run in &runs {
        let size = *tracked.get(&run.slot).expect("a run of a tracked slot");
        assert!(run.pages > 0, "{run:?} is empty");
        assert!(run.first_page + run.pages <= size, "{run:?} of {size}");
        let set = pages.entry(run.slot).or_default();
        set.extend(run.first_page..run.first_page + run.pages);
    }

    let count: usize = pages.values().map(BTreeSet::len).sum();
    assert_eq!(dirty.page_count(), count as u64);
    assert_eq!(dirty.is_empty(), count == 0);
    let (members, others) = (part_of(&dirty.members()), part_of(&dirty.others()));
    let mut both = members.clone();
    for (slot, others) in others {
        for page in others {
            let is_new = both.entry(slot).or_default().insert(page);
            assert!(is_new, "{slot} page {page} is a member and another");
        }
    }
    assert_eq!(both, pages, "members and others are all there are");

    let none = BTreeSet::new();
    for (&slot, &size) in tracked {
        let set = pages.get(&slot).unwrap_or(&none);
        let words = dirty.words(slot).expect("words of a tracked slot");
        assert_eq!(words.len() as u64, size.div_ceil(64));
        for page in 0..words.len() as u64 * 64 {
            let bit = words[(page / 64) as usize] >> (page % 64) & 1 == 1;
            assert_eq!(bit, set.contains(&page), "bit of {slot} page {page}");
            assert_eq!(dirty.contains(slot, page), bit, "{slot} page {page}");
        }
        assert!(!dirty.contains(slot, words.len() as u64 * 64));
    }
    pages
}
