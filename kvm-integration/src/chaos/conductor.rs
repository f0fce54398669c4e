//! An episode, from the making of the guest to the last comparison.

use std::fs;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Builder, ScopedJoinHandle};

use kvm_dirty_ring::error::ReaperError;
use kvm_dirty_ring::sim::ResetFault;
use kvm_dirty_ring::{DirtyLog, Reaper, SlotId, Stats};

use super::copier::{Copier, retry};
use super::error::ChaosError;
use super::fault::{Counts, Fault};
use super::helpers::{Helper, Shared, nap};
use super::ledger::{Instance, Ledger, gpa};
use super::plan::{Act, Plan, Round, StormKind, VcpuPlan};
use super::policies::PolicyPlan;
use super::world::{CHUNK, Job, LONGEST_LIST, Vcpu, World};
use super::{Episode, Finding};
use crate::machine::MachineError;
use crate::random::SplitMix64;
use crate::storm::{Storm, this_thread};
use crate::workload::Region;

/// The reaper's thread, by which it is found.
const REAPER: &str = "chaos-reaper";

/// A slot that the log is not told of.
const UNTOLD: SlotId = SlotId::new(0, 100);
const UNTOLD_PAGES: u64 = 8;

/// Whoever does what the plan says.
pub(super) struct Conductor<'a> {
    world: &'a dyn World,
    plan: &'a Plan,
    counts: &'a Arc<Counts>,
    shared: &'a Shared<'a>,
    log: &'a DirtyLog,
    ledger: &'a Ledger,
    copier: Copier<'a>,
    /// Never none: the first one is not dropped.
    vcpus: Vec<Running>,
    /// The next one of those that come late.
    late: usize,
    /// vCPUs made so far.
    made: u32,
    stays: Vec<Arc<Instance>>,
    goes: Vec<Going>,
    /// The slot that the log is not told of.
    untold: Option<Arc<Instance>>,
    reaper: Option<Reaper>,
    /// With how many acts to go.
    storm: Option<(StormKind, u64, Storm)>,
    /// Entries garbled so far, at the most.
    garbled: u64,
    episode: Episode,
}

struct Running {
    vcpu: Box<dyn Vcpu>,
    plan: VcpuPlan,
}

/// A slot that comes and goes.
#[derive(Default)]
struct Going {
    there: Option<Arc<Instance>>,
    times: u64,
}

/// Ends the helpers, also if the conductor panics.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        // Relaxed: nothing comes with it.
        self.0.store(true, Ordering::Relaxed);
    }
}

