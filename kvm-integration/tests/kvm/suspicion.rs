// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A reset that falls short all the same. The pages that it left unprotected are unknown, so all pages of its
//! passes stay suspect until their slot is protected anew.

use std::io;
use std::time::{Duration, Instant};

use kvm_dirty_ring::Reaper;
use kvm_dirty_ring::pacing::Fixed;
use kvm_integration::Workload;
use kvm_integration::host::Host;
use kvm_integration::storm::Storm;
use libtest_mimic::Completion::Completed;

use super::harness::{Outcome, skip};
use super::machine::{Machine, nap, patience, pause, resume, run_passes, slot_id, stop};
use super::scale::{at_most, is_reduced, scaled};

tests![
    short_resets_lose_nothing,
    the_c_librarys_signals_shorten_no_reset
];

fn short_resets_lose_nothing() -> Outcome {
    // A reset of so many entries, few of which are next to each other in memory, too, takes longer than it is
    // from one stop to the next.
    let mut machine = Machine::new(65536, &[at_most(40_000, 4_000)])?;
    let vcpus = machine.spawn_all(Workload::Random, 1)?;
    let looks_for_signals = Host::detect().resets_look_for_signals();
    // Where they don't, none is to be expected, and a few rounds are enough to see one.
    let most = if looks_for_signals {
        scaled(100, 10)
    } else {
        3
    };
    let (mut rounds, deadline) = (0, Instant::now() + patience());
    while machine.log.stats().short_resets == 0 && rounds < most && Instant::now() < deadline {
        rounds += 1;
        run_passes(&vcpus, 1)?;
        let storm = Storm::of_stops();
        machine.finish(&vcpus)?;
        drop(storm);
        resume(&vcpus);
    }
    let stats = machine.log.stats();
    if stats.short_resets == 0 {
        let reason = "no reset fell short, even with signals that nobody can block";
        let reason = format!("{reason}, in {rounds} rounds");
        // It is a matter of chance, of which few rounds have little.
        return match looks_for_signals && !is_reduced() {
            true => Err(reason.into()),
            false => skip(&reason),
        };
    }
    // Nothing but the short resets is wrong, and they are not forgotten.
    let others = [
        stats.failed_resets,
        stats.overruns,
        stats.unknown_slot_entries,
    ];
    assert_eq!(others, [0; 3], "{stats:?}");
    for _ in 0..2 {
        run_passes(&vcpus, 1)?;
        machine.finish(&vcpus)?;
        assert!(
            machine.round()? > 0,
            "suspicion has ended by itself: {stats:?}"
        );
        resume(&vcpus);
    }

    // Protecting every page of the slot anew ends it, after these pages came once more.
    pause(&vcpus)?;
    let (vm, mut asked) = (&machine.vm, Vec::new());
    machine.log.rearm(|slot| {
        asked.push(slot);
        vm.protect(slot.raw()).map_err(io::Error::other)
    })?;
    assert_eq!(asked, [slot_id(1)]);
    assert_eq!(machine.log.stats().suspect_pages, 0);
    assert!(machine.round()? > 0);
    assert_eq!(machine.round()?, 0);
    // And from here on the ring alone will do.
    resume(&vcpus);
    for _ in 0..2 {
        run_passes(&vcpus, 1)?;
        machine.finish(&vcpus)?;
        assert_eq!(machine.round()?, 0);
        resume(&vcpus);
    }
    stop(vcpus)?;
    Ok(Completed)
}

fn the_c_librarys_signals_shorten_no_reset() -> Outcome {
    let mut machine = Machine::new(4096, &[6000])?;
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    let reaper = Reaper::spawn(&machine.log, Fixed::new(Duration::from_millis(20)))?;
    let storm = Storm::of_set_user();
    // So that there is something to reset.
    run_passes(&vcpus, 1)?;
    let deadline = Instant::now() + Duration::from_secs(1);
    while Instant::now() < deadline {
        nap(Duration::from_millis(20));
        machine.finish(&vcpus)?;
        resume(&vcpus);
    }
    drop(storm);
    let stats = machine.log.stats();
    assert!(stats.resets > 0, "{stats:?}");
    assert_eq!(stats.short_resets, 0, "{stats:?}");
    reaper.stop()?;
    stop(vcpus)?;
    Ok(Completed)
}
