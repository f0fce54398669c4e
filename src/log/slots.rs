// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memslots that come and go while the guest runs.

use core::fmt;

use super::DirtyLog;
use crate::bitmap::shared::SharedBits;
use crate::error::SlotError;
use crate::slot_id::SlotId;
use crate::slots::dirty_pages::DirtyPages;
use crate::slots::table::{Removal, Slot};
use crate::sync::{Arc, MutexGuard, lock};

impl DirtyLog {
    /// Tracks a memslot of `pages` base pages, all clean.
    ///
    /// Call it *before* the slot is created in KVM with `KVM_MEM_LOG_DIRTY_PAGES`.
    ///
    /// An entry for a slot that is not in the log makes every page of every slot suspect, including those of slots added later. The
    /// call waits for the passes under way, whose layout lacks the slot. If there was such an entry, it also makes passes and
    /// resets of its own.
    ///
    /// If the destination of a migration, or the last snapshot, lacks the memory's contents, [mark](Self::mark_dirty) the whole slot.
    /// If you create the slot without the flag, create it inside [`stop_tracking`](Self::stop_tracking), and
    /// [start](Self::start_tracking) it later: nothing logs what is written before the flag is set.
    ///
    /// # Errors
    /// The id is in use or being removed, no slot can have that size, or there is no memory. Or there were entries of slots that
    /// are not in the log, and resets fail or fall short. Nothing has changed, and the call can be repeated.
    pub fn add_slot(&self, slot: SlotId, pages: u64) -> Result<(), SlotError> {
        let added = self.track(&lock(&self.inner().slot_change), slot, pages, None);
        self.inner().emit_faults();
        added
    }

    /// As [`add_slot`](Self::add_slot), for a slot whose devices mark their writes in `device`, which has as many pages.
    #[cfg(any(test, feature = "vm-memory"))]
    pub(crate) fn add_slot_on(
        &self,
        slot: SlotId,
        pages: u64,
        device: &Arc<SharedBits>,
    ) -> Result<(), SlotError> {
        let one_at_a_time = lock(&self.inner().slot_change);
        // A sync may still hold a slot that used these bits and whose removal is finished. It would take them for that slot, but
        // writes from now on belong to the new one.
        let _no_sync = lock(&self.inner().pending);
        self.track(&one_at_a_time, slot, pages, Some(Arc::clone(device)))
    }

    fn track(
        &self,
        _one_at_a_time: &MutexGuard<'_, ()>,
        slot: SlotId,
        pages: u64,
        device: Option<Arc<SharedBits>>,
    ) -> Result<(), SlotError> {
        let harvester = &self.inner().harvester;
        let shards = harvester.pool.len();
        harvester.change_layout(|layout| layout.slots.add(slot, pages, device, shards))?;
        // A pass on an older layout would lack the slot, or attribute its entries to the slot that had the id before.
        harvester.quiesce();
        if harvester.counts.unknown_slot.get() > 0 {
            self.doubt(slot)?;
        }
        // A call that takes the kernel's bits for the old slot, by its id, must not get the new one's.
        drop(self.inner().kernel_bits.lock());
        Ok(())
    }

    /// Some entries that named no slot may have named this one, if KVM had it before the log, or one of another size. So it is
    /// unknown which of its pages are protected. Entries that are left must not be recycled beside the new ones, even
    /// after a rearming.
    fn doubt(&self, slot: SlotId) -> Result<(), SlotError> {
        let harvester = &self.inner().harvester;
        let layout = harvester.layout();
        let Some(added) = layout.slots.get(slot.raw()) else {
            return Ok(());
        };
        added.suspect_all();
        let recycled = harvester.recycle_all_of(slot);
        if recycled.is_err() {
            self.forget(added)?;
        }
        Ok(recycled?)
    }

    fn forget(&self, slot: &Arc<Slot>) -> Result<(), SlotError> {
        self.inner().harvester.change_layout(|layout| {
            layout.slots.remove(slot);
            Ok(())
        })
    }

