// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VM that KVM has declared dead: every call about it fails with EIO, for ever.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::error::{FullError, SlotError, SyncError};
use kvm_dirty_ring::pacing::{Observation, Pacing};
use kvm_dirty_ring::sim::{SimConfig, SimVm};
use kvm_dirty_ring::{DirtyLog, DirtyPages, Kernel, LastPages, Mode, Reaper, Recycled, SlotId};

const RAM: SlotId = SlotId::new(0, 0);
const DIMM: SlotId = SlotId::new(0, 1);

#[derive(Clone)]
struct Mortal {
    vm: SimVm,
    is_dead: Arc<AtomicBool>,
}

impl Mortal {
    fn new(mode: Mode) -> Self {
        let mut config = SimConfig::default();
        config.mode = mode;
        Self {
            vm: SimVm::new(config),
            is_dead: Arc::default(),
        }
    }

    /// Its log, with two slots.
    fn log(&self) -> DirtyLog {
        let log = DirtyLog::with_kernel(Box::new(self.clone()), 4096);
        for slot in [RAM, DIMM] {
            log.add_slot(slot, 100).unwrap();
            self.vm.create_slot(slot, 100);
        }
        log
    }

    fn set_dead(&self, is_dead: bool) {
        self.is_dead.store(is_dead, Ordering::SeqCst);
    }

    fn alive(&self) -> io::Result<&SimVm> {
        match self.is_dead.load(Ordering::SeqCst) {
            true => Err(io::Error::from_raw_os_error(libc::EIO)),
            false => Ok(&self.vm),
        }
    }
}

impl Kernel for Mortal {
    fn reset(&self) -> io::Result<Recycled> {
        self.alive()?.reset()
    }

    fn mode(&self) -> Mode {
        self.vm.mode()
    }

    fn take_bitmap(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> io::Result<()> {
        self.alive()?.take_bitmap(slot, pages, words)
    }

    fn read_bitmap(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> io::Result<()> {
        self.alive()?.read_bitmap(slot, pages, words)
    }

    fn clear_bitmap(&self, slot: SlotId, pages: u64, words: &mut [u64]) -> io::Result<()> {
        self.alive()?.clear_bitmap(slot, pages, words)
    }
}

/// Runs it, and fails if it takes for ever.
fn ends(deed: impl FnOnce() + Send + 'static) {
    let (done, is_done) = mpsc::channel();
    let thread = thread::spawn(move || {
        deed();
        let _ = done.send(());
    });
    if let Err(mpsc::RecvTimeoutError::Timeout) = is_done.recv_timeout(Duration::from_secs(60)) {
        panic!("a call does not return");
    }
    thread.join().unwrap();
}

fn of_a_slot(error: &SlotError) -> Option<i32> {
    match error {
        SlotError::Reset(error) => error.raw_os_error(),
        SlotError::Bitmap(error) => error.raw_os_error(),
        SlotError::Protect { source, .. } | SlotError::Switch { source, .. } => {
            source.raw_os_error()
        }
        _ => None,
    }
}

fn of_a_sync(error: &SyncError) -> Option<i32> {
    match error {
        SyncError::Reset(error) => error.raw_os_error(),
        SyncError::Bitmap(error) => error.raw_os_error(),
        _ => None,
    }
}

/// Each call returns, whichever it is and however often, with the reason.
#[test]
fn every_call_returns_and_says_why() {
    for mode in [Mode::Rings, Mode::Bitmap] {
        ends(move || {
            let kernel = Mortal::new(mode);
            let log = kernel.log();
            let vcpu = kernel.vm.add_vcpu();
            let mut ring = log.attach_ring(vcpu.ring_memory()).unwrap();
            let retired = log.retire_slot(DIMM).unwrap();
            vcpu.write(RAM, 5).unwrap();
            kernel.set_dead(true);
            let dead = || Err(io::Error::from_raw_os_error(libc::EIO));
            let (mut dirty, mut last) = (DirtyPages::new(), LastPages::new());
            for _ in 0..20 {
                if mode == Mode::Rings {
                    let full = ring.on_full().unwrap_err();
                    assert!(matches!(full, FullError::Reset(_)), "{full:?}");
                    assert_eq!(full.raw_os_error(), Some(libc::EIO));
                    assert_eq!(log.reap().unwrap_err().raw_os_error(), Some(libc::EIO));
                    let finished = log.finish_slot(&retired).unwrap_err();
                    assert_eq!(of_a_slot(&finished), Some(libc::EIO));
                    // It makes no reset.
                    log.last_sync(&mut last).unwrap();
                    assert!(last.contains(RAM, 5));
                }
                assert_eq!(
                    of_a_sync(&log.sync(&mut dirty).unwrap_err()),
                    Some(libc::EIO)
                );
                let failed = [
                    log.sync_retired(&retired, &mut dirty).unwrap_err(),
                    log.retire_slot(RAM).map(drop).unwrap_err(),
                    log.stop_tracking(RAM, dead).unwrap_err(),
                    log.start_tracking(RAM, dead).unwrap_err(),
                ];
                assert_eq!(
                    failed.each_ref().map(of_a_slot),
                    [Some(libc::EIO); 4],
                    "{failed:?}"
                );
                // Of a slot that is not tracked any more there is nothing to be asked.
                log.start_tracking(RAM, || Ok(())).unwrap();
            }
            // Nothing was lost, should it be a mistake.
            kernel.set_dead(false);
            log.sync(&mut dirty).unwrap();
            assert!(dirty.contains(RAM, 5));
        });
    }
}

/// Wants all rings, and as often as it may.
struct Greedy;

impl Pacing for Greedy {
    fn decide(&mut self, _: &Observation<'_>, reap: &mut [bool]) -> Duration {
        reap.fill(true);
        Duration::from_micros(100)
    }
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{what} in a minute"
        );
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_reaper_leaves_a_dead_vm_alone() {
    let kernel = Mortal::new(Mode::Rings);
    let log = kernel.log();
    let vcpu = kernel.vm.add_vcpu();
    let mut ring = log.attach_ring(vcpu.ring_memory()).unwrap();
    kernel.set_dead(true);
    let reaper = Reaper::spawn(&log, Greedy).unwrap();
    vcpu.write(RAM, 5).unwrap();
    wait_until("it tries on", || reaper.stats().delay_ns > 500_000_000);
    let failed = log.stats().failed_resets;
    assert!(failed <= 12, "it has tried {failed} times meanwhile");
    // Nor does a storm of full exits wake it up.
    let looks = reaper.stats().looks;
    for _ in 0..1000 {
        ring.on_full().unwrap_err();
        thread::sleep(Duration::from_millis(1));
    }
    let looks = reaper.stats().looks - looks;
    assert!(looks < 100, "it was woken {looks} times");
    // Alive again, it is served as before.
    kernel.set_dead(false);
    vcpu.write(RAM, 6).unwrap();
    wait_until("it does not come back", || {
        vcpu.used() == 0 && reaper.stats().delay_ns < 1_000_000
    });
    reaper.stop().unwrap();
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    assert!(dirty.contains(RAM, 5) && dirty.contains(RAM, 6));
}
