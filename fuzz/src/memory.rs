// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A ring's memory as bytes of our own.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_dirty_ring::ring::{Entry, RingMemory};

/// The kernel has filled the entry.
pub const DIRTY: u32 = 1;
/// It is harvested, and waits for its reset.
pub const RESET: u32 = 2;

/// What an entry holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cell {
    /// Its state, in the lowest two bits.
    pub flags: u32,
    /// The memslot, as KVM calls it.
    pub slot: u32,
    /// The page.
    pub offset: u64,
}

impl Cell {
    /// Whether the entry is to be harvested.
    pub fn is_dirty(&self) -> bool {
        self.flags & (DIRTY | RESET) == DIRTY
    }
}

/// `struct kvm_dirty_gfn`, as `Entry` is.
#[repr(C, align(8))]
#[derive(Default)]
struct Raw {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

const _: () = assert!(size_of::<Raw>() == size_of::<Entry>());
const _: () = assert!(align_of::<Raw>() >= align_of::<Entry>());

/// The memory of one ring, in which anything may be written at any time.
#[derive(Clone)]
pub struct RawRing {
    entries: Arc<[Raw]>,
}

impl RawRing {
    /// `entries` free entries: a power of two.
    pub fn new(entries: u32) -> Self {
        let entries = (0..entries).map(|_| Raw::default()).collect();
        Self { entries }
    }

    /// The same memory for a log.
    pub fn memory(&self) -> RingMemory {
        let start = NonNull::from(&self.entries[..]).cast::<Entry>();
        let owner = Box::new(Arc::clone(&self.entries));
        // SAFETY: the owner keeps the entries, whose size and alignment are an `Entry`'s, every bit
        // pattern being one; everybody accesses them by atomics of the same widths.
        unsafe { RingMemory::new(start, self.entries.len() as u32, owner) }
    }

    fn raw(&self, index: u32) -> &Raw {
        &self.entries[index as usize % self.entries.len()]
    }

    /// The entry at `index`, which wraps.
    pub fn get(&self, index: u32) -> Cell {
        let raw = self.raw(index);
        // Relaxed, here and below: there is one thread.
        Cell {
            flags: raw.flags.load(Ordering::Relaxed),
            slot: raw.slot.load(Ordering::Relaxed),
            offset: raw.offset.load(Ordering::Relaxed),
        }
    }

    /// Overwrites the entry at `index`, which wraps.
    pub fn set(&self, index: u32, cell: Cell) {
        let raw = self.raw(index);
        raw.slot.store(cell.slot, Ordering::Relaxed);
        raw.offset.store(cell.offset, Ordering::Relaxed);
        raw.flags.store(cell.flags, Ordering::Relaxed);
    }
}
