// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What one vCPU wants to do, piece by piece.

use super::clock::{NEVER, Nanos, nanos, nanos_up};
use super::load::Load;
use crate::random::SplitMix64;

/// A time in which a vCPU's rate is constant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Piece {
    /// When it ends.
    pub(super) until: Nanos,
    /// Page stores that the vCPU wants to make, per second.
    pub(super) rate: f64,
}

/// Makes the pieces of one vCPU.
#[derive(Debug)]
pub(super) struct Demand<'a> {
    load: &'a Load,
    vcpu: usize,
    random: SplitMix64,
    /// What its rates are multiplied by.
    factor: f64,
    /// Most entries a second that it can log: what a chunk of stores takes.
    fastest: f64,
    made: usize,
    until: Nanos,
    rate: f64,
}

/// Steps of ramps.
const RAMP_STEP: Nanos = 10_000_000;
/// Steps of walks.
const WALK_STEP: Nanos = 50_000_000;
/// vCPUs begin within so much time.
const START: Nanos = 100_000_000;

impl<'a> Demand<'a> {
    /// The demand of `vcpu` under `load`, `jitter` more or less, where a vCPU logs `fastest`
    /// entries a second at most.
    pub(super) fn new(load: &'a Load, vcpu: usize, seed: u64, jitter: f64, fastest: f64) -> Self {
        let mut random = SplitMix64::stream(seed, vcpu as u64);
        let factor = random.around_one(jitter);
        // Without jitter all begin together.
        let phase = if jitter > 0.0 { random.share() } else { 0.0 };
        let period = match load {
            Load::Bursts { on, off, .. } => nanos(*on).saturating_add(nanos(*off)),
            Load::Ramp { over, .. } => nanos(*over),
            Load::Recorded(_) => 0,
            _ => START,
        };
        Self {
            load,
            vcpu,
            random,
            factor,
            fastest,
            made: 0,
            until: (phase * period as f64) as Nanos,
            rate: 0.0,
        }
    }

    /// The next piece, which begins where the last one ended.
    pub(super) fn next(&mut self) -> Piece {
        let made = self.made;
        self.made += 1;
        // The first lasts until this vCPU begins.
        if made == 0 && self.until > 0 {
            let until = self.until;
            return Piece { until, rate: 0.0 };
        }
        let (length, rate) = self.length_and_rate(made);
        self.until = self.until.saturating_add(length);
        let until = self.until;
        Piece { until, rate }
    }

    fn length_and_rate(&mut self, made: usize) -> (Nanos, f64) {
        let factor = self.factor;
        let odd = made % 2 == 1;
        match *self.load {
            Load::Idle => (NEVER, 0.0),
            Load::Constant { rate } => (NEVER, rate * factor),
            Load::HotSet { .. } => (NEVER, f64::INFINITY),
            Load::Skew { rate } => (NEVER, if self.vcpu == 0 { rate * factor } else { 0.0 }),
            Load::Trickle { rate, chunk } => {
                let on = chunk as f64 / self.fastest;
                let all = chunk as f64 / (rate * factor).max(1e-9);
                match odd {
                    true => (nanos_up(on).max(1), f64::INFINITY),
                    false => (nanos_up((all - on).max(0.0)), 0.0),
                }
            }
            Load::Bursts { rate, on, off } => match odd {
                // Pieces of no length would have no end.
                true => (nanos(on).max(1), rate * factor),
                false => (nanos(off), 0.0),
            },
            Load::Ramp { from, to, over } => {
                let steps = (nanos(over) / RAMP_STEP).max(1);
                let step = made as u64 % steps;
                let share = step as f64 / (steps - 1).max(1) as f64;
                (RAMP_STEP, (from + (to - from) * share) * factor)
            }
            Load::Walk { least, most } => {
                let turn = (2.0 * self.random.share() - 1.0).exp2();
                let before = if self.rate > 0.0 {
                    self.rate
                } else {
                    // Somewhere in between at first.
                    least + (most - least) * self.random.share()
                };
                self.rate = (before * turn).max(least).min(most);
                (WALK_STEP, self.rate * factor)
            }
            Load::Recorded(ref recording) => {
                let changes = recording.of(self.vcpu);
                let begins = |index: usize| {
                    let change: Option<&(f64, f64)> = changes.get(index);
                    change.map_or(NEVER, |&(at, _)| nanos_up(at))
                };
                // Before the first change there is nothing.
                let rate = match made.checked_sub(1).and_then(|index| changes.get(index)) {
                    Some(&(_, rate)) => rate * factor,
                    None => 0.0,
                };
                (begins(made).saturating_sub(self.until), rate)
            }
        }
    }
}
