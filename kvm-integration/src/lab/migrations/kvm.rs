// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests on real KVM.

use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvm_dirty_ring::pacing::Adaptive;
use kvm_dirty_ring::{DirtyLog, DirtyPages, LastPages, Mode, RingEntries, SlotId};
use kvm_ioctls::Kvm;
use serde::Serialize;

use super::arm::Arm;
use super::load::Load;
use super::measure::{Figures, Subject, measure, measured};
use super::{PAGES, RING_ENTRIES};
use crate::cli::interrupt::go_on;
use crate::guest::memory::PAGE_SIZE;
use crate::guest::workload::{Region, Workload};
use crate::host::check_available;
use crate::machine::{Guest, GuestSlot, Kick, KvmMachine, Logging, Machine, Writes, regions};
use crate::migration::Rings;

/// Migrates a guest with that load.
pub fn run(kvm: &Kvm, load: Load, arm: &Arm, interrupted: &AtomicBool) -> Result<Figures> {
    check_available("the guest and its copy take", (2 * PAGES * PAGE_SIZE) >> 20)?;
    let writes = load.writes();
    let logging = match arm.mode {
        Mode::Rings => Logging::Rings,
        _ => Logging::Bitmap,
    };
    let entries = RingEntries::new(RING_ENTRIES)?;
    let measured = measured(&writes);
    let mut guest = KvmGuest {
        has_busy: writes[measured[0]].chunk() == 0,
        measured,
        machine: KvmMachine::with(kvm, logging, entries, PAGES, writes)?,
    };
    measure(&mut guest, arm, interrupted)
}

struct KvmGuest {
    machine: KvmMachine,
    measured: Vec<usize>,
    /// Whether these write as fast as they can. What others take of the machine slows them down, which is no
    /// matter of theirs; those that sleep make up for it.
    has_busy: bool,
}

impl Subject for KvmGuest {
    fn set_tracked(&mut self, tracked: bool) -> Result<()> {
        self.machine.set_tracked(tracked)
    }

    fn tracker(&self) -> Result<Rings> {
        let rings = Rings::start(self.machine.log(), Adaptive::default());
        rings.context("the reaper did not start")
    }

    fn progress(&self) -> Result<(u64, Option<Duration>)> {
        let (mut stores, mut time) = (0, Duration::ZERO);
        for &vcpu in &self.measured {
            let (by_one, cpu) = self.machine.progress(vcpu)?;
            stores += by_one;
            time += cpu;
        }
        Ok((stores, self.has_busy.then_some(time)))
    }
}

impl Machine for KvmGuest {
    fn log(&self) -> &DirtyLog {
        self.machine.log()
    }

    fn kick(&self) -> Kick {
        self.machine.kick()
    }
}

impl Guest for KvmGuest {
    fn slots(&self) -> &[GuestSlot] {
        self.machine.slots()
    }

    fn stores(&self) -> u64 {
        self.machine.stores()
    }

    fn check(&mut self) -> Result<()> {
        self.machine.check()
    }

    fn pause(&mut self) -> Result<()> {
        self.machine.pause()
    }

    fn resume(&mut self) {
        self.machine.resume();
    }

    fn protect(&mut self, slot: SlotId) -> Result<()> {
        self.machine.protect(slot)
    }
}

/// What a last sync of a stopped guest takes, and what an ordinary one does. The rings are full but for a few entries.
#[derive(Debug, Clone, Serialize)]
pub struct LastSync {
    /// How many rings.
    pub rings: u32,
    /// Of so many entries.
    pub ring_entries: u32,
    /// `last_sync`.
    pub last_sync: Timed,
    /// `sync`, of the rings filled anew.
    pub sync: Timed,
}

/// A sync that was timed.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Timed {
    /// Pages that it has found.
    pub pages: u64,
    /// How full the rings were: 1, but on a machine that is slow.
    pub full: f64,
    /// How long it took, in milliseconds.
    pub ms: f64,
}

impl LastSync {
    /// What an entry takes the last sync, by what it takes an ordinary one.
    pub fn quotient(&self) -> f64 {
        let each = |timed: &Timed| timed.ms / timed.pages as f64;
        each(&self.last_sync) / each(&self.sync)
    }
}

/// So many entries of a ring stay free: KVM's reserve, and some more.
const FREE: u32 = 640;
/// How long filling the rings may take; what is in them then has to do.
const LONGEST_FILL: Duration = Duration::from_secs(20);

/// Fills `rings` rings, stops, and makes a last sync; then, called off, the same with an ordinary one.
pub fn last_sync(
    kvm: &Kvm,
    rings: u32,
    ring_entries: RingEntries,
    interrupted: &AtomicBool,
) -> Result<LastSync> {
    let share = u64::from(ring_entries.get() - FREE);
    let all = share * u64::from(rings);
    check_available("the guest takes", (all * PAGE_SIZE) >> 20)?;
    let regions: Vec<Region> = regions(all).map(|(_, region)| region).into();
    let writes = |vcpu| Writes {
        list: Workload::Walk.addresses(0, vcpu, rings, &regions, share as usize),
        per_second: 0.0,
    };
    let writes = (0..rings).map(writes).collect();
    let mut machine = KvmMachine::with(kvm, Logging::Rings, ring_entries, all, writes)?;
    let timed = |begin: Instant, pages: u64| Timed {
        ms: begin.elapsed().as_secs_f64() * 1e3,
        pages,
        full: pages as f64 / all as f64,
    };
    let (mut found, mut last) = (DirtyPages::new(), LastPages::new());

    fill_rings(&mut machine, rings, share, interrupted)?;
    let begin = Instant::now();
    machine.log().last_sync(&mut last)?;
    let last_sync = timed(begin, last.page_count());
    machine.log().sync(&mut found)?;
    let again = found.page_count();
    ensure!(
        again == last_sync.pages,
        "the last sync has found {} pages, a sync after it {again}",
        last_sync.pages
    );

    machine.resume();
    fill_rings(&mut machine, rings, share, interrupted)?;
    let begin = Instant::now();
    machine.log().sync(&mut found)?;
    Ok(LastSync {
        rings,
        ring_entries: ring_entries.get(),
        last_sync,
        sync: timed(begin, found.page_count()),
    })
}

/// Waits until each vCPU has been to all its `share` pages, and stops it.
fn fill_rings(
    machine: &mut KvmMachine,
    rings: u32,
    share: u64,
    interrupted: &AtomicBool,
) -> Result<()> {
    let stores = |machine: &KvmMachine, vcpu| Ok::<_, anyhow::Error>(machine.progress(vcpu)?.0);
    let vcpus = 0..rings as usize;
    let before: Vec<u64> = vcpus
        .map(|vcpu| stores(machine, vcpu))
        .collect::<Result<_>>()?;
    let begin = Instant::now();
    while begin.elapsed() < LONGEST_FILL {
        go_on(interrupted)?;
        machine.check()?;
        let mut is_through = true;
        for (vcpu, before) in before.iter().enumerate() {
            is_through &= stores(machine, vcpu)? >= before + share;
        }
        if is_through {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    machine.pause()
}
