// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What calls about slots refuse, and that a refused call changes nothing.

use std::env;
use std::process::Command;

use kvm_dirty_ring::error::{LimiterError, ReaperError, SlotError, SyncError};
use kvm_dirty_ring::pacing::Fixed;
use kvm_dirty_ring::sim::{ResetFault, SimConfig, SimVcpu, SimVm};
use kvm_dirty_ring::{DirtyLog, DirtyPages, Limiter, Reaper, SlotId, VcpuRing};
use proptest::prelude::*;

const RAM: SlotId = SlotId::new(0, 5);
const MOST_PAGES: u64 = (1 << 31) - 1;

/// A machine with one slot of `pages` pages, and a vCPU whose ring is attached.
fn with_ram(pages: u64) -> (SimVm, DirtyLog, SimVcpu, VcpuRing) {
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    log.add_slot(RAM, pages).unwrap();
    vm.create_slot(RAM, pages);
    let vcpu = vm.add_vcpu();
    let ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    (vm, log, vcpu, ring)
}

#[test]
fn a_slots_size_is_checked() {
    let log = SimVm::new(SimConfig::default()).dirty_log();
    for pages in [0, MOST_PAGES + 1, 1 << 40, u64::MAX] {
        let refused = log.add_slot(RAM, pages);
        let Err(SlotError::Pages { slot, pages: found }) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!((slot, found), (RAM, pages));
    }
    log.add_slot(RAM, 1).unwrap();
}

#[test]
fn ids_are_taken_until_a_removal_is_finished() {
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    let unknown = |result| matches!(result, Err(SlotError::Unknown { slot: RAM }));
    assert!(unknown(log.retire_slot(RAM).map(drop)));
    log.add_slot(RAM, 10).unwrap();
    let exists = log.add_slot(RAM, 20);
    assert!(matches!(exists, Err(SlotError::Exists { slot: RAM })));

    let old = log.retire_slot(RAM).unwrap();
    assert_eq!(old.id(), RAM);
    let is_retired = |result| matches!(result, Err(SlotError::Retired { slot: RAM }));
    assert!(is_retired(log.add_slot(RAM, 10)));
    log.mark_dirty(RAM, 9, 1).unwrap();
    // A caller that lost the token of the removal begins it again.
    let again = log.retire_slot(RAM).unwrap();
    assert!(is_retired(log.add_slot(RAM, 10)));

    log.finish_slot(&again).unwrap();
    assert!(unknown(log.finish_slot(&old)));
    assert!(unknown(log.mark_dirty(RAM, 0, 1)));
    assert!(unknown(log.rearmed(RAM)));

    // The id's next slot is another one, and begins clean.
    log.add_slot(RAM, 20).unwrap();
    assert!(unknown(log.finish_slot(&old)));
    log.mark_dirty(RAM, 19, 1).unwrap();
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    assert_eq!(dirty.words(RAM), Some(&[1 << 19][..]));
}

/// What was found of a slot and not sent would pass for pages of the next slot with its id, which has fewer.
#[test]
fn pages_of_a_slot_that_is_gone_are_no_other_slots() {
    let (vm, log, vcpu, _ring) = with_ram(100);
    let other = SlotId::new(0, 6);
    log.add_slot(other, 10).unwrap();
    log.mark_dirty(other, 3, 1).unwrap();
    vcpu.write(RAM, 99).unwrap();
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    let retired = log.retire_slot(RAM).unwrap();
    vm.delete_slot(RAM);
    log.finish_slot(&retired).unwrap();
    log.add_slot(RAM, 10).unwrap();
    vm.create_slot(RAM, 10);
    assert!(dirty.contains(RAM, 99), "it names the slot before");
    dirty.clear_slot(RAM);
    assert_eq!(dirty.pages().collect::<Vec<_>>(), [(other, 3)]);
    assert_eq!(dirty.words(RAM), None);
    // It serves on, for the slot that has the id now.
    vcpu.write(RAM, 7).unwrap();
    log.sync(&mut dirty).unwrap();
    assert_eq!(dirty.pages().collect::<Vec<_>>(), [(RAM, 7)]);
    // Neither given back nor merged are they the new one's.
    log.put_back(&dirty).unwrap();
    let retired = log.retire_slot(RAM).unwrap();
    vm.delete_slot(RAM);
    log.finish_slot(&retired).unwrap();
    log.add_slot(RAM, 10).unwrap();
    log.put_back(&dirty).unwrap();
    let mut next = DirtyPages::new();
    log.sync(&mut next).unwrap();
    assert!(next.is_empty());
}

