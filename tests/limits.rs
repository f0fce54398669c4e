// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Dirty limits with real threads, on the simulated kernel. Nothing here asserts how long something
//! takes: limits are such that a sleep would outlast the test, or none is due.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::error::{LimitError, LimiterError};
use kvm_dirty_ring::pacing::Adaptive;
use kvm_dirty_ring::sim::{ResetFault, SimConfig, SimVcpu, SimVm, WriteError};
use kvm_dirty_ring::{DirtyLog, DirtyPages, Limiter, Mode, Priority, Reaper, SlotId, VcpuRing};

const RAM: SlotId = SlotId::new(0, 0);
const PAGES: u64 = 100_000;

fn limit(pages_per_second: u64) -> Option<NonZeroU64> {
    NonZeroU64::new(pages_per_second)
}

struct Machine {
    vm: SimVm,
    log: DirtyLog,
}

impl Machine {
    fn new() -> Self {
        let mut config = SimConfig::default();
        config.ring_entries = 1024;
        let vm = SimVm::new(config);
        let log = vm.dirty_log();
        log.add_slot(RAM, PAGES).unwrap();
        vm.create_slot(RAM, PAGES);
        Self { vm, log }
    }

    fn vcpu(&self) -> (SimVcpu, VcpuRing) {
        let vcpu = self.vm.add_vcpu();
        let ring = self.log.attach_ring(vcpu.ring_memory()).unwrap();
        (vcpu, ring)
    }
}

/// The threads of vCPUs that write pages one after the other until they are stopped.
struct Running {
    stop: Arc<AtomicBool>,
    kicked: Vec<Arc<AtomicBool>>,
    threads: Vec<thread::JoinHandle<u64>>,
}

impl Running {
    fn start(machine: &Machine, vcpus: usize) -> Self {
        let mut this = Self {
            stop: Arc::default(),
            kicked: Vec::new(),
            threads: Vec::new(),
        };
        for _ in 0..vcpus {
            let (vcpu, ring) = machine.vcpu();
            let (stop, kicked) = (Arc::clone(&this.stop), Arc::<AtomicBool>::default());
            this.kicked.push(Arc::clone(&kicked));
            let body = move || run_vcpu(&vcpu, ring, &stop, &kicked);
            this.threads.push(thread::spawn(body));
        }
        this
    }

    fn kick(&self) -> impl FnMut(usize) + Send + 'static {
        let kicked = self.kicked.clone();
        move |vcpu: usize| kicked[vcpu].store(true, Ordering::Relaxed)
    }

    /// Ends them. How many pages each has written.
    fn stop(self, log: &DirtyLog) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let _awake = log.keep_awake();
        let threads = self.threads.into_iter();
        threads.map(|thread| thread.join().unwrap()).collect()
    }
}

fn run_vcpu(vcpu: &SimVcpu, mut ring: VcpuRing, stop: &AtomicBool, kicked: &AtomicBool) -> u64 {
    let mut written = 0;
    while !stop.load(Ordering::Relaxed) {
        if kicked.swap(false, Ordering::Relaxed) {
            ring.throttle();
            continue;
        }
        match vcpu.write(RAM, written % PAGES) {
            Ok(()) => written += 1,
            Err(WriteError::RingFull) => ring.on_full().unwrap(),
            Err(error) => panic!("{error}"),
        }
        if written % 64 == 0 {
            // Not so fast that a test has to write pages by the million.
            thread::sleep(Duration::from_micros(100));
        }
    }
    written
}

/// How long a test waits for what must come: never reached on a machine that gets on.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for something that is sure to come.
fn wait(what: &str, until: impl Fn() -> bool) {
    let start = Instant::now();
    while !until() {
        assert!(start.elapsed() < PATIENCE, "there is no {what}");
        thread::sleep(Duration::from_micros(200));
    }
}

