//! A pass over rings: harvested, then reset, then published, each a type of its own.

use std::io;

use crate::bitmap::pages::PageBits;
use crate::bitmap::pool::{MAX_SHARDS, ShardGuard, ShardPool, Unreset};
use crate::error::ResetError;
use crate::harvest::reset_gate::{Harvest, ResetGate, Rings};
use crate::harvest::vcpu::Vcpu;
use crate::kernel::{Kernel, Mode};
use crate::ring::view::RingView;
use crate::slot_id::SlotId;
use crate::slots::dirty_pages::DirtyPages;
use crate::slots::table::{Slot, Table};
use crate::slots::targets::{Setter, Targets};
use crate::sync::{Arc, Counter, Mutex, OnceLock, lock};

/// Entries after which a pass over many rings lets a reset go first: some tenths of a millisecond. In
/// the models, each ring.
const MOST_MARKED: u64 = if cfg!(test) { 1 } else { 1 << 16 };

/// How often a removal has resets repeated that fall short.
const RECYCLE_TRIES: usize = 4;

/// Everything a pass needs.
pub(crate) struct Harvester {
    kernel: Box<dyn Kernel>,
    pub(crate) gate: ResetGate,
    pub(crate) pool: ShardPool,
    layout: Mutex<Arc<Layout>>,
    pub(crate) counts: Counts,
}

/// What is tracked at one moment: each pass works on one such snapshot.
#[derive(Default)]
pub(crate) struct Layout {
    pub(crate) slots: Table,
    pub(crate) vcpus: Vec<Arc<Vcpu>>,
    /// How entries find their bits, by shard; made by the first pass that needs it.
    targets: [OnceLock<Targets>; MAX_SHARDS],
}

impl Clone for Layout {
    /// A copy to be changed, so without what is made of the slots.
    fn clone(&self) -> Self {
        Self {
            slots: self.slots.clone(),
            vcpus: self.vcpus.clone(),
            targets: Default::default(),
        }
    }
}

impl Layout {
    /// Pages under suspicion.
    pub(crate) fn suspects(&self) -> u64 {
        self.slots.slots().map(|slot| slot.suspects()).sum()
    }

    /// Some page is written and unprotected, and we can't tell which.
    fn suspect_all(&self) {
        for slot in self.slots.slots() {
            slot.suspect_all();
        }
    }

    /// An old entry is about to be recycled. If its slot has no such page any more, the kernel forgets the
    /// batch: other pages of the slot may be in it. None of a slot that is added later: what ends the gap was
    /// pushed before, and ends the batch.
    fn suspect_if_beyond(&self, slot: u32, page: u64) {
        let slot = self.slots.get(slot);
        if let Some(slot) = slot.filter(|slot| page >= slot.pages()) {
            slot.suspect_all();
        }
    }

    fn targets(&self, held: &ShardGuard<'_>) -> &Targets {
        // SAFETY: `self` holds both the slots and the targets, and whoever changes the slots
        // throws the targets away.
        let make = || unsafe { Targets::new(&self.slots, held.index()) };
        self.targets[held.index()].get_or_init(make)
    }
}

/// What passes found.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) passes: Counter,
    pub(crate) entries: Counter,
    pub(crate) unknown_slot: Counter,
    pub(crate) out_of_range: Counter,
    pub(crate) overruns: Counter,
}

