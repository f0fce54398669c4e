// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the crate needs from a kernel.

use core::fmt;
use std::io;

use crate::slot_id::SlotId;

/// Entries that every kernel keeps in reserve (`KVM_DIRTY_RING_RSVD_ENTRIES` in the kernel's
/// include/linux/kvm_dirty_ring.h).
pub(crate) const RESERVED_ENTRIES: u32 = 64;

/// Returns the host's base page size, in bytes.
#[cfg(not(all(test, feature = "modelled")))]
pub(crate) fn page_size() -> usize {
    // SAFETY: sysconf reads a number; this one always exists.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// How the kernel logs what vCPUs write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mode {
    /// Into one ring for each vCPU.
    Rings,
    /// Into one bitmap for each slot.
    Bitmap,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rings => "rings",
            Self::Bitmap => "bitmap",
        })
    }
}

/// The result of a reset, see [`Kernel::reset`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recycled {
    /// Entries that the reset recycled.
    pub entries: u32,
    /// Whether the calling thread may have been stopped during the call, by SIGSTOP, a debugger or the freezer, which no thread can
    /// block. It may be true for a call that was not interrupted.
    pub interrupted: bool,
}

impl From<u32> for Recycled {
    /// So many entries, by a call that nothing interrupted.
    fn from(entries: u32) -> Self {
        Self {
            entries,
            interrupted: false,
        }
    }
}

/// The kernel behind a [`DirtyLog`](crate::DirtyLog): KVM, or the simulated one.
pub trait Kernel: Send + Sync {
    /// Recycles the marked entries of every ring of the VM and write-protects their pages again: the ioctl
    /// `KVM_RESET_DIRTY_RINGS`.
    ///
    /// On return, every entry that was marked for reset before the call is recycled, and its page is write-protected on every vCPU.
    /// There are two exceptions. If the count falls short of what was marked, the kernel stopped half-way, and up to one batch of the
    /// recycled entries' pages is *not* protected. If the call was interrupted at its very end, the last batch may be unprotected
    /// although the count is complete. A batch is a series of entries side by side in one ring, whose pages are of one slot and
    /// within 64 of each other.
    ///
    /// # Errors
    /// The call was refused, and no entry was recycled.
    fn reset(&self) -> io::Result<Recycled>;

    /// Returns how many entries of each ring the kernel is likely to keep in reserve; a vCPU stops with *ring full* that many before
    /// the end. It is an estimate; the log learns the true number. A kernel counts as one that overruns the ring if it leaves
    /// fewer entries free than half of the least of this number, 64, and a 32nd of the ring.
    fn reserved_entries(&self) -> u32 {
        RESERVED_ENTRIES
    }

    /// Has the kernel protect a slot's pages when the slot's log is switched on: `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` without
    /// `KVM_DIRTY_LOG_INITIALLY_SET`, which some part of the VMM may have enabled. With that flag the first write to each page that is mapped
    /// reaches no ring. The log makes this call before each such switch. With bitmaps alone there is nothing to do, as all bits are set
    /// then.
    ///
    /// # Errors
    /// The call was refused; the slot's log must not be switched on.
    fn switch_initially_set_off(&self) -> io::Result<()> {
        Ok(())
    }

    /// Returns how the kernel logs what vCPUs write.
    fn mode(&self) -> Mode {
        Mode::Rings
    }

    /// Returns whether the kernel keeps bits of its own: of all writes in bitmap mode; beside rings, of those that no vCPU made.
    fn has_bitmap(&self) -> bool {
        self.mode() == Mode::Bitmap
    }

    /// Moves the kernel's own bits of the dirty pages of `slot`, which should have `pages` pages, into `words`, which are zero. Page p
    /// is bit p % 64 of word p / 64. The log makes one such call at a time.
    ///
    /// On return, with or without an error, every page whose bit was taken from the kernel is in `words` and is write-protected again
    /// on every vCPU. `words` may have more pages than that.
    ///
    /// # Errors
    /// Not all bits were taken. Those in `words` count, and the kernel still has the others. With ENOENT (it has no bits of the
    /// slot), EFAULT (there are more than fit) and EINVAL (its slot has another size, or no slot can have that id) they may be
    /// gone, so every page counts as dirty; the same holds without an error where bits past the slot's end are set.
    fn take_bitmap(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> io::Result<()> {
        let _ = (slot, pages, words);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Reads the bits as [`take_bitmap`](Self::take_bitmap) does, but leaves them in the kernel and the pages unprotected:
    /// `KVM_GET_DIRTY_LOG` with `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    ///
    /// # Errors
    /// As there; [`io::ErrorKind::Unsupported`] if the kernel can only read bits by taking them.
    fn read_bitmap(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> io::Result<()> {
        let _ = (slot, pages, words);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Clears those of the kernel's bits of `slot` that are set in `words`, and write-protects their pages on every vCPU:
    /// `KVM_CLEAR_DIRTY_LOG`. For kernels that have [`read_bitmap`](Self::read_bitmap).
    ///
    /// # Errors
    /// Some bits may be cleared, and their pages protected; the others are unchanged.
    fn clear_bitmap(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> io::Result<()> {
        let _ = (slot, pages, words);
        Err(io::ErrorKind::Unsupported.into())
    }
}
