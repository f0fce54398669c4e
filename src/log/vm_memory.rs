// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest memory of the crate `vm-memory` that marks its own writes (feature `vm-memory`).
//!
//! `GuestMemoryMmap<RegionBitmap>` marks what the VMM and its devices write through it, in the same bits as
//! [`DirtyLog::mark_dirty`]. A region collects marks from its creation; the slot that adopts it has them, too.
//!
//! ```
//! use kvm_dirty_ring::vm_memory::RegionBitmap;
//! use kvm_dirty_ring::{DirtyPages, GuestMap, GuestRegion, SlotId};
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
//! # use kvm_dirty_ring::sim::{SimConfig, SimVm};
//! # let log = SimVm::new(SimConfig::default()).dirty_log();
//!
//! let ranges = [(GuestAddress(0), 16 << 20), (GuestAddress(4 << 30), 16 << 20)];
//! let memory = GuestMemoryMmap::<RegionBitmap>::from_ranges(&ranges)?;
//! let mut regions = Vec::new();
//! for (id, region) in (0..).zip(memory.iter()) {
//!     let slot = SlotId::new(0, id);
//!     let bitmap = region.bitmap();
//!     log.add_slot_with(slot, bitmap.region())?; // then KVM_SET_USER_MEMORY_REGION
//!     let (address, pages) = (region.start_addr().0, bitmap.region().pages());
//!     regions.push(GuestRegion { slot, address, pages });
//! }
//! let map = GuestMap::new(regions)?;
//!
//! // A device:
//! memory.write_obj(7u32, GuestAddress((4 << 30) + 20))?;
//!
//! // The migration:
//! let mut dirty = DirtyPages::new();
//! log.sync(&mut dirty)?;
//! assert!(dirty.contains(SlotId::new(0, 1), 0));
//! for run in dirty.runs() {
//!     let slice = map.slice(&memory, run)?;
//!     let mut bytes = vec![0u8; slice.len()];
//!     slice.copy_to(&mut bytes);
//!     assert_eq!(bytes[20], 7);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is tracked
//!
//! vm-memory's methods that write mark the pages *after* the write, as [`DirtyLog::mark_dirty`] requires: those of `Bytes` at every
//! level, `VolatileSlice::copy_from` and `copy_to_volatile_slice`, `VolatileRef::store`, the same of `VolatileArrayRef`, and reads
//! from files and sockets into memory. A test checks the version in use.
//!
//! Methods that return a pointer or a reference mark nothing: `ptr_guard_mut`, `get_host_address`, `as_ptr`, `get_atomic_ref`,
//! `aligned_as_mut`. Mark such a write yourself, by `Bitmap::mark_dirty` of the slice or by [`DirtyLog::mark_dirty`]. Do the same
//! for what the kernel writes on the VMM's behalf (`io_uring`, vhost), and in a `ReadVolatile` of your own.
//!
//! Import from this crate by name: with `use kvm_dirty_ring::*` this module hides the crate of the same name.
//!
//! # Versions of vm-memory
//!
//! It is for vm-memory 0.18, and for 0.17 from 0.17.2 on, which has the types of 0.18 under its own names. Types of 0.17.1 and
//! before are others, and the trait that [`GuestMap::slice`] takes had another name. A range of versions would not help: cargo
//! takes its newest, whichever one the VMM has.

use core::fmt;

use ::vm_memory::bitmap::{Bitmap, BitmapSlice, MS, NewBitmap, WithBitmapSlice};
use ::vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileSlice};

use super::DirtyLog;
use crate::bitmap::shared::SharedBits;
use crate::error::SlotError;
use crate::kernel::page_size;
use crate::slot_id::{MAX_SLOT_PAGES, SlotId};
use crate::slots::dirty_part::Run;
use crate::slots::guest_map::GuestMap;
use crate::sync::Arc;

/// The pages of one region that were written through vm-memory. Clones share them.
///
/// It collects marks until [`DirtyLog::add_slot_with`] gives it to a slot. A region's last page counts as one even if it is not
/// whole. Marks past the region's end are ignored.
#[derive(Clone, Default)]
pub struct RegionBitmap {
    pages: u64,
    /// `None` if there is no memory for them, or no slot can have so many pages. Then no slot takes it.
    bits: Option<Arc<SharedBits>>,
}

