// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The simulation: what happens, one event after the other.

mod passes;

use std::time::Duration;

use kvm_dirty_ring::pacing::Pacing;

use super::clock::{Nanos, nanos, seconds};
use super::demand::Demand;
use super::gate::{Gate, Permits};
use super::outcome::{FullExit, Outcome, RingTotals};
use super::queue::{Actor, Event, Queue};
use super::reaper::Reaper;
use super::recording::MOST_VCPUS;
use super::scenario::Scenario;
use super::sight::Known;
use super::vcpu::Vcpu;
use crate::lab::measure::{Measured, Sample, Totals};
use crate::random::SplitMix64;
use crate::reaping::Shape;

/// Passes that the crate makes at a time: it has so many shards.
const SHARDS: usize = 4;
/// Streams of random numbers for vCPUs' speeds begin here.
const SPEEDS: u64 = 1 << 32;

pub(super) struct Machine<'a> {
    scenario: &'a Scenario,
    shape: Shape,
    now: Nanos,
    queue: Queue,
    vcpus: Vec<Vcpu<'a>>,
    /// The highest rate that each vCPU's full exits have shown.
    known: Vec<Known>,
    permits: Permits,
    gate: Gate,
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
                load, guest, seed, ..
            } = scenario;
            let spread = scenario.spread();
            let slower = SplitMix64::stream(*seed, SPEEDS + index as u64).around_one(spread);
            let fastest = guest.fastest() / slower;
            let demand = Demand::new(load, index, *seed, spread, fastest);
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
            permits: Permits::new(match shape {
                Shape::OwnRing => SHARDS,
                Shape::AllRings => 1,
            }),
            gate: Gate::default(),
            reaper: policy.map(|policy| Reaper::new(policy, scenario)),
            passes: 0,
            outcome: Outcome::default(),
        }
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
        self.outcome.measured = self.totals().since(&at_first);
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
        vcpu.full_exits += 1;
        let (rate, logged) = (vcpu.rate(), vcpu.logged());
        let own = self.known[index].by(now);
        let sights = self.reaper.iter().flat_map(|reaper| &reaper.sights);
        let rates = sights.map(|sight| sight.since(now, index, logged));
        let rates = rates.map(|(rate, known)| (rate, known.max(own)));
        // The look that was the more surprised.
        let ratio = |&(rate, known): &(f64, f64)| rate / known;
        let most = rates.max_by(|one, other| ratio(one).total_cmp(&ratio(other)));
        let (rate, known) = most.unwrap_or((rate, own));
        self.known[index].see(now, rate);
        self.outcome.full_exits.push(FullExit {
            at: seconds(now),
            vcpu: index,
            rate,
            known,
        });
        self.begin(Actor::Vcpu(index));
    }

    fn entered(&mut self, index: usize) {
        let vcpu = &mut self.vcpus[index];
        vcpu.advance(self.now);
        vcpu.resume();
        vcpu.turn();
        self.queue.add(vcpu.next(), Event::Guest(index));
    }

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
        reaper.looked(now, time);
        self.after(time, Event::Looked);
    }

    fn looked(&mut self) {
        match &self.reaper {
            Some(reaper) if !reaper.rings.is_empty() => self.begin(Actor::Reaper),
            _ => self.sleep(),
        }
    }

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
        let vcpus = self.vcpus.iter();
        let of_reaper = |count: fn(&Reaper) -> u64| self.reaper.as_ref().map_or(0, count);
        let reaper_passes = of_reaper(|reaper| reaper.passes);
        Totals {
            stores: vcpus.clone().map(|vcpu| vcpu.stores).sum(),
            rings: vcpus
                .clone()
                .map(|vcpu| (vcpu.taken, self.scenario.soft_limit))
                .collect(),
            sums: Measured {
                time: Duration::from_nanos(self.now),
                full_exits: vcpus.clone().map(|vcpu| vcpu.full_exits).sum(),
                stall: Duration::from_nanos(vcpus.clone().map(Vcpu::stall).sum()),
                passes: self.passes + reaper_passes,
                entries: vcpus.map(|vcpu| vcpu.taken).sum(),
                reaper_cpu: Duration::from_nanos(of_reaper(|reaper| reaper.cpu)),
                pass_time: Duration::from_nanos(of_reaper(|reaper| reaper.pass_time)),
                wakeups: of_reaper(|reaper| reaper.wakeups),
                reaper_passes,
                // How much of the time a load leaves to others is not modelled.
                ..Measured::default()
            },
        }
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
