//! What the crate needs of a kernel.

use std::io;

/// Entries that every kernel keeps in reserve (`KVM_DIRTY_RING_RSVD_ENTRIES` in the kernel's
/// include/linux/kvm_dirty_ring.h).
pub(crate) const RESERVED_ENTRIES: u32 = 64;

/// The kernel behind a [`DirtyLog`](crate::DirtyLog): KVM, or the simulated one.
pub trait Kernel: Send + Sync {
    /// Recycles the harvested entries of every ring of the VM and re-protects their pages: the
    /// ioctl `KVM_RESET_DIRTY_RINGS`. Returns how many entries it recycled.
    ///
    /// When it has returned, every entry that was marked for reset before it was called is
    /// recycled and its page is write-protected, on every vCPU: unless the count falls short of
    /// what was marked. Then the kernel stopped half-way, and up to one batch of the recycled
    /// entries' pages is *not* protected.
    ///
    /// # Errors
    /// The call was refused, and no entry was recycled.
    fn reset(&self) -> io::Result<u32>;

    /// How many entries of each ring the kernel is likely to keep in reserve: a vCPU stops with
    /// *ring full* that many before the end. Only a prior; the log learns the true number.
    fn reserved_entries(&self) -> u32 {
        RESERVED_ENTRIES
    }
}
