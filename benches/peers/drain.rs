// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From a bitmap to ranges of pages, the bitmap empty again.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use hibitset::{AtomicBitSet, BitSetLike};
use kvm_dirty_ring::DirtyPages;
use kvm_dirty_ring_benches::pattern::Dirtied;
use kvm_dirty_ring_benches::{Tracked, median};
use roaring::RoaringBitmap;
use vm_memory::bitmap::AtomicBitmap;

use crate::{Effort, Report};

/// Pages of the guest.
const PAGES: u64 = Dirtied::OF;
/// Pages of 1 TiB.
const TIB: u64 = 1 << 28;

/// Number, pages and a mixture of the ranges: equal if and, but for bad luck, only if they are.
type Digest = (u64, u64, u64);

fn digest(ranges: impl Iterator<Item = (u64, u64)>) -> Digest {
    ranges.fold((0, 0, 0), |(count, pages, mix), (first, n)| {
        (count + 1, pages + n, mix.wrapping_add((first << 20) ^ n))
    })
}

/// Ranges of the ones among bits, a bit at a time where a word is not zero.
fn ranges(words: impl Iterator<Item = u64>) -> Digest {
    let mut digest = (0, 0, 0u64);
    let mut run: Option<(u64, u64)> = None;
    let mut end = |run: &mut Option<(u64, u64)>| {
        if let Some((first, pages)) = run.take() {
            digest.0 += 1;
            digest.1 += pages;
            digest.2 = digest.2.wrapping_add((first << 20) ^ pages);
        }
    };
    for (i, word) in words.enumerate() {
        if word == 0 {
            end(&mut run);
            continue;
        }
        for bit in 0..64 {
            if word >> bit & 1 == 1 {
                run.get_or_insert((i as u64 * 64 + bit, 0)).1 += 1;
            } else {
                end(&mut run);
            }
        }
    }
    end(&mut run);
    digest
}

/// A bitmap that can be drained.
trait Variant {
    fn name(&self) -> &'static str;
    fn set(&mut self, pages: &[u64]);
    fn drain(&mut self) -> Digest;
}

struct Ours {
    tracked: Tracked,
    dirty: DirtyPages,
}

impl Ours {
    fn new(pages: u64) -> Self {
        Self {
            tracked: Tracked::new(65536, 1, pages),
            dirty: DirtyPages::new(),
        }
    }
}

impl Variant for Ours {
    fn name(&self) -> &'static str {
        "ours"
    }

    fn set(&mut self, pages: &[u64]) {
        self.tracked.dirty(pages);
    }

    fn drain(&mut self) -> Digest {
        self.tracked.log.sync(&mut self.dirty).expect("a sync");
        digest(self.dirty.runs().map(|run| (run.first_page, run.pages)))
    }
}

struct VmMemory(AtomicBitmap);

impl Variant for VmMemory {
    fn name(&self) -> &'static str {
        "vm-memory get_and_reset + ranges"
    }

    fn set(&mut self, pages: &[u64]) {
        pages.iter().for_each(|&page| self.0.set_bit(page as usize));
    }

    fn drain(&mut self) -> Digest {
        ranges(self.0.get_and_reset().into_iter())
    }
}

struct Swap(Arc<[AtomicU64]>);

impl Variant for Swap {
    fn name(&self) -> &'static str {
        "swap, skip zero words"
    }

    fn set(&mut self, pages: &[u64]) {
        for page in pages {
            self.0[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Release);
        }
    }

    fn drain(&mut self) -> Digest {
        ranges(self.0.iter().map(|word| {
            if word.load(Ordering::Relaxed) == 0 {
                return 0;
            }
            word.swap(0, Ordering::Acquire)
        }))
    }
}

struct Hibitset(AtomicBitSet);

impl Variant for Hibitset {
    fn name(&self) -> &'static str {
        "hibitset"
    }

    fn set(&mut self, pages: &[u64]) {
        for &page in pages {
            self.0.add_atomic(page as u32);
        }
    }

    fn drain(&mut self) -> Digest {
        let digest = digest(joined((&self.0).iter().map(u64::from)));
        self.0.clear();
        digest
    }
}

