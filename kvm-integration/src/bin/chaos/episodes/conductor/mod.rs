// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An episode, from the making of the guest to the last comparison.

mod slots;
mod storms;
mod vcpus;
mod working_set;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, Builder, ScopedJoinHandle};

use anyhow::{Context, Result, anyhow};
use kvm_dirty_ring::error::ReaperError;
use kvm_dirty_ring::sim::ResetFault;
use kvm_dirty_ring::{DirtyLog, Reaper, SlotId, Stats};

use super::copier::{Copier, Kind};
use super::episode::{Episode, Finding};
use super::fault::{Counts, Fault};
use super::helpers::{Helper, Shared, nap};
use super::ledger::{Instance, Ledger};
use super::plan::{Act, Plan, Round, StormKind, VcpuPlan};
use super::policies::PolicyPlan;
use super::world::{Vcpu, World};
use kvm_integration::host::storm::{Storm, this_thread};
use kvm_integration::random::SplitMix64;

/// The reaper's thread, by which it is found.
const REAPER: &str = "chaos-reaper";

/// A slot that is not added to the log.
const UNTOLD: SlotId = SlotId::new(0, 100);
const UNTOLD_PAGES: u64 = 8;

/// The thread that carries out the plan.
pub struct Conductor<'a> {
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
    /// The slot that is not added to the log.
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
    pub fn run(world: &dyn World, plan: &Plan, counts: &Arc<Counts>) -> Result<Episode> {
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
                helpers.push(thread.context("a thread could not be started: too many of them?")?);
            }
            let played = plan
                .rounds
                .iter()
                .try_for_each(|round| conductor.play(round));
            drop(over);
            let join = |helper: ScopedJoinHandle<'_, Result<()>>| {
                let panicked = || Err(anyhow!("a thread of the episode panicked"));
                helper.join().unwrap_or_else(|_| panicked())
            };
            // Which error came first is unknown; the conductor's own explains more.
            let helped = helpers.into_iter().map(join).collect::<Vec<_>>();
            played?;
            helped.into_iter().collect::<Result<(), _>>()
        });
        let ended = conductor.end();
        played?;
        ended
    }

    fn begin(&mut self) -> Result<()> {
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
        if self.plan.leaves_open {
            self.set_working_set(self.plan.working_set);
        }
        for &vcpu in &self.plan.vcpus {
            self.start_vcpu(vcpu)?;
        }
        self.world.write_in_resets(true);
        Ok(())
    }

    /// Tears all down, and counts up.
    fn end(mut self) -> Result<Episode> {
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
            self.counts
                .add_many(Fault::EntriesOfNoSlot, strange_entries);
        } else if stats.overruns == 0 {
            self.episode.strange_entries = strange_entries;
        }
        let counted = [
            (Fault::FullExits, stats.full_exits()),
            (Fault::RingOverruns, stats.overruns),
            (Fault::ShortResets, stats.short_resets),
            (Fault::DoubtfulResets, stats.doubtful_resets),
            (Fault::FailedResets, stats.failed_resets),
            (Fault::PagesLeftOpen, stats.working_set.joined),
            (Fault::VoidsIgnored, self.plan.ignores_voids.into()),
        ];
        for (fault, times) in counted {
            self.counts.add_many(fault, times);
        }
        Ok(self.episode)
    }

    fn play(&mut self, round: &Round) -> Result<()> {
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

    fn act(&mut self, act: Act) -> Result<()> {
        match act {
            Act::Sync => self.copier.round(Kind::Others)?,
            Act::Storm(kind, acts) => self.rain(kind, acts),
            Act::Kick(pick) => {
                let which = pick as usize % self.vcpus.len();
                self.kick(|place, _| place == which)?;
            }
            Act::KickAll => self.kick(|_, _| true)?,
            Act::Remove { slot, live } => self.remove(slot, live)?,
            Act::Add { slot, pages } => self.add(slot, pages)?,
            Act::StartVcpu => self.start_late()?,
            Act::DropVcpu(pick) => {
                // The first one stays.
                if self.vcpus.len() > 1 {
                    self.drop_vcpu(1 + pick as usize % (self.vcpus.len() - 1))?;
                }
            }
            Act::StopReaper => {
                if let Some(reaper) = self.reaper.take() {
                    stopped(reaper)?;
                    self.counts.add(Fault::ReapersStopped);
                }
            }
            Act::StartReaper(policy) => {
                if self.reaper.is_none() {
                    self.start_reaper(policy)?;
                    self.counts.add(Fault::ReapersRestarted);
                    self.aim();
                }
            }
            Act::PauseReaper => {
                if let Some(reaper) = &self.reaper {
                    reaper.pause();
                    self.counts.add(Fault::ReapersPaused);
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
                    self.counts.add(Fault::PoliciesSwapped);
                }
            }
            Act::Rearm(pick) => self.rearm(pick)?,
            Act::FailReset(number) => self.world.inject(ResetFault::Error(number))?,
            Act::ShortenReset(after) if after % 4 == 0 => self.world.inject(ResetFault::AtEnd)?,
            Act::ShortenReset(after) => self.world.inject(ResetFault::Short { after })?,
            Act::Garble(pick) => {
                let which = pick as usize % self.vcpus.len();
                let is_garbled = self.vcpus[which].vcpu.garble_next(pick >> 32);
                self.garbled += u64::from(is_garbled);
            }
            Act::SetWorkingSet(terms) => self.set_working_set(terms),
            Act::Refresh => self.refresh()?,
            Act::CallOffALastSync => self.call_off_a_last_sync()?,
        }
        Ok(())
    }

    /// Stops all that writes, syncs for the last time, compares, and lets all go on.
    fn compare(&mut self, alone: bool) -> Result<()> {
        self.world.write_in_resets(false);
        self.pause(|_, _| true)?;
        let ledger = self.ledger;
        let closed = ledger.close();
        let settled = if alone {
            let settled = ledger.settle();
            self.copier.round_alone(Kind::All)?;
            settled
        } else {
            self.copier.round(Kind::All)?;
            ledger.settle()
        };
        if self.log.stats().suspect_pages == 0 {
            self.episode.exact_comparisons += 1;
        }
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

    fn start_reaper(&mut self, policy: PolicyPlan) -> Result<()> {
        let builder = Reaper::builder().name(REAPER);
        self.reaper = Some(builder.spawn(self.log, policy.make(self.counts))?);
        Ok(())
    }
}

/// Entries that named no page of any slot.
fn strange_entries(stats: &Stats) -> u64 {
    stats.unknown_slot_entries + stats.out_of_range_entries
}

/// Stops a reaper, which may have to say that a policy of ours or a reset failed.
fn stopped(reaper: Reaper) -> Result<()> {
    match reaper.stop() {
        Ok(()) | Err(ReaperError::Policy(_) | ReaperError::Reset(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
