// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pre-copy live migration, from a running guest into memory of our own.
//!
//! Round 0 sends all memory; each further round asks the tracker what was written meanwhile and
//! sends that, while the guest goes on. Pages that it writes all the time may stay open: they are
//! sent in the last round alone. When what is left fits into the downtime that is
//! allowed, or enough is enough, the vCPUs stop, one last sync returns the rest, and all of it is
//! sent. Then both sides must be equal. Where the link breaks, what has not arrived is given back to the
//! tracker, and the next round sends it.

mod link;
mod outcome;
mod places;
mod steering;
#[cfg(test)]
mod tests;
mod throttling;
mod tracker;

use std::io;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Result;
use kvm_dirty_ring::Run;
use kvm_dirty_ring::convergence::Decision;

use crate::machine::{Guest, GuestSlot};
use crate::page_set::PageSet;
use link::Link;
use steering::Steering;
use throttling::Throttling;

pub use link::Destination;
pub use outcome::{Limits, Observer, Outcome, Round, mib};
pub use places::Places;
#[cfg(tiny_guest)]
pub(crate) use tracker::refresh as refresh_log;
pub use tracker::{Open, Rings, Tracker};

/// Migrates `guest` to `destination`. `tracker`, which tracks already, knows what is written.
/// Afterwards the guest is paused.
///
/// # Errors
/// What failed; or, soon after `interrupted` became true, that.
pub fn migrate(
    guest: &mut (impl Guest + ?Sized),
    tracker: &mut dyn Tracker,
    destination: &Destination,
    limits: &Limits,
    interrupted: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    let slots = guest.slots();
    let now = guest.now();
    let mut link = Link::new(slots, destination, limits, now, interrupted, observer);
    let pages_total = slots.iter().map(|slot| slot.memory.pages()).sum();
    let stores = guest.stores();
    let mut steering = Steering::new(limits);
    tracker.set_working_set(steering.working_set());
    let mut pending = Pending::new(slots, tracker, now);

    // All memory is sent anyway: what counts are writes that come after this.
    let mut round = pending.sync(guest)?;
    pending.clear();
    (round.pages, round.written_in) = (pages_total, None);
    steering.begin(pages_total);
    let sent = link.send(guest, 0, pages_total, true, link.whole().into_iter())?;
    round.send = sent.time;
    steering.measured(pages_total, round.send);
    pending.tracker.set_working_set(steering.working_set());
    let mut rounds = vec![round];
    let mut rearms = 0;
    let (mut refreshes, mut refreshing) = (0, Duration::ZERO);
    let (mut throttling, mut limit, mut hopeless) = (Throttling::default(), None, None);

    let converged = loop {
        guest.check()?;
        let mut round = pending.sync(guest)?;
        rearms += u32::from(rearm(guest, pending.tracker)?);
        let decision = steering.decide(round.pages, &pending.tracker.open());
        if decision == Decision::Finish {
            break true;
        }
        if rounds.len() >= limits.max_rounds as usize {
            break false;
        }
        match decision {
            Decision::Refresh => {
                let pause = refresh(guest, pending.tracker)?;
                steering.refreshed(pause);
                pending.tracker.set_working_set(steering.working_set());
                refreshes += 1;
                refreshing += pause;
                // What this sync has found is sent with what the next one does.
                continue;
            }
            Decision::Hopeless { pages_per_second } => {
                hopeless.get_or_insert(pages_per_second);
                // Where nothing is left to be sent but what stays open, no limit makes it less.
                let is_vain = limit.is_some() && round.pages == 0;
                if !limits.converge || is_vain {
                    break false;
                }
                let tighter = throttling.tighten(pages_per_second);
                limit = Some(pending.tracker.limit(tighter)?);
            }
            Decision::GoOn | Decision::Finish => {}
        }
        round.limit = limit;
        let sent = link.send(guest, rounds.len(), round.pages, true, pending.pages.runs())?;
        round.send = sent.time;
        match sent.broken {
            None => pending.clear(),
            Some(broken) => {
                round.cut_off = round.pages - broken.sent;
                round.pages = broken.sent;
                pending.give_back(&broken.arrived)?;
                steering.begin_again();
            }
        }
        rounds.push(round);
    };

    link.stop();
    let stop = guest.now();
    guest.pause()?;
    let stopping = guest.now() - stop;
    pending.tracker.quiesce()?;
    let mut round = pending.last_sync(guest)?;
    let sent = link.send(
        guest,
        rounds.len(),
        round.pages,
        false,
        pending.pages.runs(),
    )?;
    (round.send, round.limit) = (sent.time, limit);
    rounds.push(round);
    let end = guest.now();

    let (mismatched_pages, first_mismatch) = link.compare()?;
    Ok(Outcome {
        rounds,
        start: now,
        rearms,
        refreshes,
        refreshing,
        converged,
        hopeless,
        stopping,
        downtime: end - stop,
        total: end - now,
        pages_total,
        stores: guest.stores() - stores,
        mismatched_pages,
        first_mismatch,
    })
}

