// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tiny guest on KVM.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use kvm_dirty_ring::{Awake, DirtyLog, RingEntries, SlotId, VcpuRing};
use kvm_ioctls::Kvm;

use super::rate::{Dormitory, Throttle};
use super::vcpus::Vcpus;
use super::{Guest, GuestSlot, Kick, Machine, Setup, Writes, regions, unattached};
use crate::guest::program::Exit;
use crate::guest::program::{Load, Mode};
use crate::guest::thread::{Action, VcpuThread};
use crate::guest::vm::TinyVm;
use crate::host::cpu_time::cpu_time;

/// How KVM is to log what the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logging {
    /// Into rings.
    Rings,
    /// Into bitmaps.
    Bitmap,
    /// Into rings, or bitmaps where KVM has none.
    Auto,
}

/// A guest on KVM, at privilege level 3: run natively everywhere.
pub struct KvmMachine {
    vm: TinyVm,
    log: DirtyLog,
    slots: Vec<GuestSlot>,
    vcpus: Vcpus,
    dormitory: Arc<Dormitory>,
    /// While it is wanted out of the guest.
    awake: Option<Awake>,
}

impl KvmMachine {
    /// Makes it and lets it run.
    pub fn start(kvm: &Kvm, setup: &Setup, logging: Logging) -> Result<Self> {
        Self::with(
            kvm,
            logging,
            setup.ring_entries,
            setup.pages,
            setup.writes(),
        )
    }

    /// The same with a vCPU for each of `writes`, and so many pages.
    pub fn with(
        kvm: &Kvm,
        logging: Logging,
        ring_entries: RingEntries,
        pages: u64,
        writes: Vec<Writes>,
    ) -> Result<Self> {
        let longest = writes.iter().map(|writes| writes.list.len()).max();
        let vm = TinyVm::with_capacity(kvm, writes.len() as u32, longest.unwrap_or(0))?;
        let log = match logging {
            Logging::Rings => DirtyLog::enable(vm.vm_fd(), ring_entries),
            Logging::Bitmap => DirtyLog::enable_bitmap(vm.vm_fd()),
            Logging::Auto => DirtyLog::enable_auto(vm.vm_fd(), ring_entries),
        };
        let mut this = Self {
            vm,
            log: log.context("the dirty log could not be enabled")?,
            slots: Vec::new(),
            vcpus: Vcpus::default(),
            dormitory: Arc::default(),
            awake: None,
        };
        for (id, region) in regions(pages) {
            let slot = GuestSlot::new(id, region)?;
            // Before KVM has it, so that no entry can name a slot which the log doesn't know.
            this.log.add_slot(id, region.pages)?;
            let memory = Arc::clone(&slot.memory);
            this.vm.add_slot(id.raw(), region.gpa, memory, true)?;
            this.slots.push(slot);
        }
        let mut vcpus = Vec::new();
        for (index, writes) in (0..).zip(writes) {
            let (chunk, per_second) = (writes.chunk(), writes.per_second);
            let load = Load::new(Mode::Native, writes.list).chunk(chunk);
            let vcpu = this.vm.create_vcpu(index, &load)?;
            let ring = this.log.attach_vcpu(vcpu.fd());
            let ring = ring.with_context(|| unattached(index))?;
            vcpus.push((vcpu, ring, per_second, chunk));
        }
        for (vcpu, ring, per_second, chunk) in vcpus {
            let throttle = Throttle::new(per_second, &this.dormitory);
            let thread = VcpuThread::spawn(vcpu, handler(ring, throttle, chunk.into()))?;
            this.vcpus.0.push(thread);
        }
        Ok(this)
    }

    /// Starts or stops the log of all slots, while the guest runs.
    pub fn set_tracked(&self, tracked: bool) -> Result<()> {
        for slot in &self.slots {
            let switch = || {
                let set = self.vm.set_logged(slot.id.raw(), tracked);
                set.map_err(io::Error::other)
            };
            match tracked {
                true => self.log.start_tracking(slot.id, switch)?,
                false => self.log.stop_tracking(slot.id, switch)?,
            }
        }
        Ok(())
    }

    /// Page stores of a vCPU so far, and CPU time of its thread.
    pub fn progress(&self, vcpu: usize) -> Result<(u64, Duration)> {
        let thread = &self.vcpus.0[vcpu];
        Ok((thread.progress(), cpu_time(thread.tid())?))
    }
}

/// What a vCPU's thread does when the guest leaves.
fn handler(
    mut ring: VcpuRing,
    mut throttle: Throttle,
    chunk: u64,
) -> impl FnMut(Exit) -> Action + Send + 'static {
    move |exit| {
        match exit {
            Exit::RingFull => {
                if let Err(error) = ring.on_full() {
                    return Action::Fail(Box::new(error));
                }
            }
            Exit::Chunk => throttle.pay(chunk),
            Exit::Kicked => {
                ring.throttle();
            }
            Exit::PassDone => {}
        }
        Action::Continue
    }
}

impl Machine for KvmMachine {
    fn log(&self) -> &DirtyLog {
        &self.log
    }

    fn kick(&self) -> Kick {
        let kickers: Vec<_> = self.vcpus.0.iter().map(VcpuThread::kicker).collect();
        Box::new(move |vcpu| kickers[vcpu].kick())
    }
}

impl Guest for KvmMachine {
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
        // A vCPU that sleeps is out of the guest, and its thread parks once it has woken.
        self.dormitory.wake();
        self.awake = Some(self.log.keep_awake());
        self.vcpus.pause()
    }

    fn resume(&mut self) {
        self.dormitory.calm();
        self.awake = None;
        self.vcpus.resume();
    }

    fn protect(&mut self, slot: SlotId) -> Result<()> {
        Ok(self.vm.protect(slot.raw())?)
    }
}

impl Drop for KvmMachine {
    fn drop(&mut self) {
        // Threads are stopped one by one as they drop, each when it is awake.
        self.dormitory.wake();
        self.awake = Some(self.log.keep_awake());
        self.vcpus.0.clear();
    }
}
