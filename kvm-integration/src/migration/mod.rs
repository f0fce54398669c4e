//! Pre-copy live migration, from a running guest into memory of our own.
//!
//! Round 0 sends all memory; each further round asks the tracker what was written meanwhile and
//! sends that, while the guest goes on. When what is to be sent fits into the downtime that is
//! allowed, or enough is enough, the vCPUs stop, one last sync tells the rest, and all of it is
//! sent. Then both sides must be equal.

mod converge;
mod link;
mod outcome;
#[cfg(test)]
mod tests;
mod tracker;

use std::io;
use std::num::NonZeroU64;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::machine::{Guest, GuestSlot};
use crate::page_set::PageSet;
use converge::Converge;
use link::Link;

pub use link::Destination;
pub use outcome::{Limits, Observer, Outcome, Round, mib};
pub use tracker::{Rings, Tracker};

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
    let bandwidth = limits.bandwidth_mib;
    let mut link = Link::new(slots, destination, bandwidth, interrupted, observer);
    let pages_total = slots.iter().map(|slot| slot.memory.pages()).sum();
    let stores = guest.stores();
    let mut pending = Pending::new(slots, tracker);
    let start = pending.start;

    // All memory is sent anyway: what counts are writes that come after this.
    let mut round = pending.sync(true)?;
    pending.clear();
    (round.pages, round.written_in) = (pages_total, None);
    round.send = link.send(0, pages_total, true, link.whole().into_iter())?;
    // No other round measures the link as well as this one.
    let allowed = pages_total as f64 * limits.downtime.as_secs_f64() / round.send.as_secs_f64();
    let mut rounds = vec![round];
    let mut rearms = 0;
    let (mut converge, mut limit) = (Converge::default(), None);

    let converged = loop {
        guest.check()?;
        let mut round = pending.sync(true)?;
        rearms += u32::from(rearm(guest, pending.tracker)?);
        if round.pages as f64 <= allowed {
            break true;
        }
        if rounds.len() >= limits.max_rounds as usize {
            break false;
        }
        if limits.converge {
            limit = pending.limit(&mut converge, &rounds, &round)?.or(limit);
        }
        round.limit = limit;
        round.send = link.send(rounds.len(), round.pages, true, pending.pages.runs())?;
        pending.clear();
        rounds.push(round);
    };

    link.stop();
    let stop = Instant::now();
    guest.pause()?;
    let stopping = stop.elapsed();
    pending.tracker.quiesce()?;
    let mut round = pending.sync(false)?;
    round.send = link.send(rounds.len(), round.pages, false, pending.pages.runs())?;
    round.limit = limit;
    rounds.push(round);
    let (downtime, total) = (stop.elapsed(), start.elapsed());

    let (mismatched_pages, first_mismatch) = link.compare()?;
    Ok(Outcome {
        rounds,
        start,
        rearms,
        converged,
        stopping,
        downtime,
        total,
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
    fn new(slots: &[GuestSlot], tracker: &'a mut dyn Tracker) -> Self {
        let start = Instant::now();
        Self {
            tracker,
            pages: PageSet::new(slots),
            start,
            synced: start,
            since: start,
        }
    }

    /// Adds what was written since the last sync. The round that sends it all, before that.
    fn sync(&mut self, running: bool) -> Result<Round> {
        let begin = Instant::now();
        self.tracker.sync(&mut self.pages)?;
        self.synced = Instant::now();
        Ok(Round {
            pages: self.pages.count(),
            running,
            begin: begin - self.start,
            written_in: Some(self.synced - self.since),
            sync: self.synced - begin,
            send: Duration::ZERO,
            limit: None,
        })
    }

    /// Limits the guest, or limits it more, if what was written during the last of `rounds` is too
    /// much: what each vCPU may dirty from now on, if that has changed.
    fn limit(
        &mut self,
        converge: &mut Converge,
        rounds: &[Round],
        written: &Round,
    ) -> Result<Option<NonZeroU64>> {
        let tighter = rounds
            .last()
            .and_then(|sent| converge.after(sent, written.pages));
        tighter.map(|limit| self.tracker.limit(limit)).transpose()
    }

    /// All of it was sent.
    fn clear(&mut self) {
        self.pages.clear();
        self.since = self.synced;
    }
}
