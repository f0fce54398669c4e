// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Marks in bulk, from other logs: those of vhost, VFIO, or a device of the VMM.

use core::ops::Range;

use super::DirtyLog;
use crate::bitmap::shared::SharedBits;
use crate::bitmap::words::masks;
use crate::error::SlotError;
use crate::kernel::page_size;
use crate::slot_id::SlotId;
use crate::slots::guest_map::GuestMap;

/// The bits of a word.
const BITS: u64 = u64::BITS as u64;

impl DirtyLog {
    /// Marks each page of `slot` whose bit is set in `words`, as [`mark_dirty`](Self::mark_dirty) does.
    ///
    /// Bit b of word w is page `first_page + 64 w + b`. It takes about as long as reading the words.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, SlotId};
    /// # let vm = SimVm::new(SimConfig::default());
    /// # let log = vm.dirty_log();
    /// # let ram = SlotId::new(0, 0);
    /// # log.add_slot(ram, 1000)?;
    /// log.mark_words(ram, 100, &[0b101, 1 << 63])?;
    /// # let mut dirty = DirtyPages::new();
    /// log.sync(&mut dirty)?;
    /// assert!(dirty.pages().map(|(_, page)| page).eq([100, 102, 227]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// The slot is not in the log, or a bit is set past its end; then no page is marked.
    pub fn mark_words(
        &self,
        slot: SlotId,
        first_page: u64,
        words: &[u64],
    ) -> Result<(), SlotError> {
        let last = words.iter().rposition(|&word| word != 0);
        let pages = last.map_or(0, |last| {
            (last as u64 + 1) * BITS - u64::from(words[last].leading_zeros())
        });
        if pages == 0 {
            return self.tracked_with(slot, 0, 0).map(drop);
        }
        let tracked = self.tracked_with(slot, first_page, pages)?;
        merge(tracked.device(), first_page, words, 0..pages);
        Ok(())
    }

    /// Marks pages from a log by guest address, as those of vhost and VFIO are, also in pages of another size.
    ///
    /// Bit b of word w is the page of `page_bytes` bytes at `address + (64 w + b) × page_bytes`. Each base page of
    /// the host that it touches is marked. Returns the number of set bits that have no memory of `map` behind them;
    /// they are ignored. It takes about as long as reading the words a few times.
    ///
    /// ```
    /// # use kvm_dirty_ring::sim::{SimConfig, SimVm};
    /// # use kvm_dirty_ring::{DirtyPages, GuestMap, GuestRegion, SlotId};
    /// # let log = SimVm::new(SimConfig::default()).dirty_log();
    /// # let ram = SlotId::new(0, 0);
    /// # log.add_slot(ram, 1000)?;
    /// let map = GuestMap::new([GuestRegion { slot: ram, address: 0, pages: 1000 }])?;
    /// // A vhost log in pages of 4 KiB, from address 0: page 3 was written.
    /// log.mark_guest_words(&map, 0, 4096, &[0b1000])?;
    /// # let mut dirty = DirtyPages::new();
    /// log.sync(&mut dirty)?;
    /// assert_eq!(dirty.page_count(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`SlotError::PageSize`] if `page_bytes` is no power of two, or `address` no multiple of it;
    /// [`SlotError::Unknown`] for a slot of the map that is not in the log, [`SlotError::OutOfRange`] for one that is
    /// smaller. Pages of slots before it are marked then.
    pub fn mark_guest_words(
        &self,
        map: &GuestMap,
        address: u64,
        page_bytes: u64,
        words: &[u64],
    ) -> Result<u64, SlotError> {
        if !page_bytes.is_power_of_two() || address % page_bytes != 0 {
            return Err(SlotError::PageSize {
                address,
                page_bytes,
            });
        }
        let host_page = page_size() as u64;
        let bits = words.len() as u64 * BITS;
        let address_of = |bit: u64| u128::from(address) + u128::from(bit) * u128::from(page_bytes);
        let (mut set, mut found) = (count(words, 0..bits), 0);
        let layout = self.inner().harvester.layout();
        let mut counted_to = 0;
        for region in map.regions() {
            // The bits whose pages reach into the region.
            let start = u128::from(region.address);
            let end = start + u128::from(region.pages) * u128::from(host_page);
            let first = start.saturating_sub(address.into()) / u128::from(page_bytes);
            let last = end
                .saturating_sub(address.into())
                .div_ceil(page_bytes.into());
            let first = first.min(bits.into()) as u64;
            let last = last.min(bits.into()) as u64;
            if first >= last || !has_ones(words, first..last) {
                continue;
            }
            // A large page may reach into two regions: it counts once.
            found += count(words, first.max(counted_to)..last);
            counted_to = last.max(counted_to);
            let slot = region.slot;
            let tracked = layout.slots.get(slot.raw());
            let tracked = tracked.ok_or(SlotError::Unknown { slot })?;
            if tracked.pages() < region.pages {
                return Err(SlotError::OutOfRange {
                    slot,
                    first_page: 0,
                    pages: region.pages,
                    slot_pages: tracked.pages(),
                });
            }
            let to = tracked.device();
            if page_bytes > host_page {
                let page_of = |bit| {
                    let bytes = address_of(bit).clamp(start, end) - start;
                    (bytes / u128::from(host_page)) as u64
                };
                spread(to, page_of, words, first..last);
                continue;
            }
            // In the region, as it begins and ends between pages of the log.
            let place = ((address_of(first) - start) / u128::from(page_bytes)) as u64;
            match (host_page / page_bytes).ilog2() {
                0 => merge(to, place, words, first..last),
                shift => fold(to, place, shift, words, first..last),
            }
        }
        set -= found;
        Ok(set)
    }
}

