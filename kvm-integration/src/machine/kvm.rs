//! The tiny guest on KVM.

use std::fmt;
use std::sync::Arc;

use kvm_dirty_ring::{Awake, DirtyLog, SlotId, VcpuRing};
use kvm_ioctls::Kvm;

use super::{Guest, GuestSlot, Kick, Machine, MachineError, Setup};
use crate::program::{Load, Mode};
use crate::rate::{Dormitory, Throttle};
use crate::thread::{Action, VcpuThread, pause_all};
use crate::vcpu::Exit;
use crate::vm::TinyVm;

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
    threads: Vec<VcpuThread>,
    dormitory: Arc<Dormitory>,
    /// While it is wanted out of the guest.
    awake: Option<Awake>,
}

impl KvmMachine {
    /// Makes it and lets it run.
    ///
    /// # Errors
    /// KVM, the log or the kernel's memory management refused something.
    pub fn start(kvm: &Kvm, setup: &Setup, logging: Logging) -> Result<Self, MachineError> {
        let vm = TinyVm::with_capacity(kvm, setup.vcpus, setup.list_length())?;
        let log = match logging {
            Logging::Rings => DirtyLog::enable(vm.vm_fd(), setup.ring_entries)?,
            Logging::Bitmap => DirtyLog::enable_bitmap(vm.vm_fd())?,
            Logging::Auto => DirtyLog::enable_auto(vm.vm_fd(), setup.ring_entries)?,
        };
        let mut slots = Vec::new();
        for (id, region) in setup.regions() {
            let slot = GuestSlot::new(id, region)?;
            // Before KVM has it, so that no entry can name a slot which the log doesn't know.
            log.add_slot(id, region.pages)?;
            vm.add_slot(id.raw(), region.gpa, Arc::clone(&slot.memory), true)?;
            slots.push(slot);
        }
        let chunk = setup.chunk();
        let mut vcpus = Vec::new();
        for index in 0..setup.vcpus {
            let load = Load::new(Mode::Native, setup.list(index)).chunk(chunk);
            let vcpu = vm.create_vcpu(index, &load)?;
            let ring = log.attach_vcpu(vcpu.fd());
            let ring = ring.map_err(|source| MachineError::Attach { index, source })?;
            vcpus.push((vcpu, ring));
        }
        let mut this = Self {
            vm,
            log,
            slots,
            threads: Vec::new(),
            dormitory: Arc::default(),
            awake: None,
        };
        for (vcpu, ring) in vcpus {
            let throttle = setup.throttle(&this.dormitory);
            let thread = VcpuThread::spawn(vcpu, handler(ring, throttle, chunk.into()))?;
            this.threads.push(thread);
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
        let kickers: Vec<_> = self.threads.iter().map(VcpuThread::kicker).collect();
        Box::new(move |vcpu| kickers[vcpu].kick())
    }
}

impl Guest for KvmMachine {
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
        // A vCPU that sleeps is out of the guest, and its thread parks once it has woken.
        self.dormitory.wake();
        self.awake = Some(self.log.keep_awake());
        if pause_all(&self.threads) {
            return Ok(());
        }
        self.check().and(Err(MachineError::Ended))
    }

    fn resume(&mut self) {
        self.dormitory.calm();
        self.awake = None;
        self.threads.iter().for_each(VcpuThread::resume);
    }

    fn protect(&mut self, slot: SlotId) -> Result<(), MachineError> {
        Ok(self.vm.protect(slot.raw())?)
    }
}

impl Drop for KvmMachine {
    fn drop(&mut self) {
        // Threads are stopped one by one as they drop, each when it is awake.
        self.dormitory.wake();
        self.awake = Some(self.log.keep_awake());
        self.threads.clear();
    }
}

impl fmt::Debug for KvmMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmMachine")
            .field("vcpus", &self.threads.len())
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}
