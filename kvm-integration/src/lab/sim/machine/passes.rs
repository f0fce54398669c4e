// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Passes: the crate's, with resets shared, and QEMU's under one lock.

use super::Machine;
use crate::lab::Shape;
use crate::lab::sim::gate::Reset;
use crate::lab::sim::queue::{Actor, Event};

/// Entries that a kernel keeps in reserve at most: fewer found at a full exit say nothing of the
/// soft limit.
const MOST_RESERVED: u64 = 64 + 512;

impl Machine<'_> {
    /// `actor` wants to make a pass.
    pub(super) fn begin(&mut self, actor: Actor) {
        if self.permits.acquire(actor) {
            self.start(actor);
        }
    }

    fn start(&mut self, actor: Actor) {
        match self.shape {
            Shape::OwnRing => self.harvest(actor),
            Shape::AllRings => self.locked(actor),
        }
    }

    /// Harvests the actor's rings, as soon as it may.
    fn harvest(&mut self, actor: Actor) {
        if self.gate.harvest(actor) {
            self.harvest_next(actor);
        }
    }

    fn harvest_next(&mut self, actor: Actor) {
        let ring = match (actor, &mut self.reaper) {
            (Actor::Vcpu(own), _) => own,
            (Actor::Reaper, reaper) => {
                let reaper = reaper.as_mut();
                let next = reaper.and_then(|reaper| reaper.rings.pop());
                next.expect("a reaper that makes a pass over rings")
            }
        };
        let vcpu = &mut self.vcpus[ring];
        vcpu.advance(self.now);
        let alone = vcpu.all_recycled();
        let entries = vcpu.harvest();
        self.gate.mark(ring, entries);
        let costs = &self.scenario.costs;
        let time = costs.harvest_ring + costs.harvest_entry * entries;
        match (actor, &mut self.reaper) {
            (Actor::Reaper, Some(reaper)) => {
                reaper.entries += entries;
                reaper.work(time);
            }
            _ => {
                let least = self.scenario.ring_entries.saturating_sub(MOST_RESERVED);
                if alone && entries >= least.max(1) {
                    vcpu.known_soft_limit = entries;
                }
            }
        }
        self.after(time, Event::Harvested(actor));
    }

    /// A ring is harvested.
    pub(super) fn harvested(&mut self, actor: Actor) {
        if let (Actor::Reaper, Some(reaper)) = (actor, &self.reaper) {
            if !reaper.rings.is_empty() {
                return self.harvest_next(actor);
            }
        }
        if let Some(reset) = self.gate.harvested() {
            self.reset(reset);
        }
        match (actor, &mut self.reaper) {
            // There is nothing to reset.
            (Actor::Reaper, Some(reaper)) if reaper.entries == 0 => self.passed(actor),
            (Actor::Reaper, _) => self.ask_for_reset(actor),
            (Actor::Vcpu(_), reaper) => {
                let reaper = reaper.as_mut();
                let earlier = reaper.and_then(|reaper| reaper.ring(self.now));
                if let Some((at, turn)) = earlier {
                    self.queue.add(at, Event::Wake(turn));
                }
                self.ask_for_reset(actor);
            }
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
        if let (Actor::Reaper, Some(reaper)) = (reset.by, &mut self.reaper) {
            reaper.work(time);
        }
        self.after(time, Event::Reset);
    }

    /// The reset in flight is done.
    pub(super) fn opened(&mut self) {
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
        if let Some(next) = self.permits.release() {
            self.start(next);
        }
        match (actor, &mut self.reaper) {
            (Actor::Vcpu(vcpu), _) => {
                self.passes += 1;
                self.after(self.scenario.costs.exit, Event::Entered(vcpu));
            }
            (Actor::Reaper, reaper) => {
                if let Some(reaper) = reaper {
                    reaper.passed(self.now);
                }
                self.sleep();
            }
        }
    }

    /// QEMU's pass, once it has the lock: all rings, and a reset.
    fn locked(&mut self, actor: Actor) {
        let mut entries = 0;
        for vcpu in &mut self.vcpus {
            vcpu.advance(self.now);
            entries += vcpu.harvest();
        }
        let rings = self.vcpus.len() as u64;
        let costs = &self.scenario.costs;
        let time = match entries {
            // There is nothing to reset.
            0 => costs.harvest_ring * rings,
            _ => costs.pass(rings, rings, entries),
        };
        if let (Actor::Reaper, Some(reaper)) = (actor, &mut self.reaper) {
            reaper.entries = entries;
            reaper.work(time);
        }
        self.after(time, Event::Unlocked(actor));
    }

    /// QEMU's pass is over.
    pub(super) fn unlocked(&mut self, actor: Actor) {
        for vcpu in &mut self.vcpus {
            vcpu.advance(self.now);
            vcpu.recycle();
        }
        self.passed(actor);
    }
}
