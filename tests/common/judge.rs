// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Scripts against the oracles.
//!
//! The *exact* oracle knows each page written since the last sync. The *migration* oracle copies
//! what each sync reports and, once nobody writes, compares the copy with the truth.

use super::machine::Machine;
use super::ops::Op;

/// Every sync reports exactly the pages written since the one before, and onlookers see what waits.
pub fn run_exactly(machine: &mut Machine, ops: &[Op]) {
    for op in ops {
        if machine.stuck {
            return;
        }
        match op {
            Op::Sync | Op::Checkpoint => {
                // A page that stayed open may have been written: nothing logs that.
                let mut expected = machine.open().clone();
                for (slot, pages) in machine.take_written() {
                    expected.entry(slot).or_default().extend(pages);
                }
                expected.retain(|_, pages| !pages.is_empty());
                let mut reported = machine.sync().expect("a sync without faults");
                // Of a slot that goes every sync reports, as others, what was a member.
                for slot in machine.going_with_members() {
                    let expected = expected.remove(&slot).unwrap_or_default();
                    let reported = reported.remove(&slot).unwrap_or_default();
                    assert!(expected.is_subset(&reported), "slot {slot}");
                }
                assert_eq!(reported, expected);
            }
            Op::ReapRings(rings) if machine.is_unharmed() => {
                let before = machine.used();
                machine.apply(op);
                for (ring, (before, after)) in before.iter().zip(machine.used()).enumerate() {
                    let left = if rings >> ring & 1 == 1 { 0 } else { *before };
                    assert_eq!(after, left, "ring {ring}");
                }
            }
            op => machine.apply(op),
        }
        if machine.is_unharmed() {
            machine.assert_occupancy();
        }
    }
}

/// At every checkpoint, and at the end, the copy is equal to the truth; and what was begun can be ended.
pub fn run_migration(machine: &mut Machine, ops: &[Op]) {
    play(machine, ops);
    machine.calm_down();
    machine.end_removals();
}

fn play(machine: &mut Machine, ops: &[Op]) {
    for op in ops {
        match op {
            Op::Sync => drop(machine.sync()),
            Op::Checkpoint => machine.checkpoint(),
            op => machine.apply(op),
        }
    }
    machine.checkpoint();
}

/// The log has counted no fault.
pub fn assert_faultless(machine: &Machine) {
    let stats = machine.stats();
    let faults = [
        stats.short_resets,
        stats.doubtful_resets,
        stats.failed_resets,
        stats.unknown_slot_entries,
        stats.out_of_range_entries,
        stats.overruns,
        stats.missing_bitmaps,
    ];
    assert_eq!(faults, [0; 7], "{stats:?}");
}

/// After the faults of `faulty`: protects every slot anew, and then every sync of `calm` is exact.
pub fn run_repaired(machine: &mut Machine, faulty: &[Op], calm: &[Op]) {
    play(machine, faulty);
    machine.calm_down();
    machine.checkpoint();
    machine.rearm();
    machine.checkpoint();
    machine.take_written();
    run_exactly(machine, calm);
}
