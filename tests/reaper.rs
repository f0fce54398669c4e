//! The reaper's thread: when it reaps, how it ends, what it says when something goes wrong.

use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::error::{PolicyError, ReaperError};
use kvm_dirty_ring::pacing::{Fixed, Observation, Pacing};
use kvm_dirty_ring::sim::{ResetFault, SimConfig, SimVcpu, SimVm};
use kvm_dirty_ring::{DirtyLog, DirtyPages, Reaper, SlotId, VcpuRing};

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

/// Says each time what it was shown of the first ring, and does as it was told at the start.
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
    let (_vm, log, vcpu, mut ring) = machine();
    let (spy, seen) = Spy::sleepy(false);
    let reaper = Reaper::spawn(&log, spy).unwrap();
    assert_eq!(seen.recv_timeout(PATIENCE), Ok(0));
    vcpu.write(RAM, 0).unwrap();
    ring.on_full().unwrap();
    // Long, and yet less than the policy's delay.
    let woken = seen.recv_timeout(Duration::from_secs(9));
    assert!(woken.is_ok());
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
    assert!(reaper.take_error().is_none(), "it is told once");
    fail_once(1);
    assert!(matches!(reaper.stop(), Err(ReaperError::Reset(_))));
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
