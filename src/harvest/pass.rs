// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A pass over rings: harvested, then reset, then published, each a type of its own.

use std::io;

use crate::bitmap::pool::{MAX_SHARDS, ShardGuard, ShardPool, Unreset};
use crate::error::ResetError;
use crate::harvest::last_batch;
use crate::harvest::reset_gate::{Harvest, ResetGate, Rings};
use crate::harvest::vcpu::Vcpu;
use crate::kernel::{Kernel, Mode};
use crate::ring::entry::NO_SLOT;
use crate::ring::view::RingView;
use crate::slot_id::SlotId;
use crate::slots::dirty_pages::DirtyPages;
use crate::slots::joiner::Joiner;
use crate::slots::table::{Slot, Table};
use crate::slots::targets::{Misses, Setter, Targets};
use crate::slots::working_set::Terms;
use crate::sync::{Arc, Counter, Mutex, OnceLock, lock};

/// Entries after which a pass over many rings lets a reset go first: some tenths of a millisecond. In the models, after each
/// ring.
const MOST_MARKED: u64 = if cfg!(test) { 1 } else { 1 << 16 };

/// Suspect pages of one slot from which on it pays to re-arm it.
pub(crate) const REARM_PAYS_FROM: u64 = 1024;

/// How often a removal repeats resets that fall short.
const RECYCLE_TRIES: usize = 4;

/// The shared state of passes.
pub(crate) struct Harvester {
    kernel: Box<dyn Kernel>,
    pub(crate) gate: ResetGate,
    pub(crate) pool: ShardPool,
    layout: Mutex<Arc<Layout>>,
    pub(crate) counts: Counts,
    /// Which of the pages that passes find may stay open.
    pub(crate) working_set: Terms,
}

/// Slots and vCPUs at one moment. Each pass uses one such snapshot.
#[derive(Default)]
pub(crate) struct Layout {
    pub(crate) slots: Table,
    pub(crate) vcpus: Vec<Arc<Vcpu>>,
    /// How entries find their bits, by shard; made by the first pass that needs it.
    targets: [OnceLock<Targets>; MAX_SHARDS],
}

impl Clone for Layout {
    /// A copy to be changed, so without what is derived from the slots.
    fn clone(&self) -> Self {
        Self {
            slots: self.slots.clone(),
            vcpus: self.vcpus.clone(),
            targets: Default::default(),
        }
    }
}

impl Layout {
    /// Some unknown page is written and unprotected.
    fn suspect_all(&self) {
        for slot in self.slots.slots() {
            slot.suspect_all();
        }
    }

    fn targets(&self, held: &ShardGuard<'_>) -> &Targets {
        // SAFETY: `self` holds both the slots and the targets, and each change of the slots
        // drops the targets.
        let make = || unsafe { Targets::new(&self.slots, held.index()) };
        self.targets[held.index()].get_or_init(make)
    }
}

/// What passes have found.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) passes: Counter,
    pub(crate) entries: Counter,
    pub(crate) unknown_slot: Counter,
    pub(crate) out_of_range: Counter,
    /// Broken rings.
    pub(crate) overruns: Counter,
    /// Entries looked at for one that names a page past its slot's end.
    pub(crate) looked_at: Counter,
}

/// The result of harvesting one ring.
pub(crate) struct Taken {
    pub(crate) entries: u32,
    /// Whether there was nothing else: the ring is not broken, and no entry harvested before was still waiting for its reset.
    pub(crate) alone: bool,
}

impl Harvester {
    pub(crate) fn new(kernel: Box<dyn Kernel>, shards: usize) -> Self {
        Self {
            kernel,
            gate: ResetGate::default(),
            pool: ShardPool::new(shards),
            layout: Mutex::default(),
            counts: Counts::default(),
            working_set: Terms::default(),
        }
    }

    pub(crate) fn kernel(&self) -> &dyn Kernel {
        &*self.kernel
    }

    pub(crate) fn layout(&self) -> Arc<Layout> {
        Arc::clone(&lock(&self.layout))
    }

    /// Applies `change` to the layout, which stays unchanged if it fails. Passes that have begun keep the old one.
    pub(crate) fn change_layout<T, E>(
        &self,
        change: impl FnOnce(&mut Layout) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut layout = lock(&self.layout);
        // Copied only if a pass uses it.
        let layout = Arc::make_mut(&mut layout);
        layout.targets = Default::default();
        change(layout)
    }

