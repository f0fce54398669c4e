// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest on the simulated kernel, tormented in ways that a real kernel can't be made to.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{self, Builder, JoinHandle};

use anyhow::{Context, Result, anyhow};
use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::sim::{ResetFault, SimConfig, SimVcpu, SimVm, WriteError};
use kvm_dirty_ring::{DirtyLog, Mode, SlotId, VcpuRing};

use super::fault::{Counts, Fault};
use super::helpers::nap;
use super::ledger::Instance;
use super::plan::{Kind, Plan};
use super::world::{Job, STAYS_OUT, Vcpu, World};
use kvm_integration::guest::memory::PAGE_SIZE;
use kvm_integration::guest::parking::{EndGuard, Parking, Want};
use kvm_integration::guest::stamp::{stamp, stamp_offset};
use kvm_integration::host::storm::this_thread;
use kvm_integration::random::SplitMix64;

/// Where in a page the guest stores that writes inside resets: behind vCPUs and devices.
const RESET_LANE: u32 = 63;

/// One reset in so many lasts longer.
const LINGERS: u64 = 50;

/// One full exit in so many, a careless vCPU runs on instead.
const CARELESSNESS: u64 = 16;

/// A vCPU stores so often at the most before it rests for so many microseconds at the most: a reset
/// waits for vCPUs, and there are more of them than CPUs.
const MOST_IN_A_ROW: u64 = 400;
const LONGEST_REST: u64 = 100;

/// A slot that no machine here has, and a page that no slot has.
const GARBAGE: [(u32, u64); 2] = [(0x7777, 3), (1, 1 << 40)];

/// A machine on the simulated kernel.
pub struct SimWorld {
    vm: SimVm,
    log: DirtyLog,
    memory: Arc<Slots>,
    resets: Arc<Mutex<InReset>>,
}

/// The memory behind each slot.
type Slots = RwLock<BTreeMap<SlotId, Arc<Instance>>>;

/// The vCPU that writes inside resets, and its pages.
struct InReset {
    on: bool,
    vcpus: Vec<(u32, SimVcpu)>,
    /// The one that stays, and the last one that came.
    slots: Vec<Arc<Instance>>,
    stores: u64,
    random: SplitMix64,
    counts: Arc<Counts>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SimWorld {
    pub fn new(mode: Mode, plan: &Plan, counts: &Arc<Counts>) -> Self {
        let mut config = SimConfig::default();
        config.ring_entries = plan.ring_entries;
        config.reserved = plan.ring_entries / 4;
        config.first_index = plan.first_index;
        config.pml = plan.pml;
        config.mode = mode;
        config.ignores_voids = plan.ignores_voids;
        config.manual_protect = plan.manual_protect;
        let vm = SimVm::new(config);
        let resets = Arc::new(Mutex::new(InReset {
            on: false,
            vcpus: Vec::new(),
            slots: Vec::new(),
            stores: 0,
            random: SplitMix64(plan.seed),
            counts: Arc::clone(counts),
        }));
        if plan.writes_in_resets {
            let resets = Arc::clone(&resets);
            vm.on_reset(move |_| lock(&resets).linger().write());
        }
        Self {
            log: vm.dirty_log(),
            vm,
            memory: Arc::default(),
            resets,
        }
    }
}

impl InReset {
    /// Makes some resets last, so that many threads wait for them.
    fn linger(&mut self) -> &mut Self {
        if self.random.below(LINGERS) == 0 {
            nap(self.random.below(400));
        }
        self
    }

    /// Writes a few pages.
    fn write(&mut self) {
        if !self.on || self.vcpus.is_empty() || self.slots.is_empty() {
            return;
        }
        for _ in 0..self.random.below(4) {
            let (_, vcpu) = &self.vcpus[self.random.below(self.vcpus.len() as u64) as usize];
            let slot = &self.slots[self.random.below(self.slots.len() as u64) as usize];
            let page = self.random.below(slot.pages());
            self.stores += 1;
            let offset = page * PAGE_SIZE + stamp_offset(RESET_LANE);
            let store = || slot.memory.write_u64(offset, self.stores);
            // A vCPU with a full ring stays out.
            if vcpu.write_with(slot.id, page, store).is_ok() {
                self.counts.add(Fault::WritesInResets);
            }
        }
    }
}

impl World for SimWorld {
    fn log(&self) -> &DirtyLog {
        &self.log
    }

