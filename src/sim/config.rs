//! How a simulated machine is made, and what it can be made to do wrong.

use crate::kernel::{Mode, RESERVED_ENTRIES};

/// How a simulated machine is made.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SimConfig {
    /// Entries of each ring: a power of two.
    pub ring_entries: u32,
    /// Entries in reserve: a vCPU stops that many before its ring's end.
    pub reserved: u32,
    /// What it says of that number, which the log takes for likely; none: the truth. Kernels tell nobody, and the next may
    /// keep more than those before.
    pub reported_reserve: Option<u32>,
    /// Entries of each vCPU's hardware buffer (Intel's page-modification logging has 512), whose
    /// pages reach the ring late: when it is full, or when the vCPU leaves the guest. Zero: none.
    pub pml: usize,
    /// Index at which rings start, to reach the wrap at 2^32.
    pub first_index: u32,
    /// How it logs what vCPUs write. In [`Mode::Bitmap`] their rings stay empty.
    pub mode: Mode,
    /// Whether a reset protects a batch from its first page to its last, as on arm64, and not just the pages that
    /// its entries name, as on x86.
    pub protects_spans: bool,
    /// Whether there are bitmaps beside rings, for [what the kernel writes](super::SimVm::kernel_write).
    pub with_bitmap: bool,
    /// Whether a reset protects the page that was logged, whatever userspace has made of the entry since: as no kernel does
    /// by now.
    pub ignores_voids: bool,
    /// Whether bitmaps can be read without being cleared.
    pub manual_protect: bool,
}

impl Default for SimConfig {
    /// Rings of 4,096 entries, 64 of them in reserve, no hardware buffer, no bitmaps, but with manual protection of them.
    fn default() -> Self {
        Self {
            ring_entries: 4096,
            reserved: RESERVED_ENTRIES,
            reported_reserve: None,
            pml: 0,
            first_index: 0,
            mode: Mode::Rings,
            protects_spans: false,
            with_bitmap: false,
            ignores_voids: false,
            manual_protect: true,
        }
    }
}

/// The reading of a slot's bitmap that fails half-way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapFault {
    /// Bits that it takes, if there are as many.
    pub after: u64,
    /// The error number that it fails with then.
    pub error: i32,
}

/// Something that a reset does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResetFault {
    /// It stops after so many entries, if there are more, as with a signal pending: the last of
    /// them, up to 64, are recycled and their pages not armed, and the count is only of what was
    /// recycled.
    Short {
        /// Entries recycled.
        after: u32,
    },
    /// The thread is stopped after the last entry: all are recycled, and the count is whole; those of
    /// them that end the last ring, within 64 pages, are not armed.
    AtEnd,
    /// It fails with this error number and does nothing.
    Error(i32),
}

/// A moment inside a reset, or the reading of a bitmap, at which a test may let the guest write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResetPhase {
    /// Nothing is recycled yet, no bit is taken.
    Begin,
    /// All entries are free again, or all bits taken; no page is armed yet: writes to them are still
    /// silent.
    Recycled,
}
