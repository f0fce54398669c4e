//! The mapping of a vCPU's ring, or what stands in for it: the only file that maps one.

use core::ptr::NonNull;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::kvm_dirty_gfn;
use memmap2::{Advice, MmapOptions, MmapRaw};

use crate::kernel::page_size;
use crate::ring::{Entry, RingMemory};

/// Where a vCPU's ring begins in what its descriptor maps, in pages of the host: `KVM_DIRTY_LOG_PAGE_OFFSET` of all
/// architectures that have rings. kvm-bindings 0.14 says 0 for riscv64, whose headers it has of a kernel before 6.17.
const PAGE_OFFSET: u64 = 64;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const _: () = assert!(PAGE_OFFSET == kvm_bindings::KVM_DIRTY_LOG_PAGE_OFFSET as u64);

/// Entries of a ring that stays empty: those harvested in one go.
pub(crate) const EMPTY_RING_ENTRIES: u32 = 64;

/// Maps the ring of `entries` entries of the vCPU behind `vcpu_fd`.
///
/// The kernel wants it shared (`kvm_vcpu_mmap` in virt/kvm/kvm_main.c), at an offset counted in
/// the host's pages.
pub(crate) fn map_ring(vcpu_fd: &impl AsRawFd, entries: u32) -> io::Result<RingMemory> {
    let map = map_at_ring(vcpu_fd, entries as usize * size_of::<kvm_dirty_gfn>())?;
    // A child that wrote to it would mark entries of our guest.
    map.advise(Advice::DontFork)?;
    // The kernel maps whatever it is asked for and answers the first look at a page that is none of
    // this vCPU's ring with SIGBUS (`kvm_vcpu_fault`): of a VM whose rings are smaller, or off.
    // Better to look at all of them now; kernels before 5.14 can't.
    match map.advise(Advice::PopulateRead) {
        Err(error) if error.raw_os_error() != Some(libc::EINVAL) => return Err(error),
        _ => {}
    }
    let start = NonNull::new(map.as_mut_ptr().cast::<Entry>());
    let start = start.ok_or_else(|| io::Error::other("a mapping at address zero"))?;
    // SAFETY: the mapping is that long, page-aligned, and lives as long as its owner, `map`.
    // `Entry` has the layout of `kvm_dirty_gfn`, any bytes are one, and this process accesses the
    // mapping through `Entry` alone.
    let ring = unsafe { RingMemory::new(start, entries, Box::new(map)) };
    Ok(named(ring, vcpu_fd))
}

/// A ring in our own memory, which stays empty, for the vCPU behind `vcpu_fd`. `None` if it has one in KVM.
pub(crate) fn empty_ring(vcpu_fd: &impl AsRawFd) -> io::Result<Option<RingMemory>> {
    if has_ring(vcpu_fd)? {
        return Ok(None);
    }
    let entries = (0..EMPTY_RING_ENTRIES).map(|_| Entry::free()).collect();
    Ok(Some(named(RingMemory::shared(entries, 0), vcpu_fd)))
}

/// Whether the vCPU behind `vcpu_fd` has a ring: what is none can be mapped, but not looked at
/// (`kvm_vcpu_fault` returns VM_FAULT_SIGBUS, which a look by this call turns into EFAULT).
///
/// Kernels before 5.14 can't be asked so. They have no bitmaps beside rings either, so a VM with rings has
/// been noticed when the log was enabled.
fn has_ring(vcpu_fd: &impl AsRawFd) -> io::Result<bool> {
    let map = map_at_ring(vcpu_fd, page_size())?;
    match map.advise(Advice::PopulateRead) {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::EFAULT | libc::EINVAL) => Ok(false),
            _ => Err(error),
        },
    }
}

/// Maps `bytes` bytes from where the ring of a vCPU begins, if it has one.
fn map_at_ring(vcpu_fd: &impl AsRawFd, bytes: usize) -> io::Result<MmapRaw> {
    MmapOptions::new()
        .offset(PAGE_OFFSET * page_size() as u64)
        .len(bytes)
        .map_raw(vcpu_fd.as_raw_fd())
}

/// The ring under its vCPU's name.
fn named(ring: RingMemory, vcpu_fd: &impl AsRawFd) -> RingMemory {
    // The link's target is the vCPU's number (`create_vcpu_fd` in virt/kvm/kvm_main.c). Without
    // /proc, a vCPU that is attached twice goes unnoticed.
    let link = fs::read_link(format!("/proc/self/fd/{}", vcpu_fd.as_raw_fd()));
    match link {
        Ok(vcpu) => ring.named(vcpu.to_string_lossy().into_owned()),
        Err(_) => ring,
    }
}
