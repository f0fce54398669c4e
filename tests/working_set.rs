//! The writable working set beside everything else that a log does, on the simulated kernel.

#[allow(dead_code, reason = "what other scenarios need, too")]
#[path = "common/scenario.rs"]
mod scenario;

use std::cell::Cell;
use std::io;
use std::num::NonZeroU64;

use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::sim::{ResetFault, SimConfig, SimVm};
use kvm_dirty_ring::{DirtyLog, DirtyPages, DirtyPart, LastPages, Mode, SlotId, WorkingSet};
use scenario::{Machine, RAM, ROM};

/// A machine with a working set of so many free places.
fn machine(places: u64) -> Machine {
    let machine = Machine::new();
    machine.log.set_working_set(Some(WorkingSet::new(places)));
    machine
}

fn pages(part: DirtyPart<'_>) -> Vec<u64> {
    let pages = |run: kvm_dirty_ring::Run| run.first_page..run.first_page + run.pages;
    part.runs().flat_map(pages).collect()
}

/// Members and others that a sync reports.
fn sync(machine: &mut Machine) -> (Vec<u64>, Vec<u64>) {
    machine.log.sync(&mut machine.dirty).unwrap();
    (
        pages(machine.dirty.members()),
        pages(machine.dirty.others()),
    )
}

fn refresh(machine: &Machine) -> usize {
    let refreshed = machine.log.refresh(|slot| {
        machine.vm.rearm_slot(slot);
        Ok(())
    });
    refreshed.unwrap()
}

const NONE: Vec<u64> = Vec::new();

#[test]
fn the_first_pages_take_the_free_places() {
    let mut machine = machine(2);
    machine.write(0..5);
    assert_eq!(sync(&mut machine), (vec![0, 1], vec![2, 3, 4]));
    let entries = machine.log.stats().entries;
    machine.write(0..2);
    assert_eq!(sync(&mut machine), (vec![0, 1], NONE));
    assert_eq!(
        machine.log.stats().entries,
        entries,
        "members are not logged"
    );
}

#[test]
fn what_comes_again_within_a_round_stays_open() {
    let mut machine = machine(0);
    machine.write(5..8);
    machine.log.reap().unwrap();
    machine.write(6..9);
    machine.log.reap().unwrap();
    machine.write(6..8);
    assert_eq!(machine.log.stats().working_set.members, 2);
    assert_eq!(sync(&mut machine), (vec![6, 7], vec![5, 8]));
    // In the next round they would have to come twice again.
    machine.write(5..6);
    assert_eq!(sync(&mut machine), (vec![6, 7], vec![5]));
}

#[test]
fn a_vmm_without_refreshes_bounds_all_members() {
    let mut machine = Machine::new();
    let terms = WorkingSet::new(1).at_most(2);
    machine.log.set_working_set(Some(terms));
    for _ in 0..2 {
        machine.write(0..5);
        machine.log.reap().unwrap();
    }
    let (members, others) = sync(&mut machine);
    assert_eq!((members, others.len()), (vec![0, 1], 3));
}

#[test]
fn a_refresh_reports_members_once_more_and_protects_them() {
    let mut machine = machine(10);
    machine.write(0..3);
    sync(&mut machine);
    machine.write(1..2);
    assert_eq!(refresh(&machine), 1, "the other slot has none");
    let set = machine.log.stats().working_set;
    assert_eq!((set.members, set.closed, set.refreshes), (0, 3, 1));
    assert_eq!(sync(&mut machine), (NONE, vec![0, 1, 2]));
    machine.log.set_working_set(Some(WorkingSet::new(0)));
    machine.write(2..3);
    assert_eq!(sync(&mut machine), (NONE, vec![2]));
    assert_eq!(sync(&mut machine), (NONE, NONE));
}

#[test]
fn how_many_of_the_closed_are_back_is_counted() {
    let mut machine = machine(10);
    machine.write(0..4);
    sync(&mut machine);
    refresh(&machine);
    sync(&mut machine);
    machine.write(2..6);
    sync(&mut machine);
    let set = machine.log.stats().working_set;
    assert_eq!((set.members, set.last_closed, set.back), (4, 4, 2));
}

