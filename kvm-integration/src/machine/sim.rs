// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest on the simulated kernel: threads that store into real memory, each store logged the
//! way KVM logs it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder, JoinHandle};

use anyhow::{Context, Result, bail};
use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::sim::{SimConfig, SimVcpu, SimVm, WriteError};
use kvm_dirty_ring::{Awake, DirtyLog, SlotId, VcpuRing};

use super::rate::{Dormitory, Throttle};
use super::{Guest, GuestSlot, Kick, Machine, Setup, unattached};
use crate::guest::memory::PAGE_SIZE;
use crate::guest::parking::{EndGuard, Parking, Want};
use crate::guest::stamp::{stamp, stamp_offset};

/// A guest on the simulated kernel.
pub struct SimMachine {
    vm: SimVm,
    log: DirtyLog,
    slots: Vec<GuestSlot>,
    threads: Vec<Thread>,
    dormitory: Arc<Dormitory>,
    /// While it is wanted out of the guest.
    awake: Option<Awake>,
}

struct Thread {
    index: u32,
    parking: Arc<Parking>,
    stores: Arc<AtomicU64>,
    thread: JoinHandle<Result<(), FullError>>,
}

impl SimMachine {
    /// Makes it and lets it run.
    pub fn start(setup: &Setup) -> Result<Self> {
        Self::with(setup, SimConfig::default())
    }

    /// The same on a kernel of another kind.
    pub(crate) fn with(setup: &Setup, mut config: SimConfig) -> Result<Self> {
        config.ring_entries = setup.ring_entries.get();
        let vm = SimVm::new(config);
        let log = vm.dirty_log();
        let mut this = Self {
            vm,
            log,
            slots: Vec::new(),
            threads: Vec::new(),
            dormitory: Arc::default(),
            awake: None,
        };
        for (id, region) in setup.regions() {
            this.log.add_slot(id, region.pages)?;
            this.vm.create_slot(id, region.pages);
            this.slots.push(GuestSlot::new(id, region)?);
        }
        for index in 0..setup.vcpus {
            let vcpu = this.vm.add_vcpu();
            let ring = this.log.attach_ring(vcpu.ring_memory());
            let guest = Program {
                index,
                ring: ring.with_context(|| unattached(index))?,
                vcpu,
                slots: this.slots.clone(),
                list: setup.list(index),
                chunk: setup.chunk(),
                throttle: setup.throttle(&this.dormitory),
                stores: Arc::default(),
            };
            this.threads.push(Thread::spawn(guest)?);
        }
        Ok(this)
    }

    /// Lets the next resets go wrong.
    #[cfg(test)]
    pub(crate) fn inject(&self, faults: impl IntoIterator<Item = kvm_dirty_ring::sim::ResetFault>) {
        self.vm.inject(faults);
    }

    fn tell(&self, want: Want) {
        for thread in &self.threads {
            thread.parking.tell(want);
        }
    }
}

impl Machine for SimMachine {
    fn log(&self) -> &DirtyLog {
        &self.log
    }

    fn kick(&self) -> Kick {
        let parkings = self
            .threads
            .iter()
            .map(|thread| Arc::clone(&thread.parking));
        let parkings: Vec<_> = parkings.collect();
        Box::new(move |vcpu| parkings[vcpu].kick())
    }
}

impl Guest for SimMachine {
    fn slots(&self) -> &[GuestSlot] {
        &self.slots
    }

    fn stores(&self) -> u64 {
        let stores = |thread: &Thread| thread.stores.load(Ordering::Relaxed);
        self.threads.iter().map(stores).sum()
    }

    fn check(&mut self) -> Result<()> {
        let ended = |thread: &Thread| thread.parking.ended();
        let Some(ended) = self.threads.iter().position(ended) else {
            return Ok(());
        };
        let Thread { index, thread, .. } = self.threads.swap_remove(ended);
        if let Ok(ended) = thread.join() {
            ended.with_context(|| format!("the full ring of vCPU {index} could not be emptied"))?;
        }
        // A panic has been on stderr already.
        bail!("a vCPU's thread has ended for no reason it could give")
    }

    fn pause(&mut self) -> Result<()> {
        self.tell(Want::Pause);
        self.dormitory.wake();
        self.awake = Some(self.log.keep_awake());
        for thread in &self.threads {
            thread.parking.wait_parked();
        }
        self.check()
    }

    fn resume(&mut self) {
        self.dormitory.calm();
        self.awake = None;
        self.tell(Want::Run);
    }

    fn protect(&mut self, slot: SlotId) -> Result<()> {
        self.vm.rearm_slot(slot);
        Ok(())
    }
}