/// Merged either way round: what is kept from round to round may still name the slot that had the id before.
#[test]
fn of_two_slots_with_one_id_the_later_one_keeps_its_pages() {
    let (vm, log, vcpu, _ring) = with_ram(100);
    let other = SlotId::new(0, 6);
    log.add_slot(other, 10).unwrap();
    log.mark_dirty(other, 3, 1).unwrap();
    vcpu.write(RAM, 99).unwrap();
    let (mut before, mut after) = (DirtyPages::new(), DirtyPages::new());
    log.sync(&mut before).unwrap();
    let retired = log.retire_slot(RAM).unwrap();
    vm.delete_slot(RAM);
    log.finish_slot(&retired).unwrap();
    log.add_slot(RAM, 10).unwrap();
    log.mark_dirty(RAM, 7, 1).unwrap();
    log.sync(&mut after).unwrap();

    let expected = [(RAM, 7), (other, 3)];
    for [into, from] in [[&before, &after], [&after, &before]] {
        let mut merged = DirtyPages::new();
        assert!(merged.merge(into) && merged.merge(from));
        assert_eq!(merged.pages().collect::<Vec<_>>(), expected);
        assert_eq!(merged.words(RAM), Some(&[1 << 7][..]), "of 10 pages");
    }
}

/// What a broken link has not delivered, kept while slots go and ids are used again.
#[test]
fn pages_of_slots_that_are_gone_are_removed_also_where_the_id_is_used_again() {
    let (vm, log, vcpu, _ring) = with_ram(100);
    let [other, gone] = [6, 7].map(|id| SlotId::new(0, id));
    for (slot, pages) in [(other, 10), (gone, 200)] {
        log.add_slot(slot, pages).unwrap();
    }
    // One page that the id's next slots have, too, and ten that the smallest has not.
    vcpu.write(RAM, 7).unwrap();
    log.mark_dirty(RAM, 90, 10).unwrap();
    log.mark_dirty(other, 3, 1).unwrap();
    log.mark_dirty(gone, 0, 200).unwrap();
    let mut unsent = DirtyPages::new();
    log.sync(&mut unsent).unwrap();
    assert_eq!(log.clear_removed(&mut unsent), 0, "all are in the log");
    assert_eq!(unsent.page_count(), 11 + 1 + 200);

    let [retired, also_retired] = [RAM, gone].map(|slot| log.retire_slot(slot).unwrap());
    vm.delete_slot(RAM);
    assert_eq!(log.clear_removed(&mut unsent), 0, "being removed");
    log.finish_slot(&retired).unwrap();
    log.finish_slot(&also_retired).unwrap();
    for pages in [10, 100, 1000] {
        log.add_slot(RAM, pages).unwrap();
        let mut old = DirtyPages::new();
        assert!(old.merge(&unsent));
        assert_eq!(log.clear_removed(&mut old), 11 + 200);
        assert_eq!(old.pages().collect::<Vec<_>>(), [(other, 3)]);
        assert_eq!((old.words(RAM), old.words(gone)), (None, None));
        assert_eq!(log.clear_removed(&mut old), 0, "once");

        // Merged with what a later sync finds: the page of the slot that has the id now stays.
        log.mark_dirty(RAM, 5, 1).unwrap();
        let mut new = DirtyPages::new();
        log.sync(&mut new).unwrap();
        for [into, from] in [[&unsent, &new], [&new, &unsent]] {
            let mut merged = DirtyPages::new();
            assert!(merged.merge(into) && merged.merge(from));
            assert!(merged.contains(gone, 199), "a merge knows no log");
            assert_eq!(log.clear_removed(&mut merged), 200);
            assert_eq!(merged.pages().collect::<Vec<_>>(), [(RAM, 5), (other, 3)]);
            assert_eq!(merged.words(RAM).unwrap().len() as u64, pages.div_ceil(64));
        }
        log.put_back(&unsent).unwrap();
        log.sync(&mut new).unwrap();
        assert_eq!(new.pages().collect::<Vec<_>>(), [(other, 3)]);
        let retired = log.retire_slot(RAM).unwrap();
        log.finish_slot(&retired).unwrap();
    }
    // Nor does another log hold any of them, whose slots have the same ids.
    let (_vm, another, ..) = with_ram(100);
    assert_eq!(another.clear_removed(&mut unsent), 212);
    assert!(unsent.is_empty());
}

