// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Threads beside the one that conducts an episode: devices that write, and others that sync.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use kvm_dirty_ring::DirtyLog;

use super::copier::{Copier, Kind};
use super::fault::{Counts, Fault};
use super::ledger::Ledger;
use kvm_integration::guest::memory::PAGE_SIZE;
use kvm_integration::guest::stamp::{MAX_VCPUS, stamp_offset};
use kvm_integration::host::storm::this_thread;
use kvm_integration::random::SplitMix64;

/// Pages that a device writes at once, at the most.
const MOST_AT_ONCE: u64 = 40;

/// What such a thread does.
#[derive(Debug, Clone, Copy)]
pub enum Helper {
    /// Writes, as the device of this number.
    Device(u32),
    /// Syncs, and copies.
    Syncer,
    /// Empties the rings.
    Reaper,
}

/// What they share with the conductor.
pub struct Shared<'a> {
    pub log: &'a DirtyLog,
    pub ledger: &'a Ledger,
    pub counts: &'a Counts,
    /// Whether they are to end.
    pub over: AtomicBool,
    /// Their ids in the kernel.
    pub tids: Mutex<Vec<libc::pid_t>>,
}

impl Shared<'_> {
    /// Does it until it is over.
    pub fn help(&self, helper: Helper, random: SplitMix64) -> Result<()> {
        self.enrol();
        match helper {
            Helper::Device(device) => self.write(device, random)?,
            Helper::Syncer => self.sync(random)?,
            Helper::Reaper => self.reap(random),
        }
        Ok(())
    }

    fn enrol(&self) {
        let mut tids = self.tids.lock().unwrap_or_else(PoisonError::into_inner);
        tids.push(this_thread());
    }

    fn is_over(&self) -> bool {
        // Relaxed: nothing comes with it.
        self.over.load(Ordering::Relaxed)
    }

    /// Syncs and copies until it is over.
    fn sync(&self, mut random: SplitMix64) -> Result<()> {
        let mut copier = Copier::new(self.log, self.ledger);
        while !self.is_over() {
            if random.below(3) > 0 {
                copier.round(Kind::Others)?;
                self.counts.add(Fault::ConcurrentSyncs);
            } else {
                // To the end, or not.
                let chunks = [1 + random.below(3), u64::MAX][random.below(2) as usize];
                copier.round_on_demand(chunks, 64 << random.below(4))?;
                self.counts.add(Fault::SyncsOnDemand);
            }
            nap(random.below(2) * random.below(4000));
        }
        Ok(())
    }

    /// Empties the rings until it is over, as often as a careless VMM would.
    fn reap(&self, mut random: SplitMix64) {
        while !self.is_over() {
            // Should its reset be one that is made to fail, the pages come with a later one.
            let _ = self.log.reap();
            self.counts.add(Fault::ConcurrentPasses);
            nap(random.below(4) * random.below(300));
        }
    }

    /// Writes pages and marks them, as device number `device`, until it is over.
    fn write(&self, device: u32, mut random: SplitMix64) -> Result<()> {
        let lane = stamp_offset(MAX_VCPUS + device);
        let mut stamp = 0;
        while !self.is_over() {
            let open = self.ledger.open.read();
            let open = open.unwrap_or_else(PoisonError::into_inner);
            if let Some(slot) = open.get(random.below(open.len() as u64) as usize) {
                let first = random.below(slot.pages());
                let pages = (1 + random.below(MOST_AT_ONCE)).min(slot.pages() - first);
                for page in first..first + pages {
                    stamp += 1;
                    slot.memory.write_u64(page * PAGE_SIZE + lane, stamp);
                }
                self.log.mark_dirty(slot.id, first, pages)?;
                self.counts.add(Fault::DeviceWrites);
            }
            drop(open);
            nap(random.below(1500));
        }
        Ok(())
    }
}

/// Sleeps for so many microseconds, through signals too: `sleep` begins anew after each.
pub fn nap(us: u64) {
    match us {
        0 => thread::yield_now(),
        us => thread::park_timeout(Duration::from_micros(us)),
    }
}