/// Returns the bits of word `at` that lie in `bits`.
fn masked(words: &[u64], at: u64, bits: &Range<u64>) -> u64 {
    let word = words[at as usize];
    let begin = at * BITS;
    if word == 0 || bits.start <= begin && begin + BITS <= bits.end {
        return word;
    }
    let low = bits.start.saturating_sub(begin).min(BITS);
    let high = (begin + BITS).saturating_sub(bits.end).min(BITS);
    let mask = u64::MAX.checked_shl(low as u32).unwrap_or(0)
        & u64::MAX.checked_shr(high as u32).unwrap_or(0);
    word & mask
}

fn words_of(bits: &Range<u64>) -> Range<u64> {
    bits.start / BITS..bits.end.div_ceil(BITS)
}

fn count(words: &[u64], bits: Range<u64>) -> u64 {
    let ones = |at| u64::from(masked(words, at, &bits).count_ones());
    words_of(&bits).map(ones).sum()
}

fn has_ones(words: &[u64], bits: Range<u64>) -> bool {
    words_of(&bits).any(|at| masked(words, at, &bits) != 0)
}

/// Pages of one slot that are about to be marked. Those of a word are marked at once.
struct Marker<'a> {
    to: &'a SharedBits,
    word: usize,
    bits: u64,
}

impl<'a> Marker<'a> {
    fn new(to: &'a SharedBits) -> Self {
        let (word, bits) = (0, 0);
        Self { to, word, bits }
    }

    fn add(&mut self, word: usize, bits: u64) {
        if word != self.word {
            self.mark();
            self.word = word;
        }
        self.bits |= bits;
    }

    fn mark(&mut self) {
        if self.bits != 0 {
            self.to.merge(self.word, core::mem::take(&mut self.bits));
        }
    }
}

/// Adds those of `bits` that are set in `words` to `to`, where `1 << shift` of them are one page. The first is number `place`
/// of those that the slot would have. All of them are in the slot.
fn fold(to: &SharedBits, place: u64, shift: u32, words: &[u64], bits: Range<u64>) {
    let mut marker = Marker::new(to);
    moved(place, words, bits, |at, word| {
        // A word has some whole pages, or is in one.
        let folded = (0..shift.min(BITS.ilog2())).fold(word, |word, _| halved(word));
        let first = (at as u64 * BITS) >> shift;
        marker.add((first / BITS) as usize, folded << (first % BITS));
    });
    marker.mark();
}

