// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One entry of a dirty ring, and every ordering that the protocol with the kernel needs.

use kvm_bindings::KVM_DIRTY_GFN_F_MASK;

use crate::sync::{AtomicU32, Ordering, Plain, PlainU32, PlainU64};

// The two flags of `struct kvm_dirty_gfn` in the kernel's include/uapi/linux/kvm.h. kvm-bindings has only their mask, because
// bindgen does not translate the macros of the shifts.
const DIRTY: u32 = 1 << 0;
const RESET: u32 = 1 << 1;
const _: () = assert!(DIRTY | RESET == KVM_DIRTY_GFN_F_MASK);

/// A slot of an address space that no VM has (KVM has one or two of them).
pub(crate) const NO_SLOT: u32 = u32::MAX;

/// One entry of the ring that a vCPU shares with userspace: `struct kvm_dirty_gfn`.
///
/// Its life is a cycle of three states, kept in `flags`:
///
/// | state | set by | meaning |
/// |---|---|---|
/// | free | kernel, `kvm_dirty_gfn_set_invalid` | the kernel may fill it |
/// | dirty | kernel, `kvm_dirty_gfn_set_dirtied` | names a page that was written |
/// | reset | userspace | harvested; the next reset ioctl re-protects its page and frees it |
///
/// `slot` and `offset` belong to the kernel while the entry is free. The kernel reads them again at reset, to find the page to
/// protect. If userspace has made the entry void by then, it protects none.
#[repr(C)]
pub struct Entry {
    flags: AtomicU32,
    slot: PlainU32,
    offset: PlainU64,
}

#[cfg(not(all(test, feature = "modelled")))]
const _: () = {
    use core::mem::{align_of, offset_of, size_of};
    use kvm_bindings::kvm_dirty_gfn;
    assert!(size_of::<Entry>() == size_of::<kvm_dirty_gfn>());
    assert!(align_of::<Entry>() == align_of::<kvm_dirty_gfn>());
    assert!(offset_of!(Entry, flags) == offset_of!(kvm_dirty_gfn, flags));
    assert!(offset_of!(Entry, slot) == offset_of!(kvm_dirty_gfn, slot));
    assert!(offset_of!(Entry, offset) == offset_of!(kvm_dirty_gfn, offset));
};

impl Entry {
    /// Returns a free entry.
    pub(crate) fn free() -> Self {
        Self {
            flags: AtomicU32::new(0),
            slot: PlainU32::default(),
            offset: PlainU64::default(),
        }
    }

    /// Returns whether the entry names a written page that is not harvested yet.
    #[inline(always)]
    pub(crate) fn is_dirty(&self) -> bool {
        // Acquire: pairs with the write barrier before the flags in the kernel's
        // `kvm_dirty_gfn_set_dirtied` (virt/kvm/dirty_ring.c), so that the payload read after it
        // is the one that was pushed.
        self.flags.load(Ordering::Acquire) & (DIRTY | RESET) == DIRTY
    }

    /// Returns the payload: memslot (address space in the upper half) and page inside it. Only a dirty entry has one; the consumer
    /// reads it between `is_dirty` and `mark_reset`.
    #[inline(always)]
    pub(crate) fn payload(&self) -> (u32, u64) {
        (self.slot(), self.page())
    }

    /// Returns the first half of the payload.
    #[inline(always)]
    pub(crate) fn slot(&self) -> u32 {
        self.slot.load()
    }

    /// Returns the second half of the payload.
    #[inline(always)]
    pub(crate) fn page(&self) -> u64 {
        self.offset.load()
    }

    /// Makes the entry name no slot, between `is_dirty` and `mark_reset`. The kernel reads the payload again at the reset, recycles the
    /// entry, and leaves its page writable (`kvm_reset_dirty_gfn` returns for an address space that no VM has). A kernel that
    /// ignores the change protects the page all the same, so nothing may depend on it.
    #[inline(always)]
    pub(crate) fn void(&self) {
        self.slot.store(NO_SLOT);
    }

    /// Marks the entry for reset: the kernel may protect its page again and refill the entry.
    #[inline(always)]
    pub(crate) fn mark_reset(&self) {
        // Release: pairs with the acquire load in the kernel's `kvm_dirty_gfn_harvested`. So the payload was read before the kernel can
        // overwrite it, and the kernel sees that it was made void.
        self.flags.store(RESET, Ordering::Release);
    }

    /// Returns whether the kernel may fill the entry.
    #[inline]
    pub(crate) fn is_free(&self) -> bool {
        // Acquire: pairs with the kernel's release store in `kvm_dirty_gfn_set_invalid`. A thread that sees an entry recycled also
        // sees that the consumer's head is beyond it.
        self.flags.load(Ordering::Acquire) & (DIRTY | RESET) == 0
    }

    /// Returns whether the entry is harvested and not yet recycled.
    #[inline]
    pub(crate) fn awaits_reset(&self) -> bool {
        // Acquire: pairs with the kernel's release store in `kvm_dirty_gfn_set_invalid`.
        self.flags.load(Ordering::Acquire) & RESET != 0
    }
}

/// The kernel's side of an entry, for the simulated kernel and the models.
#[cfg(any(test, feature = "test-utils"))]
impl Entry {
    /// `kvm_dirty_ring_push`: payload, barrier, flags.
    pub(crate) fn push(&self, slot: u32, offset: u64) {
        self.slot.store(slot);
        self.offset.store(offset);
        // Release: pairs with the acquire load in `is_dirty`.
        self.flags.store(DIRTY, Ordering::Release);
    }

    /// The body of the loop of `kvm_dirty_ring_reset`. Returns the payload of a harvested entry, which is free from then on, or `None`
    /// where the loop ends.
    pub(crate) fn recycle(&self) -> Option<(u32, u64)> {
        // Acquire: pairs with the release store in `mark_reset`.
        if self.flags.load(Ordering::Acquire) & RESET == 0 {
            return None;
        }
        let payload = self.payload();
        // Release: pairs with the acquire loads of the consumer.
        self.flags.store(0, Ordering::Release);
        Some(payload)
    }
}
