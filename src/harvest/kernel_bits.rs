//! Taking the bits that the kernel itself keeps of dirty pages.

use crate::bitmap::words::{masks, words_for};
use crate::error::BitmapError;
use crate::kernel::Kernel;
use crate::slots::table::Slot;
use crate::sync::{Arc, Counter, Mutex, MutexGuard, lock, zeroed};

/// Who takes the kernel's bits, one at a time, and the room for them.
#[derive(Default)]
pub(crate) struct KernelBits {
    /// Zeroes, but while somebody takes bits.
    words: Mutex<Box<[u64]>>,
    /// Times that the kernel had no bitmap of a slot.
    pub(crate) missing: Counter,
}

impl KernelBits {
    /// Waits until bits that somebody else has taken are where a sync finds them: who asks the kernel
    /// before that finds neither.
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
    /// Makes room for the bits of `pages` pages. False if there is no memory for it.
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

    /// Moves the kernel's bits of `slot`, for which there is room, to its device bits: only now that
    /// their pages are protected again, and whether or not the kernel got to its end.
    ///
    /// Where it has none, or has the slot in another size, every page is dirty, and once more when it has one
    /// again: what was written before that is in no bitmap. But of a slot whose removal has begun it
    /// need not have any bits.
    pub(crate) fn take(
        &mut self,
        kernel: &dyn Kernel,
        slot: &Slot,
        retired: bool,
    ) -> Result<(), BitmapError> {
        let words = &mut self.words[..words_for(slot.pages())];
        let found = Found { words, slot };
        let taken = kernel.take_bitmap(slot.id(), slot.pages(), found.words);
        let is_larger = found.names_more();
        drop(found);
        let is_missing = match taken {
            Ok(()) => is_larger,
            Err(source) => match source.raw_os_error() {
                Some(libc::ENOENT) if retired => {
                    // Should it stay after all.
                    slot.note_missing(true);
                    return Ok(());
                }
                Some(libc::ENOENT | libc::EFAULT | libc::EINVAL) => true,
                _ => {
                    return Err(BitmapError {
                        slot: slot.id(),
                        source: Arc::new(source),
                    });
                }
            },
        };
        self.missing.add(is_missing.into());
        if slot.note_missing(is_missing) || is_missing {
            slot.device().set(0, slot.pages());
        }
        Ok(())
    }
}

/// Bits on their way to the device bits of their slot, where they go when this is dropped: by
/// unwinding, too.
struct Found<'a> {
    words: &'a mut [u64],
    slot: &'a Slot,
}

impl Found<'_> {
    /// Whether there are bits past the slot's end: the kernel's is larger.
    fn names_more(&self) -> bool {
        let in_last = self.slot.pages() % u64::from(u64::BITS);
        let last = self.words.last().copied().unwrap_or(0);
        in_last > 0 && last >> in_last > 0
    }
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
