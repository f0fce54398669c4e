// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The last pages of a slot that is being removed.

use super::DirtyLog;
use super::slots::RetiredSlot;
use crate::error::{SlotError, SyncError};
use crate::slots::dirty_pages::DirtyPages;
use crate::sync::lock;

impl DirtyLog {
    /// Replaces the contents of `dirty` by the pages of a slot that is [being removed](Self::retire_slot) that no
    /// sync has returned yet.
    ///
    /// Call it before you delete the slot in KVM, if its memory is to be copied a last time.
    ///
    /// Any thread may remove a slot, also beside a migration. Pages of all other slots stay in the log and come with the next
    /// [`sync`](Self::sync). Pages of the slot that a sync has returned before, or returns until the removal is finished, are for
    /// that sync's caller to copy.
    ///
    /// Use a `DirtyPages` of its own: it has only that slot from then on, and keeps no memory for others.
    /// [Clear it](DirtyPages::clear) or drop it before the memory of the slot is unmapped.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, SlotId};
    /// # let vm = SimVm::new(SimConfig::default());
    /// # let log = vm.dirty_log();
    /// # let (ram, dimm) = (SlotId::new(0, 0), SlotId::new(0, 1));
    /// # log.add_slot(ram, 1000)?;
    /// # log.add_slot(dimm, 1000)?;
    /// log.mark_dirty(ram, 1, 1)?;
    /// log.mark_dirty(dimm, 2, 1)?;
    /// let retired = log.retire_slot(dimm)?;
    /// let mut last = DirtyPages::new();
    /// log.sync_retired(&retired, &mut last)?;
    /// assert!(last.contains(dimm, 2) && !last.contains(ram, 1));
    /// log.finish_slot(&retired)?;
    /// // The migration's own sync has what it would have had:
    /// let mut dirty = DirtyPages::new();
    /// log.sync(&mut dirty)?;
    /// assert!(dirty.contains(ram, 1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`SlotError::Unknown`] if the removal is finished, [`SlotError::Kept`] if it was cancelled; a reset or the reading of the
    /// kernel's bits failed, or there is no memory. `dirty` is empty then, and the pages come with the next call of this, or
    /// the next sync.
    pub fn sync_retired(
        &self,
        retired: &RetiredSlot,
        dirty: &mut DirtyPages,
    ) -> Result<(), SlotError> {
        let synced = self.move_retired(retired, dirty);
        self.inner.emit_faults();
        synced
    }

    fn move_retired(&self, retired: &RetiredSlot, dirty: &mut DirtyPages) -> Result<(), SlotError> {
        dirty.clear();
        let slot = &retired.slot;
        // Held to the end: the slot must still be there when its pages are moved.
        let _one_at_a_time = lock(&self.inner.slot_change);
        let layout = self.inner.harvester.layout();
        layout.slots.check(slot, retired.removal)?;
        let mut pending = lock(&self.inner.pending);
        // Like a sync that does not complete, this leaves the pages that it has collected for the next sync. That one decides
        // which of them stay open.
        self.collect(&mut pending).map_err(|error| match error {
            SyncError::Reset(error) => SlotError::Reset(error),
            SyncError::Bitmap(error) => SlotError::Bitmap(error),
            SyncError::NoMemory => SlotError::NoMemory {
                slot: slot.id(),
                pages: slot.pages(),
            },
        })?;
        pending.move_slot_into(slot, dirty);
        Ok(())
    }
}
