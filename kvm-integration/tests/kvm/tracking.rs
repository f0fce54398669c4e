// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tracking that stops and starts under running vCPUs: `KVM_MEM_LOG_DIRTY_PAGES` off and on.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::pacing::Fixed;
use kvm_dirty_ring::{DirtyLog, DirtyPages, Reaper, RingEntries};
use kvm_integration::{GuestMemory, TinyVm, Workload, kvm_available};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;

use super::harness::{Outcome, remark, skip};
use super::machine::{Machine, assert_unsuspicious, gpa, nap, resume, run_passes, slot_id, stop};
use super::scale::{patience, scaled};
use super::stat::vm_stat;

tests![
    stops_and_starts_with_rings,
    stops_and_starts_beside_a_reaper,
    stops_and_starts_with_bitmaps,
    stops_and_starts_with_huge_pages,
    one_slot_stops_and_the_other_goes_on,
    a_slot_is_created_without_its_log,
];

fn switch(machine: &Machine, id: u32, on: bool) -> Result<(), SlotError> {
    let set = || machine.vm.set_logged(id, on).map_err(io::Error::other);
    match on {
        true => machine.log.start_tracking(slot_id(id), set),
        false => machine.log.stop_tracking(slot_id(id), set),
    }
}

/// Each time: unlogged for a while, then a migration to its end, after which source and copy must
/// be the same; some with a sync while nothing is logged, some called off and begun anew. How many huge pages KVM
/// has mapped at most while nothing was logged, if it says.
fn stops_and_starts(mut machine: Machine) -> Result<Option<u64>, Failed> {
    let rounds = scaled(60, 8);
    let vcpus = machine.spawn_all(Workload::Random, 2)?;
    let all = machine.pages();
    let (mut round, mut calm, mut huge) = (0, 0, None);
    // On a busy machine many a reset waits for a switch, however few rounds are wanted.
    while round < rounds || calm == 0 {
        assert!(
            round < rounds.max(60) * 2,
            "each round had a doubtful reset"
        );
        round += 1;
        let doubts = machine.log.stats().doubtful_resets;
        for id in [1, 2] {
            switch(&machine, id, false)?;
        }
        run_passes(&vcpus, 1)?;
        huge = huge.max(vm_stat(machine.vm.vm_fd(), "pages_2m")?);
        if round % 3 == 0 {
            assert_eq!(machine.round()?, all, "untracked, round {round}");
            run_passes(&vcpus, 1)?;
        }
        for id in [1, 2] {
            switch(&machine, id, true)?;
        }
        assert_eq!(machine.round()?, all, "started, round {round}");
        if round % 4 == 0 {
            // Called off with entries in the rings.
            nap(Duration::from_micros(round * 37 % 2000));
            continue;
        }
        machine.round()?;
        nap(Duration::from_micros(round * 37 % 2000));
        machine.finish(&vcpus)?;
        let left = machine.round()?;
        // A reset that had to wait for a switch is doubtful, and leaves suspects until the next stop.
        if machine.log.stats().doubtful_resets == doubts {
            assert_eq!(left, 0, "nobody has written, round {round}");
            calm += 1;
        }
        resume(&vcpus);
    }
    stop(vcpus)?;
    assert_unsuspicious(&machine.log.stats());
    Ok(huge)
}

fn stops_and_starts_with_rings() -> Outcome {
    stops_and_starts(Machine::new(1024, &[1500, 548])?)?;
    Ok(Completed)
}

fn stops_and_starts_beside_a_reaper() -> Outcome {
    let machine = Machine::new(1024, &[1500, 548])?;
    let reaper = Reaper::spawn(
        &machine.log,
        Fixed::new(patience(Duration::from_micros(300))),
    )?;
    stops_and_starts(machine)?;
    reaper.stop()?;
    Ok(Completed)
}

/// KVM throws its bitmaps away with the flag.
fn stops_and_starts_with_bitmaps() -> Outcome {
    stops_and_starts(Machine::with_bitmap(&[1500, 548])?)?;
    Ok(Completed)
}

/// Memory in huge pages is mapped as such while it is not tracked. KVM has to split these mappings, or to make new
/// ones, once it is.
fn stops_and_starts_with_huge_pages() -> Outcome {
    let mut mapped = Some(0);
    for mut machine in [Machine::new(1024, &[])?, Machine::with_bitmap(&[])?] {
        for (id, huge_pages) in [(1, 3), (2, 1)] {
            let memory = GuestMemory::with_huge_pages(huge_pages * 512)?;
            assert_eq!((gpa(id) | memory.host_addr()) % (2 << 20), 0);
            let (had, all) = (memory.huge_bytes()? >> 10, memory.bytes() >> 10);
            if had < all {
                return skip(&format!("the kernel had {had} of {all} KiB in huge pages"));
            }
            machine.add_memory(id, memory)?;
        }
        let most = stops_and_starts(machine)?;
        mapped = most.zip(mapped).map(|(most, before)| most.max(before));
    }
    // Nothing was lost in any case.
    match mapped {
        Some(0) => skip("KVM has mapped no huge page of memory in huge pages"),
        Some(mapped) => {
            remark(&format!(
                "KVM has mapped {mapped} huge pages at a time, of 4"
            ));
            Ok(Completed)
        }
        None => {
            remark("whether KVM has mapped huge pages of memory in huge pages, it does not say");
            Ok(Completed)
        }
    }
}

fn one_slot_stops_and_the_other_goes_on() -> Outcome {
    let mut machine = Machine::new(1024, &[1500, 548])?;
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    run_passes(&vcpus, 1)?;
    switch(&machine, 1, false)?;
    run_passes(&vcpus, 1)?;
    machine.finish(&vcpus)?;
    // The one as a whole for as long as it is not tracked, of the other what was written.
    assert_eq!(machine.round()?, 1500);
    assert!(machine.dirty().runs().all(|run| run.slot == slot_id(1)));
    switch(&machine, 1, true)?;
    assert_eq!((machine.round()?, machine.round()?), (1500, 0));
    resume(&vcpus);
    run_passes(&vcpus, 2)?;
    machine.finish(&vcpus)?;
    stop(vcpus)?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

/// As a VMM does that logs nothing until there is a migration, in either mode.
fn a_slot_is_created_without_its_log() -> Outcome {
    for bitmap in [false, true] {
        let vm = TinyVm::new(&kvm_available()?)?;
        let log = match bitmap {
            false => DirtyLog::enable(vm.vm_fd(), RingEntries::new(1024)?)?,
            true => DirtyLog::enable_bitmap(vm.vm_fd())?,
        };
        let slot = slot_id(1);
        log.add_slot(slot, 100)?;
        let memory = Arc::new(GuestMemory::new(100)?);
        let create = || vm.add_slot(1, gpa(1), memory, false);
        log.stop_tracking(slot, || create().map_err(io::Error::other))?;
        let mut dirty = DirtyPages::new();
        log.sync(&mut dirty)?;
        assert_eq!(dirty.page_count(), 100);
        log.start_tracking(slot, || vm.set_logged(1, true).map_err(io::Error::other))?;
        for expected in [100, 0, 0] {
            log.sync(&mut dirty)?;
            assert_eq!(dirty.page_count(), expected);
        }
        assert_unsuspicious(&log.stats());
    }
    Ok(Completed)
}