/// Returns a word with a bit for each two of `word`, which is set if either of them is; the upper half is zero.
fn halved(word: u64) -> u64 {
    let mut halved = (word | word >> 1) & 0x5555_5555_5555_5555;
    halved = (halved | halved >> 1) & 0x3333_3333_3333_3333;
    halved = (halved | halved >> 2) & 0x0f0f_0f0f_0f0f_0f0f;
    halved = (halved | halved >> 4) & 0x00ff_00ff_00ff_00ff;
    halved = (halved | halved >> 8) & 0x0000_ffff_0000_ffff;
    (halved | halved >> 16) & 0x0000_0000_ffff_ffff
}

/// Adds the pages of those of `bits` that are set in `words` to `to`: those from `page_of` of the bit up to that of the next.
fn spread(to: &SharedBits, page_of: impl Fn(u64) -> u64, words: &[u64], bits: Range<u64>) {
    let mut marker = Marker::new(to);
    for at in words_of(&bits) {
        let mut word = masked(words, at, &bits);
        while word != 0 {
            // All that are set side by side.
            let bit = u64::from(word.trailing_zeros());
            let end = bit + u64::from((word >> bit).trailing_ones());
            let (first, stop) = (page_of(at * BITS + bit), page_of(at * BITS + end));
            masks(first, stop - first).for_each(|(word, bits)| marker.add(word, bits));
            word &= u64::MAX.checked_shl(end as u32).unwrap_or(0);
        }
    }
    marker.mark();
}

/// Adds those of `bits` that are set in `words` to `to`, the first as page `page`. All of them are pages of the slot.
fn merge(to: &SharedBits, page: u64, words: &[u64], bits: Range<u64>) {
    moved(page, words, bits, |at, word| _ = to.merge(at, word));
}

