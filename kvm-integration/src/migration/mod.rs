//! Pre-copy live migration, from a running guest into memory of our own.
//!
//! Round 0 sends all memory; each further round asks the tracker what was written meanwhile and
//! sends that, while the guest goes on. When what is to be sent fits into the downtime that is
//! allowed, or enough is enough, the vCPUs stop, one last sync tells the rest, and all of it is
//! sent. Then both sides must be equal.

mod converge;
mod link;
mod tracker;

use std::io;
use std::num::NonZeroU64;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kvm_dirty_ring::SlotId;

use crate::machine::{Guest, GuestSlot, MachineError};
use crate::memory::PAGE_SIZE;
use crate::page_set::PageSet;
use converge::Converge;
use link::Link;

pub use link::Destination;
pub use tracker::{Rings, Tracker, TrackerError};

/// How far to go, and how fast.
#[derive(Debug, Clone)]
pub struct Limits {
    /// MiB a second that the link takes; 0: as many as there are.
    pub bandwidth_mib: u64,
    /// Rounds while the guest runs, round 0 among them, at the most. At least one is made.
    pub max_rounds: u32,
    /// The guest stops as soon as what is to be sent then takes the link no longer than this. What
    /// is written between that sync and the stop comes on top.
    pub downtime: Duration,
    /// Where rounds do not become smaller, the guest's vCPUs are limited, until they do.
    pub converge: bool,
}

/// Watches a migration.
pub trait Observer {
    /// A round begins: `pages` are to be sent, with the guest running or stopped.
    fn begin(&mut self, round: usize, pages: u64, running: bool) {
        let _ = (round, pages, running);
    }

    /// Pages were sent.
    fn sent(&mut self, pages: u64) {
        let _ = pages;
    }

    /// The vCPUs will now be stopped.
    fn stop(&mut self) {}
}

/// Watches nothing.
impl Observer for () {}

/// One round, after it.
#[derive(Debug, Clone)]
pub struct Round {
    /// Pages sent.
    pub pages: u64,
    /// Whether the guest was running.
    pub running: bool,
    /// When its sync began, after the migration's start.
    pub begin: Duration,
    /// From the sync before to this round's: when these pages were written. `None` for round 0,
    /// which sends pages written or not.
    pub written_in: Option<Duration>,
    /// How long this round's sync took.
    pub sync: Duration,
    /// How long sending took.
    pub send: Duration,
    /// Pages per second that each vCPU was allowed to dirty when these pages were sent.
    pub limit: Option<NonZeroU64>,
}

impl Round {
    /// Pages per second that the guest has dirtied.
    pub fn dirty_rate(&self) -> Option<f64> {
        Some(self.pages as f64 / self.written_in?.as_secs_f64())
    }

    /// MiB sent.
    pub fn mib(&self) -> f64 {
        mib(self.pages)
    }

    /// MiB sent per second; `None` where there was nothing to measure.
    pub fn mib_per_second(&self) -> Option<f64> {
        (self.pages > 0).then(|| self.mib() / self.send.as_secs_f64())
    }
}

/// What `pages` pages are in MiB.
pub fn mib(pages: u64) -> f64 {
    (pages * PAGE_SIZE) as f64 / f64::from(1 << 20)
}

/// What became of a migration.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Outcome {
    /// All rounds; the last one with the guest stopped.
    pub rounds: Vec<Round>,
    /// When the first sync began.
    pub start: Instant,
    /// How often the guest was stopped to protect pages anew that might not have been protected.
    pub rearms: u32,
    /// Whether what was left fitted into the downtime allowed, before the rounds ran out.
    pub converged: bool,
    /// From the wish to stop the vCPUs until all of them were out of the guest.
    pub stopping: Duration,
    /// From the wish to stop the vCPUs until the last page was sent.
    pub downtime: Duration,
    /// From the first sync until the last page was sent.
    pub total: Duration,
    /// Pages of the guest.
    pub pages_total: u64,
    /// Page stores of the guest meanwhile.
    pub stores: u64,
    /// Pages that differ in at least one byte, in the end.
    pub mismatched_pages: u64,
    /// The first of them.
    pub first_mismatch: Option<(SlotId, u64)>,
}

impl Outcome {
    /// Pages sent, each as often as it was.
    pub fn pages_sent(&self) -> u64 {
        self.rounds.iter().map(|round| round.pages).sum()
    }

    /// How long the guest was running during the migration.
    pub fn running(&self) -> Duration {
        self.total.saturating_sub(self.downtime)
    }
}

/// A migration did not come to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrationError {
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Dirty tracking failed.
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    /// Somebody asked for an end.
    #[error("interrupted")]
    Interrupted,
}

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
) -> Result<Outcome, MigrationError> {
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
fn rearm(
    guest: &mut (impl Guest + ?Sized),
    tracker: &mut dyn Tracker,
) -> Result<bool, MigrationError> {
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
    fn sync(&mut self, running: bool) -> Result<Round, TrackerError> {
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
    ) -> Result<Option<NonZeroU64>, TrackerError> {
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

#[cfg(test)]
mod tests;
