// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares what a sync returns, through each of its views, with a set of pages.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

use arbitrary::{Arbitrary, Result, Unstructured};
use kvm_dirty_ring::{DirtyLog, DirtyPages, DirtyPart, Kernel, Recycled, Run, SlotId};

use crate::memory::{Cell, DIRTY, RESET, RawRing};

const RING: u32 = 512;
const SLOTS: [SlotId; 4] = [
    SlotId::new(0, 0),
    SlotId::new(0, 1),
    SlotId::new(0, 9),
    SlotId::new(1, 0),
];
const MOST_OPS: usize = 48;
/// Pages written between two syncs, or a set of them takes too long.
const MOST_PAGES: u64 = 5_000;
const MOST_PARTS: usize = 512;

/// About these sizes something ends: a word, a cache line, a summary's word, a touched-flag's block,
/// a top word.
const BORDERS: [u64; 8] = [64, 512, 4_096, 8_192, 32_768, 65_536, 262_144, 524_288];

/// Writes, in whatever way, and syncs.
#[derive(Debug)]
pub struct Script {
    sizes: [u64; 4],
    ops: Vec<Op>,
}

#[derive(Debug)]
enum Op {
    /// The pages of a word whose bits are set.
    Word(Way, Place, u64),
    /// Consecutive pages.
    Run(Way, Place, u64),
    /// A sync returns what was written; bits choose what is split.
    Sync(u64),
    /// The next reset fails.
    Fail,
    /// A slot goes and comes again with this many pages.
    Replace(usize, u64),
    /// The caller empties the pages that it received.
    Clear,
}

/// Slot and page, as a fraction of the slot in 1/65536.
#[derive(Debug, Clone, Copy)]
struct Place {
    slot: usize,
    at: u16,
}

/// By which way pages come to be known.
#[derive(Debug, Clone, Copy)]
enum Way {
    Device,
    /// A vCPU's ring, emptied into this shard.
    Shard(usize),
}

impl<'a> Arbitrary<'a> for Script {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let mut sizes = [0; 4];
        for (slot, size) in sizes.iter_mut().enumerate() {
            *size = any_size(u, slot)?;
        }
        let mut ops = Vec::new();
        while !u.is_empty() && ops.len() < MOST_OPS {
            ops.push(any_op(u)?);
        }
        Ok(Self { sizes, ops })
    }
}

/// Around a border, or anything small. One slot alone is large, as memory takes time to make.
fn any_size(u: &mut Unstructured<'_>, slot: usize) -> Result<u64> {
    let (kind, off) = (u.arbitrary::<u8>()?, u.arbitrary::<u8>()?);
    let borders = if slot == 0 {
        &BORDERS[..]
    } else {
        &BORDERS[..4]
    };
    Ok(match borders.get(usize::from(kind % 16)) {
        Some(border) => border + u64::from(off % 4) * 31 - 31,
        None => u64::from(off) * u64::from(kind / 16 + 1) + 1,
    })
}

/// Mostly within a few words, at times over a border of summaries.
fn any_length(u: &mut Unstructured<'_>) -> Result<u64> {
    let length = u64::from(u.arbitrary::<u16>()?);
    Ok(length % if length < 0xe000 { 200 } else { 4_500 })
}

fn any_op(u: &mut Unstructured<'_>) -> Result<Op> {
    let kind = u.arbitrary::<u8>()?;
    let way = match kind >> 4 & 7 {
        shard @ 0..4 => Way::Shard(shard.into()),
        _ => Way::Device,
    };
    let place = |u: &mut Unstructured<'_>| {
        Ok::<_, arbitrary::Error>(Place {
            slot: usize::from(u.arbitrary::<u8>()? % 4),
            at: u.arbitrary()?,
        })
    };
    Ok(match kind % 16 {
        0..=4 => Op::Word(way, place(u)?, u.arbitrary()?),
        5..=9 => Op::Run(way, place(u)?, any_length(u)?),
        10..=12 => Op::Sync(u.arbitrary()?),
        13 => Op::Fail,
        14 => {
            let slot = usize::from(u.arbitrary::<u8>()? % 4);
            Op::Replace(slot, any_size(u, slot)?)
        }
        _ => Op::Clear,
    })
}

/// One vCPU, as the kernel sees it.
#[derive(Clone)]
struct Guest {
    ring: RawRing,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    pushed: u32,
    recycled: u32,
    fails: bool,
}

