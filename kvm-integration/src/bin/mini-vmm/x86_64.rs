// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The vCPU on x86-64: in protected mode without paging, in flat segments.

use anyhow::Result;
use kvm_bindings::{kvm_regs, kvm_vcpu_events};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};

use crate::machine::{MEMORY, Memory};

/// Writes its count to page after page of memory's upper half, and reports it to the device.
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

/// Makes a new vCPU ready to run, and puts its code into memory.
pub fn set_up(_vm: &VmFd, fd: &VcpuFd, memory: &Memory) -> Result<()> {
    memory.write_slice(&CODE, GuestAddress(ENTRY))?;
    let mut sregs = fd.get_sregs()?;
    for segment in [&mut sregs.cs, &mut sregs.ds] {
        (segment.base, segment.limit, segment.g, segment.db) = (0, u32::MAX, 1, 1);
    }
    sregs.cr0 |= 1;
    fd.set_sregs(&sregs)?;
    let regs = kvm_regs {
        rip: ENTRY,
        rsi: HALF,
        rdx: HALF - 1,
        rbp: 4096,
        // Interrupts are let through, though none is for the guest.
        rflags: 0x202,
        ..Default::default()
    };
    Ok(fd.set_regs(&regs)?)
}

/// What the guest reports to the device, if that is why it left.
pub fn reported<'a>(exit: &VcpuExit<'a>) -> Option<&'a [u8]> {
    match exit {
        VcpuExit::IoOut(_, count) => Some(count),
        _ => None,
    }
}

/// The state of a vCPU that is done with its exit. One that uses more of the machine has more: MSRs, the local
/// APIC, clocks.
pub fn state(fd: &VcpuFd) -> Result<Value> {
    let state = (fd.get_regs()?, fd.get_sregs()?, fd.get_vcpu_events()?);
    Ok(serde_json::to_value(state)?)
}

pub fn restore(fd: &VcpuFd, state: Value) -> Result<()> {
    let (regs, sregs, events): (_, _, kvm_vcpu_events) = serde_json::from_value(state)?;
    fd.set_sregs(&sregs)?;
    fd.set_regs(&regs)?;
    Ok(fd.set_vcpu_events(&events)?)
}
