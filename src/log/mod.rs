//! The front door: one `DirtyLog` a virtual machine, one file a subject.
//!
//! May import: ground, bitmap, ring, limit, pacing, slots, harvest, observe, kvm.

#[cfg(not(all(test, feature = "modelled")))]
mod kvm;
pub(crate) mod limits;
#[cfg(not(all(test, feature = "modelled")))]
pub(crate) mod rate;
mod rearm;
pub(crate) mod slots;
mod tracking;
pub(crate) mod vcpu_ring;
#[cfg(all(feature = "vm-memory", not(all(test, feature = "modelled"))))]
pub mod vm_memory;

use core::fmt;

use crate::bitmap::pool::MAX_SHARDS;
use crate::error::{ResetError, SlotError, SyncError};
use crate::harvest::kernel_bits::KernelBits;
use crate::harvest::pass::Harvester;
use crate::kernel::{Kernel, Mode};
use crate::limit::account::Limits;
use crate::observe::stats::{ReaperCounts, Stats};
use crate::observe::trace::{self, Emitted, Faults, PerRing, Started};
use crate::pacing::RingObservation;
use crate::pacing::alarm::Alarm;
use crate::slot_id::SlotId;
use crate::slots::dirty_pages::DirtyPages;
use crate::sync::{Arc, AtomicBool, Mutex, MutexGuard, lock};

/// The dirty log of one virtual machine.
///
/// It is a handle: clones share the log, and every method may be called from any thread.
#[derive(Clone)]
pub struct DirtyLog {
    inner: Arc<Inner>,
}

#[cfg_attr(
    all(test, feature = "modelled"),
    expect(dead_code, reason = "KVM and the reaper's thread are not modelled")
)]
pub(crate) struct Inner {
    pub(crate) harvester: Harvester,
    pub(crate) kernel_bits: KernelBits,
    pub(crate) alarm: Alarm,
    pub(crate) ring_entries: u32,
    /// Whether the log is that of a KVM VM.
    kvm: bool,
    /// One sync at a time. What an unfinished one had collected waits here for the next.
    pub(crate) pending: Mutex<DirtyPages>,
    /// Whether a reaper runs: one at a time.
    pub(crate) reaped: AtomicBool,
    pub(crate) reaper_counts: ReaperCounts,
    /// One change of slots at a time.
    pub(crate) slot_change: Mutex<()>,
    pub(crate) limits: Limits,
    emitted: Emitted,
}

impl Inner {
    /// Emits events for the faults since the last such event: at the end of each call that may meet
    /// one, when it holds nothing any more.
    #[inline]
    pub(crate) fn emit_faults(&self) {
        let faults = || {
            let counts = &self.harvester.counts;
            let gate = self.harvester.gate.stats();
            Faults {
                short_resets: gate.short,
                doubtful_resets: gate.doubtful,
                failed_resets: gate.failed,
                unknown_slot_entries: counts.unknown_slot.get(),
                out_of_range_entries: counts.out_of_range.get(),
                overruns: counts.overruns.get(),
                missing_bitmaps: self.kernel_bits.missing.get(),
            }
        };
        let suspects = || self.harvester.suspects();
        self.emitted.emit(faults, suspects);
    }
}

impl DirtyLog {
    /// A log over `kernel`, whose rings have `ring_entries` entries each: for a kernel other than
    /// KVM, such as the simulated one.
    pub fn with_kernel(kernel: Box<dyn Kernel>, ring_entries: u32) -> Self {
        Self::new(kernel, ring_entries, MAX_SHARDS, false)
    }

