//! How an arm tracks what the guest writes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use kvm_dirty_ring::pacing::{Observation, Pacing};
use kvm_dirty_ring::{DirtyPages, Priority, SlotId};

use super::guest::StressedGuest;
use crate::guest::vm::TinyVm;
use crate::guestperf::arm::{Arm, Tracking};
use crate::machine::Guest;
use crate::migration::Tracker;
use crate::page_set::PageSet;
use crate::reaping::Shape;
use crate::reaping::full_exit::FullExits;
use crate::reaping::reaper::Reaping;

/// An arm at work.
pub(super) struct ArmTracker {
    source: Source,
    reaping: Option<Reaping>,
    /// CPU time of the reaper, once it has stopped.
    pub(super) reaper_cpu: Duration,
    /// Ioctls of bitmap mode, and pages that they found.
    pub(super) ioctls: u64,
    pub(super) pages: u64,
}

/// Who knows what was written.
enum Source {
    /// KVM: without rings.
    Bitmap(Arc<TinyVm>, Vec<SlotId>),
    /// The crate's log.
    Log(Arc<FullExits>, DirtyPages),
    /// The bitmap that full exits keep under QEMU's lock.
    UnderLock(Arc<FullExits>),
}

/// How long a policy sleeps just now; nobody has asked one yet: 0.
pub(super) type Delay = Arc<AtomicU64>;

impl ArmTracker {
    /// Makes ready to track `guest`, whose writes are logged from then on. `delay` is told what the
    /// policy says.
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
                    Shape::OwnRing => Source::Log(Arc::clone(full_exits), DirtyPages::new()),
                    Shape::AllRings => {
                        full_exits.keep_bitmap(Some(PageSet::new(guest.slots())));
                        Source::UnderLock(Arc::clone(full_exits))
                    }
                };
                let priority = Priority::Inherited;
                let reaping = Reaping::start(full_exits, shape, Box::new(told), priority, cpus);
                (source, Some(reaping.context("the reaper did not start")?))
            }
            _ => {
                let slots = guest.slots().iter().map(|slot| slot.id).collect();
                (Source::Bitmap(Arc::clone(&guest.vm), slots), None)
            }
        };
        Ok(Self {
            source,
            reaping,
            reaper_cpu: Duration::ZERO,
            ioctls: 0,
            pages: 0,
        })
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
            Source::Log(full_exits, found) => {
                full_exits.log().sync(found)?;
                dirty.add(found);
            }
            Source::UnderLock(full_exits) => full_exits.sync(dirty)?,
        }
        Ok(())
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
