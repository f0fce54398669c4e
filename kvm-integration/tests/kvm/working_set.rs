// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pages that stay open, on a kernel that promises nothing of the kind.

use std::time::{Duration, Instant};

use kvm_dirty_ring::pacing::Fixed;
use kvm_dirty_ring::{Reaper, WorkingSet};
use kvm_integration::Workload;
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;

use super::harness::{Outcome, remark};
use super::machine::{Machine, assert_unsuspicious, nap, pause, resume, run_passes, stop};
use super::scale::{patience, scaled};

tests![
    members_are_not_logged,
    a_refresh_has_them_logged_again,
    migrations_with_members,
    migrations_with_members_beside_a_reaper,
    migrations_with_members_of_bitmaps,
    chunks_are_protected_one_by_one,
    a_last_sync_protects_nothing,
    a_change_of_the_hosts_protection_closes_pages,
];

const PAGES: u64 = 600;

/// What a guest of one vCPU logs on a pass over all of its pages: entries, and pages that a sync then reports.
fn pass(
    machine: &mut Machine,
    vcpus: &[kvm_integration::VcpuThread],
) -> Result<(u64, u64), Failed> {
    let before = machine.log.stats().entries;
    resume(vcpus);
    run_passes(vcpus, 2)?;
    pause(vcpus)?;
    let reported = machine.round()?;
    Ok((machine.log.stats().entries - before, reported))
}

fn members_are_not_logged() -> Outcome {
    let mut machine = Machine::new(1024, &[PAGES])?;
    machine.log.set_working_set(Some(WorkingSet::new(PAGES)));
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    let (entries, reported) = pass(&mut machine, &vcpus)?;
    assert!(
        entries >= PAGES && reported == PAGES,
        "{entries}, {reported}"
    );
    assert_eq!(machine.dirty().members().page_count(), PAGES);
    for _ in 0..3 {
        let (entries, reported) = pass(&mut machine, &vcpus)?;
        remark(&format!(
            "{entries} entries of {PAGES} pages that stay open"
        ));
        assert!(
            entries * 10 <= PAGES,
            "{entries} entries: void ones are ignored"
        );
        assert_eq!(reported, PAGES);
        machine.compare()?;
    }
    stop(vcpus)?;
    Ok(Completed)
}