/// A pass that is in flight when a refresh begins lets pages join in the middle of it.
#[test]
fn what_joins_while_members_are_closed_stays_one() {
    let mut machine = machine(10);
    machine.write(0..1);
    sync(&mut machine);
    let log = machine.log.clone();
    let (vm, vcpu) = (machine.vm.clone(), machine.vcpu.clone());
    let refreshed = log.refresh(|slot| {
        vm.rearm_slot(slot);
        // A VMM that closes them by other means need not stop its vCPUs.
        vcpu.write(RAM, 0).unwrap();
        log.reap().unwrap();
        Ok(())
    });
    assert_eq!(refreshed.unwrap(), 1);
    assert_eq!(sync(&mut machine), (vec![0], NONE), "it is open again");
    assert_eq!(sync(&mut machine), (vec![0], NONE));
}

#[test]
fn nothing_joins_under_a_dirty_limit() {
    let mut machine = machine(10);
    machine.write(0..2);
    sync(&mut machine);
    let limit = NonZeroU64::new(1_000_000);
    machine.log.set_dirty_limits(limit).unwrap();
    assert!(machine.log.stats().working_set.refresh_owed);
    machine.write(5..8);
    assert_eq!(sync(&mut machine), (vec![0, 1], vec![5, 6, 7]));
    refresh(&machine);
    assert!(!machine.log.stats().working_set.refresh_owed);
    machine.write(0..1);
    sync(&mut machine);
    machine.log.set_dirty_limit(0, None).unwrap();
    machine.write(20..21);
    assert_eq!(sync(&mut machine), (vec![20], NONE));
}

#[test]
fn switched_off_members_stay_and_a_refresh_is_owed() {
    let mut machine = machine(10);
    machine.write(0..2);
    sync(&mut machine);
    machine.log.set_working_set(None);
    assert!(machine.log.stats().working_set.refresh_owed);
    machine.write(3..4);
    assert_eq!(sync(&mut machine), (vec![0, 1], vec![3]));
    refresh(&machine);
    assert!(!machine.log.stats().working_set.refresh_owed);
    assert_eq!(sync(&mut machine), (NONE, vec![0, 1]));
    assert_eq!(sync(&mut machine), (NONE, NONE));
}

/// Suspects have to be sent in each round: a member among them, too.
#[test]
fn a_member_under_suspicion_counts_as_another() {
    let mut machine = machine(1);
    machine.write(0..1);
    sync(&mut machine);
    machine.write(1..3);
    machine.vm.inject([ResetFault::Short { after: 1 }]);
    machine.log.sync(&mut machine.dirty).unwrap();
    machine.vm.protect(RAM, 0);
    assert_eq!(sync(&mut machine), (vec![0], vec![1, 2]));
    machine.vm.inject([ResetFault::AtEnd]);
    machine.write(40..41);
    let (members, others) = sync(&mut machine);
    assert_eq!(
        members, NONE,
        "it is near the last page of a doubtful reset"
    );
    assert!(others.contains(&0) && others.contains(&40));
    // A rearming ends both.
    machine
        .log
        .rearm(|slot| {
            machine.vm.rearm_slot(slot);
            Ok(())
        })
        .unwrap();
    let (members, others) = sync(&mut machine);
    assert!(members.is_empty() && others.contains(&0));
    assert_eq!(sync(&mut machine), (NONE, NONE));
}

/// The batch before a void entry is protected when that is read: no page is lost by what is cut short there.
#[test]
fn a_reset_that_stops_at_a_void_entry_loses_nothing() {
    for after in 0..8 {
        let mut machine = Machine::new();
        machine.write([0, 100, 1, 101, 2, 102]);
        machine.log.set_working_set(Some(WorkingSet::new(0)));
        machine.log.reap().unwrap();
        machine.vm.inject([ResetFault::Short { after }]);
        machine.write([0, 200, 1, 201, 2, 202]);
        machine.log.reap().unwrap();
        for page in [0, 1, 2, 200, 201, 202] {
            machine.write([page]);
        }
        let (members, others) = sync(&mut machine);
        let all = [members, others].concat();
        for page in [0, 1, 2, 100, 101, 102, 200, 201, 202] {
            assert!(all.contains(&page), "page {page}, cut short after {after}");
        }
    }
}

