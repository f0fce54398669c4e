//! A guest under memory stress: its vCPUs have a share each, and never rest.

use std::sync::Arc;

use kvm_dirty_ring::{DirtyLog, RingEntries, SlotId, VcpuRing};
use kvm_ioctls::Kvm;

use super::error::GuestperfError;
use crate::cores::Cores;
use crate::guestperf::cell::Cell;
use crate::machine::{Guest, GuestSlot, MachineError};
use crate::memory::GuestMemory;
use crate::shape::full::FullExits;
use crate::stress::{RANDOM_WORDS, Stress};
use crate::thread::{Action, VcpuThread, pause_all};
use crate::vcpu::{Exit, Progress};
use crate::vm::TinyVm;
use crate::workload::Region;

const SLOT: u32 = 1;
const GPA: u64 = 4 << 30;

/// A guest that is paused at first.
#[derive(Debug)]
pub(super) struct StressedGuest {
    pub(super) vm: Arc<TinyVm>,
    pub(super) rings: Option<Rings>,
    slots: Vec<GuestSlot>,
    threads: Vec<VcpuThread>,
    /// Ticks a second of the counter that the vCPUs measure gaps with.
    pub(super) tsc_hz: f64,
}

/// Its dirty rings.
#[derive(Debug)]
pub(super) struct Rings {
    pub(super) log: DirtyLog,
    pub(super) full_exits: Arc<FullExits>,
}

impl StressedGuest {
    /// Makes it, with the cell's rings or without any, on memory that other guests may have, too,
    /// while this one is paused. Nothing is logged yet.
    pub(super) fn new(
        kvm: &Kvm,
        cell: &Cell,
        memory: &Arc<GuestMemory>,
        with_rings: bool,
        cores: &Cores,
    ) -> Result<Self, GuestperfError> {
        let vm = TinyVm::with_capacity(kvm, cell.vcpus, RANDOM_WORDS)?;
        let id = SlotId::new(0, SLOT as u16);
        let rings = if with_rings {
            let log = DirtyLog::enable(vm.vm_fd(), RingEntries::new(cell.ring_entries)?)?;
            log.add_slot(id, memory.pages())?;
            let full_exits = Arc::new(FullExits::new(&log));
            Some(Rings { log, full_exits })
        } else {
            None
        };
        vm.add_slot(SLOT, GPA, Arc::clone(memory), false)?;
        let region = Region {
            gpa: GPA,
            pages: memory.pages(),
        };
        let slot = GuestSlot {
            id,
            region,
            memory: Arc::clone(memory),
        };
        let mut this = Self {
            vm: Arc::new(vm),
            rings,
            slots: vec![slot],
            threads: Vec::new(),
            tsc_hz: 0.0,
        };
        for index in 0..cell.vcpus {
            let stress = Stress {
                share: cell.share(index, GPA),
                seed: u64::from(index) + 1,
            };
            let vcpu = this.vm.create_stressed_vcpu(index, &stress)?;
            this.tsc_hz = vcpu.tsc_hz()?;
            let ring = match &this.rings {
                Some(rings) => Some(rings.log.attach_vcpu(vcpu.fd())?),
                None => None,
            };
            let handler = this.handler(ring);
            let thread = VcpuThread::spawn_pinned(vcpu, cores.of_vcpu(index), handler);
            let thread = thread.map_err(MachineError::from)?;
            thread.request_pause();
            this.threads.push(thread);
        }
        this.pause()?;
        Ok(this)
    }

    /// What a vCPU's thread does when the guest leaves.
    fn handler(&self, mut ring: Option<VcpuRing>) -> impl FnMut(Exit) -> Action + Send + 'static {
        let full_exits = self
            .rings
            .as_ref()
            .map(|rings| Arc::clone(&rings.full_exits));
        move |exit| match (exit, &mut ring, &full_exits) {
            (Exit::RingFull, Some(ring), Some(full_exits)) => match full_exits.serve(ring) {
                Ok(()) => Action::Continue,
                Err(error) => Action::Fail(error),
            },
            _ => Action::Fail(format!("a guest without cause for it left with {exit:?}").into()),
        }
    }

    /// Starts or stops dirty logging.
    pub(super) fn set_logged(&self, logged: bool) -> Result<(), GuestperfError> {
        Ok(self.vm.set_logged(SLOT, logged)?)
    }

    /// How far each vCPU is.
    pub(super) fn progress(&self) -> Vec<Progress> {
        let progress = self.threads.iter().map(VcpuThread::progress_reader);
        progress.collect()
    }

    /// Passes over its share of the vCPU that has done the fewest.
    pub(super) fn passes(&self) -> u64 {
        let passes = self.threads.iter().map(VcpuThread::passes);
        passes.min().unwrap_or(0)
    }
}

impl Guest for StressedGuest {
    fn slots(&self) -> &[GuestSlot] {
        &self.slots
    }

    fn stores(&self) -> u64 {
        self.threads.iter().map(VcpuThread::progress).sum()
    }

    fn check(&mut self) -> Result<(), MachineError> {
        match self.threads.iter().position(VcpuThread::ended) {
            None => Ok(()),
            Some(ended) => {
                self.threads.swap_remove(ended).join()?;
                Err(MachineError::Ended)
            }
        }
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        match pause_all(&self.threads) {
            true => Ok(()),
            false => self.check().and(Err(MachineError::Ended)),
        }
    }

    fn resume(&mut self) {
        self.threads.iter().for_each(VcpuThread::resume);
    }

    fn protect(&mut self, slot: SlotId) -> Result<(), MachineError> {
        Ok(self.vm.protect(slot.raw())?)
    }
}