    pub(crate) fn new(
        kernel: Box<dyn Kernel>,
        ring_entries: u32,
        shards: usize,
        kvm: bool,
    ) -> Self {
        let inner = Inner {
            harvester: Harvester::new(kernel, shards),
            kernel_bits: KernelBits::default(),
            alarm: Alarm::default(),
            ring_entries,
            kvm,
            pending: Mutex::default(),
            reaped: AtomicBool::new(false),
            reaper_counts: ReaperCounts::default(),
            slot_change: Mutex::default(),
            emitted: Emitted::default(),
            limits: Limits::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// A log over a KVM VM.
    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn over_kvm(vm: Box<dyn Kernel>, ring_entries: u32) -> Self {
        Self::new(vm, ring_entries, MAX_SHARDS, true)
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// How the kernel logs what vCPUs write.
    pub fn mode(&self) -> Mode {
        self.inner.harvester.kernel().mode()
    }

    /// Size of each ring, in entries; in [`Mode::Bitmap`] on KVM that of the empty one which each
    /// vCPU has in its place.
    pub fn ring_entries(&self) -> u32 {
        self.inner.ring_entries
    }

    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn is_kvm(&self) -> bool {
        self.inner.kvm
    }

    /// Marks pages that the VMM or one of its devices *has written*: KVM logs only what vCPUs
    /// write. Call it after the write; whoever copies the page after the next sync then sees it.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, SlotId};
    /// # let vm = SimVm::new(SimConfig::default());
    /// # let log = vm.dirty_log();
    /// # let ram = SlotId::new(0, 0);
    /// # log.add_slot(ram, 1000)?;
    /// # vm.create_slot(ram, 1000);
    /// # let mut dirty = DirtyPages::new();
    /// // A disk has read two pages into guest memory:
    /// log.mark_dirty(ram, 10, 2)?;
    /// log.sync(&mut dirty)?;
    /// assert!(dirty.contains(ram, 10) && dirty.contains(ram, 11));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// The slot is not tracked, or the pages are not all inside it; then none is marked.
    pub fn mark_dirty(&self, slot: SlotId, first_page: u64, pages: u64) -> Result<(), SlotError> {
        let layout = self.inner.harvester.layout();
        let tracked = layout.slots.get(slot.raw());
        let tracked = tracked.ok_or(SlotError::Unknown { slot })?;
        let slot_pages = tracked.pages();
        if first_page > slot_pages || pages > slot_pages - first_page {
            return Err(SlotError::OutOfRange {
                slot,
                first_page,
                pages,
                slot_pages,
            });
        }
        tracked.device().set(first_page, pages);
        Ok(())
    }

    /// Empties every ring once, as the reaper does: harvest, reset, publish. Returns how many
    /// entries there were.
    ///
    /// # Errors
    /// The reset failed. The pages are kept and come with the next reset that succeeds.
    pub fn reap(&self) -> Result<u64, ResetError> {
        self.reap_those(|_| true)
    }

    fn reap_those(&self, wanted: impl Fn(usize) -> bool) -> Result<u64, ResetError> {
        let harvester = &self.inner.harvester;
        let started = Started::now();
        let mut per_ring = PerRing::new(|| harvester.layout().vcpus.len());
        let taken = harvester.reap_those(wanted, |place, entries| per_ring.note(place, entries));
        trace::reap(started, taken.as_ref().map_or(0, |&taken| taken), &per_ring);
        self.inner.emit_faults();
        taken
    }

    /// Replaces what is in `dirty` by the pages written since the sync before.
    ///
    /// When it returns, each of these pages is protected again: a write that comes later is
    /// reported by a later sync, so the contents may be read from now on. Pages that the guest
    /// writes while this runs are reported now or next time. With every vCPU stopped outside of
    /// `KVM_RUN` and devices quiet, the pages of this sync and those before it are all the pages
    /// that were written, whatever other passes were under way.
    ///
    /// Pages under suspicion (see [`Stats::suspect_pages`]) are reported each time, and so are all
    /// pages of a slot that is [not tracked](Self::stop_tracking), and all pages of all slots once a ring is
    /// [broken](crate::VcpuStats::broken).
    ///
    /// Each other page is handed out once, to whichever call comes first: where two parts of a VMM need
    /// dirty pages, let one sync, and keep the result for both. Pages that were not copied, because
    /// sending them failed, are the caller's: keep them, or [mark](Self::mark_dirty) them again. While a
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
        collected.complete = true;
        // What was the caller's would keep slots that are gone, for as long as no sync needs it.
        *collected.pending = DirtyPages::new();
        Ok(())
    }

    /// Adds every page written before the call, and those under suspicion, to `dirty`.
    fn collect(&self, dirty: &mut DirtyPages) -> Result<(), SyncError> {
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
        let all = harvester.is_broken();
        for (slot, bits) in dirty.slots_mut() {
            slot.device().take_into(bits);
            slot.copy_suspects_into(bits);
            if all {
                bits.fill();
            }
        }
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
            taking.take(harvester.kernel(), slot, retired)?;
        }
        Ok(())
    }

    /// As [`reap`](Self::reap), for those rings whose place is true in `rings`, in the order in
    /// which the vCPUs were attached. Rings beyond its end are left alone.
    ///
    /// # Errors
    /// As [`reap`](Self::reap).
    pub fn reap_rings(&self, rings: &[bool]) -> Result<u64, ResetError> {
        self.reap_those(|place| rings.get(place) == Some(&true))
    }

    /// As [`reap`](Self::reap), on shard `shard` (modulo how many there are), where pages land only
    /// if several passes are under way at once.
    ///
    /// # Errors
    /// As [`reap`](Self::reap).
    #[cfg(feature = "test-utils")]
    pub fn reap_on_shard(&self, shard: usize) -> Result<u64, ResetError> {
        let harvester = &self.inner.harvester;
        let shard = harvester.pool.acquire(shard % harvester.pool.len());
        let mut pass = harvester.begin_on(shard);
        let taken = pass.harvest_all();
        pass.reset()?.publish();
        Ok(taken)
    }

    /// Replaces what is in `rings` by what a [pacing](crate::pacing) policy is to be shown of each
    /// ring, in the order in which the vCPUs were attached. It reads about a dozen flags a ring,
    /// one if the ring is empty. It waits for no harvest and no reset, and neither waits for it; only
    /// while slots or vCPUs are added or removed may it wait a moment. By the time it returns, vCPUs
    /// may have logged more.
    pub fn observe(&self, rings: &mut Vec<RingObservation>) {
        rings.clear();
        let layout = self.inner.harvester.layout();
        rings.extend(layout.vcpus.iter().map(|vcpu| vcpu.observe()));
    }

    /// What has happened so far.
    pub fn stats(&self) -> Stats {
        let missing = self.inner.kernel_bits.missing.get();
        Stats::read(&self.inner.harvester, missing, &self.inner.reaper_counts)
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
            core::mem::swap(&mut *self.pending, self.dirty);
        }
    }
}

impl fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyLog")
            .field("mode", &self.mode())
            .field("ring_entries", &self.inner.ring_entries)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
