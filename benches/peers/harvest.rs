// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From a ring that another core has filled into a bitmap.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use hibitset::{AtomicBitSet, BitSetLike};
use kvm_dirty_ring::ring::RingView;
use kvm_dirty_ring::{DirtyLog, DirtyPages, SlotId, VcpuRing};
use kvm_dirty_ring_benches::pattern::Pattern;
use kvm_dirty_ring_benches::ring::{DIRTY, Filler, NoKernel, RESET, Ring};
use kvm_dirty_ring_benches::{Tracked, median, pin};
use roaring::RoaringBitmap;
use vm_memory::bitmap::AtomicBitmap;

use crate::{Effort, Report};

/// Something that empties a ring into a bitmap.
trait Variant {
    fn name(&self) -> &'static str;
    /// Empties the ring; how many entries there were.
    fn harvest(&mut self) -> u32;
    /// The pages found so far, and forgets them. `None` for what keeps no pages.
    fn take(&mut self) -> Option<BTreeSet<(u32, u64)>>;
    fn ring(&self) -> &Ring;
}

/// This crate: all of a pass but its reset.
struct Ours(Tracked);

impl Variant for Ours {
    fn name(&self) -> &'static str {
        "ours"
    }

    fn harvest(&mut self) -> u32 {
        self.0.vcpu.harvest_and_stop()
    }

    fn take(&mut self) -> Option<BTreeSet<(u32, u64)>> {
        let mut dirty = DirtyPages::new();
        self.0.log.sync(&mut dirty).expect("a sync");
        let runs = dirty.runs();
        let pages = |run: kvm_dirty_ring::Run| {
            (run.first_page..run.first_page + run.pages).map(move |page| (run.slot.raw(), page))
        };
        Some(runs.flat_map(pages).collect())
    }

    fn ring(&self) -> &Ring {
        &self.0.ring
    }
}

/// The consumer's loop that everybody writes first: an entry at a time into `Set`.
struct Plain<S> {
    ring: Ring,
    head: usize,
    set: S,
}

/// A bitmap.
trait Set {
    const NAME: &'static str;
    fn new(slots: u32, pages: u64) -> Self;
    fn insert(&mut self, slot: u32, page: u64);
    fn take(&mut self) -> BTreeSet<(u32, u64)>;
}

impl<S: Set> Plain<S> {
    fn new(entries: u32, slots: u32, pages: u64) -> Self {
        Self {
            ring: Ring::new(entries),
            head: 0,
            set: S::new(slots, pages),
        }
    }
}

impl<S: Set> Variant for Plain<S> {
    fn name(&self) -> &'static str {
        S::NAME
    }

    fn harvest(&mut self) -> u32 {
        let entries = self.ring.entries();
        let mut taken = 0;
        loop {
            let entry = &entries[self.head & (entries.len() - 1)];
            // Acquire and release: as the kernel's protocol wants it.
            if entry.flags.load(Ordering::Acquire) != DIRTY {
                return taken;
            }
            let slot = entry.slot.load(Ordering::Relaxed);
            let page = entry.offset.load(Ordering::Relaxed);
            self.set.insert(slot, page);
            entry.flags.store(RESET, Ordering::Release);
            self.head += 1;
            taken += 1;
        }
    }

    fn take(&mut self) -> Option<BTreeSet<(u32, u64)>> {
        Some(self.set.take())
    }

    fn ring(&self) -> &Ring {
        &self.ring
    }
}

/// What rust-vmm users have: one for each region.
struct VmMemory(Vec<AtomicBitmap>);

impl Set for VmMemory {
    const NAME: &'static str = "vm-memory set_bit";

    fn new(slots: u32, pages: u64) -> Self {
        let page = NonZeroUsize::new(4096).expect("not zero");
        let bitmap = |_| AtomicBitmap::new(pages as usize * 4096, page);
        Self((0..slots).map(bitmap).collect())
    }

    fn insert(&mut self, slot: u32, page: u64) {
        if let Some(bitmap) = self.0.get(slot as usize) {
            bitmap.set_bit(page as usize);
        }
    }

