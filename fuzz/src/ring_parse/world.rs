// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rings as the kernel's side left them, and what the log owes for what it has marked.

use std::collections::{BTreeMap, VecDeque};

use kvm_dirty_ring::ring::RingMemory;
use kvm_dirty_ring::{SlotId, Stats};

use super::script::{Change, Reaction};
use crate::common::shape::PageSet;
use crate::memory::{Cell, DIRTY, RESET, RawRing};

pub struct World {
    pub entries: u32,
    rings: Vec<Ring>,
    /// Slots that the log tracks.
    pub slots: BTreeMap<SlotId, u64>,
    pub reactions: VecDeque<Reaction>,
    /// Resets that failed during this call.
    pub failures: u32,
    /// Pages that the next sync must report.
    owed: PageSet,
    /// Of these, those marked since the last reset that did not fail.
    unreset: PageSet,
    /// Pages that every sync must report, until their slot is re-armed.
    suspect: PageSet,
    /// Entries marked, and entries that resets claim to have recycled.
    marked: u64,
    returned: u64,
    /// Entries marked that name nothing: a slot that is not there, a page past its end.
    unknown_slot: u64,
    out_of_range: u64,
    /// So far the dirty entries of each ring were always those from its head on, without a gap, and those that
    /// wait for a reset the ones before it, with a reserve of free ones between: what a kernel without faults
    /// makes. Then everything is exact.
    orderly: bool,
}

struct Ring {
    memory: RawRing,
    /// What it held when the kernel's side was last at it.
    shadow: Vec<Cell>,
    /// Where the log is.
    head: u32,
    /// Where a kernel would push, and recycle.
    pushed: u32,
    recycled: u32,
    /// Whether the call under way may harvest it, and how many entries from its head on wait for
    /// the first harvest of that call, until this is over.
    wanted: bool,
    waiting: Option<u32>,
}

impl Ring {
    fn at(&self, index: u32) -> Cell {
        self.shadow[index as usize % self.shadow.len()]
    }

    fn set(&mut self, index: u32, cell: Cell) {
        self.memory.set(index, cell);
        let at = index as usize % self.shadow.len();
        self.shadow[at] = cell;
    }

    fn entries(&self) -> u32 {
        self.shadow.len() as u32
    }

    /// Dirty entries from the head on.
    fn prefix(&self) -> u32 {
        let dirty = |ahead: &u32| self.at(self.head.wrapping_add(*ahead)).is_dirty();
        (0..self.entries()).take_while(dirty).count() as u32
    }

    /// Whether these are all, whether those that wait for a reset are before the head, and whether all between
    /// are free, and enough.
    fn is_orderly(&self) -> bool {
        let entries = self.entries();
        let waits = |back: &u32| self.at(self.head.wrapping_sub(*back)).flags & RESET != 0;
        let used = self.prefix() + (1..=entries).take_while(waits).count() as u32;
        let is_free = |cell: &&Cell| cell.flags & (DIRTY | RESET) == 0;
        let free = self.shadow.iter().filter(is_free).count() as u32;
        // Half of what a kernel keeps in reserve.
        free >= (entries / 64).clamp(1, 32) && free + used == entries
    }

    /// Whether the log must see that the kernel overran it.
    fn is_overrun(&self) -> bool {
        self.at(self.head.wrapping_sub(1)).is_dirty()
    }
}

impl World {
    pub fn new(entries: u32) -> Self {
        Self {
            entries,
            rings: Vec::new(),
            slots: BTreeMap::new(),
            reactions: VecDeque::new(),
            failures: 0,
            owed: PageSet::new(),
            unreset: PageSet::new(),
            suspect: PageSet::new(),
            marked: 0,
            returned: 0,
            unknown_slot: 0,
            out_of_range: 0,
            orderly: true,
        }
    }

    /// A ring that holds this.
    pub fn attach(&mut self, memory: &[Change]) -> RingMemory {
        self.rings.push(Ring {
            memory: RawRing::new(self.entries),
            shadow: vec![Cell::default(); self.entries as usize],
            head: 0,
            pushed: 0,
            recycled: 0,
            wanted: false,
            waiting: None,
        });
        let last = self.rings.len() - 1;
        for change in memory {
            self.change_in(last, change);
        }
        self.rings[last].memory.memory()
    }

    pub fn ring(&self, index: usize) -> RawRing {
        self.rings[index].memory.clone()
    }

    /// Changes the memory of the ring that is named.
    pub fn change(&mut self, change: &Change) {
        let (Change::Fill { ring, .. } | Change::Flags { ring, .. } | Change::Push { ring, .. }) =
            change;
        self.change_in(ring % self.rings.len(), change);
    }

