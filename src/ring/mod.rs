//! The ring of dirtied pages that one vCPU shares with userspace.
//!
//! The kernel produces, one consumer at a time harvests. [`Entry`] holds every memory ordering of
//! the protocol; [`RingView`] is the consumer with its cached index.

use crate::kernel::RESERVED_ENTRIES;
use crate::prefetch;

mod entry;
mod gauge;
mod memory;
#[cfg(any(test, feature = "test-utils"))]
pub(crate) mod producer;
#[cfg(all(test, not(feature = "modelled")))]
mod properties;

pub use entry::Entry;
pub(crate) use gauge::Gauge;
pub(crate) use memory::BLOCK;
pub use memory::RingMemory;

/// Entries in a cache line of 64 bytes.
const LINE: usize = 4;

/// So many resets in a row find nothing, undisturbed, only where there is nothing to be found.
const NO_ACCIDENT: usize = 16;

/// The consumer of one ring.
///
/// There is one for each ring: harvesting takes `&mut self`. The index of the next entry is cached
/// here, for the kernel tells nobody its own; that an entry is dirty is read off the entry.
#[derive(Debug)]
pub struct RingView {
    memory: RingMemory,
    /// Index of the next entry to harvest. Wraps at 2^32, as the kernel's do.
    head: u32,
    /// Before the first entry that waits for its reset, as far as anybody knows: the kernel's reset index, as it was
    /// when somebody looked last.
    oldest: u32,
    /// Half of what the kernel keeps in reserve.
    half_reserve: u32,
    /// Whether the ring was ever seen overrun.
    was_overrun: bool,
    /// Where the head was when all free entries were marked, in vain.
    in_vain: Option<u32>,
}

impl RingView {
    /// A consumer that starts at the ring's first entry.
    pub fn new(memory: RingMemory) -> Self {
        Self::with_reserve(memory, RESERVED_ENTRIES)
    }

    /// The same, of a kernel that stops a vCPU `reserved` entries before its ring's end.
    pub(crate) fn with_reserve(memory: RingMemory, reserved: u32) -> Self {
        Self {
            half_reserve: half_reserve(reserved, memory.entries()),
            was_overrun: false,
            head: memory.first_index(),
            oldest: memory.first_index(),
            memory,
            in_vain: None,
        }
    }

    /// Size of the ring, in entries.
    pub fn entries(&self) -> u32 {
        self.memory.entries()
    }

    /// Whether at least `count` entries wait to be harvested: one load.
    pub fn at_least(&self, count: u32) -> bool {
        Gauge::new(&self.memory, self.head).at_least(count)
    }

    /// How many entries wait to be harvested: a load for each bit of the ring's size, one if none
    /// does. The vCPU may log more meanwhile.
    pub fn occupancy(&self) -> u32 {
        Gauge::new(&self.memory, self.head).occupancy()
    }

    /// Takes every dirty entry in ring order, hands its payload (memslot with the address space in
    /// the upper 16 bits, page inside the memslot) to `take`, and marks it for the next reset.
    /// Returns how many entries there were; a whole ring of them, or up to a block more, if the
    /// kernel has overrun the ring.
    ///
    /// Nothing about a payload is checked: it is what the ring holds.
    pub fn harvest(&mut self, mut take: impl FnMut(u32, u64)) -> u32 {
        let (taken, _) = self.harvest_blocks(|entries| {
            for entry in entries {
                let (slot, page) = entry.payload();
                take(slot, page);
                // Only now: from here on the kernel may overwrite the payload.
                entry.mark_reset();
            }
        });
        taken
    }

