//! What a sync hands out: the pages to copy.

use core::fmt;

use crate::bitmap::pages::PageBits;
use crate::slot_id::SlotId;
use crate::slots::table::{Slot, Table};
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
        self.part().runs()
    }

    /// The dirty pages one by one, in the same order.
    pub fn pages(&self) -> impl Iterator<Item = (SlotId, u64)> + '_ {
        let pages = |run: Run| run.first_page..run.first_page + run.pages;
        self.runs()
            .flat_map(move |run| pages(run).map(move |page| (run.slot, page)))
    }

    /// How many pages are dirty.
    pub fn page_count(&self) -> u64 {
        self.part().page_count()
    }

    /// Whether no page is dirty.
    pub fn is_empty(&self) -> bool {
        self.slots.iter().all(|slot| slot.bits.is_empty())
    }

    /// Whether `page` of `slot` is dirty.
    pub fn contains(&self, slot: SlotId, page: u64) -> bool {
        self.slot(slot).is_some_and(|slot| slot.bits.contains(page))
    }

    /// The raw bits of `slot`: page p is bit p % 64 of word p / 64. `None` for a slot that was not
    /// logged when the sync ran.
    pub fn words(&self, slot: SlotId) -> Option<&[u64]> {
        self.slot(slot).map(|slot| slot.bits.words())
    }

    fn slot(&self, slot: SlotId) -> Option<&SlotPages> {
        let place = self.slots.binary_search_by_key(&slot, |s| s.slot.id());
        place.ok().map(|place| &self.slots[place])
    }

    /// All of it as a part, to be [split](DirtyPart::split) among threads.
    pub fn part(&self) -> DirtyPart<'_> {
        DirtyPart {
            slots: &self.slots,
            words: 0..usize::MAX,
        }
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
            let have = self.slot(slot.id());
            if !have.is_some_and(|have| Arc::ptr_eq(&have.slot, slot)) {
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

/// A part of the dirty pages, for a thread of its own.
///
/// ```
/// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
/// # use kvm_dirty_ring::{DirtyPages, SlotId};
/// # let vm = SimVm::new(SimConfig::default());
/// # let log = vm.dirty_log();
/// # let ram = SlotId::new(0, 0);
/// # log.add_slot(ram, 100_000)?;
/// log.mark_dirty(ram, 10, 70_000)?;
/// let mut dirty = DirtyPages::new();
/// log.sync(&mut dirty)?;
/// let (left, right) = dirty.part().split();
/// let right = right.expect("more than one word");
/// let sent: u64 = std::thread::scope(|scope| {
///     let send = |part: kvm_dirty_ring::DirtyPart<'_>| part.runs().map(|run| run.pages).sum::<u64>();
///     let left = scope.spawn(move || send(left));
///     send(right) + left.join().unwrap()
/// });
/// assert_eq!(sent, 70_000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct DirtyPart<'a> {
    slots: &'a [SlotPages],
    /// The words of each of these slots; all of them, if there is more than one slot.
    words: core::ops::Range<usize>,
}

impl<'a> DirtyPart<'a> {
    /// Splits the part in two, which have no page in common and all of its pages together; or
    /// gives it back whole, if it is small.
    ///
    /// Parts are halved by memory, not by what is dirty in it: split further than there are
    /// threads. The signature is that of rayon's `split`.
    pub fn split(self) -> (Self, Option<Self>) {
        if self.slots.len() > 1 {
            let (left, right) = self.slots.split_at(self.slots.len() / 2);
            let part = |slots| Self {
                slots,
                words: self.words.clone(),
            };
            return (part(left), Some(part(right)));
        }
        let len = self.slots.first().map_or(0, |slot| slot.bits.words().len());
        let words = self.words.start..self.words.end.min(len);
        if words.len() < 2 {
            return (self, None);
        }
        let middle = words.start + words.len() / 2;
        let part = |words| Self {
            slots: self.slots,
            words,
        };
        (part(words.start..middle), Some(part(middle..words.end)))
    }

    /// The pages of the part as runs, ascending by slot, then by page. A run ends at the part's
    /// end even if the next part goes on with it.
    pub fn runs(&self) -> impl Iterator<Item = Run> + use<'a> {
        let words = self.words.clone();
        self.slots.iter().flat_map(move |slot| {
            let id = slot.slot.id();
            slot.bits.runs(words.clone()).map(move |run| Run {
                slot: id,
                first_page: run.start,
                pages: run.end - run.start,
            })
        })
    }

    /// How many pages of the part are dirty.
    pub fn page_count(&self) -> u64 {
        let count = |slot: &SlotPages| slot.bits.count(self.words.clone());
        self.slots.iter().map(count).sum()
    }
}

impl fmt::Debug for DirtyPart<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyPart")
            .field("slots", &self.slots.len())
            .field("pages", &self.page_count())
            .finish()
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
