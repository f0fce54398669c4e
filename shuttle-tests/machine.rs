// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A machine with its log, and the threads that are at work on it.

use core::ops::Range;

use super::{fresh, pick};
use crate::bitmap::pool::MAX_SHARDS;
use crate::loom_tests::kernel::{Copy, Fault, Machine, SLOT, State};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Arc, Mutex, lock};
use crate::{DirtyLog, DirtyPages, SlotId, VcpuRing};

/// The slot that comes and goes.
pub(super) const GUEST_SLOT: SlotId = SlotId::new(0, 1);

/// A machine, its log, and the destination of its migration. Clones share them.
#[derive(Clone)]
pub(super) struct Vm {
    pub(super) machine: Arc<Machine>,
    pub(super) log: DirtyLog,
    /// The lock makes reading a page and writing its copy one step: two migrations could otherwise
    /// put an old content over a new one, which no log could report.
    copy: Arc<Mutex<Copy>>,
    /// How often a full ring may stay full at most.
    faults: usize,
}

impl Vm {
    /// With one slot of `pages` pages.
    pub(super) fn new(vcpus: usize, pages: usize) -> Self {
        Self::with_slots(vcpus, &[(SLOT, pages)])
    }

    /// As [`Machine::with_slots`] has it.
    pub(super) fn with_slots(vcpus: usize, slots: &[(SlotId, usize)]) -> Self {
        Self::over(Machine::with_slots(vcpus, slots, Vec::new()), 0)
    }

    /// With one slot, and resets that go wrong at random: `faults` at most.
    pub(super) fn with_faults(vcpus: usize, pages: usize, faults: usize) -> Self {
        let fault = |_| match pick(0..4) {
            0 => Some(Fault::Error),
            1 => Some(Fault::Short),
            2 => Some(Fault::AtEnd),
            _ => None,
        };
        let list = (0..faults).map(fault).collect();
        Self::over(Machine::with_faults(vcpus, pages, list), faults)
    }

    fn over(machine: Arc<Machine>, faults: usize) -> Self {
        let log = machine.log(pick(1..MAX_SHARDS + 1));
        let copy = Arc::new(Mutex::new(Copy::new(&machine)));
        Self {
            machine,
            log,
            copy,
            faults,
        }
    }

    /// Attaches the ring of vCPU `vcpu`.
    pub(super) fn attach(&self, vcpu: usize) -> VcpuRing {
        let memory = self.machine.ring(vcpu).memory();
        self.log.attach_ring(memory).unwrap()
    }

    /// Runs vCPU `vcpu`, which makes `writes` writes to any of `pages`. Gives its ring back.
    pub(super) fn run(
        &self,
        vcpu: usize,
        mut ring: VcpuRing,
        pages: &'static [usize],
        writes: usize,
    ) -> JoinHandle<VcpuRing> {
        let vm = self.clone();
        thread::spawn(move || {
            for _ in 0..writes {
                vm.write(vcpu, &mut ring, pages[pick(0..pages.len())]);
            }
            ring
        })
    }

    /// Runs the vCPUs of `rings`, as above.
    pub(super) fn run_all(
        &self,
        rings: impl IntoIterator<Item = VcpuRing>,
        pages: &'static [usize],
        writes: usize,
    ) -> Vec<JoinHandle<VcpuRing>> {
        let rings = rings.into_iter().enumerate();
        rings
            .map(|(vcpu, ring)| self.run(vcpu, ring, pages, writes))
            .collect()
    }

    /// The guest writes; where the ring is full, after as many full exits as it takes.
    fn write(&self, vcpu: usize, ring: &mut VcpuRing, page: usize) {
        for _ in 0..=self.faults {
            if self.machine.write(vcpu, page, fresh()) {
                return;
            }
            assert!(ring.on_full().is_ok() || self.faults > 0);
        }
        assert!(
            self.machine.write(vcpu, page, fresh()),
            "still full after making room"
        );
    }

    /// A reaper makes `passes` passes, each over rings of its choice.
    pub(super) fn reaper(&self, passes: usize) -> JoinHandle<()> {
        let vm = self.clone();
        thread::spawn(move || {
            for _ in 0..passes {
                let result = match pick(0..2) {
                    0 => vm.log.reap(),
                    _ => vm.log.reap_rings(&[pick(0..2) == 0, true]),
                };
                assert!(result.is_ok() || vm.faults > 0);
            }
        })
    }

    /// A device makes `writes` writes to any of `pages`.
    pub(super) fn device(&self, pages: Range<usize>, writes: usize) -> JoinHandle<()> {
        let vm = self.clone();
        thread::spawn(move || (0..writes).for_each(|_| vm.device_write(pick(pages.clone()))))
    }

    /// A device writes a page.
    pub(super) fn device_write(&self, page: usize) {
        self.machine.device_write(page, fresh());
        let page = &self.machine.pages[page];
        self.log.mark_dirty(page.slot, page.number, 1).unwrap();
    }

    /// A migration makes `rounds` rounds.
    pub(super) fn migration(&self, rounds: usize) -> JoinHandle<()> {
        let vm = self.clone();
        thread::spawn(move || (0..rounds).for_each(|_| drop(vm.round())))
    }

    /// One round: sync, then copy. What was dirty; `None` if a reset failed.
    pub(super) fn round(&self) -> Option<DirtyPages> {
        let mut dirty = DirtyPages::new();
        match self.log.sync(&mut dirty) {
            Ok(()) => lock(&self.copy).take(&self.machine, &dirty),
            Err(_) => {
                assert!(dirty.is_empty() && self.faults > 0);
                return None;
            }
        }
        Some(dirty)
    }

    /// The last round, vCPUs and devices at rest, others perhaps not. What of `pages` the guest
    /// could write without being logged is reported.
    pub(super) fn last_round(&self, pages: Range<usize>) -> DirtyPages {
        let dirty = loop {
            if let Some(dirty) = self.round() {
                break dirty;
            }
        };
        for page in &self.machine.pages[pages] {
            let is_open = matches!(*lock(&page.state), State::Open | State::Unlogged);
            assert!(
                !is_open || dirty.contains(page.slot, page.number),
                "page {} of slot {} is unprotected and not suspect",
                page.number,
                page.slot
            );
        }
        dirty
    }

    /// Nothing of `pages` is missing in the copy, once every migration has copied what its syncs returned.
    pub(super) fn verify(&self, pages: Range<usize>) {
        lock(&self.copy).verify_pages(&self.machine, pages);
    }

    /// The VMM deletes the slot of `pages`.
    pub(super) fn delete(&self, pages: Range<usize>) {
        self.set(pages, State::Gone);
    }

    /// The VMM creates the slot of `pages`, or switches its logging on (again): KVM protects them all.
    pub(super) fn protect(&self, pages: Range<usize>) {
        self.set(pages, State::Armed);
    }

    fn set(&self, pages: Range<usize>, state: State) {
        for page in &self.machine.pages[pages] {
            *lock(&page.state) = state;
        }
    }
}
