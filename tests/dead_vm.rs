// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VM that KVM has declared dead: every call about it fails with EIO, for ever.

#[path = "common/readable.rs"]
mod readable;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::error::{FullError, ReaperError, SlotError, SyncError};
use kvm_dirty_ring::pacing::{Observation, Pacing};
use kvm_dirty_ring::sim::{ResetFault, SimConfig, SimVm};
use kvm_dirty_ring::{
    DirtyLog, DirtyPages, EventReaper, Kernel, LastPages, Mode, Reaper, Recycled, SlotId,
    WorkingSet,
};
use readable::is_readable;

const RAM: SlotId = SlotId::new(0, 0);
const DIMM: SlotId = SlotId::new(0, 1);
/// Has a member of the working set and, with rings, a suspect.
const VRAM: SlotId = SlotId::new(0, 2);

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

    /// Its log, with three slots.
    fn log(&self) -> DirtyLog {
        let log = DirtyLog::with_kernel(Box::new(self.clone()), 4096);
        for slot in [RAM, DIMM, VRAM] {
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

fn of_a_reaper(error: &ReaperError) -> Option<i32> {
    match error {
        ReaperError::Reset(error) => error.raw_os_error(),
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
            let (mut dirty, mut last) = (DirtyPages::new(), LastPages::new());
            // Page 7 becomes a member, page 8 is to be put back, and page 9 is found, but not read.
            log.set_working_set(Some(WorkingSet::new(1)));
            for pages in [7..8, 7..9] {
                pages.for_each(|page| vcpu.write(VRAM, page).unwrap());
                log.sync(&mut dirty).unwrap();
            }
            assert!(dirty.members().page_count() == 1 && dirty.contains(VRAM, 8));
            let unsent = core::mem::take(&mut dirty);
            kernel.vm.inject([ResetFault::AtEnd]);
            vcpu.write(VRAM, 9).unwrap();
            let mut found = log.sync_on_demand().unwrap();
            let suspects = log.stats().suspect_pages;
            assert_eq!(suspects > 0, mode == Mode::Rings, "{suspects}");
            vcpu.write(RAM, 5).unwrap();
            kernel.set_dead(true);
            let dead = || Err(io::Error::from_raw_os_error(libc::EIO));
            for round in 0..20 {
                let mut reaper = EventReaper::new(&log, Greedy).unwrap();
                let ticked = reaper.tick();
                drop(reaper);
                if mode == Mode::Rings {
                    let ticked = ticked.unwrap_err();
                    assert_eq!(of_a_reaper(&ticked), Some(libc::EIO), "{ticked:?}");
                    let full = ring.on_full().unwrap_err();
                    assert!(matches!(full, FullError::Reset(_)), "{full:?}");
                    assert_eq!(full.raw_os_error(), Some(libc::EIO));
                    assert_eq!(log.reap().unwrap_err().raw_os_error(), Some(libc::EIO));
                    let finished = log.finish_slot(&retired).unwrap_err();
                    assert_eq!(of_a_slot(&finished), Some(libc::EIO));
                    let failed = [
                        log.rearm(|_| dead()).unwrap_err(),
                        log.rearm_from(1, |_| dead()).unwrap_err(),
                    ];
                    assert_eq!(failed.each_ref().map(of_a_slot), [Some(libc::EIO); 2]);
                    // It makes no reset.
                    log.last_sync(&mut last).unwrap();
                    assert!(last.contains(RAM, 5));
                } else {
                    // There is nothing to be reset, nor suspect.
                    ticked.unwrap();
                    assert_eq!(log.rearm(|_| dead()).unwrap(), 0);
                    assert_eq!(log.rearm_from(1, |_| dead()).unwrap(), 0);
                    let failed = [
                        log.last_sync(&mut last).unwrap_err(),
                        found.next_chunk(64).map(drop).unwrap_err(),
                    ];
                    assert_eq!(failed.each_ref().map(of_a_sync), [Some(libc::EIO); 2]);
                }
                let failed = [
                    log.sync(&mut dirty).unwrap_err(),
                    log.sync_on_demand().map(drop).unwrap_err(),
                ];
                assert_eq!(failed.each_ref().map(of_a_sync), [Some(libc::EIO); 2]);
                let failed = [
                    log.sync_retired(&retired, &mut dirty).unwrap_err(),
                    log.retire_slot(RAM).map(drop).unwrap_err(),
                    log.stop_tracking(RAM, dead).unwrap_err(),
                    log.start_tracking(RAM, dead).unwrap_err(),
                    log.refresh(|_| dead()).unwrap_err(),
                ];
                assert_eq!(
                    failed.each_ref().map(of_a_slot),
                    [Some(libc::EIO); 5],
                    "{failed:?}"
                );
                // Of a slot that is not tracked any more there is nothing to be asked.
                log.start_tracking(RAM, || Ok(())).unwrap();
                // These ask the kernel for nothing.
                log.rearmed(RAM).unwrap();
                log.put_back(&unsent).unwrap();
                log.add_slot(SlotId::new(0, 3 + round), 10).unwrap();
            }
            // Nothing was lost, should it be a mistake.
            kernel.set_dead(false);
            let mut read = Vec::new();
            while let Some(chunk) = found.next_chunk(64).unwrap() {
                let runs = chunk.runs().filter(|run| run.slot == VRAM);
                read.extend(runs.flat_map(|run| run.first_page..run.first_page + run.pages));
            }
            assert!(read.contains(&9), "{read:?}");
            log.sync(&mut dirty).unwrap();
            for page in [(RAM, 5), (VRAM, 7), (VRAM, 8)] {
                assert!(dirty.contains(page.0, page.1), "{page:?}");
            }
        });
    }
}