    /// As [`harvest`](Self::harvest), in blocks of up to [`BLOCK`] entries side by side: `take`
    /// has to read the payload of each entry and then mark it for reset. Also returns whether the
    /// kernel has overrun the ring, before or meanwhile; nothing may be reset meanwhile.
    #[inline(always)]
    pub(crate) fn harvest_blocks(&mut self, mut take: impl FnMut(&[Entry])) -> (u32, bool) {
        let mut overrun = self.is_overrun();
        self.note_oldest();
        let alone = self.oldest == self.head;
        let mut taken = 0;
        while taken < self.entries() {
            let block = self.memory.block_from(self.head);
            // The kernel pushes in order, so what is between two dirty entries of a lap is dirty.
            // The acquire load of the last one's flags orders the payloads of all.
            let whole = block[0].is_dirty() && block[block.len() - 1].is_dirty();
            let dirty = if whole {
                if taken == 0 {
                    prefetch_lines(block);
                }
                self.prefetch_block(self.head.wrapping_add(block.len() as u32));
                block
            } else {
                let count = block.iter().take_while(|entry| entry.is_dirty()).count();
                &block[..count]
            };
            take(dirty);
            self.head = self.head.wrapping_add(dirty.len() as u32);
            taken += dirty.len() as u32;
            if !whole {
                break;
            }
        }
        // A kernel that keeps its reserve never lets a whole ring wait, taken now or before: it has overrun
        // the ring, maybe while we were at it.
        overrun |= self.all_wait();
        if overrun {
            self.note_overrun();
        } else if alone && taken > 0 && self.is_out_of_step() {
            // What was at the head is what the kernel has pushed last, and nothing else waits.
            self.memory.set_out_of_step(false);
        }
        (taken, overrun)
    }

    /// Asks for the lines of the block at `index` early, if it is complete: the vCPU loses no line
    /// that it has yet to fill, but for the one looked at.
    #[inline(always)]
    fn prefetch_block(&self, index: u32) {
        let block = self.memory.block_from(index);
        if block[block.len() - 1].is_dirty() {
            prefetch_lines(block);
        }
    }

    /// Whether the kernel has filled the ring to the last entry, which its reserve forbids: then it
    /// may have overwritten entries, too.
    ///
    /// The entry behind the head was harvested a whole ring ago. If it is dirty again, the kernel's
    /// write index is at least a ring ahead of ours, and so of its own reset index.
    pub(crate) fn is_overrun(&mut self) -> bool {
        let overrun = self.memory.at(self.head.wrapping_sub(1)).is_dirty();
        if overrun {
            self.note_overrun();
        }
        overrun
    }

    /// Whether the kernel is about to overrun what waits for its reset, or has: it has used up half or more of
    /// the reserve that it keeps before the first of these.
    ///
    /// From then on a reset may meet a vCPU at an entry, which it recycles while the vCPU fills it. Then the
    /// page that was harvested is not protected again, or what is logged is forgotten, and no count tells.
    /// Nothing may be marked, nor reset, meanwhile.
    pub(crate) fn is_crammed(&mut self) -> bool {
        self.note_oldest();
        let reserved = self.oldest.wrapping_sub(self.half_reserve);
        !self.memory.at(reserved).is_free()
    }

    /// Notes that the kernel has overrun the ring, or may have.
    pub(crate) fn note_overrun(&mut self) {
        self.was_overrun = true;
        self.memory.set_out_of_step(true);
    }

    /// Whether the kernel may have overrun the ring since the consumer was in step with it: then a gap is
    /// no news.
    pub(crate) fn is_out_of_step(&self) -> bool {
        self.memory.is_out_of_step()
    }

    /// Whether [`rejoin`](Self::rejoin) is worth its look at every entry: the ring was seen overrun at some
    /// time, or the head is free and one of the next entries, a line of them with it, is dirty.
    pub(crate) fn may_have_a_gap(&self) -> bool {
        let is_dirty = |ahead: u32| self.memory.at(self.head.wrapping_add(ahead)).is_dirty();
        self.was_overrun || !is_dirty(0) && (1..LINE as u32).any(is_dirty)
    }

    /// Follows the kernel's reset index. Behind it nothing waits; what does not, up to the head, was recycled, and
    /// maybe filled again.
    fn note_oldest(&mut self) {
        if self.all_recycled() {
            self.oldest = self.head;
        }
        while self.oldest != self.head && !self.memory.at(self.oldest).awaits_reset() {
            self.oldest = self.oldest.wrapping_add(1);
        }
    }

    /// Whether a whole ring was taken, or more, since all before it was recycled.
    pub(crate) fn all_wait(&self) -> bool {
        self.head.wrapping_sub(self.oldest) >= self.entries()
    }

