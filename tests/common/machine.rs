// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A machine under a script, and what the oracles know of it.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::sync::{Arc, Mutex};

use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::sim::{BitmapFault, ResetFault, SimConfig, SimVcpu, SimVm, WriteError};
use kvm_dirty_ring::{DirtyLog, DirtyPages, LastPages, Mode, SlotId, Stats, VcpuRing, WorkingSet};

use super::ops::{Op, Setup, Write};
use super::shape::{PageSet, pages_of, part_of};

mod lives;
mod memory;
mod working_set;

use lives::Life;
use memory::Memory;
use working_set::Held;

const SLOTS: [SlotId; 3] = [SlotId::new(0, 0), SlotId::new(0, 3), SlotId::new(1, 0)];
const MOST_VCPUS: usize = 4;

/// A machine with its log.
pub struct Machine {
    memory: Arc<Memory>,
    rings: Vec<VcpuRing>,
    lives: Vec<Life>,
    /// Slots that the log tracks.
    tracked: BTreeMap<SlotId, u64>,
    dirty: DirtyPages,
    /// Whether entries were harvested since the last sync that nothing need have recycled.
    unreset: bool,
    /// Faults ever injected: so many calls may fail, no more.
    injected: usize,
    /// Pages ever to be logged as nonsense.
    garbled: usize,
    /// Whether a vCPU was ever made to overrun its ring.
    overran: bool,
    /// Whether a vCPU that overran its ring can't get back into the guest. It writes no more.
    pub stuck: bool,
    /// The exact oracle: pages written since the last sync, by guest or device.
    pub written: PageSet,
    /// Those of them that no deletion of their slot takes from the log: the kernel's bits go with it.
    kept: PageSet,
    /// Whether vCPUs' writes go to the kernel's bits.
    bitmap_mode: bool,
    /// The migration oracle: each page's version when it was last copied.
    copy: BTreeMap<SlotId, Vec<u64>>,
    /// Members that the last sync reported: the next one has to.
    open: PageSet,
    /// A sync on demand under way.
    held: Option<Held>,
    last: LastPages,
}

impl Machine {
    /// Two live slots, a third that a script may add.
    pub fn new(setup: &Setup) -> Self {
        let mut config = SimConfig::default();
        config.ring_entries = setup.ring_entries;
        config.reserved = setup.reserved;
        config.pml = setup.pml;
        config.first_index = setup.first_index;
        config.mode = setup.mode;
        config.with_bitmap = setup.with_bitmap;
        config.protects_spans = setup.protects_spans;
        config.ignores_voids = setup.ignores_voids;
        let vm = SimVm::new(config);
        let memory = Arc::new(Memory {
            log: vm.dirty_log(),
            vm,
            vcpus: Mutex::default(),
            sizes: Mutex::default(),
            in_reset: Mutex::default(),
        });
        let hook = Arc::clone(&memory);
        memory.vm.on_reset(move |phase| hook.reset_reaches(phase));
        let mut machine = Self {
            memory,
            rings: Vec::new(),
            lives: SLOTS.map(|_| Life::Absent).into(),
            tracked: BTreeMap::new(),
            dirty: DirtyPages::new(),
            unreset: false,
            injected: 0,
            garbled: 0,
            overran: false,
            stuck: false,
            written: PageSet::new(),
            kept: PageSet::new(),
            bitmap_mode: setup.mode == Mode::Bitmap,
            copy: BTreeMap::new(),
            open: PageSet::new(),
            held: None,
            last: LastPages::new(),
        };
        if let Some(places) = setup.places {
            let terms = Some(WorkingSet::new(places));
            machine.memory.log.set_working_set(terms);
        }
        machine.step_slot(0, 100);
        machine.step_slot(1, 64);
        for _ in 0..setup.vcpus {
            machine.add_vcpu();
        }
        machine
    }

    pub fn stats(&self) -> Stats {
        self.memory.log.stats()
    }

