// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Starting and stopping the tracking of single slots (`KVM_MEM_LOG_DIRTY_PAGES`) while the guest runs.

use std::io;

use super::DirtyLog;
use crate::error::SlotError;
use crate::slot_id::SlotId;
use crate::slots::table::Slot;
use crate::sync::{Arc, lock};

impl DirtyLog {
    /// Starts to track a slot, or starts anew.
    ///
    /// `log_on` sets `KVM_MEM_LOG_DIRTY_PAGES` for it and leaves the rest of its memory region unchanged. vCPUs may
    /// run meanwhile.
    ///
    /// The first sync that follows reports every page of the slot, because earlier writes were not logged. It is the first round of
    /// a migration. Ignore it only if you copy all memory yourself after the sync has returned. If that copy begins earlier, keep vCPUs
    /// and devices stopped from its beginning until the sync has returned.
    ///
    /// A slot is tracked from [`add_slot`](Self::add_slot) on. If the VMM creates it in KVM without the flag, create it inside
    /// [`stop_tracking`](Self::stop_tracking).
    ///
    /// It waits for a sync under way, and for other changes of slots. `log_on` must not change slots of this log, nor wait for a
    /// thread that does.
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
    /// The slot is not in the log, or is being removed. [`SlotError::InitiallySet`], and `log_on` was not called.
    /// [`SlotError::Switch`] with the error of `log_on`: the slot is not tracked then, whether or not KVM logs it.
    pub fn start_tracking(
        &self,
        slot: SlotId,
        log_on: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), SlotError> {
        let _one_at_a_time = lock(&self.inner().slot_change);
        let tracked = self.staying(slot)?;
        self.switch_initially_set_off(slot)?;
        // If the call fails or panics, it is unknown whether the kernel logs the slot.
        self.untrack(&tracked);
        log_on().map_err(|source| SlotError::Switch { slot, source })?;
        // Only now: a sync that took the pages for dirty before would have them copied while writes to them are not logged.
        let _no_sync = lock(&self.inner().pending);
        tracked.track();
        Ok(())
    }

    /// Stops tracking a slot.
    ///
    /// `log_off` clears `KVM_MEM_LOG_DIRTY_PAGES` for it, or creates it without the flag. vCPUs may run meanwhile,
    /// at full speed from then on.
    ///
    /// Until it is [started](Self::start_tracking) again, every sync reports every page of the slot, as each may have been
    /// written. Entries that are left in the rings, and marks of devices, are kept. KVM drops its bitmap of the slot, whose pages
    /// are among those reported. Pages of the slot are suspect no longer, as starting protects every page; exceptions are those
    /// that [`rearm`](Self::rearm) would leave suspect.
    ///
    /// It waits for a sync under way, and for other changes of slots. `log_off` must not change slots of this log, nor wait for a
    /// thread that does.
    ///
    /// It looks at every entry of every ring. To stop many slots, call [`stop_tracking_all`](Self::stop_tracking_all).
    ///
    /// # Errors
    /// The slot is not in the log, or is being removed. [`SlotError::Switch`] with the error of `log_off`: the slot is not tracked
    /// then, whether or not KVM still logs it.
    pub fn stop_tracking(
        &self,
        slot: SlotId,
        log_off: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), SlotError> {
        let mut log_off = Some(log_off);
        // One slot, so it is called once.
        let once = |_| log_off.take().map_or(Ok(()), |log_off| log_off());
        self.stop_tracking_all([slot], once)
    }