    fn take(&mut self) -> BTreeSet<(u32, u64)> {
        words(self.0.iter().map(AtomicBitmap::get_and_reset))
    }
}

/// One locked instruction for each entry.
struct FetchOr(Vec<Box<[AtomicU64]>>);

impl Set for FetchOr {
    const NAME: &'static str = "fetch_or";

    fn new(slots: u32, pages: u64) -> Self {
        let words = || (0..pages / 64).map(|_| AtomicU64::new(0)).collect();
        Self((0..slots).map(|_| words()).collect())
    }

    fn insert(&mut self, slot: u32, page: u64) {
        if let Some(words) = self.0.get(slot as usize) {
            if let Some(word) = words.get((page / 64) as usize) {
                word.fetch_or(1 << (page % 64), Ordering::Release);
            }
        }
    }

    fn take(&mut self) -> BTreeSet<(u32, u64)> {
        let swap = |word: &AtomicU64| word.swap(0, Ordering::Acquire);
        words(self.0.iter().map(|words| words.iter().map(swap).collect()))
    }
}

impl Set for Vec<AtomicBitSet> {
    const NAME: &'static str = "hibitset";

    fn new(slots: u32, _pages: u64) -> Self {
        (0..slots).map(|_| AtomicBitSet::new()).collect()
    }

    fn insert(&mut self, slot: u32, page: u64) {
        if let Some(set) = self.get(slot as usize) {
            set.add_atomic(page as u32);
        }
    }

    fn take(&mut self) -> BTreeSet<(u32, u64)> {
        let pages = self.iter().enumerate().flat_map(|(slot, set)| {
            let pages = set.iter().map(u64::from);
            pages.map(move |page| (slot as u32, page))
        });
        let pages = pages.collect();
        self.iter_mut().for_each(AtomicBitSet::clear);
        pages
    }
}

impl Set for Vec<RoaringBitmap> {
    const NAME: &'static str = "roaring";

    fn new(slots: u32, _pages: u64) -> Self {
        (0..slots).map(|_| RoaringBitmap::new()).collect()
    }

    fn insert(&mut self, slot: u32, page: u64) {
        if let Some(set) = self.get_mut(slot as usize) {
            set.insert(page as u32);
        }
    }

    fn take(&mut self) -> BTreeSet<(u32, u64)> {
        let pages = self.iter().enumerate().flat_map(|(slot, set)| {
            let pages = set.iter().map(u64::from);
            pages.map(move |page| (slot as u32, page))
        });
        let pages = pages.collect();
        self.iter_mut().for_each(RoaringBitmap::clear);
        pages
    }
}

/// What a good C programmer writes in ten lines: words that nobody else writes, found by the slot's number.
///
/// With `AHEAD`, the ring is asked for so many entries early, also past what is dirty, where a vCPU would lose lines
/// that it has yet to fill.
struct Simple<const AHEAD: usize> {
    ring: Ring,
    head: usize,
    slots: Vec<Vec<u64>>,
}

impl<const AHEAD: usize> Simple<AHEAD> {
    fn new(entries: u32, slots: u32, pages: u64) -> Self {
        let slot = |_| vec![0; pages.div_ceil(64) as usize];
        Self {
            ring: Ring::new(entries),
            head: 0,
            slots: (0..slots).map(slot).collect(),
        }
    }
}

impl<const AHEAD: usize> Variant for Simple<AHEAD> {
    fn name(&self) -> &'static str {
        match AHEAD {
            0 => "plain",
            _ => "plain, ring prefetched",
        }
    }

    fn harvest(&mut self) -> u32 {
        let entries = self.ring.entries();
        let mask = entries.len() - 1;
        let mut taken = 0;
        loop {
            let entry = &entries[self.head & mask];
            // Acquire and release: as the kernel's protocol wants it.
            if entry.flags.load(Ordering::Acquire) != DIRTY {
                return taken;
            }
            if AHEAD > 0 && self.head % 4 == 0 {
                prefetch(&entries[(self.head + AHEAD) & mask]);
            }
            let slot = entry.slot.load(Ordering::Relaxed);
            let page = entry.offset.load(Ordering::Relaxed);
            if let Some(words) = self.slots.get_mut(slot as usize) {
                if let Some(word) = words.get_mut((page / 64) as usize) {
                    *word |= 1 << (page % 64);
                }
            }
            entry.flags.store(RESET, Ordering::Release);
            self.head += 1;
            taken += 1;
        }
    }

    fn take(&mut self) -> Option<BTreeSet<(u32, u64)>> {
        let empty = |words: &mut Vec<u64>| words.iter_mut().map(std::mem::take).collect();
        Some(words(self.slots.iter_mut().map(empty)))
    }

    fn ring(&self) -> &Ring {
        &self.ring
    }
}

fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which reads nothing that a program can see.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// The set bits of each slot's words.
fn words(slots: impl Iterator<Item = Vec<u64>>) -> BTreeSet<(u32, u64)> {
    let mut pages = BTreeSet::new();
    for (slot, words) in slots.enumerate() {
        for (i, word) in words.into_iter().enumerate() {
            let bits = (0..64).filter(|bit| word >> bit & 1 == 1);
            pages.extend(bits.map(|bit| (slot as u32, i as u64 * 64 + bit)));
        }
    }
    pages
}

/// The least that any harvest does: every entry read and marked, nothing kept.
struct Scan {
    ring: Ring,
    view: RingView,
}

impl Variant for Scan {
    fn name(&self) -> &'static str {
        "limit: scan and mark"
    }

    fn harvest(&mut self) -> u32 {
        self.view.harvest(|_, _| ())
    }

    fn take(&mut self) -> Option<BTreeSet<(u32, u64)>> {
        None
    }

    fn ring(&self) -> &Ring {
        &self.ring
    }
}

pub fn run(effort: &Effort, report: &mut Report) {
    pin(0);
    let filler = Filler::on(1);
    let rings: &[u32] = match effort.quick {
        true => &[256, 4096],
        false => &[256, 4096, 65536],
    };
    for &entries in rings {
        for pattern in Pattern::ALL {
            compare(effort, report, &filler, entries, pattern);
        }
    }
    two_harvesters(effort, report);
}

fn compare(effort: &Effort, report: &mut Report, filler: &Filler, entries: u32, pattern: Pattern) {
    // Where bitmaps are larger than a near cache, a guest that has run since the last harvest has driven them out of it.
    let state = if pattern.is_large() { "cold" } else { "warm" };
    let case = format!(
        "harvest, {}, ring {entries}, {state} bitmap",
        pattern.name()
    );
    if !effort.takes(&case) {
        return;
    }
    let (slots, pages) = pattern.slots();
    let ring = Ring::new(entries);
    let mut variants: Vec<Box<dyn Variant>> = vec![
        Box::new(Ours(Tracked::new(entries, slots, pages))),
        Box::new(Simple::<0>::new(entries, slots, pages)),
        Box::new(Simple::<128>::new(entries, slots, pages)),
        Box::new(Plain::<VmMemory>::new(entries, slots, pages)),
        Box::new(Plain::<FetchOr>::new(entries, slots, pages)),
        Box::new(Plain::<Vec<AtomicBitSet>>::new(entries, slots, pages)),
        Box::new(Plain::<Vec<RoaringBitmap>>::new(entries, slots, pages)),
        Box::new(Scan {
            view: RingView::new(ring.memory()),
            ring,
        }),
    ];
    let mut times = vec![Vec::new(); variants.len()];
    // What a vCPU leaves at a full exit.
    let fill = entries as usize - 64;
    let mut index = vec![0; variants.len()];
    // Every page of the bitmaps is written once before: a bitmap's first touch of 128 MiB of guest
    // costs a page fault, once in its life.
    let all: Vec<_> = (0..slots)
        .flat_map(|slot| (0..pages).step_by(1 << 15).map(move |page| (slot, page)))
        .collect();
    for (at, variant) in variants.iter_mut().enumerate() {
        for some in all.chunks(fill) {
            index[at] = variant.ring().push(index[at], some);
            variant.harvest();
        }
        variant.take();
    }
    let mut others = Others::new();
    for sample in 0..=effort.samples {
        let pages: Arc<[_]> = pattern.pages((sample * fill) as u64, fill).into();
        // In turn from another one each time: none always comes after the same other.
        for turn in 0..variants.len() {
            let at = (turn + sample) % variants.len();
            let variant = &mut variants[at];
            if pattern.is_large() {
                others.walk();
            }
            index[at] = filler.fill(variant.ring(), index[at], &pages);
            let start = Instant::now();
            let taken = variant.harvest();
            let ns = start.elapsed().as_nanos() as f64;
            assert_eq!(taken as usize, fill, "{} missed entries", variant.name());
            if sample == 0 {
                // The first round proves the results equal; it warms up, and is not counted.
                let expected: BTreeSet<_> = pages.iter().copied().collect();
                if let Some(found) = variant.take() {
                    assert!(found == expected, "{} found other pages", variant.name());
                }
            } else {
                times[at].push(ns / f64::from(taken));
            }
        }
    }
    let medians: Vec<_> = times.iter_mut().map(|times| median(times)).collect();
    for (variant, &ns) in variants.iter().zip(&medians).skip(1) {
        report.add(case.clone(), medians[0], variant.name(), ns);
    }
}

