// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest of the simulated kernel in virtual time: the same each time, and with the price of each fault.
//!
//! The log is the crate's, the memory real; only the time that things take is made up. Time goes by while the link is
//! waited for, and the guest runs then. A ring is emptied when it is full, within no time, as if by a reaper that is
//! always in time.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::sim::{SimConfig, SimVcpu, SimVm, WriteError};
use kvm_dirty_ring::{DirtyLog, SlotId, VcpuRing};

use super::arm::Arm;
use super::load::Load;
use super::measure::{Figures, Subject, measure, measured};
use super::{PAGES, RING_ENTRIES};
use crate::guest::memory::PAGE_SIZE;
use crate::guest::stamp::{stamp, stamp_offset};
use crate::machine::{Guest, GuestSlot, Kick, Machine, Writes, regions};
use crate::migration::Rings;

/// What a write takes: much, so that there are not too many.
const WRITE: Duration = Duration::from_nanos(2_400);
/// What a fault takes, the write to a page that is protected: about as on kvm_pvm.
const FAULT: Duration = Duration::from_nanos(19_200);
/// A sync, beside which the guest runs.
const SYNC: Duration = Duration::from_millis(1);
/// To protect a slot anew, at a refresh, the guest stopped.
const PROTECT: Duration = Duration::from_millis(1);
/// vCPUs run in turns of this.
const TURN: Duration = Duration::from_micros(500);
/// So much later than it is due may a store be made up for.
const CREDIT: Duration = Duration::from_millis(20);

/// Migrates a guest with that load.
pub fn run(load: Load, arm: &Arm, interrupted: &AtomicBool) -> Result<Figures> {
    let mut guest = SimGuest::new(&load.writes(), arm)?;
    measure(&mut guest, arm, interrupted)
}

/// The guest.
pub struct SimGuest {
    vm: SimVm,
    log: DirtyLog,
    slots: Vec<GuestSlot>,
    vcpus: Vec<Vcpu>,
    measured: Vec<usize>,
    begin: Instant,
    /// Virtual time since then.
    clock: Duration,
    is_paused: bool,
    /// Why a vCPU can't go on.
    failed: Option<FullError>,
}

struct Vcpu {
    index: u32,
    vcpu: SimVcpu,
    ring: VcpuRing,
    /// Slot, by its place, and page.
    list: Vec<(usize, u64)>,
    stores: u64,
    /// Up to when it has run.
    clock: Duration,
    /// When the next store is due, and from one to the next; zero: at once.
    due: Duration,
    interval: Duration,
}

impl SimGuest {
    /// A guest that writes this.
    pub fn new(writes: &[Writes], arm: &Arm) -> Result<Self> {
        let mut config = SimConfig::default();
        config.ring_entries = RING_ENTRIES;
        config.mode = arm.mode;
        let vm = SimVm::new(config);
        let mut this = Self {
            log: vm.dirty_log(),
            vm,
            slots: Vec::new(),
            vcpus: Vec::new(),
            measured: measured(writes),
            begin: Instant::now(),
            clock: Duration::ZERO,
            is_paused: false,
            failed: None,
        };
        for (id, region) in regions(PAGES) {
            this.log.add_slot(id, region.pages)?;
            this.vm.create_slot(id, region.pages);
            this.slots.push(GuestSlot::new(id, region)?);
        }
        for (index, writes) in (0..).zip(writes) {
            let vcpu = this.vm.add_vcpu();
            let rate = writes.per_second;
            this.vcpus.push(Vcpu {
                index,
                ring: this.log.attach_ring(vcpu.ring_memory())?,
                vcpu,
                list: writes.list.iter().map(|&gpa| this.locate(gpa)).collect(),
                stores: 0,
                clock: Duration::ZERO,
                due: Duration::ZERO,
                interval: match rate {
                    0.0 => Duration::ZERO,
                    rate => Duration::from_secs_f64(1.0 / rate),
                },
            });
        }
        Ok(this)
    }

    fn locate(&self, gpa: u64) -> (usize, u64) {
        let page = |slot: &GuestSlot| Some(gpa.checked_sub(slot.region.gpa)? / PAGE_SIZE);
        let has = |slot: &GuestSlot| page(slot).is_some_and(|page| page < slot.region.pages);
        let mut slots = self.slots.iter().enumerate();
        let found = slots.find(|(_, slot)| has(slot));
        let located = found.and_then(|(at, slot)| Some((at, page(slot)?)));
        located.expect("lists hold addresses of slots only")
    }