impl Guest {
    /// Logs the page, if there is room.
    fn push(&self, slot: SlotId, page: u64) -> bool {
        let mut state = self.state.lock().unwrap();
        // A kernel keeps some in reserve.
        let room = state.pushed - state.recycled + RING / 64 + 1 < RING;
        if room {
            let cell = Cell {
                flags: DIRTY,
                slot: slot.raw(),
                offset: page,
            };
            self.ring.set(state.pushed, cell);
            state.pushed += 1;
        }
        room
    }
}

impl Kernel for Guest {
    fn reset(&self) -> io::Result<Recycled> {
        let mut state = self.state.lock().unwrap();
        if std::mem::take(&mut state.fails) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let first = state.recycled;
        while self.ring.get(state.recycled).flags & RESET != 0 {
            self.ring.set(state.recycled, Cell::default());
            state.recycled += 1;
        }
        Ok((state.recycled - first).into())
    }
}

struct Machine {
    guest: Guest,
    log: DirtyLog,
    dirty: DirtyPages,
    sizes: BTreeMap<SlotId, u64>,
    written: BTreeSet<(SlotId, u64)>,
    /// What `dirty` is to hold.
    handed_out: BTreeSet<(SlotId, u64)>,
    budget: u64,
}

/// Runs the script.
pub fn run(script: &Script) {
    let guest = Guest {
        ring: RawRing::new(RING),
        state: Arc::default(),
    };
    let log = DirtyLog::with_kernel(Box::new(guest.clone()), RING);
    // Not needed any more: the ring stays attached.
    drop(log.attach_ring(guest.ring.memory()).unwrap());
    let mut machine = Machine {
        guest,
        log,
        dirty: DirtyPages::new(),
        sizes: BTreeMap::new(),
        written: BTreeSet::new(),
        handed_out: BTreeSet::new(),
        budget: MOST_PAGES,
    };
    for (slot, pages) in SLOTS.into_iter().zip(script.sizes) {
        machine.log.add_slot(slot, pages).unwrap();
        machine.sizes.insert(slot, pages);
    }
    for op in &script.ops {
        machine.apply(op);
    }
    machine.settle();
    machine.sync(u64::MAX);
    assert_eq!(machine.log.stats().short_resets, 0);
}

