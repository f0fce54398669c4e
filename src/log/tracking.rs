//! Tracking that starts and stops while the guest runs: `KVM_MEM_LOG_DIRTY_PAGES` of single slots.

use std::io;

use super::DirtyLog;
use crate::error::SlotError;
use crate::slot_id::SlotId;
use crate::slots::table::Slot;
use crate::sync::{Arc, lock};

impl DirtyLog {
    /// Begins to track a slot, or begins anew: `log_on` sets `KVM_MEM_LOG_DIRTY_PAGES` for it, all
    /// else of its memory region as it was. vCPUs may run meanwhile.
    ///
    /// What was written before nobody knows. So the first sync that follows reports every page of
    /// the slot: it is the first round of a migration. Where that round is known to be complete
    /// otherwise, as the vCPUs have not run since, the sync's result may be thrown away.
    ///
    /// A slot is tracked from [`add_slot`](Self::add_slot) on. One that the VMM creates in KVM
    /// without the flag stops being so by [`stop_tracking`](Self::stop_tracking), which creates it.
    ///
    /// It waits for a sync under way, and for other changes of slots; `log_on` must not make any in
    /// this log, nor wait for a thread that does.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, SlotId};
    /// # let vm = SimVm::new(SimConfig::default());
    /// # let log = vm.dirty_log();
    /// # let set_flags = |slot, flags: u32| Ok::<_, std::io::Error>(vm.set_logged(slot, flags != 0));
    /// # const KVM_MEM_LOG_DIRTY_PAGES: u32 = 1;
    /// let ram = SlotId::new(0, 0);
    /// log.add_slot(ram, 1000)?;
    /// # vm.create_slot(ram, 1000);
    /// log.stop_tracking(ram, || set_flags(ram, 0))?; // created in KVM, not logged
    ///
    /// // A migration begins:
    /// log.start_tracking(ram, || set_flags(ram, KVM_MEM_LOG_DIRTY_PAGES))?;
    /// let mut dirty = DirtyPages::new();
    /// log.sync(&mut dirty)?;
    /// assert_eq!(dirty.page_count(), 1000);
    /// log.sync(&mut dirty)?;
    /// assert_eq!(dirty.page_count(), 0);
    /// // ... and ends, or is called off:
    /// log.stop_tracking(ram, || set_flags(ram, 0))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// The slot is not in the log, or being removed; [`SlotError::Switch`] with the error of `log_on`:
    /// then the slot is not tracked, whether or not KVM logs it.
    pub fn start_tracking(
        &self,
        slot: SlotId,
        log_on: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), SlotError> {
        let _one_at_a_time = lock(&self.inner().slot_change);
        let tracked = self.staying(slot)?;
        // Should the call fail, or panic, nobody knows whether the kernel logs it.
        self.untrack(&tracked);
        log_on().map_err(|source| SlotError::Switch { slot, source })?;
        // Only now: a sync that took the pages for dirty before would have them copied while writes
        // to them are not logged.
        let _no_sync = lock(&self.inner().pending);
        tracked.track();
        Ok(())
    }

    /// Stops to track a slot: `log_off` clears `KVM_MEM_LOG_DIRTY_PAGES` for it, or creates it
    /// without. vCPUs may run meanwhile, at full speed from then on.
    ///
    /// Until it is [started](Self::start_tracking) again, every sync reports every page of the
    /// slot, for each may be written. Entries that are left in the rings, and pages that devices
    /// mark, are kept; what a kernel's bitmap holds goes with it, and is among these pages. Pages
    /// under suspicion no longer are: starting protects every page; but for those that a
    /// [rearming](Self::rearm) would leave under it, too.
    ///
    /// It waits for a sync under way, and for other changes of slots; `log_off` must not make any
    /// in this log, nor wait for a thread that does.
    ///
    /// # Errors
    /// The slot is not in the log, or being removed; [`SlotError::Switch`] with the error of `log_off`: then the slot is not tracked, whether or not KVM still logs it.
    pub fn stop_tracking(
        &self,
        slot: SlotId,
        log_off: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), SlotError> {
        let _one_at_a_time = lock(&self.inner().slot_change);
        let tracked = self.staying(slot)?;
        // Before the flag goes: a sync in between would miss what is written and not logged.
        self.untrack(&tracked);
        log_off().map_err(|source| SlotError::Switch { slot, source })?;
        let mut pending = lock(&self.inner().pending);
        // Not before KVM has let go: it protects again only what it did not log. Without memory for
        // them they stay suspect, which costs time alone.
        if pending.fit(&self.inner().harvester.layout().slots) {
            for (slot, bits) in pending.slots_mut() {
                if core::ptr::eq(slot, &*tracked) {
                    self.inner().harvester.end_suspicion(slot, bits);
                    slot.members().end_into(bits);
                }
            }
        }
        Ok(())
    }

    /// From now on every sync reports all of the slot.
    fn untrack(&self, slot: &Slot) {
        let _no_sync = lock(&self.inner().pending);
        slot.untrack();
    }

    /// The slot, unless it is about to go.
    fn staying(&self, slot: SlotId) -> Result<Arc<Slot>, SlotError> {
        let layout = self.inner().harvester.layout();
        let tracked = layout.slots.get(slot.raw());
        let tracked = tracked.ok_or(SlotError::Unknown { slot })?;
        match layout.slots.is_retired(tracked) {
            true => Err(SlotError::Retired { slot }),
            false => Ok(Arc::clone(tracked)),
        }
    }
}
