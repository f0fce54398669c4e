// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kernels that keep their reserve: no ring of theirs is overrun.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvm_dirty_ring::pacing::{Adaptive, Pacer};
use kvm_dirty_ring::sim::{ResetFault, SimConfig, SimVcpu, SimVm};
use kvm_dirty_ring::{DirtyLog, DirtyPages, SlotId, VcpuRing};
use proptest::prelude::*;

const RAM: SlotId = SlotId::new(0, 0);
const PAGES: u64 = 10_000;

/// A machine whose kernel keeps more in reserve than anybody knows.
fn with_more_in_reserve() -> (SimVm, DirtyLog, SimVcpu, VcpuRing) {
    let mut config = SimConfig::default();
    (config.ring_entries, config.reserved) = (4096, 1088);
    config.reported_reserve = Some(64);
    let vm = SimVm::new(config);
    let log = vm.dirty_log();
    log.add_slot(RAM, PAGES).unwrap();
    vm.create_slot(RAM, PAGES);
    let vcpu = vm.add_vcpu();
    let ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    (vm, log, vcpu, ring)
}

/// A full exit shows it, whatever passes there were since the one before.
#[test]
fn a_reserve_that_nobody_knows_is_learnt() {
    for passes in 0..4 {
        let (_vm, log, vcpu, mut ring) = with_more_in_reserve();
        let mut next = 0..PAGES;
        let mut write = || vcpu.write(RAM, next.next().unwrap());
        for _ in 0..passes {
            (0..50).for_each(|_| write().unwrap());
            log.reap().unwrap();
        }
        log.observe(&mut Vec::new());
        assert_eq!(log.stats().vcpus[0].soft_limit, 4032);
        while write().is_ok() {}
        ring.on_full().unwrap();
        assert_eq!(
            log.stats().vcpus[0].soft_limit,
            3008,
            "after {passes} passes"
        );
    }
}

/// What was looked at after the vCPU had left the guest shows nothing: another pass has emptied most of its ring.
#[test]
fn a_look_after_the_exit_shows_no_limit() {
    let (vm, log, vcpu, mut ring) = with_more_in_reserve();
    let spare = vm.add_vcpu();
    let _spare_ring = log.attach_ring(spare.ring_memory()).unwrap();
    (0..2000).for_each(|page| vcpu.write(RAM, page).unwrap());
    ring.harvest_and_stop();
    (2000..3008).for_each(|page| vcpu.write(RAM, page).unwrap());
    assert!(vcpu.write(RAM, 3008).is_err());
    // Recycles the former, and leaves the latter.
    spare.write(RAM, 5000).unwrap();
    log.reap_rings(&[false, true]).unwrap();
    log.observe(&mut Vec::new());
    ring.on_full().unwrap();
    assert_eq!(log.stats().vcpus[0].soft_limit, 4032);
}

/// A reaper that took the ring for larger than it is comes in time from then on.
#[test]
fn a_reaper_comes_in_time_once_it_has_learnt_the_limit() {
    let (vm, log, vcpu, mut ring) = with_more_in_reserve();
    let mut pacer = Pacer::new(Adaptive::default());
    let (mut rings, mut woken) = (Vec::new(), false);
    let (mut now, mut next) = (Duration::ZERO, 0u64);
    let mut late_exits = 0;
    for step in 0..20_000 {
        // A steady writer: 2 pages in 10 us.
        now += Duration::from_micros(10);
        for _ in 0..2 {
            next += 1;
            if next % PAGES == 0 {
                vm.rearm_slot(RAM);
            }
            while vcpu.write(RAM, next % PAGES).is_err() {
                ring.on_full().unwrap();
                woken = true;
                late_exits += u64::from(step > 10_000);
            }
        }
        if woken || now >= pacer.due() {
            log.observe(&mut rings);
            pacer
                .look(now, std::mem::take(&mut woken), &mut rings)
                .unwrap();
            if !pacer.reap().is_empty() {
                let entries = log.reap_rings(pacer.reap()).unwrap();
                pacer.passed(now, entries);
            }
        }
    }
    assert_eq!(log.stats().vcpus[0].soft_limit, 3008);
    assert_eq!(late_exits, 0, "the vCPU stops on");
}

