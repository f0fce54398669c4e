//! Suspicion ends where a slot is protected anew.

use std::io;

use super::DirtyLog;
use crate::bitmap::pages::PageBits;
use crate::error::SlotError;
use crate::observe::trace;
use crate::slot_id::SlotId;
use crate::slots::dirty_pages::DirtyPages;
use crate::slots::table::Slot;
use crate::sync::{Arc, lock};

impl DirtyLog {
    /// Reports that every page of the slot was protected again, as [`rearm`](Self::rearm) does
    /// for all slots that need it: that, with the vCPUs stopped, the VMM has set the slot's memory
    /// region without `KVM_MEM_LOG_DIRTY_PAGES` and then with it. Pages under suspicion come with the
    /// next sync once more and are then clean; but where [`rearm`](Self::rearm) would leave them. The vCPUs
    /// stay stopped until this returns: it would forgive what a reset has done since. Where the kernel [has
    /// bitmaps](crate::Mode::Bitmap), which it throws away thereby, all pages of the slot come, and no
    /// sync may be made between the two.
    ///
    /// For a VMM that protects slots for reasons of its own; others call [`rearm`](Self::rearm). Called
    /// of a slot that was *not* protected, it loses pages.
    ///
    /// # Errors
    /// The slot is not tracked, a ring is [broken](SlotError::BrokenRing), or there is no memory; the pages stay
    /// suspect.
    pub fn rearmed(&self, slot: SlotId) -> Result<(), SlotError> {
        self.refuse_if_broken()?;
        let layout = self.inner().harvester.layout();
        let tracked = layout.slots.get(slot.raw());
        let tracked = tracked.ok_or(SlotError::Unknown { slot })?;
        let mut pending = lock(&self.inner().pending);
        if self.inner().harvester.kernel().has_bitmap() {
            // Without `KVM_MEM_LOG_DIRTY_PAGES` the kernel has thrown its bits away.
            tracked.device().set(0, tracked.pages());
        }
        self.end_suspicion(tracked, &mut pending, |slot, bits| {
            slot.members().end_into(bits)
        })?;
        drop(pending);
        trace::rearmed(slot.raw());
        Ok(())
    }

    /// All is dirty for good once a ring is broken, and to stop vCPUs for it is in vain.
    fn refuse_if_broken(&self) -> Result<(), SlotError> {
        let layout = self.inner().harvester.layout();
        match layout.vcpus.iter().position(|vcpu| vcpu.is_broken()) {
            Some(vcpu) => Err(SlotError::BrokenRing { vcpu }),
            None => Ok(()),
        }
    }

    /// Every page of the slot is protected again. `leave` ends the membership of those that stayed open.
    fn end_suspicion(
        &self,
        tracked: &Slot,
        pending: &mut DirtyPages,
        leave: impl Fn(&Slot, &mut PageBits),
    ) -> Result<(), SlotError> {
        if !pending.fit(&self.inner().harvester.layout().slots) {
            let (slot, pages) = (tracked.id(), tracked.pages());
            return Err(SlotError::NoMemory { slot, pages });
        }
        for (slot, bits) in pending.slots_mut() {
            if core::ptr::eq(slot, tracked) {
                self.inner().harvester.end_suspicion(slot, bits);
                leave(slot, bits);
            }
        }
        Ok(())
    }