    /// Begins to remove a memslot: empties the rings and takes the kernel's own bits of it, so that what the guest wrote is
    /// collected before the slot goes.
    ///
    /// Then take its last pages, if you need them, by [`sync_retired`](Self::sync_retired); a [`sync`](Self::sync) would take those of
    /// all other slots, too. Then delete the slot in KVM, and call [`finish_slot`](Self::finish_slot). In between the slot is
    /// still in the log, and its id cannot be added.
    ///
    /// If the memory lives on elsewhere, stop the vCPUs first, or treat all of it as dirty. No call returns what the guest writes
    /// between the last sync of the slot and the deletion, nor what a running vCPU's processor still holds in its page-modification buffer.
    ///
    /// A removal that was begun and not finished, for example because the deletion failed, may be begun again or
    /// [cancelled](Self::keep_slot).
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, SlotId};
    /// # let vm = SimVm::new(SimConfig::default());
    /// # let log = vm.dirty_log();
    /// # let ram = SlotId::new(0, 0);
    /// # log.add_slot(ram, 1000)?;
    /// # vm.create_slot(ram, 1000);
    /// let retired = log.retire_slot(ram)?;
    /// log.sync_retired(&retired, &mut DirtyPages::new())?; // its last pages, if they are to be copied
    /// vm.delete_slot(ram); // KVM_SET_USER_MEMORY_REGION of no size
    /// log.finish_slot(&retired)?;
    /// log.add_slot(ram, 500)?; // the id is free again
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// The slot is not in the log, or the reset or the reading of its bits failed. Nothing has changed.
    pub fn retire_slot(&self, slot: SlotId) -> Result<RetiredSlot, SlotError> {
        let retired = self.retire(slot);
        self.inner().emit_faults();
        retired
    }

    fn retire(&self, slot: SlotId) -> Result<RetiredSlot, SlotError> {
        let harvester = &self.inner().harvester;
        let _one_at_a_time = lock(&self.inner().slot_change);
        // The slot must be in the layout before the rings are emptied for it.
        let layout = harvester.layout();
        let tracked = layout.slots.get(slot.raw());
        let tracked = tracked.ok_or(SlotError::Unknown { slot })?;
        harvester.reap()?;
        // Held until the layout shows that the slot goes. A sync in between would expect bits of a slot that the VMM may have
        // deleted by then.
        let mut taking = self.inner().kernel_bits.lock();
        if harvester.kernel().has_bitmap() && tracked.is_tracked() {
            if !taking.fit(tracked.pages()) {
                let pages = tracked.pages();
                return Err(SlotError::NoMemory { slot, pages });
            }
            let retired = layout.slots.is_retired(tracked);
            taking.take(harvester.kernel(), tracked, retired)?;
        }
        let (slot, removal) = harvester.change_layout(|layout| layout.slots.retire(slot))?;
        drop(taking);
        Ok(RetiredSlot { slot, removal })
    }

    /// Ends the removal of a memslot. Call it after the slot was deleted in KVM.
    ///
    /// It harvests the entries that still name the slot and has them recycled. So none can land in a later slot of that id, or be
    /// reset beside its entries. From then on the id may be added again. A `DirtyPages` that names the slot still does:
    /// [remove its pages](Self::clear_removed) there before you use it again.
    ///
    /// # Errors
    /// [`SlotError::Unknown`] if the removal is finished already, [`SlotError::Kept`] if it was cancelled. A reset failed, or fell
    /// short again and again: the slot is unchanged, and the call can be repeated.
    pub fn finish_slot(&self, retired: &RetiredSlot) -> Result<(), SlotError> {
        let finished = self.finish(retired);
        self.inner().emit_faults();
        finished
    }

    fn finish(&self, retired: &RetiredSlot) -> Result<(), SlotError> {
        let harvester = &self.inner().harvester;
        let _one_at_a_time = lock(&self.inner().slot_change);
        let slot = &retired.slot;
        harvester.layout().slots.check(slot, retired.removal)?;
        harvester.recycle_all_of(slot.id())?;
        self.forget(slot)
    }

    /// Removes the pages of slots that are no longer in the log from `dirty`. Returns the number of dirty pages it removed.
    ///
    /// It distinguishes slots, not ids: the pages of a slot whose removal is [finished](Self::finish_slot) go, also if another slot,
    /// of whatever size, has the id by now; the pages of that one stay. A slot whose removal has only [begun](Self::retire_slot) is
    /// still in the log.
    ///
    /// Use it where pages are kept while slots may come and go, as those that a broken link did not deliver: after each
    /// removal, or before the pages are used again. A sync replaces all pages and needs no such call. Runs and chunks that were made
    /// of the pages before do not change.
    ///
    /// It waits for a moment while slots or vCPUs change, and for no pass or sync. A set that another log has filled loses all of
    /// its pages.
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
    /// # log.mark_dirty(dimm, 998, 2)?;
    /// # let mut unsent = DirtyPages::new();
    /// log.sync(&mut unsent)?;
    /// // The link is broken. Meanwhile the DIMM is unplugged, and a smaller one plugged in:
    /// let retired = log.retire_slot(dimm)?;
    /// // ... deleted in KVM
    /// log.finish_slot(&retired)?;
    /// log.add_slot(dimm, 500)?;
    /// // The link is back:
    /// assert_eq!(log.clear_removed(&mut unsent), 2); // pages
    /// assert!(unsent.runs().all(|run| run.slot == ram));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn clear_removed(&self, dirty: &mut DirtyPages) -> u64 {
        let layout = self.inner().harvester.layout();
        dirty.clear_removed(&layout.slots)
    }

    /// Cancels a removal, if the slot was not deleted in KVM.
    ///
    /// The slot stays in the log as if [`retire_slot`](Self::retire_slot) had not been called, and nothing that was
    /// written meanwhile is lost.
    ///
    /// # Errors
    /// [`SlotError::Unknown`] if the removal is finished already, [`SlotError::Kept`] if it was cancelled already.
    pub fn keep_slot(&self, retired: &RetiredSlot) -> Result<(), SlotError> {
        let _one_at_a_time = lock(&self.inner().slot_change);
        let harvester = &self.inner().harvester;
        harvester.change_layout(|layout| layout.slots.keep(&retired.slot, retired.removal))
    }
}

