// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The last sync of a guest that has stopped: it protects nothing.

use core::fmt;

use super::DirtyLog;
use crate::error::SyncError;
use crate::observe::trace;
use crate::slot_id::SlotId;
use crate::slots::dirty_pages::DirtyPages;
use crate::slots::dirty_part::{DirtyPart, Run};
use crate::sync::lock;

/// The pages that a [last sync](DirtyLog::last_sync) found dirty.
///
/// They are not protected: the list holds as long as every vCPU stays stopped and devices are quiet.
#[derive(Default)]
pub struct LastPages {
    pages: DirtyPages,
}

impl LastPages {
    /// Creates an empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the dirty pages as runs, ascending by slot, then by page. Each run is as long as possible.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.pages.runs()
    }

    /// Returns the number of dirty pages.
    pub fn page_count(&self) -> u64 {
        self.pages.page_count()
    }

    /// Returns whether no page is dirty.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Returns whether `page` of `slot` is dirty.
    pub fn contains(&self, slot: SlotId, page: u64) -> bool {
        self.pages.contains(slot, page)
    }

    /// Returns all pages as one part, to be [split](DirtyPart::split) among threads.
    pub fn part(&self) -> DirtyPart<'_> {
        self.pages.part()
    }
}

impl fmt::Debug for LastPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LastPages")
            .field("pages", &self.page_count())
            .finish_non_exhaustive()
    }
}

impl DirtyLog {
    /// Replaces the contents of `last` by every page written since the sync before, and every member of the working set, and
    /// protects none of them.
    ///
    /// Call it for the last round of a migration, when every vCPU is out of `KVM_RUN` and devices are quiet. It saves the resets of
    /// the rings' entries, which would count for the downtime.
    ///
    /// It takes nothing from the log. If the guest is to run again, continue as if this call had not been made: the next
    /// [`sync`](Self::sync) reports all of it again, once, and protects it. Where KVM cannot read a bitmap without clearing it (no
    /// manual protection), this call protects pages, too.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, LastPages, SlotId};
    /// # let vm = SimVm::new(SimConfig::default());
    /// # let log = vm.dirty_log();
    /// # let ram = SlotId::new(0, 0);
    /// # log.add_slot(ram, 1000)?;
    /// # vm.create_slot(ram, 1000);
    /// # let vcpu = vm.add_vcpu();
    /// # let _ring = log.attach_ring(vcpu.ring_memory())?;
    /// vcpu.write(ram, 5)?;
    /// // Every vCPU is stopped:
    /// let mut last = LastPages::new();
    /// log.last_sync(&mut last)?;
    /// assert!(last.contains(ram, 5));
    /// // The other side does not answer: the guest goes on here.
    /// let mut dirty = DirtyPages::new();
    /// log.sync(&mut dirty)?;
    /// assert!(dirty.contains(ram, 5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`sync`](Self::sync), but no reset can fail, as none is made. `last` may hold some of the pages then, and must not be
    /// used.
    pub fn last_sync(&self, last: &mut LastPages) -> Result<(), SyncError> {
        let started = trace::flush(&self.inner().name);
        let synced = self.copy_all(&mut last.pages);
        trace::flushed(&self.inner().name, started, || last.page_count());
        self.inner.emit_faults();
        synced
    }

    fn copy_all(&self, dirty: &mut DirtyPages) -> Result<(), SyncError> {
        let pending = lock(&self.inner.pending);
        let harvester = &self.inner.harvester;
        dirty.clear();
        for shard in 0..harvester.pool.len() {
            // Waits for the pass that holds the shard, as a sync does.
            let mut pass = harvester.begin_on(harvester.pool.acquire(shard));
            if shard == 0 {
                // Before any other shard, as in a sync. No page may stay open by this.
                pass.close_all();
                pass.harvest_all();
            }
            if !pass.copy_into(dirty) {
                return Err(SyncError::NoMemory);
            }
        }
        let layout = harvester.layout();
        if !dirty.fit(&layout.slots) {
            return Err(SyncError::NoMemory);
        }
        dirty.add(&pending);
        if harvester.kernel().has_bitmap() {
            let mut taking = self.inner.kernel_bits.lock();
            for (slot, bits) in dirty.slots_mut().filter(|(slot, _)| slot.is_tracked()) {
                if !taking.fit(slot.pages()) {
                    return Err(SyncError::NoMemory);
                }
                let retired = layout.slots.is_retired(slot);
                taking.copy(harvester.kernel(), slot, retired, bits)?;
            }
        }
        let all = harvester.any_broken();
        for (slot, bits) in dirty.slots_mut() {
            slot.device().copy_into(bits);
            slot.copy_suspects_into(bits);
            slot.members().copy_into(bits);
            if all {
                bits.fill();
            }
        }
        Ok(())
    }
}
