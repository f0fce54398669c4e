//! Whose entries are in which ring, and vCPUs that come late.

use kvm_integration::{Load, Mode, Workload};
use libtest_mimic::Completion::Completed;

use super::harness::Outcome;
use super::machine::{
    Machine, assert_unsuspicious, page_of, pause, resume, run_passes, slot_id, stop, wait,
};

tests![
    each_vcpu_has_its_own_ring,
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
        assert!(vcpus.iter().all(|vcpu| vcpu.wait_paused()));
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
    for index in 0..16 {
        vcpus.push(machine.spawn(index, &machine.load(Workload::Random, index, 16))?);
        machine.round()?;
        let before = vcpus[0].progress();
        wait("progress beside a new vCPU", || {
            vcpus[0].progress() > before
        })?;
    }
    machine.finish(&vcpus)?;
    assert_eq!(machine.log.stats().vcpus.len(), 16);
    stop(vcpus)?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}