    /// Ends every suspicion. `protect` is called with each slot that has pages under it, ascending
    /// by id, and is to have all pages of the slot protected again: it sets the slot's memory
    /// region without `KVM_MEM_LOG_DIRTY_PAGES` and then with it. No vCPU may be in `KVM_RUN`
    /// meanwhile: what it wrote in between would not be logged. Where the kernel has bitmaps, nor may any ioctl be made
    /// by which it writes guest memory (as `KVM_DEV_ARM_ITS_SAVE_TABLES`). The pages come with the next sync
    /// once more and are then clean. Returns how many slots there were; `protect` is not called for
    /// those whose [removal](Self::retire_slot) has begun, nor for those that are [not
    /// tracked](Self::stop_tracking).
    ///
    /// All of a slot stays suspect where an entry that names a page past its end is harvested and not yet
    /// reset: the kernel will protect none of what it recycles together with that one. Once a sync has
    /// succeeded, rearm again.
    ///
    /// It waits for other changes of slots; `protect` must not make any in this log, nor wait for a thread
    /// that does: stop the vCPUs before.
    ///
    /// It pays as soon as a sync has reported suspects (see
    /// [`Stats::suspect_pages`](crate::Stats::suspect_pages)), since all of them have to be copied each
    /// time.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::SlotId;
    /// # let vm = SimVm::new(SimConfig::default());
    /// # let log = vm.dirty_log();
    /// # let ram = SlotId::new(0, 0);
    /// # log.add_slot(ram, 1000)?;
    /// # vm.create_slot(ram, 1000);
    /// # let set_flags = |slot, flags: u32| Ok::<_, std::io::Error>(vm.set_logged(slot, flags != 0));
    /// # const KVM_MEM_LOG_DIRTY_PAGES: u32 = 1;
    /// if log.stats().suspect_pages > 0 {
    ///     // With every vCPU out of KVM_RUN:
    ///     log.rearm(|slot| {
    ///         set_flags(slot, 0)?;
    ///         set_flags(slot, KVM_MEM_LOG_DIRTY_PAGES)
    ///     })?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`SlotError::BrokenRing`] if a ring is broken: `protect` was not called, and nothing ends that.
    /// [`SlotError::Protect`] with the error of `protect`: every page of that slot is suspect then, as it
    /// need not be logged any more. Or there is no memory. Slots after it stay as they were.
    pub fn rearm(
        &self,
        mut protect: impl FnMut(SlotId) -> io::Result<()>,
    ) -> Result<usize, SlotError> {
        self.protect_those(|slot| slot.suspects() > 0, &mut protect)
    }

    /// Has the slots protected anew that are `concerned`. How many there were.
    pub(super) fn protect_those(
        &self,
        concerned: impl Fn(&Slot) -> bool,
        protect: &mut dyn FnMut(SlotId) -> io::Result<()>,
    ) -> Result<usize, SlotError> {
        self.refuse_if_broken()?;
        let layout = self.inner().harvester.layout();
        let mut rearmed = 0;
        for slot in layout.slots.staying() {
            // One that is not tracked is not to be logged thereby.
            let concerned = concerned(slot) && slot.is_tracked();
            if concerned && self.protect_anew(slot, protect)? {
                trace::rearmed(slot.id().raw());
                rearmed += 1;
            }
        }
        Ok(rearmed)
    }

    /// Has a slot protected, and ends suspicion of it: unless it was removed or stopped meanwhile.
    fn protect_anew(
        &self,
        slot: &Arc<Slot>,
        protect: &mut dyn FnMut(SlotId) -> io::Result<()>,
    ) -> Result<bool, SlotError> {
        let _one_at_a_time = lock(&self.inner().slot_change);
        let layout = self.inner().harvester.layout();
        if !layout.slots.holds(slot) || layout.slots.is_retired(slot) || !slot.is_tracked() {
            return Ok(false);
        }
        {
            let _pending = lock(&self.inner().pending);
            if self.inner().harvester.kernel().has_bitmap() {
                // The kernel is about to throw its bits away, and a sync meanwhile would find no bitmap.
                self.take_bits_of(slot)?;
                slot.untrack();
            }
            // Members are open until the slot is protected. What joins from here on stays one.
            slot.members().begin_leaving();
        }
        let mut unsure = Unsure {
            log: self,
            slot,
            is_protected: false,
        };
        let id = slot.id();
        protect(id).map_err(|source| SlotError::Protect { slot: id, source })?;
        unsure.is_protected = true;
        drop(unsure);
        let mut pending = lock(&self.inner().pending);
        self.end_suspicion(slot, &mut pending, |slot, bits| {
            slot.members().end_leaving(bits)
        })?;
        Ok(true)
    }

    fn take_bits_of(&self, slot: &Slot) -> Result<(), SlotError> {
        let (id, pages) = (slot.id(), slot.pages());
        let mut taking = self.inner().kernel_bits.lock();
        if !taking.fit(pages) {
            return Err(SlotError::NoMemory { slot: id, pages });
        }
        Ok(taking.take(self.inner().harvester.kernel(), slot, false)?)
    }
}

/// A slot that the VMM is switching off and on: if that fails or panics, nobody knows whether the kernel
/// still logs it.
struct Unsure<'a> {
    log: &'a DirtyLog,
    slot: &'a Slot,
    is_protected: bool,
}

impl Drop for Unsure<'_> {
    fn drop(&mut self) {
        let inner = self.log.inner();
        let _pending = lock(&inner.pending);
        if !self.is_protected {
            self.slot.suspect_all();
            self.slot.members().stay();
        }
        match (inner.harvester.kernel().has_bitmap(), self.is_protected) {
            (false, _) => {}
            // Its bits were taken before.
            (true, true) => self.slot.track_again(),
            (true, false) => self.slot.track(),
        }
    }
}
