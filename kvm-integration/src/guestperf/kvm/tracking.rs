//! How an arm tracks what the guest writes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvm_dirty_ring::pacing::{Observation, Pacing};
use kvm_dirty_ring::{Reaper, SlotId};

use super::error::GuestperfError;
use super::guest::{Rings, StressedGuest};
use crate::cores::Cores;
use crate::cpu_time::CpuTime;
use crate::guestperf::arm::{Arm, Tracking};
use crate::machine::Guest;
use crate::migration::{self, Tracker, TrackerError};
use crate::page_set::PageSet;
use crate::policy::Policy;
use crate::shape::Shape;
use crate::shape::full::FullExits;
use crate::shape::qemu::QemuReaper;
use crate::vm::TinyVm;

/// The reaper's thread, by which its CPU time is found.
const REAPER: &str = "reaper";

/// An arm at work.
pub(super) struct ArmTracker {
    tracker: Box<dyn Tracker>,
    cpu: Option<CpuTime>,
    reaper_cpu: Option<Duration>,
    /// Ioctls of bitmap mode, and pages that they found.
    pub(super) bitmap: Arc<BitmapCounts>,
}

/// Relaxed: each is a number by itself.
#[derive(Debug, Default)]
pub(super) struct BitmapCounts {
    pub(super) ioctls: AtomicU64,
    pub(super) pages: AtomicU64,
}

/// How long a policy sleeps just now; nobody has asked one yet: 0.
pub(super) type Delay = Arc<AtomicU64>;

impl ArmTracker {
    /// Makes ready to track `guest`, whose writes are logged from then on. `delay` is told what the
    /// policy says.
    pub(super) fn start(
        arm: &Arm,
        guest: &StressedGuest,
        cores: &Cores,
        delay: &Delay,
    ) -> Result<Self, GuestperfError> {
        let bitmap = Arc::<BitmapCounts>::default();
        let cpus = cores.of_reaper(guest.progress().len() as u32);
        let tracker: Box<dyn Tracker> =
            match (arm.tracking, &guest.rings) {
                (Tracking::Rings(Shape::OwnRing, policy), Some(rings)) => {
                    rings.full_exits.set_shape(Shape::OwnRing);
                    let builder = Reaper::builder().name(REAPER).cpus(cpus.iter().copied());
                    let reaper = builder.spawn(&rings.log, Told::new(policy, delay))?;
                    Box::new(migration::Rings::with(&rings.log, reaper))
                }
                (Tracking::Rings(Shape::AllRings, policy), Some(rings)) => Box::new(
                    UnderLock::start(guest, rings, Told::new(policy, delay), cpus)?,
                ),
                _ => Box::new(KvmBitmap {
                    vm: Arc::clone(&guest.vm),
                    slots: guest.slots().iter().map(|slot| slot.id).collect(),
                    counts: Arc::clone(&bitmap),
                }),
            };
        let cpu = match arm.tracking {
            Tracking::Bitmap => None,
            Tracking::Rings(..) => Some(CpuTime::named(REAPER).ok_or(GuestperfError::CpuTime)?),
        };
        Ok(Self {
            tracker,
            cpu,
            reaper_cpu: None,
            bitmap,
        })
    }

    /// CPU time of the reaper, which has stopped.
    pub(super) fn reaper_cpu(&self) -> Result<Duration, GuestperfError> {
        match &self.cpu {
            None => Ok(Duration::ZERO),
            Some(_) => self.reaper_cpu.ok_or(GuestperfError::CpuTime),
        }
    }
}

impl Tracker for ArmTracker {
    fn sync(&mut self, dirty: &mut PageSet) -> Result<(), TrackerError> {
        self.tracker.sync(dirty)
    }

    fn is_suspicious(&self) -> bool {
        self.tracker.is_suspicious()
    }

    fn rearm(
        &mut self,
        protect: &mut dyn FnMut(SlotId) -> io::Result<()>,
    ) -> Result<(), TrackerError> {
        self.tracker.rearm(protect)
    }

    fn quiesce(&mut self) -> Result<(), TrackerError> {
        // A thread that has ended has no time any more.
        self.reaper_cpu = self.cpu.as_ref().and_then(CpuTime::read);
        self.tracker.quiesce()
    }
}

/// Bitmap mode.
struct KvmBitmap {
    vm: Arc<TinyVm>,
    slots: Vec<SlotId>,
    counts: Arc<BitmapCounts>,
}

impl Tracker for KvmBitmap {
    fn sync(&mut self, dirty: &mut PageSet) -> Result<(), TrackerError> {
        for &slot in &self.slots {
            let words = self.vm.dirty_bitmap(slot.raw())?;
            dirty.add_words(slot, &words);
            let found: u32 = words.iter().map(|word| word.count_ones()).sum();
            self.counts.ioctls.fetch_add(1, Ordering::Relaxed);
            self.counts.pages.fetch_add(found.into(), Ordering::Relaxed);
        }
        Ok(())
    }

    fn quiesce(&mut self) -> Result<(), TrackerError> {
        Ok(())
    }
}

/// Rings in QEMU's shape.
struct UnderLock {
    full_exits: Arc<FullExits>,
    reaper: Option<QemuReaper>,
}

impl UnderLock {
    fn start(
        guest: &StressedGuest,
        rings: &Rings,
        policy: Told,
        cpus: &[usize],
    ) -> Result<Self, GuestperfError> {
        let full_exits = Arc::clone(&rings.full_exits);
        full_exits.set_shape(Shape::AllRings);
        full_exits.keep_bitmap(Some(PageSet::new(guest.slots())));
        let reaper = QemuReaper::spawn(REAPER, &rings.log, &full_exits, Box::new(policy), cpus);
        let reaper = Some(reaper.map_err(GuestperfError::os("starting a thread"))?);
        Ok(Self { full_exits, reaper })
    }
}

impl Tracker for UnderLock {
    fn sync(&mut self, dirty: &mut PageSet) -> Result<(), TrackerError> {
        Ok(self.full_exits.sync(dirty)?)
    }

    fn quiesce(&mut self) -> Result<(), TrackerError> {
        match self.reaper.take() {
            Some(reaper) => Ok(reaper.stop()?),
            None => Ok(()),
        }
    }
}

impl Drop for UnderLock {
    fn drop(&mut self) {
        self.full_exits.keep_bitmap(None);
    }
}

/// A policy whose word is written down.
struct Told {
    policy: Box<dyn Pacing>,
    delay: Delay,
}

impl Told {
    fn new(policy: Policy, delay: &Delay) -> Self {
        Self {
            policy: policy.make(),
            delay: Arc::clone(delay),
        }
    }
}

impl Pacing for Told {
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
        let delay = self.policy.decide(seen, reap);
        // Relaxed: a number by itself.
        self.delay.store(delay.as_nanos() as u64, Ordering::Relaxed);
        delay
    }
}
