// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The reaper's thread: when it reaps, how it ends, what it says when something goes wrong.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::error::ReaperError;
use kvm_dirty_ring::pacing::{Fixed, Observation, Pacing, PolicyError};
use kvm_dirty_ring::sim::{ResetFault, ResetPhase, SimConfig, SimVcpu, SimVm};
use kvm_dirty_ring::{DirtyLog, DirtyPages, Priority, Reaper, SlotId, VcpuRing};

const RAM: SlotId = SlotId::new(0, 0);
/// How long a test waits for what must happen: never reached on a machine that gets on.
const PATIENCE: Duration = Duration::from_secs(60);
const OFTEN: Fixed = Fixed::new(Duration::from_millis(1));

fn machine() -> (SimVm, DirtyLog, SimVcpu, VcpuRing) {
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    log.add_slot(RAM, 10_000).unwrap();
    vm.create_slot(RAM, 10_000);
    let vcpu = vm.add_vcpu();
    let ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    (vm, log, vcpu, ring)
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "it does not happen");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Says each time what it was shown of the first ring, and does what was set at the start.
struct Spy {
    seen: Sender<u64>,
    reap: bool,
}

impl Spy {
    /// Looks again as late as it may.
    fn sleepy(reap: bool) -> (Self, Receiver<u64>) {
        let (seen, is_seen) = mpsc::channel();
        (Self { seen, reap }, is_seen)
    }
}

impl Pacing for Spy {
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
        let _ = self.seen.send(seen.rings[0].full_exits);
        reap.fill(self.reap);
        Duration::from_secs(10)
    }
}

#[test]
fn it_empties_the_rings() {
    let (vm, log, vcpu, _ring) = machine();
    let reaper = Reaper::spawn(&log, OFTEN).unwrap();
    for page in 0..3 {
        vcpu.write(RAM, page).unwrap();
        wait_until(|| vcpu.used() == 0);
    }
    assert!(reaper.is_running());
    reaper.stop().unwrap();
    vcpu.write(RAM, 3).unwrap();
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    assert_eq!(dirty.page_count(), 4);
    assert_eq!(vm.version(RAM, 3), Some(1));
}

#[test]
fn a_full_exit_wakes_it() {
    let (vm, log, vcpu, mut ring) = machine();
    // The reaper looks while the vCPU still waits for its reset.
    vm.on_reset(|_| thread::sleep(Duration::from_millis(10)));
    let (spy, seen) = Spy::sleepy(false);
    let reaper = Reaper::spawn(&log, spy).unwrap();
    assert_eq!(seen.recv_timeout(PATIENCE), Ok(0));
    vcpu.write(RAM, 0).unwrap();
    ring.on_full().unwrap();
    // Long, and yet less than the policy's delay.
    let woken = seen.recv_timeout(Duration::from_secs(9));
    assert_eq!(woken, Ok(1), "what has woken it");
    reaper.stop().unwrap();
}

#[test]
fn stopping_or_dropping_it_ends_the_thread() {
    for drop_it in [false, true] {
        let (_vm, log, _vcpu, _ring) = machine();
        let (spy, seen) = Spy::sleepy(true);
        let reaper = Reaper::spawn(&log, spy).unwrap();
        seen.recv_timeout(PATIENCE).unwrap();
        let (ended, has_ended) = mpsc::channel();
        thread::spawn(move || {
            if drop_it {
                drop(reaper);
            } else {
                reaper.stop().unwrap();
            }
            ended.send(()).unwrap();
        });
        // Long, and yet less than the policy's delay.
        has_ended.recv_timeout(Duration::from_secs(9)).unwrap();
        // The policy went with the thread.
        let gone = loop {
            if let Err(gone) = seen.try_recv() {
                break gone;
            }
        };
        assert_eq!(gone, mpsc::TryRecvError::Disconnected);
    }
}

