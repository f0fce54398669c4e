// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A kernel that overruns its rings: kvm_pvm's emulator, which looks for a full ring too seldom.

use kvm_dirty_ring::error::{FullError, SlotError};
use kvm_integration::{Action, Exit, Host, Load, Mode, VcpuThread, Workload};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;

use super::harness::{Outcome, skip};
use super::machine::{
    Machine, assert_unsuspicious, page_of, pause, resume, run_passes, slot_id, stop, wait,
};

tests![overrun_breaks_the_ring, emulated_guest_with_yields];

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
    let (vcpu, mut ring) = machine.attach(0, &Load::new(Mode::Emulated, list))?;
    // Once its ring can't be emptied any more it stays out of the guest.
    let handler = move |exit| match exit {
        Exit::RingFull => match ring.on_full() {
            Ok(()) => Action::Continue,
            Err(FullError::Broken { vcpu: 0 }) => Action::StayOut,
            Err(error) => Action::Fail(error.into()),
        },
        _ => Action::Continue,
    };
    let vcpu = VcpuThread::spawn(vcpu, handler)?;
    wait("an overrun", || {
        machine.log.stats().overruns > 0 || vcpu.ended()
    })?;
    pause(std::slice::from_ref(&vcpu))?;
    Ok(Some((machine, vcpu)))
}

fn not_pvm() -> Outcome {
    skip("only kvm_pvm is known to overrun its rings")
}

/// Each sync reports every page of every slot, as the overwritten entries may have named any of them; re-arming
/// is refused; another vCPU, and a slot that comes later, are none the worse for it.
fn overrun_breaks_the_ring() -> Outcome {
    let Some((mut machine, vcpu)) = overrun()? else {
        return not_pvm();
    };
    let all = PAGES.iter().sum();
    let list = (0..100).map(|page| page_of(2, page)).collect();
    let native = [machine.spawn(1, &Load::new(Mode::Native, list))?];
    for _ in 0..20 {
        vcpu.resume();
        resume(&native);
        run_passes(&native, 1)?;
        assert!(vcpu.pause(), "{:?}", vcpu.why_ended());
        pause(&native)?;
        assert_eq!(machine.round()?, all);
        machine.compare()?;
    }
    let refused = machine.log.rearmed(slot_id(1)).unwrap_err();
    assert!(
        matches!(refused, SlotError::BrokenRing { vcpu: 0 }),
        "{refused}"
    );
    let stats = machine.log.stats();
    assert_eq!((stats.overruns, stats.suspect_pages), (1, all), "{stats}");
    assert!(stats.vcpus[0].broken && !stats.vcpus[1].broken, "{stats}");
    assert_eq!(machine.round()?, all);
    stop([vcpu])?;
    stop(native)?;
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
