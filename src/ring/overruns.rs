// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Overruns: the signs of a broken ring. `view` checks them at a harvest, the reset gate before a reset, and a full exit that found
//! little afterwards. `memory` keeps the result, `harvest/pass` counts it.
//!
//! A kernel that keeps its reserve never overruns a ring. kvm_pvm's instruction emulator checks for a full ring too seldom. Then
//! entries are lost, and neither side can find the other's index any more: the ring is broken for good.

use super::view::{LINE, RingView};

impl RingView {
    /// Returns whether the kernel has filled the ring to the last entry, which its reserve forbids. It may then have overwritten
    /// entries, too.
    ///
    /// The entry behind the head was harvested a whole ring ago. If it is dirty again, the kernel's write index is at least a ring
    /// ahead of ours, and so of its own reset index.
    pub(super) fn is_filled_to_its_end(&self) -> bool {
        self.memory.at(self.head.wrapping_sub(1)).is_dirty()
    }

    /// Returns whether the entry at the head is free and one of the next three is dirty: the kernel's index is not where it should be.
    pub(super) fn has_gap(&self) -> bool {
        self.has_gap_within(LINE as u32)
    }

    fn has_gap_within(&self, distance: u32) -> bool {
        let is_dirty = |ahead: u32| self.memory.at(self.head.wrapping_add(ahead)).is_dirty();
        // The kernel pushes in order. If it had pushed at the head during this look, the entry that was found would have been pushed
        // later still, and the head would show it now.
        !is_dirty(0) && (1..distance).any(is_dirty) && !is_dirty(0)
    }

    /// Returns whether a whole ring was taken, or more, since everything before was recycled.
    pub(super) fn all_wait(&self) -> bool {
        self.head.wrapping_sub(self.reset_index) >= self.entries()
    }

    /// Checks whether the kernel is about to overrun what waits for its reset, or has done so: it has used most of the reserve that it
    /// keeps before the first of these (`half_reserve`). Returns true if that breaks the ring.
    ///
    /// From then on a reset may recycle an entry while the vCPU fills it. Then the page that was harvested is not protected
    /// again, or what is logged is forgotten, and no count shows it. Nothing may be marked or reset meanwhile.
    pub(crate) fn breaks_at_its_reserve(&mut self) -> bool {
        self.follow_reset_index();
        let reserved = self.reset_index.wrapping_sub(self.half_reserve);
        !self.memory.at(reserved).is_free() && self.memory.note_broken()
    }

    /// Looks at every entry for one that is dirty beyond a free head, after a full exit that found less than a full ring holds.
    /// Returns true if that breaks the ring.
    pub(crate) fn breaks_at_a_gap(&self) -> bool {
        self.has_gap_within(self.entries()) && self.memory.note_broken()
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    //! The properties of the ring compare all four signs with an oracle; these tests show where each begins.

    use super::super::entry::Entry;
    use super::super::view::tests::{push, recycle, ring};
    use super::*;

    /// Returns how many entries the next harvest takes, and whether it finds the ring broken.
    fn breaks(view: &mut RingView) -> (u32, bool) {
        view.harvest_blocks(&mut |entries: &[Entry]| {
            entries.iter().for_each(|entry| entry.mark_reset())
        })
    }

    #[test]
    fn a_whole_ring_is_one_harvest_and_an_overrun() {
        for first_index in [0, 3, u32::MAX - 3] {
            let (producer, mut view) = ring(first_index);
            push(&producer, 0..7);
            assert!(!view.is_filled_to_its_end());
            push(&producer, 7..8);
            assert!(view.is_filled_to_its_end());
            assert_eq!(breaks(&mut view), (8, true));
            assert!(view.memory.is_broken());
            assert_eq!(recycle(&producer).len(), 8);
            push(&producer, 8..10);
            assert_eq!(breaks(&mut view), (2, false), "it is known");
        }
    }

    #[test]
    fn a_gap_breaks_the_ring_where_it_is_looked_for() {
        for first_index in [0, 3, u32::MAX - 9] {
            for gap in 0..7 {
                let (producer, mut view) = ring(first_index);
                assert!(!view.has_gap(), "there is nothing");
                push(&producer, 0..gap);
                RingView::new(producer.memory()).harvest(|_, _| ());
                recycle(&producer);
                push(&producer, 100..101);
                assert_eq!(view.has_gap(), (1..4).contains(&gap), "of {gap}");
                assert_eq!(view.breaks_at_a_gap(), gap > 0, "of {gap}");
                assert!(!view.breaks_at_a_gap(), "it is known");
                let expected = if gap > 0 { 0 } else { 1 };
                assert_eq!(breaks(&mut view), (expected, false), "of {gap}");
            }
        }
    }
}
