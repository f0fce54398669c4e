// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest addresses of slots' pages.

use core::ops::Range;

use crate::error::GuestMapError;
use crate::kernel::page_size;
use crate::slot_id::{MAX_SLOT_PAGES, SlotId};
use crate::slots::dirty_part::{DirtyPart, Run};

/// One slot's place in guest memory, as given to `KVM_SET_USER_MEMORY_REGION`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GuestRegion {
    /// The slot.
    pub slot: SlotId,
    /// The guest address at which it starts, in bytes.
    pub address: u64,
    /// Its size, in base pages of the host.
    pub pages: u64,
}

/// The guest addresses of slots. The log itself has slots and pages only.
///
/// A map has the slots of one address space, and never changes. Make a new one when slots change.
///
/// ```
/// use kvm_dirty_ring::sim::{SimConfig, SimVm};
/// use kvm_dirty_ring::{DirtyPages, GuestMap, GuestRegion, SlotId};
///
/// let (low, high) = (SlotId::new(0, 0), SlotId::new(0, 1));
/// let map = GuestMap::new([
///     GuestRegion { slot: low, address: 0, pages: 1000 },
///     GuestRegion { slot: high, address: 4 << 30, pages: 1000 },
/// ])?;
/// # let log = SimVm::new(SimConfig::default()).dirty_log();
/// # log.add_slot(low, 1000)?;
/// # log.add_slot(high, 1000)?;
/// log.mark_dirty(high, 0, 2)?;
/// let mut dirty = DirtyPages::new();
/// log.sync(&mut dirty)?;
/// for run in dirty.runs() {
///     let range = map.range(run).ok_or("a slot that is not in the map")?;
///     assert_eq!(range.start, 4 << 30);
/// }
/// assert_eq!(map.locate((4 << 30) + 5), Some((high, 0)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct GuestMap {
    /// Ascending by address; no two overlap.
    by_address: Vec<GuestRegion>,
    /// The same regions, ascending by slot; each slot has one.
    by_slot: Vec<GuestRegion>,
}

impl GuestRegion {
    /// Returns the address of its end, if a guest can have the region.
    fn end(&self) -> Result<u64, GuestMapError> {
        let &Self {
            slot,
            address,
            pages,
        } = self;
        let page_size = page_size() as u64;
        let sound = address % page_size == 0 && (1..=MAX_SLOT_PAGES).contains(&pages);
        let bytes = sound.then(|| pages * page_size);
        bytes
            .and_then(|bytes| address.checked_add(bytes))
            .ok_or(GuestMapError::Region {
                slot,
                address,
                pages,
            })
    }
}

impl GuestMap {
    /// Creates a map of these regions, which may come in any order.
    ///
    /// # Errors
    /// No guest can have one of the regions, or two have a slot or an address in common.
    pub fn new(regions: impl IntoIterator<Item = GuestRegion>) -> Result<Self, GuestMapError> {
        let mut by_address: Vec<_> = regions.into_iter().collect();
        by_address.sort_by_key(|region| region.address);
        let mut last: Option<(u64, SlotId)> = None;
        for &region in &by_address {
            let end = region.end()?;
            match last {
                Some((before, slot)) if region.address < before => {
                    let slots = [slot, region.slot];
                    return Err(GuestMapError::Overlap { slots });
                }
                _ => last = Some((end, region.slot)),
            }
        }
        let mut by_slot = by_address.clone();
        by_slot.sort_by_key(|region| region.slot);
        let twice = by_slot.windows(2).find(|two| two[0].slot == two[1].slot);
        if let Some(two) = twice {
            return Err(GuestMapError::Twice { slot: two[0].slot });
        }
        Ok(Self {
            by_address,
            by_slot,
        })
    }

    /// Returns the regions, ascending by address.
    pub fn regions(&self) -> &[GuestRegion] {
        &self.by_address
    }

