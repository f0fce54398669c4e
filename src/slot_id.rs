// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The name of a memslot, and its largest size.

use core::fmt;

/// Pages in the largest slot that KVM accepts: `KVM_MEM_MAX_NR_PAGES` in the kernel's include/linux/kvm_host.h.
pub(crate) const MAX_SLOT_PAGES: u64 = (1 << 31) - 1;

/// Address spaces that a VM can have: `KVM_MAX_NR_ADDRESS_SPACES` in the kernel's
/// include/linux/kvm_host.h.
pub(crate) const ADDRESS_SPACES: u16 = 2;

/// A memslot: its address space (0, or 1 for x86 system management mode) and its id there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId {
    address_space: u16,
    id: u16,
}

impl SlotId {
    /// Names slot `id` of `address_space`.
    pub const fn new(address_space: u16, id: u16) -> Self {
        Self { address_space, id }
    }

    /// Names the slot by KVM's number: the address space in the upper 16 bits, as in `kvm_userspace_memory_region.slot` and in ring
    /// entries.
    pub const fn from_raw(raw: u32) -> Self {
        Self::new((raw >> 16) as u16, raw as u16)
    }

    /// Returns KVM's number for the slot.
    pub const fn raw(self) -> u32 {
        (self.address_space as u32) << 16 | self.id as u32
    }

    /// Returns the address space.
    pub const fn address_space(self) -> u16 {
        self.address_space
    }

    /// Returns the id inside the address space.
    pub const fn id(self) -> u16 {
        self.id
    }
}

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.address_space, self.id)
    }
}