    /// Stops tracking many slots.
    ///
    /// As [`stop_tracking`](Self::stop_tracking), but it looks through the rings once for all of them, and not for each. It calls
    /// `log_off` with each slot, ascending by id.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::SlotId;
    /// # let vm = SimVm::new(SimConfig::default());
    /// # let log = vm.dirty_log();
    /// # let set_flags = |slot, flags: u32| Ok::<_, std::io::Error>(vm.set_logged(slot, flags != 0));
    /// let slots = [SlotId::new(0, 0), SlotId::new(0, 1)];
    /// # slots.iter().try_for_each(|&slot| { vm.create_slot(slot, 1000); log.add_slot(slot, 1000) })?;
    /// log.stop_tracking_all(slots, |slot| set_flags(slot, 0))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// A slot is not in the log, or is being removed: none was stopped then. [`SlotError::Switch`] with the error of `log_off`:
    /// that slot is not tracked, nor are those before it; those after it are unchanged.
    pub fn stop_tracking_all(
        &self,
        slots: impl IntoIterator<Item = SlotId>,
        mut log_off: impl FnMut(SlotId) -> io::Result<()>,
    ) -> Result<(), SlotError> {
        let _one_at_a_time = lock(&self.inner().slot_change);
        let tracked = slots.into_iter().map(|slot| self.staying(slot));
        let mut tracked = tracked.collect::<Result<Vec<_>, _>>()?;
        tracked.sort_by_key(|slot| slot.id());
        tracked.dedup_by_key(|slot| slot.id());
        let (mut stopped, mut outcome) = (0, Ok(()));
        for tracked in &tracked {
            let slot = tracked.id();
            // Before the flag goes: a sync in between would miss what is written and not logged.
            self.untrack(tracked);
            outcome = log_off(slot).map_err(|source| SlotError::Switch { slot, source });
            if outcome.is_err() {
                break;
            }
            stopped += 1;
        }
        let mut pending = lock(&self.inner().pending);
        // Not before KVM has switched: it protects again only what it did not log. Without memory for them they stay suspect,
        // which costs only time.
        let _ = self.end_suspicion(&tracked[..stopped], &mut pending, |slot, bits| {
            slot.members().end_into(bits)
        });
        outcome
    }

    /// Has KVM protect the slot when its log is switched on, whatever the VMM has enabled meanwhile.
    pub(super) fn switch_initially_set_off(&self, slot: SlotId) -> Result<(), SlotError> {
        let kernel = self.inner().harvester.kernel();
        let switched = kernel.switch_initially_set_off();
        switched.map_err(|source| SlotError::InitiallySet { slot, source })
    }

    /// Makes every sync report all of the slot from now on.
    fn untrack(&self, slot: &Slot) {
        let _no_sync = lock(&self.inner().pending);
        slot.untrack();
    }

    /// Finds the slot, unless it is being removed.
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

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::*;
    use crate::sim::{SimConfig, SimVm};

    const SLOTS: u16 = 1000;
    const PAGES: u64 = 64;
    const RINGS: u64 = 16;

    /// A thousand slots are stopped, or re-armed, under locks: the rings are looked through once.
    #[test]
    fn many_slots_take_one_look_at_the_rings() {
        let config = SimConfig {
            ring_entries: 65_536,
            ..SimConfig::default()
        };
        let look = RINGS * u64::from(config.ring_entries);
        let vm = SimVm::new(config);
        let log = vm.dirty_log();
        let slots: Vec<SlotId> = (0..SLOTS).map(|id| SlotId::new(0, id)).collect();
        for &slot in &slots {
            log.add_slot(slot, PAGES).unwrap();
            vm.create_slot(slot, PAGES);
        }
        let vcpus: Vec<_> = (0..RINGS).map(|_| vm.add_vcpu()).collect();
        let attach = |vcpu: &crate::sim::SimVcpu| log.attach_ring(vcpu.ring_memory()).unwrap();
        let mut rings: Vec<_> = vcpus.iter().map(attach).collect();
        let harvester = &log.inner().harvester;
        let looked_at = || harvester.counts.looked_at.get();
        let switch = |slot, logged| {
            vm.set_logged(slot, logged);
            Ok(())
        };
        // An entry past the end of its slot waits for its reset: all are suspect.
        vcpus[3].garble_next(slots[7].raw(), PAGES);
        vcpus[3].write(slots[2], 5).unwrap();
        rings[3].harvest_and_stop();
        assert_eq!(harvester.suspects(), u64::from(SLOTS) * PAGES);
        let stop_all =
            || log.stop_tracking_all(slots.iter().rev().copied(), |slot| switch(slot, false));
        stop_all().unwrap();
        assert_eq!(looked_at(), look);
        assert_eq!(harvester.suspects(), PAGES, "the slot that the entry names");
        for &slot in &slots {
            log.start_tracking(slot, || switch(slot, true)).unwrap();
        }
        // Another makes all of them suspect; both are recycled, and a re-arming finds none.
        vcpus[3].garble_next(slots[8].raw(), PAGES);
        vcpus[3].write(slots[3], 5).unwrap();
        log.reap().unwrap();
        let rearmed = log.rearm(|slot| switch(slot, false).and_then(|()| switch(slot, true)));
        assert_eq!(rearmed.unwrap(), usize::from(SLOTS));
        assert_eq!((looked_at(), harvester.suspects()), (2 * look, 0));
    }
}
