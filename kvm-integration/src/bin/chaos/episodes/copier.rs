// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One round of a migration: a sync, and copies of the pages that it reports.

use anyhow::{Context, Result, bail};
use kvm_dirty_ring::error::{ResetError, SlotError, SyncError};
use kvm_dirty_ring::{DirtyLog, DirtyPages, DirtyPart, SlotId};

use super::ledger::Ledger;

/// Resets that fail in a row at the most: none of those that are made to does so again.
const MOST_FAILURES: u32 = 1000;

/// Which of the pages that a sync reports are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Every page.
    All,
    /// All pages except open ones: every sync reports those until they are closed, so they may wait.
    Others,
}

/// A thread that syncs, and what it has received.
pub struct Copier<'a> {
    log: &'a DirtyLog,
    ledger: &'a Ledger,
    dirty: DirtyPages,
}

impl<'a> Copier<'a> {
    pub fn new(log: &'a DirtyLog, ledger: &'a Ledger) -> Self {
        Self {
            log,
            ledger,
            dirty: DirtyPages::new(),
        }
    }

    /// A round beside those of others.
    pub fn round(&mut self, kind: Kind) -> Result<()> {
        let ledger = self.ledger;
        let rounds = ledger.rounds.read();
        let _under_way = rounds.unwrap_or_else(std::sync::PoisonError::into_inner);
        self.round_alone(kind)
    }

    /// A round; the caller sees to it that everybody else's are waited for when it matters.
    pub fn round_alone(&mut self, kind: Kind) -> Result<()> {
        let then = self.ledger.now();
        let synced = retry(|| self.log.sync(&mut self.dirty));
        synced.context("the dirty pages could not be had")?;
        self.copy(
            then,
            match kind {
                Kind::All => self.dirty.part(),
                Kind::Others => self.dirty.others(),
            },
        )
    }

    /// A round beside those of others, whose pages are protected when they are read: so many chunks, of so many pages at most. What is
    /// left comes with a sync. It belongs to the same round, as somebody may compare the copy when that is over.
    pub fn round_on_demand(&mut self, chunks: u64, span: u64) -> Result<()> {
        let rounds = self.ledger.rounds.read();
        let _under_way = rounds.unwrap_or_else(std::sync::PoisonError::into_inner);
        let then = self.ledger.now();
        let found = retry(|| self.log.sync_on_demand());
        let mut found = found.context("the dirty pages could not be found")?;
        for _ in 0..chunks {
            let chunk = found.next_chunk(span);
            match chunk.context("found pages could not be had")? {
                Some(chunk) => self.copy(then, chunk)?,
                None => return Ok(()),
            }
        }
        drop(found);
        self.round_alone(Kind::Others)
    }

    /// Copies what a sync has reported that began `then`.
    fn copy(&self, then: u64, part: DirtyPart<'_>) -> Result<()> {
        let slots = self.ledger.since(then);
        for run in part.runs() {
            // It is unknown which of two slots of one id is meant: both are copied.
            let slots = slots.iter().filter(|slot| slot.id == run.slot);
            let copied = slots.filter(|slot| slot.copy_run(run.first_page, run.pages));
            if copied.count() == 0 {
                bail!(
                    "a sync reported {} pages from {} on of slot {}, which has none of them",
                    run.pages,
                    run.first_page,
                    run.slot
                );
            }
        }
        Ok(())
    }

    /// The pages of `slot` that the last round received.
    pub fn reported(&self, slot: SlotId) -> impl Iterator<Item = u64> {
        let pages = self.dirty.pages().filter(move |&(id, _)| id == slot);
        pages.map(|(_, page)| page)
    }
}

/// An error that may be due to a reset that was made to fail.
pub trait Retry {
    fn is_reset(&self) -> bool;
}

impl Retry for ResetError {
    fn is_reset(&self) -> bool {
        true
    }
}

impl Retry for SyncError {
    fn is_reset(&self) -> bool {
        matches!(self, Self::Reset(_))
    }
}

impl Retry for SlotError {
    fn is_reset(&self) -> bool {
        matches!(self, Self::Reset(_))
    }
}

/// Does it again for as long as a reset fails.
pub fn retry<T, E: Retry>(mut attempt: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let mut failures = 0;
    loop {
        match attempt() {
            Err(error) if error.is_reset() && failures < MOST_FAILURES => failures += 1,
            result => return result,
        }
    }
}
