// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A reader alone, whose memory changes between one entry and the next.

use kvm_dirty_ring::ring::RingView;

use super::script::{Change, Op, Script};
use super::world::World;
use crate::memory::{Cell, RESET};

/// Entries that a reader takes in one go, at most.
const BLOCK: u32 = 64;

/// Harvests after each change of the script; each reaction's changes happen during the harvest.
pub fn run(script: &Script) {
    let mut world = World::new(script.entries);
    let mut view = RingView::new(world.attach(&script.memory));
    let mut head = 0;
    let mut during = Vec::new();
    for op in &script.ops {
        match op {
            Op::Change(change) => world.change(change),
            Op::React(reaction) => during.extend(reaction.changes.iter().cloned()),
            _ => {
                head += harvest(&mut world, &mut view, head, std::mem::take(&mut during));
                world.recycle(u32::MAX);
            }
        }
        assert!(view.occupancy() <= script.entries);
        assert!(view.at_least(0) && !view.at_least(script.entries + 1));
    }
    harvest(&mut world, &mut view, head, during);
}

/// One harvest, with a change after every third entry. How many entries it took.
fn harvest(world: &mut World, view: &mut RingView, head: u32, during: Vec<Change>) -> u32 {
    let ring = world.ring(0);
    let entries = world.entries;
    let dirty = |ahead: &u32| ring.get(head + ahead).is_dirty();
    let prefix = (0..entries).take_while(dirty).count() as u32;
    let calm = during.is_empty();
    let mut during = during.into_iter();
    let mut seen = 0;
    let mut before: Option<(u32, Cell)> = None;
    let taken = view.harvest(|slot, page| {
        if let Some((at, cell)) = before.take() {
            // The one before is marked by now, and nothing else of it has changed.
            let marked = Cell {
                flags: RESET,
                ..cell
            };
            assert_eq!(ring.get(at), marked, "entry {at}");
        }
        let at = head + seen;
        let cell = ring.get(at);
        assert_eq!((cell.slot, cell.offset), (slot, page), "entry {at}");
        seen += 1;
        if seen % 3 == 0
            && let Some(change) = during.next()
        {
            world.change(&change);
            return;
        }
        before = Some((at, cell));
    });
    assert_eq!(taken, seen);
    assert!(taken < entries + BLOCK, "{taken} of {entries}");
    if calm {
        assert!(taken >= prefix, "{taken}, and {prefix} waited");
    }
    taken
}