/// Four attempts to recycle entries fail: each reset, and its repetition.
fn none_recycled() -> impl Iterator<Item = ResetFault> {
    let stops = ResetFault::Short { after: 0 };
    let refused = ResetFault::Error(libc::EINTR);
    [stops, refused].into_iter().cycle().take(8)
}

/// Entries that were harvested and not recycled when a slot went would be recycled beside those of a smaller
/// one with its id; the kernel then protects none of these pages.
#[test]
fn entries_of_a_slot_are_recycled_before_its_id_is_used_again() {
    for refused in [false, true] {
        let (vm, log, vcpu, _ring) = with_ram(128);
        vcpu.write(RAM, 100).unwrap();
        if refused {
            // Not on the shard that the next pass takes, and so finds what was left there.
            vm.inject([ResetFault::Error(libc::EINTR)]);
            log.reap_on_shard(1).unwrap_err();
        } else {
            vm.inject(none_recycled().take(2));
            log.reap().unwrap();
        }
        let retired = log.retire_slot(RAM).unwrap();
        vm.delete_slot(RAM);
        // As long as none is recycled, the removal does not end.
        vm.inject(none_recycled());
        let unfinished = log.finish_slot(&retired);
        assert!(
            matches!(unfinished, Err(SlotError::Reset(_))),
            "{unfinished:?}"
        );
        assert!(matches!(
            log.add_slot(RAM, 64),
            Err(SlotError::Retired { .. })
        ));
        log.finish_slot(&retired).unwrap();
        log.add_slot(RAM, 64).unwrap();
        vm.create_slot(RAM, 64);
        let mut dirty = DirtyPages::new();
        for _ in 0..3 {
            vcpu.write(RAM, 60).unwrap();
            log.sync(&mut dirty).unwrap();
            assert!(dirty.contains(RAM, 60), "a page was lost");
        }
    }
}