/// What one ring gave.
pub(crate) struct Taken {
    pub(crate) entries: u32,
    /// Whether they were all there was: the ring was not overrun, and no entry harvested before
    /// was still waiting for its reset.
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
        }
    }

    pub(crate) fn kernel(&self) -> &dyn Kernel {
        &*self.kernel
    }

    pub(crate) fn layout(&self) -> Arc<Layout> {
        Arc::clone(&lock(&self.layout))
    }

    /// Lets `change` loose on the layout, which it leaves as it was if it fails. Passes that have
    /// begun keep the old one.
    pub(crate) fn change_layout<T, E>(
        &self,
        change: impl FnOnce(&mut Layout) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut layout = lock(&self.layout);
        // Copied only if a pass has it.
        let layout = Arc::make_mut(&mut layout);
        layout.targets = Default::default();
        change(layout)
    }

    /// Waits until every pass that has begun, and so may work on an old layout, has ended.
    pub(crate) fn quiesce(&self) {
        for shard in 0..self.pool.len() {
            drop(self.pool.acquire(shard));
        }
    }

    /// The reset gate, with what it needs to know.
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
            },
            shard,
        }
    }

    /// A whole pass over every ring: harvest, reset, publish. Entries harvested.
    pub(crate) fn reap(&self) -> Result<u64, ResetError> {
        self.reap_those(|_| true, |_, _| ())
    }

    /// The same over those rings whose place `wanted` wants. `note` is told how many entries each gave.
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

    /// Harvests every ring, and has the kernel recycle every entry of `slot` that anybody has marked,
    /// whatever has become of that pass.
    ///
    /// Harvested entries are not enough for the slot's id to be used again. The kernel protects pages of
    /// one slot in batches, and forgets a whole batch for one page that the slot does not have
    /// (`kvm_reset_dirty_gfn`): an old entry, recycled beside some of a new and smaller slot of that id,
    /// would leave the new one's pages unprotected, and the count would be whole.
    pub(crate) fn recycle_all_of(&self, slot: SlotId) -> Result<(), ResetError> {
        if self.kernel.mode() == Mode::Bitmap {
            return Ok(());
        }
        for vcpu in &self.layout().vcpus {
            lock(&vcpu.ring).retry_help();
        }
        for _ in 0..RECYCLE_TRIES {
            let faults = self.gate.faults();
            let mut pass = self.begin();
            pass.harvest_all();
            pass.reset_all()?.publish();
            let is_whole = self.gate.faults() == faults;
            if is_whole || !self.awaits_reset_of(slot, 0) {
                return Ok(());
            }
        }
        let source = Arc::new(io::Error::other(
            "resets fall short, and leave entries of the slot",
        ));
        Err(ResetError { source })
    }

    /// Whether an entry waits for a reset that names page `first` of the slot or one after it.
    fn awaits_reset_of(&self, slot: SlotId, first: u64) -> bool {
        let layout = self.layout();
        let mut rings = layout.vcpus.iter().map(|vcpu| lock(&vcpu.ring));
        rings.any(|ring| ring.awaits_reset_of(slot.raw(), first))
    }

    /// Every page of the slot is protected again, or will be before it is logged: moves those under
    /// suspicion into `bits`.
    ///
    /// But as long as an entry waits for its reset that names a page past the slot's end, all of them stay
    /// under it: the kernel will forget the batch, and what is written and harvested by then may be in it.
    /// Who marks such entries makes the slot suspect before he gives the ring away, or the right to harvest:
    /// so either that comes after this, or the entries are seen here.
    pub(crate) fn end_suspicion(&self, slot: &Slot, bits: &mut PageBits) {
        slot.take_suspects_into(bits);
        if self.awaits_reset_of(slot.id(), slot.pages()) {
            slot.suspect_all();
        }
    }
}

impl Rings for Harvester {
    fn nothing_awaits_reset(&self) -> bool {
        let layout = self.layout();
        let mut rings = layout.vcpus.iter().map(|vcpu| lock(&vcpu.ring));
        rings.all(|ring| ring.nothing_awaits_reset())
    }

    fn look_for_overruns(&self) {
        let layout = self.layout();
        for vcpu in &layout.vcpus {
            let mut ring = lock(&vcpu.ring);
            if ring.is_reserve_used() {
                ring.note_overrun();
                // Else the harvest has.
                self.counts.overruns.add((!ring.all_wait()).into());
                layout.suspect_all();
            }
        }
    }

    fn reach_back(&self, finds_nothing: &mut dyn FnMut() -> bool) {
        let layout = self.layout();
        for vcpu in &layout.vcpus {
            let is_full = vcpu.is_full_of_nothing();
            if lock(&vcpu.ring).reach_back(is_full, &mut *finds_nothing) {
                // What it overran, nobody knows. Nor what was recycled beside old entries, of whose slots some
                // may be smaller by now.
                self.counts.overruns.add(1);
                layout.suspect_all();
            }
        }
    }

    fn suspect_last_batches(&self) {
        let layout = self.layout();
        for vcpu in layout.vcpus.iter().filter(|vcpu| vcpu.taken() > 0) {
            let (slot, page) = lock(&vcpu.ring).last();
            if let Some(slot) = layout.slots.get(slot) {
                slot.suspect_batch(page);
            }
        }
    }
}

/// A pass at `Stage`; its pages are in the shard it holds.
///
/// Dropped before its reset, by an error or a panic, it leaves its pages in the shard together with
/// the note that they are yet to be reset: the shard's next holder does it.
#[must_use]
pub(crate) struct Pass<'a, Stage> {
    harvester: &'a Harvester,
    layout: Arc<Layout>,
    shard: ShardGuard<'a>,
    stage: Stage,
}

/// Entries are marked for reset; their pages are not protected again, so nobody may copy them yet.
pub(crate) struct Harvested {
    faults: u64,
}

/// A reset that started after the last entry was marked has completed.
pub(crate) struct Reset(());

impl<'a> Pass<'a, Harvested> {
    /// Harvests every ring. Entries taken.
    pub(crate) fn harvest_all(&mut self) -> u64 {
        self.harvest_those(|_| true, |_, _| ())
    }

