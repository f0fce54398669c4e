//! Kernels that keep their reserve: no ring of theirs is overrun.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_dirty_ring::sim::{ResetFault, SimConfig, SimVcpu, SimVm};
use kvm_dirty_ring::{DirtyPages, SlotId, VcpuRing};
use proptest::prelude::*;

const RAM: SlotId = SlotId::new(0, 0);
const PAGES: u64 = 10_000;

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