    /// Finds the page at a guest address: its slot, and the page's number in the slot.
    ///
    /// `None` if the address is in no region.
    ///
    /// ```
    /// # use kvm_dirty_ring::{GuestMap, GuestRegion, SlotId};
    /// let slot = SlotId::new(0, 0);
    /// let map = GuestMap::new([GuestRegion { slot, address: 1 << 20, pages: 256 }])?;
    /// assert_eq!(map.locate((1 << 20) + 5), Some((slot, 0)));
    /// assert_eq!(map.locate(0), None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn locate(&self, address: u64) -> Option<(SlotId, u64)> {
        let begun = |region: &GuestRegion| region.address <= address;
        let after = self.by_address.partition_point(begun);
        let region = self.by_address[..after].last()?;
        let page = (address - region.address) / page_size() as u64;
        (page < region.pages).then_some((region.slot, page))
    }

    /// Returns the pages that these guest addresses touch, as runs: one for each region, ascending by address.
    ///
    /// It is the reverse of [`ranges`](Self::ranges) and [`range`](Self::range). A page that is touched in part counts as
    /// a whole. Addresses in no region are left out.
    ///
    /// Use it to mark what a device wrote across pages, or to take what was sent out of the pages that are
    /// [still to be sent](crate::DirtyPages::remove). For the latter, first round the addresses inwards to whole pages of the
    /// host: of a page that has arrived in part, the rest is still to be sent.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, GuestMap, GuestRegion, SlotId};
    /// # let slot = SlotId::new(0, 0);
    /// # let map = GuestMap::new([GuestRegion { slot, address: 0, pages: 256 }])?;
    /// # let log = SimVm::new(SimConfig::default()).dirty_log();
    /// # log.add_slot(slot, 256)?;
    /// # let page = map.range(kvm_dirty_ring::Run { slot, first_page: 0, pages: 1 }).unwrap().end;
    /// // A device has written two bytes: the last one of page 2, and the first one of page 3.
    /// for run in map.runs(3 * page - 1..3 * page + 1) {
    ///     log.mark_dirty(run.slot, run.first_page, run.pages)?;
    /// }
    /// let mut dirty = DirtyPages::new();
    /// log.sync(&mut dirty)?;
    /// assert!(dirty.pages().eq([(slot, 2), (slot, 3)]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn runs(&self, range: Range<u64>) -> impl Iterator<Item = Run> + '_ {
        let page = page_size() as u64;
        // None of these overflows: `new` has seen to it.
        let is_before = |region: &GuestRegion| region.address + region.pages * page <= range.start;
        let first = self.by_address.partition_point(is_before);
        let end = match range.is_empty() {
            true => 0,
            false => range.end,
        };
        let touched = self.by_address[first..].iter();
        let touched = touched.take_while(move |region| region.address < end);
        touched.map(move |region| {
            let first_page = range.start.saturating_sub(region.address) / page;
            let last = (end - region.address).div_ceil(page).min(region.pages);
            Run {
                slot: region.slot,
                first_page,
                pages: last - first_page,
            }
        })
    }

    /// Returns the guest addresses of dirty pages in the form in which they are sent: ranges of bytes, ascending,
    /// across slots that adjoin in the guest.
    ///
    /// Each is as long as possible, up to `most` pages.
    ///
    /// For all pages: `map.ranges(dirty.part(), most)`; for those that are no members: `dirty.others()`. To use several threads,
    /// [split](DirtyPart::split) the part and call this for each piece.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, GuestMap, GuestRegion, SlotId};
    /// # let (low, high) = (SlotId::new(0, 1), SlotId::new(0, 0));
    /// # let map = GuestMap::new([
    /// #     GuestRegion { slot: low, address: 0, pages: 16 },
    /// #     GuestRegion { slot: high, address: 16 << 12, pages: 16 },
    /// # ])?;
    /// # let log = SimVm::new(SimConfig::default()).dirty_log();
    /// # log.add_slot(low, 16)?;
    /// # log.add_slot(high, 16)?;
    /// log.mark_dirty(low, 15, 1)?; // the two slots adjoin
    /// log.mark_dirty(high, 0, 2)?;
    /// let mut dirty = DirtyPages::new();
    /// log.sync(&mut dirty)?;
    /// # if cfg!(target_arch = "x86_64") {
    /// assert!(map.ranges(dirty.part(), 512)?.eq([15 << 12..18 << 12]));
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`GuestMapError::Unmapped`] if a page of the part is in no region: the map does not match the log, and no range would
    /// contain the page. [`GuestMapError::NoPages`] if `most` is 0.
    pub fn ranges<'a>(
        &'a self,
        part: DirtyPart<'a>,
        most: u64,
    ) -> Result<impl Iterator<Item = Range<u64>> + 'a, GuestMapError> {
        if most == 0 {
            return Err(GuestMapError::NoPages);
        }
        let most = most.saturating_mul(page_size() as u64);
        // It reads one word per slot, for its last run: cheap beside the runs themselves.
        if let Some(run) = part.last_runs().find(|run| self.range(*run).is_none()) {
            return Err(GuestMapError::Unmapped { slot: run.slot });
        }
        let runs = self.by_address.iter().flat_map(move |region| {
            let address = |page| region.address + page * page_size() as u64;
            let runs = part.runs_of(region.slot);
            runs.map(move |run| address(run.start)..address(run.end))
        });
        Ok(Ranges {
            runs,
            next: None,
            most,
        })
    }

    /// Returns the guest addresses of a run of pages.
    ///
    /// `None` if they are not all in one region: then the map does not match the log, and the run must not be
    /// skipped.
    pub fn range(&self, run: Run) -> Option<Range<u64>> {
        let place = self
            .by_slot
            .binary_search_by_key(&run.slot, |region| region.slot);
        let region = self.by_slot[place.ok()?];
        let end = run.first_page.checked_add(run.pages)?;
        let address = |page| region.address + page * page_size() as u64;
        (end <= region.pages).then(|| address(run.first_page)..address(end))
    }
}

/// Ranges made of runs: joined where they adjoin, cut where they are longer than `most` bytes.
struct Ranges<I> {
    runs: I,
    next: Option<Range<u64>>,
    most: u64,
}

impl<I: Iterator<Item = Range<u64>>> Iterator for Ranges<I> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let mut range = self.next.take().or_else(|| self.runs.next())?;
        while range.end - range.start < self.most {
            match self.runs.next() {
                Some(run) if run.start == range.end => range.end = run.end,
                other => {
                    self.next = other;
                    return Some(range);
                }
            }
        }
        let cut = range.start + self.most;
        if cut < range.end {
            self.next = Some(cut..range.end);
            range.end = cut;
        }
        Some(range)
    }
}
