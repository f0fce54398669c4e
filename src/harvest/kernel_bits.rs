// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reading the bits that the kernel itself keeps of dirty pages.

use core::ops::Range;
use std::io;

use crate::bitmap::pages::PageBits;
use crate::bitmap::words::{masks, words_for};
use crate::error::BitmapError;
use crate::kernel::Kernel;
use crate::slots::table::Slot;
use crate::slots::working_set::Terms;
use crate::sync::{Arc, Counter, Mutex, MutexGuard, lock, zeroed};

/// The right to take the kernel's bits, held by one thread at a time, and the room for them.
#[derive(Default)]
pub(crate) struct KernelBits {
    /// Zeroes, except while a thread takes bits.
    words: Mutex<Box<[u64]>>,
    /// Times that the kernel had no bitmap of a slot.
    pub(crate) missing: Counter,
}

impl KernelBits {
    /// Waits until the bits that another thread has taken are where a sync finds them. Until then they are neither there nor in the
    /// kernel.
    pub(crate) fn lock(&self) -> Taking<'_> {
        Taking {
            words: lock(&self.words),
            missing: &self.missing,
        }
    }
}

/// The right to take bits.
pub(crate) struct Taking<'a> {
    words: MutexGuard<'a, Box<[u64]>>,
    missing: &'a Counter,
}

