// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel and the guest as the models see them, those in `shuttle-tests/` included.

use core::ops::Range;
use std::io;

use crate::kernel::{Kernel, Mode, Recycled};
use crate::log::DirtyLog;
use crate::ring::producer::Producer;
use crate::slot_id::SlotId;
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering, lock, thread};

/// Entries of a model's ring; a vCPU stops two before the end.
pub(crate) const ENTRIES: u32 = 4;
pub(crate) const SOFT_LIMIT: u32 = 2;

/// The slot whose pages the guest writes.
pub(crate) const SLOT: SlotId = SlotId::new(0, 0);

/// What a reset does wrong.
#[derive(Clone, Copy)]
pub(crate) enum Fault {
    /// Fails, and does nothing.
    Error,
    /// Recycles one entry, does not arm its page, and stops.
    Short,
    /// Recycles all, does not arm the pages of the last ring, and is stopped: the count is whole.
    AtEnd,
}

/// A machine. Its pages are counted through all slots.
pub(crate) struct Machine {
    mode: Mode,
    rings: Vec<Producer>,
    pub(crate) pages: Vec<Page>,
    /// Held through a reset, as KVM's `slots_lock` is.
    resets: Mutex<Vec<Option<Fault>>>,
}

pub(crate) struct Page {
    pub(crate) slot: SlotId,
    /// Which page of its slot it is.
    pub(crate) number: u64,
    /// The lock makes "armed? then log, then write" one step towards re-arming, as the processor's
    /// fault and the TLB flush make it.
    pub(crate) state: Mutex<State>,
    /// Its bit in the kernel's bitmap. Relaxed: the lock of the state orders it.
    logged: AtomicBool,
    /// What the guest wrote. Relaxed, so that only the crate's own orderings make a copy current.
    content: AtomicU64,
}

/// What a write to a page does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// It is logged, and opens the page.
    Armed,
    /// It is not logged, until a reset arms the page.
    Open,
    /// It is not logged, nor is any in its slot.
    Unlogged,
    /// Nothing: the page's slot is deleted, or not created yet.
    Gone,
}

impl Machine {
    pub(crate) fn new(vcpus: usize, pages: usize) -> Arc<Self> {
        Self::with_faults(vcpus, pages, Vec::new())
    }

    /// A machine whose first resets go wrong, by the last of `faults` first.
    pub(crate) fn with_faults(vcpus: usize, pages: usize, faults: Vec<Option<Fault>>) -> Arc<Self> {
        Self::with_slots(vcpus, &[(SLOT, pages)], faults)
    }

    /// A machine without rings, which logs into bitmaps.
    pub(crate) fn with_bitmap(pages: usize) -> Arc<Self> {
        Self::make(Mode::Bitmap, 0, &[(SLOT, pages)], Vec::new())
    }

    /// As above, with several slots and the pages of each. Where two have one id, the first is there
    /// and the other yet to be created.
    pub(crate) fn with_slots(
        vcpus: usize,
        slots: &[(SlotId, usize)],
        faults: Vec<Option<Fault>>,
    ) -> Arc<Self> {
        Self::make(Mode::Rings, vcpus, slots, faults)
    }

    fn make(
        mode: Mode,
        vcpus: usize,
        slots: &[(SlotId, usize)],
        faults: Vec<Option<Fault>>,
    ) -> Arc<Self> {
        let mut pages = Vec::new();
        for (place, &(slot, count)) in slots.iter().enumerate() {
            let state = match slots[..place].iter().any(|&(before, _)| before == slot) {
                true => State::Gone,
                false => State::Armed,
            };
            pages.extend((0..count as u64).map(|number| Page {
                slot,
                number,
                state: Mutex::new(state),
                logged: AtomicBool::new(false),
                content: AtomicU64::new(0),
            }));
        }
        Arc::new(Self {
            mode,
            rings: (0..vcpus).map(|_| Producer::new(ENTRIES, 0)).collect(),
            pages,
            resets: Mutex::new(faults),
        })
    }

