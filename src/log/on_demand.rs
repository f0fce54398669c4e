// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A sync of bitmaps that protects pages only when they are about to be read.

use core::fmt;

use super::DirtyLog;
use crate::bitmap::words::words_for;
use crate::error::SyncError;
use crate::kernel::Mode;
use crate::observe::trace;
use crate::slots::dirty_pages::DirtyPages;
use crate::slots::dirty_part::DirtyPart;
use crate::sync::lock;

/// The pages that a [sync on demand](DirtyLog::sync_on_demand) found dirty, to be read chunk by chunk.
///
/// A chunk's pages are protected when the chunk is requested.
///
/// Dropping it early loses nothing: the kernel still has the bits of pages that were not read, the log has the rest, and the
/// next sync reports both. Drop it before the last sync of a migration: until then that sync may lack what the handle holds.
///
/// - A [refresh](DirtyLog::refresh) meanwhile changes no chunk. The next sync reports the members that it has closed.
/// - If the working set is [switched off](DirtyLog::set_working_set) meanwhile, members are in no chunk all the same; every sync
///   reports them until a refresh.
/// - If a slot's [tracking stops](DirtyLog::stop_tracking) meanwhile, its chunks are returned without protection, and every sync reports
///   all of the slot.
#[must_use]
pub struct OnDemand {
    log: DirtyLog,
    /// The pages that are still to be returned, members included; and the last chunk.
    found: DirtyPages,
    /// Those of them that the kernel has still to protect.
    unprotected: DirtyPages,
    chunk: DirtyPages,
}

impl DirtyLog {
    /// Syncs as [`sync`](Self::sync) does, but in [`Mode::Bitmap`] protects no page yet: [`OnDemand::next_chunk`] protects each chunk
    /// when it returns it.
    ///
    /// A page that the guest writes again before its turn comes costs no fault and is sent once, and no vCPU has to wait while a
    /// whole slot is cleared. Where the log has rings, or the kernel cannot read bits without clearing them, all pages are
    /// protected at once, as by a sync.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{Mode, SlotId};
    /// # let mut config = SimConfig::default();
    /// # config.mode = Mode::Bitmap;
    /// # let vm = SimVm::new(config);
    /// # let log = vm.dirty_log();
    /// # let ram = SlotId::new(0, 0);
    /// # log.add_slot(ram, 100_000)?;
    /// # vm.create_slot(ram, 100_000);
    /// # let vcpu = vm.add_vcpu();
    /// # for page in [5, 70_000] { vcpu.write(ram, page)?; }
    /// let mut found = log.sync_on_demand()?;
    /// let mut sent = 0;
    /// while let Some(chunk) = found.next_chunk(32_768)? {
    ///     sent += chunk.runs().map(|run| run.pages).sum::<u64>();
    /// }
    /// assert_eq!(sent, 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`sync`](Self::sync).
    pub fn sync_on_demand(&self) -> Result<OnDemand, SyncError> {
        let mut found = OnDemand {
            log: self.clone(),
            found: DirtyPages::new(),
            unprotected: DirtyPages::new(),
            chunk: DirtyPages::new(),
        };
        if self.mode() == Mode::Rings {
            self.sync(&mut found.found)?;
            return Ok(found);
        }
        let started = trace::flush(&self.inner().name);
        let collected = self.find(&mut found);
        trace::flushed(&self.inner().name, started, || found.found.page_count());
        self.inner().emit_faults();
        collected.map(|()| found)
    }

