//! The mapping of a vCPU's ring, or what stands in for it: the only file that maps one.

use core::ptr::NonNull;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use memmap2::{Advice, MmapOptions};

use crate::kernel::page_size;
use crate::ring::{Entry, RingMemory};

/// Entries of a ring that stays empty: those harvested in one go.
pub(crate) const EMPTY_RING_ENTRIES: u32 = 64;

/// Maps the ring of `entries` entries of the vCPU behind `vcpu_fd`.
///
/// The kernel wants it shared (`kvm_vcpu_mmap` in virt/kvm/kvm_main.c), at an offset counted in
/// the host's pages.
pub(crate) fn map_ring(vcpu_fd: &impl AsRawFd, entries: u32) -> io::Result<RingMemory> {
    let map = MmapOptions::new()
        .offset(u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * page_size() as u64)
        .len(entries as usize * size_of::<kvm_dirty_gfn>())
        .map_raw(vcpu_fd.as_raw_fd())?;
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

/// A ring in our own memory, which stays empty, for the vCPU behind `vcpu_fd`.
pub(crate) fn empty_ring(vcpu_fd: &impl AsRawFd) -> RingMemory {
    let entries = (0..EMPTY_RING_ENTRIES).map(|_| Entry::free()).collect();
    named(RingMemory::shared(entries, 0), vcpu_fd)
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