#[test]
fn a_slot_that_goes_has_no_members() {
    let mut machine = machine(10);
    machine.write(0..2);
    machine.vcpu.write(ROM, 7).unwrap();
    sync(&mut machine);
    let retired = machine.log.retire_slot(RAM).unwrap();
    assert_eq!(
        sync(&mut machine),
        (vec![7], vec![0, 1]),
        "its last pages are to be sent"
    );
    assert_eq!(
        machine.log.stats().working_set.members,
        1,
        "its places are free"
    );
    machine.log.keep_slot(&retired).unwrap();
    assert_eq!(sync(&mut machine), (vec![0, 1, 7], NONE));

    let retired = machine.log.retire_slot(RAM).unwrap();
    machine.vm.delete_slot(RAM);
    machine.log.finish_slot(&retired).unwrap();
    machine.log.add_slot(RAM, 300).unwrap();
    machine.vm.create_slot(RAM, 300);
    assert_eq!(
        sync(&mut machine),
        (vec![7], NONE),
        "another slot, with none"
    );
}

#[test]
fn a_stop_of_tracking_ends_membership_and_a_start_does_not() {
    let mut machine = machine(10);
    machine.write(0..2);
    sync(&mut machine);
    let (vm, log) = (machine.vm.clone(), machine.log.clone());
    // It may find the log on, and protect nothing.
    log.start_tracking(RAM, || Ok(())).unwrap();
    let (members, others) = sync(&mut machine);
    assert_eq!((members, others.len()), (vec![0, 1], 298));
    assert_eq!(sync(&mut machine), (vec![0, 1], NONE));

    let failed = log.stop_tracking(RAM, || Err(io::ErrorKind::Other.into()));
    assert!(matches!(failed, Err(SlotError::Switch { .. })));
    let (members, others) = sync(&mut machine);
    assert_eq!((members, others.len()), (NONE, 300), "not tracked");
    log.start_tracking(RAM, || Ok(())).unwrap();
    sync(&mut machine);
    assert_eq!(sync(&mut machine), (vec![0, 1], NONE), "they were kept");

    log.stop_tracking(RAM, || {
        vm.set_logged(RAM, false);
        Ok(())
    })
    .unwrap();
    log.start_tracking(RAM, || {
        vm.set_logged(RAM, true);
        Ok(())
    })
    .unwrap();
    let (members, others) = sync(&mut machine);
    assert_eq!((members, others.len()), (NONE, 300));
    assert_eq!(sync(&mut machine), (NONE, NONE));
}

#[test]
fn devices_and_vcpus_that_are_plugged_in_write_members_too() {
    let mut machine = machine(1);
    machine.write(0..1);
    sync(&mut machine);
    assert!(machine.vm.device_write(RAM, 0) && machine.vm.device_write(RAM, 9));
    machine.log.mark_dirty(RAM, 0, 1).unwrap();
    machine.log.mark_dirty(RAM, 9, 1).unwrap();
    assert_eq!(sync(&mut machine), (vec![0], vec![9]));
    let vcpu = machine.vm.add_vcpu();
    let _ring = machine.log.attach_ring(vcpu.ring_memory()).unwrap();
    vcpu.write(RAM, 0).unwrap();
    vcpu.write(RAM, 10).unwrap();
    assert_eq!(sync(&mut machine), (vec![0], vec![10]));
}

/// Two passes harvest one page, from two rings: one leaves it open, the other has it protected.
#[test]
fn a_page_in_two_rings_may_be_open_and_protected() {
    for order in [[0, 1], [1, 0]] {
        let mut machine = machine(0);
        let vcpu = machine.vm.add_vcpu();
        let _ring = machine.log.attach_ring(vcpu.ring_memory()).unwrap();
        machine.write(5..6);
        machine.vm.protect(RAM, 5);
        vcpu.write(RAM, 5).unwrap();
        for ring in order {
            let rings = [ring == 0, ring == 1];
            machine.log.reap_rings(&rings).unwrap();
        }
        assert_eq!(sync(&mut machine), (vec![5], NONE));
        assert_eq!(sync(&mut machine), (vec![5], NONE));
    }
}

