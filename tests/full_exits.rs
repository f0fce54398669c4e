// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Full exits that make room, and those that do not.

#[allow(dead_code, reason = "what other scenarios need, too")]
#[path = "common/scenario.rs"]
mod scenario;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::sim::{ResetFault, SimConfig, SimVcpu, SimVm, WriteError};
use kvm_dirty_ring::{DirtyLog, VcpuRing};
use scenario::{Machine, RAM};

const PAGES: u64 = 300;

/// A VM of rings of 64 entries, 16 of them in reserve.
fn vm() -> (SimVm, DirtyLog) {
    let mut config = SimConfig::default();
    config.ring_entries = 64;
    config.reserved = 16;
    let vm = SimVm::new(config);
    let log = vm.dirty_log();
    log.add_slot(RAM, PAGES).unwrap();
    vm.create_slot(RAM, PAGES);
    (vm, log)
}

fn fill(vcpu: &SimVcpu) {
    let full = (0..PAGES).find_map(|page| vcpu.write(RAM, page).err());
    assert_eq!(full, Some(WriteError::RingFull));
}

/// Calls `on_full` as a vCPU's thread does that can't get back into the guest: it ends at the third call.
fn assert_ends(ring: &mut VcpuRing, log: &DirtyLog) {
    let before = log.stats().vcpus[ring.index()].soft_limit;
    let results: Vec<_> = (0..5).map(|_| ring.on_full()).collect();
    let vcpu = ring.index();
    for (call, result) in (1..).zip(results) {
        match result {
            Ok(()) => assert!(call < 3, "call {call} of many"),
            Err(FullError::NoRoom { vcpu: named, calls }) => {
                assert_eq!((named, calls), (vcpu, call));
                assert!(call >= 3);
            }
            Err(error) => panic!("{error}"),
        }
    }
    let after = log.stats().vcpus[ring.index()].soft_limit;
    assert_eq!(after, before, "a false soft limit was learnt");
}

/// The vCPU stops on a ring that the log does not have.
#[test]
fn the_ring_of_another_vm_ends_in_an_error() {
    for others_writes in 0..48 {
        let ((p, log), (q, _)) = (vm(), vm());
        let (own, other) = (p.add_vcpu(), q.add_vcpu());
        (0..others_writes).for_each(|page| other.write(RAM, page).unwrap());
        let mut ring = log.attach_ring(other.ring_memory()).unwrap();
        fill(&own);
        assert_ends(&mut ring, &log);
    }
}

#[test]
fn the_ring_of_another_vcpu_ends_in_an_error() {
    for others_writes in 0..48 {
        let (vm, log) = vm();
        let (own, other) = (vm.add_vcpu(), vm.add_vcpu());
        let mut ring = log.attach_ring(other.ring_memory()).unwrap();
        fill(&own);
        (0..others_writes).for_each(|page| other.write(RAM, 200 + page).unwrap());
        let before = log.stats().vcpus[0].soft_limit;
        // The first empties a ring, though not the one that is full.
        let first = u32::from(others_writes >= 3);
        (0..first).for_each(|_| ring.on_full().unwrap());
        assert!(
            (0..3).any(|_| ring.on_full().is_err()),
            "no end after {others_writes}"
        );
        assert_eq!(
            log.stats().vcpus[0].soft_limit,
            before,
            "a false soft limit was learnt"
        );
    }
}

/// The other vCPU writes on: a little each time, where a full ring would hold its soft limit.
#[test]
fn the_ring_of_a_vcpu_that_writes_on_ends_in_an_error() {
    let (vm, log) = vm();
    let (own, other) = (vm.add_vcpu(), vm.add_vcpu());
    let mut ring = log.attach_ring(other.ring_memory()).unwrap();
    fill(&own);
    let results: Vec<_> = (0..3)
        .map(|page| {
            other.write(RAM, 200 + page).unwrap();
            ring.on_full()
        })
        .collect();
    assert!(
        matches!(results[..], [Ok(()), Ok(()), Err(FullError::NoRoom { .. })]),
        "{results:?}"
    );
}

#[test]
fn resets_that_recycle_nothing_end_in_an_error_until_one_does() {
    let mut machine = Machine::new();
    machine.write(0..60);
    let nothing = ResetFault::Short { after: 0 };
    // A short reset is tried again at once.
    machine.vm.inject([nothing; 8]);
    for call in 1..=4 {
        let result = machine.ring.on_full();
        assert_eq!(result.is_err(), call >= 3, "call {call}: {result:?}");
    }
    assert_eq!(
        machine.log.stats().vcpus[0].soft_limit,
        60,
        "what the first exit has shown holds"
    );
    assert_eq!(machine.vcpu.used(), 60);
    machine.ring.on_full().unwrap();
    assert_eq!(machine.vcpu.used(), 0);
    machine.vm.inject([nothing; 4]);
    machine.write(100..160);
    (0..2).for_each(|_| machine.ring.on_full().unwrap());
    machine.ring.on_full().unwrap();
}

