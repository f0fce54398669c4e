//! Random scripts against naive oracles, on the simulated kernel.
//!
//! The *exact* oracle knows each page written since the last sync. The *migration* oracle copies
//! what each sync reports and, once nobody writes, compares the copy with the truth.

mod common;

use common::machine::Machine;
use common::script::{self, Op};
use proptest::prelude::*;

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        max_shrink_iters: 20_000,
        // A failure prints its shrunk script; what is worth keeping becomes a scenario in
        // `faults.rs` that says what went wrong.
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Every sync reports exactly the pages written since the one before, and onlookers see what waits.
fn run_exactly(machine: &mut Machine, ops: &[Op]) {
    for op in ops {
        if machine.stuck {
            return;
        }
        match op {
            Op::Sync | Op::Checkpoint => {
                let reported = machine.sync().expect("a sync without faults");
                assert_eq!(reported, machine.take_written());
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

/// At every checkpoint, and at the end, the copy is equal to the truth.
fn run_migration(machine: &mut Machine, ops: &[Op]) {
    for op in ops {
        match op {
            Op::Sync => drop(machine.sync()),
            Op::Checkpoint => machine.checkpoint(),
            op => machine.apply(op),
        }
    }
    machine.checkpoint();
}

fn assert_faultless(machine: &Machine) {
    let stats = machine.stats();
    let faults = [
        stats.short_resets,
        stats.failed_resets,
        stats.unknown_slot_entries,
        stats.out_of_range_entries,
        stats.overruns,
    ];
    assert_eq!(faults, [0; 5], "{stats:?}");
}

proptest! {
    #![proptest_config(config(3_000))]

    #[test]
    fn a_sync_reports_exactly_what_was_written(
        setup in script::setup(false),
        mut ops in script::calm_script(),
    ) {
        let mut machine = Machine::new(&setup);
        ops.push(Op::Sync);
        run_exactly(&mut machine, &ops);
        assert_faultless(&machine);
    }

    #[test]
    fn a_migration_loses_no_write(
        setup in script::setup(true),
        ops in script::busy_script(),
    ) {
        let mut machine = Machine::new(&setup);
        run_migration(&mut machine, &ops);
        assert_faultless(&machine);
    }

    #[test]
    fn a_migration_survives_bad_resets(
        setup in script::setup(true),
        ops in script::bad_resets_script(),
    ) {
        run_migration(&mut Machine::new(&setup), &ops);
    }

    #[test]
    fn a_migration_survives_every_fault(
        setup in script::setup(true),
        ops in script::faulty_script(),
    ) {
        run_migration(&mut Machine::new(&setup), &ops);
    }

    /// Faults make pages suspect. Once the slots are protected anew, these are reported once more,
    /// and from then on syncs are exact again.
    #[test]
    fn rearmed_slots_are_exact_again(
        setup in script::setup(false),
        faulty in script::repairable_script(),
        mut calm in script::calm_script(),
    ) {
        let mut machine = Machine::new(&setup);
        run_migration(&mut machine, &faulty);
        machine.calm_down();
        machine.checkpoint();
        machine.rearm();
        machine.checkpoint();
        machine.take_written();
        calm.push(Op::Sync);
        run_exactly(&mut machine, &calm);
    }
}