    /// A log of `shards` shards over this machine, the slot of the models added. Rings are attached
    /// by the caller, in order.
    pub(crate) fn log(self: &Arc<Self>, shards: usize) -> DirtyLog {
        let kernel = Box::new(Ioctl(Arc::clone(self)));
        let log = DirtyLog::new(kernel, ENTRIES, shards, false);
        let pages = self.pages.iter().filter(|page| page.slot == SLOT).count();
        log.add_slot(SLOT, pages as u64).unwrap();
        log
    }

    /// The ring of vCPU `vcpu`.
    pub(crate) fn ring(&self, vcpu: usize) -> &Producer {
        &self.rings[vcpu]
    }

    /// The guest writes, on whatever vCPU: in bitmap mode.
    pub(crate) fn write_page(&self, page: usize, value: u64) {
        let page = &self.pages[page];
        let mut state = lock(&page.state);
        if *state == State::Gone {
            return;
        }
        if *state == State::Armed {
            page.logged.store(true, Ordering::Relaxed);
            *state = State::Open;
        }
        page.content.store(value, Ordering::Relaxed);
    }

    /// The guest writes; false, and nothing happens, if the vCPU's ring is full.
    pub(crate) fn write(&self, vcpu: usize, page: usize, value: u64) -> bool {
        if self.rings[vcpu].used() >= SOFT_LIMIT {
            return false;
        }
        let page = &self.pages[page];
        let mut state = lock(&page.state);
        match *state {
            State::Armed => {
                self.rings[vcpu].push(page.slot.raw(), page.number);
                *state = State::Open;
            }
            State::Open | State::Unlogged => {}
            State::Gone => return true,
        }
        page.content.store(value, Ordering::Relaxed);
        true
    }

    /// A device writes: no vCPU logs it.
    pub(crate) fn device_write(&self, page: usize, value: u64) {
        self.pages[page].content.store(value, Ordering::Relaxed);
    }

    /// The VMM deletes a slot.
    pub(crate) fn delete_slot(&self, slot: SlotId) {
        self.switch(slot, State::Gone);
    }

    /// The VMM changes what is logged of a slot.
    pub(crate) fn switch(&self, slot: SlotId, state: State) {
        for page in self.pages.iter().filter(|page| page.slot == slot) {
            *lock(&page.state) = state;
        }
    }

    /// Copies a page.
    pub(crate) fn read(&self, page: usize) -> u64 {
        self.pages[page].content.load(Ordering::Relaxed)
    }

    /// The places of page `number` of `slot`: as many as there are slots of that id.
    fn pages_at(&self, slot: SlotId, number: u64) -> impl Iterator<Item = usize> {
        let places = self.pages.iter().enumerate();
        let named = places.filter(move |(_, page)| page.slot == slot && page.number == number);
        named.map(|(place, _)| place)
    }

    /// A reset by somebody else, which shows what it recycles to `each`: slot and page.
    pub(crate) fn reset_seeing(&self, mut each: impl FnMut(u32, u64)) {
        self.reset_and(&mut each).unwrap();
    }

    fn reset_and(&self, each: &mut dyn FnMut(u32, u64)) -> io::Result<Recycled> {
        let mut faults = lock(&self.resets);
        let (limit, interrupted) = match faults.pop() {
            Some(Some(Fault::Error)) => return Err(io::Error::from_raw_os_error(libc::ENOMEM)),
            Some(Some(Fault::Short)) => (1, false),
            Some(Some(Fault::AtEnd)) => (u32::MAX, true),
            Some(None) | None => (u32::MAX, false),
        };
        // Void entries are among these: they name no slot that has pages, and none is armed for them.
        let mut named = Vec::new();
        let (mut recycled, mut last_ring) = (0, 0);
        for ring in &self.rings {
            let before = named.len();
            recycled += ring.recycle(limit - recycled, |slot, page| {
                each(slot, page);
                named.push((slot, page));
            });
            if named.len() > before {
                last_ring = before;
            }
        }
        if interrupted {
            named.truncate(last_ring);
        }
        // Entries are free before their pages are armed: only the return shows that they are.
        if limit == u32::MAX || !self.rings.iter().any(Producer::awaits_reset) {
            for (slot, number) in named {
                for page in self.pages_at(SlotId::from_raw(slot), number) {
                    let mut state = lock(&self.pages[page].state);
                    if *state == State::Open {
                        *state = State::Armed;
                    }
                }
            }
        }
        Ok(Recycled {
            entries: recycled,
            interrupted,
        })
    }
}