    fn add_slot(&self, slot: &Arc<Instance>) -> Result<()> {
        self.vm.create_slot(slot.id, slot.pages());
        let mut memory = self.memory.write().unwrap_or_else(PoisonError::into_inner);
        memory.insert(slot.id, Arc::clone(slot));
        let slots = &mut lock(&self.resets).slots;
        slots.truncate(1);
        slots.push(Arc::clone(slot));
        Ok(())
    }

    fn remove_slot(&self, id: SlotId) -> Result<()> {
        self.vm.delete_slot(id);
        let mut memory = self.memory.write().unwrap_or_else(PoisonError::into_inner);
        memory.remove(&id);
        lock(&self.resets).slots.retain(|slot| slot.id != id);
        Ok(())
    }

    fn rearm_slot(&self, id: SlotId) -> Result<()> {
        self.vm.rearm_slot(id);
        Ok(())
    }

    fn start_vcpu(&self, job: Job) -> Result<Box<dyn Vcpu>> {
        let index = job.index;
        let vcpu = self.vm.add_vcpu();
        let ring = self.log.attach_ring(vcpu.ring_memory());
        let ring =
            ring.with_context(|| format!("the ring of vCPU {index} could not be attached"))?;
        let guest = Guest {
            vcpu: vcpu.clone(),
            ring,
            memory: Arc::clone(&self.memory),
            full_exits: 0,
            careless_stores: 0,
            ring_entries: self.log.ring_entries().into(),
            random: SplitMix64(index.into()),
            job,
        };
        lock(&self.resets).vcpus.push((index, vcpu.clone()));
        let parking = Arc::<Parking>::default();
        let tid = Arc::<AtomicI32>::default();
        let thread = Builder::new().name(format!("sim-vcpu-{index}")).spawn({
            let (end_guard, tid) = (EndGuard(Arc::clone(&parking)), Arc::clone(&tid));
            move || {
                // Relaxed: nothing comes with it.
                tid.store(this_thread(), Ordering::Relaxed);
                guest.run(&end_guard.0);
            }
        });
        let thread = thread.context("a vCPU's thread could not be started: too many threads?")?;
        Ok(Box::new(SimThread {
            index,
            vcpu,
            resets: Arc::clone(&self.resets),
            parking,
            tid,
            thread: Some(thread),
        }))
    }

    fn inject(&self, fault: ResetFault) -> Result<()> {
        self.vm.inject([fault]);
        Ok(())
    }

    fn write_in_resets(&self, on: bool) {
        let mut resets = lock(&self.resets);
        resets.on = on;
        if !on {
            // These stays in the guest end as any other does.
            resets.vcpus.iter().for_each(|(_, vcpu)| vcpu.exit());
        }
    }
}

/// What runs on a vCPU's thread.
struct Guest {
    vcpu: SimVcpu,
    ring: VcpuRing,
    memory: Arc<Slots>,
    job: Job,
    full_exits: u64,
    /// Stores until it looks at the soft limit again.
    careless_stores: u64,
    ring_entries: u64,
    random: SplitMix64,
}

impl Guest {
    fn run(mut self, parking: &Parking) {
        let mut left = 0;
        for pass in 1.. {
            for n in 0..self.job.list.len() {
                if left == 0 {
                    left = 1 + self.random.below(MOST_IN_A_ROW);
                    nap(self.random.below(LONGEST_REST));
                }
                left -= 1;
                if !self.store(self.job.list[n], pass, parking) {
                    return;
                }
            }
        }
    }