proptest! {
    // Old and new pages must come close to each other: seldom enough to be missed in the usual few hundred.
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Whatever a reset has left of a slot, and whatever sizes the two have.
    #[test]
    fn what_is_written_in_the_next_slot_of_an_id_is_reported(
        sizes in (1u64..200, 1u64..200),
        left in prop::collection::vec(any::<u64>(), 1..20),
        fault in prop_oneof![
            Just(ResetFault::Error(libc::EINTR)),
            (0u32..20).prop_map(|after| ResetFault::Short { after }),
        ],
        written in prop::collection::vec(any::<u64>(), 1..20),
    ) {
        let (vm, log, vcpu, _ring) = with_ram(sizes.0);
        left.iter().for_each(|page| vcpu.write(RAM, page % sizes.0).unwrap());
        // The repetition of a short one gets no further.
        vm.inject([fault, ResetFault::Error(libc::EINTR)]);
        let _ = log.reap_on_shard(1);
        // The refusal may still be to come, now or later.
        let retired = log.retire_slot(RAM).or_else(|_| log.retire_slot(RAM));
        let retired = retired.unwrap();
        vm.delete_slot(RAM);
        let _ = log.finish_slot(&retired).or_else(|_| log.finish_slot(&retired));
        log.add_slot(RAM, sizes.1).unwrap();
        vm.create_slot(RAM, sizes.1);
        let mut dirty = DirtyPages::new();
        for _ in 0..3 {
            written.iter().for_each(|page| vcpu.write(RAM, page % sizes.1).unwrap());
            let _ = log.sync(&mut dirty).or_else(|_| log.sync(&mut dirty));
            for page in &written {
                prop_assert!(dirty.contains(RAM, page % sizes.1), "page {page} was lost");
            }
        }
    }
}

/// A removal is not held up by entries of other slots, however short the resets fall.
#[test]
fn entries_of_other_slots_hold_no_removal_up() {
    let other = SlotId::new(0, 6);
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    for slot in [RAM, other] {
        log.add_slot(slot, 100).unwrap();
        vm.create_slot(slot, 100);
    }
    let vcpu = vm.add_vcpu();
    let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    let retired = log.retire_slot(RAM).unwrap();
    vcpu.write(RAM, 1).unwrap();
    (0..5).for_each(|page| vcpu.write(other, page).unwrap());
    vm.delete_slot(RAM);
    vm.inject([ResetFault::Short { after: 1 }]);
    // More than all tries together could use up, the help for a kernel that is behind included.
    vm.inject(std::iter::repeat_n(ResetFault::Short { after: 0 }, 100_000));
    log.finish_slot(&retired).unwrap();
    log.add_slot(RAM, 10).unwrap();
}

/// What was harvested of a slot that KVM has and the log does not is reported as soon as it does. It may have
/// been of a slot of another size, and the kernel may protect none of its pages: until it is re-armed.
#[test]
fn a_slot_that_is_added_late_is_suspect() {
    let late = SlotId::new(0, 6);
    let (vm, log, vcpu, _ring) = with_ram(10);
    vm.create_slot(late, 20);
    vcpu.write(late, 5).unwrap();
    log.reap().unwrap();
    log.add_slot(late, 20).unwrap();
    let mut dirty = DirtyPages::new();
    for _ in 0..3 {
        log.sync(&mut dirty).unwrap();
        assert_eq!(dirty.words(late), Some(&[(1 << 20) - 1][..]));
    }
    log.rearm(|slot| {
        vm.rearm_slot(slot);
        Ok(())
    })
    .unwrap();
    log.sync(&mut dirty).unwrap();
    log.sync(&mut dirty).unwrap();
    assert!(dirty.is_empty(), "it was re-armed");
}

/// Nor does what is left in a ring of an unknown slot come back beside the pages of the next of that id, when
/// suspicion has ended.
#[test]
fn entries_of_an_unknown_slot_are_recycled_before_its_id_is_added() {
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    let vcpu = vm.add_vcpu();
    let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    vm.create_slot(RAM, 128);
    vcpu.write(RAM, 100).unwrap();
    vm.inject([ResetFault::Error(libc::EINTR)]);
    log.reap_on_shard(1).unwrap_err();
    vm.delete_slot(RAM);
    // As long as none is recycled, the id is not to be had.
    vm.inject(none_recycled());
    let refused = log.add_slot(RAM, 64);
    assert!(matches!(refused, Err(SlotError::Reset(_))), "{refused:?}");
    let unknown = log.mark_dirty(RAM, 0, 1);
    assert!(matches!(unknown, Err(SlotError::Unknown { .. })));

    log.add_slot(RAM, 64).unwrap();
    vm.create_slot(RAM, 64);
    vm.rearm_slot(RAM);
    log.rearmed(RAM).unwrap();
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    for _ in 0..3 {
        vcpu.write(RAM, 60).unwrap();
        log.sync(&mut dirty).unwrap();
        assert_eq!(dirty.words(RAM), Some(&[1 << 60][..]), "a page was lost");
    }
}

