// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The reaper of an event loop: when its descriptor is readable, and what a tick does.

#[path = "common/readable.rs"]
mod readable;

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use kvm_dirty_ring::error::ReaperError;
use kvm_dirty_ring::pacing::{Fixed, Observation, Pacing};
use kvm_dirty_ring::sim::{ResetFault, SimConfig, SimVcpu, SimVm, WriteError};
use kvm_dirty_ring::{DirtyLog, DirtyPages, EventReaper, Reaper, SlotId, VcpuRing};
use readable::is_readable;

const RAM: SlotId = SlotId::new(0, 0);
/// How long a test waits for what must happen: never reached on a machine that gets on.
const PATIENCE: Duration = Duration::from_secs(60);
/// So seldom that a test is over before.
const SELDOM: Fixed = Fixed::new(Duration::from_secs(10));

fn machine() -> (SimVm, DirtyLog, SimVcpu, VcpuRing) {
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    log.add_slot(RAM, 10_000).unwrap();
    vm.create_slot(RAM, 10_000);
    let vcpu = vm.add_vcpu();
    let ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    (vm, log, vcpu, ring)
}

fn ticks(reaper: &mut EventReaper) {
    assert!(is_readable(reaper, PATIENCE), "it does not wake up");
    reaper.tick().unwrap();
}

/// As [`ticks`], by a timer that is set for a time before the policy wants to look again.
fn ticks_early(reaper: &mut EventReaper) {
    let (due, now) = (reaper.due(), Instant::now());
    let left = time_left(reaper);
    let is_early = left.is_zero() || now + left + Duration::from_secs(1) < due;
    assert!(is_early, "it does not wake up before its time");
    ticks(reaper);
}

