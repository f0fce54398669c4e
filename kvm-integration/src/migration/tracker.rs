// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The log that records what a guest has written.

use std::io;
use std::num::NonZeroU64;

use anyhow::{Context, Result, bail, ensure};
use kvm_dirty_ring::convergence::Refreshing;
use kvm_dirty_ring::error::{LimitError, ReaperError, SlotError};
use kvm_dirty_ring::pacing::Pacing;
use kvm_dirty_ring::{DirtyLog, DirtyPages, LastPages, Mode, Reaper, Run, SlotId, WorkingSet};

use super::throttling::share;
use crate::page_set::PageSet;

/// Dirty tracking of one migration.
pub trait Tracker {
    /// Adds every page written since the call before to `dirty`, but for those that stay [open](Self::open). They
    /// are protected again when it returns, so that a later write is reported by a later call.
    ///
    /// # Errors
    /// Pages may have been lost to this call, but not to a later one that succeeds.
    fn sync(&mut self, dirty: &mut PageSet) -> Result<()>;

    /// Adds every page written since the last sync, and all that stay open, to `dirty`: the vCPUs stand
    /// still, and do not run again.
    ///
    /// # Errors
    /// As [`sync`](Self::sync).
    fn last_sync(&mut self, dirty: &mut PageSet) -> Result<()> {
        self.sync(dirty)
    }

    /// All pages that were reported so far have arrived.
    fn arrived(&mut self) {}

    /// Of the pages that were reported since [`arrived`](Self::arrived), these have arrived. The next sync reports the
    /// others again.
    ///
    /// # Errors
    /// The tracker cannot take pages back, and they are lost.
    fn give_back(&mut self, arrived: &[Run]) -> Result<()> {
        let _ = arrived;
        bail!("this tracker takes no pages back")
    }

    /// What may stay open from now on; none: every page is protected. A tracker that leaves nothing open need
    /// not listen.
    fn set_working_set(&mut self, terms: Option<WorkingSet>) {
        let _ = terms;
    }

    /// What the last sync has left open.
    fn open(&self) -> Open {
        Open::default()
    }

    /// Whether the vCPUs have to stand still for a [refresh](Self::refresh).
    fn refresh_stops_the_guest(&self) -> bool {
        true
    }

    /// Closes all open pages, so that the next sync reports them. `protect` as for [`rearm`](Self::rearm).
    fn refresh(&mut self, protect: &mut dyn FnMut(SlotId) -> io::Result<()>) -> Result<()> {
        let _ = protect;
        Ok(())
    }

    /// Whether some pages may be unprotected, and so come with every sync until they are
    /// [re-armed](Self::rearm).
    fn is_suspicious(&self) -> bool {
        false
    }

    /// Calls `protect` for each slot that has such pages; it protects all pages of the slot anew. The
    /// vCPUs stand still.
    fn rearm(&mut self, protect: &mut dyn FnMut(SlotId) -> io::Result<()>) -> Result<()> {
        let _ = protect;
        Ok(())
    }

    /// The guest is to dirty no more than so many pages a second, all vCPUs together. What each of
    /// them may.
    fn limit(&mut self, pages_per_second: f64) -> Result<NonZeroU64> {
        let _ = pages_per_second;
        Err(LimitError::Bitmap.into())
    }

    /// The vCPUs stand still, and one last sync will come: nothing needs to be emptied any more.
    fn quiesce(&mut self) -> Result<()>;
}

/// Pages that stay open.
#[derive(Debug, Clone, Copy, Default)]
pub struct Open {
    /// How many.
    pub members: u64,
    /// What the tracker knows of refreshes; not for how long one stops the guest.
    pub refresh: Refreshing,
}

impl Open {
    /// What `log` knows, whose last sync has found `found`.
    pub(crate) fn of(log: &DirtyLog, found: &DirtyPages) -> Self {
        let stats = log.stats().working_set;
        let mut refresh = Refreshing::default();
        refresh.owed = stats.refresh_owed;
        (refresh.closed, refresh.back) = (stats.last_closed, stats.back);
        Self {
            members: found.members().page_count(),
            refresh,
        }
    }
}