    /// Stores to a page, once there is room in the ring; false if it is to stop.
    fn store(&mut self, gpa: u64, pass: u64, parking: &Parking) -> bool {
        let id = SlotId::from_raw((gpa >> 32) as u32);
        let page = (gpa & u64::from(u32::MAX)) / PAGE_SIZE;
        let index = self.job.index;
        let offset = page * PAGE_SIZE + stamp_offset(index);
        loop {
            if parking.is_wanted_out() {
                self.heed_the_limit();
                // What a kick does: the hardware's buffer reaches the ring.
                self.vcpu.exit();
                if !parking.may_run() {
                    return false;
                }
            }
            // After a pause the slot may be another one.
            let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
            let slot = memory
                .get(&id)
                .expect("a slot that is gone is not stored to");
            let store = || slot.memory.write_u64(offset, stamp(index, pass));
            match self.vcpu.write_with(id, page, store) {
                Ok(()) => break,
                Err(WriteError::RingFull) => {
                    drop(memory);
                    self.leave();
                }
                Err(error) => unreachable!("lists hold pages of slots only: {error}"),
            }
        }
        self.careless_stores = self.careless_stores.saturating_sub(1);
        if self.careless_stores == 0 {
            self.heed_the_limit();
        }
        true
    }

    fn heed_the_limit(&mut self) {
        self.careless_stores = 0;
        if self.job.kind == Kind::Careless {
            self.vcpu.ignore_soft_limit(false);
        }
    }

    /// The ring is full.
    fn leave(&mut self) {
        self.full_exits += 1;
        let counts = &self.job.counts;
        if self.job.kind == Kind::Careless && self.full_exits % CARELESSNESS == 0 {
            self.careless_stores = 1 + self.random.below(self.ring_entries);
            self.vcpu.ignore_soft_limit(true);
            return;
        }
        let abandons = self.job.abandons;
        if abandons > 0
            && self.full_exits % abandons == 1 % abandons
            && self.ring.harvest_and_stop() > 0
        {
            counts.add(Fault::PassesAbandoned);
        }
        match self.ring.on_full() {
            Ok(()) => {}
            // It has no way back into the guest, which the episode goes on without.
            Err(FullError::Broken { .. }) => thread::park_timeout(STAYS_OUT),
            // The next exit tries again.
            Err(_) => thread::yield_now(),
        }
    }
}

struct SimThread {
    index: u32,
    vcpu: SimVcpu,
    resets: Arc<Mutex<InReset>>,
    parking: Arc<Parking>,
    tid: Arc<AtomicI32>,
    thread: Option<JoinHandle<()>>,
}

impl SimThread {
    fn end(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        // Nobody is to run it from here on: it would not leave the guest again.
        let index = self.index;
        lock(&self.resets)
            .vcpus
            .retain(|(other, _)| *other != index);
        self.parking.tell(Want::Stop);
        let joined = thread.join();
        self.vcpu.exit();
        // A panic has been on stderr already.
        joined.map_err(|_| anyhow!("a vCPU's thread has panicked"))
    }
}

impl Vcpu for SimThread {
    fn request_pause(&self) {
        self.parking.tell(Want::Pause);
    }

    fn wait_paused(&self) -> bool {
        let is_parked = self.parking.wait_parked();
        // It may have been parked before, and have written inside resets since.
        self.vcpu.exit();
        is_parked
    }

    fn resume(&self) {
        self.parking.tell(Want::Run);
    }

    fn tid(&self) -> libc::pid_t {
        // Relaxed: a signal at no thread yet does no harm.
        self.tid.load(Ordering::Relaxed)
    }

    fn stop(mut self: Box<Self>) -> Result<()> {
        self.end()
    }

    fn garble_next(&self, pick: u64) -> bool {
        let (slot, page) = GARBAGE[(pick % 2) as usize];
        self.vcpu.garble_next(slot, page);
        true
    }
}

impl Drop for SimThread {
    fn drop(&mut self) {
        // A panic was for stop() to report, which nobody called.
        let _ = self.end();
    }
}
