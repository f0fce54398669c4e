// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The settings of a simulated machine, and its faults.

use crate::kernel::{Mode, RESERVED_ENTRIES};

/// The settings of a simulated machine.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SimConfig {
    /// Entries of each ring: a power of two.
    pub ring_entries: u32,
    /// Entries in reserve: a vCPU stops that many before its ring's end.
    pub reserved: u32,
    /// The reserve that the machine reports, which the log assumes; `None` for the true one. Real kernels do not report it, and later
    /// ones may keep more.
    pub reported_reserve: Option<u32>,
    /// Entries of each vCPU's hardware buffer; Intel's page-modification logging has 512. Its pages reach the ring late: when it is
    /// full, or when the vCPU leaves the guest. Zero for no buffer.
    pub pml: usize,
    /// Index at which rings start, to reach the wrap at 2^32.
    pub first_index: u32,
    /// How the machine logs what vCPUs write. In [`Mode::Bitmap`] their rings stay empty.
    pub mode: Mode,
    /// Whether a reset protects a batch from its first page to its last, as on arm64, or only the pages that its entries name, as
    /// on x86.
    pub protects_spans: bool,
    /// Whether there are bitmaps beside rings, for [writes of the kernel](super::SimVm::kernel_write).
    pub with_bitmap: bool,
    /// Whether a reset protects the page that was logged, even if userspace has changed the entry since. No kernel does so yet.
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

/// A fault in reading a slot's bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapFault {
    /// Bits that are read before it fails, if there are as many.
    pub after: u64,
    /// The error number.
    pub error: i32,
}

/// A fault in a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResetFault {
    /// It stops after so many entries, if there are more, as with a signal pending. The last of them, up to 64, are recycled and their
    /// pages not armed. The count is of recycled entries only.
    Short {
        /// Entries recycled.
        after: u32,
    },
    /// The thread is stopped after the last entry. All entries are recycled, and the count is complete, but those that end the last
    /// ring, within 64 pages, are not armed.
    AtEnd,
    /// It fails with this error number and does nothing.
    Error(i32),
}

/// A moment inside a reset, or the reading of a bitmap, at which a test may let the guest write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResetPhase {
    /// Nothing is recycled yet, and no bit is taken.
    Begin,
    /// All entries are free again, or all bits taken. No page is armed yet, so writes to them are still silent.
    Recycled,
}
