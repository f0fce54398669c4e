// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Full rings.

use std::sync::{Arc, Mutex};

use kvm_integration::{Action, Exit, VcpuThread, Workload};
use libtest_mimic::Completion::Completed;

use super::harness::Outcome;
use super::machine::{Machine, assert_unsuspicious, pause, resume, run_passes, stop, wait};

tests![
    soft_limit_is_learnt,
    guest_resumes_and_loses_nothing,
    many_vcpus_share_resets,
];

/// The kernel does not report how many entries it keeps in reserve: the least that a full exit finds shows it.
fn soft_limit_is_learnt() -> Outcome {
    let machine = Machine::new(1024, &[4096])?;
    let supposed = |machine: &Machine| machine.log.stats().vcpus[0].soft_limit;
    let (vcpu, mut ring) = machine.attach(0, &machine.load(Workload::Walk, 0, 1))?;
    let prior = supposed(&machine);
    let log = machine.log.clone();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let vcpu = VcpuThread::spawn(vcpu, {
        let seen = Arc::clone(&seen);
        move |exit| {
            assert_eq!(exit, Exit::RingFull);
            let before = log.stats().vcpus[0].entries;
            if let Err(error) = ring.on_full() {
                return Action::Fail(error.into());
            }
            let vcpu = log.stats().vcpus[0];
            let mut seen = seen.lock().expect("nobody panics with it");
            seen.push((vcpu.entries - before, vcpu.soft_limit, vcpu.full_exits));
            if seen.len() == 3 {
                Action::Stop
            } else {
                Action::Continue
            }
        }
    })?;
    wait("three full exits", || vcpu.ended())?;
    vcpu.join()?;
    let seen = seen.lock().expect("nobody panics with it");
    let mut least = u64::MAX;
    for &(present, learnt, _) in &*seen {
        least = least.min(present);
        assert_eq!(learnt, least, "{seen:?}");
        match prior {
            // 64 entries are reserved, and each page is an entry at once: the exit is exact.
            960 => assert_eq!(learnt, prior, "{seen:?}"),
            // 512 more are reserved for the processor's buffer, which comes to the ring as a whole.
            448 => assert!((448..960).contains(&present), "{seen:?}"),
            other => return Err(format!("a soft limit of {other} was supposed").into()),
        }
    }
    assert!(
        seen.iter().zip(1..).all(|(&(.., exits), n)| exits == n),
        "{seen:?}"
    );
    let stats = machine.log.stats();
    assert_eq!(stats.full_exits(), 3);
    assert!(stats.vcpus[0].stall_ns > 0);
    assert_unsuspicious(&stats);
    Ok(Completed)
}

/// With neither a reaper nor syncs, full exits alone keep the guest running.
fn guest_resumes_and_loses_nothing() -> Outcome {
    let mut machine = Machine::new(1024, &[3000, 1000])?;
    let vcpus = machine.spawn_all(Workload::Random, 1)?;
    for _ in 0..3 {
        run_passes(&vcpus, 3)?;
        machine.finish(&vcpus)?;
        resume(&vcpus);
    }
    stop(vcpus)?;
    let stats = machine.log.stats();
    // Nine passes over 4,000 pages that are protected again each time, give or take.
    assert!(stats.full_exits() >= 9 * 4000 / 1024 / 2, "{stats:?}");
    // One exit is enough for a full ring: the next one finds it full again.
    let full = stats.full_exits() * stats.vcpus[0].soft_limit;
    assert!(stats.entries > full / 4 * 3, "{stats:?}");
    assert_unsuspicious(&stats);
    Ok(Completed)
}

/// Resets are for the whole VM: one serves every vCPU that waits for it.
fn many_vcpus_share_resets() -> Outcome {
    let mut machine = Machine::new(1024, &[16_384])?;
    let vcpus = machine.spawn_all(Workload::Walk, 8)?;
    run_passes(&vcpus, 2)?;
    pause(&vcpus)?;
    let stats = machine.log.stats();
    assert!(
        stats.vcpus.iter().all(|vcpu| vcpu.full_exits > 0),
        "{stats:?}"
    );
    machine.finish(&vcpus)?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}