/// Whether each vCPU that has a limit sleeps, for more than a second yet.
fn sleeps(log: &DirtyLog) -> bool {
    log.enforce_dirty_limits(|_| ()) > Some(Duration::from_secs(1))
}

fn slept(log: &DirtyLog, vcpu: usize) -> bool {
    log.stats().vcpus[vcpu].limited_ns > 0
}

#[test]
fn without_a_limit_nobody_sleeps() {
    let machine = Machine::new();
    let (vcpu, mut ring) = machine.vcpu();
    (0..500).for_each(|page| vcpu.write(RAM, page).unwrap());
    assert_eq!(ring.throttle(), Duration::ZERO);
    assert_eq!(machine.log.enforce_dirty_limits(|_| panic!("a kick")), None);
    assert_eq!(machine.log.stats().vcpus[0].dirty_limit, None);
}

/// A vCPU without kicks sleeps in its full exits, and that sleep is no stall.
#[test]
fn a_full_ring_is_paid_for() {
    let machine = Machine::new();
    let running = Running::start(&machine, 1);
    machine.log.set_dirty_limits(limit(1)).unwrap();
    wait("sleep", || sleeps(&machine.log));
    let asleep = machine.log.stats().vcpus[0];
    running.stop(&machine.log);
    let awake = machine.log.stats().vcpus[0];
    assert!(awake.limited_ns > 0 && awake.stall_ns > 0, "{awake:?}");
    assert_eq!(awake.stall_ns, asleep.stall_ns, "a sleep was a stall");
}

/// The VMM learns of a failure before its vCPU sleeps, here for seconds.
#[test]
fn a_full_exit_that_fails_is_told_at_once() {
    let machine = Machine::new();
    let (vcpu, mut ring) = machine.vcpu();
    machine.log.set_dirty_limits(limit(250)).unwrap();
    (0..500).for_each(|page| vcpu.write(RAM, page).unwrap());
    machine.vm.inject([ResetFault::Error(libc::ENOMEM)]);
    let failed = ring.on_full().unwrap_err();
    assert_eq!(failed.raw_os_error(), Some(libc::ENOMEM));
    assert_eq!(machine.log.stats().vcpus[0].limited_ns, 0);
}

/// What the vCPU has logged counts, whichever thread empties the ring.
#[test]
fn entries_that_others_took_are_owed() {
    let machine = Machine::new();
    let (vcpu, _ring) = machine.vcpu();
    machine.log.set_dirty_limits(limit(1)).unwrap();
    let owes = |what: &str| {
        let mut kicks = Vec::new();
        let next = machine.log.enforce_dirty_limits(|vcpu| kicks.push(vcpu));
        assert!(next.is_some());
        assert_eq!(kicks, [0], "no debt after {what}");
    };
    (0..500).for_each(|page| vcpu.write(RAM, page).unwrap());
    owes("writes");
    machine.log.reap().unwrap();
    owes("a pass");
    machine.log.sync(&mut DirtyPages::new()).unwrap();
    owes("a sync");
    // Lifting the limit forgives.
    machine.log.set_dirty_limits(None).unwrap();
    machine.log.set_dirty_limits(limit(1)).unwrap();
    machine
        .log
        .enforce_dirty_limits(|_| panic!("what was lifted came back"));
}

/// A limit of a page a second on a vCPU that writes thousands: its sleep would outlast any test.
#[test]
fn a_sleep_ends_when_the_limit_is_lifted_or_raised() {
    let machine = Machine::new();
    let running = Running::start(&machine, 2);
    for raised in [None, limit(u64::MAX)] {
        for vcpu in 0..2 {
            let written = || machine.log.stats().vcpus[vcpu].full_exits;
            let before = machine.log.stats().vcpus[vcpu].limited_ns;
            machine.log.set_dirty_limit(vcpu, limit(1)).unwrap();
            wait("sleep", || sleeps(&machine.log));
            let still = written();
            assert_eq!(machine.log.stats().vcpus[vcpu].limited_ns, before);
            machine.log.set_dirty_limit(vcpu, raised).unwrap();
            wait("full exit", || written() > still + 2);
            assert!(machine.log.stats().vcpus[vcpu].limited_ns > before);
            machine.log.set_dirty_limit(vcpu, None).unwrap();
        }
    }
    running.stop(&machine.log);
}