    /// Returns whether a ring is broken. The kernel has overwritten entries that were not harvested, or whose pages it had yet to
    /// protect, and may do so again at any time. So all pages of all slots are dirty from then on.
    pub(crate) fn any_broken(&self) -> bool {
        // A thread that finds a ring broken holds a shard, or resets for one that does. A sync waits for the shards, and their lock
        // orders this count.
        self.counts.overruns.get() > 0
    }

    fn count_broken(&self, breaks: bool) {
        if breaks {
            self.counts.overruns.add(1);
        }
    }

    /// Returns the number of suspect pages.
    pub(crate) fn suspects(&self) -> u64 {
        let layout = self.layout();
        let slots = layout.slots.slots();
        match self.any_broken() {
            true => slots.map(|slot| slot.pages()).sum(),
            false => slots.map(|slot| slot.suspects()).sum(),
        }
    }

    /// Returns how many slots can be re-armed and have so many suspect pages that it pays.
    pub(crate) fn slots_to_rearm(&self) -> u64 {
        let layout = self.layout();
        let slots = layout.slots.staying().filter(|slot| slot.is_tracked());
        let pays = slots
            .filter(|slot| slot.suspects() >= REARM_PAYS_FROM)
            .count();
        if self.any_broken() { 0 } else { pays as u64 }
    }

    /// Waits until every pass that has begun, and so may use an old layout, has ended.
    pub(crate) fn quiesce(&self) {
        for shard in 0..self.pool.len() {
            drop(self.pool.acquire(shard));
        }
    }

    /// Calls the reset gate.
    fn reset(&self) -> Result<u64, ResetError> {
        self.gate.reset(self.kernel(), self)
    }

    /// Begins a pass on any shard.
    pub(crate) fn begin(&self) -> Pass<'_, Harvested> {
        self.begin_on(self.pool.acquire_any())
    }

    /// Begins a pass on a shard of the caller's choice.
    pub(crate) fn begin_on<'a>(&'a self, shard: ShardGuard<'a>) -> Pass<'a, Harvested> {
        self.counts.passes.add(1);
        Pass {
            harvester: self,
            // After the shard was acquired, so that `quiesce` waits for every older layout in use.
            layout: self.layout(),
            stage: Harvested {
                // Before the first entry is marked.
                faults: self.gate.faults(),
                joining: 0,
                named: 0,
            },
            may_join: self.working_set.may_join(),
            shard,
        }
    }

    /// Makes a whole pass over every ring: harvest, reset, publish. Returns the number of entries.
    pub(crate) fn reap(&self) -> Result<u64, ResetError> {
        self.reap_those(|_| true, |_, _| ())
    }

    /// The same over the rings whose place `wanted` accepts. `note` receives the place and entries of each.
    pub(crate) fn reap_those(
        &self,
        wanted: impl Fn(usize) -> bool,
        note: impl FnMut(usize, u32),
    ) -> Result<u64, ResetError> {
        let mut pass = self.begin();
        let taken = pass.harvest_those(wanted, note);
        pass.reset()?.publish();
        Ok(taken)
    }

    /// Harvests every ring, and has the kernel recycle every marked entry of `slot`, whatever became of the pass that marked it.
    ///
    /// The slot's id can be used again only after that. The kernel protects pages of one slot in batches, and skips a whole batch for one
    /// page that the slot does not have (`kvm_reset_dirty_gfn`). If an old entry were recycled beside some of a new and smaller
    /// slot with that id, the new slot's pages would stay unprotected, and the count would be complete.
    pub(crate) fn recycle_all_of(&self, slot: SlotId) -> Result<(), ResetError> {
        if self.kernel.mode() == Mode::Bitmap {
            return Ok(());
        }
        for _ in 0..RECYCLE_TRIES {
            let faults = self.gate.faults();
            let mut pass = self.begin();
            pass.harvest_all();
            pass.reset_all()?.publish();
            // Beside a broken ring no reset counts as short: every page is reported there, whatever was recycled with it.
            let is_whole = self.gate.faults() == faults;
            // A void entry may be one of the slot, for a kernel that ignores the change.
            let awaits = |slot| self.awaits_reset_of(slot, 0);
            if is_whole || !(awaits(slot) || awaits(SlotId::from_raw(NO_SLOT))) {
                return Ok(());
            }
        }
        let source = Arc::new(io::Error::other(
            "resets fall short, and leave entries of the slot",
        ));
        Err(ResetError { source })
    }

    /// Returns whether an entry waits for a reset that names page `first` of the slot or one after it.
    fn awaits_reset_of(&self, slot: SlotId, first: u64) -> bool {
        let layout = self.layout();
        let mut rings = layout.vcpus.iter().map(|vcpu| lock(&vcpu.ring));
        rings.any(|ring| ring.awaits_reset_of(slot.raw(), first))
    }

    /// Makes all of a slot suspect while an entry that names a page past its end waits for its reset: the kernel will skip its
    /// batch, and pages that are written and harvested by then may be in it. Suspicion of these slots, ascending by id, has just
    /// ended, as all of their pages are protected again, or will be before they are logged.
    ///
    /// A pass that marks such an entry makes the slot suspect before it releases the ring, or the right to harvest. So either that
    /// comes after suspicion has ended, or this call sees the entry. Each call looks anew: another program may have marked entries
    /// that no pass has counted.
    pub(crate) fn suspect_past_the_end(&self, slots: &[Arc<Slot>]) {
        for vcpu in &self.layout().vcpus {
            let ring = lock(&vcpu.ring);
            self.counts.looked_at.add(ring.entries().into());
            for (named, page) in ring.awaiting_reset() {
                let at = slots.binary_search_by_key(&named, |slot| slot.id().raw());
                let slot = at.ok().map(|at| &slots[at]);
                if let Some(slot) = slot.filter(|slot| page >= slot.pages()) {
                    slot.suspect_all();
                }
            }
        }
    }
}

