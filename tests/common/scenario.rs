// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A machine for scenarios: one vCPU with a small ring, two slots.

use kvm_dirty_ring::sim::{SimConfig, SimVcpu, SimVm};
use kvm_dirty_ring::{DirtyLog, DirtyPages, Run, SlotId, VcpuRing};

pub const RAM: SlotId = SlotId::new(0, 0);
pub const ROM: SlotId = SlotId::new(1, 2);
pub const ALL_RAM: Run = run(RAM, 0, 300);
pub const ALL_ROM: Run = run(ROM, 0, 70);

pub const fn run(slot: SlotId, first_page: u64, pages: u64) -> Run {
    Run {
        slot,
        first_page,
        pages,
    }
}

/// One vCPU with a ring of 64 entries, 4 of them in reserve; two slots.
pub struct Machine {
    pub vm: SimVm,
    pub log: DirtyLog,
    pub vcpu: SimVcpu,
    pub ring: VcpuRing,
    pub dirty: DirtyPages,
}

impl Machine {
    pub fn new() -> Self {
        let mut config = SimConfig::default();
        config.ring_entries = 64;
        config.reserved = 4;
        let vm = SimVm::new(config);
        let log = vm.dirty_log();
        for all in [ALL_RAM, ALL_ROM] {
            log.add_slot(all.slot, all.pages).unwrap();
            vm.create_slot(all.slot, all.pages);
        }
        let vcpu = vm.add_vcpu();
        let ring = log.attach_ring(vcpu.ring_memory()).unwrap();
        Self {
            vm,
            log,
            vcpu,
            ring,
            dirty: DirtyPages::new(),
        }
    }

    pub fn write(&self, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            self.vcpu.write(RAM, page).unwrap();
        }
    }

    pub fn sync(&mut self) -> Vec<Run> {
        self.log.sync(&mut self.dirty).unwrap();
        self.dirty.runs().collect()
    }

    pub fn rearm(&self) {
        for slot in [RAM, ROM] {
            self.vm.rearm_slot(slot);
            self.log.rearmed(slot).unwrap();
        }
    }
}
