// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A part of the dirty pages, and its runs.

use core::fmt;
use core::ops::Range;

use crate::slot_id::SlotId;
use crate::slots::slot_pages::{Kind, SlotPages};

/// Consecutive dirty pages of one slot.
///
/// The slot is the one that had the id when the sync ran. Once its removal is [finished](crate::DirtyLog::finish_slot),
/// another slot may have the id, with other memory or another size, and nothing in a run shows it. So before you finish a
/// removal, copy all runs of the slot; after it, remove its pages from each `DirtyPages`
/// ([`clear_removed`](crate::DirtyLog::clear_removed)), and use no run that was made before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    /// The memslot.
    pub slot: SlotId,
    /// The first page, in base pages of the host from the slot's start.
    pub first_page: u64,
    /// The number of pages, at least one.
    pub pages: u64,
}

/// A part of the dirty pages, for one thread.
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
    words: Range<usize>,
    kind: Kind,
}

impl<'a> DirtyPart<'a> {
    /// Makes a part of all pages of that kind.
    pub(super) fn new(slots: &'a [SlotPages], kind: Kind) -> Self {
        Self {
            slots,
            words: 0..usize::MAX,
            kind,
        }
    }

    /// Splits the part into two that have no page in common and together have all of its pages.
    ///
    /// A small part is returned whole, with `None`.
    ///
    /// Parts are halved by memory, not by dirty pages, so split into more parts than there are threads. The signature is that of
    /// rayon's `split`.
    pub fn split(self) -> (Self, Option<Self>) {
        if self.slots.len() > 1 {
            let (left, right) = self.slots.split_at(self.slots.len() / 2);
            let part = |slots| Self {
                slots,
                words: self.words.clone(),
                kind: self.kind,
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
            kind: self.kind,
        };
        (part(words.start..middle), Some(part(middle..words.end)))
    }

    /// Returns the pages of the part as runs, ascending by slot, then by page.
    ///
    /// A run ends at the part's end even if the next part continues it.
    pub fn runs(&self) -> impl Iterator<Item = Run> + use<'a> {
        let words = self.words.clone();
        let kind = self.kind;
        let slots = self
            .slots
            .iter()
            .filter_map(move |slot| Some((slot, slot.of(kind)?)));
        slots.flat_map(move |(slot, bits)| {
            let id = slot.slot.id();
            bits.runs(words.clone()).map(move |run| Run {
                slot: id,
                first_page: run.start,
                pages: run.end - run.start,
            })
        })
    }

    /// Returns the runs of one slot, as pages.
    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn runs_of(&self, slot: SlotId) -> impl Iterator<Item = Range<u64>> + use<'a> {
        let place = self.slots.binary_search_by_key(&slot, |s| s.slot.id());
        let bits = place.ok().and_then(|place| self.slots[place].of(self.kind));
        let words = self.words.clone();
        bits.into_iter()
            .flat_map(move |bits| bits.runs(words.clone()))
    }

    /// Returns the last page of each slot that has any, as a run.
    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn last_runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.slots.iter().filter_map(|slot| {
            let page = slot.of(self.kind)?.last_in(self.words.clone())?;
            Some(Run {
                slot: slot.slot.id(),
                first_page: page,
                pages: 1,
            })
        })
    }

    /// Returns the number of dirty pages in the part.
    pub fn page_count(&self) -> u64 {
        let bits = self.slots.iter().filter_map(|slot| slot.of(self.kind));
        bits.map(|bits| bits.count(self.words.clone())).sum()
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
