// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The end of suspicion, by protecting a slot anew.

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
    /// Ends the suspicion of a slot that the VMM itself has protected: with the vCPUs stopped, it has set the slot's memory region
    /// without `KVM_MEM_LOG_DIRTY_PAGES` and then with it.
    ///
    /// Call it only after that, or pages are lost. Keep the vCPUs stopped until it returns; it would forgive what a reset has
    /// done since. It is for VMMs that protect slots for reasons of their own; all others call [`rearm`](Self::rearm).
    ///
    /// Pages under suspicion come with the next sync once more and are clean then, except where [`rearm`](Self::rearm) would leave
    /// them suspect. Where the kernel [has bitmaps](crate::Mode::Bitmap), which it drops when the flag is cleared, all pages of the
    /// slot come; no sync may be made between the two.
    ///
    /// It looks at every entry of every ring, as [`stop_tracking`](Self::stop_tracking) does. To re-arm many slots,
    /// [`rearm`](Self::rearm) looks once.
    ///
    /// # Errors
    /// The slot is not in the log, a ring is [broken](SlotError::BrokenRing), or there is no memory. The pages stay suspect.
    pub fn rearmed(&self, slot: SlotId) -> Result<(), SlotError> {
        self.refuse_if_broken()?;
        let layout = self.inner().harvester.layout();
        let tracked = layout.slots.get(slot.raw());
        let tracked = tracked.ok_or(SlotError::Unknown { slot })?;
        let mut pending = lock(&self.inner().pending);
        if self.inner().harvester.kernel().has_bitmap() {
            // Without `KVM_MEM_LOG_DIRTY_PAGES` the kernel has dropped its bits.
            tracked.device().set(0, tracked.pages());
        }
        let ended = core::slice::from_ref(tracked);
        self.end_suspicion(ended, &mut pending, |slot, bits| {
            slot.members().end_into(bits)
        })?;
        drop(pending);
        trace::rearmed(&self.inner().name, slot.raw());
        Ok(())
    }

    /// Once a ring is broken all is dirty for good, and stopping vCPUs would gain nothing.
    fn refuse_if_broken(&self) -> Result<(), SlotError> {
        let layout = self.inner().harvester.layout();
        match layout.vcpus.iter().position(|vcpu| vcpu.is_broken()) {
            Some(vcpu) => Err(SlotError::BrokenRing { vcpu }),
            None => Ok(()),
        }
    }

    /// Ends suspicion of these slots, ascending by id: every page of them was protected again, or will be before it is
    /// logged. `leave` ends the membership of those that stayed open. It looks through the rings once, for all of them.
    pub(super) fn end_suspicion(
        &self,
        ended: &[Arc<Slot>],
        pending: &mut DirtyPages,
        leave: impl Fn(&Slot, &mut PageBits),
    ) -> Result<(), SlotError> {
        let Some(first) = ended.first() else {
            return Ok(());
        };
        let harvester = &self.inner().harvester;
        if !pending.fit(&harvester.layout().slots) {
            let (slot, pages) = (first.id(), first.pages());
            return Err(SlotError::NoMemory { slot, pages });
        }
        let is_ended = |slot: &Slot| {
            let at = ended.binary_search_by_key(&slot.id(), |ended| ended.id());
            at.is_ok_and(|at| core::ptr::eq(&*ended[at], slot))
        };
        for (slot, bits) in pending.slots_mut().filter(|(slot, _)| is_ended(slot)) {
            slot.take_suspects_into(bits);
            leave(slot, bits);
        }
        harvester.suspect_past_the_end(ended);
        Ok(())
    }

    /// Ends all suspicion. Returns the number of slots that were protected anew.
    ///
    /// It calls `protect` with each slot that has suspect pages, ascending by id. `protect` must have all pages of the slot protected
    /// again: it sets the slot's memory region without `KVM_MEM_LOG_DIRTY_PAGES` and then with it. It is not called for slots whose
    /// [removal](Self::retire_slot) has begun, nor for those that are [not tracked](Self::stop_tracking). The pages come with the next
    /// sync once more and are clean then.
    ///
    /// **Stop the vCPUs before.** No vCPU may be in `KVM_RUN` meanwhile, as what it writes in between is not logged. Where the kernel
    /// has bitmaps, make no ioctl by which it writes guest memory, either (such as `KVM_DEV_ARM_ITS_SAVE_TABLES` or
    /// `KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES`).
    ///
    /// Each slot costs a stop, also one with a few suspects. [`rearm_from`](Self::rearm_from) leaves those alone.
    /// [`rearmed`](Self::rearmed), [`stop_tracking`](Self::stop_tracking) and, with rings, [`refresh`](Self::refresh) end suspicion,
    /// too.
    ///
    /// The whole slot stays suspect while an entry that names a page past the slot's end is harvested and not yet reset: the kernel
    /// protects none of the pages that it recycles together with that entry. Call `rearm` again after a sync has succeeded.
    ///
    /// Once all slots are protected, it looks at every entry of every ring, once for all of them.
    /// It waits for other changes of slots. `protect` must not change slots of this log, nor wait for a thread that does.
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
    /// // With every vCPU out of KVM_RUN:
    /// log.rearm(|slot| {
    ///     set_flags(slot, 0)?;
    ///     set_flags(slot, KVM_MEM_LOG_DIRTY_PAGES)
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`SlotError::BrokenRing`] if a ring is broken: `protect` was not called, and the suspicion stays for good.
    /// [`SlotError::Protect`] with the error of `protect`: every page of that slot is suspect then, because the slot may be
    /// unlogged. Slots after it are unchanged. [`SlotError::NoMemory`] and, where the kernel has bitmaps,
    /// [`SlotError::Bitmap`]: call it again. Slots that were protected before it failed may be done; all others stay suspect.
    pub fn rearm(
        &self,
        mut protect: impl FnMut(SlotId) -> io::Result<()>,
    ) -> Result<usize, SlotError> {
        self.protect_those(|slot| slot.suspects() > 0, &mut protect)
    }

    /// Ends the suspicion of the slots that have at least `least` suspect pages, as [`rearm`](Self::rearm) does for all. Returns the
    /// number of slots that were protected anew.
    ///
    /// A slot is worth a stop where that costs less than to copy its suspects in each of the rounds to come: as a rule from
    /// [`Stats::REARM_PAYS_FROM`](crate::Stats::REARM_PAYS_FROM) pages on. [`Stats::slots_to_rearm`](crate::Stats::slots_to_rearm)
    /// counts these slots, so that the VMM stops no vCPU in vain. The suspects of the other slots stay, and come with each sync.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::SlotId;
    /// # let vm = SimVm::new(SimConfig::default());
    /// # let log = vm.dirty_log();
    /// # let set_flags = |slot, flags: u32| Ok::<_, std::io::Error>(vm.set_logged(slot, flags != 0));
    /// # const KVM_MEM_LOG_DIRTY_PAGES: u32 = 1;
    /// use kvm_dirty_ring::Stats;
    ///
    /// if log.stats().slots_to_rearm > 0 {
    ///     // With every vCPU out of KVM_RUN:
    ///     log.rearm_from(Stats::REARM_PAYS_FROM, |slot| {
    ///         set_flags(slot, 0)?;
    ///         set_flags(slot, KVM_MEM_LOG_DIRTY_PAGES)
    ///     })?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`rearm`](Self::rearm).
    pub fn rearm_from(
        &self,
        least: u64,
        mut protect: impl FnMut(SlotId) -> io::Result<()>,
    ) -> Result<usize, SlotError> {
        // 0 must not protect slots that have none.
        let least = least.max(1);
        self.protect_those(|slot| slot.suspects() >= least, &mut protect)
    }

    /// Has the `concerned` slots protected anew, then ends suspicion of all of them at once. Returns how many there were.
    pub(super) fn protect_those(
        &self,
        concerned: impl Fn(&Slot) -> bool,
        protect: &mut dyn FnMut(SlotId) -> io::Result<()>,
    ) -> Result<usize, SlotError> {
        self.refuse_if_broken()?;
        let one_at_a_time = lock(&self.inner().slot_change);
        let layout = self.inner().harvester.layout();
        // A slot that is not tracked must not become logged by this.
        let concerned = |slot: &Slot| concerned(slot) && slot.is_tracked();
        let (mut protected, mut outcome) = (Vec::new(), Ok(()));
        for slot in layout.slots.staying().filter(|slot| concerned(slot)) {
            outcome = self.protect_anew(slot, protect);
            if outcome.is_err() {
                break;
            }
            protected.push(Arc::clone(slot));
        }
        let mut pending = lock(&self.inner().pending);
        let ended = self.end_suspicion(&protected, &mut pending, |slot, bits| {
            slot.members().end_leaving(bits)
        });
        drop((pending, one_at_a_time));
        ended?;
        for slot in &protected {
            trace::rearmed(&self.inner().name, slot.id().raw());
        }
        outcome?;
        Ok(protected.len())
    }

    /// Has a slot protected that is tracked and stays. Under the lock on changes of slots.
    fn protect_anew(
        &self,
        slot: &Slot,
        protect: &mut dyn FnMut(SlotId) -> io::Result<()>,
    ) -> Result<(), SlotError> {
        self.switch_initially_set_off(slot.id())?;
        {
            let _pending = lock(&self.inner().pending);
            if self.inner().harvester.kernel().has_bitmap() {
                // The kernel is about to drop its bits, and a sync meanwhile would find no bitmap.
                self.take_bits_of(slot)?;
                slot.untrack();
            }
            // Members are open until the slot is protected. A page that joins from here on stays a member.
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
        Ok(())
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

/// A slot whose log the VMM is switching off and on. If that fails or panics, it is unknown whether the kernel still logs
/// it.
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