#[test]
fn a_log_has_one_at_a_time() {
    let (_vm, log, vcpu, _ring) = machine();
    let first = Reaper::spawn(&log, OFTEN).unwrap();
    let second = Reaper::spawn(&log.clone(), OFTEN);
    assert!(matches!(second, Err(ReaperError::Running)));
    // The refusal has not stopped the first.
    vcpu.write(RAM, 0).unwrap();
    wait_until(|| vcpu.used() == 0);
    first.stop().unwrap();
    let second = Reaper::spawn(&log, OFTEN).unwrap();
    drop(second);
    let third = Reaper::spawn(&log, OFTEN).unwrap();
    vcpu.write(RAM, 1).unwrap();
    wait_until(|| vcpu.used() == 0);
    third.stop().unwrap();
}

#[test]
fn failing_resets_are_reported() {
    let (vm, log, vcpu, _ring) = machine();
    let reaper = Reaper::spawn(&log, OFTEN).unwrap();
    assert!(reaper.take_error().is_none());
    let fail_once = |page| {
        vm.inject([ResetFault::Error(libc::ENOMEM)]);
        vcpu.write(RAM, page).unwrap();
        wait_until(|| vcpu.used() == 0);
    };
    fail_once(0);
    let Some(ReaperError::Reset(error)) = reaper.take_error() else {
        panic!("no error");
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
    assert!(reaper.take_error().is_none(), "the error is returned once");
    fail_once(1);
    // A later reset succeeded, so a stop after a migration that went well must not fail for it.
    reaper.stop().unwrap();
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    assert_eq!(dirty.page_count(), 2);
    assert_eq!(log.stats().failed_resets, 2);
}

#[test]
fn a_policy_that_panics_is_replaced() {
    struct Panics;
    impl Pacing for Panics {
        fn decide(&mut self, _: &Observation<'_>, _: &mut [bool]) -> Duration {
            panic!("a policy's panic, which the test is about");
        }
    }
    let (_vm, log, vcpu, _ring) = machine();
    let reaper = Reaper::spawn(&log, Panics).unwrap();
    let mut error = None;
    wait_until(|| {
        error = error.take().or_else(|| reaper.take_error());
        error.is_some()
    });
    assert!(matches!(
        error,
        Some(ReaperError::Policy(PolicyError::Panicked))
    ));
    // Twice, for one pass may have been due to the panic.
    for page in 0..2 {
        vcpu.write(RAM, page).unwrap();
        wait_until(|| vcpu.used() == 0);
    }
    assert!(reaper.is_running());
    reaper.stop().unwrap();
}

#[test]
fn a_policy_that_asks_for_the_impossible_is_replaced() {
    struct Restless;
    impl Pacing for Restless {
        fn decide(&mut self, _: &Observation<'_>, _: &mut [bool]) -> Duration {
            Duration::ZERO
        }
    }
    let (_vm, log, _vcpu, _ring) = machine();
    let reaper = Reaper::spawn(&log, Restless).unwrap();
    let mut error = None;
    wait_until(|| {
        error = error.take().or_else(|| reaper.take_error());
        error.is_some()
    });
    let asked = Duration::ZERO;
    let expected = PolicyError::OutOfBounds { asked };
    assert!(matches!(error, Some(ReaperError::Policy(policy)) if policy == expected));
    reaper.stop().unwrap();
}

#[test]
fn a_pause_is_a_pause() {
    let (_vm, log, vcpu, mut ring) = machine();
    let reaper = Reaper::spawn(&log, OFTEN).unwrap();
    for page in 0..20 {
        reaper.pause();
        reaper.pause();
        let before = reaper.stats();
        // Full: an exit that finds little is refused sooner or later.
        let is_full = (0..10_000).any(|page| vcpu.write(RAM, page).is_err());
        assert!(is_full, "its end is not reached");
        ring.on_full().unwrap();
        vcpu.write(RAM, page).unwrap();
        thread::sleep(Duration::from_millis(5));
        assert_eq!(vcpu.used(), 1, "it reaps");
        assert_eq!(reaper.stats().looks, before.looks, "it looks");
        reaper.resume();
        wait_until(|| vcpu.used() == 0);
    }
    // One that is paused can be stopped.
    reaper.pause();
    reaper.stop().unwrap();
}

/// A pass is in its reset when the pause is ordered.
#[test]
fn a_pause_waits_for_a_pass() {
    let (vm, log, vcpu, _ring) = machine();
    let (begun, has_begun) = mpsc::channel();
    let over = Arc::new(AtomicBool::new(false));
    vm.on_reset({
        let over = Arc::clone(&over);
        move |phase| match phase {
            ResetPhase::Begin => begun.send(()).unwrap(),
            _ => {
                thread::sleep(Duration::from_millis(50));
                over.store(true, Ordering::Relaxed);
            }
        }
    });
    let reaper = Reaper::spawn(&log, OFTEN).unwrap();
    vcpu.write(RAM, 0).unwrap();
    has_begun.recv_timeout(PATIENCE).unwrap();
    reaper.pause();
    assert!(over.load(Ordering::Relaxed), "a pass is under way");
    reaper.stop().unwrap();
}

/// A thread that waits for a pause returns when another thread ends the pause.
#[test]
fn a_pause_ends_with_a_resume() {
    let (vm, log, vcpu, _ring) = machine();
    let (begun, has_begun) = mpsc::channel();
    let (end, may_end) = mpsc::channel::<()>();
    vm.on_reset(move |phase| {
        if phase == ResetPhase::Begin {
            let _ = begun.send(());
            let _ = may_end.recv_timeout(PATIENCE);
        }
    });
    let reaper = Arc::new(Reaper::spawn(&log, OFTEN).unwrap());
    vcpu.write(RAM, 0).unwrap();
    has_begun.recv_timeout(PATIENCE).unwrap();
    let paused = thread::spawn({
        let reaper = Arc::clone(&reaper);
        move || reaper.pause()
    });
    // By then it waits for the pass, which goes on.
    thread::sleep(Duration::from_millis(100));
    reaper.resume();
    end.send(()).unwrap();
    wait_until(|| paused.is_finished());
    vm.on_reset(|_| ());
}

#[test]
fn policies_are_swapped_while_it_runs() {
    let (_vm, log, vcpu, _ring) = machine();
    let (spy, seen) = Spy::sleepy(false);
    let reaper = Reaper::spawn(&log, spy).unwrap();
    seen.recv_timeout(PATIENCE).unwrap();
    vcpu.write(RAM, 0).unwrap();
    // The one before would sleep for ten seconds.
    reaper.set_policy(OFTEN);
    wait_until(|| vcpu.used() == 0);
    let gone = seen.recv_timeout(PATIENCE);
    let expected = Err(mpsc::RecvTimeoutError::Disconnected);
    assert_eq!(gone, expected, "the old policy is still there");
    // It is the last one that counts, and a pause does not lose it.
    reaper.pause();
    let (spy, seen) = Spy::sleepy(true);
    reaper.set_policy(Fixed::new(Duration::from_secs(9)));
    reaper.set_policy(spy);
    vcpu.write(RAM, 1).unwrap();
    reaper.resume();
    seen.recv_timeout(PATIENCE).unwrap();
    wait_until(|| vcpu.used() == 0);
    reaper.stop().unwrap();
}

#[test]
fn it_counts_what_it_does() {
    let (_vm, log, vcpu, mut ring) = machine();
    let (spy, seen) = Spy::sleepy(true);
    let reaper = Reaper::spawn(&log, spy).unwrap();
    seen.recv_timeout(PATIENCE).unwrap();
    wait_until(|| reaper.stats().delay_ns > 0);
    for page in 0..3 {
        vcpu.write(RAM, page).unwrap();
    }
    let before = reaper.stats();
    assert_eq!((before.woken, before.entries), (0, 0));
    ring.on_full().unwrap();
    seen.recv_timeout(PATIENCE).unwrap();
    wait_until(|| reaper.stats().passes > before.passes);
    let after = reaper.stats();
    assert_eq!((after.looks, after.woken), (before.looks + 1, 1));
    assert!(after.pass_ns > before.pass_ns);
    wait_until(|| log.stats().reaper.delay_ns > 0);
    reaper.pause();
    wait_until(|| log.stats().reaper.delay_ns == 0);
    reaper.resume();
    wait_until(|| log.stats().reaper.delay_ns > 0);
    reaper.stop().unwrap();

    // The log keeps the counts of reapers that are gone, and the delay of none.
    let gone = log.stats().reaper;
    assert_eq!((gone.woken, gone.delay_ns), (1, 0));
    let reaper = Reaper::spawn(&log, Fixed::default()).unwrap();
    wait_until(|| reaper.stats().looks > gone.looks);
    assert_eq!(log.stats().reaper.woken, 1);
}

/// Policies that panic even as they go: when they are replaced, or when their time is over.
#[test]
fn policies_may_go_with_a_bang() {
    struct Bang {
        decides: bool,
    }
    impl Pacing for Bang {
        fn decide(&mut self, _: &Observation<'_>, _: &mut [bool]) -> Duration {
            assert!(self.decides, "a policy's panic, which the test is about");
            Duration::from_secs(10)
        }
    }
    impl Drop for Bang {
        fn drop(&mut self) {
            panic!("another");
        }
    }
    let (_vm, log, vcpu, _ring) = machine();
    for decides in [false, true] {
        let reaper = Reaper::spawn(&log, Bang { decides }).unwrap();
        wait_until(|| reaper.stats().looks > 0);
        reaper.set_policy(OFTEN);
        vcpu.write(RAM, 0).unwrap();
        wait_until(|| vcpu.used() == 0);
        assert!(reaper.is_running());
        let error = reaper.take_error();
        assert_eq!(error.is_some(), !decides, "{error:?}");
        reaper.stop().unwrap();
    }
}

/// A kernel of one's own that panics in the midst of a reset: before anything is recycled, or when
/// entries are and their pages are not protected yet.
#[test]
fn a_panic_in_a_reset_ends_it_and_loses_nothing() {
    for recycled in [false, true] {
        let (vm, log, vcpu, mut ring) = machine();
        let mut bang = true;
        vm.on_reset(move |phase| {
            if bang && matches!(phase, ResetPhase::Recycled) == recycled {
                bang = false;
                panic!("a kernel's panic, which the test is about");
            }
        });
        let reaper = Reaper::spawn(&log, OFTEN).unwrap();
        vcpu.write(RAM, 7).unwrap();
        wait_until(|| !reaper.is_running());
        let error = reaper.stop();
        assert!(matches!(error, Err(ReaperError::Panicked)), "{error:?}");

        vcpu.write(RAM, 8).unwrap();
        ring.on_full().unwrap();
        let mut dirty = DirtyPages::new();
        log.sync(&mut dirty).unwrap();
        assert!(dirty.contains(RAM, 7) && dirty.contains(RAM, 8));
        let suspects = log.stats().suspect_pages;
        assert_eq!(suspects > 0, recycled, "{suspects} pages");
        let rearmed = log.rearm(|slot| {
            vm.rearm_slot(slot);
            Ok(())
        });
        assert_eq!(rearmed.unwrap(), usize::from(recycled));
        log.sync(&mut dirty).unwrap();

        // Another one does as if nothing had been.
        let reaper = Reaper::spawn(&log, OFTEN).unwrap();
        vcpu.write(RAM, 7).unwrap();
        wait_until(|| vcpu.used() == 0);
        reaper.stop().unwrap();
        log.sync(&mut dirty).unwrap();
        assert_eq!(dirty.page_count(), 1);
    }
}

#[test]
fn one_that_cannot_keep_up_says_so() {
    let (vm, log, vcpu, _ring) = machine();
    vm.on_reset(|phase| {
        if matches!(phase, ResetPhase::Recycled) {
            thread::sleep(Duration::from_millis(5));
        }
    });
    let reaper = Reaper::spawn(&log, OFTEN).unwrap();
    let mut page = 0;
    wait_until(|| {
        let _ = vcpu.write(RAM, page % 10_000);
        page += 1;
        reaper.stats().saturated
    });
    // And that it can again.
    wait_until(|| !reaper.stats().saturated);
    reaper.stop().unwrap();
}

/// Its thread in `/proc`.
fn task(name: &str) -> std::path::PathBuf {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let named = |path: &std::path::PathBuf| {
        let comm = std::fs::read_to_string(path.join("comm"));
        comm.is_ok_and(|comm| comm.trim_end() == name)
    };
    let mut paths = tasks.map(|task| task.unwrap().path());
    paths.find(named).expect("a thread of that name")
}

#[test]
fn operators_name_place_and_prioritise_it() {
    let (_vm, log, _vcpu, _ring) = machine();
    // One that we may run on.
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let cpus = own
        .lines()
        .find_map(|l| l.strip_prefix("Cpus_allowed_list:\t"));
    let cpu = cpus.unwrap().split([',', '-']).next().unwrap();
    let builder = Reaper::builder().name("reaper-of-17");
    let builder = builder.cpus([cpu.parse().unwrap()]);
    let reaper = builder.priority(Priority::Nice(7)).spawn(&log, OFTEN);
    let reaper = reaper.unwrap();
    let task = task("reaper-of-17");
    let status = std::fs::read_to_string(task.join("status")).unwrap();
    let place = format!("\nCpus_allowed_list:\t{cpu}\n");
    assert!(status.contains(&place), "{status}");
    let stat = std::fs::read_to_string(task.join("stat")).unwrap();
    // Fields from the state on, which is the third: nice is the nineteenth.
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    assert_eq!(fields.split(' ').nth(16), Some("7"), "{stat}");
    let tid = task.file_name().unwrap().to_str().unwrap();
    let slack = std::fs::read_to_string(format!("/proc/{tid}/timerslack_ns")).unwrap();
    assert_eq!(slack.trim_end(), "1");
    // Everything but what can't be blocked, and what the C library keeps for itself.
    let blocked = status.lines().find_map(|l| l.strip_prefix("SigBlk:\t"));
    let blocked = u64::from_str_radix(blocked.unwrap(), 16).unwrap();
    let usual = 1 << (libc::SIGTERM - 1) | 1 << (libc::SIGUSR1 - 1) | 1 << (libc::SIGALRM - 1);
    assert_eq!(blocked & usual, usual, "{blocked:x}");
    reaper.stop().unwrap();
}

#[test]
fn a_place_or_priority_that_is_refused_is_an_error() {
    let (_vm, log, _vcpu, _ring) = machine();
    for (builder, wanted) in [
        (Reaper::builder().cpus([1023]), "sched_setaffinity"),
        (Reaper::builder().cpus([0, usize::MAX]), "sched_setaffinity"),
        (
            Reaper::builder().priority(Priority::Fifo(0)),
            "sched_setscheduler(SCHED_FIFO)",
        ),
    ] {
        match builder.spawn(&log, OFTEN) {
            Err(ReaperError::Scheduling { call, .. }) => assert_eq!(call, wanted),
            other => panic!("{other:?}"),
        }
    }
    let unspeakable = Reaper::builder().name("re\0aper").spawn(&log, OFTEN);
    assert!(matches!(unspeakable, Err(ReaperError::Spawn(_))));
    // The log is free again each time.
    Reaper::spawn(&log, OFTEN).unwrap().stop().unwrap();
}