impl Taking<'_> {
    /// Makes room for the bits of `pages` pages. Returns false if there is no memory for it.
    pub(crate) fn fit(&mut self, pages: u64) -> bool {
        let len = words_for(pages);
        if self.words.len() < len {
            match zeroed(len) {
                Some(words) => *self.words = words,
                None => return false,
            }
        }
        true
    }

    /// Moves the kernel's bits of `slot`, for which there is room, to its device bits, once their pages are protected again, even if the
    /// kernel failed half-way.
    ///
    /// If the kernel has no bits, or has the slot in another size, every page is dirty, and once more when it has bits again: writes
    /// before that are in no bitmap. Exception: a slot whose removal has begun need not have any bits.
    pub(crate) fn take(
        &mut self,
        kernel: &dyn Kernel,
        slot: &Slot,
        retired: bool,
    ) -> Result<(), BitmapError> {
        slot.members().forget_cleared();
        self.take_by(slot, retired, |words| {
            kernel.take_bitmap(slot.id(), slot.pages(), words)
        })
    }

    /// The same, but leaves the bits of pages that stay open: of members, and of pages that were cleared the time before, which join.
    /// Where the kernel cannot leave bits, all are taken.
    pub(crate) fn take_but_members(
        &mut self,
        kernel: &dyn Kernel,
        slot: &Slot,
        terms: &Terms,
    ) -> Result<(), BitmapError> {
        let (id, pages) = (slot.id(), slot.pages());
        self.take_by(slot, false, |words| {
            match kernel.read_bitmap(id, pages, words) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    return kernel.take_bitmap(id, pages, words);
                }
                read => read?,
            }
            // Bits past the slot's end are handled below; the kernel would refuse to clear them.
            let is_larger = has_more(words, pages);
            if is_larger {
                return Ok(());
            }
            // Joined before the others are cleared: if that fails, they stay open and are reported all the same.
            slot.members()
                .keep(words, |joining| terms.lets_join(joining));
            kernel.clear_bitmap(id, pages, words)?;
            slot.members().note_cleared(words);
            Ok(())
        })
    }

    fn take_by(
        &mut self,
        slot: &Slot,
        retired: bool,
        take: impl FnOnce(&mut [u64]) -> io::Result<()>,
    ) -> Result<(), BitmapError> {
        let words = &mut self.words[..words_for(slot.pages())];
        let found = Found { words, slot };
        let taken = take(found.words);
        let is_larger = has_more(found.words, slot.pages());
        drop(found);
        let is_missing = match taken {
            Ok(()) => is_larger,
            Err(source) => match source.raw_os_error() {
                Some(libc::ENOENT) if retired => {
                    // The removal may still be cancelled.
                    slot.note_missing(true);
                    return Ok(());
                }
                Some(libc::ENOENT | libc::EFAULT | libc::EINVAL) => true,
                _ => return Err(failed(slot, source)),
            },
        };
        self.missing.add(is_missing.into());
        if slot.note_missing(is_missing) || is_missing {
            slot.device().set(0, slot.pages());
        }
        Ok(())
    }

    /// Adds the kernel's bits of `slot`, for which there is room, to `into`, and leaves them in the kernel. All are set where the
    /// kernel has none, or had none at the last attempt. If it cannot leave them, they go to the device bits, as in
    /// [`take`](Self::take).
    pub(crate) fn copy(
        &mut self,
        kernel: &dyn Kernel,
        slot: &Slot,
        retired: bool,
        into: &mut PageBits,
    ) -> Result<(), BitmapError> {
        let words = &mut self.words[..words_for(slot.pages())];
        let read = kernel.read_bitmap(slot.id(), slot.pages(), words);
        let is_larger = has_more(words, slot.pages());
        for (word, mask) in masks(0, slot.pages()) {
            let bits = core::mem::take(&mut words[word]) & mask;
            if bits != 0 {
                into.merge(word, bits);
            }
        }
        let is_missing = match read {
            Ok(()) => is_larger || slot.is_missing(),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                return self.take(kernel, slot, retired);
            }
            Err(source) => match source.raw_os_error() {
                Some(libc::ENOENT) if retired => false,
                Some(libc::ENOENT | libc::EFAULT | libc::EINVAL) => true,
                _ => return Err(failed(slot, source)),
            },
        };
        if is_missing {
            into.fill();
        }
        Ok(())
    }

    /// Adds the kernel's bits of `slot`, for which there is room, to `into`, and leaves them in the kernel, except those of pages that
    /// stay open, as in [`take_but_members`](Self::take_but_members). If they cannot be left, or make no sense, they are
    /// [taken](Self::take).
    pub(crate) fn find(
        &mut self,
        kernel: &dyn Kernel,
        slot: &Slot,
        retired: bool,
        terms: &Terms,
        into: &mut PageBits,
    ) -> Result<(), BitmapError> {
        let pages = slot.pages();
        let words = &mut self.words[..words_for(pages)];
        let read = kernel.read_bitmap(slot.id(), pages, words);
        if read.is_err() || has_more(words, pages) || slot.is_missing() {
            words.fill(0);
            return self.take(kernel, slot, retired);
        }
        if !retired && terms.may_join() {
            slot.members()
                .keep(words, |joining| terms.lets_join(joining));
        } else {
            slot.members().forget_cleared();
        }
        for (word, bits) in words.iter_mut().enumerate() {
            let bits = core::mem::take(bits);
            if bits != 0 {
                into.merge(word, bits);
            }
        }
        Ok(())
    }

    /// Has the kernel clear those of its bits of `slot`, for which there is room, that are set in `bits`, in these words.
    pub(crate) fn protect(
        &mut self,
        kernel: &dyn Kernel,
        slot: &Slot,
        retired: bool,
        bits: &PageBits,
        range: Range<usize>,
    ) -> Result<(), BitmapError> {
        if bits
            .next_word(range.start)
            .is_none_or(|word| word >= range.end)
        {
            return Ok(());
        }
        let words = &mut self.words[..words_for(slot.pages())];
        words[range.clone()].copy_from_slice(&bits.words()[range.clone()]);
        let cleared = kernel.clear_bitmap(slot.id(), slot.pages(), words);
        if cleared.is_ok() {
            slot.members().note_cleared(words);
        }
        words[range].fill(0);
        match cleared {
            // The slot is deleted already, so nothing writes to it.
            Err(error) if retired && error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            cleared => cleared.map_err(|source| failed(slot, source)),
        }
    }

    /// Has the kernel clear the bits of the members of `slot`, for which there is room.
    pub(crate) fn close_members(
        &mut self,
        kernel: &dyn Kernel,
        slot: &Slot,
    ) -> Result<(), BitmapError> {
        let words = &mut self.words[..words_for(slot.pages())];
        slot.members().copy_to_words(words);
        let cleared = kernel.clear_bitmap(slot.id(), slot.pages(), words);
        words.fill(0);
        cleared.map_err(|source| failed(slot, source))
    }
}

fn failed(slot: &Slot, source: io::Error) -> BitmapError {
    BitmapError {
        slot: slot.id(),
        source: Arc::new(source),
    }
}

/// Returns whether there are bits past the end of a slot of `pages` pages: the kernel's slot is larger.
fn has_more(words: &[u64], pages: u64) -> bool {
    let in_last = pages % u64::from(u64::BITS);
    let last = words.last().copied().unwrap_or(0);
    in_last > 0 && last >> in_last > 0
}

/// Bits on their way to the device bits of their slot, where they go when this is dropped, by unwinding, too.
struct Found<'a> {
    words: &'a mut [u64],
    slot: &'a Slot,
}

impl Drop for Found<'_> {
    fn drop(&mut self) {
        for (word, mask) in masks(0, self.slot.pages()) {
            let bits = core::mem::take(&mut self.words[word]) & mask;
            if bits != 0 {
                self.slot.device().merge(word, bits);
            }
        }
    }
}
