//! Which guests are run, under which arms, for how long.

use std::time::Duration;

use kvm_integration::lab::{Arm, Cell, Pattern};

use crate::options::Options;

/// All that a run does.
#[derive(Debug)]
pub struct Plan {
    /// The guests, with the arms that take turns under each.
    pub cells: Vec<(Cell, Vec<Arm>)>,
    /// Turns of each arm.
    pub rounds: u32,
    /// How long a turn is watched.
    pub slice: Duration,
}

use Pattern::{Bursts, Constant, Fast, FastBursts, HotSet, Idle, Ramp, Skew, Trickle};

/// What a run without any filter does.
const FULL: [(Pattern, u32, u32); 19] = [
    (Constant, 1, 4096),
    (Constant, 1, 1024),
    (Constant, 2, 4096),
    (Constant, 2, 65536),
    (Constant, 8, 4096),
    (Skew, 2, 4096),
    (Skew, 8, 4096),
    (Trickle, 1, 4096),
    (Bursts, 1, 4096),
    (Bursts, 8, 4096),
    (Ramp, 2, 4096),
    (HotSet, 2, 4096),
    (HotSet, 2, 65536),
    (HotSet, 8, 4096),
    (Idle, 2, 4096),
    (Fast, 1, 4096),
    (Fast, 1, 1024),
    (Fast, 8, 4096),
    (FastBursts, 2, 4096),
];

/// The guests for which there are targets.
const QUICK: [(Pattern, u32, u32); 10] = [
    (Constant, 1, 4096),
    (Constant, 1, 1024),
    (Constant, 2, 4096),
    (Constant, 8, 4096),
    (Skew, 2, 4096),
    (Trickle, 1, 4096),
    (HotSet, 2, 16384),
    (Idle, 2, 4096),
    (Fast, 1, 4096),
    (Fast, 8, 4096),
];

impl Plan {
    /// What is asked for.
    pub fn new(options: &Options) -> Self {
        let quick = options.quick;
        let cells = if quick { &QUICK[..] } else { &FULL };
        let cells = cells.iter().map(|&(pattern, vcpus, ring_entries)| Cell {
            pattern,
            vcpus,
            ring_entries,
        });
        let mut cells: Vec<Cell> = cells.collect();
        // Whoever names numbers gets them, whether or not they are in the list.
        let patterns: Vec<Pattern> = match &options.workloads[..] {
            [] => Pattern::ALL.to_vec(),
            some => some.to_vec(),
        };
        cells.retain(|cell| patterns.contains(&cell.pattern));
        if !options.vcpus.is_empty() || !options.ring_entries.is_empty() {
            let or = |given: &[u32], default: u32| match given {
                [] => vec![default],
                some => some.to_vec(),
            };
            cells.clear();
            for pattern in patterns {
                for vcpus in or(&options.vcpus, 2) {
                    for ring_entries in or(&options.ring_entries, 4096) {
                        cells.push(Cell {
                            pattern,
                            vcpus,
                            ring_entries,
                        });
                    }
                }
            }
        }
        let arms = |cell: &Cell| match &options.arms[..] {
            [] if quick => quick_arms(cell.pattern),
            [] => Arm::ALL.to_vec(),
            some => some.iter().filter_map(|name| Arm::named(name)).collect(),
        };
        Self {
            cells: cells.into_iter().map(|cell| (cell, arms(&cell))).collect(),
            rounds: options.rounds.unwrap_or(2),
            slice: Duration::from_millis(options.slice_ms.unwrap_or(1000)),
        }
    }
}

/// The arms that targets speak of.
fn quick_arms(pattern: Pattern) -> Vec<Arm> {
    let names: &[&str] = match pattern {
        Idle => &["look-first"],
        Trickle => &["look-first", "look-first-fifo"],
        HotSet => &["look-first", "fixed", "no-reaper"],
        Fast => &["look-first", "look-first-fifo", "fixed", "qemu"],
        _ => &["look-first", "look-first-fifo", "fixed"],
    };
    names.iter().filter_map(|name| Arm::named(name)).collect()
}