#[test]
fn a_removal_can_be_called_off() {
    let (vm, log, vcpu, _ring) = with_ram(10);
    let retired = log.retire_slot(RAM).unwrap();
    vcpu.write(RAM, 3).unwrap();
    vm.inject([ResetFault::Short { after: 0 }; 2]);
    log.reap().unwrap();
    let rearm = || {
        log.rearm(|slot| {
            vm.rearm_slot(slot);
            Ok(())
        })
    };
    assert_eq!(rearm().unwrap(), 0, "it is about to go");
    let refused = log.stop_tracking(RAM, || Ok(()));
    assert!(matches!(refused, Err(SlotError::Retired { slot: RAM })));

    log.keep_slot(&retired).unwrap();
    let kept = log.finish_slot(&retired);
    assert!(matches!(kept, Err(SlotError::Kept { slot: RAM })));
    assert_eq!(rearm().unwrap(), 1);
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    assert!(dirty.contains(RAM, 3));
    log.stop_tracking(RAM, || Ok(())).unwrap();
    log.start_tracking(RAM, || Ok(())).unwrap();
    let exists = log.add_slot(RAM, 10);
    assert!(matches!(exists, Err(SlotError::Exists { slot: RAM })));

    // A cancelled removal neither ends another removal nor cancels it. Beginning one twice gives it twice.
    let called_off = retired;
    let again = log.retire_slot(RAM).unwrap();
    let retired = log.retire_slot(RAM).unwrap();
    let kept = [log.finish_slot(&called_off), log.keep_slot(&called_off)];
    for kept in kept {
        assert!(matches!(kept, Err(SlotError::Kept { slot: RAM })));
    }
    log.keep_slot(&again).unwrap();
    let kept = log.finish_slot(&retired);
    assert!(matches!(kept, Err(SlotError::Kept { slot: RAM })));

    let retired = log.retire_slot(RAM).unwrap();
    vm.delete_slot(RAM);
    log.finish_slot(&retired).unwrap();
    let unknown = |result| matches!(result, Err(SlotError::Unknown { slot: RAM }));
    assert!(unknown(log.keep_slot(&retired)));
    // Nor is it the next one of that id that is kept.
    log.add_slot(RAM, 20).unwrap();
    assert!(unknown(log.keep_slot(&retired)));
}

#[test]
fn the_same_id_in_another_address_space_is_another_slot() {
    let log = SimVm::new(SimConfig::default()).dirty_log();
    let smm = SlotId::new(1, RAM.id());
    log.add_slot(smm, 100).unwrap();
    log.add_slot(RAM, 100).unwrap();
    log.mark_dirty(smm, 3, 1).unwrap();
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    assert!(dirty.contains(smm, 3));
    assert!(!dirty.contains(RAM, 3));
    assert_eq!(dirty.page_count(), 1);
}

#[test]
fn marks_outside_their_slot_mark_nothing() {
    let log = SimVm::new(SimConfig::default()).dirty_log();
    log.add_slot(RAM, 100).unwrap();
    let outside = [
        (100, 1),
        (99, 2),
        (0, 101),
        (101, 0),
        (1, u64::MAX),
        (u64::MAX, 1),
    ];
    for (first_page, pages) in outside {
        let refused = log.mark_dirty(RAM, first_page, pages);
        let Err(SlotError::OutOfRange {
            slot,
            first_page: first,
            pages: count,
            slot_pages,
        }) = refused
        else {
            panic!("{first_page} + {pages}: {refused:?}");
        };
        assert_eq!(
            (slot, first, count, slot_pages),
            (RAM, first_page, pages, 100)
        );
    }
    log.mark_dirty(RAM, 100, 0).unwrap();
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    assert!(dirty.is_empty());

    log.mark_dirty(RAM, 0, 100).unwrap();
    log.sync(&mut dirty).unwrap();
    assert_eq!(dirty.page_count(), 100);
}

