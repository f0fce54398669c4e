// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The last pages of a slot that is removed beside a migration.

#[allow(dead_code, reason = "what other scenarios need, too")]
#[path = "common/scenario.rs"]
mod scenario;

use std::collections::BTreeMap;

use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::sim::{ResetFault, SimVm};
use kvm_dirty_ring::{DirtyPages, SlotId, WorkingSet};
use proptest::prelude::*;
use scenario::{ALL_RAM, ALL_ROM, Machine, RAM, ROM, run};

#[test]
fn the_last_pages_of_a_slot_are_had_alone() {
    let mut machine = Machine::new();
    machine.write([1]);
    machine.vcpu.write(ROM, 2).unwrap();
    machine.log.mark_dirty(ROM, 4, 2).unwrap();
    let retired = machine.log.retire_slot(ROM).unwrap();
    let mut last = DirtyPages::new();
    machine.log.sync_retired(&retired, &mut last).unwrap();
    let runs: Vec<_> = last.runs().collect();
    assert_eq!(runs, [run(ROM, 2, 1), run(ROM, 4, 2)]);
    // Again: what came since.
    machine.vcpu.write(ROM, 2).unwrap();
    machine.log.sync_retired(&retired, &mut last).unwrap();
    assert_eq!(last.runs().collect::<Vec<_>>(), [run(ROM, 2, 1)]);
    machine.vm.delete_slot(ROM);
    machine.log.finish_slot(&retired).unwrap();
    assert_eq!(machine.sync(), [run(RAM, 1, 1)], "the migration's are lost");

    let late = machine.log.sync_retired(&retired, &mut last);
    let is_late = matches!(late, Err(SlotError::Unknown { slot: ROM }));
    assert!(is_late && last.is_empty(), "{late:?}");
    machine.log.add_slot(ROM, ALL_ROM.pages).unwrap();
    let of_another = machine.log.sync_retired(&retired, &mut last);
    assert!(matches!(of_another, Err(SlotError::Unknown { .. })));
    let kept = machine.log.retire_slot(RAM).unwrap();
    machine.log.keep_slot(&kept).unwrap();
    let refused = machine.log.sync_retired(&kept, &mut last);
    assert!(matches!(refused, Err(SlotError::Kept { slot: RAM })));
}

/// What a VMM does, in two threads that take turns.
#[derive(Debug, Clone)]
enum Step {
    Write(bool, u64),
    DeviceWrites(bool, u64),
    /// The migration's round.
    Sync,
    SyncRetired,
    /// The removal begins, is finished, or the slot comes back.
    Next,
    WorkingSet(Option<u64>),
    Rearm,
    Inject(ResetFault),
}

fn step() -> impl Strategy<Value = Step> {
    let fault = prop_oneof![
        (0u32..30).prop_map(|after| ResetFault::Short { after }),
        Just(ResetFault::AtEnd),
        Just(ResetFault::Error(libc::EINTR)),
    ];
    prop_oneof![
        8 => (any::<bool>(), 0..70u64).prop_map(|(is_rom, page)| Step::Write(is_rom, page)),
        2 => (any::<bool>(), 0..70u64).prop_map(|(is_rom, page)| Step::DeviceWrites(is_rom, page)),
        2 => Just(Step::Sync),
        2 => Just(Step::SyncRetired),
        1 => Just(Step::Next),
        1 => prop::option::of(0..20u64).prop_map(Step::WorkingSet),
        1 => Just(Step::Rearm),
        1 => fault.prop_map(Step::Inject),
    ]
}

/// What was copied.
#[derive(Default)]
struct Copy(BTreeMap<(SlotId, u64), u64>);

impl Copy {
    fn update(&mut self, vm: &SimVm, dirty: &DirtyPages) {
        for (slot, page) in dirty.pages() {
            self.0.extend(
                vm.version(slot, page)
                    .map(|version| ((slot, page), version)),
            );
        }
    }

    fn is_current(&self, vm: &SimVm, slot: SlotId, pages: u64) -> Result<(), TestCaseError> {
        for page in 0..pages {
            let copied = self.0.get(&(slot, page)).copied();
            let copied = copied.unwrap_or(0);
            prop_assert_eq!(Some(copied), vm.version(slot, page), "{} of {}", page, slot);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// What the two are given covers all that was written: of the slot that goes, together; of the other, the
    /// migration alone.
    #[test]
    fn a_migration_beside_a_removal_loses_nothing(steps in prop::collection::vec(step(), 1..120)) {
        let mut machine = Machine::new();
        let (vm, log) = (machine.vm.clone(), machine.log.clone());
        let (mut copy, mut last) = (Copy::default(), DirtyPages::new());
        let mut retired = None;
        let slot = |is_rom| if is_rom { ROM } else { RAM };
        for step in steps {
            match step {
                Step::Write(is_rom, page) => while machine.vcpu.write(slot(is_rom), page).is_err() {
                    // Its errors are those of resets.
                    let _ = machine.ring.on_full();
                },
                Step::DeviceWrites(is_rom, page) => if vm.device_write(slot(is_rom), page) {
                    log.mark_dirty(slot(is_rom), page, 1).unwrap();
                },
                Step::Sync => if log.sync(&mut machine.dirty).is_ok() {
                    copy.update(&vm, &machine.dirty);
                },
                Step::SyncRetired => if let Some(retired) = &retired {
                    let synced = log.sync_retired(retired, &mut last);
                    prop_assert!(synced.is_ok() || last.is_empty());
                    prop_assert!(last.pages().all(|(slot, _)| slot == ROM));
                    copy.update(&vm, &last);
                },
                Step::Next => match retired.take() {
                    None => retired = log.retire_slot(ROM).ok(),
                    Some(removal) => {
                        while log.sync_retired(&removal, &mut last).is_err() {}
                        copy.update(&vm, &last);
                        copy.is_current(&vm, ROM, ALL_ROM.pages)?;
                        vm.delete_slot(ROM);
                        while log.finish_slot(&removal).is_err() {}
                        copy.0.retain(|&(slot, _), _| slot != ROM);
                        log.add_slot(ROM, ALL_ROM.pages).unwrap();
                        vm.create_slot(ROM, ALL_ROM.pages);
                    }
                },
                Step::WorkingSet(places) => log.set_working_set(places.map(WorkingSet::new)),
                Step::Rearm => drop(log.rearm(|slot| {
                    vm.rearm_slot(slot);
                    Ok(())
                })),
                Step::Inject(fault) => vm.inject([fault]),
            }
        }
        while log.sync(&mut machine.dirty).is_err() {}
        copy.update(&vm, &machine.dirty);
        copy.is_current(&vm, RAM, ALL_RAM.pages)?;
        copy.is_current(&vm, ROM, ALL_ROM.pages)?;
    }
}
