// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `KVM_DIRTY_LOG_INITIALLY_SET`, a flag of manual protection (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`). When the log of a slot is switched on,
//! KVM then protects none of its pages, and sets all bits of its bitmap. No ring shows that.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_NR_MEMSLOTS, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, kvm_dirty_log,
    kvm_userspace_memory_region,
};
use memmap2::MmapMut;

use super::ioctl;
use crate::error::EnableError;
use crate::kernel::page_size;

/// How many slot ids are tried, from the last one down, to find one that the VMM does not use.
const IDS_TRIED: usize = 16;

/// Returns whether the KVM behind `fd` has the flag.
pub(super) fn exists(fd: &impl AsRawFd) -> Result<bool, EnableError> {
    let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    let offered = ioctl::value(fd, ioctl::CHECK_EXTENSION, cap.into());
    let offered = offered.map_err(ioctl::failed("KVM_CHECK_EXTENSION"))?;
    Ok(offered & KVM_DIRTY_LOG_INITIALLY_SET != 0)
}

/// Switches the flag off, and manual protection on: bitmaps beside rings need that, and rings alone work the same with it. KVM takes
/// either at any time (`kvm_vm_ioctl_enable_cap_generic`).
pub(super) fn switch_off(fd: &impl AsRawFd) -> io::Result<()> {
    let enable = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into();
    ioctl::enable_cap(fd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, enable)
}

/// Returns whether new slots of the VM behind `fd` begin with every page dirty in their bitmap. KVM then skips write-protecting
/// them, and the first write to a page reaches no ring.
///
/// KVM has no query for enabled capabilities, but a slot shows it: this creates one, reads its bitmap, and deletes it again
/// (`kvm_prepare_memory_region` in virt/kvm/kvm_main.c sets the bits).
pub(super) fn is_on(fd: &impl AsRawFd) -> Result<bool, EnableError> {
    if !exists(fd)? {
        return Ok(false);
    }
    let slots = ioctl::value(fd, ioctl::CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS.into());
    let slots = slots.map_err(ioctl::failed("KVM_CHECK_EXTENSION"))?;
    let memory = MmapMut::map_anon(page_size()).map_err(ioctl::failed("mmap"))?;
    let mut region = kvm_userspace_memory_region {
        slot: 0,
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        guest_phys_addr: 0,
        memory_size: page_size() as u64,
        userspace_addr: memory.as_ptr() as u64,
    };
    let set_region = |region: &mut kvm_userspace_memory_region| {
        // SAFETY: KVM_SET_USER_MEMORY_REGION takes such a region; its memory outlives the slot,
        // which is deleted below, and no vCPU exists that could write there.
        unsafe { ioctl::pointer(fd, ioctl::SET_USER_MEMORY_REGION, region) }
    };
    let call = "KVM_SET_USER_MEMORY_REGION";
    // Free ids and the end of guest memory are unknown. So this takes the last id, and the page below the last power of two, that
    // KVM accepts. KVM accepts no id that is in use: that slot would have to move to other memory of ours (EINVAL).
    let mut refused = Err(io::Error::from_raw_os_error(libc::EINVAL));
    'found: for slot in (0..slots).rev().take(IDS_TRIED) {
        for bits in (20..=45).rev() {
            region.slot = slot;
            region.guest_phys_addr = (1 << bits) - region.memory_size;
            refused = set_region(&mut region);
            if refused.is_ok() {
                break 'found;
            }
        }
    }
    refused.map_err(ioctl::failed(call))?;
    let mut bitmap = 0u64;
    let mut log = kvm_dirty_log {
        slot: region.slot,
        ..Default::default()
    };
    log.__bindgen_anon_1.dirty_bitmap = core::ptr::from_mut(&mut bitmap).cast();
    // SAFETY: KVM_GET_DIRTY_LOG takes such a request, and writes the bits of one page, padded to
    // 64, to the address in it.
    let read = unsafe { ioctl::pointer(fd, ioctl::GET_DIRTY_LOG, &mut log) };
    region.memory_size = 0;
    set_region(&mut region).map_err(ioctl::failed(call))?;
    read.map_err(ioctl::failed("KVM_GET_DIRTY_LOG"))?;
    Ok(bitmap != 0)
}