/// While somebody keeps them awake, vCPUs pay nothing, and owe all of it afterwards.
#[test]
fn nobody_sleeps_while_kept_awake() {
    let machine = Machine::new();
    let (vcpu, mut ring) = machine.vcpu();
    machine.log.set_dirty_limits(limit(1)).unwrap();
    (0..500).for_each(|page| vcpu.write(RAM, page).unwrap());
    let awake = machine.log.keep_awake();
    let still_awake = machine.log.keep_awake();
    drop(awake);
    ring.throttle();
    ring.on_full().unwrap();
    machine
        .log
        .enforce_dirty_limits(|_| panic!("a vCPU without a debt was kicked"));
    // As for vCPUs that come meanwhile.
    let (late, mut late_ring) = machine.vcpu();
    (500..900).for_each(|page| late.write(RAM, page).unwrap());
    late_ring.throttle();
    drop(still_awake);
    let mut kicks = Vec::new();
    machine.log.enforce_dirty_limits(|vcpu| kicks.push(vcpu));
    assert_eq!(kicks, [0, 1], "debts were forgotten");
}

/// A limiter beside a reaper that leaves no ring to fill: the vCPUs are stopped all the same, and
/// no page gets lost by it.
#[test]
fn a_limiter_holds_what_a_reaper_empties() {
    let machine = Machine::new();
    let running = Running::start(&machine, 2);
    let reaper = Reaper::spawn(&machine.log, Adaptive::default()).unwrap();
    let limiter = Limiter::spawn(&machine.log, running.kick()).unwrap();
    assert!(limiter.is_running());
    // Less than a vCPU writes on any machine.
    machine.log.set_dirty_limits(limit(1_000)).unwrap();
    wait("sleep of both", || {
        (0..2).all(|vcpu| slept(&machine.log, vcpu))
    });
    // From there to a standstill, which ends with the limit.
    machine.log.set_dirty_limits(limit(1)).unwrap();
    wait("standstill", || sleeps(&machine.log));
    machine.log.set_dirty_limits(None).unwrap();
    let entries = machine.log.stats().entries;
    wait("progress", || machine.log.stats().entries > entries + 4096);
    // A vCPU may be limited when no limiter runs any more.
    machine.log.set_dirty_limits(limit(1)).unwrap();
    limiter.stop().unwrap();
    let written = running.stop(&machine.log);
    reaper.stop().unwrap();
    let mut dirty = DirtyPages::new();
    machine.log.sync(&mut dirty).unwrap();
    let logged: u64 = machine.log.stats().vcpus.iter().map(|v| v.entries).sum();
    assert!(logged <= written.iter().sum());
    assert_eq!(machine.log.stats().suspect_pages, 0);
}

#[test]
fn a_limiter_waits_for_limits_and_survives_their_end() {
    let machine = Machine::new();
    let kicks = Arc::new(AtomicU64::new(0));
    let limiter = Limiter::spawn(&machine.log, {
        let kicks = Arc::clone(&kicks);
        move |vcpu| {
            assert_eq!(vcpu, 0);
            kicks.fetch_add(1, Ordering::Relaxed);
        }
    });
    let limiter = limiter.unwrap();
    machine.log.set_dirty_limits(limit(1)).unwrap();
    // It is found by a limiter that had nobody to look after.
    let (vcpu, _ring) = machine.vcpu();
    (0..500).for_each(|page| vcpu.write(RAM, page).unwrap());
    let kicked = |more: u64| {
        let before = kicks.load(Ordering::Relaxed);
        wait("kick", || kicks.load(Ordering::Relaxed) >= before + more);
    };
    // A kick that comes to nothing is repeated.
    kicked(3);
    machine.log.set_dirty_limits(None).unwrap();
    machine.log.set_dirty_limits(limit(1)).unwrap();
    (500..900).for_each(|page| vcpu.write(RAM, page).unwrap());
    kicked(3);
    limiter.stop().unwrap();
}

