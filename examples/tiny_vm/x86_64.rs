// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The vCPU on x86-64: in protected mode without paging, in flat segments.

use kvm_bindings::kvm_regs;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{Failure, PAGE};

/// Writes its count to page after page of its share, and reports each by an `out`.
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

pub fn set_up(
    _: &VmFd,
    fd: &VcpuFd,
    memory: &GuestMemoryMmap,
    share: u64,
    bytes: u64,
) -> Result<(), Failure> {
    memory.write_slice(&CODE, GuestAddress(ENTRY))?;
    let mut sregs = fd.get_sregs()?;
    for segment in [&mut sregs.cs, &mut sregs.ds] {
        (segment.base, segment.limit, segment.g, segment.db) = (0, u32::MAX, 1, 1);
    }
    sregs.cr0 |= 1;
    fd.set_sregs(&sregs)?;
    let regs = kvm_regs {
        rip: ENTRY,
        rsi: share,
        rdx: bytes - 1,
        rbp: PAGE as u64,
        // Interrupts are let through, though none is for the guest.
        rflags: 0x202,
        ..Default::default()
    };
    Ok(fd.set_regs(&regs)?)
}

pub fn has_written(exit: &VcpuExit<'_>) -> bool {
    matches!(exit, VcpuExit::IoOut(0x10, _))
}
