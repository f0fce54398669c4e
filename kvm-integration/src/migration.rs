//! Pre-copy live migration, from a running machine into memory of our own.
//!
//! Round 0 sends all memory; each further round asks the log what was written meanwhile and sends
//! that, while the guest goes on. When a round was small, or enough is enough, the vCPUs stop, and
//! a last sync tells what is left. Then both sides must be equal.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::error::{ReaperError, SyncError};
use kvm_dirty_ring::pacing::Pacing;
use kvm_dirty_ring::{DirtyPages, Reaper, Run, SlotId, Stats};

use crate::machine::{GuestSlot, Machine, MachineError};
use crate::memory::{GuestMemory, MemoryError, PAGE_SIZE};
use crate::rate::TokenBucket;

/// Pages sent between two looks at the clock and at whether to go on.
const PIECE: u64 = 64;
/// The longest sleep between two looks at whether to go on.
const LONGEST_SLEEP: Duration = Duration::from_millis(20);

/// How far to go, and how fast.
#[derive(Debug, Clone)]
pub struct Limits {
    /// MiB a second that the link takes; 0: as many as there are.
    pub bandwidth_mib: u64,
    /// Rounds while the guest runs, round 0 among them, at the most. At least one is made.
    pub max_rounds: u32,
    /// A round that takes the link no longer than this is the last before the guest stops: what is
    /// written meanwhile then takes about as long again, or less.
    pub small: Duration,
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
    /// From the sync before to this round's: when these pages were written. `None` for round 0,
    /// which sends pages written or not.
    pub written_in: Option<Duration>,
    /// How long this round's sync took.
    pub sync: Duration,
    /// How long sending took.
    pub send: Duration,
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
    /// Whether a round became small before the limit.
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
    /// What the log has counted since it was enabled.
    pub stats: Stats,
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
    /// There is no memory for the copy.
    #[error("no memory for the copy: make the guest smaller")]
    Memory(#[from] MemoryError),
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The log could not say what was written.
    #[error("the dirty pages could not be had")]
    Sync(#[from] SyncError),
    /// The reaper failed.
    #[error("the reaper failed")]
    Reaper(#[from] ReaperError),
    /// Somebody asked for an end.
    #[error("interrupted")]
    Interrupted,
}

/// Migrates `machine`, while `policy` keeps its rings from filling up. Afterwards it is paused.
///
/// # Errors
/// What failed; or, soon after `interrupted` became true, that.
pub fn migrate(
    machine: &mut dyn Machine,
    policy: impl Pacing + 'static,
    limits: &Limits,
    interrupted: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<Outcome, MigrationError> {
    let log = machine.log().clone();
    let mut link = Link::new(machine.slots(), limits, interrupted, observer)?;
    let pages_total = link.slots.iter().map(|slot| slot.memory.pages()).sum();
    let reaper = Reaper::spawn(&log, policy)?;
    let mut dirty = DirtyPages::new();
    let mut rounds = Vec::new();
    let stores = machine.stores();
    let start = Instant::now();

    // All memory is sent anyway: what counts are writes that come after this.
    log.sync(&mut dirty)?;
    let mut synced = Instant::now();
    let all: Vec<Run> = link.slots.iter().map(whole).collect();
    let send = link.send(0, pages_total, true, all.into_iter())?;
    rounds.push(Round {
        pages: pages_total,
        running: true,
        written_in: None,
        sync: synced - start,
        send,
    });
    // No other round measures the link as well as this one.
    let small = pages_total as f64 * limits.small.as_secs_f64() / send.as_secs_f64();

    // One sync, and the sending of what it says.
    let mut round = |link: &mut Link<'_>, number, running| {
        let begin = Instant::now();
        log.sync(&mut dirty)?;
        let (before, now) = (synced, Instant::now());
        synced = now;
        let pages = dirty.page_count();
        let send = link.send(number, pages, running, dirty.runs())?;
        let (written_in, sync) = (Some(now - before), now - begin);
        Ok::<_, MigrationError>(Round {
            pages,
            running,
            written_in,
            sync,
            send,
        })
    };
    let mut converged = false;
    while !converged && rounds.len() < limits.max_rounds as usize {
        machine.check()?;
        rounds.push(round(&mut link, rounds.len(), true)?);
        converged = rounds.last().is_some_and(|last| last.pages as f64 <= small);
    }

    let stop = Instant::now();
    machine.pause()?;
    let stopping = stop.elapsed();
    reaper.stop()?;
    rounds.push(round(&mut link, rounds.len(), false)?);
    let (downtime, total) = (stop.elapsed(), start.elapsed());

    let (mismatched_pages, first_mismatch) = link.compare()?;
    Ok(Outcome {
        rounds,
        converged,
        stopping,
        downtime,
        total,
        pages_total,
        stores: machine.stores() - stores,
        stats: log.stats(),
        mismatched_pages,
        first_mismatch,
    })
}

/// All of a slot.
fn whole(slot: &GuestSlot) -> Run {
    Run {
        slot: slot.id,
        first_page: 0,
        pages: slot.memory.pages(),
    }
}

/// The way to the copy, and the copy.
struct Link<'a> {
    slots: Vec<GuestSlot>,
    /// As many as `slots`.
    copies: Vec<GuestMemory>,
    bucket: Option<TokenBucket>,
    interrupted: &'a AtomicBool,
    observer: &'a mut dyn Observer,
}

impl<'a> Link<'a> {
    fn new(
        slots: &[GuestSlot],
        limits: &Limits,
        interrupted: &'a AtomicBool,
        observer: &'a mut dyn Observer,
    ) -> Result<Self, MemoryError> {
        let copies = slots
            .iter()
            .map(|slot| GuestMemory::new(slot.memory.pages()));
        let pages_per_second = limits.bandwidth_mib as f64 * 256.0;
        Ok(Self {
            slots: slots.to_vec(),
            copies: copies.collect::<Result<_, _>>()?,
            bucket: TokenBucket::new(pages_per_second),
            interrupted,
            observer,
        })
    }

    /// Sends the runs, `pages` pages in all. How long it took.
    fn send(
        &mut self,
        round: usize,
        pages: u64,
        running: bool,
        runs: impl Iterator<Item = Run>,
    ) -> Result<Duration, MigrationError> {
        let start = Instant::now();
        self.observer.begin(round, pages, running);
        for run in runs {
            let at = self.slots.iter().position(|slot| slot.id == run.slot);
            let at = at.expect("the log names slots of the machine's only");
            let end = run.first_page + run.pages;
            for first in (run.first_page..end).step_by(PIECE as usize) {
                let pages = PIECE.min(end - first);
                let memory = &self.slots[at].memory;
                memory.copy_run(first, pages, &self.copies[at]);
                self.observer.sent(pages);
                self.keep_pace(pages)?;
            }
        }
        Ok(start.elapsed())
    }

    fn keep_pace(&mut self, pages: u64) -> Result<(), MigrationError> {
        let until = self.bucket.as_mut().and_then(|bucket| bucket.take(pages));
        loop {
            self.go_on()?;
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            match left {
                None | Some(Duration::ZERO) => return Ok(()),
                Some(left) => thread::sleep(left.min(LONGEST_SLEEP)),
            }
        }
    }

    fn go_on(&self) -> Result<(), MigrationError> {
        // Relaxed: nothing comes with it.
        match self.interrupted.load(Ordering::Relaxed) {
            true => Err(MigrationError::Interrupted),
            false => Ok(()),
        }
    }

    /// Compares every page of every slot, byte for byte: how many differ, and the first that does.
    fn compare(&self) -> Result<(u64, Option<(SlotId, u64)>), MigrationError> {
        let (mut count, mut first) = (0, None);
        for (slot, copy) in self.slots.iter().zip(&self.copies) {
            for page in 0..slot.memory.pages() {
                if page % PIECE == 0 {
                    self.go_on()?;
                }
                if slot.memory.page_differs(page, copy) {
                    count += 1;
                    first.get_or_insert((slot.id, page));
                }
            }
        }
        Ok((count, first))
    }
}

#[cfg(test)]
mod tests;
