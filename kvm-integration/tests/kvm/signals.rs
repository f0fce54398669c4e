//! Signals at the thread that resets.
//!
//! With one pending, `kvm_dirty_ring_reset` of many kernels returns before it is through, and pages
//! that it has recycled but not protected are never logged again.

use std::collections::HashSet;
use std::fs;
use std::slice::from_ref;
use std::time::{Duration, Instant};

use kvm_dirty_ring::Reaper;
use kvm_dirty_ring::pacing::Fixed;
use kvm_integration::storm::{Storm, this_thread};
use kvm_integration::{VcpuThread, Workload};
use libtest_mimic::Completion::Completed;

use super::harness::{Outcome, remark};
use super::machine::{
    Machine, assert_unsuspicious, nap, resume, stop, wait, wait_beside, wait_paused,
};
use super::raw::RawMachine;

tests![
    unblocked_signals_lose_pages,
    log_in_the_same_storm_loses_none,
    reaper_blocks_every_signal,
];

/// The danger, by hand. Its absence is good news and no failure.
fn unblocked_signals_lose_pages() -> Outcome {
    const PAGES: u64 = 4096;
    let mut machine = RawMachine::new(8192, PAGES, true)?;
    wait_paused(from_ref(&machine.vcpu))?;
    let (mut short, mut lost) = (0, HashSet::new());
    let mut rounds = 0;
    let enough = Instant::now() + Duration::from_secs(5);
    while lost.is_empty() && Instant::now() < enough {
        rounds += 1;
        let logged: HashSet<u64> = machine.harvest().into_iter().collect();
        // Each pass stores to every page. What the first one does not log was never protected.
        lost.extend((0..PAGES).filter(|page| !logged.contains(page)));
        let storm = Storm::at(vec![this_thread()]);
        nap(Duration::from_millis(1));
        let recycled = machine.reset()?;
        drop(storm);
        if recycled < logged.len() {
            short += 1;
            assert_eq!(recycled + machine.reset()?, logged.len());
        }
        machine.vcpu.resume();
        wait_paused(from_ref(&machine.vcpu))?;
    }
    match (short, lost.len()) {
        (0, 0) => remark(
            "signals did not interrupt KVM_RESET_DIRTY_RINGS: this kernel has no early return, or \
             is too fast for a storm",
        ),
        (_, 0) => remark(
            "signals interrupted KVM_RESET_DIRTY_RINGS, but no page was lost: this kernel protects \
             what it has recycled",
        ),
        (0, lost) => return Err(format!("{lost} pages lost without a short reset").into()),
        (short, lost) => remark(&format!(
            "signals that are not blocked lose pages on this kernel: {lost} of {PAGES} with \
             {short} short resets in {rounds} rounds"
        )),
    }
    Ok(Completed)
}

/// The same storm, at every thread that there is, beside the log: at resets of all three kinds, of
/// syncs, of the reaper, and of full exits.
fn log_in_the_same_storm_loses_none() -> Outcome {
    let mut machine = Machine::new(1024, &[4096])?;
    let vcpus = machine.spawn_all(Workload::Random, 2)?;
    let reaper = Reaper::spawn(&machine.log, Fixed::new(Duration::from_millis(10)))?;
    let mut threads: Vec<_> = vcpus.iter().map(VcpuThread::tid).collect();
    threads.extend([this_thread(), reaper_thread()?]);
    let storm = Storm::at(threads);
    for round in 0..60 {
        machine.round()?;
        nap(Duration::from_millis(round % 16));
        machine.finish(&vcpus)?;
        resume(&vcpus);
    }
    let log = machine.log.clone();
    let before = reaper.stats().passes;
    wait_beside(&vcpus, "ten passes of the reaper", || {
        reaper.stats().passes >= before + 10
    })?;
    // A guest may well be too slow to fill a ring before the reaper comes: so it does not come.
    reaper.pause();
    for _ in 0..10 {
        let before = log.stats().full_exits();
        wait_beside(&vcpus, "two full exits", || {
            log.stats().full_exits() >= before + 2
        })?;
        machine.finish(&vcpus)?;
        resume(&vcpus);
    }
    drop(storm);
    reaper.stop()?;
    stop(vcpus)?;
    let stats = machine.log.stats();
    assert_unsuspicious(&stats);
    // Nobody was stopped, and no slot has changed.
    assert_eq!(stats.doubtful_resets, 0, "{stats:?}");
    Ok(Completed)
}

/// The reaper's thread, by its name.
fn reaper_thread() -> Result<libc::pid_t, libtest_mimic::Failed> {
    let mut found = None;
    wait("a thread of the name `dirty-ring-reap`", || {
        let Ok(threads) = fs::read_dir("/proc/self/task") else {
            return false;
        };
        found = threads.flatten().find_map(|thread| {
            let name = fs::read_to_string(thread.path().join("comm")).ok()?;
            let id = thread.file_name().to_str()?.parse().ok()?;
            (name == "dirty-ring-reap\n").then_some(id)
        });
        found.is_some()
    })?;
    Ok(found.expect("it was waited for"))
}

/// A signal for the process goes to any thread that takes it: never to the reaper, for whom it
/// would be a needless way out of its sleep.
fn reaper_blocks_every_signal() -> Outcome {
    let machine = Machine::new(1024, &[16])?;
    let reaper = Reaper::spawn(&machine.log, Fixed::default())?;
    let status = format!("/proc/self/task/{}/status", reaper_thread()?);
    // All of 64, but SIGKILL and SIGSTOP, and two that the C library keeps to itself.
    let all = !(1_u64 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1) | 0b11 << 31);
    let blocked = || {
        let status = fs::read_to_string(&status).ok()?;
        let mask = status
            .lines()
            .find_map(|line| line.strip_prefix("SigBlk:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    };
    // It blocks them first of all, which may be after its name can be read.
    let _ = wait("the reaper's mask", || {
        blocked().is_some_and(|mask| mask & all == all)
    });
    let mask = blocked().ok_or("the reaper has no mask")?;
    assert_eq!(mask & all, all, "{mask:#x}");
    reaper.stop()?;
    Ok(Completed)
}
