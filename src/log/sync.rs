// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A sync: the pages written since the sync before.

use super::DirtyLog;
use crate::bitmap::pages::PageBits;
use crate::error::SyncError;
use crate::kernel::Mode;
use crate::observe::trace;
use crate::slots::dirty_pages::DirtyPages;
use crate::slots::table::Slot;
use crate::sync::{MutexGuard, lock};

impl DirtyLog {
    /// Replaces the contents of `dirty` by the pages written since the sync before.
    ///
    /// **The contents of these pages may be read once it has returned.** By then each of them is protected again, or is one that every
    /// sync reports, so a later write is reported by a later sync. Pages that the guest writes during the call are reported by this sync or the next. With every
    /// vCPU out of `KVM_RUN` and devices quiet, the pages of this sync and those before it are all the pages that were written,
    /// whatever other passes were under way.
    ///
    /// **Some pages are reported by every sync**: those under suspicion (see
    /// [`Stats::suspect_pages`](crate::Stats::suspect_pages)), all pages of a slot that is [not tracked](Self::stop_tracking), and all
    /// pages of all slots once a ring is [broken](crate::VcpuStats::broken). With a [working set](Self::set_working_set), also its
    /// [members](DirtyPages::members), which are not protected.
    ///
    /// **Every other page is returned once**, to the call that comes first. If two parts of a VMM need dirty pages, let one
    /// sync and share the result. To take the last pages of a slot that you remove, and no others, call
    /// [`sync_retired`](Self::sync_retired). If sending failed, keep the unsent pages, or [put them back](Self::put_back).
    ///
    /// Pages of a slot that is [being removed](Self::retire_slot) are still reported, and `dirty` may name it for longer. Keep its
    /// memory mapped until all of that is copied or cleared.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, SlotId};
    /// # let vm = SimVm::new(SimConfig::default());
    /// # let log = vm.dirty_log();
    /// # let ram = SlotId::new(0, 0);
    /// # log.add_slot(ram, 1000)?;
    /// # vm.create_slot(ram, 1000);
    /// # let vcpu = vm.add_vcpu();
    /// # let _ring = log.attach_ring(vcpu.ring_memory())?;
    /// # let copy = |slot: SlotId, pages: std::ops::Range<u64>| assert_eq!((slot, pages), (ram, 3..5));
    /// # (3..5).for_each(|page| vcpu.write(ram, page).unwrap());
    /// let mut dirty = DirtyPages::new(); // made once: its memory is used again each round
    /// log.sync(&mut dirty)?;
    /// for run in dirty.runs() {
    ///     copy(run.slot, run.first_page..run.first_page + run.pages);
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// A reset or the reading of the kernel's bitmaps failed, or there is no memory. `dirty` is empty then, and the pages come with
    /// the next sync.
    pub fn sync(&self, dirty: &mut DirtyPages) -> Result<(), SyncError> {
        let started = trace::flush(&self.inner().name);
        let synced = self.replace(dirty);
        trace::flushed(&self.inner().name, started, || dirty.page_count());
        self.inner.emit_faults();
        synced
    }

    /// Puts pages back that a sync has returned: all that is left in `dirty`.
    ///
    /// The next sync reports them again. Pages of slots that are no longer in the log are left out, also where another slot has
    /// the id by now.
    ///
    /// Use it for a migration that failed and is to continue from where it was, or for a snapshot that could not be written.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, SlotId};
    /// # let vm = SimVm::new(SimConfig::default());
    /// # let log = vm.dirty_log();
    /// # let ram = SlotId::new(0, 0);
    /// # log.add_slot(ram, 1000)?;
    /// # log.mark_dirty(ram, 1, 3)?;
    /// # let mut dirty = DirtyPages::new();
    /// log.sync(&mut dirty)?;
    /// // Page 1 is sent, then the link breaks:
    /// dirty.remove(ram, 1, 1);
    /// log.put_back(&dirty)?;
    /// log.sync(&mut dirty)?;
    /// assert!(!dirty.contains(ram, 1) && dirty.contains(ram, 2) && dirty.contains(ram, 3));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// There is no memory; then nothing was put back.
    pub fn put_back(&self, dirty: &DirtyPages) -> Result<(), SyncError> {
        let mut pending = lock(&self.inner.pending);
        if !pending.fit(&self.inner.harvester.layout().slots) {
            return Err(SyncError::NoMemory);
        }
        pending.add(dirty);
        Ok(())
    }

