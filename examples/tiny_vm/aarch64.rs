// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The vCPU on arm64: at EL1, with the MMU on, so that it sees memory through the caches, as the VMM does.

use kvm_bindings::kvm_vcpu_init;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{Failure, PAGE};

/// Writes its count to page after page of its share, and reports each by a store to where there is no memory.
#[rustfmt::skip]
const CODE: [u32; 6] = [
    0xb822_6820,            // again: str w0, [x1, x2]
    0x1100_0400,            // add w0, w0, #1
    0xb900_0060,            // str w0, [x3]
    0x8b04_0042,            // add x2, x2, x4
    0x8a05_0042,            // and x2, x2, x5
    0x17ff_fffb,            // b again
];
const ENTRY: u64 = 0x4000;
/// A page table with one entry: the first GiB, one to one, as normal memory.
const TABLE: u64 = 0x8000;
const BLOCK: u64 = 1 << 10 | 3 << 8 | 1;
const DEVICE: u64 = 0x3f00_0000;

/// Registers of 64 bits as `KVM_SET_ONE_REG` counts them: those of programs, and those of the system.
const CORE: u64 = 0x6030_0000_0010_0000;
const SYSTEM: u64 = 0x6030_0000_0013_0000;

pub fn set_up(
    vm: &VmFd,
    fd: &VcpuFd,
    memory: &GuestMemoryMmap,
    share: u64,
    bytes: u64,
) -> Result<(), Failure> {
    for (at, word) in (ENTRY..).step_by(4).zip(CODE) {
        memory.write_obj(word, GuestAddress(at))?;
    }
    memory.write_obj(BLOCK, GuestAddress(TABLE))?;
    let mut init = kvm_vcpu_init::default();
    vm.get_preferred_target(&mut init)?;
    fd.vcpu_init(&init)?;
    let core = |number: u64, value| (CORE | number * 2, value);
    let registers: [(u64, u64); 9] = [
        // MAIR_EL1: memory of kind 0 is normal, and cached.
        (SYSTEM | 0xc510, 0xff),
        // TCR_EL1: addresses of 39 bits, granules of 4 KiB; no tables for the upper half.
        (
            SYSTEM | 0xc102,
            2 << 32 | 1 << 23 | 3 << 12 | 1 << 10 | 1 << 8 | 25,
        ),
        // TTBR0_EL1.
        (SYSTEM | 0xc100, TABLE),
        // SCTLR_EL1: the bits that are always set, caches, MMU.
        (SYSTEM | 0xc080, 0x30d0_0980 | 1 << 12 | 1 << 2 | 1),
        core(1, share),
        core(3, DEVICE),
        core(4, PAGE as u64),
        core(5, bytes - 1),
        // The program counter.
        core(32, ENTRY),
    ];
    for (register, value) in registers {
        fd.set_one_reg(register, &value.to_le_bytes())?;
    }
    Ok(())
}

pub fn has_written(exit: &VcpuExit<'_>) -> bool {
    matches!(exit, VcpuExit::MmioWrite(DEVICE, _))
}
