//! The tiny guest on KVM.

use std::sync::Arc;

use anyhow::{Context, Result};
use kvm_dirty_ring::{Awake, DirtyLog, SlotId, VcpuRing};
use kvm_ioctls::Kvm;

use super::rate::{Dormitory, Throttle};
use super::vcpus::Vcpus;
use super::{Guest, GuestSlot, Kick, Machine, Setup, unattached};
use crate::guest::program::Exit;
use crate::guest::program::{Load, Mode};
use crate::guest::thread::{Action, VcpuThread};
use crate::guest::vm::TinyVm;

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
        let vm = TinyVm::with_capacity(kvm, setup.vcpus, setup.list_length())?;
        let log = match logging {
            Logging::Rings => DirtyLog::enable(vm.vm_fd(), setup.ring_entries),
            Logging::Bitmap => DirtyLog::enable_bitmap(vm.vm_fd()),
            Logging::Auto => DirtyLog::enable_auto(vm.vm_fd(), setup.ring_entries),
        };
        let mut this = Self {
            vm,
            log: log.context("the dirty log could not be enabled")?,
            slots: Vec::new(),
            vcpus: Vcpus::default(),
            dormitory: Arc::default(),
            awake: None,
        };
        for (id, region) in setup.regions() {
            let slot = GuestSlot::new(id, region)?;
            // Before KVM has it, so that no entry can name a slot which the log doesn't know.
            this.log.add_slot(id, region.pages)?;
            let memory = Arc::clone(&slot.memory);
            this.vm.add_slot(id.raw(), region.gpa, memory, true)?;
            this.slots.push(slot);
        }
        let chunk = setup.chunk();
        let mut vcpus = Vec::new();
        for index in 0..setup.vcpus {
            let load = Load::new(Mode::Native, setup.list(index)).chunk(chunk);
            let vcpu = this.vm.create_vcpu(index, &load)?;
            let ring = this.log.attach_vcpu(vcpu.fd());
            let ring = ring.with_context(|| unattached(index))?;
            vcpus.push((vcpu, ring));
        }
        for (vcpu, ring) in vcpus {
            let throttle = setup.throttle(&this.dormitory);
            let thread = VcpuThread::spawn(vcpu, handler(ring, throttle, chunk.into()))?;
            this.vcpus.0.push(thread);
        }
        Ok(this)
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
