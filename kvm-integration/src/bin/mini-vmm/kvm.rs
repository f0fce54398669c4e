// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the VMM asks of KVM, whatever the processor.

use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Result, bail, ensure};
use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region,
};
use kvm_dirty_ring::{DirtyLog, RingEntries, VcpuRing};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde_json::Value;
use vm_memory::{GuestAddress, GuestMemoryBackend};

#[cfg(target_arch = "aarch64")]
use crate::aarch64 as cpu;
use crate::machine::{MEMORY, Machine, Memory, STOP, Vcpu, device};
#[cfg(target_arch = "x86_64")]
use crate::x86_64 as cpu;

/// A VM with its memory and log, and its vCPU, ready to run.
pub fn create(kvm: &Kvm) -> Result<(Machine, Vcpu)> {
    let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)])?;
    let vm = kvm.create_vm()?;
    let log = DirtyLog::enable_auto(&vm, RingEntries::new(4096)?)?; // before the first vCPU
    let fd = vm.create_vcpu(0)?;
    let ring = log.attach_vcpu(&fd)?;
    cpu::set_up(&vm, &fd, &memory)?;
    let userspace_addr = memory.get_host_address(GuestAddress(0))? as u64;
    let set_logged = move |logged| {
        let region = kvm_userspace_memory_region {
            flags: if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            memory_size: MEMORY as u64,
            userspace_addr,
            ..Default::default()
        };
        // SAFETY: so much memory is there for as long as a vCPU runs: its thread holds on to it.
        Ok(unsafe { vm.set_user_memory_region(region) }?)
    };
    let vcpu_memory = memory.clone();
    let vcpu = move |state| run(fd, ring, &vcpu_memory, state);
    let machine = Machine::new(memory, Box::new(set_logged), log)?;
    Ok((machine, Box::new(vcpu)))
}

fn run(mut fd: VcpuFd, mut ring: VcpuRing, memory: &Memory, state: Value) -> Result<Value> {
    if !state.is_null() {
        cpu::restore(&fd, state)?;
    }
    while !STOP.load(Relaxed) {
        match fd.run() {
            // kvm-ioctls has no name of its own for it.
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => ring.on_full()?,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Ok(exit) => match cpu::reported(&exit) {
                Some(count) => device(memory, count)?,
                None => bail!("a vCPU left the guest by {exit:x?}"),
            },
            Err(error) => return Err(error.into()),
        }
    }
    // Completes the store or `out` for which it left the guest: else its state is that of before it.
    fd.set_kvm_immediate_exit(1);
    ensure!(fd.run().is_err(), "the vCPU went on");
    cpu::state(&fd)
}
