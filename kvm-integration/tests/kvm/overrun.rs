//! A kernel that overruns its rings: kvm_pvm's emulator, which looks for a full ring too seldom.

use kvm_integration::{Host, Load, Mode, VcpuThread, Workload};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;

use super::harness::{Outcome, skip};
use super::machine::{
    Machine, assert_unsuspicious, page_of, pause, resume, run_passes, slot_id, stop, wait,
};

tests![
    overrun_makes_everything_dirty,
    rearming_ends_suspicion,
    emulated_guest_with_yields
];

const PAGES: [u64; 2] = [3000, 500];

/// A machine of two slots whose first vCPU, paused, has overrun its ring; `None` where KVM would
/// not let it.
fn overrun() -> Result<Option<(Machine, VcpuThread)>, Failed> {
    if !Host::detect().is_pvm() {
        return Ok(None);
    }
    let machine = Machine::new(1024, &PAGES)?;
    // It never stores to slot 2.
    let list = (0..PAGES[0]).map(|page| page_of(1, page)).collect();
    let vcpu = machine.spawn(0, &Load::new(Mode::Emulated, list))?;
    wait("an overrun", || {
        machine.log.stats().overruns > 0 || vcpu.ended()
    })?;
    if !vcpu.pause() {
        stop([vcpu])?;
        return Err("the vCPU has ended".into());
    }
    Ok(Some((machine, vcpu)))
}

fn not_pvm() -> Outcome {
    skip("only kvm_pvm is known to overrun its rings")
}

fn overrun_makes_everything_dirty() -> Outcome {
    let Some((mut machine, vcpu)) = overrun()? else {
        return not_pvm();
    };
    for _ in 0..20 {
        machine.round()?;
        // Of every slot: who knows what the overwritten entries named.
        assert_eq!(machine.dirty().page_count(), PAGES.iter().sum::<u64>());
        machine.compare()?;
        // The ring goes on: the vCPU is not stopped for ever.
        vcpu.resume();
        run_passes(std::slice::from_ref(&vcpu), 1)?;
        assert!(vcpu.pause(), "the vCPU has ended");
    }
    stop([vcpu])?;
    Ok(Completed)
}

/// Slot by slot; afterwards a guest that does not overrun is followed by its ring alone.
fn rearming_ends_suspicion() -> Outcome {
    let Some((mut machine, vcpu)) = overrun()? else {
        return not_pvm();
    };
    // What is in its ring may be another overrun.
    machine.round()?;
    let expected = [(1, PAGES[0] + PAGES[1], PAGES[1]), (2, PAGES[1], 0)];
    for (id, once_more, then) in expected {
        machine.vm.protect(id)?;
        machine.log.rearmed(slot_id(id))?;
        assert_eq!(machine.round()?, once_more);
        assert_eq!(machine.round()?, then);
    }
    stop([vcpu])?;
    let list = (0..100).map(|page| page_of(1, page)).collect();
    let native = [machine.spawn(1, &Load::new(Mode::Native, list))?];
    for _ in 0..5 {
        run_passes(&native, 2)?;
        machine.finish(&native)?;
        assert_eq!(machine.dirty().page_count(), 100);
        assert_eq!(machine.round()?, 0);
        resume(&native);
    }
    Ok(Completed)
}

/// Leaving the guest after few stores gives KVM the chance to look: no overrun, on no kind of host.
fn emulated_guest_with_yields() -> Outcome {
    let mut machine = Machine::new(1024, &[2048])?;
    let mut load = machine.load(Workload::Random, 0, 1).chunk(32);
    load.mode = Mode::Emulated;
    let vcpus = [machine.spawn(0, &load)?];
    for _ in 0..10 {
        run_passes(&vcpus, 1)?;
        machine.round()?;
        pause(&vcpus)?;
        machine.finish(&vcpus)?;
        resume(&vcpus);
    }
    assert_unsuspicious(&machine.log.stats());
    stop(vcpus)?;
    Ok(Completed)
}
