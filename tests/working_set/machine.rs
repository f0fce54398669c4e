// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One vCPU and two slots.

use std::io;

use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::sim::{SimConfig, SimVcpu, SimVm};
use kvm_dirty_ring::{
    DirtyLog, DirtyPages, DirtyPart, Kernel, LastPages, Mode, SlotId, Stats, VcpuRing, WorkingSet,
    WorkingSetStats,
};

pub const RAM: SlotId = SlotId::new(0, 0);
pub const RAM_PAGES: u64 = 300;
pub const ROM: SlotId = SlotId::new(1, 2);
pub const ROM_PAGES: u64 = 70;

pub const NONE: Vec<u64> = Vec::new();

pub struct Machine {
    pub vm: SimVm,
    pub log: DirtyLog,
    pub vcpu: SimVcpu,
    pub dirty: DirtyPages,
    _ring: Option<VcpuRing>,
}

impl Machine {
    pub fn new(change: impl FnOnce(&mut SimConfig)) -> Self {
        Self::with_slots(change, [(RAM, RAM_PAGES), (ROM, ROM_PAGES)])
    }

    pub fn with_slots<const N: usize>(
        change: impl FnOnce(&mut SimConfig),
        slots: [(SlotId, u64); N],
    ) -> Self {
        let mut config = SimConfig::default();
        change(&mut config);
        let with_rings = config.mode == Mode::Rings;
        let vm = SimVm::new(config);
        let log = vm.dirty_log();
        for (slot, pages) in slots {
            log.add_slot(slot, pages).unwrap();
            vm.create_slot(slot, pages);
        }
        let vcpu = vm.add_vcpu();
        let ring = with_rings.then(|| log.attach_ring(vcpu.ring_memory()).unwrap());
        Self {
            vm,
            log,
            vcpu,
            dirty: DirtyPages::new(),
            _ring: ring,
        }
    }

    /// With a ring of 64 entries, 4 of them in reserve, and so many free places.
    pub fn with_rings(places: u64) -> Self {
        let machine = Self::new(|config| {
            config.ring_entries = 64;
            config.reserved = 4;
        });
        machine.set_places(places);
        machine
    }

    /// With a bitmap and no free places.
    pub fn with_bitmap(manual_protect: bool) -> Self {
        let machine = Self::new(|config| {
            config.mode = Mode::Bitmap;
            config.manual_protect = manual_protect;
        });
        machine.set_places(0);
        machine
    }

    /// With a bitmap, in which these pages of `RAM` are members.
    pub fn with_members(pages: impl IntoIterator<Item = u64> + Clone) -> Self {
        let mut machine = Self::with_bitmap(true);
        for _ in 0..2 {
            machine.write(pages.clone());
            machine.sync();
        }
        let joined = pages.into_iter().count() as u64;
        assert_eq!(machine.set().members, joined, "they have not joined");
        machine
    }

    pub fn set_places(&self, places: u64) {
        self.log.set_working_set(Some(WorkingSet::new(places)));
    }

    /// Writes pages of `RAM`.
    pub fn write(&self, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            self.vcpu.write(RAM, page).unwrap();
        }
    }

    /// The members and the others that a sync reports.
    pub fn sync(&mut self) -> (Vec<u64>, Vec<u64>) {
        self.log.sync(&mut self.dirty).unwrap();
        self.found()
    }

    /// The members and the others that are in `dirty`.
    pub fn found(&self) -> (Vec<u64>, Vec<u64>) {
        let (members, others) = (pages(self.dirty.members()), pages(self.dirty.others()));
        let count = (members.len() + others.len()) as u64;
        assert_eq!(self.dirty.page_count(), count, "counted twice");
        (members, others)
    }

    /// The pages that a last sync reports.
    pub fn last_sync(&self) -> Vec<u64> {
        let mut last = LastPages::new();
        self.log.last_sync(&mut last).unwrap();
        pages(last.part())
    }

    /// Closes all members. How many slots were refreshed.
    pub fn refresh(&self) -> usize {
        self.log.refresh(|slot| self.protect(slot)).unwrap()
    }

    pub fn protect(&self, slot: SlotId) -> io::Result<()> {
        self.vm.rearm_slot(slot);
        Ok(())
    }

    /// Stops the tracking of `RAM`, or starts it.
    pub fn track(&self, on: bool) {
        let switch = || {
            self.vm.set_logged(RAM, on);
            Ok(())
        };
        let switched: Result<(), SlotError> = match on {
            true => self.log.start_tracking(RAM, switch),
            false => self.log.stop_tracking(RAM, switch),
        };
        switched.unwrap();
    }

    /// Removes `RAM` and adds a slot of `pages` pages with its id.
    pub fn replace_ram(&self, pages: u64) {
        let retired = self.log.retire_slot(RAM).unwrap();
        self.vm.delete_slot(RAM);
        self.log.finish_slot(&retired).unwrap();
        self.log.add_slot(RAM, pages).unwrap();
        self.vm.create_slot(RAM, pages);
    }

    pub fn stats(&self) -> Stats {
        self.log.stats()
    }

    pub fn set(&self) -> WorkingSetStats {
        self.stats().working_set
    }

    /// The pages of `RAM` whose bits the kernel has.
    pub fn kernel_bits(&self) -> Vec<u64> {
        let mut words = [0; 5];
        self.vm.read_bitmap(RAM, RAM_PAGES, &mut words).unwrap();
        let is_set = |page: &u64| words[(page / 64) as usize] >> (page % 64) & 1 == 1;
        (0..RAM_PAGES).filter(is_set).collect()
    }
}

/// The pages of a part, slot by slot.
pub fn pages(part: DirtyPart<'_>) -> Vec<u64> {
    let pages = |run: kvm_dirty_ring::Run| run.first_page..run.first_page + run.pages;
    part.runs().flat_map(pages).collect()
}

/// All pages of `RAM` except these.
pub fn all_but(pages: &[u64]) -> Vec<u64> {
    (0..RAM_PAGES)
        .filter(|page| !pages.contains(page))
        .collect()
}