impl<'a> Conductor<'a> {
    /// Makes the episode.
    pub(super) fn run(
        world: &dyn World,
        plan: &Plan,
        counts: &Arc<Counts>,
    ) -> Result<Episode, ChaosError> {
        let ledger = Ledger::default();
        let shared = Shared {
            log: world.log(),
            ledger: &ledger,
            counts,
            over: AtomicBool::new(false),
            tids: Mutex::new(vec![this_thread()]),
        };
        let mut conductor = Conductor {
            world,
            plan,
            counts,
            shared: &shared,
            log: world.log(),
            ledger: &ledger,
            copier: Copier::new(world.log(), &ledger),
            vcpus: Vec::new(),
            late: 0,
            made: 0,
            stays: Vec::new(),
            goes: Vec::new(),
            untold: None,
            reaper: None,
            storm: None,
            garbled: 0,
            episode: Episode::default(),
        };
        conductor.begin()?;
        let played = thread::scope(|scope| {
            let over = Over(&shared.over);
            let mut helpers = Vec::new();
            let devices = (0..plan.devices).map(Helper::Device);
            let syncers = (0..plan.syncers).map(|_| Helper::Syncer);
            let reapers = (0..plan.reapers).map(|_| Helper::Reaper);
            for (place, helper) in devices.chain(syncers).chain(reapers).enumerate() {
                let random = SplitMix64(plan.seed ^ place as u64);
                let thread = Builder::new().name(format!("chaos-helper-{place}"));
                let shared = &shared;
                let thread = thread.spawn_scoped(scope, move || shared.help(helper, random));
                helpers.push(thread.map_err(ChaosError::Spawn)?);
            }
            let played = plan
                .rounds
                .iter()
                .try_for_each(|round| conductor.play(round));
            drop(over);
            let join = |helper: ScopedJoinHandle<'_, Result<(), ChaosError>>| {
                helper.join().unwrap_or(Err(ChaosError::Panicked))
            };
            // Whose error came first nobody can tell; the conductor's own has more to say.
            let helped = helpers.into_iter().map(join).collect::<Vec<_>>();
            played?;
            helped.into_iter().collect::<Result<(), _>>()
        });
        let ended = conductor.end();
        played?;
        ended
    }

    fn begin(&mut self) -> Result<(), ChaosError> {
        for &pages in &self.plan.stays {
            let id = SlotId::new(0, 1 + self.stays.len() as u16);
            let instance = self.add_slot(id, pages, false)?;
            self.ledger.close().push(Arc::clone(&instance));
            self.stays.push(instance);
        }
        if self.plan.untold {
            let instance = Arc::new(Instance::new(UNTOLD, UNTOLD_PAGES)?);
            self.world.add_slot(&instance)?;
            self.untold = Some(instance);
        }
        self.goes = self.plan.goes.iter().map(|_| Going::default()).collect();
        for (slot, plan) in self.plan.goes.iter().enumerate() {
            if let Some(pages) = plan.at_first {
                self.add(slot, pages)?;
            }
        }
        if let Some(policy) = self.plan.policy {
            self.start_reaper(policy)?;
        }
        for &vcpu in &self.plan.vcpus {
            self.start_vcpu(vcpu)?;
        }
        self.world.write_in_resets(true);
        Ok(())
    }

    /// Tears all down, and counts up.
    fn end(mut self) -> Result<Episode, ChaosError> {
        self.world.write_in_resets(false);
        self.storm = None;
        for running in std::mem::take(&mut self.vcpus) {
            running.vcpu.stop()?;
        }
        if let Some(reaper) = self.reaper.take() {
            stopped(reaper)?;
        }
        let stats = self.log.stats();
        self.episode.entries = stats.entries;
        let strange_entries = strange_entries(&stats);
        if self.garbled > 0 || self.untold.is_some() {
            self.counts.add_many(Fault::EntryOfNoSlot, strange_entries);
        } else if stats.overruns == 0 {
            self.episode.strange_entries = strange_entries;
        }
        let counted = [
            (Fault::FullExit, stats.full_exits()),
            (Fault::RingOverrun, stats.overruns),
            (Fault::ShortReset, stats.short_resets),
            (Fault::DoubtfulReset, stats.doubtful_resets),
            (Fault::ResetFailed, stats.failed_resets),
        ];
        for (fault, times) in counted {
            self.counts.add_many(fault, times);
        }
        Ok(self.episode)
    }

    fn play(&mut self, round: &Round) -> Result<(), ChaosError> {
        for &(act, us) in &round.acts {
            self.act(act)?;
            nap(us);
            if let Some((_, left, _)) = &mut self.storm {
                *left -= 1;
                if *left == 0 {
                    self.storm = None;
                }
            }
        }
        self.compare(round.alone)
    }

    fn act(&mut self, act: Act) -> Result<(), ChaosError> {
        match act {
            Act::Sync => self.copier.round()?,
            Act::Storm(kind, acts) => self.rain(kind, acts),
            Act::Kick { pick } => {
                let which = pick as usize % self.vcpus.len();
                self.kick(|place, _| place == which)?;
            }
            Act::KickAll => self.kick(|_, _| true)?,
            Act::Remove { slot, live } => self.remove(slot, live)?,
            Act::Add { slot, pages } => self.add(slot, pages)?,
            Act::StartVcpu => self.start_late()?,
            Act::DropVcpu { pick } => {
                // The first one stays.
                if self.vcpus.len() > 1 {
                    self.drop_vcpu(1 + pick as usize % (self.vcpus.len() - 1))?;
                }
            }
            Act::StopReaper => {
                if let Some(reaper) = self.reaper.take() {
                    stopped(reaper)?;
                    self.counts.add(Fault::ReaperStopped);
                }
            }
            Act::StartReaper(policy) => {
                if self.reaper.is_none() {
                    self.start_reaper(policy)?;
                    self.counts.add(Fault::ReaperRestarted);
                    self.aim();
                }
            }
            Act::PauseReaper => {
                if let Some(reaper) = &self.reaper {
                    reaper.pause();
                    self.counts.add(Fault::ReaperPaused);
                }
            }
            Act::ResumeReaper => {
                if let Some(reaper) = &self.reaper {
                    reaper.resume();
                }
            }
            Act::SwapPolicy(policy) => {
                if let Some(reaper) = &self.reaper {
                    reaper.set_policy(policy.make(self.counts));
                    self.counts.add(Fault::PolicySwapped);
                }
            }
            Act::Rearm { pick } => self.rearm(pick)?,
            Act::FailReset(number) => self.world.inject(ResetFault::Error(number))?,
            Act::ShortenReset { after } if after % 4 == 0 => {
                self.world.inject(ResetFault::AtEnd)?
            }
            Act::ShortenReset { after } => self.world.inject(ResetFault::Short { after })?,
            Act::Garble { pick } => {
                let which = pick as usize % self.vcpus.len();
                self.vcpus[which].vcpu.garble_next(pick >> 32);
                self.garbled += 1;
            }
        }
        Ok(())
    }

    // Slots.

    /// What a slot that comes and goes is called.
    fn going_id(&self, slot: usize) -> SlotId {
        SlotId::new(0, (1 + self.plan.stays.len() + slot) as u16)
    }

    fn add_slot(
        &mut self,
        id: SlotId,
        pages: u64,
        is_reused: bool,
    ) -> Result<Arc<Instance>, ChaosError> {
        let instance = Arc::new(Instance::new(id, pages)?);
        self.ledger.born(&instance);
        self.log.add_slot(id, pages)?;
        if is_reused && pages % 2 == 0 {
            self.world.write_in_resets(false);
            self.world.add_slot(&instance)?;
            self.look_for_strays(&instance)?;
            self.world.write_in_resets(true);
        } else {
            self.world.add_slot(&instance)?;
        }
        Ok(instance)
    }

    fn add(&mut self, slot: usize, pages: u64) -> Result<(), ChaosError> {
        if self.goes[slot].there.is_some() {
            return Ok(());
        }
        let is_reused = self.goes[slot].times > 0;
        let instance = self.add_slot(self.going_id(slot), pages, is_reused)?;
        let going = &mut self.goes[slot];
        going.there = Some(Arc::clone(&instance));
        going.times += 1;
        // At once: passes under way may still know the slot before.
        self.resume();
        self.ledger.close().push(instance);
        self.counts.add(Fault::SlotAdded);
        if is_reused {
            self.counts.add(Fault::SlotIdReused);
        }
        Ok(())
    }

    /// Nobody has written to the slot yet: what is reported of it are entries of one before. Syncs
    /// of others may be told of them instead; but not always.
    fn look_for_strays(&mut self, slot: &Instance) -> Result<(), ChaosError> {
        self.copier.round()?;
        let stats = self.log.stats();
        let causes = [
            stats.short_resets,
            stats.doubtful_resets,
            stats.overruns,
            strange_entries(&stats),
        ];
        if causes == [0; 4] {
            let strays: Vec<u64> = self.copier.reported(slot.id).collect();
            self.episode.stray_pages += strays.len() as u64;
            self.find(slot, &strays, "reported of a slot that is new");
        }
        Ok(())
    }

    fn remove(&mut self, slot: usize, live: bool) -> Result<(), ChaosError> {
        let Some(instance) = self.goes[slot].there.clone() else {
            return Ok(());
        };
        let writers = |_: usize, plan: &VcpuPlan| plan.goes == Some(slot);
        self.world.write_in_resets(false);
        if !live {
            self.pause(writers)?;
        }
        // From here on no device writes to it, and what they wrote is marked.
        self.ledger
            .close()
            .retain(|other| !Arc::ptr_eq(other, &instance));
        let before = live.then(|| instance.snapshot()).transpose()?;
        if live {
            // What the hardware has in its buffers reaches the rings: no pass sees it before.
            self.pause(writers)?;
            self.resume_those(writers);
        }
        let retired = retry(|| self.log.retire_slot(instance.id))?;
        self.counts.add(Fault::SlotRetired);
        // The last chance to copy it.
        self.copier.round()?;
        drop(self.ledger.settle());
        self.episode.comparisons += 1;
        match &before {
            Some(before) => {
                let missed = instance.older_than(before);
                self.note(&instance, &missed, "retired beside its writers");
                self.pause(writers)?;
            }
            None => self.note(&instance, &instance.differing(), "retired"),
        }
        // The writers are paused, and not resumed before there is a slot again.
        self.goes[slot].there = None;
        // Those that store to all of it go with it: what comes in its place may be smaller.
        while let Some(place) = self
            .vcpus
            .iter()
            .position(|running| writers(0, &running.plan) && running.plan.whole)
        {
            self.drop_vcpu(place)?;
        }
        self.world.remove_slot(instance.id)?;
        retry(|| self.log.finish_slot(&retired))?;
        self.ledger.died(&instance);
        self.counts.add(Fault::SlotFinished);
        self.world.write_in_resets(true);
        Ok(())
    }

    fn there(&self) -> impl Iterator<Item = &Arc<Instance>> {
        let going = self.goes.iter().filter_map(|going| going.there.as_ref());
        self.stays.iter().chain(going)
    }

    fn rearm(&mut self, pick: u64) -> Result<(), ChaosError> {
        let slots: Vec<SlotId> = self.there().map(|slot| slot.id).collect();
        let slot = slots[pick as usize % slots.len()];
        self.world.write_in_resets(false);
        self.pause(|_, _| true)?;
        self.world.rearm_slot(slot)?;
        self.log.rearmed(slot)?;
        self.counts.add(Fault::SlotRearmed);
        self.world.write_in_resets(true);
        self.resume();
        Ok(())
    }

    // Comparisons.

    /// Stops all that writes, syncs for the last time, compares, and lets all go on.
    fn compare(&mut self, alone: bool) -> Result<(), ChaosError> {
        self.world.write_in_resets(false);
        self.pause(|_, _| true)?;
        let ledger = self.ledger;
        let closed = ledger.close();
        let settled = if alone {
            let settled = ledger.settle();
            self.copier.round_alone()?;
            settled
        } else {
            self.copier.round()?;
            ledger.settle()
        };
        let slots: Vec<_> = self.there().cloned().collect();
        for slot in slots {
            let missed = slot.differing();
            self.note(&slot, &missed, "with all vCPUs stopped");
            for page in missed {
                // Only what is missed from here on counts in the next comparison.
                slot.copy_run(page, 1);
            }
        }
        self.episode.comparisons += 1;
        drop(settled);
        drop(closed);
        self.world.write_in_resets(true);
        self.resume();
        Ok(())
    }

    fn note(&mut self, slot: &Instance, missed: &[u64], when: &'static str) {
        self.episode.missed_pages += missed.len() as u64;
        self.find(slot, missed, when);
    }

    /// Keeps the first page of all.
    fn find(&mut self, slot: &Instance, pages: &[u64], when: &'static str) {
        if let Some(&page) = pages.first() {
            let slot = slot.id;
            let finding = Finding { slot, page, when };
            self.episode.first.get_or_insert(finding);
        }
    }

    // vCPUs.

    fn start_late(&mut self) -> Result<(), ChaosError> {
        let Some(&plan) = self.plan.late.get(self.late) else {
            return Ok(());
        };
        self.late += 1;
        self.start_vcpu(plan)?;
        self.counts.add(Fault::LateVcpu);
        self.aim();
        Ok(())
    }

    fn start_vcpu(&mut self, plan: VcpuPlan) -> Result<(), ChaosError> {
        if let Some(slot) = plan.goes {
            // It can't store to what is not there.
            self.add(slot, self.plan.goes[slot].least)?;
        }
        let index = self.made;
        self.made += 1;
        let regions = self.regions(plan);
        let pages = regions.iter().map(|region| region.pages).sum();
        let (workload, vcpus) = (self.plan.workload, self.plan.vcpus.len() as u32);
        let length = workload.covering_length(pages, vcpus, CHUNK);
        let list = workload.addresses(
            self.plan.seed,
            index,
            vcpus.max(index + 1),
            &regions,
            length.min(LONGEST_LIST),
        );
        let vcpu = self.world.start_vcpu(Job {
            index,
            kind: plan.kind,
            list,
            abandons: self.plan.abandons,
            counts: Arc::clone(self.counts),
        })?;
        self.vcpus.push(Running { vcpu, plan });
        Ok(())
    }

    /// What a vCPU stores to.
    fn regions(&self, plan: VcpuPlan) -> Vec<Region> {
        let region = |slot: &Instance, pages| Region {
            gpa: gpa(slot.id),
            pages,
        };
        let stays = self.stays.iter().map(|slot| region(slot, slot.pages()));
        let goes = plan.goes.and_then(|slot| {
            let there = self.goes[slot].there.as_ref()?;
            let least = self.plan.goes[slot].least;
            Some(region(
                there,
                if plan.whole { there.pages() } else { least },
            ))
        });
        let untold = self.untold.iter().map(|slot| region(slot, slot.pages()));
        stays.chain(untold).chain(goes).collect()
    }

    fn drop_vcpu(&mut self, place: usize) -> Result<(), ChaosError> {
        self.vcpus.remove(place).vcpu.stop()?;
        self.counts.add(Fault::VcpuDropped);
        Ok(())
    }

    /// Throws them out of the guest, and waits until they are.
    fn pause(&mut self, which: impl Fn(usize, &VcpuPlan) -> bool) -> Result<(), ChaosError> {
        let those = |(place, running): &(usize, &Running)| which(*place, &running.plan);
        for (_, running) in self.vcpus.iter().enumerate().filter(those) {
            running.vcpu.request_pause();
        }
        let mut ended = None;
        for (place, running) in self.vcpus.iter().enumerate().filter(those) {
            if !running.vcpu.wait_paused() {
                ended = Some(place);
            }
        }
        if let Some(place) = ended {
            self.vcpus.remove(place).vcpu.stop()?;
            return Err(MachineError::Ended.into());
        }
        Ok(())
    }

    /// Lets all run whose slots are there.
    fn resume(&self) {
        self.resume_those(|_, _| true);
    }

    fn resume_those(&self, which: impl Fn(usize, &VcpuPlan) -> bool) {
        for (place, Running { vcpu, plan }) in self.vcpus.iter().enumerate() {
            let is_there = |slot: usize| self.goes[slot].there.is_some();
            if which(place, plan) && plan.goes.is_none_or(is_there) {
                vcpu.resume();
            }
        }
    }

    fn kick(&mut self, which: impl Fn(usize, &VcpuPlan) -> bool) -> Result<(), ChaosError> {
        self.pause(&which)?;
        self.resume_those(which);
        self.counts.add(Fault::Kick);
        Ok(())
    }

    // The reaper.

    fn start_reaper(&mut self, policy: PolicyPlan) -> Result<(), ChaosError> {
        let builder = Reaper::builder().name(REAPER);
        self.reaper = Some(builder.spawn(self.log, policy.make(self.counts))?);
        Ok(())
    }

    // Storms.

    fn rain(&mut self, kind: StormKind, acts: u64) {
        // One at a time.
        self.storm = None;
        let everybody = kind == StormKind::Everybody;
        if kind == StormKind::Vcpus || everybody {
            self.counts.add(Fault::SignalsAtVcpus);
        }
        if (kind == StormKind::Reaper || everybody) && self.reaper.is_some() {
            self.counts.add(Fault::SignalsAtReaper);
        }
        if kind == StormKind::Others || everybody {
            self.counts.add(Fault::SignalsAtOthers);
        }
        if kind == StormKind::SetUser {
            self.counts.add(Fault::SignalsOfTheCLibrary);
        }
        self.storm = Some((kind, acts, self.storm(kind)));
    }

    /// Aims a storm that goes on at the threads that there are now.
    fn aim(&mut self) {
        if let Some((kind, left, _)) = self.storm.take() {
            self.storm = Some((kind, left, self.storm(kind)));
        }
    }

    fn storm(&self, kind: StormKind) -> Storm {
        let everybody = kind == StormKind::Everybody;
        let mut tids = Vec::new();
        if kind == StormKind::SetUser {
            return Storm::of_set_user();
        }
        if kind == StormKind::Vcpus || everybody {
            tids.extend(self.vcpus.iter().map(|running| running.vcpu.tid()));
        }
        if kind == StormKind::Reaper || everybody {
            tids.extend(thread_named(REAPER));
        }
        if kind == StormKind::Others || everybody {
            let others = self.shared.tids.lock();
            tids.extend(others.unwrap_or_else(PoisonError::into_inner).deref());
        }
        Storm::at(tids)
    }
}

/// Entries that named no page of any slot.
fn strange_entries(stats: &Stats) -> u64 {
    stats.unknown_slot_entries + stats.out_of_range_entries
}

/// Stops a reaper, which may have to say that a policy of ours or a reset failed.
fn stopped(reaper: Reaper) -> Result<(), ChaosError> {
    match reaper.stop() {
        Ok(()) | Err(ReaperError::Policy(_) | ReaperError::Reset(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The thread of this process that has this name, if one has.
fn thread_named(name: &str) -> Option<libc::pid_t> {
    let threads = fs::read_dir("/proc/self/task").ok()?;
    threads.flatten().find_map(|thread| {
        let found = fs::read_to_string(thread.path().join("comm")).ok()?;
        let id = thread.file_name().to_str()?.parse().ok()?;
        (found.trim_end() == name).then_some(id)
    })
}
