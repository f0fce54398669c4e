// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Dirty limits. The program `dirty-limit` measures how well they hold; here is what must be so on
//! any machine, however busy.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use kvm_dirty_ring::pacing::Adaptive;
use kvm_dirty_ring::{DirtyLog, Limiter, Reaper};
use kvm_integration::{VcpuThread, Workload};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;

use super::harness::Outcome;
use super::machine::{Machine, assert_unsuspicious, nap, resume, stop, wait_beside};

tests![
    a_limit_is_not_exceeded,
    a_full_ring_stops_a_vcpu_that_nobody_kicks,
    a_stop_waits_for_no_sleep,
];

/// So slow that who owes a ring's worth sleeps for minutes.
const SLOW: u64 = 10;

fn limit(pages_per_second: u64) -> Option<NonZeroU64> {
    NonZeroU64::new(pages_per_second)
}

fn limiter(log: &DirtyLog, vcpus: &[VcpuThread]) -> Result<Limiter, Failed> {
    let kickers: Vec<_> = vcpus.iter().map(VcpuThread::kicker).collect();
    Ok(Limiter::spawn(log, move |vcpu| kickers[vcpu].kick())?)
}

/// Whether a vCPU sleeps for more than a second yet; the kicks of others are not ours to give.
fn sleeps(log: &DirtyLog) -> bool {
    log.enforce_dirty_limits(|_| ()) > Some(Duration::from_secs(1))
}

/// A vCPU that would write without end, beside a reaper: what it dirties, by its own count, is what
/// it may in that time, the credit of a quarter of a second, and what it owes.
fn a_limit_is_not_exceeded() -> Outcome {
    let mut machine = Machine::new(4096, &[60_000])?;
    let vcpus = machine.spawn_all(Workload::Walk, 2)?;
    let reaper = Reaper::spawn(&machine.log, Adaptive::default())?;
    let limiter = limiter(&machine.log, &vcpus)?;
    let stores = || -> Vec<u64> { vcpus.iter().map(VcpuThread::progress).collect() };
    // A burst is over when a limiter has looked and the vCPU has left: less than a vCPU without a
    // limit writes here in a second.
    let before = stores();
    nap(Duration::from_secs(1));
    let in_a_second = stores().into_iter().zip(before);
    let burst = in_a_second.map(|(after, before)| after - before).max();
    let burst = burst.expect("there are vCPUs");
    // A limit that it would exceed, on a slow machine too.
    let rate = (burst / 4).clamp(1, 2000);
    let (start, before) = (Instant::now(), stores());
    machine.log.set_dirty_limits(limit(rate))?;
    // Until it has slept, and for a while.
    let slept = |log: &DirtyLog| log.stats().vcpus.iter().all(|vcpu| vcpu.limited_ns > 0);
    wait_beside(&vcpus, "a sleep of each vCPU", || slept(&machine.log))?;
    nap(Duration::from_secs(2));
    // All that is owed by now is paid for when both have slept again.
    let slept = |at: usize| machine.log.stats().vcpus[at].limited_ns;
    let asleep = [slept(0), slept(1)];
    wait_beside(&vcpus, "another sleep of each vCPU", || {
        slept(0) > asleep[0] && slept(1) > asleep[1]
    })?;
    let logged: Vec<u64> = {
        let mut rings = Vec::new();
        machine.log.observe(&mut rings);
        rings.iter().map(|ring| ring.taken + ring.waiting).collect()
    };
    for (at, (after, before)) in stores().iter().zip(before).enumerate() {
        let allowed = (start.elapsed().as_secs_f64() * rate as f64) as u64 + rate / 4 + burst;
        let written = after - before;
        assert!(written <= allowed, "vCPU {at}: {written} of {allowed}");
        // All entries are counted, whichever thread takes them from the rings; a chunk may be under way. A store is logged
        // twice if a reset protects its page after the fault and before the store itself.
        let resets = machine.log.stats().resets;
        assert!(
            logged[at] > 0 && logged[at] <= after + 64 + resets,
            "{logged:?} {after}, {resets} resets"
        );
    }
    machine.log.set_dirty_limits(None)?;
    limiter.stop()?;
    machine.finish(&vcpus)?;
    reaper.stop()?;
    stop(vcpus)?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

/// Without a limiter, as QEMU has it.
fn a_full_ring_stops_a_vcpu_that_nobody_kicks() -> Outcome {
    let mut machine = Machine::new(1024, &[60_000])?;
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    machine.log.set_dirty_limits(limit(SLOW))?;
    wait_beside(&vcpus, "a sleep of each vCPU", || sleeps(&machine.log))?;
    let stats = machine.log.stats().vcpus[0];
    assert!(stats.full_exits > 0 && stats.stall_ns > 0, "{stats:?}");
    let still = vcpus[0].progress();
    nap(Duration::from_millis(100));
    assert_eq!(vcpus[0].progress(), still, "it runs in its sleep");
    // It goes on as soon as it may.
    machine.log.set_dirty_limits(None)?;
    wait_beside(&vcpus, "progress", || vcpus[0].progress() > still)?;
    machine.finish(&vcpus)?;
    stop(vcpus)?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

/// The final pass: the vCPUs sleep for minutes, and are out of the guest at once.
fn a_stop_waits_for_no_sleep() -> Outcome {
    let mut machine = Machine::new(1024, &[60_000])?;
    let vcpus = machine.spawn_all(Workload::Walk, 2)?;
    let reaper = Reaper::spawn(&machine.log, Adaptive::default())?;
    let limiter = limiter(&machine.log, &vcpus)?;
    machine.log.set_dirty_limits(limit(SLOW))?;
    for _ in 0..3 {
        wait_beside(&vcpus, "a sleep of each vCPU", || sleeps(&machine.log))?;
        let awake = machine.log.keep_awake();
        machine.finish(&vcpus)?;
        drop(awake);
        resume(&vcpus);
    }
    let awake = machine.log.keep_awake();
    stop(vcpus)?;
    drop(awake);
    limiter.stop()?;
    reaper.stop()?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}