    /// Harvests the rings whose place `wanted` wants. Entries taken; `note` is told those of each.
    fn harvest_those(
        &mut self,
        wanted: impl Fn(usize) -> bool,
        mut note: impl FnMut(usize, u32),
    ) -> u64 {
        let layout = Arc::clone(&self.layout);
        let vcpus = layout.vcpus.iter().enumerate();
        let vcpus = vcpus.filter(|&(place, _)| wanted(place));
        // Once for many rings: each entry into the gate may wait for a reset. But whoever wants to
        // reset waits for us.
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
        // Before anything moves the head.
        let overrun_before = ring.is_overrun();
        let alone = ring.all_recycled();
        // The gap that an overrun left shows once the vCPU has run on. What lies beyond must not wait for a full
        // exit. In step there should be none: an overrun that nobody saw.
        let in_step = !ring.is_out_of_step();
        let gap = match ring.may_have_a_gap() {
            true => self.rejoin_ring(&mut ring),
            false => 0,
        };
        let lookup = self.layout.targets(&self.shard).lookup(&self.shard);
        let mut setter = Setter::new(lookup);
        let (entries, overrun_now) = ring.harvest_blocks(|entries| setter.take(entries));
        let overrun = overrun_before || overrun_now || gap > 0 && in_step;
        vcpu.note_taken(gap + entries);
        drop(ring);
        setter.set();
        let misses = setter.misses;
        self.note_marked(marking, gap + entries);

        let counts = &self.harvester.counts;
        counts.entries.add(entries.into());
        if misses.unknown_slot + misses.out_of_range > 0 {
            counts.unknown_slot.add(misses.unknown_slot);
            counts.out_of_range.add(misses.out_of_range);
            self.layout.suspect_all();
        }
        if overrun {
            self.note_overrun();
        }
        Taken {
            entries,
            alone: alone && !overrun,
        }
    }

    /// Joins a ring again that the kernel overran, see [`RingView::rejoin`]. Whether it had been.
    ///
    /// [`RingView::rejoin`]: crate::ring::view::RingView::rejoin
    pub(crate) fn rejoin(&mut self, vcpu: &Vcpu) -> bool {
        let mut marking = self.harvester.gate.harvest();
        let mut ring = lock(&vcpu.ring);
        let gap = self.rejoin_ring(&mut ring);
        vcpu.note_taken(gap);
        drop(ring);
        self.note_marked(&mut marking, gap);
        let was_behind = gap > 0;
        if was_behind {
            self.note_overrun();
        }
        was_behind
    }

    /// Joins the ring, and says how many entries were passed over.
    fn rejoin_ring(&self, ring: &mut RingView) -> u32 {
        ring.rejoin(|slot, page| self.layout.suspect_if_beyond(slot, page))
    }

    /// The kernel overwrote entries that nobody had harvested, or whose pages it had yet to
    /// protect: which pages, nobody knows.
    fn note_overrun(&self) {
        self.harvester.counts.overruns.add(1);
        self.layout.suspect_all();
    }

    fn note_marked(&mut self, marking: &mut Harvest<'_>, entries: u32) {
        marking.marked += u64::from(entries);
        if entries > 0 {
            let faults = self.stage.faults;
            self.shard.unreset.get_or_insert(Unreset { faults });
        }
    }

    /// Resets what was harvested, or what an earlier holder of the shard left; nothing to reset
    /// costs no ioctl.
    pub(crate) fn reset(self) -> Result<Pass<'a, Reset>, ResetError> {
        if self.shard.unreset.is_none() {
            return Ok(self.into_reset());
        }
        self.reset_all()
    }

    /// As [`reset`](Self::reset), and also waits for the reset of whatever other passes had marked
    /// when this was called.
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

    fn into_reset(mut self) -> Pass<'a, Reset> {
        self.shard.unreset = None;
        Pass {
            harvester: self.harvester,
            layout: self.layout,
            shard: self.shard,
            stage: Reset(()),
        }
    }
}

impl Pass<'_, Reset> {
    /// Publishes the pages: whoever holds the shard next may hand them out.
    pub(crate) fn publish(self) {
        let Reset(()) = self.stage;
    }

    /// Moves the pages of this pass, and of those published on its shard before, into `dirty`.
    /// False if there is no memory for it; then they stay.
    pub(crate) fn publish_into(self, dirty: &mut DirtyPages) -> bool {
        let fits = dirty.fit(&self.layout.slots);
        if fits {
            for (slot, bits) in dirty.slots_mut() {
                slot.take_shard_into(&self.shard, bits);
            }
        }
        self.publish();
        fits
    }
}
