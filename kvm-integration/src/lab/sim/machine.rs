//! The simulation: what happens, one event after the other.

use std::time::Duration;

use kvm_dirty_ring::pacing::Pacing;

use super::clock::{Nanos, nanos, seconds};
use super::demand::Demand;
use super::gate::{Gate, Lock, Reset};
use super::known::Known;
use super::outcome::{FullExit, Outcome, RingTotals};
use super::queue::{Actor, Event, Queue};
use super::random::Random;
use super::reaper::Reaper;
use super::scenario::{MOST_VCPUS, Scenario};
use super::totals::Totals;
use super::vcpu::Vcpu;
use crate::lab::{Sample, Shape};

/// Entries that a kernel keeps in reserve at most: fewer found at a full exit say nothing of the
/// soft limit.
const MOST_RESERVED: u64 = 64 + 512;

/// Streams of random numbers for vCPUs' speeds begin here.
const SPEEDS: u64 = 1 << 32;

pub(super) struct Machine<'a> {
    scenario: &'a Scenario,
    shape: Shape,
    now: Nanos,
    queue: Queue,
    vcpus: Vec<Vcpu<'a>>,
    /// Each vCPU's highest rate at a full exit.
    known: Vec<Known>,
    gate: Gate,
    lock: Lock,
    reaper: Option<Reaper>,
    /// Passes of full exits.
    passes: u64,
    outcome: Outcome,
}

impl<'a> Machine<'a> {
    pub(super) fn new(
        scenario: &'a Scenario,
        shape: Shape,
        policy: Option<Box<dyn Pacing>>,
    ) -> Self {
        let count = scenario.vcpus.clamp(1, MOST_VCPUS);
        let vcpu = |index| {
            let Scenario {
                load,
                guest,
                jitter,
                seed,
                ..
            } = scenario;
            let mut random = Random::new(*seed, SPEEDS + index as u64);
            let slower = random.around_one(*jitter);
            let fastest = guest.fastest() / slower;
            let demand = Demand::new(load, index, *seed, *jitter, fastest);
            let sizes = [
                scenario.ring_entries,
                scenario.soft_limit,
                scenario.known_soft_limit,
            ];
            Vcpu::new(demand, load.pages(), guest, slower, sizes)
        };
        Self {
            scenario,
            shape,
            now: 0,
            queue: Queue::default(),
            vcpus: (0..count).map(vcpu).collect(),
            known: vec![Known::default(); count],
            gate: Gate::new(),
            lock: Lock::default(),
            reaper: policy.map(|policy| Reaper::new(policy, scenario.lateness, scenario.seed)),
            passes: 0,
            outcome: Outcome::default(),
        }
    }

    /// The reaper among those who make passes.
    fn reaper_actor(&self) -> Actor {
        self.vcpus.len()
    }

    fn after(&mut self, time: Nanos, event: Event) {
        self.queue.add(self.now.saturating_add(time), event);
    }

    /// From the start to the end.
    pub(super) fn run(mut self) -> Outcome {
        let warm = nanos(self.scenario.warm_up);
        let end = warm.saturating_add(nanos(self.scenario.time));
        self.queue.add(warm, Event::Warm);
        self.queue.add(end, Event::End);
        if self.scenario.sample_every.is_some() {
            self.queue.add(0, Event::Sample);
        }
        for vcpu in 0..self.vcpus.len() {
            self.queue.add(self.vcpus[vcpu].next(), Event::Guest(vcpu));
        }
        self.sleep();
        let mut at_first = Totals::default();
        while let Some((at, event)) = self.queue.next() {
            self.now = at;
            match event {
                Event::Guest(vcpu) => self.guest(vcpu),
                Event::Entered(vcpu) => self.entered(vcpu),
                Event::Harvested(actor) => self.harvested(actor),
                Event::Reset => self.opened(),
                Event::Unlocked(actor) => self.unlocked(actor),
                Event::Wake(turn) => self.wake(turn),
                Event::Looked => self.looked(),
                Event::Sample => self.sample(),
                Event::Warm => at_first = self.totals(),
                Event::End => break,
            }
        }
        self.outcome.measured = self.totals().since(&at_first, self.scenario);
        self.outcome.rings = self.vcpus.iter().map(totals_of).collect();
        self.outcome
    }

