// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The mapping of a vCPU's ring, or its stand-in: the only file that maps one.

use core::ptr::NonNull;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::kvm_dirty_gfn;
use memmap2::{Advice, MmapOptions, MmapRaw};

use crate::kernel::page_size;
use crate::ring::{Entry, RingMemory};

/// The start of a vCPU's ring in the mapping of its descriptor, in pages of the host: `KVM_DIRTY_LOG_PAGE_OFFSET` of all
/// architectures that have rings. kvm-bindings 0.14 has 0 for riscv64, from the headers of a kernel before 6.17.
const PAGE_OFFSET: u64 = 64;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const _: () = assert!(PAGE_OFFSET == kvm_bindings::KVM_DIRTY_LOG_PAGE_OFFSET as u64);

/// Entries of a ring that stays empty: those of one block of a harvest.
pub(crate) const EMPTY_RING_ENTRIES: u32 = 64;

/// Maps the ring of `entries` entries of the vCPU behind `vcpu_fd`.
///
/// The kernel requires a shared mapping (`kvm_vcpu_mmap` in virt/kvm/kvm_main.c), at an offset in pages of the host.
pub(crate) fn map_ring(vcpu_fd: &impl AsRawFd, entries: u32) -> io::Result<RingMemory> {
    let map = map_at_ring(vcpu_fd, entries as usize * size_of::<kvm_dirty_gfn>())?;
    // A child that wrote to it would mark entries of our guest.
    map.advise(Advice::DontFork)?;
    // The kernel maps any range, and raises SIGBUS at the first access to a page that is not of this vCPU's ring
    // (`kvm_vcpu_fault`): when the VM's rings are smaller, or off. So populate all pages now; kernels before 5.14 cannot.
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

/// Returns a ring in our own memory, which stays empty, for the vCPU behind `vcpu_fd`. `None` if it has one in KVM.
pub(crate) fn empty_ring(vcpu_fd: &impl AsRawFd) -> io::Result<Option<RingMemory>> {
    if has_ring(vcpu_fd)? {
        return Ok(None);
    }
    let entries = (0..EMPTY_RING_ENTRIES).map(|_| Entry::free()).collect();
    Ok(Some(named(RingMemory::shared(entries, 0), vcpu_fd)))
}

/// Returns whether the vCPU behind `vcpu_fd` has a ring. A range without a ring can be mapped, but not accessed: populating it
/// returns EFAULT (`kvm_vcpu_fault` returns VM_FAULT_SIGBUS).
///
/// Kernels before 5.14 cannot populate. They have no bitmaps beside rings either, so a VM with rings was detected when the
/// log was enabled.
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

/// Maps `bytes` bytes from the start of a vCPU's ring, if it has one.
fn map_at_ring(vcpu_fd: &impl AsRawFd, bytes: usize) -> io::Result<MmapRaw> {
    MmapOptions::new()
        .offset(PAGE_OFFSET * page_size() as u64)
        .len(bytes)
        .map_raw(vcpu_fd.as_raw_fd())
}

/// Gives the ring its vCPU's name.
fn named(ring: RingMemory, vcpu_fd: &impl AsRawFd) -> RingMemory {
    // The link's target is the vCPU's number (`create_vcpu_fd` in virt/kvm/kvm_main.c). Without /proc, a vCPU that is attached twice
    // cannot be detected.
    let link = fs::read_link(format!("/proc/self/fd/{}", vcpu_fd.as_raw_fd()));
    match link {
        Ok(vcpu) => ring.named(vcpu.to_string_lossy().into_owned()),
        Err(_) => ring,
    }
}