    fn change_in(&mut self, ring: usize, change: &Change) {
        let ring = &mut self.rings[ring];
        let entries = ring.entries();
        match *change {
            Change::Fill {
                at,
                len,
                cell,
                stride,
                ..
            } => {
                for i in 0..len.min(entries) {
                    let offset = cell.offset.wrapping_add(u64::from(i).wrapping_mul(stride));
                    ring.set(at + i, Cell { offset, ..cell });
                }
            }
            Change::Flags { at, len, flags, .. } => {
                for i in 0..len.min(entries) {
                    let cell = ring.at(at + i);
                    ring.set(at + i, Cell { flags, ..cell });
                }
            }
            Change::Push {
                slot,
                page,
                len,
                stride,
                ..
            } => {
                for i in 0..u64::from(len) {
                    if ring.pushed.wrapping_sub(ring.recycled) >= entries - 1 {
                        break;
                    }
                    let cell = Cell {
                        flags: DIRTY,
                        slot,
                        offset: page.wrapping_add(i.wrapping_mul(stride)),
                    };
                    ring.set(ring.pushed, cell);
                    ring.pushed = ring.pushed.wrapping_add(1);
                }
            }
        }
        self.orderly &= ring.is_orderly();
        // A kernel marks nothing for a reset.
        let (Change::Fill {
            cell: Cell { flags, .. },
            ..
        }
        | Change::Flags { flags, .. }) = *change
        else {
            return;
        };
        self.orderly &= flags & RESET == 0;
    }

    /// The loop of a reset, over every ring: at most `limit` entries. How many there were.
    pub fn recycle(&mut self, limit: u32) -> u32 {
        let mut count = 0;
        for ring in &mut self.rings {
            while count < limit && ring.memory.get(ring.recycled).flags & RESET != 0 {
                let cell = ring.memory.get(ring.recycled);
                ring.set(ring.recycled, Cell { flags: 0, ..cell });
                ring.recycled = ring.recycled.wrapping_add(1);
                count += 1;
            }
        }
        count
    }

    /// A call begins that harvests these rings.
    pub fn begin_call(&mut self, wanted: impl Fn(usize) -> bool) {
        self.failures = 0;
        let mut overrun = false;
        for (index, ring) in self.rings.iter_mut().enumerate() {
            ring.wanted = wanted(index);
            ring.waiting = ring.wanted.then(|| ring.prefix());
            overrun |= ring.wanted && (ring.is_overrun() || ring.waiting == Some(ring.entries()));
        }
        if overrun {
            self.suspect_all();
        }
    }

    /// The call is over, and these are the entries taken so far.
    pub fn end_call(&mut self, taken: impl Iterator<Item = u64>) {
        self.note_marks();
        for (ring, taken) in self.rings.iter_mut().zip(taken) {
            let head = taken as u32;
            assert!(!self.orderly || ring.head == head, "the head is elsewhere");
            ring.head = head;
            ring.wanted = false;
            // Where something was out of order, the head was not known until now.
            self.orderly &= ring.is_orderly();
        }
        self.write_off();
    }

    /// Finds what the log has marked since the kernel's side was last at it.
    pub fn note_marks(&mut self) {
        for index in 0..self.rings.len() {
            let ring = &mut self.rings[index];
            let (head, waiting) = (ring.head, ring.waiting.take());
            let mut marked = Vec::new();
            for ahead in 0..ring.entries() {
                let at = head.wrapping_add(ahead);
                let (old, new) = (ring.at(at), ring.memory.get(at));
                if old != new {
                    let harvested = Cell {
                        flags: RESET,
                        ..old
                    };
                    assert_eq!(new, harvested, "entry {at} is neither left nor marked");
                    assert!(ring.wanted, "ring {index} was to be left alone");
                    assert!(!self.orderly || old.is_dirty(), "entry {at} is no page");
                    assert!(
                        !self.orderly || ahead as usize == marked.len(),
                        "out of order"
                    );
                    ring.set(at, new);
                    marked.push(old);
                } else {
                    let waited = waiting.is_some_and(|waiting| ahead < waiting);
                    assert!(!waited, "entry {at} was left");
                }
            }
            if let (true, Some(waiting)) = (self.orderly, waiting) {
                assert_eq!(marked.len() as u32, waiting);
            }
            ring.head = head.wrapping_add(marked.len() as u32);
            for cell in marked {
                self.owe(cell);
            }
        }
    }

    /// An entry was marked: its page is to be reported, or, if there is none, every page.
    fn owe(&mut self, cell: Cell) {
        self.marked += 1;
        if !cell.is_dirty() {
            // Marked for its neighbours' sake: nobody has written its page.
            return;
        }
        let slot = SlotId::from_raw(cell.slot);
        match self.slots.get(&slot) {
            Some(pages) if cell.offset < *pages => {
                self.owed.entry(slot).or_default().insert(cell.offset);
                self.unreset.entry(slot).or_default().insert(cell.offset);
                return;
            }
            Some(_) => self.out_of_range += 1,
            None => self.unknown_slot += 1,
        }
        self.suspect_all();
    }