    fn guest(&mut self, index: usize) {
        let now = self.now;
        let vcpu = &mut self.vcpus[index];
        vcpu.advance(now);
        if !vcpu.is_full() {
            vcpu.turn();
            self.queue.add(vcpu.next(), Event::Guest(index));
            return;
        }
        vcpu.stopped = Some(now);
        let rate = vcpu.rate();
        let own = &mut self.known[index];
        let seen = self
            .reaper
            .as_ref()
            .map_or(0.0, |reaper| reaper.known.by(now));
        self.outcome.full_exits.push(FullExit {
            at: seconds(now),
            vcpu: index,
            rate,
            known: seen.max(own.by(now)),
        });
        own.see(now, rate);
        self.begin(index);
    }

    fn entered(&mut self, index: usize) {
        let vcpu = &mut self.vcpus[index];
        vcpu.advance(self.now);
        vcpu.resume();
        vcpu.turn();
        self.queue.add(vcpu.next(), Event::Guest(index));
    }

    // Passes.

    fn begin(&mut self, actor: Actor) {
        match self.shape {
            Shape::OwnRing if self.gate.begin(actor) => self.harvest(actor),
            Shape::AllRings if self.lock.acquire(actor) => self.locked(actor),
            Shape::OwnRing | Shape::AllRings => {}
        }
    }

    /// Harvests the actor's next ring as soon as it may.
    fn harvest(&mut self, actor: Actor) {
        if !self.gate.harvest(actor) {
            return;
        }
        let mut reaper = self.reaper.as_mut().filter(|_| actor == self.vcpus.len());
        let ring = match &mut reaper {
            Some(reaper) => reaper.rings.pop().expect("a pass has rings"),
            None => actor,
        };
        let vcpu = &mut self.vcpus[ring];
        vcpu.advance(self.now);
        let alone = vcpu.all_recycled();
        let entries = vcpu.harvest();
        self.gate.mark(ring, entries);
        let costs = &self.scenario.costs;
        let time = costs.harvest_ring + costs.harvest_entry * entries;
        match reaper {
            Some(reaper) => {
                reaper.entries += entries;
                reaper.work(time);
            }
            None => {
                let least = self.scenario.ring_entries.saturating_sub(MOST_RESERVED);
                if alone && entries >= least.max(1) {
                    vcpu.known_soft_limit = entries;
                }
            }
        }
        self.after(time, Event::Harvested(actor));
    }

    fn harvested(&mut self, actor: Actor) {
        if let Some(reset) = self.gate.harvested() {
            self.reset(reset);
        }
        let reaper = self.reaper.as_mut();
        let Some(reaper) = reaper.filter(|_| actor == self.vcpus.len()) else {
            if let Some(reaper) = &mut self.reaper {
                if let Some((at, turn)) = reaper.ring(self.now) {
                    self.queue.add(at, Event::Wake(turn));
                }
            }
            self.ask_for_reset(actor);
            return;
        };
        if !reaper.rings.is_empty() {
            self.harvest(actor);
        } else if reaper.entries > 0 {
            self.ask_for_reset(actor);
        } else {
            self.passed(actor);
        }
    }

    fn ask_for_reset(&mut self, actor: Actor) {
        if let Some(reset) = self.gate.reset(actor) {
            self.reset(reset);
        }
    }

    fn reset(&mut self, reset: Reset) {
        let rings = self.vcpus.len() as u64;
        let time = self.scenario.costs.reset_of(rings, reset.entries);
        if let Some(reaper) = self.reaper.as_mut().filter(|_| reset.by as u64 == rings) {
            reaper.work(time);
        }
        self.after(time, Event::Reset);
    }

    fn opened(&mut self) {
        let opened = self.gate.open();
        for ring in opened.recycled {
            self.vcpus[ring].advance(self.now);
            self.vcpus[ring].recycle();
        }
        for actor in opened.harvest {
            self.harvest(actor);
        }
        for actor in opened.served {
            self.passed(actor);
        }
    }