/// Resets that fall short may recycle others' entries and not come to this ring: no sign of a wrong one, but not
/// without end.
#[test]
fn resets_that_get_on_elsewhere_are_waited_for() {
    let (vm, log) = vm();
    // Rings are recycled in this order.
    let (other, own) = (vm.add_vcpu(), vm.add_vcpu());
    let mut others = log.attach_ring(other.ring_memory()).unwrap();
    let mut ring = log.attach_ring(own.ring_memory()).unwrap();
    fill(&own);
    for call in 1..=18 {
        other.write(RAM, 100 + call).unwrap();
        others.harvest_and_stop();
        // That entry, and none of ours.
        let faults = [1, 0].map(|after| ResetFault::Short { after });
        vm.inject(faults);
        let result = ring.on_full();
        assert_eq!(result.is_err(), call >= 16, "call {call}: {result:?}");
    }
    ring.on_full().unwrap();
    assert_eq!(own.used(), 0);
}

/// Each full exit of the other vCPU's ring shows another limit.
#[test]
fn what_several_exits_of_a_wrong_ring_show_is_forgotten() {
    for fails in [false, true] {
        let (vm, log) = vm();
        let (own, other) = (vm.add_vcpu(), vm.add_vcpu());
        let mut ring = log.attach_ring(other.ring_memory()).unwrap();
        fill(&own);
        for (pages, at) in [(20, 100), (10, 200)] {
            (0..pages).for_each(|page| other.write(RAM, at + page).unwrap());
            if fails {
                vm.inject([ResetFault::Error(libc::EINTR)]);
            }
            assert_eq!(ring.on_full().is_err(), fails);
        }
        assert!((0..4).any(|_| ring.on_full().is_err()), "no end");
        assert_eq!(
            log.stats().vcpus[0].soft_limit,
            48,
            "a false soft limit was learnt"
        );
    }
}

/// A kernel may keep nearly all of the ring in reserve.
#[test]
fn a_small_soft_limit_is_no_wrong_ring() {
    for (entries, reserved) in [(4096, 3900), (1024, 961), (64, 61), (32, 31), (2, 1)] {
        let mut config = SimConfig::default();
        (config.ring_entries, config.reserved) = (entries, reserved);
        let vm = SimVm::new(config);
        let log = vm.dirty_log();
        log.add_slot(RAM, PAGES).unwrap();
        vm.create_slot(RAM, PAGES);
        let vcpu = vm.add_vcpu();
        let mut ring = log.attach_ring(vcpu.ring_memory()).unwrap();
        for _ in 0..5 {
            vm.rearm_slot(RAM);
            fill(&vcpu);
            ring.on_full().unwrap();
        }
        assert_eq!(
            log.stats().vcpus[0].soft_limit,
            u64::from(entries - reserved)
        );
    }
}

/// Other passes have harvested since its exit, so what is left in the ring shows no soft limit.
#[test]
fn a_vcpu_that_is_attached_again_after_its_exit_shows_no_limit() {
    let (vm, log) = vm();
    let (vcpu, spare) = (vm.add_vcpu(), vm.add_vcpu());
    let mut ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    let _others = log.attach_ring(spare.ring_memory()).unwrap();
    (0..40).for_each(|page| vcpu.write(RAM, page).unwrap());
    ring.harvest_and_stop();
    (40..48).for_each(|page| vcpu.write(RAM, page).unwrap());
    assert_eq!(vcpu.write(RAM, 48), Err(WriteError::RingFull));
    spare.write(RAM, 100).unwrap();
    drop(ring);
    log.reap_rings(&[false, true]).unwrap();
    let mut ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    ring.on_full().unwrap();
    assert_eq!(log.stats().vcpus[0].soft_limit, 48);
}

/// Another thread may have emptied the ring, and so made room, before the vCPU's thread comes to it.
#[test]
fn a_vcpu_whose_ring_another_pass_has_emptied_gets_no_error() {
    let mut machine = Machine::new();
    for round in 0..20 {
        machine.vm.rearm_slot(RAM);
        machine.write(0..60);
        match round % 4 {
            0 => drop(machine.log.reap().unwrap()),
            1 => drop(machine.sync()),
            // Harvested, and not reset: that is left to the full exit.
            2 => drop(machine.ring.harvest_and_stop()),
            _ => {
                machine.vm.inject([ResetFault::Error(libc::EINTR)]);
                machine.log.reap().unwrap_err();
            }
        }
        machine.ring.on_full().unwrap();
        assert_eq!(machine.vcpu.used(), 0, "round {round}");
    }
}

/// The same with threads: full exits beside passes and resets of others, at any moment of each.
#[test]
fn a_vcpu_that_waits_for_another_threads_reset_gets_no_error() {
    let (vm, log) = vm();
    let vcpu = vm.add_vcpu();
    let mut ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    log.reap().unwrap();
                }
            });
        }
        for page in 0..100_000 {
            let page = page % PAGES;
            while vcpu.write(RAM, page).is_err() {
                ring.on_full().unwrap();
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    // However many there were, none waited for ever; and one more is always to be had.
    vm.rearm_slot(RAM);
    fill(&vcpu);
    ring.on_full().unwrap();
    assert!(log.stats().full_exits() > 0);
}