/// Set for the process in which memory is short.
const SHORT_OF_MEMORY: &str = "KVM_DIRTY_RING_TEST_SHORT_OF_MEMORY";

/// The limit is one on the whole process, so the test runs in one of its own.
#[test]
fn without_memory_calls_fail_and_lose_nothing() {
    if env::var_os(SHORT_OF_MEMORY).is_some() {
        return short_of_memory();
    }
    let test = "without_memory_calls_fail_and_lose_nothing";
    let child = Command::new(env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(SHORT_OF_MEMORY, "1")
        .output()
        .unwrap();
    assert!(child.status.success(), "{child:?}");
}

fn short_of_memory() {
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    // Each bitmap has 128 MiB: more than the 64 MiB that the allocator reserves for a thread.
    let pages = 1 << 30;
    log.add_slot(RAM, pages).unwrap();
    log.mark_dirty(RAM, pages - 1, 1).unwrap();

    let limit = limit_memory(16 << 20);
    let other = SlotId::new(0, 6);
    let refused = log.add_slot(other, pages);
    let Err(SlotError::NoMemory { slot, pages: asked }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!((slot, asked), (other, pages));
    let mut dirty = DirtyPages::new();
    assert!(matches!(log.sync(&mut dirty), Err(SyncError::NoMemory)));
    assert!(matches!(log.rearmed(RAM), Err(SlotError::NoMemory { .. })));

    set_limit(limit);
    log.sync(&mut dirty).unwrap();
    assert!(dirty.contains(RAM, pages - 1));
    log.add_slot(other, 10).unwrap();

    // Less than a thread's stack.
    let limit = limit_memory(1 << 20);
    let refused = Reaper::spawn(&log, Fixed::default());
    assert!(matches!(refused, Err(ReaperError::Spawn(_))), "{refused:?}");
    let refused = Limiter::spawn(&log, |_| ());
    assert!(
        matches!(refused, Err(LimiterError::Spawn(_))),
        "{refused:?}"
    );
    set_limit(limit);
    Limiter::spawn(&log, |_| ()).unwrap().stop().unwrap();
    let reaper = Reaper::spawn(&log, Fixed::default()).unwrap();
    reaper.stop().unwrap();
}

/// Allows the process `more` bytes than it has now. The limit before.
fn limit_memory(more: u64) -> libc::rlimit {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
    let mut before = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the struct is valid for the call.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut before) }, 0);
    // SAFETY: sysconf reads a number.
    let page_size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
    set_limit(libc::rlimit {
        rlim_cur: pages * page_size + more,
        ..before
    });
    before
}

fn set_limit(limit: libc::rlimit) {
    // SAFETY: the struct is valid for the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
}

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    // SAFETY: sysconf reads a number; this one always exists.
    pages * unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64
}

/// A guest of 1 TiB has 32 MiB of bits in each of some seven bitmaps. In memory are those of them
/// where pages are dirty. (Other tests of this file may run beside, and hardly take any.)
#[test]
fn what_is_clean_takes_no_memory() {
    const MIB: u64 = 1 << 20;
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    let before = resident();
    log.add_slot(RAM, 1 << 28).unwrap();
    let mut dirty = DirtyPages::new();
    for round in 0..100 {
        log.mark_dirty(RAM, round * 2_600_000, 3).unwrap();
        log.sync(&mut dirty).unwrap();
        assert_eq!(dirty.page_count(), 3);
    }
    let taken = resident().saturating_sub(before);
    assert!(taken < 16 * MIB, "{} MiB", taken / MIB);
}
