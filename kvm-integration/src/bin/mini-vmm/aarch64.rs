// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The vCPU on arm64: at EL1, with the MMU on, so that it sees memory through the caches, as the VMM does.

use anyhow::Result;
use kvm_bindings::{RegList, kvm_vcpu_init};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};

use crate::machine::{MEMORY, Memory};

/// Writes its count to page after page of memory's upper half, and reports it to the device.
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
/// Where there is no memory.
const DEVICE: u64 = 0x3f00_0000;
const HALF: u64 = MEMORY as u64 / 2;

/// Registers of 64 bits as `KVM_SET_ONE_REG` counts them: those of programs, and those of the system.
const CORE: u64 = 0x6030_0000_0010_0000;
const SYSTEM: u64 = 0x6030_0000_0013_0000;
const PC: u64 = 32;

/// Makes a new vCPU ready to run, and puts its code into memory.
pub fn set_up(vm: &VmFd, fd: &VcpuFd, memory: &Memory) -> Result<()> {
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
        core(1, HALF),
        core(3, DEVICE),
        core(4, 4096),
        core(5, HALF - 1),
        core(PC, ENTRY),
    ];
    for (register, value) in registers {
        fd.set_one_reg(register, &value.to_le_bytes())?;
    }
    Ok(())
}

/// What the guest reports to the device, if that is why it left.
pub fn reported<'a>(exit: &VcpuExit<'a>) -> Option<&'a [u8]> {
    match exit {
        VcpuExit::MmioWrite(DEVICE, count) => Some(count),
        _ => None,
    }
}

/// The state of a vCPU that is done with its exit: all of its registers. One that uses more of the machine has
/// more: an interrupt controller, pending errors.
pub fn state(fd: &VcpuFd) -> Result<Value> {
    let mut list = RegList::new(2000)?;
    fd.get_reg_list(&mut list)?;
    let mut state: Vec<(u64, Vec<u8>)> = Vec::new();
    for &register in list.as_slice() {
        // Bits 52 to 55 are the size's logarithm.
        let mut value = vec![0; 1 << (register >> 52 & 15)];
        fd.get_one_reg(register, &mut value)?;
        state.push((register, value));
    }
    Ok(serde_json::to_value(state)?)
}

pub fn restore(fd: &VcpuFd, state: Value) -> Result<()> {
    let state: Vec<(u64, Vec<u8>)> = serde_json::from_value(state)?;
    for (register, value) in state {
        fd.set_one_reg(register, &value)?;
    }
    Ok(())
}