/// Closes all that `log` has left open.
pub(crate) fn refresh(
    log: &DirtyLog,
    protect: &mut dyn FnMut(SlotId) -> io::Result<()>,
) -> Result<()> {
    match log.refresh(protect) {
        // For good, and everything is reported.
        Err(SlotError::BrokenRing { .. }) => Ok(()),
        refreshed => {
            refreshed.context("pages that stay open could not be closed")?;
            Ok(())
        }
    }
}

/// The crate's: a dirty log, and a reaper.
#[derive(Debug)]
pub struct Rings {
    log: DirtyLog,
    reaper: Option<Reaper>,
    found: DirtyPages,
    /// What was found and need not have arrived.
    unsent: DirtyPages,
    last: LastPages,
}

impl Rings {
    /// Starts a reaper of that policy.
    pub fn start(log: &DirtyLog, policy: impl Pacing + 'static) -> Result<Self, ReaperError> {
        Ok(Self::with(log, Reaper::spawn(log, policy)?))
    }

    /// With a reaper of one's own.
    pub fn with(log: &DirtyLog, reaper: Reaper) -> Self {
        Self {
            reaper: Some(reaper),
            ..Self::without_reaper(log)
        }
    }

    /// Without one: vCPUs empty their rings when these are full.
    pub fn without_reaper(log: &DirtyLog) -> Self {
        Self {
            log: log.clone(),
            reaper: None,
            found: DirtyPages::new(),
            unsent: DirtyPages::new(),
            last: LastPages::new(),
        }
    }

    /// The reaper, until it is [quiesced](Tracker::quiesce).
    pub fn reaper(&self) -> Option<&Reaper> {
        self.reaper.as_ref()
    }
}

impl Tracker for Rings {
    fn sync(&mut self, dirty: &mut PageSet) -> Result<()> {
        let synced = self.log.sync(&mut self.found);
        synced.context("the dirty pages could not be had")?;
        ensure!(self.unsent.merge(&self.found), "out of memory");
        dirty.add_runs(self.found.others().runs());
        Ok(())
    }

    fn arrived(&mut self) {
        self.unsent.clear();
    }

    fn give_back(&mut self, arrived: &[Run]) -> Result<()> {
        for run in arrived {
            self.unsent.remove(run.slot, run.first_page, run.pages);
        }
        let given = self.log.put_back(&self.unsent);
        given.context("pages that did not arrive could not be given back")?;
        self.unsent.clear();
        Ok(())
    }

    fn last_sync(&mut self, dirty: &mut PageSet) -> Result<()> {
        let synced = self.log.last_sync(&mut self.last);
        synced.context("the last dirty pages could not be had")?;
        dirty.add_runs(self.last.runs());
        Ok(())
    }

    fn set_working_set(&mut self, terms: Option<WorkingSet>) {
        self.log.set_working_set(terms);
    }

    fn open(&self) -> Open {
        Open::of(&self.log, &self.found)
    }

    fn refresh_stops_the_guest(&self) -> bool {
        self.log.mode() == Mode::Rings
    }

    fn refresh(&mut self, protect: &mut dyn FnMut(SlotId) -> io::Result<()>) -> Result<()> {
        refresh(&self.log, protect)
    }

    fn is_suspicious(&self) -> bool {
        let stats = self.log.stats();
        // Once a ring is broken, nothing ends it.
        stats.suspect_pages > 0 && stats.overruns == 0
    }

    fn rearm(&mut self, protect: &mut dyn FnMut(SlotId) -> io::Result<()>) -> Result<()> {
        let rearmed = self.log.rearm(protect);
        rearmed.context("pages that may be unprotected could not be protected anew")?;
        Ok(())
    }

    fn limit(&mut self, pages_per_second: f64) -> Result<NonZeroU64> {
        let limit = share(pages_per_second, self.log.stats().vcpus.len());
        let limited = self.log.set_dirty_limits(Some(limit));
        limited.context("the guest could not be limited")?;
        Ok(limit)
    }

    fn quiesce(&mut self) -> Result<()> {
        match self.reaper.take() {
            Some(reaper) => reaper.stop().context("the reaper failed"),
            None => Ok(()),
        }
    }
}
