//! Who knows what a guest has written.

use std::io;
use std::num::NonZeroU64;

use anyhow::{Context, Result};
use kvm_dirty_ring::error::{LimitError, ReaperError};
use kvm_dirty_ring::pacing::Pacing;
use kvm_dirty_ring::{DirtyLog, DirtyPages, Reaper, SlotId};

use super::converge::share;
use crate::page_set::PageSet;

/// Dirty tracking of one migration.
pub trait Tracker {
    /// Adds every page written since the call before to `dirty`. They are protected again when it
    /// returns, so that a write which comes later is told by a later call.
    ///
    /// # Errors
    /// Pages may have been lost to this call, but not to a later one that succeeds.
    fn sync(&mut self, dirty: &mut PageSet) -> Result<()>;

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

/// The crate's: dirty rings, and a reaper.
#[derive(Debug)]
pub struct Rings {
    log: DirtyLog,
    reaper: Option<Reaper>,
    found: DirtyPages,
}

impl Rings {
    /// Starts a reaper of that policy.
    pub fn start(log: &DirtyLog, policy: impl Pacing + 'static) -> Result<Self, ReaperError> {
        Ok(Self::with(log, Reaper::spawn(log, policy)?))
    }

    /// With a reaper of one's own.
    pub fn with(log: &DirtyLog, reaper: Reaper) -> Self {
        Self {
            log: log.clone(),
            reaper: Some(reaper),
            found: DirtyPages::new(),
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
        dirty.add(&self.found);
        Ok(())
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