#[test]
fn in_a_broken_machine_no_page_is_a_member() {
    let mut machine = machine(10);
    machine.write(0..2);
    sync(&mut machine);
    machine.vcpu.ignore_soft_limit(true);
    machine.write(20..84);
    let (members, others) = sync(&mut machine);
    assert_eq!((members, others.len()), (NONE, 370));
}

#[test]
fn a_kernel_that_ignores_void_entries_switches_it_off() {
    let mut config = SimConfig::default();
    config.ignores_voids = true;
    let vm = SimVm::new(config);
    let log = vm.dirty_log();
    log.add_slot(RAM, 1000).unwrap();
    vm.create_slot(RAM, 1000);
    let vcpu = vm.add_vcpu();
    let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    log.set_working_set(Some(WorkingSet::new(500)));
    let mut dirty = DirtyPages::new();
    for round in 0..20 {
        (0..400).for_each(|page| vcpu.write(RAM, page).unwrap());
        log.sync(&mut dirty).unwrap();
        assert_eq!(dirty.page_count(), 400, "in round {round}");
    }
    let set = log.stats().working_set;
    assert!(set.useless && set.refresh_owed, "{set:?}");
    log.refresh(|slot| {
        vm.rearm_slot(slot);
        Ok(())
    })
    .unwrap();
    log.sync(&mut dirty).unwrap();
    (0..400).for_each(|page| vcpu.write(RAM, page).unwrap());
    log.sync(&mut dirty).unwrap();
    assert_eq!(
        (dirty.members().page_count(), dirty.others().page_count()),
        (0, 400)
    );
}

/// KVM drops its mappings of all pages when a slot goes, and logs each member once more.
#[test]
fn members_that_are_all_logged_once_more_keep_it_on() {
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    log.add_slot(RAM, 2000).unwrap();
    vm.create_slot(RAM, 2000);
    let vcpu = vm.add_vcpu();
    let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    log.set_working_set(Some(WorkingSet::new(2000)));
    for _ in 0..2 {
        for page in 0..2000 {
            vcpu.write(RAM, page).unwrap();
            if page % 100 == 99 {
                log.reap().unwrap();
            }
        }
        (0..2000).for_each(|page| vm.protect(RAM, page));
    }
    let set = log.stats().working_set;
    assert_eq!((set.members, set.useless), (2000, false));
}

#[test]
fn a_last_sync_resets_nothing_and_takes_nothing() {
    let mut machine = machine(1);
    machine.write(0..3);
    sync(&mut machine);
    machine.write(0..5);
    machine.log.mark_dirty(ROM, 3, 1).unwrap();
    let resets = machine.log.stats().resets;
    let mut last = LastPages::new();
    for _ in 0..2 {
        machine.log.last_sync(&mut last).unwrap();
        assert_eq!(pages(last.part()), [0, 1, 2, 3, 4, 3]);
        assert!(last.contains(ROM, 3) && last.contains(RAM, 0));
    }
    assert_eq!(machine.log.stats().resets, resets);
    // Called off.
    machine.write(7..8);
    assert_eq!(sync(&mut machine), (vec![0], vec![1, 2, 3, 4, 7, 3]));
    assert_eq!(sync(&mut machine), (vec![0], NONE));
}

/// A bitmap machine, with manual protection or without.
fn with_bitmap(manual_protect: bool) -> (SimVm, DirtyLog, kvm_dirty_ring::sim::SimVcpu) {
    let mut config = SimConfig::default();
    config.mode = Mode::Bitmap;
    config.manual_protect = manual_protect;
    let vm = SimVm::new(config);
    let log = vm.dirty_log();
    log.add_slot(RAM, 300).unwrap();
    vm.create_slot(RAM, 300);
    log.set_working_set(Some(WorkingSet::new(5)));
    let vcpu = vm.add_vcpu();
    (vm, log, vcpu)
}