    fn find(&self, into: &mut OnDemand) -> Result<(), SyncError> {
        let harvester = &self.inner().harvester;
        let mut pending = lock(&self.inner().pending);
        let layout = harvester.layout();
        let fit = [&mut into.found, &mut into.unprotected, &mut *pending]
            .map(|pages| pages.fit(&layout.slots));
        if fit != [true; 3] {
            return Err(SyncError::NoMemory);
        }
        {
            let mut taking = self.inner().kernel_bits.lock();
            for (slot, bits) in into.unprotected.slots_mut() {
                if !slot.is_tracked() {
                    continue;
                }
                if !taking.fit(slot.pages()) {
                    return Err(SyncError::NoMemory);
                }
                let retired = layout.slots.is_retired(slot);
                taking.find(
                    harvester.kernel(),
                    slot,
                    retired,
                    &harvester.working_set,
                    bits,
                )?;
            }
        }
        // Nothing fails from here on: pages that were taken are returned, or put back.
        into.found.add(&pending);
        pending.clear();
        for (slot, bits) in into.found.slots_mut() {
            slot.device().take_into(bits);
            slot.copy_suspects_into(bits);
            slot.members().copy_into(bits);
        }
        into.found.add(&into.unprotected);
        self.tell_members(&mut into.found, false)?;
        // No chunk has a member. If a chunk's protection cleared its bit, a write would be forgotten that no call has reported: a refresh
        // may have closed the page by then, and a sync reported it.
        into.unprotected.remove_members_of(&into.found);
        Ok(())
    }
}

impl OnDemand {
    /// Returns the number of pages that are still to be read, without members.
    pub fn page_count(&self) -> u64 {
        self.found.others().page_count()
    }

    /// Returns the pages that stay open; see [`DirtyPages::members`]. They are in no chunk, and every sync reports them.
    pub fn members(&self) -> DirtyPart<'_> {
        self.found.members()
    }

    /// Protects the next pages and returns them; they may be read from now on.
    ///
    /// A chunk has dirty pages of one slot, within `span` pages of each other (64 at least). Chunks ascend by slot,
    /// then by page. `None` if there are no more.
    ///
    /// Pages of a slot whose removal was finished meanwhile are left out.
    ///
    /// A chunk that was returned has left the handle, and no later sync has its pages. If it could not be sent,
    /// [mark](DirtyLog::mark_dirty) its runs.
    ///
    /// # Errors
    /// The kernel could not protect all of them. They are not returned; the next call tries again.
    pub fn next_chunk(&mut self, span: u64) -> Result<Option<DirtyPart<'_>>, SyncError> {
        let span_words = words_for(span.max(1));
        loop {
            self.chunk.clear();
            let Some((slot, words)) = self.found.next_others(span_words) else {
                return Ok(None);
            };
            if !self.chunk.fit_as(&self.found) {
                return Err(SyncError::NoMemory);
            }
            let inner = self.log.inner();
            let mut taking = inner.kernel_bits.lock();
            // Now, so that `add_slot` waits for this call if the id is about to name another slot.
            let layout = inner.harvester.layout();
            if !layout.slots.holds(&slot) {
                drop(taking);
                self.found.forget_slot(&slot);
                continue;
            }
            if !taking.fit(slot.pages()) {
                return Err(SyncError::NoMemory);
            }
            let retired = layout.slots.is_retired(&slot);
            // A slot whose log was stopped meanwhile has no bits, and each sync reports all of it.
            let bits = self.unprotected.bits_of(&slot);
            if let Some(bits) = bits.filter(|_| slot.is_tracked()) {
                taking.protect(
                    inner.harvester.kernel(),
                    &slot,
                    retired,
                    bits,
                    words.clone(),
                )?;
            }
            drop(taking);
            self.found.move_others(&slot, words, &mut self.chunk);
            return Ok(Some(self.chunk.part()));
        }
    }
}

impl Drop for OnDemand {
    fn drop(&mut self) {
        // The kernel still has the bits that it has yet to protect, and the next sync takes them. The rest goes where there is memory
        // for it in any case.
        for (slot, bits) in self.found.slots_mut() {
            bits.for_each(|word, bits| _ = slot.device().merge(word, bits));
        }
    }
}

impl fmt::Debug for OnDemand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnDemand")
            .field("pages", &self.page_count())
            .finish_non_exhaustive()
    }
}