    /// Whether the kernel has recycled everything that was harvested.
    ///
    /// It recycles in ring order, so the last harvested entry tells for all of them.
    pub(crate) fn all_recycled(&self) -> bool {
        !self.memory.at(self.head.wrapping_sub(1)).awaits_reset()
    }

    /// Whether no entry at all waits for a reset, wherever an overrun may have left the indices: then
    /// no reset will ever recycle what was harvested so far. Looks at every entry.
    pub(crate) fn nothing_awaits_reset(&self) -> bool {
        (0..self.entries()).all(|index| !self.memory.at(index).awaits_reset())
    }

    /// Whether an entry of a memslot waits for a reset that names its page `first` or one after it, wherever
    /// an overrun, or somebody else, may have left the indices. Looks at every entry.
    pub(crate) fn awaits_reset_of(&self, slot: u32, first: u64) -> bool {
        let entries = (0..self.entries()).map(|index| self.memory.at(index));
        // The payload of any other may be the vCPU's to fill just now.
        let waiting = entries.filter(|entry| entry.awaits_reset());
        let mut named = waiting.map(Entry::payload);
        named.any(|(named, page)| named == slot && page >= first)
    }

    /// What the last harvested entry says, as long as the vCPU has not come round to it: slot and page.
    pub(crate) fn last(&self) -> (u32, u64) {
        self.memory.at(self.head.wrapping_sub(1)).payload()
    }

    /// Joins the consumer to the kernel again after the kernel overran the ring, and returns how
    /// many entries were passed over: zero where there was no gap.
    ///
    /// An overrun leaves the kernel's write index further along than the consumer can follow: the
    /// entry at the head stays free, entries behind it are dirty. The gap is marked for reset, so
    /// that the kernel's reset index crosses it too. Its payloads, which `skip` is told, are old: pages that
    /// are merely protected once more, or such as their slot no longer has.
    pub(crate) fn rejoin(&mut self, mut skip: impl FnMut(u32, u64)) -> u32 {
        let is_dirty = |ahead: u32| self.memory.at(self.head.wrapping_add(ahead)).is_dirty();
        let Some(gap) = (1..self.entries()).find(|&ahead| is_dirty(ahead)) else {
            return 0;
        };
        // The kernel pushes in order. Had it pushed at the head while we looked, the entry found
        // would have been pushed later still, and the head would show it now.
        if is_dirty(0) {
            return 0;
        }
        self.note_oldest();
        // The write index is beyond the dirty entry found: nothing past it is marked.
        for _ in 0..gap {
            let entry = self.memory.at(self.head);
            let (old_slot, old_page) = entry.payload();
            skip(old_slot, old_page);
            entry.mark_reset();
            self.head = self.head.wrapping_add(1);
        }
        self.note_overrun();
        gap
    }

    /// Helps the kernel on whose reset index stays behind at a free entry, and whether it did.
    ///
    /// So it does for good if it overran entries that were harvested and not recycled: these were marked
    /// twice and recycled once, and what awaits a reset now lies beyond it. Where it is nobody tells. So the
    /// free entries before are marked, one more each time that the kernel `finds_nothing`, until it gets on;
    /// since all of them were pushed once, it does not get past its own write index. What they held is
    /// recycled once more. If it finds something for another reason, or is disturbed, those marked in vain are
    /// free again; no reset is in flight but by `finds_nothing`.
    ///
    /// The entry at the head may be where it stays, too, but is marked only if the vCPU `is_full`, of nothing:
    /// else it may be where the kernel is to write next, and beyond it what was marked by somebody else. What
    /// was in vain is not tried twice, but after [`retry_help`](Self::retry_help).
    pub(crate) fn reach_back(
        &mut self,
        is_full: bool,
        mut finds_nothing: impl FnMut() -> bool,
    ) -> bool {
        if self.in_vain == Some(self.head) {
            return false;
        }
        let mut never_found = true;
        let mut finds_nothing = || {
            let nothing = finds_nothing();
            never_found &= nothing;
            nothing
        };
        let behind = |back: u32| self.memory.at(self.head.wrapping_sub(back));
        let mut before_head = 1..=self.entries();
        before_head.find(|&back| behind(back).awaits_reset());
        let mut marked = Marked(Vec::new());
        let mut is_helped = false;
        for back in before_head.filter(|&back| !behind(back).awaits_reset()) {
            let is_sure = back < self.entries()
                || is_full && (marked.0.len()..NO_ACCIDENT).all(|_| finds_nothing());
            let entry = behind(back);
            if !is_sure || !entry.mark_free() {
                break;
            }
            // Before any reset finds it.
            self.memory.set_out_of_step(true);
            marked.0.push(entry);
            if !finds_nothing() {
                is_helped = !entry.awaits_reset();
                break;
            }
        }
        drop(marked);
        self.in_vain = never_found.then_some(self.head);
        if is_helped {
            self.note_overrun();
        }
        is_helped
    }