impl Rings for Harvester {
    fn nothing_awaits_reset(&self) -> bool {
        let layout = self.layout();
        let mut rings = layout.vcpus.iter().map(|vcpu| lock(&vcpu.ring));
        rings.all(|ring| ring.nothing_awaits_reset())
    }

    fn look_for_overruns(&self) -> bool {
        for vcpu in &self.layout().vcpus {
            let breaks = lock(&vcpu.ring).breaks_at_its_reserve();
            self.count_broken(breaks);
        }
        self.any_broken()
    }

    fn suspect_last_batches(&self) {
        let layout = self.layout();
        for vcpu in &layout.vcpus {
            let (ring, taken) = (lock(&vcpu.ring), vcpu.taken());
            let last = ring.last();
            let is_all = taken <= last.len() as u64;
            last_batch::suspect(&layout.slots, last.take(taken as usize), is_all);
        }
    }
}

/// A pass at `Stage`; its pages are in the shard that it holds.
///
/// If it is dropped before its reset, by an error or a panic, its pages stay in the shard, with the note that they are yet to be
/// reset. The shard's next holder resets them.
#[must_use]
pub(crate) struct Pass<'a, Stage> {
    harvester: &'a Harvester,
    layout: Arc<Layout>,
    shard: ShardGuard<'a>,
    /// Whether pages may stay open.
    may_join: bool,
    stage: Stage,
}

/// Entries are marked for reset. Their pages are not protected again, so they must not be copied yet.
pub(crate) struct Harvested {
    faults: u64,
    /// Entries harvested where pages may stay open.
    joining: u64,
    /// Those of them that named members.
    named: u64,
}

/// A reset that started after the last entry was marked has completed.
pub(crate) struct Reset(());

impl<'a> Pass<'a, Harvested> {
    /// Harvests every ring. Returns the number of entries.
    pub(crate) fn harvest_all(&mut self) -> u64 {
        self.harvest_those(|_| true, |_, _| ())
    }

    /// Harvests the rings whose place `wanted` accepts. Returns the number of entries; `note` receives those of each.
    fn harvest_those(
        &mut self,
        wanted: impl Fn(usize) -> bool,
        mut note: impl FnMut(usize, u32),
    ) -> u64 {
        let layout = Arc::clone(&self.layout);
        let vcpus = layout.vcpus.iter().enumerate();
        let vcpus = vcpus.filter(|&(place, _)| wanted(place));
        // Entered once for many rings, as each entry into the gate may wait for a reset. But a thread that wants to reset waits for this
        // pass.
        let mut marking = self.harvester.gate.harvest();
        let mut taken = 0;
        for (place, vcpu) in vcpus {
            if marking.marked >= MOST_MARKED {
                drop(marking);
                marking = self.harvester.gate.harvest();
            }
            let entries = self.harvest_marking(vcpu, &mut marking).entries;
            note(place, entries);
            taken += u64::from(entries);
        }
        taken
    }

    /// Harvests one ring into the shard.
    pub(crate) fn harvest(&mut self, vcpu: &Vcpu) -> Taken {
        let mut marking = self.harvester.gate.harvest();
        self.harvest_marking(vcpu, &mut marking)
    }

