// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rings of every size, compared with a naive oracle whose indices never wrap, from the first index on and across 2^32.

use proptest::collection::vec;
use proptest::prelude::*;

use super::RingView;
use super::entry::Entry;
use super::gauge::Gauge;
use super::producer::Producer;
use super::reserve::half_reserve;

#[derive(Debug, Clone, Copy)]
enum Deed {
    /// The vCPU writes so many pages, or as many as fit.
    Push(u32),
    Harvest,
    Recycle(u32),
    /// As before a reset.
    LookAtReserve,
    /// As after a full exit that found nothing.
    LookForGap,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Free,
    Dirty,
    Marked,
}

/// Each entry's state and payload, and both sides' indices, counted on for ever.
struct Oracle {
    entries: Vec<(State, (u32, u64))>,
    pushed: u64,
    head: u64,
    /// The consumer's idea of the kernel's: `recycled`, as it was at its last look.
    reset_index: u64,
    recycled: u64,
    is_broken: bool,
    /// Whether the vCPU ever filled the ring to its last entry, which the kernel's reserve forbids.
    was_full: bool,
    /// Entries pushed and not recycled, at most so far.
    most_used: u32,
}

impl Oracle {
    fn new(entries: u32, first_index: u32) -> Self {
        let first = u64::from(first_index);
        Self {
            entries: vec![(State::Free, (0, 0)); entries as usize],
            pushed: first,
            head: first,
            reset_index: first,
            recycled: first,
            is_broken: false,
            was_full: false,
            most_used: 0,
        }
    }

    fn entry(&self, index: u64) -> (State, (u32, u64)) {
        self.entries[index as usize % self.entries.len()]
    }

    fn at(&mut self, index: u64) -> &mut (State, (u32, u64)) {
        let size = self.entries.len();
        &mut self.entries[index as usize % size]
    }

    fn push(&mut self) -> (u32, u64) {
        // No two alike.
        let payload = (!self.pushed as u32, self.pushed << 20);
        *self.at(self.pushed) = (State::Dirty, payload);
        self.pushed += 1;
        let used = (self.pushed - self.recycled) as u32;
        self.most_used = self.most_used.max(used);
        self.was_full |= used as usize >= self.entries.len();
        payload
    }

    fn is_dirty(&self, index: u64) -> bool {
        self.entry(index).0 == State::Dirty
    }

    /// Whether the entry at the head is not dirty, and one up to `distance` from it is.
    fn has_gap(&self, distance: u64) -> bool {
        !self.is_dirty(self.head) && (1..distance).any(|ahead| self.is_dirty(self.head + ahead))
    }

    fn look(&mut self, breaks: bool) -> bool {
        let new = breaks && !self.is_broken;
        self.is_broken |= breaks;
        new
    }

    fn follow_reset_index(&mut self) {
        if self.recycled == self.head {
            self.reset_index = self.head;
        }
        while self.reset_index < self.head && self.entry(self.reset_index).0 != State::Marked {
            self.reset_index += 1;
        }
    }

    /// Returns the entries that a harvest took, which must be all that are dirty one after the other. Of a ring that was overrun it
    /// may take more, because only the ends of blocks are checked. Also returns whether the harvest has broken the ring.
    fn harvest(&mut self, taken: u32) -> (Vec<(u32, u64)>, bool) {
        let size = self.entries.len() as u64;
        let overrun = self.is_dirty(self.head + size - 1);
        self.follow_reset_index();
        let mut payloads = Vec::new();
        for _ in 0..taken {
            let (state, payload) = self.at(self.head);
            payloads.push(*payload);
            let before = core::mem::replace(state, State::Marked);
            assert!(self.was_full || before == State::Dirty, "not dirty");
            self.head += 1;
        }
        let breaks = self.look(overrun || self.has_gap(4) || self.head - self.reset_index >= size);
        assert_ne!(self.at(self.head).0, State::Dirty, "left behind");
        (payloads, breaks)
    }

    fn recycle(&mut self, limit: u32) -> Vec<(u32, u64)> {
        let mut recycled = Vec::new();
        while recycled.len() < limit as usize && self.at(self.recycled).0 == State::Marked {
            self.at(self.recycled).0 = State::Free;
            recycled.push(self.at(self.recycled).1);
            self.recycled += 1;
        }
        recycled
    }

    fn none(&self, state: State) -> bool {
        self.entries.iter().all(|entry| entry.0 != state)
    }
}

