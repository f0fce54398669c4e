// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The front door: one `DirtyLog` per virtual machine, one file per subject.
//!
//! May import: ground, bitmap, ring, limit, pacing, slots, harvest, observe, kvm.

#[cfg(not(all(test, feature = "modelled")))]
mod kvm;
pub(crate) mod last_sync;
pub(crate) mod limits;
#[cfg(not(all(test, feature = "modelled")))]
mod marks;
pub(crate) mod on_demand;
#[cfg(not(all(test, feature = "modelled")))]
pub(crate) mod rate;
mod rearm;
mod retired;
pub(crate) mod slots;
mod sync;
mod tracking;
pub(crate) mod vcpu_ring;
#[cfg(all(feature = "vm-memory", not(all(test, feature = "modelled"))))]
pub mod vm_memory;
mod working_set;

use core::fmt;

use crate::bitmap::pool::MAX_SHARDS;
use crate::error::{NameError, ResetError, SlotError};
use crate::harvest::kernel_bits::KernelBits;
use crate::harvest::pass::Harvester;
use crate::kernel::{Kernel, Mode};
use crate::limit::account::Limits;
use crate::observe::stats::{ReaperCounts, Stats};
use crate::observe::trace::{self, Emitted, Faults, Name, PerRing, Started};
use crate::pacing::RingObservation;
use crate::pacing::alarm::Alarm;
use crate::slot_id::SlotId;
use crate::slots::dirty_pages::DirtyPages;
use crate::slots::table::Slot;
use crate::sync::{Arc, AtomicBool, Mutex};

/// The dirty log of one virtual machine.
///
/// It is a handle: clones share the log, and every method may be called from any thread. The VM's descriptor is duplicated,
/// so the VM lives as long as any handle.
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
    /// Whether the log belongs to a KVM VM.
    kvm: bool,
    /// One sync at a time. Pages that an unfinished sync has collected wait here for the next one.
    pub(crate) pending: Mutex<DirtyPages>,
    /// Whether a reaper runs: one at a time.
    pub(crate) reaped: AtomicBool,
    pub(crate) reaper_counts: ReaperCounts,
    /// One change of slots at a time.
    pub(crate) slot_change: Mutex<()>,
    pub(crate) limits: Limits,
    emitted: Emitted,
    pub(crate) name: Name,
}

impl Inner {
    /// Notes whether a vCPU has a limit. Then all that it writes must be logged. Called under the lock on the terms of limits.
    pub(crate) fn note_limited(&self) {
        let layout = self.harvester.layout();
        let limited = layout.vcpus.iter().any(|vcpu| vcpu.limit.get().is_some());
        self.harvester.working_set.set_limited(limited);
    }

    /// Emits events for the faults since the last such event. Each call that may meet a fault calls this at its end, when it
    /// holds no lock any more.
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
                useless_working_sets: self.harvester.working_set.is_useless().into(),
            }
        };
        let suspects = || self.harvester.suspects();
        let slots_to_rearm = || self.harvester.slots_to_rearm();
        self.emitted
            .emit(&self.name, faults, suspects, slots_to_rearm);
    }
}