/// A memslot whose removal has begun, see [`DirtyLog::retire_slot`].
#[must_use = "the slot's id stays taken until the removal is finished or cancelled"]
pub struct RetiredSlot {
    pub(super) slot: Arc<Slot>,
    pub(super) removal: Removal,
}

impl RetiredSlot {
    /// Returns the slot's id.
    pub fn id(&self) -> SlotId {
        self.slot.id()
    }
}

impl fmt::Debug for RetiredSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RetiredSlot").field(&self.id()).finish()
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::*;
    use crate::sim::{SimConfig, SimVm};

    /// The list that the log keeps between two syncs does not keep the bits of removed slots alive.
    #[test]
    fn a_slot_that_is_gone_is_kept_by_nobody() {
        let log = SimVm::new(SimConfig::default()).dirty_log();
        let [stays, goes] = [0, 1].map(|id| SlotId::new(0, id));
        log.add_slot(stays, 10).unwrap();
        log.add_slot(goes, 10).unwrap();
        let bits = {
            let layout = log.inner().harvester.layout();
            Arc::downgrade(layout.slots.get(goes.raw()).unwrap())
        };
        let mut dirty = DirtyPages::new();
        log.sync(&mut dirty).unwrap();
        // A list of all slots was made for the pages of one, and was swapped for the caller's.
        log.rearmed(stays).unwrap();
        log.mark_dirty(goes, 3, 1).unwrap();
        log.stop_tracking(stays, || Ok(())).unwrap();
        log.sync(&mut dirty).unwrap();
        let retired = log.retire_slot(goes).unwrap();
        log.finish_slot(&retired).unwrap();
        drop(retired);
        log.sync(&mut dirty).unwrap();
        assert!(bits.upgrade().is_none(), "its bits are kept");
    }
}
