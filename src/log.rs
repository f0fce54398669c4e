//! The front door: one `DirtyLog` a virtual machine.

use core::fmt;
use std::io;
use std::time::Instant;

use crate::alarm::Alarm;
use crate::bitmap::pool::MAX_SHARDS;
use crate::bitmap::shared::SharedBits;
use crate::dirty_pages::DirtyPages;
use crate::error::{AttachError, ResetError, SlotError, SyncError};
use crate::kernel::{Kernel, Mode};
use crate::kernel_bits::KernelBits;
use crate::limit::Limits;
use crate::memslots::Slot;
use crate::pacing::RingObservation;
use crate::pass::Harvester;
use crate::ring::RingMemory;
use crate::slot_id::SlotId;
use crate::stats::{ReaperCounts, Stats};
use crate::sync::{Arc, AtomicBool, Mutex, MutexGuard, lock};
use crate::trace::{self, Faults, PerRing, Started, Told};
use crate::vcpu::Vcpu;

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
    ring_entries: u32,
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
    told: Told,
}

impl Inner {
    /// Tells subscribers of the faults that they were not told of: at the end of each call that may meet
    /// one, when it holds nothing any more.
    #[inline]
    fn tell(&self) {
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
        let suspects = || self.harvester.layout().suspects();
        self.told.tell(faults, suspects);
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
            told: Told::default(),
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

    /// Starts to harvest a ring that is not mapped from a KVM vCPU. One whose [`VcpuRing`] was
    /// dropped may be attached again.
    ///
    /// # Errors
    /// [`AttachError::Size`] if the ring's size is not [`ring_entries`](Self::ring_entries);
    /// [`AttachError::Twice`] if somebody has its `VcpuRing`.
    pub fn attach_ring(&self, memory: RingMemory) -> Result<VcpuRing, AttachError> {
        let (found, expected) = (memory.entries(), self.inner.ring_entries);
        if found != expected {
            return Err(AttachError::Size { found, expected });
        }
        let harvester = &self.inner.harvester;
        let new = Arc::new(Vcpu::new(memory, harvester.kernel().reserved_entries()));
        // Held until the vCPU is there: whoever changes all limits then reaches it, or has been
        // here.
        let terms = lock(&self.inner.limits.terms);
        let attached = harvester.change_layout(|layout| {
            // A second consumer would take the first one's entries for an overrun: a vCPU that is
            // attached again goes on with the first.
            let mut vcpus = layout.vcpus.iter();
            let index = match vcpus.position(|vcpu| vcpu.name == new.name) {
                Some(index) => index,
                None => {
                    new.limit.set(terms.all, || new.logged());
                    new.limit.keep_awake(terms.wakers > 0);
                    layout.vcpus.push(Arc::clone(&new));
                    layout.vcpus.len() - 1
                }
            };
            let vcpu = Arc::clone(&layout.vcpus[index]);
            match vcpu.hold() {
                true => Ok((index, vcpu)),
                false => Err(AttachError::Twice),
            }
        });
        self.inner.limits.change(terms);
        let (index, vcpu) = attached?;
        Ok(VcpuRing {
            inner: Arc::clone(&self.inner),
            index,
            taken: vcpu.taken(),
            vcpu,
        })
    }

    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn is_kvm(&self) -> bool {
        self.inner.kvm
    }

    /// Tracks a memslot of `pages` pages, all clean. Call it *before* the slot is created in KVM
    /// with `KVM_MEM_LOG_DIRTY_PAGES`: an entry for a slot that is not tracked makes every page of
    /// every slot suspect. It waits for the passes under way, which do not know the slot.
    ///
    /// # Errors
    /// The id is in use or being removed, the size is none that a slot can have, or there is no
    /// memory.
    pub fn add_slot(&self, slot: SlotId, pages: u64) -> Result<(), SlotError> {
        self.track(&lock(&self.inner.slot_change), slot, pages, None)
    }

    /// As [`add_slot`](Self::add_slot), for a slot whose devices mark their writes in `device`, made
    /// for as many pages.
    #[cfg(any(test, feature = "vm-memory"))]
    pub(crate) fn add_slot_on(
        &self,
        slot: SlotId,
        pages: u64,
        device: &Arc<SharedBits>,
    ) -> Result<(), SlotError> {
        let one_at_a_time = lock(&self.inner.slot_change);
        // A sync that knows a slot from which the bits come, and which is finished by now, would
        // still take them, for that slot: writes from now on are to be reported as the new one's.
        let _no_sync = lock(&self.inner.pending);
        self.track(&one_at_a_time, slot, pages, Some(Arc::clone(device)))
    }

    fn track(
        &self,
        _one_at_a_time: &MutexGuard<'_, ()>,
        slot: SlotId,
        pages: u64,
        device: Option<Arc<SharedBits>>,
    ) -> Result<(), SlotError> {
        let harvester = &self.inner.harvester;
        let shards = harvester.pool.len();
        harvester.change_layout(|layout| layout.slots.add(slot, pages, device, shards))?;
        // A pass on an older layout would not know the slot's entries, or would give them to the
        // slot that had the id before.
        harvester.quiesce();
        // Nor may who takes the kernel's bits for that slot, by its id, be given the new one's.
        drop(self.inner.kernel_bits.lock());
        Ok(())
    }

    /// Begins to remove a memslot: empties the rings, and takes the kernel's own bits of it, so that
    /// what the guest wrote is known before the slot goes. Then delete the slot in KVM and call
    /// [`finish_slot`](Self::finish_slot). In between the slot is still tracked, and its id cannot be
    /// added. Whoever wants its last pages has to sync before it is finished.
    ///
    /// Pages that the guest writes after this and before the deletion are not copied by anybody
    /// any more, nor are those that a running vCPU has written before and its processor's
    /// page-modification buffer still holds; where the memory lives on elsewhere, stop the vCPUs
    /// first or treat all of it as dirty.
    ///
    /// # Errors
    /// The slot is not tracked or being removed already, or the reset or the taking of its bits
    /// failed; then nothing has changed.
    pub fn retire_slot(&self, slot: SlotId) -> Result<RetiredSlot, SlotError> {
        let retired = self.retire(slot);
        self.inner.tell();
        retired
    }

    fn retire(&self, slot: SlotId) -> Result<RetiredSlot, SlotError> {
        let harvester = &self.inner.harvester;
        let _one_at_a_time = lock(&self.inner.slot_change);
        // The slot must be there before the rings are emptied for it.
        let layout = harvester.layout();
        let tracked = layout.slots.get(slot.raw());
        let tracked = tracked.ok_or(SlotError::Unknown { slot })?;
        harvester.reap()?;
        // Held until the layout says that the slot goes: a sync in between would expect bits of a slot
        // that the VMM has deleted by then.
        let mut taking = self.inner.kernel_bits.lock();
        if harvester.kernel().has_bitmap() && tracked.is_tracked() {
            if !taking.fit(tracked.pages()) {
                let pages = tracked.pages();
                return Err(SlotError::NoMemory { slot, pages });
            }
            let retired = layout.slots.is_retired(tracked);
            taking.take(harvester.kernel(), tracked, retired)?;
        }
        let slot = harvester.change_layout(|layout| layout.slots.retire(slot))?;
        drop(taking);
        Ok(RetiredSlot { slot })
    }

    /// Ends the removal of a memslot, which by now is deleted in KVM: harvests the entries that
    /// still name it, so that none can ever land in a later slot of that id. From then on the id
    /// may be added again.
    ///
    /// # Errors
    /// [`SlotError::Unknown`] if it is finished already; a failed reset, after which the slot is as
    /// it was and the call can be repeated.
    pub fn finish_slot(&self, retired: &RetiredSlot) -> Result<(), SlotError> {
        let finished = self.finish(retired);
        self.inner.tell();
        finished
    }

    fn finish(&self, retired: &RetiredSlot) -> Result<(), SlotError> {
        let harvester = &self.inner.harvester;
        let _one_at_a_time = lock(&self.inner.slot_change);
        let slot = &retired.slot;
        if !harvester.layout().slots.holds(slot) {
            return Err(SlotError::Unknown { slot: slot.id() });
        }
        harvester.reap()?;
        harvester.change_layout(|layout| {
            layout.slots.remove(slot);
            Ok(())
        })
    }

    /// Marks pages that the VMM or one of its devices *has written*: KVM logs only what vCPUs
    /// write. Call it after the write; whoever copies the page after the next sync then sees it.
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

    /// Tells the log that every page of the slot was protected again, as [`rearm`](Self::rearm) does
    /// for all slots that need it: that, with the vCPUs stopped, the VMM has set the slot's memory
    /// region without `KVM_MEM_LOG_DIRTY_PAGES` and then with it. Pages under suspicion come with the
    /// next sync once more and are then clean; where the kernel [has bitmaps](Mode::Bitmap), which it
    /// throws away thereby, all pages of the slot come, and no sync may be made between the two.
    ///
    /// # Errors
    /// The slot is not tracked, or there is no memory; the pages stay suspect.
    pub fn rearmed(&self, slot: SlotId) -> Result<(), SlotError> {
        let layout = self.inner.harvester.layout();
        let tracked = layout.slots.get(slot.raw());
        self.end_suspicion(tracked.ok_or(SlotError::Unknown { slot })?)?;
        trace::rearmed(slot.raw());
        Ok(())
    }

    /// Every page of the slot is protected again.
    fn end_suspicion(&self, tracked: &Slot) -> Result<(), SlotError> {
        let mut pending = lock(&self.inner.pending);
        if self.inner.harvester.kernel().has_bitmap() {
            // Without `KVM_MEM_LOG_DIRTY_PAGES` the kernel has thrown its bits away.
            tracked.device().set(0, tracked.pages());
        }
        if !pending.fit(&self.inner.harvester.layout().slots) {
            let (slot, pages) = (tracked.id(), tracked.pages());
            return Err(SlotError::NoMemory { slot, pages });
        }
        for (slot, bits) in pending.slots_mut() {
            if core::ptr::eq(slot, tracked) {
                slot.take_suspects_into(bits);
            }
        }
        Ok(())
    }

    /// Ends every suspicion. `protect` is called with each slot that has pages under it, ascending
    /// by id, and is to have all pages of the slot protected again: it sets the slot's memory
    /// region without `KVM_MEM_LOG_DIRTY_PAGES` and then with it. No vCPU may be in `KVM_RUN`
    /// meanwhile: what it wrote in between would not be logged. The pages come with the next sync
    /// once more and are then clean. Returns how many slots there were; `protect` is not called for
    /// those whose [removal](Self::retire_slot) has begun, nor for those that are [not
    /// tracked](Self::stop_tracking).
    ///
    /// It waits for other changes of slots; `protect` must not make any in this log.
    ///
    /// It pays as soon as a sync has reported suspects (see [`Stats::suspect_pages`]), since all of
    /// them have to be copied each time.
    ///
    /// # Errors
    /// [`SlotError::Protect`] with what `protect` said: every page of that slot is suspect then, as it
    /// need not be logged any more. Or there is no memory. Slots after it stay as they were.
    pub fn rearm(
        &self,
        mut protect: impl FnMut(SlotId) -> io::Result<()>,
    ) -> Result<usize, SlotError> {
        let layout = self.inner.harvester.layout();
        let mut rearmed = 0;
        for slot in layout.slots.staying() {
            // One that is not tracked is not to be logged thereby.
            let concerned = slot.suspects() > 0 && slot.is_tracked();
            if concerned && self.protect_anew(slot, &mut protect)? {
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
        let _one_at_a_time = lock(&self.inner.slot_change);
        let layout = self.inner.harvester.layout();
        if !layout.slots.holds(slot) || layout.slots.is_retired(slot) || !slot.is_tracked() {
            return Ok(false);
        }
        if self.inner.harvester.kernel().has_bitmap() {
            // A sync meanwhile must not miss what the kernel throws away.
            let _pending = lock(&self.inner.pending);
            slot.untrack();
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
        self.end_suspicion(slot)?;
        Ok(true)
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
        self.inner.tell();
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
    /// pages of a slot that is [not tracked](Self::stop_tracking).
    ///
    /// # Errors
    /// A reset or the taking of the kernel's bits failed, or there is no memory. `dirty` is empty then,
    /// and the pages come with the next sync.
    pub fn sync(&self, dirty: &mut DirtyPages) -> Result<(), SyncError> {
        let started = trace::flush();
        let synced = self.replace(dirty);
        trace::flushed(started, || dirty.page_count());
        self.inner.tell();
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
        for (slot, bits) in dirty.slots_mut() {
            slot.device().take_into(bits);
            slot.copy_suspects_into(bits);
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

/// A slot that the VMM is switching off and on: if that fails or panics, nobody knows whether the kernel
/// still logs it.
struct Unsure<'a> {
    log: &'a DirtyLog,
    slot: &'a Slot,
    is_protected: bool,
}

impl Drop for Unsure<'_> {
    fn drop(&mut self) {
        if !self.is_protected {
            self.slot.suspect_all();
        }
        let inner = &self.log.inner;
        if inner.harvester.kernel().has_bitmap() {
            let _pending = lock(&inner.pending);
            self.slot.track();
        }
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

/// A memslot whose removal has begun, see [`DirtyLog::retire_slot`].
#[must_use = "the slot's id stays taken until the removal is finished"]
pub struct RetiredSlot {
    slot: Arc<Slot>,
}

impl RetiredSlot {
    /// Which slot it is.
    pub fn id(&self) -> SlotId {
        self.slot.id()
    }
}

impl fmt::Debug for RetiredSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RetiredSlot").field(&self.id()).finish()
    }
}

/// One vCPU's ring, for the thread that runs the vCPU.
///
/// Dropping it detaches nothing: the ring stays mapped and harvested for as long as the log lives,
/// as the vCPU does in KVM. A vCPU that is plugged in again is attached again.
pub struct VcpuRing {
    inner: Arc<Inner>,
    index: usize,
    /// Entries taken from the ring, by whomever, when the last full exit was over.
    taken: u64,
    pub(crate) vcpu: Arc<Vcpu>,
}

impl VcpuRing {
    /// Makes room in the ring. Call it on `KVM_EXIT_DIRTY_RING_FULL`, on the vCPU's thread, then
    /// enter the guest again.
    ///
    /// It harvests this ring alone, wakes the reaper, and returns when a reset has recycled the
    /// entries, be it one that several vCPUs share.
    ///
    /// # Errors
    /// The reset failed: the ring is still full, its pages are kept. Entering the guest again
    /// leads to the same exit at once.
    ///
    /// A vCPU that is ahead of its [dirty limit](DirtyLog::set_dirty_limit) then sleeps as in
    /// [`throttle`](Self::throttle).
    ///
    /// In [`Mode::Bitmap`] there is no such exit, and nothing to be done.
    pub fn on_full(&mut self) -> Result<(), ResetError> {
        let start = Instant::now();
        let mut entries = 0;
        let result = self.make_room(&mut entries);
        let stall = start.elapsed().as_nanos() as u64;
        self.vcpu.counts.stall_ns.add(stall);
        trace::full(self.index, entries, stall);
        self.inner.tell();
        // A failure is not to wait for the end of a sleep.
        if result.is_ok() {
            self.vcpu.pay();
        }
        result
    }

    /// The vCPU's place in [`Stats::vcpus`], in what [`DirtyLog::observe`] shows, and in events: how many
    /// vCPUs were attached before it.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Whether at least `count` entries wait in the ring to be harvested: one load of a flag. True of
    /// a moment during the call: others may take them meanwhile, and the vCPU may log more.
    pub fn at_least(&self, count: u32) -> bool {
        self.vcpu.at_least(count)
    }

    /// How many entries wait in the ring to be harvested: a load for each bit of the ring's size,
    /// one if none does. Others may take them meanwhile. For all rings, and from any thread, see
    /// [`DirtyLog::observe`].
    pub fn occupancy(&self) -> u32 {
        let (waiting, _) = self.vcpu.occupancy();
        waiting
    }

    /// Harvests this ring and ends the pass before its reset, as a panic in between would: its
    /// pages come with a later sync, after the reset that the sync makes up for. Returns how many
    /// entries there were.
    #[cfg(feature = "test-utils")]
    pub fn harvest_and_stop(&mut self) -> u32 {
        self.inner.harvester.begin().harvest(&self.vcpu).entries
    }

    /// Sets `entries` to what it takes from the ring, reset or not.
    fn make_room(&mut self, entries: &mut u32) -> Result<(), ResetError> {
        let mut pass = self.inner.harvester.begin();
        // Since the last full exit, nobody else has taken entries that the vCPU's exit still saw.
        let alone = self.vcpu.taken() == self.taken;
        let taken = pass.harvest(&self.vcpu);
        *entries = taken.entries;
        self.taken = self.vcpu.taken();
        if alone && taken.alone {
            let entries = self.inner.ring_entries;
            self.vcpu.learn_soft_limit(taken.entries, entries);
        }
        self.vcpu.counts.full_exits.add(1);
        // By now this ring is empty; the others are the reaper's business. It is to see all of the
        // above when it looks, which may be before our reset is done.
        self.inner.alarm.full();
        // Where the ring was empty, another pass has taken its entries: that one's reset is what
        // the vCPU waits for.
        pass.reset_all()?.publish();
        if taken.entries == 0 {
            // No other pass, perhaps, but an overrun that has left the head behind.
            let mut pass = self.inner.harvester.begin();
            if pass.rejoin(&self.vcpu) {
                *entries = pass.harvest(&self.vcpu).entries;
            }
            pass.reset()?.publish();
        }
        Ok(())
    }
}

impl Drop for VcpuRing {
    fn drop(&mut self) {
        self.vcpu.let_go();
    }
}

impl fmt::Debug for VcpuRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuRing").finish_non_exhaustive()
    }
}