fn a_refresh_has_them_logged_again() -> Outcome {
    let mut machine = Machine::new(1024, &[PAGES])?;
    machine.log.set_working_set(Some(WorkingSet::new(PAGES)));
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    for _ in 0..scaled(10, 3) {
        let (entries, reported) = pass(&mut machine, &vcpus)?;
        assert!(
            entries >= PAGES && reported == PAGES,
            "{entries}, {reported}"
        );
        assert_eq!(machine.refresh()?, 1);
        assert_eq!(machine.round_of_others()?, (PAGES, 0), "once more");
        assert_eq!(machine.round_of_others()?, (0, 0));
        machine.compare()?;
    }
    stop(vcpus)?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

/// Migrations of a guest that never stops writing, in which members are sent in the last round alone; each is called off
/// when it is over.
fn migrate(mut machine: Machine) -> Result<(), Failed> {
    let vcpus = machine.spawn_all(Workload::HotAndCold, 2)?;
    let (mut most_members, mut refreshes) = (0, 0);
    for round in 0..scaled(40, 6) {
        let places = round * 97 % 800;
        machine.log.set_working_set(Some(WorkingSet::new(places)));
        for _ in 0..3 {
            run_passes(&vcpus, 1)?;
            nap(Duration::from_micros(round * 37 % 2000));
            let (_, members) = machine.round_of_others()?;
            most_members = most_members.max(members);
        }
        if round % 3 == 0 {
            pause(&vcpus)?;
            refreshes += machine.refresh()?;
            resume(&vcpus);
            machine.round_of_others()?;
        }
        pause(&vcpus)?;
        machine.last_round()?;
        machine.compare()?;
        resume(&vcpus);
    }
    stop(vcpus)?;
    let stats = machine.log.stats();
    assert_unsuspicious(&stats);
    assert!(most_members > 0 && refreshes > 0, "{:?}", stats.working_set);
    assert!(!stats.working_set.useless, "{:?}", stats.working_set);
    remark(&format!(
        "{most_members} members at most, {} joined, {} closed",
        stats.working_set.joined, stats.working_set.closed
    ));
    Ok(())
}

fn migrations_with_members() -> Outcome {
    migrate(Machine::new(1024, &[1500, 548])?)?;
    Ok(Completed)
}

fn migrations_with_members_beside_a_reaper() -> Outcome {
    let machine = Machine::new(1024, &[1500, 548])?;
    let pace = Fixed::new(patience(Duration::from_micros(300)));
    let reaper = Reaper::spawn(&machine.log, pace)?;
    migrate(machine)?;
    reaper.stop()?;
    Ok(Completed)
}

fn migrations_with_members_of_bitmaps() -> Outcome {
    migrate(Machine::with_bitmap(&[1500, 548])?)?;
    Ok(Completed)
}

/// With bitmaps, under vCPUs that write on while chunk after chunk is cleared and copied; and with rings, for the same calls.
fn chunks_are_protected_one_by_one() -> Outcome {
    let machines = [
        Machine::with_bitmap(&[1500, 548])?,
        Machine::new(1024, &[1500, 548])?,
    ];
    for mut machine in machines {
        let vcpus = machine.spawn_all(Workload::Random, 2)?;
        for round in 0..scaled(30, 5) {
            run_passes(&vcpus, 1)?;
            let mut copied = 0;
            for _ in 0..3 {
                copied += machine.round_on_demand(64 << (round % 4))?;
            }
            assert!(copied > 0, "round {round}");
            // Called off after its first chunk.
            let mut found = machine.log.sync_on_demand()?;
            if let Some(chunk) = found.next_chunk(128)? {
                machine.copy(chunk.runs())?;
            }
            drop(found);
            machine.finish(&vcpus)?;
            resume(&vcpus);
        }
        stop(vcpus)?;
        assert_unsuspicious(&machine.log.stats());
    }
    Ok(Completed)
}

fn a_last_sync_protects_nothing() -> Outcome {
    let mut machine = Machine::new(1024, &[PAGES])?;
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    for _ in 0..scaled(20, 4) {
        run_passes(&vcpus, 1)?;
        pause(&vcpus)?;
        let resets = machine.log.stats().resets;
        let reported = machine.last_round()?;
        machine.compare()?;
        assert_eq!(machine.log.stats().resets, resets, "it made a reset");
        // Called off: all of it comes again, once.
        assert_eq!(machine.round()?, reported);
        assert_eq!(machine.round()?, 0);
        resume(&vcpus);
    }
    stop(vcpus)?;
    Ok(Completed)
}

/// A probe: KVM drops its mappings of pages whose protection changes in the VMM's own page tables, and the next write is logged
/// again. Nothing promises that; what it costs is printed.
fn a_change_of_the_hosts_protection_closes_pages() -> Outcome {
    let mut machine = Machine::new(1024, &[PAGES])?;
    machine.log.set_working_set(Some(WorkingSet::new(PAGES)));
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    let (_, reported) = pass(&mut machine, &vcpus)?;
    assert_eq!(reported, PAGES);
    let (mut logged, mut costs) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let memory = machine.memory(1);
        let (start, bytes) = (
            memory.host_addr() as *mut libc::c_void,
            memory.bytes() as usize,
        );
        let began = Instant::now();
        for protection in [
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            libc::PROT_READ | libc::PROT_WRITE,
        ] {
            // SAFETY: the guest's memory, which stays mapped, and which this leaves readable and writable.
            let changed = unsafe { libc::mprotect(start, bytes, protection) };
            assert_eq!(changed, 0, "{}", std::io::Error::last_os_error());
        }
        costs.push(began.elapsed());
        let (entries, reported) = pass(&mut machine, &vcpus)?;
        assert_eq!(reported, PAGES);
        logged.push(entries);
        machine.compare()?;
    }
    costs.sort();
    remark(&format!(
        "mprotect and back, of {PAGES} open pages: {:?}; entries of the pass after it: {logged:?}",
        costs[2]
    ));
    stop(vcpus)?;
    Ok(Completed)
}
