//! What the VMM asks of KVM, and the guest: code for x86-64 that writes memory and counts.

use std::io;

use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_regs,
    kvm_segment, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events,
};
use kvm_dirty_ring::{DirtyLog, GuestRegion, RingEntries};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};

use crate::Result;
use crate::machine::{Cpu, Exit, Memory, RAM, VCPUS, Vcpu, Vm};

const RING_ENTRIES: u32 = 4096;

/// Writes the count, `eax`, to `ebx` pages, counts, says so, and begins anew at the end.
#[rustfmt::skip]
const CODE: &[u8] = &[
    // again:
    0x48, 0x89, 0xf7,       // mov rdi, rsi
    // chunk:
    0x89, 0xd9,             // mov ecx, ebx
    // page:
    0x89, 0x07,             // mov [rdi], eax
    0x48, 0x01, 0xef,       // add rdi, rbp
    0xff, 0xc9,             // dec ecx
    0x75, 0xf7,             // jnz page
    0xff, 0xc0,             // inc eax
    0xe7, PORT as u8,       // out PORT, eax
    0x48, 0x39, 0xd7,       // cmp rdi, rdx
    0x72, 0xec,             // jb chunk
    0xeb, 0xe7,             // jmp again
];
const PORT: u16 = 0x10;
const PAGES_PER_COUNT: u64 = 64;

const PAGE: u64 = 4096;
const ENTRY: u64 = PAGE;
const PML4: u64 = 2 * PAGE;
const PDPT: u64 = 3 * PAGE;
const DIRECTORIES: [u64; 2] = [4 * PAGE, 5 * PAGE];
/// Present, writable, user, accessed; and of 2 MiB, dirty. With the latter two set already the
/// processor has no reason to write the tables.
const TABLE: u64 = 0x27;
const LARGE_PAGE: u64 = 0xe7;

/// A VM, and its log: before the first vCPU.
pub fn create_vm(kvm: &Kvm) -> Result<(Box<dyn Vm>, DirtyLog)> {
    let fd = kvm.create_vm()?;
    let log = DirtyLog::enable(&fd, RingEntries::new(RING_ENTRIES)?)?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    Ok((Box::new(KvmVm { fd, cpuid }), log))
}

struct KvmVm {
    fd: VmFd,
    cpuid: kvm_bindings::CpuId,
}

impl Vm for KvmVm {
    fn set_region(&self, region: GuestRegion, host: *mut u8, logged: bool) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: region.slot.raw(),
            flags: if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: region.address,
            memory_size: region.pages * PAGE,
            userspace_addr: host as u64,
        };
        // SAFETY: the caller says that so much memory is there, and it stays for as long as a thread
        // runs a vCPU. It is accessed by way of vm-memory alone, which knows of other writers.
        let set = unsafe { self.fd.set_user_memory_region(region) };
        set.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    /// The code, and page tables by which each address is that of itself.
    fn load(&self, memory: &Memory) -> Result<()> {
        memory.write_slice(CODE, GuestAddress(ENTRY))?;
        memory.write_obj(PDPT | TABLE, GuestAddress(PML4))?;
        for (gib, directory) in (0..).zip(DIRECTORIES) {
            memory.write_obj(directory | TABLE, GuestAddress(PDPT + gib * 8))?;
            for page in 0..512 {
                let entry = (gib << 30 | page << 21) | LARGE_PAGE;
                memory.write_obj(entry, GuestAddress(directory + page * 8))?;
            }
        }
        Ok(())
    }

    fn create_vcpu(&self, index: u32, log: &DirtyLog, _: &Memory) -> Result<Cpu> {
        let fd = self.fd.create_vcpu(index.into())?;
        let ring = log.attach_vcpu(&fd)?;
        fd.set_cpuid2(&self.cpuid)?;
        let mut sregs = fd.get_sregs()?;
        enter_long_mode(&mut sregs);
        fd.set_sregs(&sregs)?;
        let share = RAM.1 as u64 / u64::from(VCPUS);
        let start = RAM.0.0 + u64::from(index) * share;
        fd.set_regs(&kvm_regs {
            rip: ENTRY,
            rsi: start,
            rdx: start + share,
            rbp: PAGE,
            rbx: PAGES_PER_COUNT,
            // Bit 1 is always set; ports are for privilege level 3, too.
            rflags: 0x3002,
            ..Default::default()
        })?;
        Ok((Box::new(KvmVcpu(fd)), ring))
    }
}

/// From the state after reset to flat segments at privilege level 3, with paging.
fn enter_long_mode(sregs: &mut kvm_sregs) {
    let flat = kvm_segment {
        limit: u32::MAX,
        dpl: 3,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 0x33,
        type_: 11,
        l: 1,
        ..flat
    };
    sregs.ss = kvm_segment {
        selector: 0x2b,
        type_: 3,
        db: 1,
        ..flat
    };
    (sregs.ds, sregs.es) = (sregs.ss, sregs.ss);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0033, PML4, 0x20, 0x500);
}

/// What this guest has of state. One that uses more of the machine has more of it: MSRs, extended
/// control registers, the local APIC, clocks.
#[derive(Serialize, Deserialize)]
struct State {
    regs: kvm_regs,
    sregs: kvm_sregs,
    events: kvm_vcpu_events,
}

struct KvmVcpu(VcpuFd);

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<Exit> {
        match self.0.run() {
            Ok(VcpuExit::IoOut(PORT, count)) => {
                let count = count
                    .try_into()
                    .map_err(|_| "a count of other than 4 bytes")?;
                Ok(Exit::Counted(u32::from_le_bytes(count)))
            }
            // kvm-ioctls has no name of its own for this exit.
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => Ok(Exit::DirtyRingFull),
            Ok(VcpuExit::Intr) => Ok(Exit::Interrupted),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                Ok(Exit::Interrupted)
            }
            Ok(exit) => Err(format!("a vCPU left the guest by {exit:x?}").into()),
            Err(error) => Err(format!("KVM_RUN: {error}").into()),
        }
    }

    fn finish(&mut self) -> Result<()> {
        self.0.set_kvm_immediate_exit(1);
        let run = self.run();
        self.0.set_kvm_immediate_exit(0);
        match run? {
            Exit::Interrupted => Ok(()),
            _ => Err("a vCPU entered the guest though it was not to".into()),
        }
    }

    fn save(&self) -> Result<Value> {
        Ok(serde_json::to_value(State {
            regs: self.0.get_regs()?,
            sregs: self.0.get_sregs()?,
            events: self.0.get_vcpu_events()?,
        })?)
    }

    fn restore(&mut self, state: &Value) -> Result<()> {
        let state = State::deserialize(state)?;
        self.0.set_sregs(&state.sregs)?;
        self.0.set_regs(&state.regs)?;
        Ok(self.0.set_vcpu_events(&state.events)?)
    }
}