/// An id that entries have named before the log had it is not given away while they can't be recycled.
#[test]
fn a_slot_that_entries_have_named_is_not_added() {
    ends(|| {
        let kernel = Mortal::new(Mode::Rings);
        let log = kernel.log();
        let vcpu = kernel.vm.add_vcpu();
        let _ring = log.attach_ring(vcpu.ring_memory()).unwrap();
        let late = SlotId::new(0, 3);
        vcpu.garble_next(late.raw(), 1);
        vcpu.write(RAM, 5).unwrap();
        kernel.set_dead(true);
        log.reap().unwrap_err();
        for _ in 0..20 {
            let refused = log.add_slot(late, 10).unwrap_err();
            assert_eq!(of_a_slot(&refused), Some(libc::EIO), "{refused:?}");
        }
        kernel.set_dead(false);
        log.add_slot(late, 10).unwrap();
    });
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

#[test]
fn a_reaper_without_a_thread_leaves_a_dead_vm_alone() {
    ends(|| {
        let kernel = Mortal::new(Mode::Rings);
        let log = kernel.log();
        let vcpu = kernel.vm.add_vcpu();
        let mut ring = log.attach_ring(vcpu.ring_memory()).unwrap();
        kernel.set_dead(true);
        vcpu.write(RAM, 5).unwrap();
        let mut reaper = EventReaper::new(&log, Greedy).unwrap();
        let ticks = |reaper: &mut EventReaper| {
            assert!(
                is_readable(reaper, Duration::from_secs(60)),
                "it does not wake up"
            );
            reaper.tick()
        };
        let delay = || Duration::from_nanos(log.stats().reaper.delay_ns);
        while delay() <= Duration::from_millis(500) {
            let refused = ticks(&mut reaper).unwrap_err();
            assert_eq!(of_a_reaper(&refused), Some(libc::EIO), "{refused:?}");
            let failed = log.stats().failed_resets;
            assert!(
                failed <= 12,
                "it has tried {failed} times, the next in {:?}",
                delay()
            );
        }
        // Nor does a storm of full exits wake it up.
        let looks = log.stats().reaper.looks;
        for _ in 0..1000 {
            ring.on_full().unwrap_err();
            if is_readable(&reaper, Duration::from_millis(1)) {
                reaper.tick().unwrap_err();
            }
        }
        let looks = log.stats().reaper.looks - looks;
        assert!(looks < 100, "it was woken {looks} times");
        // Alive again, it is served as before.
        kernel.set_dead(false);
        vcpu.write(RAM, 6).unwrap();
        while vcpu.used() > 0 || delay() >= Duration::from_millis(1) {
            ticks(&mut reaper).unwrap();
        }
        let mut dirty = DirtyPages::new();
        log.sync(&mut dirty).unwrap();
        assert!(dirty.contains(RAM, 5) && dirty.contains(RAM, 6));
    });
}