#[test]
fn a_priority_that_there_is_not_is_refused() {
    let machine = Machine::new();
    let limiter = Limiter::spawn_with(&machine.log, Priority::Fifo(100), |_| ());
    match limiter {
        Err(LimiterError::Scheduling { call, .. }) => {
            assert_eq!(call, "sched_setscheduler(SCHED_FIFO)");
        }
        other => panic!("{other:?}"),
    }
}

/// A vCPU that was unplugged owes what it owed, and has no thread any more.
#[test]
fn nobody_is_kicked_who_has_no_thread() {
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    let slot = SlotId::new(0, 0);
    log.add_slot(slot, 100).unwrap();
    vm.create_slot(slot, 100);
    let vcpu = vm.add_vcpu();
    let ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    log.set_dirty_limit(0, NonZeroU64::new(1)).unwrap();
    (0..30).for_each(|page| vcpu.write(slot, page).unwrap());
    let kicked = || {
        let mut kicked = Vec::new();
        let next = log.enforce_dirty_limits(|vcpu| kicked.push(vcpu));
        (kicked, next.is_some())
    };
    assert_eq!(kicked(), (vec![0], true));
    drop(ring);
    assert_eq!(kicked(), (vec![], false));
    let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    assert_eq!(kicked(), (vec![0], true), "its debt is forgotten");
}

#[test]
fn a_kick_that_panics_is_told() {
    let machine = Machine::new();
    let (vcpu, mut ring) = machine.vcpu();
    let limiter = Limiter::spawn(&machine.log, |_| {
        panic!("a kick's panic, which the test is about")
    });
    let limiter = limiter.unwrap();
    machine.log.set_dirty_limits(limit(1)).unwrap();
    (0..500).for_each(|page| vcpu.write(RAM, page).unwrap());
    wait("end of the limiter", || !limiter.is_running());
    assert!(matches!(limiter.stop(), Err(LimiterError::Panicked)));
    machine.log.set_dirty_limits(None).unwrap();
    assert_eq!(ring.throttle(), Duration::ZERO);
}

/// Dropping a limiter ends it at once, whatever it waits for.
#[test]
fn a_limiter_ends_at_once() {
    let machine = Machine::new();
    let (vcpu, _ring) = machine.vcpu();
    for all in [None, limit(1)] {
        machine.log.set_dirty_limits(all).unwrap();
        let first = if all.is_some() { 100 } else { 0 };
        (first..first + 100).for_each(|page| vcpu.write(RAM, page).unwrap());
        let (sender, looked) = mpsc::channel();
        let kick = move |_| sender.send(()).unwrap_or_default();
        let limiter = Limiter::spawn(&machine.log, kick).unwrap();
        if all.is_some() {
            looked.recv_timeout(PATIENCE).expect("a kick");
        }
        drop(limiter);
    }
}

#[test]
fn mistakes_are_told() {
    let machine = Machine::new();
    let _vcpu = machine.vcpu();
    let error = machine.log.set_dirty_limit(1, limit(9)).unwrap_err();
    assert_eq!(error, LimitError::NoVcpu { vcpu: 1, vcpus: 1 });
    let mut config = SimConfig::default();
    config.mode = Mode::Bitmap;
    let log = SimVm::new(config).dirty_log();
    assert_eq!(log.set_dirty_limits(limit(9)), Err(LimitError::Bitmap));
    assert_eq!(log.set_dirty_limit(0, None), Err(LimitError::Bitmap));
}
