// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest of one cell.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kvm_dirty_ring::{DirtyLog, RingEntries, SlotId, VcpuRing};
use kvm_ioctls::Kvm;

use crate::guest::memory::{GuestMemory, PAGE_SIZE};
use crate::guest::program::Exit;
use crate::guest::program::{Load, Mode};
use crate::guest::thread::{Action, VcpuThread};
use crate::guest::vm::TinyVm;
use crate::guest::workload::{Region, Workload};
use crate::host::check_available;
use crate::host::cores::Cores;
use crate::host::cpu_time::cpu_time;
use crate::lab::cell::Cell;
use crate::lab::rhythm::Gait;
use crate::machine::rate::Dormitory;
use crate::machine::vcpus::Vcpus;
use crate::reaping::full_exit::FullExits;

const SLOT: u32 = 1;
const GPA: u64 = 4 << 30;
/// How long a guest may take to touch all its pages; slower ones are measured as they are.
const LONGEST_TOUR: Duration = Duration::from_secs(20);

/// A guest that runs from its making until it is dropped.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) full_exits: Arc<FullExits>,
    pub(super) vcpus: Vcpus,
    dormitory: Arc<Dormitory>,
    hurry: Arc<AtomicBool>,
    pub(super) vm: TinyVm,
}

impl Guest {
    pub(super) fn start(kvm: &Kvm, cell: &Cell, cores: &Cores) -> Result<Self> {
        let pattern = cell.pattern;
        let share = pattern.pages_per_vcpu(cell.ring_entries);
        let region = Region {
            gpa: GPA,
            pages: share * u64::from(cell.vcpus),
        };
        check_available("the guest takes", (region.pages * PAGE_SIZE) >> 20)?;
        let vm = TinyVm::with_capacity(kvm, cell.vcpus, share as usize)?;
        let log = DirtyLog::enable(vm.vm_fd(), RingEntries::new(cell.ring_entries)?)?;
        log.add_slot(SlotId::new(0, SLOT as u16), region.pages)?;
        // A fault of the host's own would look like a slow guest.
        let memory = GuestMemory::prefaulted(region.pages);
        let memory =
            memory.context("no memory for the guest: take fewer vCPUs or smaller rings")?;
        vm.add_slot(SLOT, region.gpa, Arc::new(memory), true)?;

        let mut this = Self {
            full_exits: Arc::new(FullExits::new(&log)),
            vcpus: Vcpus::default(),
            dormitory: Arc::default(),
            hurry: Arc::new(AtomicBool::new(true)),
            vm,
        };
        let mode = match pattern.is_emulated() {
            true => Mode::Emulated,
            false => Mode::Native,
        };
        let start = Instant::now();
        for index in 0..cell.vcpus {
            let list = Workload::Walk.addresses(0, index, cell.vcpus, &[region], share as usize);
            let load = Load::new(mode, list).chunk(pattern.chunk());
            let vcpu = this.vm.create_vcpu(index, &load)?;
            let handler = this.handler(cell, log.attach_vcpu(vcpu.fd())?, start);
            let thread = VcpuThread::spawn_pinned(vcpu, cores.of_vcpu(index), handler)?;
            if index >= pattern.running(cell.vcpus) {
                thread.request_pause();
            }
            this.vcpus.0.push(thread);
        }
        Ok(this)
    }

    /// What a vCPU's thread does when the guest leaves.
    fn handler(
        &self,
        cell: &Cell,
        mut ring: VcpuRing,
        start: Instant,
    ) -> impl FnMut(Exit) -> Action + Send + 'static {
        let full_exits = Arc::clone(&self.full_exits);
        let dormitory = Arc::clone(&self.dormitory);
        let hurry = Arc::clone(&self.hurry);
        let chunk = cell.pattern.chunk();
        let mut gait = Gait::new(cell.pattern.rhythm());
        move |exit| {
            match exit {
                Exit::RingFull => {
                    if let Err(error) = full_exits.serve(&mut ring) {
                        return Action::Fail(error);
                    }
                }
                Exit::Chunk if hurry.load(Ordering::Relaxed) => {}
                Exit::Chunk => {
                    if let Some(until) = gait.step(start.elapsed(), chunk) {
                        dormitory.sleep_until(start + until);
                    }
                }
                Exit::PassDone | Exit::Kicked => {}
            }
            Action::Continue
        }
    }

    /// Waits until every vCPU that runs has been to all its pages, as fast as it could; from then on
    /// they keep to their rhythm. How long it took.
    pub(super) fn tour(&mut self, cell: &Cell, interrupted: &AtomicBool) -> Result<Duration> {
        let running = cell.pattern.running(cell.vcpus) as usize;
        let been_everywhere = |vcpus: &[VcpuThread]| {
            let mut running = vcpus.iter().take(running);
            running.all(|thread| thread.passes() > 0)
        };
        let start = Instant::now();
        self.vcpus
            .watch_until(start + LONGEST_TOUR, interrupted, been_everywhere)?;
        self.hurry.store(false, Ordering::Relaxed);
        Ok(start.elapsed())
    }

    /// CPU time of all vCPUs' threads so far.
    pub(super) fn cpu(&self) -> Result<Duration> {
        let tids = self.vcpus.0.iter().map(VcpuThread::tid);
        tids.map(cpu_time).sum()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Its threads are stopped one by one as they drop, each when it is awake.
        self.dormitory.wake();
    }
}
