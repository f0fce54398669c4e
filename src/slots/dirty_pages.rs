// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The result of a sync: the pages to copy.

use core::fmt;
use core::ops::Range;

use crate::bitmap::pages::PageBits;
use crate::slot_id::SlotId;
use crate::slots::dirty_part::{DirtyPart, Run};
use crate::slots::slot_pages::{Kind, Kinds, SlotPages};
use crate::slots::table::{Slot, Table};
use crate::sync::Arc;

/// The pages that one [`sync`](crate::DirtyLog::sync) found dirty.
///
/// Make one and pass it to every sync. Its memory, one bit per page of the logged slots, is taken from the operating system
/// only where pages are dirty, and is reused from round to round.
#[derive(Default)]
pub struct DirtyPages {
    /// In ascending order of slot.
    slots: Vec<SlotPages>,
}

impl DirtyPages {
    /// Creates an empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the dirty pages as runs, ascending by slot, then by page.
    ///
    /// A run is as long as possible and never crosses a slot.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.part().runs()
    }

    /// Returns the dirty pages one by one, in the same order.
    pub fn pages(&self) -> impl Iterator<Item = (SlotId, u64)> + '_ {
        let pages = |run: Run| run.first_page..run.first_page + run.pages;
        self.runs()
            .flat_map(move |run| pages(run).map(move |page| (run.slot, page)))
    }

    /// Returns the number of dirty pages.
    pub fn page_count(&self) -> u64 {
        self.part().page_count()
    }

    /// Returns the dirty pages that stay open: members of the [working set](crate::DirtyLog::set_working_set).
    ///
    /// Send them in the last round only. The guest may be writing to them, and every sync reports them until a
    /// [refresh](crate::DirtyLog::refresh). Sending them in each round is correct, too, and sends more. Without a working set
    /// there are none.
    pub fn members(&self) -> DirtyPart<'_> {
        self.whole(Kind::Members)
    }

    /// Returns all dirty pages but the [members](Self::members).
    ///
    /// Their contents may be sent now: each is protected again, or is returned by the next sync, too.
    pub fn others(&self) -> DirtyPart<'_> {
        self.whole(Kind::Others)
    }

    /// Returns whether no page is dirty.
    pub fn is_empty(&self) -> bool {
        self.slots.iter().all(|slot| slot.bits.is_empty())
    }

    /// Returns whether `page` of `slot` is dirty.
    pub fn contains(&self, slot: SlotId, page: u64) -> bool {
        self.slot(slot).is_some_and(|slot| slot.bits.contains(page))
    }

    /// Returns the raw bits of `slot`: page p is bit p % 64 of word p / 64.
    ///
    /// `None` for a slot that was not in the log when the sync ran.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, SlotId};
    /// # let log = SimVm::new(SimConfig::default()).dirty_log();
    /// # let ram = SlotId::new(0, 0);
    /// # log.add_slot(ram, 128)?;
    /// # let mut dirty = DirtyPages::new();
    /// log.mark_dirty(ram, 65, 1)?;
    /// log.sync(&mut dirty)?;
    /// assert_eq!(dirty.words(ram), Some(&[0, 0b10][..]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn words(&self, slot: SlotId) -> Option<&[u64]> {
        self.slot(slot).map(|slot| slot.bits.words())
    }

    fn slot(&self, slot: SlotId) -> Option<&SlotPages> {
        let place = self.slots.binary_search_by_key(&slot, |s| s.slot.id());
        place.ok().map(|place| &self.slots[place])
    }

    /// Returns all pages as one part, to be [split](DirtyPart::split) among threads.
    pub fn part(&self) -> DirtyPart<'_> {
        self.whole(Kind::All)
    }

    fn whole(&self, kind: Kind) -> DirtyPart<'_> {
        DirtyPart::new(&self.slots, kind)
    }

    /// Removes pages `first_page .. first_page + pages` of `slot`, for example because they were sent.
    ///
    /// Pages that are not dirty are ignored.
    pub fn remove(&mut self, slot: SlotId, first_page: u64, pages: u64) {
        let Ok(place) = self.slots.binary_search_by_key(&slot, |s| s.slot.id()) else {
            return;
        };
        let slot = &mut self.slots[place];
        let first = first_page.min(slot.slot.pages());
        let pages = pages.min(slot.slot.pages() - first);
        slot.bits.remove(first, pages);
        if let Some(kinds) = slot.kinds.as_deref_mut() {
            kinds.members.remove(first, pages);
            kinds.others.remove(first, pages);
        }
    }

    /// Forgets the slot and every page of it.
    ///
    /// Call it before another slot gets the id, as these pages would pass for pages of that one; later, call
    /// [`clear_removed`](crate::DirtyLog::clear_removed), which distinguishes the two. Copy them first, if they are needed.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, SlotId};
    /// # let vm = SimVm::new(SimConfig::default());
    /// # let log = vm.dirty_log();
    /// # let (ram, dimm) = (SlotId::new(0, 0), SlotId::new(0, 1));
    /// # log.add_slot(ram, 1000)?;
    /// # log.add_slot(dimm, 1000)?;
    /// # log.mark_dirty(ram, 1, 1)?;
    /// # log.mark_dirty(dimm, 999, 1)?;
    /// # let mut dirty = DirtyPages::new();
    /// log.sync(&mut dirty)?;
    /// // Not all of it is sent when the DIMM is unplugged and another one plugged in:
    /// let retired = log.retire_slot(dimm)?;
    /// // ... deleted in KVM
    /// log.finish_slot(&retired)?;
    /// dirty.clear_slot(dimm);
    /// log.add_slot(dimm, 500)?;
    /// assert!(dirty.runs().all(|run| run.slot == ram));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn clear_slot(&mut self, slot: SlotId) {
        self.slots.retain(|have| have.slot.id() != slot);
    }

    /// Forgets every page, and keeps the memory.
    pub fn clear(&mut self) {
        for slot in &mut self.slots {
            slot.bits.clear();
            slot.forget_kinds();
        }
    }

    /// Makes all pages of one kind. The sync that reports them decides which stay open.
    pub(crate) fn forget_kinds(&mut self) {
        self.slots.iter_mut().for_each(SlotPages::forget_kinds);
    }

    /// Notes which of the dirty pages stay open: those that `open` adds for a slot. Returns false if there is no memory for it.
    pub(crate) fn tell_members(&mut self, open: impl Fn(&Slot, &mut PageBits)) -> bool {
        for slot in &mut self.slots {
            if !slot.slot.members().any() {
                slot.forget_kinds();
                continue;
            }
            if slot.make_kinds().is_none() {
                return false;
            }
            let Some(Kinds { members, others }) = slot.kinds.as_deref_mut() else {
                continue;
            };
            open(&slot.slot, members);
            others.add_without(&slot.bits, members);
            // Some may have joined just now.
            slot.bits.add(members);
        }
        true
    }

    /// Removes the members of `from`.
    pub(crate) fn remove_members_of(&mut self, from: &Self) {
        for have in &mut self.slots {
            let from = from.slot(have.slot.id());
            let from = from.filter(|from| Arc::ptr_eq(&from.slot, &have.slot));
            if let Some(members) = from.and_then(|from| from.of(Kind::Members)) {
                have.bits.remove_all(members);
            }
        }
    }

    /// Finds the slot with the first dirty page that is no member, and up to `words` words from that page's word.
    pub(crate) fn next_others(&self, words: usize) -> Option<(Arc<Slot>, Range<usize>)> {
        self.slots.iter().find_map(|slot| {
            let first = slot.of(Kind::Others)?.next_word(0)?;
            let end = (first + words).min(slot.bits.words().len());
            Some((Arc::clone(&slot.slot), first..end))
        })
    }

    /// Moves the pages of these words of a slot that are no members into `into`, which has room for the slots that are here.
    pub(crate) fn move_others(&mut self, slot: &Arc<Slot>, words: Range<usize>, into: &mut Self) {
        let mut pairs = self.slots.iter_mut().zip(&mut into.slots);
        let Some((from, to)) = pairs.find(|(from, _)| Arc::ptr_eq(&from.slot, slot)) else {
            return;
        };
        if let Some(others) = from.of(Kind::Others) {
            to.bits.add_words(others, words);
        }
        from.bits.remove_all(&to.bits);
        if let Some(kinds) = from.kinds.as_deref_mut() {
            kinds.others.remove_all(&to.bits);
        }
    }

    /// Makes room for the slots of `other` only, empty. Returns false if there is no memory for it.
    pub(crate) fn fit_as(&mut self, other: &Self) -> bool {
        let mut pairs = self.slots.iter().zip(&other.slots);
        let is_fit = self.slots.len() == other.slots.len()
            && pairs.all(|(have, other)| Arc::ptr_eq(&have.slot, &other.slot));
        if !is_fit {
            let mut new = Self::new();
            if !new.merge_slots(other) {
                return false;
            }
            *self = new;
        }
        self.clear();
        true
    }

    /// Drops the slots that `table` does not hold. Returns how many dirty pages they had.
    pub(crate) fn clear_removed(&mut self, table: &Table) -> u64 {
        let mut removed = 0;
        self.slots.retain(|have| {
            let stays = table.holds(&have.slot);
            if !stays {
                removed += have.bits.count(0..usize::MAX);
            }
            stays
        });
        removed
    }

    /// Drops the pages of a slot.
    pub(crate) fn forget_slot(&mut self, slot: &Arc<Slot>) {
        self.slots.retain(|have| !Arc::ptr_eq(&have.slot, slot));
    }

    /// Returns the pages of a slot.
    pub(crate) fn bits_of(&self, slot: &Arc<Slot>) -> Option<&PageBits> {
        let have = self.slot(slot.id());
        let have = have.filter(|have| Arc::ptr_eq(&have.slot, slot));
        have.map(|have| &have.bits)
    }

    /// Adds the pages of `from`, for slots that are in `self`, too.
    pub(crate) fn add(&mut self, from: &Self) {
        for have in &mut self.slots {
            let other = from.slot(have.slot.id());
            if let Some(other) = other.filter(|other| Arc::ptr_eq(&other.slot, &have.slot)) {
                have.bits.add(&other.bits);
            }
        }
    }

    /// Adds the pages of `from`, for example those of an earlier sync that were not sent.
    ///
    /// Returns false if there is no memory for it; then nothing is added.
    ///
    /// Members of `self` stay members, except for those that are others of `from`. All other pages count among the
    /// [others](Self::others) then, also members of `from`. So either set may be the later one, and every page that has to be
    /// sent is among the others. Where the two name different slots by the same id, only the slot that was added to the log
    /// later keeps its pages; the other one is gone. A slot that is gone and that only one of them names keeps its pages until
    /// [`clear_removed`](crate::DirtyLog::clear_removed).
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, SlotId};
    /// # let vm = SimVm::new(SimConfig::default());
    /// # let log = vm.dirty_log();
    /// # let ram = SlotId::new(0, 0);
    /// # log.add_slot(ram, 1000)?;
    /// # let (mut dirty, mut unsent) = (DirtyPages::new(), DirtyPages::new());
    /// # log.mark_dirty(ram, 1, 1)?;
    /// log.sync(&mut unsent)?;
    /// // Sending has failed. The next round sends these, too:
    /// # log.mark_dirty(ram, 2, 1)?;
    /// log.sync(&mut dirty)?;
    /// assert!(dirty.merge(&unsent));
    /// assert!(dirty.contains(ram, 1) && dirty.contains(ram, 2));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn merge(&mut self, from: &Self) -> bool {
        if !self.merge_slots(from) {
            return false;
        }
        self.add(from);
        for slot in &mut self.slots {
            let Some(kinds) = slot.kinds.as_deref_mut() else {
                continue;
            };
            // Either set may be of the later sync, and no sync reports a page again that one of them has protected.
            let from = from.slot(slot.slot.id());
            let from = from.filter(|from| Arc::ptr_eq(&from.slot, &slot.slot));
            if let Some(others) = from.and_then(|from| from.of(Kind::Others)) {
                kinds.members.remove_all(others);
            }
            kinds.others.add_without(&slot.bits, &kinds.members);
        }
        true
    }

    /// Makes room for the slots of `from`, too. Returns false if there is no memory for it.
    fn merge_slots(&mut self, from: &Self) -> bool {
        let is_new = |slot: &&SlotPages| {
            let have = self.slot(slot.slot.id());
            have.is_none_or(|have| slot.slot.is_later_than(&have.slot))
        };
        let new = from.slots.iter().filter(is_new);
        let new = new.map(|slot| SlotPages::new(&slot.slot));
        let Some(mut new) = new.collect::<Option<Vec<_>>>() else {
            return false;
        };
        // These are still sorted.
        let is_gone = |id: SlotId| new.binary_search_by_key(&id, |new| new.slot.id()).is_ok();
        self.slots.retain(|have| !is_gone(have.slot.id()));
        self.slots.append(&mut new);
        self.slots.sort_by_key(|slot| slot.slot.id());
        true
    }

    /// Makes room for exactly the slots of `table` and keeps the pages of those that stay. Returns false if there is no memory
    /// for it; then nothing has changed.
    pub(crate) fn fit(&mut self, table: &Table) -> bool {
        let fits = self.slots.len() == table.slots().count()
            && self
                .slots
                .iter()
                .zip(table.slots())
                .all(|(have, slot)| Arc::ptr_eq(&have.slot, slot));
        if fits {
            return true;
        }
        let mut new = Vec::new();
        for slot in table.slots() {
            let have = self.slot(slot.id());
            if !have.is_some_and(|have| Arc::ptr_eq(&have.slot, slot)) {
                let Some(pages) = SlotPages::new(slot) else {
                    return false;
                };
                new.push(pages);
            }
        }
        self.slots.retain(|have| table.holds(&have.slot));
        self.slots.append(&mut new);
        self.slots.sort_by_key(|slot| slot.slot.id());
        true
    }

    /// Moves `slot` with its pages into `into`, and replaces what is there. It allocates nothing.
    pub(crate) fn move_slot_into(&mut self, slot: &Arc<Slot>, into: &mut Self) {
        into.slots.clear();
        let place = self
            .slots
            .iter()
            .position(|have| Arc::ptr_eq(&have.slot, slot));
        into.slots
            .extend(place.map(|place| self.slots.remove(place)));
    }

    /// Returns each slot with its bits.
    pub(crate) fn slots_mut(&mut self) -> impl Iterator<Item = (&Slot, &mut PageBits)> {
        self.slots
            .iter_mut()
            .map(|slot| (&*slot.slot, &mut slot.bits))
    }
}

impl fmt::Debug for DirtyPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyPages")
            .field("slots", &self.slots.len())
            .field("pages", &self.page_count())
            .finish()
    }
}