    /// Does one thing, except `Op::Sync` and `Op::Checkpoint`, whose results are the caller's to
    /// judge.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Write(write) => self.write(write),
            Op::KernelWrite(write) => self.kernel_write(write),
            Op::Reap => self.may_fail(|log| log.reap().is_ok()),
            Op::ReapRings(rings) => {
                let wanted = [0, 1, 2, 3].map(|ring| rings >> ring & 1 == 1);
                self.may_fail(|log| log.reap_rings(&wanted).is_ok());
            }
            Op::ReapOnShard(shard) => self.may_fail(|log| log.reap_on_shard(*shard).is_ok()),
            Op::OnFull(vcpu) => self.on_full(*vcpu % self.rings.len()),
            Op::HarvestAndStop(vcpu) => {
                self.ring(*vcpu).harvest_and_stop();
                self.unreset = true;
            }
            Op::Sync | Op::Checkpoint => unreachable!("the caller's"),
            Op::Exit(vcpu) => self.vcpu(*vcpu).exit(),
            Op::SlotStep { slot, pages } => self.step_slot(*slot, *pages),
            Op::AddVcpu => self.add_vcpu(),
            Op::InReset(phase, writes) => {
                let mut in_reset = self.memory.in_reset.lock().unwrap();
                in_reset.push_back((*phase, writes.clone()));
            }
            Op::Inject(faults) => self.inject(faults),
            Op::InjectBitmap(faults) => self.inject_bitmap(faults),
            Op::Garble { vcpu, unknown_slot } => {
                let slot = if *unknown_slot { 77 } else { SLOTS[0].raw() };
                self.vcpu(*vcpu).garble_next(slot, 1 << 40);
                self.garbled += 1;
            }
            Op::Overrun(write) => {
                self.overran = true;
                let vcpu = self.vcpu(write.vcpu.unwrap());
                vcpu.ignore_soft_limit(true);
                self.write(write);
                vcpu.ignore_soft_limit(false);
            }
            Op::Rearm => self.rearm(),
            Op::WorkingSet(terms) => {
                let terms = terms.map(|(places, most)| WorkingSet::new(places).at_most(most));
                self.memory.log.set_working_set(terms);
            }
            Op::Refresh { fails } => self.refresh(*fails),
            Op::Protect(write) => self.protect(write),
            Op::LastSync => self.last_sync(),
            Op::OnDemand { chunks, span } => self.sync_on_demand(*chunks, *span),
            Op::Switch { slot, on, fails } => self.switch(*slot, *on, *fails),
        }
    }

    /// Whether every harvested entry was recycled by the reset that followed, and the log has no
    /// rings but ours.
    pub fn is_unharmed(&self) -> bool {
        let stats = self.stats();
        let resets = stats.short_resets + stats.failed_resets;
        !self.overran && !self.unreset && resets == 0 && stats.vcpus.len() == self.rings.len()
    }

    /// Onlookers see what the kernel counts: where nothing goes wrong, what is in a ring waits.
    pub fn assert_occupancy(&self) {
        let mut seen = Vec::new();
        self.memory.log.observe(&mut seen);
        let used = self.used();
        assert_eq!(seen.len(), used.len());
        for ((seen, &waiting), ring) in seen.iter().zip(&used).zip(&self.rings) {
            assert_eq!(seen.waiting, u64::from(waiting));
            assert_eq!(ring.occupancy(), waiting);
            assert!(ring.at_least(waiting) && !ring.at_least(waiting + 1));
        }
    }

    /// Entries in each ring, as the kernel counts them.
    pub fn used(&self) -> Vec<u32> {
        let vcpus = self.memory.vcpus.lock().unwrap();
        vcpus.iter().map(SimVcpu::used).collect()
    }

    fn vcpu(&self, vcpu: usize) -> SimVcpu {
        let vcpus = self.memory.vcpus.lock().unwrap();
        vcpus[vcpu % vcpus.len()].clone()
    }

    fn ring(&mut self, vcpu: usize) -> &mut VcpuRing {
        let rings = self.rings.len();
        &mut self.rings[vcpu % rings]
    }

    fn may_fail(&self, call: impl FnOnce(&DirtyLog) -> bool) {
        let done = call(&self.memory.log);
        assert!(done || self.injected > 0, "failed for no reason");
    }

    fn inject(&mut self, faults: &[ResetFault]) {
        self.injected += faults.len();
        self.memory.vm.inject(faults.iter().copied());
    }

    fn inject_bitmap(&mut self, faults: &[BitmapFault]) {
        self.injected += faults.len();
        self.memory.vm.inject_bitmap(faults.iter().copied());
    }

    fn kernel_write(&mut self, write: &Write) {
        let Some((slot, pages)) = self.memory.pages(write) else {
            return;
        };
        for page in pages {
            assert!(self.memory.vm.kernel_write(slot, page));
            self.written.entry(slot).or_default().insert(page);
        }
    }

    fn add_vcpu(&mut self) {
        if self.rings.len() < MOST_VCPUS {
            let vcpu = self.memory.vm.add_vcpu();
            let ring = self.memory.log.attach_ring(vcpu.ring_memory());
            self.rings.push(ring.unwrap());
            self.memory.vcpus.lock().unwrap().push(vcpu);
        }
    }

    fn write(&mut self, write: &Write) {
        let Some((slot, pages)) = self.memory.pages(write) else {
            return;
        };
        for page in pages {
            match write.vcpu {
                None => self.memory.device_write(slot, page),
                Some(vcpu) if !self.guest_write(vcpu % self.rings.len(), slot, page) => return,
                Some(_) => {}
            }
            self.written.entry(slot).or_default().insert(page);
            if write.vcpu.is_none() || !self.bitmap_mode {
                self.kept.entry(slot).or_default().insert(page);
            }
        }
    }

    /// As a VMM does: on a full ring, make room and enter the guest again. False if the vCPU is
    /// stuck.
    fn guest_write(&mut self, index: usize, slot: SlotId, page: u64) -> bool {
        let vcpu = self.vcpu(index);
        // Each fault, and each burst of writes inside a reset, can keep it out once more.
        let patience = 8 + self.injected + self.memory.in_reset.lock().unwrap().len();
        for _ in 0..patience {
            match vcpu.write(slot, page) {
                Ok(()) => return true,
                Err(WriteError::RingFull) => self.on_full(index),
                Err(error) => panic!("{error}"),
            }
        }
        assert!(self.overran, "vCPU {index} is kept out of the guest");
        self.stuck = true;
        false
    }

    /// A full exit, or what the VMM takes for one.
    fn on_full(&mut self, index: usize) {
        let was_full = self.used()[index] >= self.memory.vm.soft_limit();
        match self.rings[index].on_full() {
            Ok(()) => {}
            Err(FullError::Reset(_)) if self.injected > 0 => {}
            Err(FullError::Broken { vcpu }) => {
                assert!(
                    self.stats().vcpus[vcpu].broken && self.overran,
                    "vCPU {vcpu}"
                );
            }
            Err(FullError::NoRoom { .. }) => {
                assert!(
                    !was_full || self.injected > 0 || self.overran,
                    "a full ring was given no room"
                );
            }
            Err(error) => panic!("{error} for no reason"),
        }
    }

    /// Protects every slot anew, as an operator's tool would after faults.
    pub fn rearm(&self) {
        for &slot in self.tracked.keys() {
            self.memory.vm.rearm_slot(slot);
            self.memory.rearmed(slot);
        }
    }

    /// A sync, and a copy of what it reports but for members, which the guest writes on. The pages, or `None` if it
    /// failed.
    pub fn sync(&mut self) -> Option<PageSet> {
        self.sync_and_copy(false)
    }

    fn sync_and_copy(&mut self, is_last: bool) -> Option<PageSet> {
        let is_broken = self.memory.is_broken();
        if let Err(error) = self.memory.log.sync(&mut self.dirty) {
            assert!(self.injected > 0, "{error} for no reason");
            return None;
        }
        self.unreset = false;
        let reported = pages_of(&self.dirty, &self.tracked);
        let all: u64 = self.tracked.values().sum();
        assert!(
            !is_broken || self.dirty.page_count() == all,
            "a ring is broken, and not all is reported"
        );
        self.check_members(&reported);
        let copied = match is_last {
            true => reported.clone(),
            false => part_of(&self.dirty.others()),
        };
        for (slot, pages) in &copied {
            if let Some(copy) = self.copy.get_mut(slot) {
                for &page in pages {
                    copy[page as usize] = self.memory.vm.version(*slot, page).unwrap();
                }
            }
        }
        Some(reported)
    }

    /// The pages written since the last time this was asked.
    pub fn take_written(&mut self) -> PageSet {
        self.kept.clear();
        let mut written = mem::take(&mut self.written);
        written.retain(|slot, _| self.tracked.contains_key(slot));
        written
    }

    /// Stops everybody who writes, syncs, and compares the copy with the truth.
    pub fn checkpoint(&mut self) {
        self.let_go();
        let writes = mem::take(&mut *self.memory.in_reset.lock().unwrap());
        for index in 0..self.rings.len() {
            self.vcpu(index).exit();
        }
        let tries = self.injected + 1;
        let synced = (0..tries).any(|_| self.sync_and_copy(true).is_some());
        assert!(synced, "more failures than faults");
        *self.memory.in_reset.lock().unwrap() = writes;
        for (&slot, copy) in &self.copy {
            let stale: BTreeSet<usize> = (0..copy.len())
                .filter(|&page| self.memory.vm.version(slot, page as u64) != Some(copy[page]))
                .collect();
            assert!(stale.is_empty(), "slot {slot}: lost writes to {stale:?}");
        }
    }

    /// Uses up what faults and writes inside resets are still to come.
    pub fn calm_down(&mut self) {
        self.memory.in_reset.lock().unwrap().clear();
        // A removal takes a few resets, of which each fault spoils one.
        for _ in 0..4 + self.injected {
            if !self.memory.sizes.lock().unwrap().is_empty() {
                break;
            }
            self.step_slot(0, 1);
        }
        let slot = self.memory.sizes.lock().unwrap().keys().next().copied();
        let slot = slot.expect("a removal does not end");
        for _ in 0..mem::take(&mut self.garbled) {
            for index in 0..self.rings.len() {
                // So that the write is logged.
                self.rearm();
                self.guest_write(index, slot, 0);
            }
        }
        for index in 0..self.rings.len() {
            self.vcpu(index).exit();
        }
        // A ring of its own, so that the rings under test are left as they are.
        let spare = self.memory.vm.add_vcpu();
        let ring = self.memory.log.attach_ring(spare.ring_memory());
        let mut ring = ring.unwrap();
        for _ in 0..self.injected {
            // Each is at least one reset.
            let _ = ring.on_full();
        }
        self.injected = 0;
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The hook keeps the machine alive, and the machine the hook.
        self.memory.vm.on_reset(|_| ());
    }
}
