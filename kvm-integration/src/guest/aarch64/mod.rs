// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest on arm64: at EL1, with the MMU on.

pub(super) mod program;
pub(super) mod stress;
pub(super) mod tables;

use kvm_bindings::kvm_vcpu_init;
use kvm_ioctls::{Error, Kvm, VcpuExit, VcpuFd, VmFd};

use super::error::VmError;
use super::program::{Exit, Mode, Places};

/// A page of no slot, which the tables map all the same: a store to its first word is an exit after a chunk of
/// stores, one to its second an exit after a pass. The boot slot has to end below it.
pub(super) const BOOT_END: u64 = 0x3f00_0000;

/// What the guest begins with: `x0` and up, and where.
#[derive(Debug)]
pub(super) struct Registers {
    pub(super) x: [u64; 16],
    pub(super) pc: u64,
}

/// What each vCPU has to be made like.
#[derive(Debug)]
pub(super) struct Processor(kvm_vcpu_init);

/// Of registers of 64 bits, as `KVM_SET_ONE_REG` counts them.
const REGISTER: u64 = 0x6030_0000_0000_0000;
const PC: u64 = 32;

/// A core register: `x0` to `x30`, the stack pointer, the program counter.
fn core(number: u64) -> u64 {
    REGISTER | 0x0010 << 16 | number * 2
}

/// A system register, by the numbers of its encoding.
fn system(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    REGISTER | 0x0013 << 16 | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

fn get(fd: &VcpuFd, register: u64) -> Result<u64, Error> {
    let mut value = [0; 8];
    fd.get_one_reg(register, &mut value)?;
    Ok(u64::from_le_bytes(value))
}

impl Processor {
    /// As KVM prefers it here.
    pub(super) fn of(_kvm: &Kvm, vm: &VmFd) -> Result<Self, VmError> {
        let mut init = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut init)
            .map_err(VmError::kvm("KVM_ARM_PREFERRED_TARGET", "the machine"))?;
        Ok(Self(init))
    }

    /// Makes vCPU `index` ready to run. There is one mode only.
    pub(super) fn set_up(
        &self,
        fd: &VcpuFd,
        index: u32,
        _mode: Mode,
        registers: &Registers,
        places: &Places,
    ) -> Result<(), VmError> {
        let failed = |call| VmError::kvm(call, format!("vCPU {index}"));
        fd.vcpu_init(&self.0).map_err(failed("KVM_ARM_VCPU_INIT"))?;
        let set = |register, value: u64| {
            fd.set_one_reg(register, &value.to_le_bytes())
                .map_err(failed("KVM_SET_ONE_REG"))
        };
        // MAIR_EL1: memory of kind 0 is normal, and cached.
        set(system(3, 0, 10, 2, 0), 0xff)?;
        // TCR_EL1: addresses of 39 bits, granules of 4 KiB, tables cached and shared, 40 bits physical; no tables for
        // the upper half.
        set(
            system(3, 0, 2, 0, 2),
            2 << 32 | 1 << 23 | 3 << 12 | 1 << 10 | 1 << 8 | 25,
        )?;
        // TTBR0_EL1.
        set(system(3, 0, 2, 0, 0), places.page_tables)?;
        // SCTLR_EL1: the bits that are always set; instructions cached, data cached, MMU on.
        set(system(3, 0, 1, 0, 0), 0x30d0_0980 | 1 << 12 | 1 << 2 | 1)?;
        for (number, &value) in (0..).zip(&registers.x) {
            set(core(number), value)?;
        }
        set(core(PC), registers.pc)?;
        Ok(())
    }
}

/// What the guest means by an exit, if it is one of its own.
pub(super) fn meaning(exit: &VcpuExit<'_>) -> Option<Exit> {
    const PASS: u64 = BOOT_END + 8;
    match exit {
        VcpuExit::MmioWrite(BOOT_END, _) => Some(Exit::Chunk),
        VcpuExit::MmioWrite(PASS, _) => Some(Exit::PassDone),
        _ => None,
    }
}

/// The address of its next instruction.
pub(super) fn program_counter(fd: &VcpuFd) -> Result<u64, Error> {
    get(fd, core(PC))
}

/// Ticks a second of the virtual counter. It has the frequency of the host's, which the host's own programs may read.
pub(super) fn clock_hz(_fd: &VcpuFd) -> Result<f64, Error> {
    let hz: u64;
    // SAFETY: Linux lets programs read CNTFRQ_EL0, which has no side effects.
    unsafe { std::arch::asm!("mrs {}, cntfrq_el0", out(reg) hz, options(nomem, nostack)) };
    Ok(hz as f64)
}

/// The bytes between two labels of this program's own.
///
/// # Safety
/// Both are in one piece of read-only data, in this order.
unsafe fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: the caller's promise; nobody writes read-only data.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}
