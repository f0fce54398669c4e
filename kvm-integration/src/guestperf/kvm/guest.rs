// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest under memory stress: its vCPUs have a share each, and never rest.

use std::sync::Arc;

use anyhow::{Context, Result};
use kvm_dirty_ring::{DirtyLog, RingEntries, SlotId, VcpuRing};
use kvm_ioctls::Kvm;

use crate::guest::memory::GuestMemory;
use crate::guest::program::Exit;
use crate::guest::stress::{RANDOM_WORDS, Stress};
use crate::guest::thread::{Action, VcpuThread};
use crate::guest::vcpu::Progress;
use crate::guest::vm::TinyVm;
use crate::guest::workload::Region;
use crate::guestperf::cell::Cell;
use crate::host::cores::Cores;
use crate::machine::vcpus::Vcpus;
use crate::machine::{Guest, GuestSlot};
use crate::reaping::full_exit::FullExits;

const SLOT: u32 = 1;
const GPA: u64 = 4 << 30;

/// How the guest's writes are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Logging {
    /// Into the cell's rings.
    Rings,
    /// Into bitmaps that the crate's log reads.
    Bitmap,
    /// Into bitmaps, by no log.
    Plain,
}

/// A guest that is paused at first.
#[derive(Debug)]
pub(super) struct StressedGuest {
    pub(super) vm: Arc<TinyVm>,
    /// Of its dirty log, if it has one.
    pub(super) full_exits: Option<Arc<FullExits>>,
    slots: Vec<GuestSlot>,
    pub(super) vcpus: Vcpus,
    /// Ticks a second of the counter that the vCPUs measure gaps with.
    pub(super) clock_hz: f64,
}

impl StressedGuest {
    /// Makes it, to be logged like that, on memory that other guests may have, too,
    /// while this one is paused. Nothing is logged yet.
    pub(super) fn new(
        kvm: &Kvm,
        cell: &Cell,
        memory: &Arc<GuestMemory>,
        logging: Logging,
        cores: &Cores,
    ) -> Result<Self> {
        let slot = GuestSlot {
            id: SlotId::new(0, SLOT as u16),
            region: Region {
                gpa: GPA,
                pages: memory.pages(),
            },
            memory: Arc::clone(memory),
        };
        let vm = TinyVm::with_capacity(kvm, cell.vcpus, RANDOM_WORDS)?;
        let entries = RingEntries::new(cell.ring_entries)?;
        let log = match logging {
            Logging::Rings => Some(DirtyLog::enable(vm.vm_fd(), entries)?),
            Logging::Bitmap => Some(DirtyLog::enable_bitmap(vm.vm_fd())?),
            Logging::Plain => None,
        };
        if let Some(log) = &log {
            log.add_slot(slot.id, memory.pages())?;
        }
        vm.add_slot(SLOT, GPA, Arc::clone(memory), false)?;
        let mut this = Self {
            vm: Arc::new(vm),
            full_exits: log.as_ref().map(|log| Arc::new(FullExits::new(log))),
            slots: vec![slot],
            vcpus: Vcpus::default(),
            clock_hz: 0.0,
        };
        for index in 0..cell.vcpus {
            let stress = Stress {
                share: cell.share(index, GPA),
                seed: u64::from(index) + 1,
            };
            let vcpu = this.vm.create_stressed_vcpu(index, &stress)?;
            this.clock_hz = vcpu.clock_hz()?;
            let ring = log.as_ref().map(|log| log.attach_vcpu(vcpu.fd()));
            let handler = this.handler(ring.transpose()?);
            let thread = VcpuThread::spawn_pinned(vcpu, cores.of_vcpu(index), handler)?;
            thread.request_pause();
            this.vcpus.0.push(thread);
        }
        this.pause()?;
        Ok(this)
    }

    /// What a vCPU's thread does when the guest leaves.
    fn handler(&self, mut ring: Option<VcpuRing>) -> impl FnMut(Exit) -> Action + Send + 'static {
        let full_exits = self.full_exits.clone();
        move |exit| match (exit, &mut ring, &full_exits) {
            (Exit::RingFull, Some(ring), Some(full_exits)) => match full_exits.serve(ring) {
                Ok(()) => Action::Continue,
                Err(error) => Action::Fail(error),
            },
            _ => Action::Fail(format!("a guest without cause for it left with {exit:?}").into()),
        }
    }

    /// Starts or stops dirty logging.
    pub(super) fn set_logged(&self, logged: bool) -> Result<()> {
        let set = self.vm.set_logged(SLOT, logged);
        set.context("KVM refused")
    }

    /// Nothing is logged any more: what has stayed open is forgotten, so that the next migration begins as
    /// the first one did.
    pub(super) fn forget_what_is_open(&self) -> Result<()> {
        let Some(full_exits) = &self.full_exits else {
            return Ok(());
        };
        let log = full_exits.log();
        log.set_working_set(None);
        for slot in &self.slots {
            log.stop_tracking(slot.id, || Ok(()))?;
            // The next sync reports all of it: that is the one which sends all in any case.
            log.start_tracking(slot.id, || Ok(()))?;
        }
        Ok(())
    }

    /// How far each vCPU is.
    pub(super) fn progress(&self) -> Vec<Progress> {
        let progress = self.vcpus.0.iter().map(VcpuThread::progress_reader);
        progress.collect()
    }
}

impl Guest for StressedGuest {
    fn slots(&self) -> &[GuestSlot] {
        &self.slots
    }

    fn stores(&self) -> u64 {
        self.vcpus.stores()
    }

    fn check(&mut self) -> Result<()> {
        self.vcpus.check()
    }

    fn pause(&mut self) -> Result<()> {
        self.vcpus.pause()
    }

    fn resume(&mut self) {
        self.vcpus.resume();
    }

    fn protect(&mut self, slot: SlotId) -> Result<()> {
        Ok(self.vm.protect(slot.raw())?)
    }
}