    /// Has [`reach_back`](Self::reach_back) try again: the vCPU says that it is full, or a slot is to go.
    pub(crate) fn retry_help(&mut self) {
        self.in_vain = None;
    }
}

/// Half of the entries that a kernel keeps free before a vCPU stops, for what that logs on its way out: of those
/// that are not for the hardware's buffer, and of a small ring's share.
fn half_reserve(reserved: u32, entries: u32) -> u32 {
    let kept = reserved.min(RESERVED_ENTRIES).min(entries / 32);
    (kept / 2).max(1)
}

/// Entries marked to help the kernel on: free again once this is dropped, by unwinding, too.
struct Marked<'a>(Vec<&'a Entry>);

impl Drop for Marked<'_> {
    fn drop(&mut self) {
        // The head's first: an onlooker takes it for a harvest's, and all that are not free for waiting.
        self.0.iter().rev().for_each(|entry| entry.unmark());
    }
}

#[inline(always)]
fn prefetch_lines(entries: &[Entry]) {
    for entry in entries.iter().step_by(LINE) {
        prefetch::for_write(entry);
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::producer::Producer;
    use super::*;

    const ENTRIES: u32 = 8;

    fn ring(first_index: u32) -> (Producer, RingView) {
        let producer = Producer::new(ENTRIES, first_index);
        let view = RingView::new(producer.memory());
        (producer, view)
    }

    fn push(producer: &Producer, pages: core::ops::Range<u64>) {
        for page in pages {
            producer.push(5, page);
        }
    }

    fn harvest(view: &mut RingView) -> Vec<u64> {
        let mut pages = Vec::new();
        let taken = view.harvest(|slot, page| {
            assert_eq!(slot, 5);
            pages.push(page);
        });
        assert_eq!(taken as usize, pages.len());
        pages
    }

    fn recycle(producer: &Producer) -> Vec<u64> {
        let mut pages = Vec::new();
        let recycled = producer.recycle(u32::MAX, |_, page| pages.push(page));
        assert_eq!(recycled as usize, pages.len());
        pages
    }

    #[test]
    fn a_harvest_takes_what_is_dirty_in_order() {
        let (producer, mut view) = ring(0);
        assert_eq!(harvest(&mut view), [0u64; 0]);
        push(&producer, 0..3);
        assert_eq!(harvest(&mut view), [0, 1, 2]);
        // They wait for their reset, and are not taken twice.
        assert_eq!(harvest(&mut view), [0u64; 0]);
        push(&producer, 3..5);
        assert_eq!(harvest(&mut view), [3, 4]);
        assert_eq!(recycle(&producer), [0, 1, 2, 3, 4]);
        assert_eq!(harvest(&mut view), [0u64; 0]);
    }

    #[test]
    fn payloads_are_handed_over_whole() {
        let (producer, mut view) = ring(0);
        producer.push(0xffff_0001, u64::MAX);
        let mut seen = None;
        view.harvest(|slot, page| seen = Some((slot, page)));
        assert_eq!(seen, Some((0xffff_0001, u64::MAX)));
    }

    #[test]
    fn indices_wrap() {
        for before in 0..20 {
            let (producer, mut view) = ring(u32::MAX - before);
            for round in 0..10 {
                let pages = round * 5..round * 5 + 5;
                push(&producer, pages.clone());
                assert_eq!(producer.used(), 5);
                assert!(!view.is_overrun());
                assert!(harvest(&mut view).into_iter().eq(pages.clone()));
                assert!(recycle(&producer).into_iter().eq(pages));
                assert_eq!(view.rejoin(|_, _| ()), 0);
            }
        }
    }

    /// Blocks of 64: every place of the head in its block, every length, over the ring's end and the
    /// index's wrap.
    #[test]
    fn harvests_begin_and_end_anywhere() {
        for entries in [64, 128, 256] {
            for first_index in (0..70).chain(u32::MAX - 70..=u32::MAX) {
                let producer = Producer::new(entries, first_index);
                let mut view = RingView::new(producer.memory());
                let mut next = 0;
                for count in [1, 2, 3, 5, 61, 62, 63, 64, 65, 127, 130, 200, 255] {
                    let count = count.min(u64::from(entries) - 1);
                    push(&producer, next..next + count);
                    assert!(harvest(&mut view).into_iter().eq(next..next + count));
                    assert!(harvest(&mut view).is_empty());
                    assert!(recycle(&producer).into_iter().eq(next..next + count));
                    next += count;
                }
                assert!(!view.was_overrun);
            }
        }
    }

    #[test]
    fn a_whole_ring_is_one_harvest_and_an_overrun() {
        for first_index in [0, 3, u32::MAX - 3] {
            let (producer, mut view) = ring(first_index);
            push(&producer, 0..7);
            assert!(!view.is_overrun());
            assert!(!view.was_overrun);
            push(&producer, 7..8);
            assert!(view.is_overrun());
            assert_eq!(harvest(&mut view), [0, 1, 2, 3, 4, 5, 6, 7]);
            assert!(!view.is_overrun());
            assert!(view.was_overrun);
            assert_eq!(recycle(&producer).len(), 8);
            assert_eq!(view.rejoin(|_, _| ()), 0);
        }
    }

    #[test]
    fn a_harvest_ends_even_if_the_kernel_never_stops() {
        // Two blocks, and a page pushed for each that is taken: behind the head, all is dirty again.
        let producer = Producer::new(2 * BLOCK, 0);
        let mut view = RingView::new(producer.memory());
        push(&producer, 0..2 * u64::from(BLOCK) - 1);
        assert!(!view.is_overrun());
        let (taken, overrun) = view.harvest_blocks(|entries| {
            for entry in entries {
                producer.push(5, 0);
                entry.mark_reset();
            }
        });
        assert_eq!(taken, 2 * BLOCK);
        assert!(overrun && view.was_overrun, "not seen");
    }

    #[test]
    fn the_last_harvested_entry_tells_whether_all_are_recycled() {
        for first_index in [0, u32::MAX] {
            let (producer, mut view) = ring(first_index);
            assert!(view.all_recycled());
            push(&producer, 0..3);
            assert!(view.all_recycled());
            harvest(&mut view);
            assert!(!view.all_recycled());
            producer.recycle(2, |_, _| ());
            assert!(!view.all_recycled());
            push(&producer, 3..4);
            assert!(!view.all_recycled());
            producer.recycle(1, |_, _| ());
            assert!(view.all_recycled());
        }
    }

    #[test]
    fn a_gap_is_crossed_once_there_is_something_beyond() {
        for first_index in [0, 3, u32::MAX - 9] {
            for lead in 1..ENTRIES {
                // The kernel runs a whole ring and `lead` entries ahead.
                let (producer, mut view) = ring(first_index);
                push(&producer, 0..u64::from(ENTRIES + lead));
                assert!(view.is_overrun());
                assert_eq!(harvest(&mut view).len(), 8);
                recycle(&producer);
                assert_eq!(producer.used(), lead);
                assert_eq!(
                    view.rejoin(|_, _| ()),
                    0,
                    "nothing shows where the kernel is"
                );

                push(&producer, 100..101);
                assert_eq!(harvest(&mut view), [0u64; 0]);
                assert_eq!(view.rejoin(|_, _| ()), lead);
                assert_eq!(harvest(&mut view), [100]);
                assert_eq!(recycle(&producer).len() as u32, lead + 1);
                assert_eq!(producer.used(), 0);
                assert_eq!(view.rejoin(|_, _| ()), 0);
            }
        }
    }

    #[test]
    fn a_gap_is_looked_for_where_there_may_be_one() {
        for gap in 0..6 {
            let (producer, mut view) = ring(0);
            assert!(!view.may_have_a_gap(), "there is nothing");
            push(&producer, 0..gap);
            RingView::new(producer.memory()).harvest(|_, _| ());
            recycle(&producer);
            push(&producer, 100..101);
            assert_eq!(view.may_have_a_gap(), (1..4).contains(&gap), "of {gap}");
            push(&producer, 101..103);
            assert_eq!(view.may_have_a_gap(), (1..4).contains(&gap), "of {gap}");
            view.note_overrun();
            assert!(view.may_have_a_gap(), "anywhere");
        }
    }

    #[test]
    fn in_step_is_who_takes_what_is_at_the_head_and_nothing_else_waits() {
        let (producer, mut view) = ring(5);
        assert!(!view.is_out_of_step());
        push(&producer, 0..8);
        harvest(&mut view);
        assert!(view.is_out_of_step(), "it was overrun");
        recycle(&producer);
        harvest(&mut view);
        assert!(view.is_out_of_step(), "nothing was there");
        push(&producer, 0..2);
        harvest(&mut view);
        assert!(!view.is_out_of_step());
        view.note_overrun();
        push(&producer, 2..4);
        harvest(&mut view);
        assert!(view.is_out_of_step(), "others wait");
    }

    #[test]
    fn half_of_a_reserve_leaves_the_hardwares_buffer_out() {
        let halves = [
            (64, 4096, 32),
            (64, 65536, 32),
            (64 + 512, 4096, 32),
            (8, 4096, 4),
            (64, 1024, 16),
            (64, 128, 2),
            (64, 8, 1),
            (1, 4096, 1),
        ];
        for (reserved, entries, half) in halves {
            assert_eq!(
                half_reserve(reserved, entries),
                half,
                "{reserved} of {entries}"
            );
        }
    }

    #[test]
    fn what_waits_is_known_by_its_slot_and_page() {
        let (producer, mut view) = ring(3);
        push(&producer, 2..4);
        assert!(!view.awaits_reset_of(5, 0), "it is not harvested yet");
        harvest(&mut view);
        assert!(view.awaits_reset_of(5, 0) && view.awaits_reset_of(5, 3));
        assert!(!view.awaits_reset_of(5, 4), "no page is as far as that");
        assert!(!view.awaits_reset_of(6, 0), "it is another slot's");
        recycle(&producer);
        assert!(!view.awaits_reset_of(5, 0));
    }

    /// A reset that found something for another reason says nothing about the help.
    #[test]
    fn help_is_given_again_unless_it_was_in_vain() {
        for first_index in [0, 3, u32::MAX - 9] {
            let (producer, mut view) = ring(first_index);
            // The second two are pushed over entries that are harvested: the kernel stays where they were.
            for pages in [0..8, 8..10] {
                push(&producer, pages);
                harvest(&mut view);
            }
            assert_eq!(recycle(&producer).len(), 8);
            push(&producer, 10..11);
            harvest(&mut view);
            assert_eq!(recycle(&producer), [0u64; 0], "it is behind");
            assert!(!view.reach_back(false, || false), "disturbed");
            assert!(view.reach_back(false, || recycle(&producer).is_empty()));
            assert_eq!(producer.used(), 0);

            // In vain, once and for all: what waits is not where the kernel looks.
            let mut looks = 0;
            let mut in_vain = || {
                looks += 1;
                true
            };
            push(&producer, 11..12);
            harvest(&mut view);
            assert!(!view.reach_back(false, &mut in_vain) && !view.reach_back(false, &mut in_vain));
            assert_eq!(looks, 6);
            view.retry_help();
            assert!(!view.reach_back(false, || {
                looks += 1;
                true
            }));
            assert_eq!(looks, 12);
        }
    }

    #[test]
    fn a_ring_without_a_gap_is_left_alone() {
        let (producer, mut view) = ring(0);
        assert_eq!(view.rejoin(|_, _| ()), 0);
        push(&producer, 0..6);
        assert_eq!(view.rejoin(|_, _| ()), 0, "the head is dirty");
        assert_eq!(harvest(&mut view), [0, 1, 2, 3, 4, 5]);
        assert_eq!(view.rejoin(|_, _| ()), 0, "nothing is dirty");
        assert!(!view.was_overrun);
        assert_eq!(recycle(&producer).len(), 6);
    }
}
