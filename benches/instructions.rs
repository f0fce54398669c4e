// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A piece of work for callgrind to count: `instructions CASE COUNT` does it COUNT times.
//!
//! Counted for two COUNTs, the difference is the work's own, free of what starting up costs.

use kvm_dirty_ring::DirtyPages;
use kvm_dirty_ring_benches::Tracked;
use kvm_dirty_ring_benches::pattern::{Dirtied, Pattern};

/// Entries that a long harvest takes.
const ENTRIES: usize = 4032;

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

/// A sync and a walk over its runs: the part of a drain that callgrind counts.
#[inline(never)]
fn synced(tracked: &Tracked, dirty: &mut DirtyPages) -> usize {
    tracked.log.sync(dirty).expect("a sync");
    dirty.runs().count()
}
