// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest on x86-64: in long mode with flat segments.

pub(super) mod program;
pub(super) mod stress;
pub(super) mod tables;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use self::program::{CHUNK_PORT, PASS_PORT};
use super::error::VmError;
use super::program::{Exit, Mode, Places};

/// Where the boot slot has to end: there is no other bound than the first slot of a test.
pub(super) const BOOT_END: u64 = super::memory::LOWEST_GPA;

/// What the guest begins with.
pub(super) type Registers = kvm_regs;

/// What each vCPU has to be made like.
#[derive(Debug)]
pub(super) struct Processor(CpuId);

impl Processor {
    /// As KVM supports it here.
    pub(super) fn of(kvm: &Kvm, _vm: &VmFd) -> Result<Self, VmError> {
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map(Self)
            .map_err(VmError::kvm("KVM_GET_SUPPORTED_CPUID", "the machine"))
    }

    /// Makes vCPU `index` ready to run.
    pub(super) fn set_up(
        &self,
        fd: &VcpuFd,
        index: u32,
        mode: Mode,
        registers: &kvm_regs,
        places: &Places,
    ) -> Result<(), VmError> {
        let failed = |call| VmError::kvm(call, format!("vCPU {index}"));
        // Without it KVM takes guest-physical addresses to have 36 bits, and where it walks the
        // page tables itself, it faults on those that map more than 64 GiB.
        fd.set_cpuid2(&self.0).map_err(failed("KVM_SET_CPUID2"))?;
        let mut sregs = fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        enter_long_mode(&mut sregs, mode, places);
        fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        fd.set_regs(registers).map_err(failed("KVM_SET_REGS"))
    }
}

/// What the guest means by an exit, if it is one of its own.
pub(super) fn meaning(exit: &VcpuExit<'_>) -> Option<Exit> {
    match exit {
        VcpuExit::IoOut(CHUNK_PORT, _) => Some(Exit::Chunk),
        VcpuExit::IoOut(PASS_PORT, _) => Some(Exit::PassDone),
        _ => None,
    }
}

/// The address of its next instruction.
pub(super) fn program_counter(fd: &VcpuFd) -> Result<u64, kvm_ioctls::Error> {
    fd.get_regs().map(|registers| registers.rip)
}

/// Ticks a second of the time-stamp counter.
pub(super) fn clock_hz(fd: &VcpuFd) -> Result<f64, kvm_ioctls::Error> {
    fd.get_tsc_khz().map(|khz| f64::from(khz) * 1e3)
}

/// Turns the state after reset into long mode with flat segments.
fn enter_long_mode(sregs: &mut kvm_sregs, mode: Mode, places: &Places) {
    let (code, data, dpl) = match mode {
        Mode::Native => (0x33, 0x2b, 3),
        Mode::Emulated => (0x08, 0x10, 0),
    };
    let flat = kvm_segment {
        limit: u32::MAX,
        dpl,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    // Type 11: code, readable, accessed. Type 3: data, writable, accessed.
    sregs.cs = kvm_segment {
        selector: code,
        type_: 11,
        l: 1,
        ..flat
    };
    let data = kvm_segment {
        selector: data,
        type_: 3,
        db: 1,
        ..flat
    };
    (sregs.ss, sregs.ds, sregs.es) = (data, data, data);
    // PG, NE, ET, MP and PE.
    sregs.cr0 = 0x8000_0033;
    // PAE.
    sregs.cr4 = 0x20;
    // LMA and LME.
    sregs.efer = 0x500;
    sregs.cr3 = places.page_tables;
}