#[test]
fn in_a_bitmap_what_two_syncs_find_stays_open() {
    let (_vm, log, vcpu) = with_bitmap(true);
    let mut dirty = DirtyPages::new();
    let mut round = |written: &[u64], members: &[u64], others: &[u64]| {
        written
            .iter()
            .for_each(|&page| vcpu.write(RAM, page).unwrap());
        log.sync(&mut dirty).unwrap();
        assert_eq!(
            (&pages(dirty.members())[..], &pages(dirty.others())[..]),
            (members, others)
        );
    };
    round(&[0, 1, 2], &[], &[0, 1, 2]);
    round(&[1, 2, 3], &[1, 2], &[3]);
    round(&[3, 9], &[1, 2, 3], &[9]);
    round(&[0], &[1, 2, 3], &[0]);
    round(&[9], &[1, 2, 3], &[9]);
    let called = Cell::new(false);
    let refreshed = log.refresh(|_| {
        called.set(true);
        Ok(())
    });
    assert_eq!((refreshed.unwrap(), called.get()), (1, false));
    round(&[], &[], &[1, 2, 3]);
    round(&[2], &[], &[2]);
}

#[test]
fn a_last_sync_leaves_the_kernel_its_bits() {
    for manual_protect in [true, false] {
        let (_vm, log, vcpu) = with_bitmap(manual_protect);
        let (mut dirty, mut last) = (DirtyPages::new(), LastPages::new());
        (3..6).for_each(|page| vcpu.write(RAM, page).unwrap());
        for _ in 0..2 {
            log.last_sync(&mut last).unwrap();
            assert_eq!(pages(last.part()), [3, 4, 5]);
        }
        vcpu.write(RAM, 4).unwrap();
        log.sync(&mut dirty).unwrap();
        assert_eq!(pages(dirty.part()), [3, 4, 5]);
        assert!(dirty.members().runs().next().is_none(), "it is no evidence");
        log.sync(&mut dirty).unwrap();
        assert!(dirty.is_empty());
    }
}

#[test]
fn without_manual_protection_bitmaps_have_no_members() {
    let (_vm, log, vcpu) = with_bitmap(false);
    let mut dirty = DirtyPages::new();
    for _ in 0..4 {
        vcpu.write(RAM, 3).unwrap();
        log.sync(&mut dirty).unwrap();
        assert_eq!(
            (dirty.members().page_count(), pages(dirty.others())),
            (0, vec![3])
        );
    }
}

/// A start or stop of tracking forgets what the sync before has cleared.
#[test]
fn a_slot_whose_log_was_switched_starts_anew() {
    let (vm, log, vcpu) = with_bitmap(true);
    let mut dirty = DirtyPages::new();
    vcpu.write(RAM, 3).unwrap();
    log.sync(&mut dirty).unwrap();
    log.stop_tracking(RAM, || {
        vm.set_logged(RAM, false);
        Ok(())
    })
    .unwrap();
    log.start_tracking(RAM, || {
        vm.set_logged(RAM, true);
        Ok(())
    })
    .unwrap();
    vcpu.write(RAM, 3).unwrap();
    log.sync(&mut dirty).unwrap();
    assert_eq!((dirty.members().page_count(), dirty.page_count()), (0, 300));
}

#[test]
fn what_was_not_sent_is_merged_or_given_back() {
    let mut machine = machine(2);
    machine.write(0..5);
    machine.log.sync(&mut machine.dirty).unwrap();
    let unsent = std::mem::take(&mut machine.dirty);
    refresh(&machine);
    machine.log.set_working_set(Some(WorkingSet::new(1)));
    machine.write(4..5);
    machine.vcpu.write(ROM, 9).unwrap();
    machine.log.sync(&mut machine.dirty).unwrap();
    assert!(machine.dirty.merge(&unsent));
    let (members, others) = (
        pages(machine.dirty.members()),
        pages(machine.dirty.others()),
    );
    assert_eq!((members, others), (vec![4], vec![0, 1, 2, 3, 9]));
    assert_eq!(pages(machine.dirty.part()), [0, 1, 2, 3, 4, 9]);

    // Some of it is sent, the rest given back.
    machine.dirty.remove(RAM, 1, 2);
    machine.dirty.remove(RAM, 4, u64::MAX);
    machine.dirty.remove(SlotId::new(7, 7), 0, 1);
    machine.log.put_back(&machine.dirty).unwrap();
    assert_eq!(
        sync(&mut machine),
        (vec![4], vec![0, 3, 9]),
        "a member comes in any case"
    );
    assert_eq!(sync(&mut machine), (vec![4], NONE));
    // Into one that has no slots yet.
    let mut empty = DirtyPages::new();
    assert!(empty.merge(&unsent));
    assert_eq!(pages(empty.others()), [0, 1, 2, 3, 4]);
}