/// Memory that others use: more than any cache has.
struct Others(Vec<u64>);

impl Others {
    fn new() -> Self {
        Self(vec![0; 64 << 17])
    }

    /// Writes a word of each line.
    fn walk(&mut self) {
        self.0.iter_mut().step_by(8).for_each(|word| *word += 1);
        std::hint::black_box(&mut self.0);
    }
}

/// Two threads, each on its own ring, the same pages in both, beside one alone.
fn two_harvesters(effort: &Effort, report: &mut Report) {
    const ENTRIES: u32 = 4096;
    let case = "two harvesters, the same pages".to_string();
    if !effort.takes(&case) {
        return;
    }
    let fill = ENTRIES as usize - 64;
    let log = DirtyLog::with_kernel(Box::new(NoKernel), ENTRIES);
    let (slots, pages) = Pattern::Random1.slots();
    for slot in 0..slots {
        log.add_slot(SlotId::from_raw(slot), pages).expect("a slot");
    }
    let rings = [(); 2].map(|()| Ring::new(ENTRIES));
    let mut vcpus = rings
        .each_ref()
        .map(|ring| log.attach_ring(ring.memory()).expect("a ring"));
    let mut index = 0;
    let (mut alone, mut both) = (Vec::new(), Vec::new());
    let barrier = std::sync::Barrier::new(2);
    for sample in 0..=effort.samples {
        let pages = Pattern::Random1.pages((sample * fill) as u64, fill);
        // Each thread harvests what the other core has filled.
        let mut harvest = |threads: usize| -> f64 {
            let times = std::thread::scope(|scope| {
                let running: Vec<_> = vcpus
                    .iter_mut()
                    .enumerate()
                    .map(|(me, vcpu)| {
                        let (rings, pages, barrier) = (&rings, &pages, &barrier);
                        scope.spawn(move || {
                            pin(me);
                            rings[1 - me].push(index, pages);
                            barrier.wait();
                            let time = |vcpu: &mut VcpuRing| {
                                let start = Instant::now();
                                assert_eq!(vcpu.harvest_and_stop() as usize, fill);
                                start.elapsed().as_nanos() as f64
                            };
                            // Alone: one after the other.
                            if threads == 1 && me == 1 {
                                barrier.wait();
                            }
                            let ns = time(vcpu);
                            if threads == 1 && me == 0 {
                                barrier.wait();
                            }
                            ns
                        })
                    })
                    .collect();
                let times = running.into_iter().map(|thread| thread.join());
                times.map(|ns| ns.expect("no panic")).sum::<f64>()
            });
            index += fill;
            times / (2 * fill) as f64
        };
        let (one, two) = (harvest(1), harvest(2));
        if sample > 0 {
            alone.push(one);
            both.push(two);
        }
    }
    report.add(case, median(&mut both), "one at a time", median(&mut alone));
}
