// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What stands in for KVM and the guest where there is none: the crate's simulated kernel, and
//! a vCPU that does on it what the guest's code does. Nothing here is for copying.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;
use kvm_dirty_ring::sim::{SimConfig, SimVcpu, SimVm, WriteError};
use serde::Deserialize;
use serde_json::Value;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileMemory};

use crate::machine::{MEMORY, Machine, Memory, SLOT, STOP, Vcpu, device};

/// Writes after which a vCPU rests for a moment.
const BATCH: u32 = 64;

/// On KVM, where it can be had, unless somebody asked for the stand-in.
pub fn create_unless_kvm(asked_for: bool) -> Result<(Machine, Vcpu)> {
    #[cfg(tiny_guest)]
    if !asked_for {
        match kvm_ioctls::Kvm::new() {
            Ok(kvm) => return crate::kvm::create(&kvm),
            Err(error) => eprintln!("mini-vmm: no KVM: {error}"),
        }
    }
    eprintln!(
        "mini-vmm: THE KERNEL AND THE GUEST ARE SIMULATED, {}",
        match asked_for {
            true => "as asked for",
            false => "for want of KVM",
        }
    );
    create()
}

fn create() -> Result<(Machine, Vcpu)> {
    let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)])?;
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    let pages = memory.iter().map(|region| region.bitmap().region().pages());
    let pages: u64 = pages.sum();
    let vcpu = vm.add_vcpu();
    let mut ring = log.attach_ring(vcpu.ring_memory())?;
    let vcpu_memory = memory.clone();
    let run = move |state: Value| {
        let mut count = Option::<u32>::deserialize(state)?.unwrap_or(0);
        while !STOP.load(Relaxed) {
            match write(&vcpu, &vcpu_memory, pages, count) {
                Ok(()) => {
                    count += 1;
                    device(&vcpu_memory, &count.to_le_bytes())?;
                }
                Err(WriteError::RingFull) => ring.on_full()?,
                Err(error) => return Err(error.into()),
            }
            if count % BATCH == 0 {
                sleep(Duration::from_micros(100));
            }
        }
        vcpu.exit();
        Ok(Value::from(count))
    };
    let set_logged = move |logged| {
        if vm.version(SLOT, 0).is_none() {
            vm.create_slot(SLOT, pages);
        }
        vm.set_logged(SLOT, logged);
        Ok(())
    };
    let machine = Machine::new(memory, Box::new(set_logged), log)?;
    Ok((machine, Box::new(run)))
}

/// The vCPU's write: as on KVM, into the second half of memory.
fn write(vcpu: &SimVcpu, memory: &Memory, pages: u64, count: u32) -> Result<(), WriteError> {
    let page = pages / 2 + u64::from(count) % (pages / 2);
    // By a reference, which marks nothing: what vCPUs write is for the log to find.
    let place = memory.get_slice(GuestAddress(page * (MEMORY as u64 / pages)), 4);
    let place = place.expect("guest memory has the page");
    let place = place.get_atomic_ref::<AtomicU32>(0);
    let place = place.expect("a page begins at a multiple of 4");
    vcpu.write_with(SLOT, page, || place.store(count, Relaxed))
}
