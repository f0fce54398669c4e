//! Rings that the kernel fills past their end, or up to what waits for its reset: how that is seen, and how
//! both sides get in step again.

use super::entry::Entry;
use super::view::{LINE, RingView};
use crate::kernel::RESERVED_ENTRIES;

/// So many resets in a row find nothing, undisturbed, only where there is nothing to be found.
const NO_ACCIDENT: usize = 16;

impl RingView {
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
    pub(crate) fn is_reserve_used(&mut self) -> bool {
        self.follow_reset_index();
        let reserved = self.reset_index.wrapping_sub(self.half_reserve);
        !self.memory.at(reserved).is_free()
    }

    /// Whether a whole ring was taken, or more, since all before it was recycled.
    pub(crate) fn all_wait(&self) -> bool {
        self.head.wrapping_sub(self.reset_index) >= self.entries()
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
        self.follow_reset_index();
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
pub(super) fn half_reserve(reserved: u32, entries: u32) -> u32 {
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

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::super::view::tests::{ENTRIES, harvest, push, recycle, ring};
    use super::*;

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