/// What happens to a guest whose kernel keeps its reserve.
#[derive(Debug, Clone)]
enum Step {
    /// A vCPU writes so many pages, or until its ring is full.
    Write(usize, u64),
    /// It is attached, or unplugged.
    Plug(usize),
    Sync,
    ReapRings([bool; 3]),
    OnFull(usize),
    HarvestAndStop(usize),
    Inject(ResetFault),
}

fn step() -> impl Strategy<Value = Step> {
    let fault = prop_oneof![
        (0u32..3000).prop_map(|after| ResetFault::Short { after }),
        Just(ResetFault::Error(libc::EINTR)),
    ];
    prop_oneof![
        3 => (0usize..3, 0u64..5000).prop_map(|(vcpu, pages)| Step::Write(vcpu, pages)),
        1 => (0usize..3).prop_map(Step::Plug),
        1 => Just(Step::Sync),
        1 => any::<[bool; 3]>().prop_map(Step::ReapRings),
        1 => (0usize..3).prop_map(Step::OnFull),
        2 => (0usize..3).prop_map(Step::HarvestAndStop),
        1 => fault.prop_map(Step::Inject),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// It is never taken for one that overruns its rings, whatever becomes of resets, and however much the
    /// guest writes inside them.
    #[test]
    fn a_kernel_that_keeps_its_reserve_overruns_nothing(
        (ring_entries, reserved, pml) in prop::sample::select(vec![
            (64, 1, 0), (128, 64, 0), (1024, 64, 0), (1024, 576, 512), (2048, 64, 0), (4096, 8, 0), (4096, 64, 0),
        ]),
        first_index in prop::sample::select(vec![0, 5, u32::MAX - 700, u32::MAX - 5000]),
        inside in prop::collection::vec(0u64..6000, 7),
        steps in prop::collection::vec(step(), 1..150),
    ) {
        let mut config = SimConfig::default();
        config.ring_entries = ring_entries;
        config.reserved = reserved;
        config.pml = pml;
        config.first_index = first_index;
        let vm = SimVm::new(config);
        let log = vm.dirty_log();
        log.add_slot(RAM, PAGES).unwrap();
        vm.create_slot(RAM, PAGES);
        let vcpus = [(); 3].map(|()| vm.add_vcpu());
        // Pages that are protected most of the time.
        let next = Arc::new(AtomicU64::new(0));
        let write = move |vcpu: &SimVcpu, pages: u64| {
            let mut pages = (0..pages).map(|_| next.fetch_add(1, Ordering::Relaxed) % PAGES);
            let _ = pages.try_for_each(|page| vcpu.write(RAM, page));
        };
        vm.on_reset({
            let (vcpus, write) = (vcpus.clone(), write.clone());
            let mut inside = inside.into_iter().cycle();
            move |_| vcpus.iter().for_each(|vcpu| write(vcpu, inside.next().unwrap()))
        });
        let mut rings = [const { None }; 3];
        for step in steps {
            match step {
                Step::Write(vcpu, pages) => write(&vcpus[vcpu], pages),
                Step::Plug(vcpu) => {
                    rings[vcpu] = match rings[vcpu].take() {
                        Some(_) => None,
                        None => Some(log.attach_ring(vcpus[vcpu].ring_memory()).unwrap()),
                    };
                }
                Step::Sync => drop(log.sync(&mut DirtyPages::new())),
                Step::ReapRings(wanted) => drop(log.reap_rings(&wanted)),
                Step::OnFull(vcpu) => drop(rings[vcpu].as_mut().map(VcpuRing::on_full)),
                Step::HarvestAndStop(vcpu) => {
                    let _ = rings[vcpu].as_mut().map(VcpuRing::harvest_and_stop);
                }
                Step::Inject(fault) => vm.inject([fault]),
            }
        }
        // The hook keeps the machine alive.
        vm.on_reset(|_| ());
        prop_assert_eq!(log.stats().overruns, 0);
    }
}
