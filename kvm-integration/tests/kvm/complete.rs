// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The final sync is complete: with the vCPUs paused, one is enough, whatever else is going on.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use kvm_dirty_ring::error::{SlotError, SyncError};
use kvm_dirty_ring::pacing::Fixed;
use kvm_dirty_ring::{DirtyPages, Reaper};
use kvm_integration::{GuestMemory, Load, Mode, PAGE_SIZE, Workload};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;

use super::harness::Outcome;
use super::machine::{
    Machine, Over, assert_unsuspicious, nap, page_of, pause, resume, run_passes, slot_id, stop,
};
use super::scale::{at_most, scaled};

tests![
    final_sync_beside_a_reaper,
    final_sync_of_many_vcpus,
    snapshots_without_a_reaper,
    syncs_beside_each_other,
    device_writes_are_merged,
];

/// Lets `vcpus` vCPUs run for a moment, stops them in the middle of it, and wants everything.
fn stop_and_sync(workload: Workload, vcpus: u32, period: Duration) -> Result<(), Failed> {
    let mut machine = Machine::new(1024, &[1500, 548])?;
    let vcpus = machine.spawn_all(workload, vcpus)?;
    let reaper = Reaper::spawn(&machine.log, Fixed::new(period))?;
    for round in 0..scaled(200, 10) {
        // So that they are stopped at no moment in particular.
        nap(Duration::from_micros(round * 37 % 2000));
        machine.finish(&vcpus)?;
        // Nobody has written since: nothing is left over.
        assert_eq!(machine.round()?, 0);
        resume(&vcpus);
    }
    reaper.stop()?;
    stop(vcpus)?;
    let stats = machine.log.stats();
    assert!(stats.entries > 0, "they have written nothing: {stats:?}");
    assert_unsuspicious(&stats);
    Ok(())
}

fn final_sync_beside_a_reaper() -> Outcome {
    stop_and_sync(Workload::Walk, 1, Duration::from_micros(100))?;
    stop_and_sync(Workload::HotAndCold, 2, Duration::from_micros(500))?;
    Ok(Completed)
}

fn final_sync_of_many_vcpus() -> Outcome {
    stop_and_sync(
        Workload::Random,
        at_most(8, 4) as u32,
        Duration::from_millis(1),
    )?;
    Ok(Completed)
}

/// One snapshot after the other, each of one sync with the guest stopped. In between nobody empties
/// the rings but the vCPUs, each its own when it is full.
fn snapshots_without_a_reaper() -> Outcome {
    let mut machine = Machine::new(1024, &[3000, 1096])?;
    let vcpus = machine.spawn_all(Workload::Random, 2)?;
    let rounds = scaled(20, 3);
    for _ in 0..rounds {
        run_passes(&vcpus, 1)?;
        machine.finish(&vcpus)?;
        resume(&vcpus);
    }
    stop(vcpus)?;
    let stats = machine.log.stats();
    assert!(stats.full_exits() > 0, "{stats:?}");
    // A pass for each full exit, and four for each sync.
    assert_eq!(stats.passes, stats.full_exits() + 4 * rounds, "{stats:?}");
    assert_unsuspicious(&stats);
    Ok(Completed)
}

/// Two threads that sync: what the one is given the other is not, together they get everything.
fn syncs_beside_each_other() -> Outcome {
    const PAGES: u64 = 2048;
    let mut machine = Machine::new(1024, &[PAGES])?;
    let vcpus = machine.spawn_all(Workload::Random, 2)?;
    let (log, memory) = (machine.log.clone(), Arc::clone(machine.memory(1)));
    let copy = GuestMemory::new(PAGES)?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| -> Result<(), Failed> {
        let other = scope.spawn(|| -> Result<(), SyncError> {
            let mut dirty = DirtyPages::new();
            while !over.load(Ordering::Relaxed) {
                log.sync(&mut dirty)?;
                for run in dirty.runs() {
                    memory.copy_run(run.first_page, run.pages, &copy);
                }
            }
            Ok(())
        });
        let guard = Over(&over);
        for _ in 0..scaled(100, 10) {
            machine.round()?;
            nap(Duration::from_micros(300));
        }
        pause(&vcpus)?;
        machine.round()?;
        drop(guard);
        Ok(other.join().expect("a sync panicked")?)
    })?;
    // The copy that received a page last has its contents.
    let there: HashSet<u64> = memory.differing(&copy).collect();
    let lost: Vec<u64> = machine.missing(1);
    let lost: Vec<&u64> = lost.iter().filter(|page| there.contains(page)).collect();
    assert!(lost.is_empty(), "pages {lost:?} were lost");
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

/// A device writes pages that no vCPU does, beside vCPUs and syncs: only `mark_dirty` reports it.
fn device_writes_are_merged() -> Outcome {
    let mut machine = Machine::new(1024, &[1024, 4096])?;
    let (log, device_memory) = (machine.log.clone(), Arc::clone(machine.memory(2)));
    let list = (0..1024).map(|page| page_of(1, page));
    let load = Load::new(Mode::Native, list.collect());
    let vcpus = vec![machine.spawn(0, &load)?];
    let reaper = Reaper::spawn(&machine.log, Fixed::new(Duration::from_millis(1)))?;
    for round in 1..=scaled(30, 3) {
        let written = thread::scope(|scope| -> Result<u64, Failed> {
            let device = scope.spawn(|| {
                // Runs of pages, here and there, each marked once it is written.
                let mut written = 0;
                for n in 0..100 {
                    let (first, pages) = ((n * 677 + round * 31) % 4000, 1 + (n + round) % 96);
                    for page in first..first + pages {
                        device_memory.write_u64(page * PAGE_SIZE, round << 32 | n);
                    }
                    log.mark_dirty(slot_id(2), first, pages)?;
                    written += pages;
                    thread::yield_now();
                }
                Ok::<_, SlotError>(written)
            });
            while !device.is_finished() {
                machine.round()?;
            }
            Ok(device.join().expect("the device panicked")?)
        })?;
        assert!(written > 0);
        machine.finish(&vcpus)?;
        resume(&vcpus);
    }
    run_passes(&vcpus, 1)?;
    reaper.stop()?;
    stop(vcpus)?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}
