// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The dirty bitmaps that KVM keeps of a VM's slots.

use core::ptr;
use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{kvm_clear_dirty_log, kvm_dirty_log};
use memmap2::{MmapOptions, MmapRaw};

use super::ioctl;
use crate::kernel::page_size;
use crate::slot_id::SlotId;
use crate::sync::{Mutex, lock};

/// Words of a bitmap that one call clears: those of 1 GiB in pages of 4 KiB. The call holds KVM's `mmu_lock`, kicks every vCPU
/// where there is page-modification logging, and flushes TLBs.
const CLEARED_WORDS: usize = 4096;

/// How a VM's bitmaps are read.
pub(super) struct Bitmaps {
    /// Whether a call of its own clears bits and protects their pages.
    manual: bool,
    buffer: Mutex<Option<Guarded>>,
}

impl Bitmaps {
    pub(super) fn new(manual: bool) -> Self {
        Self {
            manual,
            buffer: Mutex::new(None),
        }
    }

    /// See [`Kernel::take_bitmap`](crate::Kernel::take_bitmap).
    pub(super) fn take(
        &self,
        fd: &impl AsRawFd,
        slot: SlotId,
        pages: u64,
        words: &mut [u64],
    ) -> io::Result<()> {
        self.get(fd, slot, words)?;
        match self.manual {
            true => clear(fd, slot, pages, words),
            // KVM has cleared them, and protected their pages.
            false => Ok(()),
        }
    }

    /// See [`Kernel::read_bitmap`](crate::Kernel::read_bitmap).
    pub(super) fn read(
        &self,
        fd: &impl AsRawFd,
        slot: SlotId,
        words: &mut [u64],
    ) -> io::Result<()> {
        match self.manual {
            true => self.get(fd, slot, words),
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Calls `KVM_GET_DIRTY_LOG`, which clears the bits, unless a call of its own does.
    fn get(&self, fd: &impl AsRawFd, slot: SlotId, words: &mut [u64]) -> io::Result<()> {
        let mut buffer = lock(&self.buffer);
        let buffer = Guarded::fit(&mut buffer, words.len())?;
        let mut log = kvm_dirty_log {
            slot: slot.raw(),
            ..Default::default()
        };
        log.__bindgen_anon_1.dirty_bitmap = buffer.last(words.len()).cast();
        // SAFETY: KVM_GET_DIRTY_LOG takes such a request and writes as many bits as *its* slot has
        // pages, whatever size the log was given: into the buffer, and not beyond, where nobody may write.
        unsafe { ioctl::pointer(fd, ioctl::GET_DIRTY_LOG, &mut log)? };
        buffer.read(words);
        Ok(())
    }
}

/// Clears the bits that are set in `words`, and no others, and has their pages protected.
pub(super) fn clear(
    fd: &impl AsRawFd,
    slot: SlotId,
    pages: u64,
    words: &mut [u64],
) -> io::Result<()> {
    for (place, chunk) in words.chunks_mut(CLEARED_WORDS).enumerate() {
        let dirty = |word: &u64| *word != 0;
        let Some(first) = chunk.iter().position(dirty) else {
            continue;
        };
        let end = chunk.iter().rposition(dirty).map_or(first, |last| last + 1);
        // KVM takes a first page and a number of pages of whole words, except at the slot's end.
        let first_page = (place * CLEARED_WORDS + first) as u64 * 64;
        let num_pages = ((end - first) as u64 * 64).min(pages.saturating_sub(first_page));
        let mut log = kvm_clear_dirty_log {
            slot: slot.raw(),
            num_pages: num_pages as u32,
            first_page,
            ..Default::default()
        };
        log.__bindgen_anon_1.dirty_bitmap = chunk[first..end].as_mut_ptr().cast();
        // SAFETY: KVM_CLEAR_DIRTY_LOG takes such a request, and reads `num_pages` bits, padded to 64,
        // at the address in it, where there are as many.
        unsafe { ioctl::pointer(fd, ioctl::CLEAR_DIRTY_LOG, &mut log)? };
    }
    Ok(())
}

/// Memory for KVM to write to, with an inaccessible page behind it. If a slot is larger in KVM than in the log, KVM stops there
/// with EFAULT.
struct Guarded {
    map: MmapRaw,
    /// Bytes before that page.
    room: usize,
}

impl Guarded {
    /// Returns the buffer in `place`, or a new one if that has no room for `words` words.
    fn fit(place: &mut Option<Self>, words: usize) -> io::Result<&mut Self> {
        let fits = |buffer: &Self| buffer.room >= words * size_of::<u64>();
        let buffer = match place.take().filter(fits) {
            Some(buffer) => buffer,
            None => Self::new(words)?,
        };
        Ok(place.insert(buffer))
    }

    fn new(words: usize) -> io::Result<Self> {
        let room = (words * size_of::<u64>()).next_multiple_of(page_size());
        let map = MmapOptions::new().len(room + page_size()).map_anon()?;
        let map = MmapRaw::from(map);
        let guard = map.as_mut_ptr().wrapping_add(room);
        // SAFETY: the last page of a mapping of our own, to which there are no references.
        match unsafe { libc::mprotect(guard.cast(), page_size(), libc::PROT_NONE) } {
            0 => Ok(Self { map, room }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Returns the start of the last `words` words, for which there is room.
    fn last(&self, words: usize) -> *mut u64 {
        let start = self.room - words * size_of::<u64>();
        self.map.as_mut_ptr().wrapping_add(start).cast()
    }

    /// Copies the last words.
    fn read(&self, words: &mut [u64]) {
        let start = self.last(words.len());
        // SAFETY: so many words, aligned as the page behind them is, are ours until the drop, are
        // written by KVM only while it is called, and are not in `words`.
        unsafe { ptr::copy_nonoverlapping(start, words.as_mut_ptr(), words.len()) }
    }
}