    fn harvest_marking(&mut self, vcpu: &Vcpu, marking: &mut Harvest<'_>) -> Taken {
        let mut ring = lock(&vcpu.ring);
        let alone = ring.all_recycled();
        let (entries, breaks, misses) = match self.may_join {
            true => self.harvest_joining(&mut ring),
            false => {
                let lookup = self.layout.targets(&self.shard).lookup(&self.shard);
                let mut setter = Setter::new(lookup);
                let (entries, breaks) = ring.harvest_blocks(&mut setter);
                (entries, breaks, setter.misses)
            }
        };
        self.harvester.count_broken(breaks);
        vcpu.note_taken(entries);
        drop(ring);
        self.note_marked(marking, entries);

        let counts = &self.harvester.counts;
        counts.entries.add(entries.into());
        if misses.unknown_slot + misses.out_of_range > 0 {
            counts.unknown_slot.add(misses.unknown_slot);
            counts.out_of_range.add(misses.out_of_range);
            self.layout.suspect_all();
        }
        Taken {
            entries,
            alone: alone && !vcpu.is_broken(),
        }
    }

    /// Harvests the ring, and lets pages stay open.
    #[inline(never)]
    fn harvest_joining(&mut self, ring: &mut RingView) -> (u32, bool, Misses) {
        let terms = &self.harvester.working_set;
        let mut joiner = Joiner::new(&self.layout.slots, &self.shard, terms);
        let (entries, breaks) = ring.harvest_blocks(&mut joiner);
        let (named, misses) = (joiner.named, joiner.misses);
        self.stage.joining += u64::from(entries);
        self.stage.named += named;
        (entries, breaks, misses)
    }

    fn note_marked(&mut self, marking: &mut Harvest<'_>, entries: u32) {
        marking.marked += u64::from(entries);
        if entries > 0 {
            self.shard.has_pages = true;
            let faults = self.stage.faults;
            self.shard.unreset.get_or_insert(Unreset { faults });
        }
    }

    /// Resets what was harvested, or what an earlier holder of the shard left. It makes no ioctl if there is nothing to reset.
    pub(crate) fn reset(self) -> Result<Pass<'a, Reset>, ResetError> {
        if self.shard.unreset.is_none() {
            return Ok(self.into_reset());
        }
        self.reset_all()
    }

    /// As [`reset`](Self::reset), and also waits for the reset of everything that other passes had marked before this call.
    pub(crate) fn reset_all(self) -> Result<Pass<'a, Reset>, ResetError> {
        let before = match self.shard.unreset {
            Some(unreset) => unreset.faults,
            None => self.stage.faults,
        };
        let faults = self.harvester.reset()?;
        if faults != before {
            for slot in self.layout.slots.slots() {
                slot.suspect(&self.shard);
            }
        }
        Ok(self.into_reset())
    }

    /// Lets no page of this pass stay open.
    pub(crate) fn close_all(&mut self) {
        self.may_join = false;
    }

    /// Adds the pages of this pass, and of those before on its shard, to `dirty`, and ends the pass before its reset. The pages stay in
    /// the shard for its next holder. Returns false if there is no memory for it.
    pub(crate) fn copy_into(self, dirty: &mut DirtyPages) -> bool {
        let fits = dirty.fit(&self.layout.slots);
        if fits {
            for (slot, bits) in dirty.slots_mut() {
                slot.copy_shard_into(&self.shard, bits);
            }
        }
        fits
    }

    fn into_reset(mut self) -> Pass<'a, Reset> {
        self.shard.unreset = None;
        let Harvested { joining, named, .. } = self.stage;
        if joining > 0 {
            self.harvester.working_set.judge(joining, named);
        }
        Pass {
            harvester: self.harvester,
            layout: self.layout,
            may_join: self.may_join,
            shard: self.shard,
            stage: Reset(()),
        }
    }
}

impl Pass<'_, Reset> {
    /// After a full exit that found less than a full ring holds: looks for entries that the kernel has pushed beyond a gap.
    pub(crate) fn look_for_a_gap(&self, vcpu: &Vcpu) {
        let breaks = lock(&vcpu.ring).breaks_at_a_gap();
        self.harvester.count_broken(breaks);
    }

    /// Publishes the pages: the shard's next holder may return them.
    pub(crate) fn publish(self) {
        // Dropping the shard does it (`ShardGuard::drop` in the pool): it is given back with nothing left to reset.
        let Reset(()) = self.stage;
    }

    /// Moves the pages of this pass, and of those published on its shard before, into `dirty`. Returns false if there is no memory for
    /// it; then they stay.
    pub(crate) fn publish_into(mut self, dirty: &mut DirtyPages) -> bool {
        let fits = dirty.fit(&self.layout.slots);
        if fits && self.shard.has_pages {
            for (slot, bits) in dirty.slots_mut() {
                slot.take_shard_into(&self.shard, bits);
            }
            self.shard.has_pages = false;
        }
        self.publish();
        fits
    }
}