impl DirtyLog {
    /// Creates a log over `kernel`, whose rings have `ring_entries` entries each.
    ///
    /// It is for kernels other than KVM, such as the simulated one; for KVM call [`enable`](Self::enable).
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
            name: Name::default(),
            limits: Limits::default(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Creates a log over a KVM VM.
    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn over_kvm(vm: Box<dyn Kernel>, ring_entries: u32) -> Self {
        Self::new(vm, ring_entries, MAX_SHARDS, true)
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// Gives the VM a name, once: every event has it from then on, as the field `vm`, and so have [`Stats::vm`] and
    /// what `metrics::publish_named` publishes.
    ///
    /// ```
    /// # let log = kvm_dirty_ring::sim::SimVm::new(Default::default()).dirty_log();
    /// log.set_name("vm-7")?;
    /// assert_eq!(log.name(), Some("vm-7"));
    /// # Ok::<(), kvm_dirty_ring::error::NameError>(())
    /// ```
    ///
    /// # Errors
    /// [`NameError::Named`]: it has one, which it keeps.
    pub fn set_name(&self, name: &str) -> Result<(), NameError> {
        let set = self.inner.name.set(name);
        set.map_err(|name| NameError::Named { name: name.into() })
    }

    /// The VM's [name](Self::set_name), if it was given one.
    pub fn name(&self) -> Option<&str> {
        self.inner.name.get()
    }

    /// Returns how the kernel logs what vCPUs write: into rings or bitmaps.
    pub fn mode(&self) -> Mode {
        self.inner.harvester.kernel().mode()
    }

    /// Returns the size of each ring, in entries. In [`Mode::Bitmap`] on KVM each vCPU has an empty ring of this size.
    pub fn ring_entries(&self) -> u32 {
        self.inner.ring_entries
    }

    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn is_kvm(&self) -> bool {
        self.inner.kvm
    }

    /// Marks pages that the VMM or one of its devices *has written*. KVM logs only what vCPUs write.
    ///
    /// Call it after the write. The next sync reports the pages, and a copy made after that sync has the new contents.
    /// `first_page` and `pages` count base pages of the host.
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
    /// The slot is not in the log, or the pages are not all inside it; then no page is marked.
    pub fn mark_dirty(&self, slot: SlotId, first_page: u64, pages: u64) -> Result<(), SlotError> {
        let tracked = self.tracked_with(slot, first_page, pages)?;
        tracked.device().set(first_page, pages);
        Ok(())
    }

    /// Finds the slot, which must have these pages.
    fn tracked_with(
        &self,
        slot: SlotId,
        first_page: u64,
        pages: u64,
    ) -> Result<Arc<Slot>, SlotError> {
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
        Ok(Arc::clone(tracked))
    }

    /// Empties every ring once, as the reaper does: harvest, reset, publish. Returns the number of entries.
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
        trace::reap(
            &self.inner().name,
            started,
            taken.as_ref().map_or(0, |&taken| taken),
            &per_ring,
        );
        self.inner.emit_faults();
        taken
    }

    /// Empties the rings whose place in `rings` is true, in the order in which the vCPUs were attached.
    ///
    /// Rings beyond the end of `rings` are left alone. Otherwise as [`reap`](Self::reap).
    ///
    /// # Errors
    /// As [`reap`](Self::reap).
    pub fn reap_rings(&self, rings: &[bool]) -> Result<u64, ResetError> {
        self.reap_those(|place| rings.get(place) == Some(&true))
    }

    /// As [`reap`](Self::reap), on shard `shard` modulo the number of shards.
    ///
    /// Pages land there otherwise only if several passes are under way at once. For tests (feature `test-utils`).
    ///
    /// # Errors
    /// As [`reap`](Self::reap).
    #[cfg(feature = "test-utils")]
    #[doc(hidden)]
    pub fn reap_on_shard(&self, shard: usize) -> Result<u64, ResetError> {
        let harvester = &self.inner.harvester;
        let shard = harvester.pool.acquire(shard % harvester.pool.len());
        let mut pass = harvester.begin_on(shard);
        let taken = pass.harvest_all();
        pass.reset()?.publish();
        Ok(taken)
    }

    /// Replaces the contents of `rings` by the state of each ring, for a [pacing](crate::pacing) policy, in the order in which the
    /// vCPUs were attached.
    ///
    /// It reads about a dozen flags per ring, or two if the ring is empty. It waits for no harvest and no reset, and neither
    /// waits for it; it may wait a moment while slots or vCPUs change. vCPUs may have logged more by the time it returns.
    pub fn observe(&self, rings: &mut Vec<RingObservation>) {
        rings.clear();
        let layout = self.inner.harvester.layout();
        rings.extend(layout.vcpus.iter().map(|vcpu| vcpu.observe()));
    }

    /// Returns a snapshot of everything that is counted.
    pub fn stats(&self) -> Stats {
        let missing = self.inner.kernel_bits.missing.get();
        let vm = self.inner.name.shared();
        Stats::read(
            vm,
            &self.inner.harvester,
            missing,
            &self.inner.reaper_counts,
        )
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
