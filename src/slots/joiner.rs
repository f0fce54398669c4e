// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Harvest where pages may stay open: see `members`, and `targets` for the case where none may.

use crate::bitmap::pool::ShardGuard;
use crate::ring::entry::Entry;
use crate::ring::view::Take;
use crate::slots::table::Table;
use crate::slots::targets::Misses;
use crate::slots::working_set::Terms;

/// Sets the bits of the entries that a pass takes, or leaves their pages open.
pub(crate) struct Joiner<'a> {
    table: &'a Table,
    shard: &'a ShardGuard<'a>,
    terms: &'a Terms,
    pub(crate) misses: Misses,
    /// Entries of members, which the kernel need not have logged.
    pub(crate) named: u64,
}

impl<'a> Joiner<'a> {
    pub(crate) fn new(table: &'a Table, shard: &'a ShardGuard<'a>, terms: &'a Terms) -> Self {
        Self {
            table,
            shard,
            terms,
            misses: Misses::default(),
            named: 0,
        }
    }

    /// Returns whether the page of the entry stays open. If not, its bit is set.
    fn stays_open(&mut self, slot: u32, page: u64) -> bool {
        let Some((slot, stays)) = self.table.find(slot) else {
            self.misses.unknown_slot += 1;
            return false;
        };
        if page >= slot.pages() {
            self.misses.out_of_range += 1;
            return false;
        }
        let (members, bits) = (slot.members(), slot.shard_bits(self.shard.index()));
        if !stays || !slot.is_tracked() {
            bits.insert(page);
            return false;
        }
        let is_member = members.has(page);
        let is_again = || bits.contains(page) || members.was_closed(page);
        let is_back = || is_again() && self.terms.has_room(1);
        if !is_member && !self.terms.has_place() && !is_back() {
            bits.insert(page);
            return false;
        }
        self.named += u64::from(is_member);
        // Also for a member: it may have been closed since the look.
        if members.join(page) {
            self.terms.note_joined(1);
        }
        true
    }
}

impl Take for Joiner<'_> {
    fn take(&mut self, entries: &[Entry]) {
        for entry in entries {
            let (slot, page) = entry.payload();
            if self.stays_open(slot, page) {
                entry.void();
            }
            // Only now: from here on the kernel may overwrite the payload, and reads whether it is void.
            entry.mark_reset();
        }
    }

    fn ask(&mut self, _: &[Entry]) {}
}