impl Drop for SimMachine {
    fn drop(&mut self) {
        self.tell(Want::Stop);
        self.dormitory.wake();
        self.awake = Some(self.log.keep_awake());
        for thread in self.threads.drain(..) {
            // An error or a panic was for check() to report, which nobody called.
            let _ = thread.thread.join();
        }
    }
}

impl Thread {
    fn spawn(guest: Program) -> Result<Self> {
        let index = guest.index;
        let parking = Arc::<Parking>::default();
        let stores = Arc::clone(&guest.stores);
        let end_guard = EndGuard(Arc::clone(&parking));
        let thread = Builder::new().name(format!("sim-vcpu-{index}"));
        let thread = thread.spawn(move || guest.run(&end_guard.0));
        let thread = thread.context("a vCPU's thread could not be started: too many threads?")?;
        Ok(Self {
            index,
            parking,
            stores,
            thread,
        })
    }
}

/// What runs on one vCPU.
struct Program {
    index: u32,
    vcpu: SimVcpu,
    ring: VcpuRing,
    slots: Vec<GuestSlot>,
    list: Vec<u64>,
    chunk: u32,
    throttle: Throttle,
    stores: Arc<AtomicU64>,
}

impl Program {
    /// The tiny guest's loop.
    fn run(mut self, parking: &Parking) -> Result<(), FullError> {
        let mut stores = 0;
        for pass in 1.. {
            for n in 0..self.list.len() {
                if parking.is_wanted_out() {
                    // What a kick does: the hardware's buffer reaches the ring.
                    self.vcpu.exit();
                    if !parking.may_run() {
                        return Ok(());
                    }
                    self.ring.throttle();
                }
                self.store(self.list[n], pass)?;
                stores += 1;
                // Relaxed: read for the sake of the number alone.
                self.stores.store(stores, Ordering::Relaxed);
                if self.chunk > 0 && stores % u64::from(self.chunk) == 0 {
                    self.throttle.pay(self.chunk.into());
                }
            }
        }
        Ok(())
    }

    fn store(&mut self, gpa: u64, pass: u64) -> Result<(), FullError> {
        let (slot, page) = locate(&self.slots, gpa);
        let offset = page * PAGE_SIZE + stamp_offset(self.index);
        let store = || slot.memory.write_u64(offset, stamp(self.index, pass));
        loop {
            match self.vcpu.write_with(slot.id, page, store) {
                Ok(()) => return Ok(()),
                Err(WriteError::RingFull) => self.ring.on_full()?,
                Err(other) => unreachable!("lists hold pages of slots only: {other}"),
            }
        }
    }
}

/// The slot that has the page at `gpa`, and which of its pages that is.
fn locate(slots: &[GuestSlot], gpa: u64) -> (&GuestSlot, u64) {
    let page = |slot: &GuestSlot| gpa.checked_sub(slot.region.gpa).map(|at| at / PAGE_SIZE);
    slots
        .iter()
        .find_map(|slot| Some((slot, page(slot).filter(|&page| page < slot.region.pages)?)))
        .expect("lists hold addresses of slots only")
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use kvm_dirty_ring::{DirtyPages, RingEntries};

    use super::*;
    use crate::guest::workload::Workload;

    fn machine(vcpus: u32, write_rate: u64) -> SimMachine {
        let setup = Setup {
            vcpus,
            ring_entries: RingEntries::new(256).unwrap(),
            pages: 1000,
            workload: Workload::Random,
            seed: 1,
            write_rate,
        };
        SimMachine::start(&setup).unwrap()
    }

    fn wait(until: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !until() {
            assert!(Instant::now() < deadline, "it takes too long");
            std::thread::yield_now();
        }
    }

    #[test]
    fn pauses_stand_still_and_resumes_go_on() {
        let mut machine = machine(2, 0);
        for _ in 0..50 {
            machine.pause().unwrap();
            let still = machine.stores();
            std::thread::yield_now();
            assert_eq!(machine.stores(), still);
            machine.resume();
            wait(|| machine.stores() > still);
        }
        machine.check().unwrap();
    }

    #[test]
    fn a_machine_that_sleeps_is_paused_at_once() {
        // After each store a vCPU sleeps for half a minute and more.
        let mut machine = machine(32, 1);
        wait(|| machine.stores() > 0);
        let start = Instant::now();
        machine.pause().unwrap();
        drop(machine);
        assert!(start.elapsed() < Duration::from_secs(30), "it slept on");
    }

    #[test]
    fn every_store_is_logged() {
        let mut machine = machine(2, 0);
        let through = |thread: &Thread| thread.stores.load(Ordering::Relaxed) > 1000;
        wait(|| machine.threads.iter().all(through));
        machine.pause().unwrap();
        let mut dirty = DirtyPages::new();
        machine.log().sync(&mut dirty).unwrap();
        assert_eq!(dirty.page_count(), 1000);
        assert!(machine.log().stats().full_exits() > 0);
    }
}