impl Machine {
    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Word(way, place, bits) => {
                let (slot, page, pages) = self.place(place);
                let first = page / 64 * 64;
                let set = (0..64.min(pages - first)).filter(|bit| bits >> bit & 1 == 1);
                self.write(way, slot, set.map(|bit| first + bit).collect());
            }
            Op::Run(way, place, len) => {
                let (slot, first, pages) = self.place(place);
                let len = len.min(pages - first);
                self.write(way, slot, (first..first + len).collect());
            }
            Op::Sync(splits) => self.sync(splits),
            Op::Fail => self.guest.state.lock().unwrap().fails = true,
            Op::Replace(slot, pages) => self.replace(SLOTS[slot], pages),
            Op::Clear => {
                self.dirty.clear();
                self.handed_out.clear();
                self.assert_handed_out(0);
            }
        }
    }

    fn place(&self, place: Place) -> (SlotId, u64, u64) {
        let slot = SLOTS[place.slot];
        let pages = self.sizes[&slot];
        (slot, (u64::from(place.at) * pages) >> 16, pages)
    }

    fn write(&mut self, way: Way, slot: SlotId, pages: Vec<u64>) {
        let count = pages.len() as u64;
        if count > self.budget {
            return;
        }
        self.budget -= count;
        match way {
            Way::Device => {
                for run in pages.chunk_by(|a, b| a + 1 == *b) {
                    let len = run.len() as u64;
                    self.log.mark_dirty(slot, run[0], len).unwrap();
                }
            }
            Way::Shard(shard) => {
                for &page in &pages {
                    while !self.guest.push(slot, page) {
                        // One fails at most. What a pass that failed has marked, its shard's next has reset.
                        for shard in [shard, 0, 1, 2, 3] {
                            let _ = self.log.reap_on_shard(shard);
                        }
                    }
                }
                let _ = self.log.reap_on_shard(shard);
            }
        }
        self.written.extend(pages.iter().map(|&page| (slot, page)));
    }

    /// Nothing fails from here on.
    fn settle(&self) {
        self.guest.state.lock().unwrap().fails = false;
    }

    fn replace(&mut self, slot: SlotId, pages: u64) {
        self.settle();
        let retired = self.log.retire_slot(slot).unwrap();
        self.log.finish_slot(&retired).unwrap();
        self.log.add_slot(slot, pages).unwrap();
        self.sizes.insert(slot, pages);
        self.written.retain(|(other, _)| *other != slot);
        // Pages that a sync returned stay as they are until the next sync.
    }

    fn sync(&mut self, splits: u64) {
        let may_fail = self.guest.state.lock().unwrap().fails;
        if let Err(error) = self.log.sync(&mut self.dirty) {
            assert!(may_fail, "failed for no reason: {error}");
            assert!(!self.guest.state.lock().unwrap().fails);
            self.handed_out.clear();
            self.assert_handed_out(0);
            return;
        }
        self.handed_out = std::mem::take(&mut self.written);
        self.budget = MOST_PAGES;
        self.assert_handed_out(splits);
        self.assert_words();
    }

    /// Runs, pages, counts, single pages and parts say the same as the set.
    fn assert_handed_out(&self, splits: u64) {
        let (dirty, expected) = (&self.dirty, &self.handed_out);
        assert!(dirty.pages().eq(expected.iter().copied()), "pages");
        assert!(dirty.runs().eq(runs_of(expected)), "runs");
        assert_eq!(dirty.page_count(), expected.len() as u64);
        assert_eq!(dirty.is_empty(), expected.is_empty());
        for Run {
            slot,
            first_page: first,
            pages,
        } in runs_of(expected)
        {
            for page in [
                first.wrapping_sub(1),
                first,
                first + pages - 1,
                first + pages,
            ] {
                let contains = expected.contains(&(slot, page));
                assert_eq!(dirty.contains(slot, page), contains, "{slot} page {page}");
            }
        }
        for page in [0, 1 << 40, u64::MAX] {
            assert!(!dirty.contains(SlotId::new(0, 5), page));
            assert_eq!(
                dirty.contains(SLOTS[0], page),
                expected.contains(&(SLOTS[0], page))
            );
        }

        let mut parts = Vec::new();
        split(dirty.part(), splits, &mut parts);
        let mut left = expected.iter().copied();
        for part in &parts {
            let runs: Vec<Run> = part.runs().collect();
            let count: u64 = runs.iter().map(|run| run.pages).sum();
            assert_eq!(part.page_count(), count, "pages of a part");
            let ascending = |a: &Run, b: &Run| {
                a.slot < b.slot || a.slot == b.slot && a.first_page + a.pages < b.first_page
            };
            assert!(runs.is_sorted_by(ascending), "one run in two");
            for (slot, page) in runs.into_iter().flat_map(pages_of) {
                assert_eq!(left.next(), Some((slot, page)), "parts in order");
            }
        }
        assert_eq!(left.next(), None, "in no part");
    }

    /// The raw words say the same; those of a slot that is gone are not there.
    fn assert_words(&self) {
        for (&slot, &pages) in &self.sizes {
            let mut expected = vec![0u64; pages.div_ceil(64) as usize];
            for (_, page) in self.handed_out.range((slot, 0)..=(slot, u64::MAX)) {
                expected[(page / 64) as usize] |= 1 << (page % 64);
            }
            assert_eq!(
                self.dirty.words(slot),
                Some(&expected[..]),
                "words of {slot}"
            );
        }
        assert_eq!(self.dirty.words(SlotId::new(0, 5)), None);
    }
}

fn pages_of(run: Run) -> impl Iterator<Item = (SlotId, u64)> {
    (run.first_page..run.first_page + run.pages).map(move |page| (run.slot, page))
}

/// The runs of a set of pages, a page at a time.
fn runs_of(pages: &BTreeSet<(SlotId, u64)>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for &(slot, page) in pages {
        match runs.last_mut() {
            Some(run) if run.slot == slot && run.first_page + run.pages == page => run.pages += 1,
            _ => runs.push(Run {
                slot,
                first_page: page,
                pages: 1,
            }),
        }
    }
    runs
}

/// Splits where a bit of `splits` says so, into parts in order.
fn split<'a>(part: DirtyPart<'a>, splits: u64, into: &mut Vec<DirtyPart<'a>>) {
    if splits & 1 == 0 || into.len() >= MOST_PARTS {
        into.push(part);
        return;
    }
    match part.split() {
        (left, Some(right)) => {
            split(left, splits.rotate_right(1), into);
            split(right, splits.rotate_right(7), into);
        }
        (whole, None) => into.push(whole),
    }
}