struct Roaring(RoaringBitmap);

impl Variant for Roaring {
    fn name(&self) -> &'static str {
        "roaring"
    }

    fn set(&mut self, pages: &[u64]) {
        self.0.extend(pages.iter().map(|&page| page as u32));
    }

    fn drain(&mut self) -> Digest {
        let digest = digest(joined(self.0.iter().map(u64::from)));
        self.0.clear();
        digest
    }
}

/// Ascending pages as ranges.
fn joined(mut pages: impl Iterator<Item = u64>) -> impl Iterator<Item = (u64, u64)> {
    let mut next = pages.next();
    std::iter::from_fn(move || {
        let first = next?;
        let mut count = 1;
        loop {
            next = pages.next();
            if next != Some(first + count) {
                return Some((first, count));
            }
            count += 1;
        }
    })
}

pub fn run(effort: &Effort, report: &mut Report) {
    for dirtied in Dirtied::ALL {
        let samples = match dirtied {
            Dirtied::All | Dirtied::Tenth if effort.quick => effort.samples.min(5),
            _ => effort.samples,
        };
        let case = format!("drain, 64 GiB, {}", dirtied.name());
        if effort.takes(&case) {
            compare(report, samples, dirtied, case);
        }
    }
    idle(effort, report);
}

fn compare(report: &mut Report, samples: usize, dirtied: Dirtied, case: String) {
    let pages = dirtied.pages();
    let words = || (0..PAGES / 64).map(|_| AtomicU64::new(0)).collect();
    let page = NonZeroUsize::new(4096).expect("not zero");
    let mut variants: Vec<Box<dyn Variant>> = vec![
        Box::new(Ours::new(PAGES)),
        Box::new(VmMemory(AtomicBitmap::new(PAGES as usize * 4096, page))),
        Box::new(Swap(words())),
        Box::new(Hibitset(AtomicBitSet::new())),
        Box::new(Roaring(RoaringBitmap::new())),
    ];
    let mut times = vec![Vec::new(); variants.len()];
    let mut reading = Vec::new();
    let bitmap: Vec<u64> = (0..PAGES / 64).collect();
    for sample in 0..=samples {
        let mut expected = None;
        for turn in 0..variants.len() {
            let at = (turn + sample) % variants.len();
            let variant = &mut variants[at];
            variant.set(&pages);
            let start = Instant::now();
            let digest = variant.drain();
            let ns = start.elapsed().as_nanos() as f64;
            let expected = *expected.get_or_insert(digest);
            assert_eq!(digest, expected, "{} found other ranges", variant.name());
            // The first round warms up.
            if sample > 0 {
                times[at].push(ns);
            }
        }
        let start = Instant::now();
        std::hint::black_box(bitmap.iter().fold(0, |all, word| all | word));
        reading.push(start.elapsed().as_nanos() as f64);
    }
    let medians: Vec<_> = times.iter_mut().map(|times| median(times)).collect();
    for (variant, &ns) in variants.iter().zip(&medians).skip(1) {
        report.add(case.clone(), medians[0], variant.name(), ns);
    }
    report.add(
        case,
        medians[0],
        "limit: reading the bitmap once",
        median(&mut reading),
    );
}

/// A guest of 1 TiB that writes nothing.
fn idle(effort: &Effort, report: &mut Report) {
    let case = "drain, 1 TiB, idle".to_string();
    if !effort.takes(&case) {
        return;
    }
    let mut ours = Ours::new(TIB);
    let times = (0..=effort.samples).map(|_| {
        let start = Instant::now();
        assert_eq!(ours.drain(), (0, 0, 0));
        start.elapsed().as_nanos() as f64
    });
    let mut times: Vec<_> = times.skip(1).collect();
    let ours_ns = median(&mut times);
    report.add(case, ours_ns, "target", 50_000.0);
}
