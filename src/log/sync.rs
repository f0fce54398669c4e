//! A sync: the pages written since the one before.

use super::DirtyLog;
use crate::bitmap::pages::PageBits;
use crate::error::SyncError;
use crate::kernel::Mode;
use crate::observe::trace;
use crate::slots::dirty_pages::DirtyPages;
use crate::slots::table::Slot;
use crate::sync::{MutexGuard, lock};

impl DirtyLog {
    /// Replaces what is in `dirty` by the pages written since the sync before.
    ///
    /// When it returns, each of these pages is protected again: a write that comes later is
    /// reported by a later sync, so the contents may be read from now on. Pages that the guest
    /// writes while this runs are reported now or next time. With every vCPU stopped outside of
    /// `KVM_RUN` and devices quiet, the pages of this sync and those before it are all the pages
    /// that were written, whatever other passes were under way.
    ///
    /// Pages under suspicion (see [`Stats::suspect_pages`](crate::Stats::suspect_pages)) are reported each time, and so are all
    /// pages of a slot that is [not tracked](Self::stop_tracking), and all pages of all slots once a ring is
    /// [broken](crate::VcpuStats::broken).
    ///
    /// Where a [working set](Self::set_working_set) is on, some of these pages are not protected: those that
    /// [`DirtyPages::members`] tells from the [others](DirtyPages::others). Each sync reports them.
    ///
    /// Each other page, of whichever slot, is handed out once, to whichever call comes first: where two parts of
    /// a VMM need dirty pages, let one sync, and keep the result for both. A thread that needs the last pages of a
    /// slot that it removes takes these alone, by [`sync_retired`](Self::sync_retired). Pages that were not copied,
    /// because sending them failed, are the caller's: keep them, or [give them back](Self::put_back). While a
    /// slot is [being removed](Self::retire_slot) its pages are reported still, and `dirty` may name it
    /// for longer: keep its memory until all of that is copied or cleared.
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
    /// A reset or the taking of the kernel's bits failed, or there is no memory. `dirty` is empty then,
    /// and the pages come with the next sync.
    pub fn sync(&self, dirty: &mut DirtyPages) -> Result<(), SyncError> {
        let started = trace::flush();
        let synced = self.replace(dirty);
        trace::flushed(started, || dirty.page_count());
        self.inner.emit_faults();
        synced
    }

    /// Gives pages back that a sync has handed out: all of `dirty`, or what is left of it when what was sent is taken out. The
    /// next sync reports them again. Pages of slots that are no longer tracked are left out.
    ///
    /// For a migration that fails and is to be begun again from where it was, or a snapshot that could not be written.
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
    /// There is no memory for it; then nothing was given back.
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
        // What was the caller's would keep slots that are gone, for as long as no sync needs it.
        *collected.pending = DirtyPages::new();
        Ok(())
    }

    /// Adds every page written before the call, and those under suspicion, to `dirty`. Under the lock on syncs.
    pub(super) fn collect(&self, dirty: &mut DirtyPages) -> Result<(), SyncError> {
        let harvester = &self.inner.harvester;
        for shard in 0..harvester.pool.len() {
            // Waits for the pass that holds the shard: its pages are harvested, and we are not to
            // return without them.
            let mut pass = harvester.begin_on(harvester.pool.acquire(shard));
            if shard == 0 {
                // Before any other shard: a pass that takes one later finds nothing of what we are
                // bound to report.
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
        // After the shards: who has left a page open there did so before, and its write is reported by this alone.
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

    /// Notes which pages stay open. Where all of a slot is dirty in any case, or it goes and this may be the last chance to
    /// send them, none counts as such.
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
        let terms = &self.inner.harvester.working_set;
        terms.note_members(dirty.members().page_count());
        Ok(())
    }

    /// Moves what the kernel itself has logged to the device bits of each slot.
    fn take_kernel_bits(&self) -> Result<(), SyncError> {
        let harvester = &self.inner.harvester;
        let mut taking = self.inner.kernel_bits.lock();
        // Now, so that `add_slot` waits for us if an id is about to name another slot.
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

/// What a sync has collected. If it does not complete, by an error or a panic, its pages wait in the
/// log for the next one.
struct Collected<'a> {
    pending: MutexGuard<'a, DirtyPages>,
    dirty: &'a mut DirtyPages,
    complete: bool,
}

impl Drop for Collected<'_> {
    fn drop(&mut self) {
        if !self.complete {
            // Whether a page stays open is decided by the sync that reports it.
            self.dirty.forget_kinds();
            core::mem::swap(&mut *self.pending, self.dirty);
        }
    }
}
