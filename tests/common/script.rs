// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Random scripts: what the guest, its devices, the VMM and a faulty kernel do, in which order.

use kvm_dirty_ring::Mode;
use kvm_dirty_ring::sim::{BitmapFault, ResetFault, ResetPhase};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::common::ops::{Moment, Op, Setup, Write};

pub fn setup(pml: bool) -> impl Strategy<Value = Setup> {
    let ring = (3u32..=6).prop_flat_map(|bits| (Just(1 << bits), 2..=(1u32 << bits) / 2));
    let first_index = prop_oneof![Just(0), (0u32..100).prop_map(|n| u32::MAX - n)];
    // The reserve is there to hold what the buffer holds: a larger buffer would overrun the ring.
    let buffer = any::<prop::sample::Index>();
    (ring, first_index, 1usize..=3, buffer, any::<bool>()).prop_map(
        move |((ring_entries, reserved), first_index, vcpus, buffer, protects_spans)| Setup {
            ring_entries,
            reserved,
            pml: if pml {
                buffer.index(reserved as usize + 1)
            } else {
                0
            },
            first_index,
            vcpus,
            mode: Mode::Rings,
            with_bitmap: false,
            protects_spans,
            ignores_voids: false,
            places: None,
        },
    )
}

/// Any of the two with a working set, for a kernel that looks at void entries or not.
pub fn setup_with_working_set(pml: bool) -> impl Strategy<Value = Setup> {
    let setups = prop_oneof![2 => setup(pml).boxed(), 1 => setup_with_bitmap(pml).boxed()];
    let ignores_voids = prop_oneof![7 => Just(false), 1 => Just(true)];
    (setups, ignores_voids, 0u64..60).prop_map(|(setup, ignores_voids, places)| Setup {
        ignores_voids,
        places: Some(places),
        ..setup
    })
}

/// The same without rings, or with bitmaps beside them.
pub fn setup_with_bitmap(pml: bool) -> impl Strategy<Value = Setup> {
    let modes = prop_oneof![Just((Mode::Bitmap, false)), Just((Mode::Rings, true))];
    (setup(pml), modes).prop_map(|(setup, (mode, with_bitmap))| Setup {
        mode,
        with_bitmap,
        ..setup
    })
}

/// Sizes about the borders of words, and one beyond the 32,768 pages of a touched-flag.
fn slot_size() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 1u64..=40,
        8 => 60u64..=70,
        4 => 120u64..=200,
        1 => 32_760u64..=32_900,
    ]
}

fn guest_write() -> impl Strategy<Value = Write> {
    (0usize..4, 0usize..3, any::<u16>(), 1u64..=12).prop_map(|(vcpu, slot, at, pages)| Write {
        vcpu: Some(vcpu),
        slot,
        at,
        pages,
    })
}

fn any_write() -> impl Strategy<Value = Write> {
    (guest_write(), any::<bool>()).prop_map(|(write, device)| Write {
        vcpu: if device { None } else { write.vcpu },
        ..write
    })
}

fn calm_op() -> BoxedStrategy<Op> {
    let slot_step = (0usize..3, slot_size());
    prop_oneof![
        12 => guest_write().prop_map(Op::Write),
        3 => any_write().prop_map(|w| Op::Write(Write { vcpu: None, ..w })),
        2 => Just(Op::Reap),
        2 => any::<u8>().prop_map(Op::ReapRings),
        1 => (1usize..4).prop_map(Op::ReapOnShard),
        1 => (0usize..4).prop_map(Op::OnFull),
        4 => Just(Op::Sync),
        3 => slot_step.prop_map(|(slot, pages)| Op::SlotStep { slot, pages }),
        1 => Just(Op::AddVcpu),
    ]
    .boxed()
}

fn harvest_and_stop() -> impl Strategy<Value = Op> {
    (0usize..4).prop_map(Op::HarvestAndStop)
}

fn busy_op() -> BoxedStrategy<Op> {
    let phase = prop_oneof![Just(ResetPhase::Begin), Just(ResetPhase::Recycled)];
    let in_reset = (phase, vec(any_write(), 1..4));
    prop_oneof![
        6 => calm_op(),
        2 => in_reset.prop_map(|(phase, writes)| Op::InReset(phase, writes)),
        1 => (0usize..4).prop_map(Op::Exit),
        1 => Just(Op::Checkpoint),
        1 => harvest_and_stop(),
    ]
    .boxed()
}

fn kernel_write() -> impl Strategy<Value = Op> {
    guest_write().prop_map(Op::KernelWrite)
}

fn bitmap_fault() -> impl Strategy<Value = BitmapFault> {
    const ERRORS: &[i32] = &[libc::EINTR, libc::ENOMEM, libc::EBADF];
    let errors = prop::sample::select(ERRORS);
    (0u64..=20, errors).prop_map(|(after, error)| BitmapFault { after, error })
}

fn fault() -> impl Strategy<Value = ResetFault> {
    const ERRORS: &[i32] = &[libc::EINTR, libc::ENOMEM, libc::EBADF];
    prop_oneof![
        3 => (0u32..=70).prop_map(|after| ResetFault::Short { after }),
        // Mostly where the rings are not empty yet.
        3 => (0u32..=5).prop_map(|after| ResetFault::Short { after }),
        2 => Just(ResetFault::AtEnd),
        2 => prop::sample::select(ERRORS).prop_map(ResetFault::Error),
    ]
}