/// Each chunk is protected when its turn comes: what is written before that is in it, and costs nothing.
#[test]
fn a_sync_on_demand_protects_a_chunk_at_a_time() {
    let (vm, log, vcpu) = with_bitmap(true);
    log.set_working_set(None);
    let mut dirty = DirtyPages::new();
    let write = |page| vcpu.write(RAM, page).unwrap();
    [3, 70, 200].into_iter().for_each(write);
    log.mark_dirty(RAM, 71, 1).unwrap();
    let mut found = log.sync_on_demand().unwrap();
    assert_eq!(found.page_count(), 4);
    assert_eq!(pages(found.next_chunk(64).unwrap().unwrap()), [3]);
    // One is protected by now, the other not yet.
    [3, 70].into_iter().for_each(write);
    assert_eq!(pages(found.next_chunk(1).unwrap().unwrap()), [70, 71]);
    // Called off: the rest comes with the next sync.
    drop(found);
    log.sync(&mut dirty).unwrap();
    assert_eq!(pages(dirty.part()), [3, 200]);

    // A slot whose log is stopped meanwhile has no bits to be cleared.
    write(6);
    let mut found = log.sync_on_demand().unwrap();
    log.stop_tracking(RAM, || {
        vm.set_logged(RAM, false);
        Ok(())
    })
    .unwrap();
    assert_eq!(pages(found.next_chunk(64).unwrap().unwrap()), [6]);
    drop(found);
    log.start_tracking(RAM, || {
        vm.set_logged(RAM, true);
        Ok(())
    })
    .unwrap();
    log.sync(&mut dirty).unwrap();
    assert_eq!(dirty.page_count(), 300);

    // A slot that is gone is left out, whatever has its id by then.
    write(5);
    let mut found = log.sync_on_demand().unwrap();
    let retired = log.retire_slot(RAM).unwrap();
    vm.delete_slot(RAM);
    log.finish_slot(&retired).unwrap();
    log.add_slot(RAM, 300).unwrap();
    vm.create_slot(RAM, 300);
    write(5);
    assert!(found.next_chunk(64).unwrap().is_none());
    drop(found);
    log.sync(&mut dirty).unwrap();
    assert_eq!(pages(dirty.part()), [5]);
}

#[test]
fn a_sync_on_demand_of_rings_or_without_manual_protection_has_protected_all() {
    let (_vm, log, vcpu) = with_bitmap(false);
    vcpu.write(RAM, 9).unwrap();
    let mut found = log.sync_on_demand().unwrap();
    assert_eq!(pages(found.next_chunk(64).unwrap().unwrap()), [9]);
    assert!(found.next_chunk(64).unwrap().is_none());

    let machine = machine(1);
    machine.write([4, 5, 299]);
    let mut found = machine.log.sync_on_demand().unwrap();
    assert_eq!(pages(found.members()), [4]);
    assert_eq!(
        pages(found.next_chunk(u64::MAX).unwrap().unwrap()),
        [5, 299]
    );
    assert!(found.next_chunk(64).unwrap().is_none());
}

#[test]
fn ids_that_no_slot_has_are_no_members() {
    let machine = machine(10);
    machine.vcpu.garble_next(77, 0);
    machine.write(0..1);
    machine.log.reap().unwrap();
    let stats = machine.log.stats();
    assert_eq!(
        (stats.unknown_slot_entries, stats.working_set.members),
        (1, 0)
    );
    machine.vcpu.garble_next(SlotId::new(0, 0).raw(), 1 << 40);
    machine.write(1..2);
    machine.log.reap().unwrap();
    assert_eq!(machine.log.stats().out_of_range_entries, 1);
}