    /// Lets the guest run for so long, or stand still if it is paused.
    fn go_by(&mut self, time: Duration) {
        let end = self.clock + time;
        while self.clock < end && !self.is_paused && self.failed.is_none() {
            self.clock = end.min(self.clock + TURN);
            for at in 0..self.vcpus.len() {
                if let Err(error) = self.turn(at) {
                    self.failed = Some(error);
                }
            }
        }
        self.clock = end;
    }

    fn turn(&mut self, at: usize) -> Result<(), FullError> {
        let vcpu = &mut self.vcpus[at];
        while vcpu.clock.max(vcpu.due) < self.clock {
            let begin = vcpu.clock.max(vcpu.due);
            if !vcpu.interval.is_zero() {
                vcpu.due = vcpu.due.max(begin.saturating_sub(CREDIT)) + vcpu.interval;
            }
            let faults = vcpu.store(&self.vm, &self.slots)?;
            let fault = if faults { FAULT } else { Duration::ZERO };
            vcpu.clock = begin + WRITE + fault;
        }
        Ok(())
    }
}

impl Vcpu {
    /// Writes the next page. Whether that is a fault.
    fn store(&mut self, vm: &SimVm, slots: &[GuestSlot]) -> Result<bool, FullError> {
        let length = self.list.len() as u64;
        let (slot, page) = self.list[(self.stores % length) as usize];
        let slot = &slots[slot];
        let value = stamp(self.index, self.stores / length + 1);
        let offset = page * PAGE_SIZE + stamp_offset(self.index);
        let faults = vm.is_protected(slot.id, page) == Some(true);
        let store = || slot.memory.write_u64(offset, value);
        loop {
            match self.vcpu.write_with(slot.id, page, store) {
                Ok(()) => break,
                Err(WriteError::RingFull) => self.ring.on_full()?,
                Err(other) => unreachable!("lists hold pages of slots only: {other}"),
            }
        }
        self.stores += 1;
        Ok(faults)
    }
}

impl Subject for SimGuest {
    fn set_tracked(&mut self, tracked: bool) -> Result<()> {
        for slot in &self.slots {
            let switch = || {
                self.vm.set_logged(slot.id, tracked);
                Ok(())
            };
            match tracked {
                true => self.log.start_tracking(slot.id, switch)?,
                false => self.log.stop_tracking(slot.id, switch)?,
            }
        }
        Ok(())
    }

    fn tracker(&self) -> Result<Rings> {
        Ok(Rings::without_reaper(&self.log))
    }

    fn progress(&self) -> Result<(u64, Option<Duration>)> {
        let stores = self.measured.iter().map(|&at| self.vcpus[at].stores);
        Ok((stores.sum(), None))
    }
}

impl Machine for SimGuest {
    fn log(&self) -> &DirtyLog {
        &self.log
    }

    fn kick(&self) -> Kick {
        // It runs where it is looked at, and at no other time.
        Box::new(|_| ())
    }
}

impl Guest for SimGuest {
    fn slots(&self) -> &[GuestSlot] {
        &self.slots
    }

    fn stores(&self) -> u64 {
        self.vcpus.iter().map(|vcpu| vcpu.stores).sum()
    }

    /// The sync that follows takes its time.
    fn check(&mut self) -> Result<()> {
        self.go_by(SYNC);
        match self.failed.take() {
            Some(error) => Err(error).context("a full ring could not be emptied"),
            None => Ok(()),
        }
    }

    fn pause(&mut self) -> Result<()> {
        self.is_paused = true;
        self.vcpus.iter().for_each(|vcpu| vcpu.vcpu.exit());
        Ok(())
    }

    fn resume(&mut self) {
        self.is_paused = false;
        for vcpu in &mut self.vcpus {
            vcpu.clock = vcpu.clock.max(self.clock);
        }
    }

    fn protect(&mut self, slot: SlotId) -> Result<()> {
        self.vm.rearm_slot(slot);
        self.go_by(PROTECT);
        Ok(())
    }

    fn now(&self) -> Instant {
        self.begin + self.clock
    }

    fn wait_until(&mut self, until: Instant) {
        self.go_by(until.saturating_duration_since(self.now()));
    }
}
