//! Who knows what a guest has written.

use kvm_dirty_ring::error::{ReaperError, SyncError};
use kvm_dirty_ring::pacing::Pacing;
use kvm_dirty_ring::{DirtyLog, DirtyPages, Reaper};

use crate::page_set::PageSet;

/// Dirty tracking of one migration.
pub trait Tracker {
    /// Adds every page written since the call before to `dirty`. They are protected again when it
    /// returns, so that a write which comes later is told by a later call.
    ///
    /// # Errors
    /// Pages may have been lost to this call, but not to a later one that succeeds.
    fn sync(&mut self, dirty: &mut PageSet) -> Result<(), TrackerError>;

    /// The vCPUs stand still, and one last sync will come: nothing needs to be emptied any more.
    ///
    /// # Errors
    /// Whoever emptied something had failed.
    fn quiesce(&mut self) -> Result<(), TrackerError>;
}

/// It can't be said what the guest has written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackerError {
    /// The log could not say what was written.
    #[error("the dirty pages could not be had")]
    Sync(#[from] SyncError),
    /// The reaper failed.
    #[error("the reaper failed")]
    Reaper(#[from] ReaperError),
    /// An ioctl failed.
    #[cfg(target_arch = "x86_64")]
    #[error("KVM does not say what was written")]
    Kvm(#[from] crate::vm::VmError),
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
    ///
    /// # Errors
    /// It does not start.
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
    fn sync(&mut self, dirty: &mut PageSet) -> Result<(), TrackerError> {
        self.log.sync(&mut self.found)?;
        dirty.add(&self.found);
        Ok(())
    }

    fn quiesce(&mut self) -> Result<(), TrackerError> {
        match self.reaper.take() {
            Some(reaper) => Ok(reaper.stop()?),
            None => Ok(()),
        }
    }
}