    fn replace(&self, dirty: &mut DirtyPages) -> Result<(), SyncError> {
        dirty.clear();
        let mut collected = Collected {
            pending: lock(&self.inner.pending),
            dirty,
            complete: false,
        };
        if !collected.pending.is_empty() {
            core::mem::swap(&mut *collected.pending, collected.dirty);
        }
        self.collect(collected.dirty)?;
        let harvester = &self.inner.harvester;
        if harvester.working_set.was_ever_on() {
            self.tell_members(collected.dirty, harvester.any_broken())?;
        }
        collected.complete = true;
        // The caller's list would keep slots alive that are gone, until some later sync needs it.
        *collected.pending = DirtyPages::new();
        Ok(())
    }

    /// Adds every page written before the call, and those under suspicion, to `dirty`. The caller holds the lock on syncs.
    pub(super) fn collect(&self, dirty: &mut DirtyPages) -> Result<(), SyncError> {
        let harvester = &self.inner.harvester;
        for shard in 0..harvester.pool.len() {
            // Waits for the pass that holds the shard: its pages are harvested, so this sync must not return without them.
            let mut pass = harvester.begin_on(harvester.pool.acquire(shard));
            if shard == 0 {
                // Before any other shard: a pass that takes one later finds no entry that this sync has to report.
                pass.harvest_all();
            }
            if !pass.reset()?.publish_into(dirty) {
                return Err(SyncError::NoMemory);
            }
        }
        if harvester.kernel().has_bitmap() {
            self.take_kernel_bits()?;
        }
        if !dirty.fit(&harvester.layout().slots) {
            return Err(SyncError::NoMemory);
        }
        let all = harvester.any_broken();
        // After the shards: a pass left a page open before it gave its shard back, and only the members report that write.
        let has_members = harvester.working_set.was_ever_on();
        for (slot, bits) in dirty.slots_mut() {
            slot.device().take_into(bits);
            slot.copy_suspects_into(bits);
            if has_members {
                slot.members().copy_into(bits);
            }
            if all {
                bits.fill();
            }
        }
        Ok(())
    }

    /// Notes which pages stay open. None counts as open where all of a slot is dirty in any case, or where the slot goes and this
    /// may be the last chance to send them.
    pub(super) fn tell_members(&self, dirty: &mut DirtyPages, all: bool) -> Result<(), SyncError> {
        let layout = self.inner.harvester.layout();
        let open = |slot: &Slot, members: &mut PageBits| {
            if !all && slot.is_tracked() && !layout.slots.is_retired(slot) {
                slot.copy_open_into(members);
            }
        };
        if !dirty.tell_members(open) {
            return Err(SyncError::NoMemory);
        }
        for slot in layout.slots.slots() {
            slot.members().note_sync();
        }
        let terms = &self.inner.harvester.working_set;
        terms.note_members(dirty.members().page_count());
        Ok(())
    }

    /// Moves the kernel's own bits to the device bits of each slot.
    fn take_kernel_bits(&self) -> Result<(), SyncError> {
        let harvester = &self.inner.harvester;
        let mut taking = self.inner.kernel_bits.lock();
        // Now, so that `add_slot` waits for this call if an id is about to name another slot.
        let layout = harvester.layout();
        for slot in layout.slots.slots().filter(|slot| slot.is_tracked()) {
            if !taking.fit(slot.pages()) {
                return Err(SyncError::NoMemory);
            }
            let retired = layout.slots.is_retired(slot);
            let kernel = harvester.kernel();
            if kernel.mode() == Mode::Bitmap && !retired && harvester.working_set.may_join() {
                taking.take_but_members(kernel, slot, &harvester.working_set)?;
            } else {
                taking.take(kernel, slot, retired)?;
            }
        }
        Ok(())
    }
}

/// The pages that a sync has collected. If it does not complete, by an error or a panic, they wait in the log for the next
/// one.
struct Collected<'a> {
    pending: MutexGuard<'a, DirtyPages>,
    dirty: &'a mut DirtyPages,
    complete: bool,
}

impl Drop for Collected<'_> {
    fn drop(&mut self) {
        if !self.complete {
            // The sync that reports a page decides whether it stays open.
            self.dirty.forget_kinds();
            core::mem::swap(&mut *self.pending, self.dirty);
        }
    }
}
