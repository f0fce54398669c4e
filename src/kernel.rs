//! What the crate needs of a kernel.

use core::fmt;
use std::io;

use crate::slot_id::SlotId;

/// Entries that every kernel keeps in reserve (`KVM_DIRTY_RING_RSVD_ENTRIES` in the kernel's
/// include/linux/kvm_dirty_ring.h).
pub(crate) const RESERVED_ENTRIES: u32 = 64;

/// The host's page size, in bytes.
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

/// What a reset has done, see [`Kernel::reset`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recycled {
    /// Entries that it recycled.
    pub entries: u32,
    /// Whether the calling thread may have been stopped during the call, by what nobody can block:
    /// SIGSTOP, a debugger, the freezer. It may be set for a call that was not.
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
    /// Recycles the harvested entries of every ring of the VM and re-protects their pages: the
    /// ioctl `KVM_RESET_DIRTY_RINGS`.
    ///
    /// When it has returned, every entry that was marked for reset before it was called is
    /// recycled and its page is write-protected, on every vCPU: unless the count falls short of
    /// what was marked. Then the kernel stopped half-way, and up to one batch of the recycled
    /// entries' pages is *not* protected. Interrupted at its very end, it may leave the last batch so
    /// though the count is whole: entries side by side in one ring, whose pages are of one slot and
    /// within 64 of each other.
    ///
    /// # Errors
    /// The call was refused, and no entry was recycled.
    fn reset(&self) -> io::Result<Recycled>;

    /// How many entries of each ring the kernel is likely to keep in reserve: a vCPU stops with
    /// *ring full* that many before the end. Only a prior; the log learns the true number. But a kernel
    /// that leaves fewer entries free than half of the least of these counts as one that overruns the ring: this
    /// number, 64, and a 32nd of the ring.
    fn reserved_entries(&self) -> u32 {
        RESERVED_ENTRIES
    }

    /// How it logs what vCPUs write.
    fn mode(&self) -> Mode {
        Mode::Rings
    }

    /// Whether it keeps bits of its own: of all writes without rings, of those that no vCPU made
    /// beside them.
    fn has_bitmap(&self) -> bool {
        self.mode() == Mode::Bitmap
    }

    /// Moves the kernel's own bits of the dirty pages of `slot`, which is to have `pages` pages, into
    /// `words`, which are zero: page p is bit p % 64 of word p / 64. The log calls it once at a time.
    ///
    /// When it has returned, well or with an error, every page whose bit it took from the kernel is in
    /// `words`, and is write-protected again, on every vCPU. More pages than that may be there.
    ///
    /// # Errors
    /// Not all bits were taken: those in `words` count, the kernel still has the others. But with
    /// ENOENT (it has no bits of the slot), EFAULT (they are more than fit) and EINVAL (its slot has another
    /// size, or there can be none of that id) they may be gone, and every page is taken for dirty: as
    /// without an error where bits past the slot's end are set.
    fn take_bitmap(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> io::Result<()> {
        let _ = (slot, pages, words);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// As [`take_bitmap`](Self::take_bitmap), but leaves the kernel its bits, and the pages as they are: `KVM_GET_DIRTY_LOG` with
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    ///
    /// # Errors
    /// As there; [`io::ErrorKind::Unsupported`] where bits can't be read but by taking them.
    fn read_bitmap(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> io::Result<()> {
        let _ = (slot, pages, words);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Clears those of the kernel's bits of `slot` that are set in `words`, and write-protects their pages on every vCPU:
    /// `KVM_CLEAR_DIRTY_LOG`. For kernels that have [`read_bitmap`](Self::read_bitmap).
    ///
    /// # Errors
    /// Some bits may be cleared, and their pages protected; the others are as they were.
    fn clear_bitmap(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> io::Result<()> {
        let _ = (slot, pages, words);
        Err(io::ErrorKind::Unsupported.into())
    }
}
