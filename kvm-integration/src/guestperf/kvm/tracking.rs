// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How an arm tracks what the guest writes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use kvm_dirty_ring::pacing::{Observation, Pacing};
use kvm_dirty_ring::{DirtyLog, DirtyPages, LastPages, Mode, Priority, SlotId, WorkingSet};

use super::guest::StressedGuest;
use crate::guest::vm::TinyVm;
use crate::guestperf::arm::{Arm, Tracking};
use crate::machine::Guest;
use crate::migration::{Open, Tracker, refresh_log};
use crate::page_set::PageSet;
use crate::reaping::Shape;
use crate::reaping::full_exit::FullExits;
use crate::reaping::reaper::Reaping;

/// An arm at work.
pub(super) struct ArmTracker {
    source: Source,
    reaping: Option<Reaping>,
    leaves_open: bool,
    /// CPU time of the reaper, once it has stopped.
    pub(super) reaper_cpu: Duration,
    /// Ioctls of bitmap mode, and pages that they found.
    pub(super) ioctls: u64,
    pub(super) pages: u64,
}

/// Where the written pages are recorded.
enum Source {
    /// KVM: without rings.
    Bitmap(Arc<TinyVm>, Vec<SlotId>),
    /// The crate's log.
    Log(Arc<FullExits>, Box<Pages>),
    /// The bitmap that full exits keep under QEMU's lock.
    UnderLock(Arc<FullExits>),
}

/// What syncs of the crate's log find.
#[derive(Default)]
struct Pages {
    found: DirtyPages,
    last: LastPages,
}

/// How long a policy sleeps just now; nobody has asked one yet: 0.
pub(super) type Delay = Arc<AtomicU64>;

impl ArmTracker {
    /// Makes ready to track `guest`, whose writes are logged from then on. `delay` receives what the
    /// policy returns.
    pub(super) fn start(
        arm: &Arm,
        guest: &StressedGuest,
        cpus: &[usize],
        delay: &Delay,
    ) -> Result<Self> {
        let (source, reaping) = match (arm.tracking, &guest.full_exits) {
            (Tracking::Rings(shape, policy), Some(full_exits)) => {
                let told = Told {
                    policy: policy.make(),
                    delay: Arc::clone(delay),
                };
                let source = match shape {
                    Shape::OwnRing => Source::Log(Arc::clone(full_exits), Box::default()),
                    Shape::AllRings => {
                        full_exits.keep_bitmap(Some(PageSet::new(guest.slots())));
                        Source::UnderLock(Arc::clone(full_exits))
                    }
                };
                let priority = Priority::Inherited;
                let reaping = Reaping::start(full_exits, shape, Box::new(told), priority, cpus);
                (source, Some(reaping.context("the reaper did not start")?))
            }
            (Tracking::Bitmap, Some(full_exits)) => {
                (Source::Log(Arc::clone(full_exits), Box::default()), None)
            }
            _ => {
                let slots = guest.slots().iter().map(|slot| slot.id).collect();
                (Source::Bitmap(Arc::clone(&guest.vm), slots), None)
            }
        };
        Ok(Self {
            source,
            reaping,
            leaves_open: arm.leaves_open,
            reaper_cpu: Duration::ZERO,
            ioctls: 0,
            pages: 0,
        })
    }
}

impl ArmTracker {
    /// The log that may leave pages open.
    fn open_log(&self) -> Option<&DirtyLog> {
        match &self.source {
            Source::Log(full_exits, _) if self.leaves_open => Some(full_exits.log()),
            _ => None,
        }
    }

    /// A sync that found so many pages, if the log has a bitmap: rings count by themselves.
    fn count_bits(&mut self, pages: u64) {
        if self
            .open_log()
            .is_some_and(|log| log.mode() == Mode::Bitmap)
        {
            // The first one reports all there is, whatever KVM has found.
            self.pages += if self.ioctls > 0 { pages } else { 0 };
            self.ioctls += 1;
        }
    }
}

impl Tracker for ArmTracker {
    fn sync(&mut self, dirty: &mut PageSet) -> Result<()> {
        match &mut self.source {
            Source::Bitmap(vm, slots) => {
                for &slot in &*slots {
                    let words = vm.dirty_bitmap(slot.raw())?;
                    dirty.add_words(slot, &words);
                    let found: u32 = words.iter().map(|word| word.count_ones()).sum();
                    self.ioctls += 1;
                    self.pages += u64::from(found);
                }
            }
            Source::Log(full_exits, pages) => {
                full_exits.log().sync(&mut pages.found)?;
                dirty.add_runs(pages.found.others().runs());
                let count = pages.found.others().page_count();
                self.count_bits(count);
            }
            Source::UnderLock(full_exits) => full_exits.sync(dirty)?,
        }
        Ok(())
    }

    fn last_sync(&mut self, dirty: &mut PageSet) -> Result<()> {
        let Source::Log(full_exits, pages) = &mut self.source else {
            return self.sync(dirty);
        };
        if !self.leaves_open {
            // As it always was, so that arms can be compared with older figures.
            return self.sync(dirty);
        }
        full_exits.log().last_sync(&mut pages.last)?;
        dirty.add_runs(pages.last.runs());
        let count = pages.last.page_count();
        self.count_bits(count);
        Ok(())
    }

    fn set_working_set(&mut self, terms: Option<WorkingSet>) {
        if let Some(log) = self.open_log() {
            log.set_working_set(terms);
        }
    }

    fn open(&self) -> Open {
        match &self.source {
            Source::Log(full_exits, pages) => Open::of(full_exits.log(), &pages.found),
            _ => Open::default(),
        }
    }

    fn refresh_stops_the_guest(&self) -> bool {
        self.open_log().is_none_or(|log| log.mode() == Mode::Rings)
    }

    fn refresh(&mut self, protect: &mut dyn FnMut(SlotId) -> io::Result<()>) -> Result<()> {
        match self.open_log() {
            Some(log) => refresh_log(log, protect),
            None => Ok(()),
        }
    }

    fn is_suspicious(&self) -> bool {
        match &self.source {
            Source::Log(full_exits, _) => full_exits.log().stats().suspect_pages > 0,
            _ => false,
        }
    }

    fn rearm(&mut self, protect: &mut dyn FnMut(SlotId) -> io::Result<()>) -> Result<()> {
        if let Source::Log(full_exits, _) = &self.source {
            full_exits.log().rearm(protect)?;
        }
        Ok(())
    }

    fn quiesce(&mut self) -> Result<()> {
        if let Some(reaping) = self.reaping.take() {
            // A thread that has ended has no time any more.
            self.reaper_cpu = reaping.cpu()?;
            reaping.stop()?;
        }
        Ok(())
    }
}

impl Drop for ArmTracker {
    fn drop(&mut self) {
        if let Source::UnderLock(full_exits) = &self.source {
            full_exits.keep_bitmap(None);
        }
    }
}

/// A policy whose word is written down.
struct Told {
    policy: Box<dyn Pacing>,
    delay: Delay,
}

impl Pacing for Told {
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
        let delay = self.policy.decide(seen, reap);
        // Relaxed: a number by itself.
        self.delay.store(delay.as_nanos() as u64, Ordering::Relaxed);
        delay
    }
}