    fn suspect_all(&mut self) {
        for (&slot, &pages) in &self.slots {
            let suspect = self.suspect.entry(slot).or_default();
            if (suspect.len() as u64) < pages {
                suspect.extend(0..pages);
            }
        }
    }

    /// A reset says that it has recycled `count` entries. If that is fewer than are marked, pages of
    /// those marked since the one before may be unprotected.
    pub fn note_reset(&mut self, count: u32) {
        self.returned += u64::from(count);
        let unreset = std::mem::take(&mut self.unreset);
        if self.returned < self.marked {
            merge(&mut self.suspect, &unreset);
        }
        // What somebody else had marked does not make up for what a later one leaves.
        self.returned = self.returned.min(self.marked);
    }

    /// What no entry waits for any more, no reset will ever recycle: it is not missed twice.
    pub fn write_off(&mut self) {
        let waits = |ring: &Ring| ring.shadow.iter().any(|cell| cell.flags & RESET != 0);
        if !self.rings.iter().any(waits) {
            self.returned = self.returned.max(self.marked);
        }
    }

    /// Whether an entry of the slot waits for a reset that names page `first` or one after it.
    pub fn awaits_reset_of(&self, slot: SlotId, first: u64) -> bool {
        let names = |cell: Cell| cell.slot == slot.raw() && cell.offset >= first;
        let waits = |cell: Cell| cell.flags & RESET != 0 && names(cell);
        let mut rings = self.rings.iter();
        rings.any(|ring| (0..ring.entries()).any(|index| waits(ring.memory.get(index))))
    }

    /// A device has written, if there are such pages.
    pub fn device_write(&mut self, slot: SlotId, first: u64, pages: u64) -> bool {
        let Some(&size) = self.slots.get(&slot) else {
            return false;
        };
        let end = first.checked_add(pages).filter(|end| *end <= size);
        if let Some(end) = end {
            self.owed.entry(slot).or_default().extend(first..end);
        }
        end.is_some()
    }

    /// The slot's pages are protected, and come once more; all stay suspect if an entry past its end waits.
    pub fn rearmed(&mut self, slot: SlotId) -> bool {
        let Some(&pages) = self.slots.get(&slot) else {
            return false;
        };
        if let Some(suspect) = self.suspect.remove(&slot) {
            self.owed.entry(slot).or_default().extend(suspect);
        }
        if self.awaits_reset_of(slot, pages) {
            self.suspect.entry(slot).or_default().extend(0..pages);
        }
        true
    }

    /// The log tracks a slot; if it has met entries of slots that it does not know, all pages are suspect.
    pub fn add(&mut self, slot: SlotId, pages: u64, is_late: bool) {
        self.slots.insert(slot, pages);
        if is_late {
            self.suspect.entry(slot).or_default().extend(0..pages);
        }
    }

    /// The slot is gone.
    pub fn forget(&mut self, slot: SlotId) {
        self.slots.remove(&slot);
        for pages in [&mut self.owed, &mut self.unreset, &mut self.suspect] {
            pages.remove(&slot);
        }
    }

    /// A sync has reported this.
    pub fn judge(&mut self, reported: &PageSet, stats: &Stats) {
        let mut expected = std::mem::take(&mut self.owed);
        merge(&mut expected, &self.suspect);
        expected.retain(|_, pages| !pages.is_empty());
        for (slot, pages) in &expected {
            let reported = reported.get(slot);
            let missing = |page: &&u64| !reported.is_some_and(|pages| pages.contains(page));
            let missing: Vec<_> = pages.iter().filter(missing).collect();
            assert!(missing.is_empty(), "slot {slot}: {missing:?} were lost");
        }
        // What a short reset concerns is unknown to the world.
        if self.orderly && stats.short_resets == 0 {
            assert_eq!(*reported, expected, "reported, and owed");
        }
    }

    /// Where all is in order, the log has counted what the world has.
    pub fn assert_counts(&self, stats: &Stats) {
        if self.orderly {
            assert_eq!(stats.entries, self.marked);
            assert_eq!(stats.unknown_slot_entries, self.unknown_slot);
            assert_eq!(stats.out_of_range_entries, self.out_of_range);
            assert_eq!(stats.overruns, 0);
        }
    }

    /// Entries that wait in each ring, where it is known.
    pub fn occupancy(&self) -> impl Iterator<Item = Option<u32>> {
        self.rings.iter().map(|ring| {
            let head = ring.at(ring.head);
            let told = ring.is_orderly() && (head.is_dirty() || head.flags & RESET == 0);
            told.then(|| ring.prefix())
        })
    }
}

fn merge(into: &mut PageSet, pages: &PageSet) {
    for (&slot, pages) in pages {
        into.entry(slot).or_default().extend(pages);
    }
}
