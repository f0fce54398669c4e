//! The guest of one cell.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvm_dirty_ring::{DirtyLog, RingEntries, SlotId, VcpuRing};
use kvm_ioctls::Kvm;

use super::error::LabError;
use crate::cores::Cores;
use crate::cpu_time::CpuTime;
use crate::host::available_mib;
use crate::lab::cell::Cell;
use crate::lab::rhythm::Gait;
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::program::{Load, Mode};
use crate::rate::Dormitory;
use crate::shape::full::FullExits;
use crate::thread::{Action, VcpuThread};
use crate::vcpu::Exit;
use crate::vm::TinyVm;
use crate::workload::{Region, Workload};

const SLOT: u32 = 1;
const GPA: u64 = 4 << 30;

/// A guest that runs from its making until it is dropped.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) log: DirtyLog,
    pub(super) full_exits: Arc<FullExits>,
    threads: Vec<VcpuThread>,
    dormitory: Arc<Dormitory>,
    hurry: Arc<AtomicBool>,
    running: u32,
    vm: TinyVm,
}

impl Guest {
    pub(super) fn start(kvm: &Kvm, cell: &Cell, cores: &Cores) -> Result<Self, LabError> {
        let pattern = cell.pattern;
        let share = pattern.pages_per_vcpu(cell.ring_entries);
        let region = Region {
            gpa: GPA,
            pages: share * u64::from(cell.vcpus),
        };
        let wanted = (region.pages * PAGE_SIZE) >> 20;
        if let Some(available) = available_mib().filter(|&available| available < wanted) {
            return Err(LabError::TooLarge { wanted, available });
        }
        let vm = TinyVm::with_capacity(kvm, cell.vcpus, share as usize)?;
        let log = DirtyLog::enable(vm.vm_fd(), RingEntries::new(cell.ring_entries)?)?;
        log.add_slot(SlotId::new(0, SLOT as u16), region.pages)?;
        // A fault of the host's own would look like a slow guest.
        let memory = Arc::new(GuestMemory::prefaulted(region.pages)?);
        vm.add_slot(SLOT, region.gpa, memory, true)?;

        let full_exits = Arc::new(FullExits::new(&log));
        let mut this = Self {
            log,
            full_exits,
            threads: Vec::new(),
            dormitory: Arc::default(),
            hurry: Arc::new(AtomicBool::new(true)),
            running: pattern.running(cell.vcpus),
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
            let ring = this.log.attach_vcpu(vcpu.fd())?;
            let handler = this.handler(cell, ring, start);
            let thread = VcpuThread::spawn_pinned(vcpu, cores.of_vcpu(index), handler)?;
            if index >= this.running {
                thread.request_pause();
            }
            this.threads.push(thread);
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

    /// Whether every vCPU that runs has been to all its pages, as fast as it could.
    pub(super) fn has_been_everywhere(&self) -> bool {
        let mut running = self.threads.iter().take(self.running as usize);
        running.all(|thread| thread.passes() > 0)
    }

    /// From now on vCPUs keep to their rhythm.
    pub(super) fn calm(&self) {
        self.hurry.store(false, Ordering::Relaxed);
    }

    /// Page stores of all vCPUs so far.
    pub(super) fn stores(&self) -> u64 {
        self.threads.iter().map(VcpuThread::progress).sum()
    }

    /// CPU time of all vCPUs' threads so far.
    pub(super) fn cpu(&self) -> Result<Duration, LabError> {
        let cpu = |thread: &VcpuThread| CpuTime::of(thread.tid()).read();
        let times = self.threads.iter().map(cpu);
        times.sum::<Option<Duration>>().ok_or(LabError::CpuTime)
    }

    /// Takes the guest's memory away, under its feet.
    #[cfg(test)]
    pub(super) fn sabotage(&self) -> Result<(), LabError> {
        self.vm.remove_slot(SLOT).map_err(LabError::Vm)
    }

    /// Whether a vCPU's thread has ended, which none does by itself.
    pub(super) fn has_ended(&self) -> bool {
        self.threads.iter().any(VcpuThread::ended)
    }

    /// What has ended one.
    pub(super) fn why_ended(&mut self) -> LabError {
        let ended = self.threads.iter().position(VcpuThread::ended);
        let result = ended.map(|ended| self.threads.swap_remove(ended).join());
        match result {
            Some(Err(error)) => error.into(),
            _ => LabError::Ended,
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Its threads are stopped one by one as they drop, each when it is awake.
        self.dormitory.wake();
    }
}
