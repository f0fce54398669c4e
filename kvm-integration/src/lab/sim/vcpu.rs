// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One vCPU and its ring.

use super::clock::{NEVER, Nanos, nanos_up, seconds};
use super::costs::Guest;
use super::demand::{Demand, Piece};
use kvm_dirty_ring::pacing::RingObservation;

/// A vCPU that logs its stores, as a flow: what it has logged at a moment is a real number, of which
/// the whole part is there to be seen and harvested.
#[derive(Debug)]
pub(super) struct Vcpu<'a> {
    demand: Demand<'a>,
    piece: Piece,
    /// Most entries a second, and most stores to pages whose entries are in the ring.
    first_stores: f64,
    next_stores: f64,
    /// Pages it stores to.
    pages: f64,
    entries: u64,
    soft_limit: u64,
    /// What the policy sees of it.
    pub(super) known_soft_limit: u64,
    /// The moment for which all of this holds.
    at: Nanos,
    logged: f64,
    pub(super) stores: f64,
    /// Entries harvested.
    pub(super) taken: u64,
    /// Of these, those that are reset.
    recycled: u64,
    /// Since when it has been out of the guest for its full ring.
    pub(super) stopped: Option<Nanos>,
    /// Full exits that are over.
    pub(super) full_exits: u64,
    stalled: Nanos,
}

/// Of an entry: less is a rounding error.
const NEXT_TO_NOTHING: f64 = 1e-6;

impl<'a> Vcpu<'a> {
    /// A vCPU whose stores take `guest` times `slower`, and whose ring of `entries` stops it at
    /// `soft_limit`.
    pub(super) fn new(
        mut demand: Demand<'a>,
        pages: f64,
        guest: &Guest,
        slower: f64,
        [entries, soft_limit, known_soft_limit]: [u64; 3],
    ) -> Self {
        let piece = demand.next();
        let fastest = |store: u64| 1e9 / (store.max(1) as f64 * slower);
        Self {
            demand,
            piece,
            first_stores: fastest(guest.first_store),
            next_stores: fastest(guest.next_store),
            pages,
            entries,
            // A vCPU whose ring is always full would never run.
            soft_limit: soft_limit.max(1),
            known_soft_limit,
            at: 0,
            logged: 0.0,
            stores: 0.0,
            taken: 0,
            recycled: 0,
            stopped: None,
            full_exits: 0,
            stalled: 0,
        }
    }

    /// Entries a second that it logs while it comes to pages that have none in the ring.
    pub(super) fn rate(&self) -> f64 {
        self.piece.rate.min(self.first_stores).max(0.0)
    }

    /// Entries that may be in the ring: then it is full, or holds all pages there are.
    fn most(&self) -> f64 {
        self.pages.min(self.soft_limit as f64)
    }

    fn room(&self) -> f64 {
        self.most() - (self.logged - self.recycled as f64)
    }

    /// Lets it run until `now`, which is not past what [`next`](Self::next) said.
    pub(super) fn advance(&mut self, now: Nanos) {
        let gone = now - self.at;
        if gone == 0 {
            return;
        }
        self.at = now;
        if self.stopped.is_some() {
            return;
        }
        let gone = seconds(gone);
        let (rate, room) = (self.rate(), self.room());
        let wants = rate * gone;
        if wants < room - NEXT_TO_NOTHING {
            self.logged += wants;
            self.stores += wants;
            return;
        }
        self.logged = self.recycled as f64 + self.most();
        self.stores += room;
        if !self.fills() && rate > 0.0 {
            let left = (gone - room / rate).max(0.0);
            self.stores += left * self.piece.rate.min(self.next_stores);
        }
    }

    /// Whether it has more pages than its ring has room for.
    fn fills(&self) -> bool {
        self.pages >= self.soft_limit as f64
    }

    /// Whether its ring is full.
    pub(super) fn is_full(&self) -> bool {
        self.fills() && self.room() < NEXT_TO_NOTHING
    }

    /// Goes on to what it wants to do by now.
    pub(super) fn turn(&mut self) {
        while self.piece.until <= self.at {
            self.piece = self.demand.next();
        }
    }

    /// When its ring will be full, or its rate change, if nothing happens to it before.
    pub(super) fn next(&self) -> Nanos {
        let rate = self.rate();
        let full = match self.fills() && rate > 0.0 {
            // Not now: else there would be no end to it.
            true => self.at.saturating_add(nanos_up(self.room() / rate).max(1)),
            false => NEVER,
        };
        full.min(self.piece.until)
    }

    /// Enters the guest again.
    pub(super) fn resume(&mut self) {
        if let Some(since) = self.stopped.take() {
            self.stalled += self.at - since;
        }
    }

    /// Takes what waits in the ring. Entries.
    pub(super) fn harvest(&mut self) -> u64 {
        let waiting = self.waiting();
        self.taken += waiting;
        waiting
    }

    /// What is harvested makes room, and its pages are protected.
    pub(super) fn recycle(&mut self) {
        self.recycled = self.taken;
    }

    /// Whether all that was harvested is reset.
    pub(super) fn all_recycled(&self) -> bool {
        self.recycled == self.taken
    }

    pub(super) fn waiting(&self) -> u64 {
        // What is not whole yet can't be seen.
        (self.logged + NEXT_TO_NOTHING) as u64 - self.taken
    }

    pub(super) fn logged(&self) -> f64 {
        self.logged
    }

    /// Time out of the guest, up to this moment.
    pub(super) fn stall(&self) -> Nanos {
        self.stalled + self.stopped.map_or(0, |since| self.at - since)
    }

    /// How full the ring is, of what stops the vCPU.
    pub(super) fn fullness(&self) -> f64 {
        self.waiting() as f64 / self.soft_limit as f64
    }

    pub(super) fn observe(&self) -> RingObservation {
        let mut seen = RingObservation::default();
        seen.entries = self.entries;
        seen.soft_limit = self.known_soft_limit;
        seen.waiting = self.waiting();
        seen.taken = self.taken;
        seen.full_exits = self.full_exits;
        seen
    }
}