impl RegionBitmap {
    /// Returns the number of pages in the region.
    pub fn pages(&self) -> u64 {
        self.pages
    }
}

impl NewBitmap for RegionBitmap {
    fn with_len(len: usize) -> Self {
        let pages = len.div_ceil(page_size()) as u64;
        let bits = (pages <= MAX_SLOT_PAGES).then(|| SharedBits::new(pages));
        Self {
            pages,
            bits: bits.flatten().map(Arc::new),
        }
    }
}

impl<'a> WithBitmapSlice<'a> for RegionBitmap {
    type S = RegionSlice<'a>;
}

impl Bitmap for RegionBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let end = offset.saturating_add(len).div_ceil(page_size()) as u64;
        let first = (offset / page_size()) as u64;
        let end = end.min(self.pages);
        if let (Some(bits), true) = (&self.bits, len > 0 && first < end) {
            bits.set(first, end - first);
        }
    }

    /// Returns whether the page was marked since a sync last took the marks, even one that failed. Pages that vCPUs write are marked
    /// only where the kernel has bitmaps, when these are read.
    fn dirty_at(&self, offset: usize) -> bool {
        let page = (offset / page_size()) as u64;
        let contains = |bits: &Arc<SharedBits>| page < self.pages && bits.contains(page);
        self.bits.as_ref().is_some_and(contains)
    }

    fn slice_at(&self, offset: usize) -> RegionSlice<'_> {
        RegionSlice {
            region: self,
            offset,
        }
    }
}

impl fmt::Debug for RegionBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegionBitmap")
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

/// A region's bitmap, from an offset on.
#[derive(Debug, Clone, Copy)]
pub struct RegionSlice<'a> {
    region: &'a RegionBitmap,
    offset: usize,
}

impl<'a> RegionSlice<'a> {
    /// Returns the bitmap of the whole region.
    pub fn region(&self) -> &'a RegionBitmap {
        self.region
    }
}

impl WithBitmapSlice<'_> for RegionSlice<'_> {
    type S = Self;
}

impl BitmapSlice for RegionSlice<'_> {}

impl Bitmap for RegionSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.region
            .mark_dirty(self.offset.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.region.dirty_at(self.offset.saturating_add(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            region: self.region,
            offset: self.offset.saturating_add(offset),
        }
    }
}

impl DirtyLog {
    /// Tracks a slot whose memory is one region of vm-memory, as [`add_slot`](Self::add_slot) does.
    ///
    /// The slot has the region's pages, and writes to the region are reported as the slot's. The first sync also
    /// reports what was written before this call.
    ///
    /// A bitmap belongs to one slot of one log at a time. When the slot's removal is [finished](Self::finish_slot), another may get the
    /// bitmap, with what was written in between. It waits for a sync under way.
    ///
    /// # Errors
    /// As [`add_slot`](Self::add_slot), and [`SlotError::BitmapInUse`] if a slot of this log has the bitmap.
    pub fn add_slot_with(&self, slot: SlotId, bitmap: &RegionBitmap) -> Result<(), SlotError> {
        let pages = bitmap.pages;
        match &bitmap.bits {
            Some(bits) => self.add_slot_on(slot, pages, bits),
            None if pages > 0 && pages <= MAX_SLOT_PAGES => {
                Err(SlotError::NoMemory { slot, pages })
            }
            None => Err(SlotError::Pages { slot, pages }),
        }
    }
}

impl GuestMap {
    /// Returns the memory of a run of pages, for reading.
    ///
    /// # Errors
    /// The pages are not all in one region, of the map or of `memory`.
    pub fn slice<'a, M: GuestMemoryBackend>(
        &self,
        memory: &'a M,
        run: Run,
    ) -> Result<VolatileSlice<'a, MS<'a, M>>, GuestMemoryError> {
        let range = self.range(run);
        let range = range.ok_or(GuestMemoryError::InvalidBackendAddress)?;
        let bytes = range.end - range.start;
        memory.get_slice(GuestAddress(range.start), bytes as usize)
    }
}