impl Machine {
    /// The bits of a slot that are set; they stay. There are none of a slot that was deleted.
    fn read_bitmap(&self, slot: SlotId, words: &mut [u64]) -> io::Result<()> {
        for page in self.pages.iter().filter(|page| page.slot == slot) {
            let state = lock(&page.state);
            if *state == State::Gone {
                return Err(io::Error::from_raw_os_error(libc::ENOENT));
            }
            if page.logged.load(Ordering::Relaxed) {
                words[(page.number / 64) as usize] |= 1 << (page.number % 64);
            }
        }
        Ok(())
    }

    /// Takes those bits that are set in `of`, and arms their pages at the very end: only the return shows that they are. Shows
    /// those that were set to `each`. There are none of a slot that was deleted.
    fn clear_bitmap(
        &self,
        slot: SlotId,
        of: impl Fn(u64) -> bool,
        mut each: impl FnMut(u64),
    ) -> io::Result<()> {
        let mut taken = Vec::new();
        let pages = self.pages.iter();
        for page in pages.filter(|page| page.slot == slot && of(page.number)) {
            let state = lock(&page.state);
            if *state == State::Gone {
                return Err(io::Error::from_raw_os_error(libc::ENOENT));
            }
            if page.logged.swap(false, Ordering::Relaxed) {
                taken.push(page);
            }
        }
        thread::yield_now();
        for page in taken {
            each(page.number);
            let mut state = lock(&page.state);
            if *state == State::Open {
                *state = State::Armed;
            }
        }
        Ok(())
    }
}

/// The machine behind its ioctl.
struct Ioctl(Arc<Machine>);

impl Kernel for Ioctl {
    fn reset(&self) -> io::Result<Recycled> {
        self.0.reset_and(&mut |_, _| ())
    }

    fn mode(&self) -> Mode {
        self.0.mode
    }

    fn take_bitmap(&self, slot: SlotId, _pages: u64, words: &mut [u64]) -> io::Result<()> {
        let set = |page: u64| words[(page / 64) as usize] |= 1 << (page % 64);
        self.0.clear_bitmap(slot, |_| true, set)
    }

    fn read_bitmap(&self, slot: SlotId, _pages: u64, words: &mut [u64]) -> io::Result<()> {
        self.0.read_bitmap(slot, words)
    }

    fn clear_bitmap(&self, slot: SlotId, _pages: u64, words: &mut [u64]) -> io::Result<()> {
        let is_set = |page: u64| words[(page / 64) as usize] >> (page % 64) & 1 == 1;
        self.0.clear_bitmap(slot, is_set, |_| ())
    }
}

/// A migration's destination.
pub(crate) struct Copy(Vec<u64>);

impl Copy {
    pub(crate) fn new(machine: &Machine) -> Self {
        Self(vec![0; machine.pages.len()])
    }

    /// One round: sync, then copy what it reports.
    pub(crate) fn round(&mut self, machine: &Machine, log: &DirtyLog) {
        let mut dirty = crate::DirtyPages::new();
        log.sync(&mut dirty).unwrap();
        self.take(machine, &dirty);
    }

    /// Copies the pages in `dirty`.
    pub(crate) fn take(&mut self, machine: &Machine, dirty: &crate::DirtyPages) {
        self.take_runs(machine, dirty.runs());
    }

    /// Copies the pages of `runs`.
    pub(crate) fn take_runs(&mut self, machine: &Machine, runs: impl Iterator<Item = crate::Run>) {
        for run in runs {
            for number in run.first_page..run.first_page + run.pages {
                for page in machine.pages_at(run.slot, number) {
                    self.0[page] = machine.read(page);
                }
            }
        }
    }

    /// Fails the model unless the copy equals the original.
    pub(crate) fn verify(&self, machine: &Machine) {
        self.verify_pages(machine, 0..self.0.len());
    }

    /// The same of some pages.
    pub(crate) fn verify_pages(&self, machine: &Machine, pages: Range<usize>) {
        for page in pages {
            assert_eq!(self.0[page], machine.read(page), "page {page} was lost");
        }
    }
}
