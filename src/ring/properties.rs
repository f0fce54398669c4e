//! Rings of every size against a naive oracle whose indices never wrap, from the first index on
//! and across 2^32.

use proptest::collection::vec;
use proptest::prelude::*;

use super::RingView;
use super::gauge::Gauge;
use super::overruns::half_reserve;
use super::producer::Producer;

#[derive(Debug, Clone, Copy)]
enum Deed {
    /// The vCPU writes so many pages, or as many as there is room for.
    Push(u32),
    Harvest,
    Recycle(u32),
    Rejoin,
    /// After a reset that finds nothing. Whether the vCPU may say that the ring is full of nothing.
    ReachBack(bool),
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
    /// What the consumer takes for the kernel's: `recycled`, as it was at the last harvest or rejoin.
    reset_index: u64,
    recycled: u64,
    was_overrun: bool,
    /// Whether the vCPU ever filled the ring to its last entry, which the kernel's reserve forbids.
    was_full: bool,
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
            was_overrun: false,
            was_full: false,
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
        self.was_full |= self.pushed - self.recycled >= self.entries.len() as u64;
        payload
    }

    fn is_overrun(&mut self) -> bool {
        let behind = self.head + self.entries.len() as u64 - 1;
        let overrun = self.at(behind).0 == State::Dirty;
        self.was_overrun |= overrun;
        overrun
    }

    fn follow_reset_index(&mut self) {
        if self.recycled == self.head {
            self.reset_index = self.head;
        }
        while self.reset_index < self.head && self.entry(self.reset_index).0 != State::Marked {
            self.reset_index += 1;
        }
    }

    /// The entries that a harvest took, which must be all that are dirty one after the other. Of a
    /// ring that was overrun it may take more: blocks are looked at where they begin and end.
    fn harvest(&mut self, taken: u32) -> Vec<(u32, u64)> {
        self.is_overrun();
        self.follow_reset_index();
        let mut payloads = Vec::new();
        for _ in 0..taken {
            let (state, payload) = self.at(self.head);
            payloads.push(*payload);
            let before = core::mem::replace(state, State::Marked);
            assert!(self.was_overrun || before == State::Dirty, "not dirty");
            self.head += 1;
        }
        self.was_overrun |= self.head - self.reset_index >= self.entries.len() as u64;
        assert_ne!(self.at(self.head).0, State::Dirty, "left behind");
        payloads
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

    fn rejoin(&mut self) -> u32 {
        let ahead = (0..self.entries.len() as u64)
            .find(|ahead| self.at(self.head + ahead).0 == State::Dirty);
        let gap = ahead.unwrap_or(0);
        if gap > 0 {
            self.follow_reset_index();
        }
        for _ in 0..gap {
            self.at(self.head).0 = State::Marked;
            self.head += 1;
        }
        self.was_overrun |= gap > 0;
        gap as u32
    }

    /// What a reset recycles once the kernel is helped on: where its index stays behind entries that await
    /// their reset, with none between that is dirty, it is as if all between had been marked.
    fn reach_back(&mut self, is_full: bool) -> Option<Vec<(u32, u64)>> {
        let size = self.entries.len() as u64;
        let behind = |back| self.head + size - back;
        let nearest = (1..=size).find(|&back| self.entry(behind(back)).0 == State::Marked)?;
        let stays = (nearest..=size).find(|&back| (behind(back) - self.recycled) % size == 0)?;
        let mut between: Vec<u64> = (nearest..=stays).map(behind).collect();
        let is_dirty = |&index: &u64| self.entry(index).0 == State::Dirty;
        if stays == size && !is_full || between.iter().any(is_dirty) {
            return None;
        }
        between.retain(|&index| self.entry(index).0 == State::Free);
        for &index in &between {
            self.at(index).0 = State::Marked;
        }
        let recycled = self.recycle(u32::MAX);
        assert!(self.recycled <= self.pushed, "beyond the write index");
        for &index in &between {
            self.at(index).0 = State::Free;
        }
        self.was_overrun = true;
        Some(recycled)
    }

    fn none(&self, state: State) -> bool {
        self.entries.iter().all(|entry| entry.0 != state)
    }
}

/// Does as `deeds` say, and compares all that both sides can see after each.
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
                let count = view.harvest(|slot, page| taken.push((slot, page)));
                assert_eq!(taken, oracle.harvest(count));
            }
            Deed::Recycle(limit) => {
                let mut recycled = Vec::new();
                let count = producer.recycle(limit, |slot, page| recycled.push((slot, page)));
                assert_eq!(recycled, oracle.recycle(limit));
                assert_eq!(count as usize, recycled.len());
            }
            Deed::Rejoin => assert_eq!(view.rejoin(|_, _| ()), oracle.rejoin()),
            Deed::ReachBack(may_be_full) => {
                producer.recycle(u32::MAX, |_, _| ());
                oracle.recycle(u32::MAX);
                let is_dirty = oracle.entry(oracle.head).0 == State::Dirty;
                let is_full = may_be_full && producer.used() >= entries - 1 && !is_dirty;
                let mut recycled = Vec::new();
                view.retry_help();
                let is_helped = view.reach_back(is_full, || {
                    producer.recycle(u32::MAX, |slot, page| recycled.push((slot, page))) == 0
                });
                let expected = oracle.reach_back(is_full);
                assert_eq!(is_helped.then_some(recycled), expected);
            }
        }
        for (index, (state, _)) in oracle.entries.iter().enumerate() {
            let entry = memory.at(index as u32);
            let seen = [entry.is_free(), entry.is_dirty(), entry.awaits_reset()];
            let expected = [State::Free, State::Dirty, State::Marked].map(|one| one == *state);
            assert_eq!(seen, expected, "entry {index}");
        }
        assert_eq!(view.is_overrun(), oracle.is_overrun());
        assert_eq!(view.was_overrun, oracle.was_overrun);
        assert_eq!(view.nothing_awaits_reset(), oracle.none(State::Marked));
        assert_eq!(u64::from(producer.used()), oracle.pushed - oracle.recycled);
        let is_known = oracle.reset_index == oracle.recycled && !oracle.was_overrun;
        if is_known {
            let used = oracle.pushed - oracle.recycled;
            let most = entries - half_reserve(64, entries);
            assert_eq!(view.is_reserve_used(), used > most.into(), "{used} used");
        }
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
        assert_eq!(producer.awaits_reset(), oracle.recycled != oracle.head);
    }
    assert!(may_overrun || !view.was_overrun);
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
        1 => Just(Deed::Rejoin),
        1 => any::<bool>().prop_map(Deed::ReachBack),
    ]
}

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    vec(deed(), 1..60)
}

/// Entries that are harvested and not recycled are overrun: they are marked twice and recycled once.
fn laps() -> impl Strategy<Value = Vec<Deed>> {
    let lap = (count(), count(), any::<bool>()).prop_map(|(before, over, may_be_full)| {
        let (before, over) = (Deed::Push(before), Deed::Push(over));
        let (harvest, help) = (Deed::Harvest, Deed::ReachBack(may_be_full));
        vec![before, harvest, over, harvest, Deed::Rejoin, harvest, help]
    });
    let deeds = prop_oneof![1 => lap, 2 => deed().prop_map(|deed| vec![deed])];
    vec(deeds, 1..20).prop_map(|deeds| deeds.concat())
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

    #[test]
    fn a_kernel_that_stays_behind((entries, first_index) in ring(), deeds in laps()) {
        run(entries, first_index, &deeds, true);
    }
}
