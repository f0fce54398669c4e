// SPDX-License-Identifier: Apache-2.0 OR MIT
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
use kvm_integration::storm::{Storm, this_thread, thread_named};
use kvm_integration::{Host, VcpuThread, Workload};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;

use super::harness::{Outcome, remark};
use super::machine::{
    Machine, assert_unsuspicious, nap, resume, stop, wait, wait_beside, wait_paused,
};
use super::raw::RawMachine;
use super::scale::scaled;

tests![
    resets_are_told_apart,
    unblocked_signals_lose_pages,
    log_in_the_same_storm_loses_none,
    reaper_blocks_every_signal,
];

/// How many resets recycled all that was harvested, nothing, or some of it.
#[derive(Debug, Default, PartialEq)]
struct Resets {
    whole: u32,
    idle: u32,
    midway: u32,
}

impl Resets {
    fn count(&mut self, recycled: usize, harvested: usize) {
        let counter = match recycled {
            0 => &mut self.idle,
            some if some < harvested => &mut self.midway,
            _ => &mut self.whole,
        };
        *counter += 1;
    }
}

fn resets_are_told_apart() -> Outcome {
    let mut resets = Resets::default();
    for recycled in [0, 1, 4095, 4096, 0, 0] {
        resets.count(recycled, 4096);
    }
    let (whole, idle, midway) = (1, 3, 2);
    assert_eq!(
        resets,
        Resets {
            whole,
            idle,
            midway
        }
    );
    Ok(Completed)
}

/// The danger, by hand. Its absence is good news and no failure; that pages are lost without a signal would be one.
fn unblocked_signals_lose_pages() -> Outcome {
    const PAGES: u64 = 4096;
    const CALM: u32 = 3;
    const STORMY: u32 = 5;
    let mut machine = RawMachine::new(8192, PAGES, true)?;
    wait_paused(from_ref(&machine.vcpu))?;
    // Where resets don't look for signals, a few rounds are enough to see one that does.
    let looks_for_signals = Host::detect().resets_look_for_signals();
    let time = Duration::from_secs(if looks_for_signals { 5 } else { 0 });
    let (mut calm, mut stormy, mut rounds) = (Resets::default(), Resets::default(), 0);
    let start = Instant::now();
    let lost = loop {
        let logged = machine.harvest();
        let distinct: HashSet<u64> = logged.iter().copied().collect();
        // Each pass stores to every page. What it does not log was not protected by the reset before.
        let lost = (0..PAGES).filter(|page| !distinct.contains(page)).count();
        assert!(
            lost == 0 || rounds > CALM,
            "{lost} pages were lost without a signal"
        );
        if lost > 0 || rounds >= CALM + STORMY && start.elapsed() >= time {
            break lost;
        }
        rounds += 1;
        if rounds <= CALM {
            calm.count(machine.reset()?, logged.len());
        } else {
            let storm = Storm::at(vec![this_thread()]);
            nap(Duration::from_millis(1));
            let recycled = machine.reset()?;
            drop(storm);
            stormy.count(recycled, logged.len());
            // What it has left is there for the next one.
            assert_eq!(recycled + machine.reset()?, logged.len());
        }
        machine.vcpu.resume();
        wait_paused(from_ref(&machine.vcpu))?;
    };
    assert_eq!(
        calm.whole, CALM,
        "resets fell short without a signal: {calm:?}"
    );
    let seen = match lost {
        0 => "no page was lost".into(),
        lost => format!("the last of which lost {lost} of {PAGES} pages"),
    };
    remark(&format!(
        "signals that are not blocked, at KVM_RESET_DIRTY_RINGS: in {} rounds, {seen}; {} resets recycled \
         all entries, {} stopped midway, {} recycled none",
        rounds - CALM,
        stormy.whole,
        stormy.midway,
        stormy.idle
    ));
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
    for round in 0..scaled(60, 10) {
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
    for _ in 0..scaled(10, 3) {
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
fn reaper_thread() -> Result<libc::pid_t, Failed> {
    let mut found = None;
    wait("a thread of the name `dirty-ring-reap`", || {
        found = thread_named("dirty-ring-reap");
        found.is_some()
    })?;
    Ok(found.expect("it was waited for"))
}

/// A signal for the process goes to any thread that takes it: never to the reaper, which it
/// would wake for nothing.
fn reaper_blocks_every_signal() -> Outcome {
    let machine = Machine::new(1024, &[16])?;
    let reaper = Reaper::spawn(&machine.log, Fixed::default())?;
    let status = format!("/proc/self/task/{}/status", reaper_thread()?);
    // All of 64, but SIGKILL and SIGSTOP, and those that the C library keeps to itself: two of glibc, three of musl.
    let bit = |signal: libc::c_int| 1_u64 << (signal - 1);
    let of_the_library: u64 = (32..libc::SIGRTMIN()).map(bit).sum();
    let all = !(bit(libc::SIGKILL) | bit(libc::SIGSTOP) | of_the_library);
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
