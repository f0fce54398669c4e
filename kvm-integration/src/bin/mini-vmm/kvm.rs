//! What the VMM asks of KVM; and its guest.

use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Result, bail, ensure};
use kvm_bindings::*;
use kvm_dirty_ring::{DirtyLog, RingEntries, VcpuRing};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::machine::{MEMORY, Machine, Memory, STOP, Vcpu, device};

/// Writes its count to page after page of memory's upper half, and tells it to the device.
#[rustfmt::skip]
const CODE: [u8; 12] = [
    0x89, 0x04, 0x3e,       // again: mov [esi + edi], eax
    0x40,                   // inc eax
    0xe7, 0x10,             // out 0x10, eax
    0x01, 0xef,             // add edi, ebp
    0x21, 0xd7,             // and edi, edx
    0xeb, 0xf4,             // jmp again
];
const ENTRY: u64 = 0x1000;
const HALF: u64 = MEMORY as u64 / 2;

/// A VM with its memory and log, and its vCPU, with the code before it.
pub fn create(kvm: &Kvm) -> Result<(Machine, Vcpu)> {
    let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)])?;
    memory.write_slice(&CODE, GuestAddress(ENTRY))?;
    let vm = kvm.create_vm()?;
    let log = DirtyLog::enable_auto(&vm, RingEntries::new(4096)?)?; // before the first vCPU
    let fd = vm.create_vcpu(0)?;
    let ring = log.attach_vcpu(&fd)?;
    // Protected mode without paging, in flat segments.
    let mut sregs = fd.get_sregs()?;
    for segment in [&mut sregs.cs, &mut sregs.ds] {
        (segment.base, segment.limit, segment.g, segment.db) = (0, u32::MAX, 1, 1);
    }
    sregs.cr0 |= 1;
    fd.set_sregs(&sregs)?;
    fd.set_regs(&kvm_regs {
        rip: ENTRY,
        rsi: HALF,
        rdx: HALF - 1,
        rbp: 4096,
        rflags: 2,
        ..Default::default()
    })?;
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
        let (regs, sregs, events): (_, _, kvm_vcpu_events) = serde_json::from_value(state)?;
        fd.set_sregs(&sregs)?;
        fd.set_regs(&regs)?;
        fd.set_vcpu_events(&events)?;
    }
    while !STOP.load(Relaxed) {
        match fd.run() {
            Ok(VcpuExit::IoOut(_, told)) => device(memory, told)?,
            // kvm-ioctls has no name of its own for it.
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => ring.on_full()?,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            exit => bail!("a vCPU left the guest by {exit:x?}"),
        }
    }
    // Completes the `out` for which it left the guest: else its state is that of before it.
    fd.set_kvm_immediate_exit(1);
    ensure!(fd.run().is_err(), "the vCPU went on");
    // One that uses more of the machine has more state: MSRs, the local APIC, clocks.
    let state = (fd.get_regs()?, fd.get_sregs()?, fd.get_vcpu_events()?);
    Ok(serde_json::to_value(state)?)
}
