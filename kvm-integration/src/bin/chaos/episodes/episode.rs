// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What came of an episode.

use kvm_dirty_ring::SlotId;

/// What came of an episode.
#[derive(Debug, Clone, Default)]
pub struct Episode {
    /// Entries harvested.
    pub entries: u64,
    /// Comparisons made.
    pub comparisons: u64,
    /// Of these, with all vCPUs stopped, those with no page under suspicion, which is reported in any case.
    pub exact_comparisons: u64,
    /// Pages that no sync reported after they were last written; each as often as it was.
    pub missed_pages: u64,
    /// Pages that were reported of a slot that nobody had written yet: entries of another one.
    pub stray_pages: u64,
    /// Entries that named no page of any slot, although there was no cause for any: passes that did
    /// not know the slots as they were.
    pub strange_entries: u64,
    /// The first missed or stray page.
    pub first: Option<Finding>,
}

impl Episode {
    /// Whether there is nothing to complain of.
    pub fn is_well(&self) -> bool {
        [self.missed_pages, self.stray_pages, self.strange_entries] == [0; 3]
    }
}

/// Something that is not as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finding {
    /// The slot.
    pub slot: SlotId,
    /// The page.
    pub page: u64,
    /// What was going on.
    pub when: &'static str,
}