/// Follows `deeds`, and compares all that both sides can see after each.
fn run(entries: u32, first_index: u32, deeds: &[Deed], may_overrun: bool) {
    let producer = Producer::new(entries, first_index);
    let memory = producer.memory();
    let mut view = RingView::new(producer.memory());
    let mut oracle = Oracle::new(entries, first_index);
    for &deed in deeds {
        match deed {
            Deed::Push(count) => {
                let room = match may_overrun {
                    true => u32::MAX,
                    false => entries - 1 - producer.used(),
                };
                for _ in 0..count.min(room) {
                    let (slot, page) = oracle.push();
                    producer.push(slot, page);
                }
            }
            Deed::Harvest => {
                let mut taken = Vec::new();
                let (count, breaks) = view.harvest_blocks(&mut |entries: &[Entry]| {
                    for entry in entries {
                        taken.push(entry.payload());
                        entry.mark_reset();
                    }
                });
                assert_eq!((taken, breaks), oracle.harvest(count));
            }
            Deed::Recycle(limit) => {
                let mut recycled = Vec::new();
                let count = producer.recycle(limit, |slot, page| recycled.push((slot, page)));
                assert_eq!(recycled, oracle.recycle(limit));
                assert_eq!(count as usize, recycled.len());
            }
            Deed::LookAtReserve => {
                oracle.follow_reset_index();
                let reserved = oracle.reset_index + u64::from(entries - half_reserve(64, entries));
                let breaks = oracle.entry(reserved).0 != State::Free;
                assert_eq!(view.breaks_at_its_reserve(), oracle.look(breaks));
            }
            Deed::LookForGap => {
                let breaks = oracle.has_gap(entries.into());
                assert_eq!(view.breaks_at_a_gap(), oracle.look(breaks));
            }
        }
        for (index, (state, _)) in oracle.entries.iter().enumerate() {
            let entry = memory.at(index as u32);
            let seen = [entry.is_free(), entry.is_dirty(), entry.awaits_reset()];
            let expected = [State::Free, State::Dirty, State::Marked].map(|one| one == *state);
            assert_eq!(seen, expected, "entry {index}");
        }
        assert_eq!(view.memory.is_broken(), oracle.is_broken);
        assert_eq!(view.nothing_awaits_reset(), oracle.none(State::Marked));
        assert_eq!(u64::from(producer.used()), oracle.pushed - oracle.recycled);
        if oracle.was_full {
            continue;
        }
        let waiting = (oracle.pushed - oracle.head) as u32;
        let gauge = Gauge::new(&memory, oracle.head as u32);
        assert_eq!([view.occupancy(), gauge.occupancy()], [waiting; 2]);
        for count in [0, 1, waiting, waiting + 1, entries, entries + 1, u32::MAX] {
            assert_eq!(view.at_least(count), count <= waiting, "{count}");
        }
        assert_eq!(view.all_recycled(), oracle.recycled == oracle.head);
        assert_eq!(view.reset_index(), oracle.recycled as u32);
        oracle.follow_reset_index();
        assert_eq!(producer.awaits_reset(), oracle.recycled != oracle.head);
    }
    let most = entries - half_reserve(64, entries);
    assert!(may_overrun || oracle.most_used > most || !view.memory.is_broken());
}

fn ring() -> impl Strategy<Value = (u32, u32)> {
    (1u32..=9).prop_flat_map(|bits| {
        let entries = 1 << bits;
        let first_index = prop_oneof![
            1 => 0..2 * entries,
            3 => (0..2 * entries).prop_map(|before| u32::MAX - before),
        ];
        (Just(entries), first_index)
    })
}

fn count() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..8, 56u32..72, 0u32..600]
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        4 => count().prop_map(Deed::Push),
        3 => Just(Deed::Harvest),
        2 => count().prop_map(Deed::Recycle),
        1 => Just(Deed::Recycle(u32::MAX)),
        1 => Just(Deed::LookAtReserve),
        1 => Just(Deed::LookForGap),
    ]
}

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    vec(deed(), 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_ring_in_order((entries, first_index) in ring(), deeds in deeds()) {
        run(entries, first_index, &deeds, false);
    }

    #[test]
    fn a_ring_that_is_overrun((entries, first_index) in ring(), deeds in deeds()) {
        run(entries, first_index, &deeds, true);
    }
}