/// Until the descriptor is readable; zero if it is.
fn time_left(reaper: &EventReaper) -> Duration {
    // SAFETY: all of it may be zero.
    let mut timer: libc::itimerspec = unsafe { core::mem::zeroed() };
    // SAFETY: `timer` is one, and lives.
    let done = unsafe { libc::timerfd_gettime(reaper.as_raw_fd(), &mut timer) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    Duration::new(timer.it_value.tv_sec as u64, timer.it_value.tv_nsec as u32)
}

/// Fills the ring, from page 0 on, and has room made.
fn fill(vcpu: &SimVcpu, ring: &mut VcpuRing) {
    let full = (0..10_000).find_map(|page| vcpu.write(RAM, page).err());
    assert!(matches!(full, Some(WriteError::RingFull)), "{full:?}");
    ring.on_full().unwrap();
}

#[test]
fn its_time_wakes_it_and_a_tick_empties_the_rings() {
    let (_vm, log, vcpu, _ring) = machine();
    let mut reaper = EventReaper::new(&log, Fixed::new(Duration::from_millis(20))).unwrap();
    for page in 0..3 {
        vcpu.write(RAM, page).unwrap();
        let start = Instant::now();
        while vcpu.used() > 0 {
            assert!(start.elapsed() < PATIENCE, "the ring is not emptied");
            ticks(&mut reaper);
        }
    }
    let stats = log.stats().reaper;
    assert_eq!((stats.entries, stats.woken), (3, 0), "{stats:?}");
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    assert_eq!(dirty.page_count(), 3);
}

#[test]
fn a_tick_makes_it_unreadable_until_the_next_is_due() {
    let (_vm, log, _vcpu, _ring) = machine();
    let mut reaper = EventReaper::new(&log, SELDOM).unwrap();
    ticks(&mut reaper);
    assert!(reaper.due() > Instant::now());
    assert!(!is_readable(&reaper, Duration::from_millis(20)));
    // Before its time there is nothing to do.
    let looks = log.stats().reaper.looks;
    reaper.tick().unwrap();
    assert_eq!(log.stats().reaper.looks, looks);
}

#[test]
fn a_full_exit_wakes_it() {
    let (_vm, log, vcpu, mut ring) = machine();
    let mut reaper = EventReaper::new(&log, SELDOM).unwrap();
    ticks(&mut reaper);
    fill(&vcpu, &mut ring);
    ticks_early(&mut reaper);
    let stats = log.stats().reaper;
    assert_eq!((stats.looks, stats.woken), (2, 1), "{stats:?}");
    // Deaf to what comes right after it, it wakes when that time is over.
    fill(&vcpu, &mut ring);
    ticks_early(&mut reaper);
    let stats = log.stats().reaper;
    assert_eq!((stats.looks, stats.woken), (3, 2), "{stats:?}");
}

/// A full exit that comes while the policy looks is for the next tick, and soon.
#[test]
fn a_full_exit_during_a_tick_is_not_forgotten() {
    struct Meanwhile(SimVcpu, VcpuRing, bool);
    impl Pacing for Meanwhile {
        fn decide(&mut self, _: &Observation<'_>, _: &mut [bool]) -> Duration {
            if core::mem::take(&mut self.2) {
                fill(&self.0, &mut self.1);
            }
            Duration::from_secs(10)
        }
    }
    let (_vm, log, vcpu, ring) = machine();
    let mut reaper = EventReaper::new(&log, Meanwhile(vcpu, ring, true)).unwrap();
    ticks(&mut reaper);
    ticks_early(&mut reaper);
    let stats = log.stats().reaper;
    assert_eq!((stats.looks, stats.woken), (2, 1), "{stats:?}");
}

#[test]
fn a_log_has_one_reaper_of_either_kind() {
    let (_vm, log, vcpu, mut ring) = machine();
    let first = EventReaper::new(&log, SELDOM).unwrap();
    for refused in [
        EventReaper::new(&log, SELDOM).err(),
        Reaper::spawn(&log, SELDOM).err(),
    ] {
        assert!(matches!(refused, Some(ReaperError::Running)), "{refused:?}");
    }
    drop(first);
    let thread = Reaper::spawn(&log, SELDOM).unwrap();
    let refused = EventReaper::new(&log, SELDOM).err();
    assert!(matches!(refused, Some(ReaperError::Running)), "{refused:?}");
    // It is the thread that a full exit wakes now.
    let (looks, start) = (thread.stats().looks, Instant::now());
    fill(&vcpu, &mut ring);
    while thread.stats().woken == 0 {
        assert!(start.elapsed() < PATIENCE, "it is not woken: {looks}");
        std::thread::sleep(Duration::from_millis(1));
    }
    thread.stop().unwrap();
    let mut again = EventReaper::new(&log, SELDOM).unwrap();
    ticks(&mut again);
}

#[test]
fn another_policy_looks_at_once() {
    let (_vm, log, vcpu, _ring) = machine();
    let mut reaper = EventReaper::new(&log, SELDOM).unwrap();
    ticks(&mut reaper);
    vcpu.write(RAM, 0).unwrap();
    struct Now;
    impl Pacing for Now {
        fn decide(&mut self, _: &Observation<'_>, reap: &mut [bool]) -> Duration {
            reap.fill(true);
            Duration::from_secs(10)
        }
    }
    // The reaper is older than the order that it is late for.
    std::thread::sleep(Duration::from_millis(20));
    let ordered = Instant::now();
    reaper.set_policy(Now).unwrap();
    ticks(&mut reaper);
    let late = Duration::from_nanos(log.stats().reaper.lateness_ns);
    assert!(late <= ordered.elapsed(), "late by {late:?}");
    assert_eq!(vcpu.used(), 0);
}

#[test]
fn what_goes_wrong_is_returned_and_got_over() {
    struct Bad;
    impl Pacing for Bad {
        fn decide(&mut self, _: &Observation<'_>, _: &mut [bool]) -> Duration {
            panic!("on purpose")
        }
    }
    let (vm, log, vcpu, _ring) = machine();
    let mut reaper = EventReaper::new(&log, Bad).unwrap();
    vcpu.write(RAM, 0).unwrap();
    vm.inject([ResetFault::Error(libc::EPERM)]);
    // Both the policy and the reset: the first.
    let error = reaper.tick().unwrap_err();
    assert!(matches!(error, ReaperError::Policy(_)), "{error:?}");
    assert!(vcpu.used() > 0);
    // It goes on once a second.
    ticks(&mut reaper);
    assert_eq!(vcpu.used(), 0);
}