fn garble_op() -> impl Strategy<Value = Op> {
    (0usize..4, any::<bool>()).prop_map(|(vcpu, unknown_slot)| Op::Garble { vcpu, unknown_slot })
}

fn overrun_op() -> impl Strategy<Value = Op> {
    (guest_write(), 1u64..=150).prop_map(|(write, pages)| Op::Overrun(Write { pages, ..write }))
}

fn faulty_op() -> BoxedStrategy<Op> {
    prop_oneof![
        16 => busy_op(),
        3 => vec(fault(), 1..4).prop_map(Op::Inject),
        1 => garble_op(),
        1 => overrun_op(),
        1 => Just(Op::Rearm),
    ]
    .boxed()
}

/// No faults; writes only between resets.
pub fn calm_script() -> impl Strategy<Value = Vec<Op>> {
    vec(
        prop_oneof![30 => calm_op(), 1 => harvest_and_stop()],
        1..120,
    )
}

/// No faults; writes inside resets as well.
pub fn busy_script() -> impl Strategy<Value = Vec<Op>> {
    vec(busy_op(), 1..120)
}

/// Everything at once.
pub fn faulty_script() -> impl Strategy<Value = Vec<Op>> {
    vec(faulty_op(), 1..120)
}

fn bad_reset_op() -> BoxedStrategy<Op> {
    prop_oneof![
        5 => busy_op(),
        1 => vec(fault(), 1..4).prop_map(Op::Inject),
    ]
    .boxed()
}

/// Failing and short resets, but each ring and entry as it should be.
pub fn bad_resets_script() -> impl Strategy<Value = Vec<Op>> {
    vec(bad_reset_op(), 1..120)
}

/// Faults that leave nothing behind once the slots are protected anew: all but overruns.
pub fn repairable_script() -> impl Strategy<Value = Vec<Op>> {
    let resets_and_garbage = prop_oneof![10 => bad_reset_op(), 1 => garble_op()];
    vec(resets_and_garbage, 1..120)
}

/// No faults; the kernel writes, too.
pub fn calm_bitmap_script() -> impl Strategy<Value = Vec<Op>> {
    vec(prop_oneof![6 => calm_op(), 1 => kernel_write()], 1..120)
}

/// Readings of bitmaps that fail half-way, writes inside them.
pub fn bad_bitmaps_script() -> impl Strategy<Value = Vec<Op>> {
    let faults = vec(bitmap_fault(), 1..4).prop_map(Op::InjectBitmap);
    vec(
        prop_oneof![8 => busy_op(), 2 => kernel_write(), 1 => faults, 1 => on_demand()],
        1..120,
    )
}

fn switch_op() -> impl Strategy<Value = Op> {
    let fails = prop_oneof![
        6 => Just(None),
        1 => Just(Some(Moment::Before)),
        1 => Just(Some(Moment::After)),
    ];
    (0usize..3, any::<bool>(), fails).prop_map(|(slot, on, fails)| Op::Switch { slot, on, fails })
}

/// Slots whose log is switched on and off, all else in order; the kernel writes, too.
pub fn switching_script() -> impl Strategy<Value = Vec<Op>> {
    vec(
        prop_oneof![10 => busy_op(), 2 => kernel_write(), 4 => switch_op()],
        1..120,
    )
}

/// The same, and resets that go wrong; without the kernel's writes, which rings do not show.
pub fn switching_badly_script() -> impl Strategy<Value = Vec<Op>> {
    vec(prop_oneof![10 => bad_reset_op(), 4 => switch_op()], 1..120)
}

fn working_set_op() -> BoxedStrategy<Op> {
    let terms = prop::option::weighted(0.8, (0u64..80, prop_oneof![Just(u64::MAX), 0u64..80]));
    let fails = prop_oneof![
        6 => Just(None),
        1 => Just(Some(Moment::Before)),
        1 => Just(Some(Moment::After)),
    ];
    prop_oneof![
        1 => terms.prop_map(Op::WorkingSet),
        2 => fails.prop_map(|fails| Op::Refresh { fails }),
        1 => guest_write().prop_map(Op::Protect),
        1 => Just(Op::LastSync),
        2 => on_demand(),
    ]
    .boxed()
}

fn on_demand() -> impl Strategy<Value = Op> {
    let chunks = prop_oneof![1 => 0usize..4, 2 => Just(usize::MAX)];
    (chunks, 1u64..150).prop_map(|(chunks, span)| Op::OnDemand { chunks, span })
}

/// Pages stay open; no faults, writes only between resets.
pub fn calm_working_set_script() -> impl Strategy<Value = Vec<Op>> {
    let calm = prop_oneof![
        9 => calm_op(),
        1 => Just(Op::Refresh { fails: None }),
        1 => Just(Op::LastSync),
        1 => guest_write().prop_map(Op::Protect),
    ];
    vec(calm, 1..120)
}

/// Pages stay open; resets go wrong, slots are switched on and off, writes inside resets.
pub fn working_set_script() -> impl Strategy<Value = Vec<Op>> {
    vec(
        prop_oneof![10 => bad_reset_op(), 2 => switch_op(), 4 => working_set_op()],
        1..120,
    )
}

/// The same with every fault.
pub fn faulty_working_set_script() -> impl Strategy<Value = Vec<Op>> {
    vec(
        prop_oneof![10 => faulty_op(), 4 => working_set_op()],
        1..120,
    )
}
