// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tiny guest on KVM, tormented.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kvm_dirty_ring::error::{EnableError, FullError, RingSizeError};
use kvm_dirty_ring::sim::ResetFault;
use kvm_dirty_ring::{DirtyLog, Mode, RingEntries, SlotId, VcpuRing};
use kvm_ioctls::Kvm;

use super::fault::{Counts, Fault};
use super::helpers::nap;
use super::ledger::{Instance, gpa};
use super::plan::Kind;
use super::world::{CHUNK, Job, LONGEST_LIST, Vcpu, World};
use kvm_integration::guest::program::Exit;
use kvm_integration::guest::program::{self, Load};
use kvm_integration::guest::thread::{Action, VcpuThread};
use kvm_integration::guest::vm::TinyVm;
use kvm_integration::host::refusal::refusing;
use kvm_integration::host::storm::Storm;

/// How long this process is stopped over and over in the hope for a short reset.
const LONGEST_STORM: Duration = Duration::from_millis(200);

/// Full exits in a row whose reset fails, at the most: none of those that are refused does so again.
const MOST_FAILURES: u32 = 1000;

/// Passes of which one is to be refused its reset, at the most.
const MOST_PASSES: u32 = 100;

/// A machine on KVM.
pub struct KvmWorld {
    vm: TinyVm,
    log: DirtyLog,
}

impl KvmWorld {
    /// One for so many vCPUs in all. Where the host needs larger rings, they are larger.
    pub fn new(kvm: &Kvm, mode: Mode, vcpus: u32, ring_entries: u32) -> Result<Self> {
        let vm = TinyVm::with_capacity(kvm, vcpus, LONGEST_LIST)?;
        let enable = |entries| {
            let entries = RingEntries::new(entries).map_err(EnableError::from)?;
            DirtyLog::enable(vm.vm_fd(), entries)
        };
        let rings = || match enable(ring_entries) {
            Err(EnableError::RingSize(RingSizeError::TooSmall { min, .. })) => enable(min),
            log => log,
        };
        let log = match mode {
            Mode::Bitmap => DirtyLog::enable_bitmap(vm.vm_fd()),
            _ => rings(),
        };
        let log = log?;
        Ok(Self { vm, log })
    }

    /// Makes passes until the reset of one is refused, with error number `error`.
    fn refuse_a_reset(&self, error: i32) -> Result<()> {
        let passes = || {
            // A pass over empty rings makes no ioctl.
            for _ in 0..MOST_PASSES {
                if self.log.reap().is_err() {
                    break;
                }
                nap(100);
            }
        };
        refusing(error, passes).context("no reset could be refused: no filter of system calls?")
    }

    /// Makes passes until the reset of one falls short, or enough.
    fn shorten_a_reset(&self) {
        if !Storm::can_stop() {
            return;
        }
        let short_resets = || self.log.stats().short_resets;
        let before = short_resets();
        let storm = Storm::of_stops();
        let start = Instant::now();
        while short_resets() == before && start.elapsed() < LONGEST_STORM {
            // It fails beside one that is refused.
            let _ = self.log.reap();
            nap(100);
        }
        drop(storm);
    }
}

impl World for KvmWorld {
    fn log(&self) -> &DirtyLog {
        &self.log
    }

    fn add_slot(&self, slot: &Arc<Instance>) -> Result<()> {
        let memory = Arc::clone(&slot.memory);
        let added = self.vm.add_slot(slot.id.raw(), gpa(slot.id), memory, true);
        Ok(added?)
    }

    fn remove_slot(&self, id: SlotId) -> Result<()> {
        Ok(self.vm.remove_slot(id.raw())?)
    }

    fn rearm_slot(&self, id: SlotId) -> Result<()> {
        Ok(self.vm.protect(id.raw())?)
    }

    fn inject(&self, fault: ResetFault) -> Result<()> {
        match fault {
            ResetFault::Error(number) => self.refuse_a_reset(number)?,
            ResetFault::Short { .. } | ResetFault::AtEnd => self.shorten_a_reset(),
            _ => {}
        }
        Ok(())
    }

    fn start_vcpu(&self, job: Job) -> Result<Box<dyn Vcpu>> {
        let index = job.index;
        let (mode, chunk) = match job.kind {
            Kind::Native => (program::Mode::Native, 0),
            Kind::Emulated => (program::Mode::Emulated, CHUNK),
            Kind::Careless => (program::Mode::Emulated, 0),
        };
        let load = Load::new(mode, job.list).chunk(chunk);
        let vcpu = self.vm.create_vcpu(index, &load)?;
        let ring = self.log.attach_vcpu(vcpu.fd());
        let ring =
            ring.with_context(|| format!("the ring of vCPU {index} could not be attached"))?;
        let handler = handler(ring, job.abandons, job.counts);
        Ok(Box::new(VcpuThread::spawn(vcpu, handler)?))
    }
}

/// What a vCPU's thread does when the guest leaves.
fn handler(
    mut ring: VcpuRing,
    abandons: u64,
    counts: Arc<Counts>,
) -> impl FnMut(Exit) -> Action + Send + 'static {
    let (mut full_exits, mut failures) = (0, 0);
    move |exit| {
        if exit == Exit::RingFull {
            if abandons > 0 && full_exits % abandons == 0 && ring.harvest_and_stop() > 0 {
                counts.add(Fault::PassesAbandoned);
            }
            full_exits += 1;
            match ring.on_full() {
                Ok(()) => failures = 0,
                // It has no way back into the guest, which the episode goes on without.
                Err(FullError::Broken { .. }) => return Action::StayOut,
                // The next exit tries again, and comes at once.
                Err(_) if failures < MOST_FAILURES => {
                    failures += 1;
                    thread::yield_now();
                }
                Err(error) => return Action::Fail(Box::new(error)),
            }
        }
        Action::Continue
    }
}

impl Vcpu for VcpuThread {
    fn request_pause(&self) {
        VcpuThread::request_pause(self);
    }

    fn wait_paused(&self) -> bool {
        VcpuThread::wait_paused(self)
    }

    fn resume(&self) {
        VcpuThread::resume(self);
    }

    fn tid(&self) -> libc::pid_t {
        VcpuThread::tid(self)
    }

    fn stop(self: Box<Self>) -> Result<()> {
        drop(VcpuThread::stop(*self)?);
        Ok(())
    }
}