/// If pages may be unprotected, stops the guest, has them protected anew, and lets it go on: they
/// would be sent in each round. Whether it was so.
fn rearm(guest: &mut (impl Guest + ?Sized), tracker: &mut dyn Tracker) -> Result<bool> {
    if !tracker.is_suspicious() {
        return Ok(false);
    }
    guest.pause()?;
    tracker.rearm(&mut |slot| guest.protect(slot).map_err(io::Error::other))?;
    guest.resume();
    Ok(true)
}

/// Closes all that stays open. For how long the guest was stopped for it.
fn refresh(guest: &mut (impl Guest + ?Sized), tracker: &mut dyn Tracker) -> Result<Duration> {
    let stop = guest.now();
    let is_to_stop = tracker.refresh_stops_the_guest();
    if is_to_stop {
        guest.pause()?;
    }
    tracker.refresh(&mut |slot| guest.protect(slot).map_err(io::Error::other))?;
    if !is_to_stop {
        return Ok(Duration::ZERO);
    }
    guest.resume();
    Ok(guest.now() - stop)
}

/// What is to be sent next.
struct Pending<'a> {
    tracker: &'a mut dyn Tracker,
    pages: PageSet,
    start: Instant,
    synced: Instant,
    /// The pages were written since then.
    since: Instant,
}

impl<'a> Pending<'a> {
    fn new(slots: &[GuestSlot], tracker: &'a mut dyn Tracker, start: Instant) -> Self {
        Self {
            tracker,
            pages: PageSet::new(slots),
            start,
            synced: start,
            since: start,
        }
    }

    /// Adds what was written since the last sync, but for what stays open. The round that sends it all,
    /// before that.
    fn sync(&mut self, guest: &(impl Guest + ?Sized)) -> Result<Round> {
        let begin = guest.now();
        self.tracker.sync(&mut self.pages)?;
        Ok(Round {
            members: self.tracker.open().members,
            ..self.round(begin, guest.now(), true)
        })
    }

    /// The same with what stays open, once the guest has stopped.
    fn last_sync(&mut self, guest: &(impl Guest + ?Sized)) -> Result<Round> {
        let begin = guest.now();
        self.tracker.last_sync(&mut self.pages)?;
        Ok(self.round(begin, guest.now(), false))
    }

    /// After a sync between these.
    fn round(&mut self, begin: Instant, end: Instant, running: bool) -> Round {
        self.synced = end;
        Round {
            pages: self.pages.count(),
            cut_off: 0,
            members: 0,
            running,
            begin: begin - self.start,
            written_in: Some(self.synced - self.since),
            sync: self.synced - begin,
            send: Duration::ZERO,
            limit: None,
        }
    }

    /// All of it was sent.
    fn clear(&mut self) {
        self.pages.clear();
        self.tracker.arrived();
        self.since = self.synced;
    }

    /// The link broke, when of all this these pages had arrived: the next sync adds the others.
    fn give_back(&mut self, arrived: &[Run]) -> Result<()> {
        self.pages.clear();
        self.tracker.give_back(arrived)
    }
}
