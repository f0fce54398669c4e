//! What a sync hands out: the pages to copy.

use core::fmt;

use crate::bitmap::pages::PageBits;
use crate::memslots::{Slot, Table};
use crate::slot_id::SlotId;
use crate::sync::Arc;

/// The pages that one [`sync`](crate::DirtyLog::sync) found dirty.
///
/// Make one and pass it to every sync: its memory, one bit a page of the logged slots, is taken
/// from the operating system only where pages are dirty, and is reused from round to round.
#[derive(Default)]
pub struct DirtyPages {
    /// In ascending order of slot.
    slots: Vec<SlotPages>,
}

struct SlotPages {
    /// Not its id alone: the id may have gone to another slot since the last round.
    slot: Arc<Slot>,
    bits: PageBits,
}

/// Consecutive dirty pages of one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    /// The memslot.
    pub slot: SlotId,
    /// The first page, counted in host pages from the slot's begin.
    pub first_page: u64,
    /// How many pages, at least one.
    pub pages: u64,
}

impl DirtyPages {
    /// No pages.
    pub fn new() -> Self {
        Self::default()
    }

    /// The dirty pages as runs, ascending by slot, then by page.
    ///
    /// A run is as long as it can be and never crosses a slot.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.slots.iter().flat_map(|slot| {
            let id = slot.slot.id();
            slot.bits.runs().map(move |run| Run {
                slot: id,
                first_page: run.start,
                pages: run.end - run.start,
            })
        })
    }

    /// How many pages are dirty.
    pub fn page_count(&self) -> u64 {
        self.slots.iter().map(|slot| slot.bits.count()).sum()
    }

    /// Whether no page is dirty.
    pub fn is_empty(&self) -> bool {
        self.page_count() == 0
    }

    /// Whether `page` of `slot` is dirty.
    pub fn contains(&self, slot: SlotId, page: u64) -> bool {
        self.slots
            .iter()
            .any(|s| s.slot.id() == slot && s.bits.contains(page))
    }

    /// The raw bits of `slot`: page p is bit p % 64 of word p / 64. `None` for a slot that was not
    /// logged when the sync ran.
    pub fn words(&self, slot: SlotId) -> Option<&[u64]> {
        let slot = self.slots.iter().find(|s| s.slot.id() == slot)?;
        Some(slot.bits.words())
    }

    /// Forgets every page, and keeps the memory.
    pub fn clear(&mut self) {
        for slot in &mut self.slots {
            slot.bits.clear();
        }
    }

    /// Makes room for exactly the slots of `table` and keeps the pages of those that stay. False
    /// if there is no memory for it; then nothing has changed.
    pub(crate) fn fit(&mut self, table: &Table) -> bool {
        let fits = self.slots.len() == table.slots().count()
            && self
                .slots
                .iter()
                .zip(table.slots())
                .all(|(have, slot)| Arc::ptr_eq(&have.slot, slot));
        if fits {
            return true;
        }
        let mut new = Vec::new();
        for slot in table.slots() {
            if !self.slots.iter().any(|have| Arc::ptr_eq(&have.slot, slot)) {
                let Some(bits) = PageBits::new(slot.pages()) else {
                    return false;
                };
                let slot = Arc::clone(slot);
                new.push(SlotPages { slot, bits });
            }
        }
        self.slots.retain(|have| table.holds(&have.slot));
        self.slots.append(&mut new);
        self.slots.sort_by_key(|slot| slot.slot.id());
        true
    }

    /// Each slot with the bits to merge into.
    pub(crate) fn slots_mut(&mut self) -> impl Iterator<Item = (&Slot, &mut PageBits)> {
        self.slots
            .iter_mut()
            .map(|slot| (&*slot.slot, &mut slot.bits))
    }
}

impl fmt::Debug for DirtyPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyPages")
            .field("slots", &self.slots.len())
            .field("pages", &self.page_count())
            .finish()
    }
}
