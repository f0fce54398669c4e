// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reset before copy.
//!
//! A page that was harvested is not protected before it is reset, so what the guest writes in
//! between is silent: a copy made there is lost at once, and nothing shows it.

use std::slice::from_ref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use kvm_dirty_ring::Reaper;
use kvm_dirty_ring::error::ResetError;
use kvm_dirty_ring::pacing::Fixed;
use kvm_integration::{GuestMemory, Workload};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;

use super::harness::Outcome;
use super::machine::{Machine, Over, assert_unsuspicious, nap, pause, resume, run_passes, stop};
use super::raw::RawMachine;
use super::scale::{patience, scaled};

tests![
    copy_before_reset_loses_writes,
    reset_before_copy_loses_none,
    log_loses_none,
    log_beside_a_reaper_loses_none,
    log_beside_many_passes_loses_none,
];

#[derive(Clone, Copy, PartialEq)]
enum Order {
    CopyFirst,
    ResetFirst,
}

const PAGES: u64 = 512;

/// Rounds of a migration by hand. How many pages the copy missed in all.
fn lost_pages(order: Order, rounds: u64) -> Result<usize, Failed> {
    let mut machine = RawMachine::new(2048, PAGES, false)?;
    let copy = GuestMemory::new(PAGES)?;
    let mut lost = 0;
    for _ in 0..rounds {
        run_passes(from_ref(&machine.vcpu), 2)?;
        // What the CPU has buffered comes to the ring only as it leaves the guest.
        pause(from_ref(&machine.vcpu))?;
        machine.vcpu.resume();
        let pages = machine.harvest();
        if order == Order::ResetFirst {
            machine.reset()?;
        }
        for &page in &pages {
            machine.memory.copy_page_to(page, &copy);
        }
        // So that the guest is sure to write each page in between.
        run_passes(from_ref(&machine.vcpu), 2)?;
        if order == Order::CopyFirst {
            machine.reset()?;
        }
        pause(from_ref(&machine.vcpu))?;
        let pages = machine.harvest();
        machine.reset()?;
        for &page in &pages {
            machine.memory.copy_page_to(page, &copy);
        }
        let missed: Vec<u64> = machine.memory.differing(&copy).collect();
        lost += missed.len();
        for page in missed {
            machine.memory.copy_page_to(page, &copy);
        }
        machine.vcpu.resume();
    }
    Ok(lost)
}

/// That the danger is real here: or else the tests below would prove nothing.
fn copy_before_reset_loses_writes() -> Outcome {
    let lost = lost_pages(Order::CopyFirst, 5)?;
    assert!(lost > 0, "no page was lost, against all reason");
    Ok(Completed)
}

fn reset_before_copy_loses_none() -> Outcome {
    assert_eq!(lost_pages(Order::ResetFirst, scaled(20, 3))?, 0);
    Ok(Completed)
}

/// The same with the crate: in each round, one sync beside the running guest, one after.
fn log_loses_none() -> Outcome {
    let mut machine = Machine::new(1024, &[PAGES])?;
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    for _ in 0..scaled(100, 5) {
        run_passes(&vcpus, 2)?;
        machine.round()?;
        machine.finish(&vcpus)?;
        resume(&vcpus);
    }
    stop(vcpus)?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

/// With a reaper, most pages of a sync were harvested, and must have been reset, by another thread.
fn log_beside_a_reaper_loses_none() -> Outcome {
    let mut machine = Machine::new(1024, &[4 * PAGES])?;
    let vcpus = machine.spawn_all(Workload::Walk, 2)?;
    let reaper = Reaper::spawn(
        &machine.log,
        Fixed::new(patience(Duration::from_micros(100))),
    )?;
    for _ in 0..scaled(500, 10) {
        for _ in 0..3 {
            machine.round()?;
        }
        pause(&vcpus)?;
        machine.finish(&vcpus)?;
        resume(&vcpus);
        nap(Duration::from_micros(500));
    }
    reaper.stop()?;
    stop(vcpus)?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

/// The worst case: passes on several threads without a pause, each of which may have harvested what
/// a sync is about to hand out and not have reset it yet.
fn log_beside_many_passes_loses_none() -> Outcome {
    let mut machine = Machine::new(4096, &[8 * PAGES])?;
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    let over = AtomicBool::new(false);
    let log = machine.log.clone();
    thread::scope(|scope| -> Result<(), Failed> {
        let reap = || -> Result<(), ResetError> {
            while !over.load(Ordering::Relaxed) {
                log.reap()?;
            }
            Ok(())
        };
        let passes = [scope.spawn(reap), scope.spawn(reap)];
        let mut rounds = || -> Result<(), Failed> {
            for round in 0..scaled(800, 16) {
                nap(Duration::from_micros(round % 8 * 100));
                machine.round()?;
                machine.finish(&vcpus)?;
                resume(&vcpus);
            }
            Ok(())
        };
        let guard = Over(&over);
        let result = rounds();
        drop(guard);
        for pass in passes {
            pass.join().expect("a pass panicked")?;
        }
        result
    })?;
    stop(vcpus)?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}
