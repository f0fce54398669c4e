// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A small virtual machine on KVM, for examples that need a real one: one memslot, and vCPUs that write to page after
//! page, each in a share of its own. Nothing here is for copying.

#[cfg(target_arch = "aarch64")]
#[path = "aarch64.rs"]
mod processor;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod processor;

use std::error::Error;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_dirty_ring::{DirtyLog, Run, SlotId};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

pub const RAM: SlotId = SlotId::new(0, 0);
pub const PAGE: usize = 4096;
/// Code and tables are below the first share.
const SHARES: u64 = 1 << 20;

pub type Failure = Box<dyn Error + Send + Sync>;

pub struct TinyVm {
    // Fields drop in this order: the VM goes before its memory.
    vm: VmFd,
    pub memory: GuestMemoryMmap,
    /// Bytes of each vCPU's share, a power of two.
    share: u64,
}

impl TinyVm {
    /// A VM for `vcpus` vCPUs that write to `pages` pages each, a power of two; without its memslot yet.
    pub fn new(kvm: &Kvm, vcpus: u64, pages: u64) -> Result<Self, Failure> {
        let share = pages * PAGE as u64;
        let bytes = SHARES.max(share) + vcpus * share;
        Ok(Self {
            vm: kvm.create_vm()?,
            memory: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes as usize)])?,
            share,
        })
    }

    pub fn fd(&self) -> &VmFd {
        &self.vm
    }

    /// Has the log track all memory, then KVM.
    pub fn add_memory(&self, log: &DirtyLog) -> Result<(), Failure> {
        let bytes = self.memory.last_addr().0 + 1;
        log.add_slot(RAM, bytes / host_page())?;
        let region = kvm_userspace_memory_region {
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            memory_size: bytes,
            userspace_addr: self.memory.get_host_address(GuestAddress(0))? as u64,
            ..Default::default()
        };
        // SAFETY: so much memory is there. It outlives the VM, but for vCPUs: their threads are joined before.
        Ok(unsafe { self.vm.set_user_memory_region(region) }?)
    }

    /// A vCPU that is ready to run.
    pub fn create_vcpu(&self, index: u64) -> Result<VcpuFd, Failure> {
        let fd = self.vm.create_vcpu(index)?;
        let share = self.share_of(index);
        processor::set_up(&self.vm, &fd, &self.memory, share, self.share)?;
        Ok(fd)
    }

    fn share_of(&self, index: u64) -> u64 {
        SHARES.max(self.share) + index * self.share
    }

    /// The bytes of a run of pages.
    pub fn read(&self, run: Run) -> Result<(usize, Vec<u8>), Failure> {
        let first = run.first_page * host_page();
        let mut bytes = vec![0; (run.pages * host_page()) as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(first))?;
        Ok((first as usize, bytes))
    }

    /// All bytes.
    pub fn read_all(&self) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; self.memory.last_addr().0 as usize + 1];
        self.memory.read_slice(&mut bytes, GuestAddress(0))?;
        Ok(bytes)
    }
}

/// Whether the guest means something by this exit: it has written a page.
pub fn has_written(exit: &VcpuExit<'_>) -> bool {
    processor::has_written(exit)
}

/// Bytes of a page of the host's, in which memory is tracked.
fn host_page() -> u64 {
    // SAFETY: it takes an integer.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as u64 }
}
