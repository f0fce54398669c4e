// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The reaper's thread, in virtual time.

use std::time::Duration;

use kvm_dirty_ring::pacing::{Pacer, Pacing, RingObservation};

use super::clock::{NEVER, Nanos, nanos};
use super::lateness::Lateness;
use super::scenario::Scenario;
use super::sight::Sight;
use crate::random::SplitMix64;

/// How long it is deaf to full exits after one has woken it, as the crate's reaper is.
const DEAF: Nanos = 500_000;

/// The stream of random numbers that no vCPU has.
const STREAM: u64 = u64::MAX;

/// The crate's `Reaper::run`, taken apart where time passes.
#[derive(Debug)]
pub(super) struct Reaper {
    pub(super) pacer: Pacer,
    pub(super) seen: Vec<RingObservation>,
    lateness: Lateness,
    random: SplitMix64,
    /// A vCPU has stopped since the last look.
    rung: bool,
    deaf: Nanos,
    /// When it will wake up; never while it is awake.
    wakes: Nanos,
    /// Distinguishes its wake-ups: the one that it sleeps towards may come to be another.
    turn: u64,
    /// Of the pass under way: the rings it has yet to harvest, the next one last.
    pub(super) rings: Vec<usize>,
    /// Entries that it has found so far.
    pub(super) entries: u64,
    /// Seconds for which the policy sleeps.
    pub(super) delay: f64,
    /// The last look that has led to all it could lead to, and the last look.
    pub(super) sights: [Sight; 2],
    pub(super) cpu: Nanos,
    pub(super) pass_time: Nanos,
    pub(super) wakeups: u64,
    pub(super) passes: u64,
}

impl Reaper {
    pub(super) fn new(policy: Box<dyn Pacing>, scenario: &Scenario) -> Self {
        Self {
            pacer: Pacer::new(policy),
            seen: Vec::new(),
            lateness: scenario.lateness,
            random: SplitMix64::stream(scenario.seed, STREAM),
            rung: false,
            deaf: 0,
            wakes: NEVER,
            turn: 0,
            rings: Vec::new(),
            entries: 0,
            delay: 0.0,
            sights: [(); 2].map(|()| Sight::new(scenario.soft_limit)),
            cpu: 0,
            pass_time: 0,
            wakeups: 0,
            passes: 0,
        }
    }

    fn due(&self) -> Nanos {
        nanos(self.pacer.due())
    }

    fn late(&mut self, until: Nanos) -> Nanos {
        let late = self.lateness.draw(&mut self.random);
        until.saturating_add(nanos(late))
    }

    /// Goes to sleep. When it wakes up, and which turn of the loop that will be.
    pub(super) fn sleep(&mut self, now: Nanos) -> (Nanos, u64) {
        let due = self.due();
        self.delay = Duration::from_nanos(due.saturating_sub(now)).as_secs_f64();
        let until = match self.rung {
            true => due.min(self.deaf),
            false => due,
        };
        self.wakes = match until <= now {
            // There was no sleep to wake up from.
            true => now,
            false => self.late(until),
        };
        self.turn += 1;
        let [before, last] = &mut self.sights;
        before.clone_from(last);
        (self.wakes, self.turn)
    }

    /// A vCPU has stopped on a full ring. If that lets it wake up earlier: when, and which turn that
    /// will be.
    pub(super) fn ring(&mut self, now: Nanos) -> Option<(Nanos, u64)> {
        if std::mem::replace(&mut self.rung, true) || self.wakes == NEVER {
            return None;
        }
        let wakes = self.late(now.max(self.deaf));
        (wakes < self.wakes).then(|| {
            self.wakes = wakes;
            self.turn += 1;
            (wakes, self.turn)
        })
    }

    /// Wakes up, if this is the turn for it, to look at what is in `seen` then. Whether a full exit
    /// has woken it.
    pub(super) fn wake(&mut self, now: Nanos, turn: u64) -> Option<bool> {
        if turn != self.turn || self.wakes == NEVER {
            return None;
        }
        self.wakes = NEVER;
        self.wakeups += 1;
        self.rung = false;
        let woken = now < self.due();
        if woken {
            self.deaf = now + DEAF;
        }
        Some(woken)
    }

    /// Spends time on the look at `now`, and begins the pass that it has led to, if it has.
    pub(super) fn looked(&mut self, now: Nanos, time: Nanos) {
        let [before, last] = &mut self.sights;
        last.take(before, now, &self.seen);
        self.cpu += time;
        self.entries = 0;
        self.rings.clear();
        let reap = self.pacer.reap().iter().enumerate().rev();
        let rings = reap.filter(|&(_, &reaps)| reaps).map(|(ring, _)| ring);
        self.rings.extend(rings);
    }

    /// A pass is over.
    pub(super) fn passed(&mut self, now: Nanos) {
        self.passes += 1;
        self.pacer.passed(Duration::from_nanos(now), self.entries);
    }

    /// Spends time on a pass.
    pub(super) fn work(&mut self, time: Nanos) {
        self.cpu += time;
        self.pass_time += time;
    }
}