    /// A pass is over.
    fn passed(&mut self, actor: Actor) {
        if let Shape::OwnRing = self.shape {
            if let Some(next) = self.gate.end() {
                self.harvest(next);
            }
        }
        if actor != self.reaper_actor() {
            self.passes += 1;
            self.after(self.scenario.costs.exit, Event::Entered(actor));
            return;
        }
        if let Some(reaper) = &mut self.reaper {
            reaper.passes += 1;
            let now = Duration::from_nanos(self.now);
            reaper.pacer.passed(now, reaper.entries);
        }
        self.sleep();
    }

    /// QEMU's pass: all rings, and the reset, under one lock.
    fn locked(&mut self, actor: Actor) {
        let mut entries = 0;
        for vcpu in &mut self.vcpus {
            vcpu.advance(self.now);
            entries += vcpu.harvest();
        }
        let rings = self.vcpus.len() as u64;
        let costs = &self.scenario.costs;
        let time = match entries {
            // Nothing to reset.
            0 => costs.harvest_ring * rings,
            _ => costs.pass(rings, rings, entries),
        };
        if let Some(reaper) = self.reaper.as_mut().filter(|_| actor == rings as usize) {
            reaper.entries = entries;
            reaper.work(time);
        }
        self.after(time, Event::Unlocked(actor));
    }

    fn unlocked(&mut self, actor: Actor) {
        for vcpu in &mut self.vcpus {
            vcpu.advance(self.now);
            vcpu.recycle();
        }
        if let Some(next) = self.lock.release() {
            self.locked(next);
        }
        self.passed(actor);
    }

    // The reaper.

    fn sleep(&mut self) {
        if let Some(reaper) = &mut self.reaper {
            let (at, turn) = reaper.sleep(self.now);
            self.queue.add(at, Event::Wake(turn));
        }
    }

    fn wake(&mut self, turn: u64) {
        let now = self.now;
        let Some(reaper) = &mut self.reaper else {
            return;
        };
        let Some(woken) = reaper.wake(now, turn) else {
            return;
        };
        let costs = &self.scenario.costs;
        let mut time = costs.wake;
        reaper.seen.clear();
        for vcpu in &mut self.vcpus {
            vcpu.advance(now);
            let seen = vcpu.observe();
            time += match seen.waiting {
                0 => costs.look_empty,
                _ => costs.look,
            };
            reaper.seen.push(seen);
        }
        let at = Duration::from_nanos(now);
        if let Err(error) = reaper.pacer.look(at, woken, &mut reaper.seen) {
            self.outcome.failures.push(error);
        }
        reaper.note(now);
        reaper.cpu += time;
        reaper.entries = 0;
        reaper.rings.clear();
        let reap = reaper.pacer.reap().iter().enumerate().rev();
        let rings = reap.filter(|&(_, &reaps)| reaps).map(|(ring, _)| ring);
        reaper.rings.extend(rings);
        self.after(time, Event::Looked);
    }

    fn looked(&mut self) {
        let reaps = self.reaper.as_ref().map(|reaper| !reaper.rings.is_empty());
        match reaps {
            Some(true) => self.begin(self.reaper_actor()),
            Some(false) | None => self.sleep(),
        }
    }

    // What is seen of it.

    fn sample(&mut self) {
        let mut fullest = 0.0f64;
        let mut full_exits = 0;
        for vcpu in &mut self.vcpus {
            vcpu.advance(self.now);
            fullest = fullest.max(vcpu.fullness());
            full_exits += vcpu.full_exits;
        }
        self.outcome.samples.push(Sample {
            at: seconds(self.now),
            fullest,
            delay: self.reaper.as_ref().map_or(0.0, |reaper| reaper.delay),
            full_exits,
        });
        if let Some(every) = self.scenario.sample_every {
            self.after(nanos(every).max(1), Event::Sample);
        }
    }

    fn totals(&mut self) -> Totals {
        for vcpu in &mut self.vcpus {
            vcpu.advance(self.now);
        }
        Totals::of(self.now, &self.vcpus, self.reaper.as_ref(), self.passes)
    }
}

fn totals_of(vcpu: &Vcpu<'_>) -> RingTotals {
    RingTotals {
        logged: vcpu.logged(),
        taken: vcpu.taken,
        waiting: vcpu.waiting(),
        full_exits: vcpu.full_exits,
    }
}
