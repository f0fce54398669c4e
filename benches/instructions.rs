// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A piece of work for callgrind to count: `instructions CASE COUNT` does it COUNT times.
//!
//! Counted for two COUNTs, the difference is the work's own, free of what starting up costs.

use kvm_dirty_ring::{DirtyLog, DirtyPages, GuestMap, GuestRegion, SlotId};
use kvm_dirty_ring_benches::Tracked;
use kvm_dirty_ring_benches::pattern::{Dirtied, Pattern};

/// Entries that a long harvest takes.
const ENTRIES: usize = 4032;

/// Bytes of a page of the host that this is run on.
const HOST_PAGE: u64 = 4096;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let case = arguments.next().unwrap_or_default();
    let count: usize = arguments.next().map_or(0, |n| n.parse().expect("a number"));
    let units = match case.as_str() {
        "harvest" => harvest(Pattern::Random1, ENTRIES, count),
        "harvest-4-slots" => harvest(Pattern::FourSlots, ENTRIES, count),
        "pass-of-one" => harvest(Pattern::Random1, 1, count),
        "drain-tenth" => drain(Dirtied::Tenth, count),
        "drain-thousandth" => drain(Dirtied::Thousandth, count),
        "idle" => idle(count),
        "mark-dirty" => mark(count, HOST_PAGE, page_by_page),
        "mark-words" => mark(count, HOST_PAGE, by_words),
        "mark-guest-words-same-size" => mark(count, HOST_PAGE, by_guest_words),
        "mark-guest-words-quarters" => mark(count, HOST_PAGE / 4, by_guest_words),
        "mark-guest-words-large" => mark(count, HOST_PAGE * 4, by_guest_words),
        _ => panic!("no case {case:?}"),
    };
    println!("{units}");
}

/// Entries.
fn harvest(pattern: Pattern, entries: usize, count: usize) -> usize {
    let (slots, pages) = pattern.slots();
    let mut tracked = Tracked::new(4096, slots, pages);
    let pages = pattern.pages(1, entries);
    // Pushed by hand, where the counting does not look: see .ci/instructions.
    for _ in 0..count {
        tracked.index = tracked.ring.push(tracked.index, &pages);
        assert_eq!(tracked.vcpu.harvest_and_stop() as usize, entries);
    }
    count * entries
}

/// Runs.
fn drain(dirtied: Dirtied, count: usize) -> usize {
    let pages: Vec<_> = dirtied.pages().into_iter().take(1 << 18).collect();
    let mut tracked = Tracked::new(65536, 1, Dirtied::OF);
    let mut dirty = DirtyPages::new();
    let mut runs = 0;
    for _ in 0..count {
        tracked.dirty(&pages);
        runs += synced(&tracked, &mut dirty);
    }
    runs
}

/// Syncs of 1 TiB.
fn idle(count: usize) -> usize {
    let tracked = Tracked::new(4096, 1, 1 << 28);
    let mut dirty = DirtyPages::new();
    for _ in 0..count {
        assert_eq!(synced(&tracked, &mut dirty), 0);
    }
    count
}

/// Pages that are marked by a device's log, in pages of `page_bytes` bytes. Half of its bits are set.
fn mark(count: usize, page_bytes: u64, marks: fn(&Marks<'_>)) -> usize {
    let pages = 1 << 16;
    let tracked = Tracked::new(4096, 1, pages);
    let mut state = 7u64;
    let mut random = || {
        // By Marsaglia's xorshift.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let words: Vec<u64> = (0..pages * HOST_PAGE / page_bytes / 64)
        .map(|_| random())
        .collect();
    let slot = SlotId::new(0, 0);
    let region = GuestRegion {
        slot,
        address: 0,
        pages,
    };
    let work = Marks {
        log: &tracked.log,
        map: GuestMap::new([region]).expect("a map"),
        slot,
        page_bytes,
        words: &words,
    };
    let mut dirty = DirtyPages::new();
    let mut marked = 0;
    for _ in 0..count {
        marks(&work);
        tracked.log.sync(&mut dirty).expect("a sync");
        marked += dirty.page_count() as usize;
    }
    marked
}

/// A device's log, and where its pages are.
struct Marks<'a> {
    log: &'a DirtyLog,
    map: GuestMap,
    slot: SlotId,
    page_bytes: u64,
    words: &'a [u64],
}

#[inline(never)]
fn page_by_page(of: &Marks<'_>) {
    for (at, &word) in (0..).zip(of.words) {
        let mut left = word;
        while left != 0 {
            let page = at * 64 + u64::from(left.trailing_zeros());
            of.log.mark_dirty(of.slot, page, 1).expect("a page");
            left &= left - 1;
        }
    }
}

#[inline(never)]
fn by_words(of: &Marks<'_>) {
    of.log.mark_words(of.slot, 0, of.words).expect("its pages");
}

#[inline(never)]
fn by_guest_words(of: &Marks<'_>) {
    let marked = of.log.mark_guest_words(&of.map, 0, of.page_bytes, of.words);
    assert_eq!(marked.expect("its pages"), 0);
}

/// A sync and a walk over its runs: the part of a drain that callgrind counts.
#[inline(never)]
fn synced(tracked: &Tracked, dirty: &mut DirtyPages) -> usize {
    tracked.log.sync(dirty).expect("a sync");
    dirty.runs().count()
}