/// Passes those of `bits` that are set in `words` to `each`, in words in which the first has place `place`.
fn moved(place: u64, words: &[u64], bits: Range<u64>, mut each: impl FnMut(usize, u64)) {
    for at in words_of(&bits) {
        let word = masked(words, at, &bits);
        if word == 0 {
            continue;
        }
        // The place of bit 0 of the word, if it has one.
        let begin = (at * BITS + place).checked_sub(bits.start);
        let Some(begin) = begin else {
            let ahead = bits.start - place - at * BITS;
            each(0, word >> ahead);
            continue;
        };
        let (first, shift) = ((begin / BITS) as usize, begin % BITS);
        let (low, high) = (
            word << shift,
            word.checked_shr((BITS - shift) as u32).unwrap_or(0),
        );
        if low != 0 {
            each(first, low);
        }
        if high != 0 {
            each(first + 1, high);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::bitmap::pages::PageBits;
    use crate::sim::{SimConfig, SimVm};
    use crate::slots::guest_map::GuestRegion;
    use crate::{DirtyPages, SlotId};

    fn is_set(words: &[u64], bit: u64) -> bool {
        words[(bit / BITS) as usize] >> (bit % BITS) & 1 == 1
    }

    proptest! {
        /// Compared with one bit at a time.
        #[test]
        fn bits_are_moved_as_one_by_one(words in vec(any::<u64>(), 1..5), page in 0u64..200, ends in (0u64..320, 0u64..320)) {
            let most = words.len() as u64 * BITS;
            let start = ends.0.min(ends.1).min(most);
            let bits = start..ends.0.max(ends.1).min(most);
            let (to, mut expected) = (SharedBits::new(640).unwrap(), PageBits::new(640).unwrap());
            let mut moved = PageBits::new(640).unwrap();
            merge(&to, page, &words, bits.clone());
            to.take_into(&mut moved);
            for bit in bits.clone().filter(|bit| is_set(&words, *bit)) {
                let at = page + bit - bits.start;
                expected.merge((at / BITS) as usize, 1 << (at % BITS));
            }
            prop_assert_eq!(moved.words(), expected.words());
            prop_assert_eq!(count(&words, bits), expected.count(0..10));
        }

        /// A log by guest address, in pages of any size, over two regions and the hole between them.
        #[test]
        fn guest_pages_are_marked_as_one_by_one(
            words in vec(prop_oneof![Just(0u64), Just(u64::MAX), any::<u64>(), 0u64..8], 1..20),
            begin in (0u64..150, 0u64..6),
            shift in 0u32..12,
        ) {
            let host_page = page_size() as u64;
            let log = SimVm::new(SimConfig::default()).dirty_log();
            let slots = [SlotId::new(0, 0), SlotId::new(0, 1)];
            let regions = [(slots[0], 10, 72), (slots[1], 85, 100)];
            for (slot, _, pages) in regions {
                log.add_slot(slot, pages).unwrap();
            }
            let region = |(slot, first, pages)| GuestRegion { slot, address: first * host_page, pages };
            let map = GuestMap::new(regions.map(region)).unwrap();
            // From 1/128 of a base page to sixteen, some of which reach into both regions. Small ones need not begin
            // with a base page.
            let page_bytes = (host_page / 128) << shift;
            let address = (begin.0 * host_page / page_bytes + begin.1) * page_bytes;
            let holes = log.mark_guest_words(&map, address, page_bytes, &words).unwrap();
            let (mut dirty, mut expected_holes) = (DirtyPages::new(), 0);
            log.sync(&mut dirty).unwrap();
            let mut expected = std::collections::BTreeSet::new();
            for bit in (0..words.len() as u64 * BITS).filter(|bit| is_set(&words, *bit)) {
                let at = address + bit * page_bytes;
                let touched = at / host_page..(at + page_bytes).div_ceil(host_page);
                let found: Vec<_> = touched.filter_map(|page| map.locate(page * host_page)).collect();
                expected_holes += u64::from(found.is_empty());
                expected.extend(found);
            }
            prop_assert_eq!(holes, expected_holes);
            prop_assert!(dirty.pages().eq(expected));
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_nothing_is_marked() {
        let log = SimVm::new(SimConfig::default()).dirty_log();
        let slot = SlotId::new(0, 3);
        log.add_slot(slot, 100).unwrap();
        let other = SlotId::new(0, 4);
        let refused = log.mark_words(other, 0, &[1]);
        assert!(matches!(refused, Err(SlotError::Unknown { .. })));
        for (first, words) in [
            (37, [0, 1]),
            (100, [1, 0]),
            (u64::MAX, [1, 0]),
            (0, [0, 1 << 36]),
        ] {
            let refused = log.mark_words(slot, first, &words);
            assert!(
                matches!(refused, Err(SlotError::OutOfRange { .. })),
                "{first}, {words:?}"
            );
        }
        log.mark_words(slot, 200, &[0, 0]).unwrap();
        let refused = log.mark_words(other, 0, &[]);
        assert!(matches!(refused, Err(SlotError::Unknown { .. })));
        let map = GuestMap::new([GuestRegion {
            slot,
            address: 0,
            pages: 101,
        }])
        .unwrap();
        for (address, page_bytes) in [(0, 0), (0, 3), (2048, 4096), (0, u64::MAX)] {
            let refused = log.mark_guest_words(&map, address, page_bytes, &[1]);
            assert!(
                matches!(refused, Err(SlotError::PageSize { .. })),
                "{address}, {page_bytes}"
            );
        }
        let refused = log.mark_guest_words(&map, 0, 4096, &[1]);
        assert!(
            matches!(refused, Err(SlotError::OutOfRange { .. })),
            "the map is not the log's"
        );
        let mut dirty = DirtyPages::new();
        log.sync(&mut dirty).unwrap();
        assert!(dirty.is_empty());
        // At the end of all addresses, where the guest has no memory.
        let map = GuestMap::new([GuestRegion {
            slot,
            address: 0,
            pages: 100,
        }])
        .unwrap();
        assert_eq!(
            log.mark_guest_words(&map, 1 << 63, 1 << 62, &[u64::MAX])
                .unwrap(),
            64
        );
    }
}
