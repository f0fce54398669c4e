// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Random scripts against naive oracles, on the simulated kernel. `fuzz/` runs such scripts, too.

mod common;
#[path = "common/script.rs"]
mod script;

use common::judge::{assert_faultless, run_exactly, run_migration, run_repaired};
use common::machine::Machine;
use common::ops::{Op, Setup};
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
    fn a_sync_reports_exactly_what_the_kernels_bits_say(
        setup in script::setup_with_bitmap(false),
        mut ops in script::calm_bitmap_script(),
    ) {
        let mut machine = Machine::new(&setup);
        ops.push(Op::Sync);
        run_exactly(&mut machine, &ops);
        assert_faultless(&machine);
    }

    #[test]
    fn a_migration_survives_bad_bitmaps(
        setup in script::setup_with_bitmap(true),
        ops in script::bad_bitmaps_script(),
    ) {
        let mut machine = Machine::new(&setup);
        run_migration(&mut machine, &ops);
        assert_faultless(&machine);
    }

    #[test]
    fn a_migration_survives_stops_and_starts(
        setup in script::setup_with_bitmap(true),
        ops in script::switching_script(),
    ) {
        let mut machine = Machine::new(&setup);
        run_migration(&mut machine, &ops);
        assert_faultless(&machine);
    }

    #[test]
    fn a_migration_survives_stops_and_starts_beside_bad_resets(
        setup in script::setup(true),
        ops in script::switching_badly_script(),
    ) {
        run_migration(&mut Machine::new(&setup), &ops);
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

    /// Every sync reports what was written since the one before, and what stays open, and nothing else.
    #[test]
    fn a_sync_reports_exactly_what_was_written_or_stays_open(
        setup in script::setup_with_working_set(false),
        mut ops in script::calm_working_set_script(),
    ) {
        let mut machine = Machine::new(&setup);
        ops.push(Op::Sync);
        run_exactly(&mut machine, &ops);
        assert_faultless(&machine);
    }

    #[test]
    fn a_migration_with_a_working_set_loses_no_write(
        setup in script::setup_with_working_set(true),
        ops in script::working_set_script(),
    ) {
        run_migration(&mut Machine::new(&setup), &ops);
    }

    #[test]
    fn a_migration_with_a_working_set_survives_every_fault(
        setup in script::setup_with_working_set(true),
        ops in script::faulty_working_set_script(),
    ) {
        // A kernel that goes by what it has logged has no room for what overruns its ring.
        let setup = Setup { ignores_voids: false, ..setup };
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
        calm.push(Op::Sync);
        run_repaired(&mut Machine::new(&setup), &faulty, &calm);
    }
}
