// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whose entries are in which ring, and vCPUs that come late.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kvm_integration::{Load, Mode, VcpuThread, Workload};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;

use super::harness::Outcome;
use super::machine::{
    Machine, Over, assert_unsuspicious, page_of, pause, resume, run_passes, slot_id, stop,
    wait_beside, wait_paused,
};
use super::scale::{at_most, scaled};

tests![
    each_vcpu_has_its_own_ring,
    what_waits_is_seen_from_outside,
    late_vcpu,
    more_vcpus_while_others_run
];

/// Eight vCPUs with pages of their own, so many more for each that no two numbers of entries are
/// alike.
fn each_vcpu_has_its_own_ring() -> Outcome {
    let share = |vcpu: u64| vcpu * 1000..vcpu * 1000 + 50 * (vcpu + 1);
    let mut machine = Machine::new(4096, &[8000])?;
    let mut vcpus = Vec::new();
    for index in 0..8 {
        let list = share(index).map(|page| page_of(1, page)).collect();
        let load = Load::new(Mode::Native, list).pass_exits();
        vcpus.push(machine.spawn(index as u32, &load)?);
    }
    for round in 1..=5 {
        wait_paused(&vcpus)?;
        // Entries that the CPU has buffered come with leaving the guest.
        pause(&vcpus)?;
        machine.round()?;
        let stats = machine.log.stats();
        for (index, vcpu) in (0..).zip(&stats.vcpus) {
            let pages = share(index);
            let (found, wanted) = (vcpu.entries, round * (pages.end - pages.start));
            assert_eq!(found, wanted, "of vCPU {index} in round {round}");
        }
        let runs: Vec<_> = machine.dirty().runs().collect();
        let runs: Vec<_> = runs.iter().map(|run| (run.first_page, run.pages)).collect();
        let wanted: Vec<_> = (0..8)
            .map(|index| (index * 1000, 50 * (index + 1)))
            .collect();
        assert_eq!(runs, wanted);
        machine.compare()?;
        resume(&vcpus);
    }
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

/// Every vCPU writes another number of pages, round for round; what an onlooker sees is what a
/// harvest then finds. Meanwhile others look on all the time, and nobody notices.
fn what_waits_is_seen_from_outside() -> Outcome {
    let share = |vcpu: u64| vcpu * 1000..vcpu * 1000 + 37 * (vcpu + 1);
    let mut machine = Machine::new(1024, &[4000])?;
    let mut vcpus = Vec::new();
    for index in 0..4 {
        let list = share(index).map(|page| page_of(1, page)).collect();
        let load = Load::new(Mode::Native, list).pass_exits();
        vcpus.push(machine.spawn(index as u32, &load)?);
    }
    let log = machine.log.clone();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let onlooker = scope.spawn(|| {
            let (mut rings, mut before) = (Vec::new(), [0; 4]);
            while !done.load(Ordering::Relaxed) {
                log.observe(&mut rings);
                for (ring, before) in rings.iter().zip(&mut before) {
                    let logged = ring.taken + ring.waiting;
                    assert!(*before <= logged, "entries were seen and then not");
                    *before = logged;
                }
            }
        });
        let over = Over(&done);
        let rounds = rounds(&mut machine, &vcpus, share);
        drop(over);
        onlooker.join().expect("the onlooker");
        rounds
    })?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

fn rounds(
    machine: &mut Machine,
    vcpus: &[VcpuThread],
    share: impl Fn(u64) -> Range<u64>,
) -> Result<(), Failed> {
    let mut seen = Vec::new();
    for _ in 0..scaled(50, 3) {
        wait_paused(vcpus)?;
        pause(vcpus)?;
        let before = machine.log.stats();
        machine.log.observe(&mut seen);
        machine.round()?;
        let after = machine.log.stats();
        for (index, seen) in (0..).zip(&seen) {
            let pages = share(index as u64);
            assert_eq!(seen.waiting, pages.end - pages.start, "vCPU {index}");
            let found = after.vcpus[index].entries - before.vcpus[index].entries;
            assert_eq!(seen.waiting, found, "vCPU {index}");
        }
        machine.compare()?;
        resume(vcpus);
    }
    Ok(())
}

/// A vCPU that is plugged in while the migration goes on.
fn late_vcpu() -> Outcome {
    let mut machine = Machine::new(1024, &[2048])?;
    let mut vcpus = vec![machine.spawn(0, &machine.load(Workload::Walk, 0, 2))?];
    run_passes(&vcpus, 2)?;
    machine.round()?;
    // The pages of the other half are nobody's yet.
    assert!(!machine.dirty().contains(slot_id(1), 1024));
    assert_eq!(machine.log.stats().vcpus.len(), 1);
    vcpus.push(machine.spawn(1, &machine.load(Workload::Walk, 1, 2))?);
    run_passes(&vcpus, 2)?;
    machine.round()?;
    machine.finish(&vcpus)?;
    let stats = machine.log.stats();
    assert_eq!(stats.vcpus.len(), 2);
    assert!(stats.vcpus[1].entries >= 1024, "{stats:?}");
    Ok(Completed)
}

/// Attaching waits for nobody and stops nobody.
fn more_vcpus_while_others_run() -> Outcome {
    let mut machine = Machine::new(1024, &[4096])?;
    let mut vcpus = Vec::new();
    let many = at_most(16, 4) as u32;
    for index in 0..many {
        vcpus.push(machine.spawn(index, &machine.load(Workload::Random, index, many))?);
        machine.round()?;
        let before = vcpus[0].progress();
        wait_beside(&vcpus, "progress beside a new vCPU", || {
            vcpus[0].progress() > before
        })?;
    }
    machine.finish(&vcpus)?;
    assert_eq!(machine.log.stats().vcpus.len(), many as usize);
    stop(vcpus)?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}
