// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A reaper without a thread, for a VMM that has an event loop.

use core::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Instant;

use super::timer::Timer;
use super::turns::Turns;
use crate::error::ReaperError;
use crate::log::DirtyLog;
use crate::observe::trace;
use crate::pacing::Pacing;
use crate::pacing::alarm::Heard;
use crate::sync::{Arc, Ordering};

/// A reaper for a VMM's event loop: as [`Reaper`](crate::Reaper), but without a thread of its own.
///
/// Its descriptor becomes readable when the policy's time has come, and when a vCPU stops on a full ring; then call
/// [`tick`](Self::tick). It is a timerfd: nobody reads it, and `tick` makes it unreadable again. It suits epoll, by level
/// or by edge, and poll.
///
/// A tick waits for a reset, some microseconds to milliseconds, and longer while memslots are changed in the kernel.
/// So run no vCPU on the loop's thread, and nothing on which a vCPU depends that has a full ring.
///
/// ```
/// use kvm_dirty_ring::{EventReaper, error::ReaperError, pacing::Adaptive};
/// # let vm = kvm_dirty_ring::sim::SimVm::new(Default::default());
/// # let log = vm.dirty_log();
///
/// let mut reaper = EventReaper::new(&log, Adaptive::default())?;
/// // Have the loop wait for `reaper.as_fd()` to become readable. Whenever it is:
/// if let Err(error) = reaper.tick() {
///     eprintln!("{error}"); // it goes on all the same
/// }
/// # Ok::<(), ReaperError>(())
/// ```
///
/// A log has one reaper at a time, of either kind. Dropping it ends it; what is in the rings stays there for the next sync.
pub struct EventReaper {
    log: DirtyLog,
    turns: Turns,
    timer: Arc<Timer>,
}

impl EventReaper {
    /// A reaper whose first tick is due at once.
    ///
    /// # Errors
    /// [`ReaperError::Running`]: the log has a reaper already; [`ReaperError::Timer`].
    pub fn new(log: &DirtyLog, policy: impl Pacing + 'static) -> Result<Self, ReaperError> {
        let timer = Arc::new(Timer::new().map_err(failed("timerfd_create"))?);
        timer
            .arm(Instant::now())
            .map_err(failed("timerfd_settime"))?;
        // Acquire: pairs with the release of the reaper before, which has done its last pass.
        if log.inner().reaped.swap(true, Ordering::Acquire) {
            return Err(ReaperError::Running);
        }
        let theirs = Arc::clone(&timer);
        let arm = Box::new(move |at| theirs.arm(at));
        log.inner().alarm.set_remote(Some(arm));
        trace::reaper(&log.inner().name, "init");
        Ok(Self {
            log: log.clone(),
            turns: Turns::new(policy),
            timer,
        })
    }

    /// Shows the policy the rings, and empties those that it chooses: when the descriptor is readable. Before its time, with
    /// no ring full since, it does nothing.
    ///
    /// # Errors
    /// What went wrong: the timer, or else the first thing. No page is lost, and the reaper goes on: by
    /// [`Fixed`](crate::pacing::Fixed), once a second, after [`ReaperError::Policy`]; more and more seldom, down to once a
    /// second, while resets are refused ([`ReaperError::Reset`]). Only after [`ReaperError::Timer`] the descriptor may stay as
    /// it is: then call this again at [`due`](Self::due).
    pub fn tick(&mut self) -> Result<(), ReaperError> {
        let mut first = None;
        let alarm = &self.log.inner().alarm;
        let heard = alarm.heard();
        if heard == Heard::Full || Instant::now() >= self.turns.due() {
            self.turns.turn(&self.log, heard, |error| {
                trace::reaper_error(&self.log.inner().name, &error);
                first.get_or_insert(error);
            });
        }
        let armed = alarm.listen(self.turns.deaf(), self.turns.due());
        // Only the timer's error asks the caller for something; the other one was traced.
        armed.map_err(failed("timerfd_settime"))?;
        first.map_or(Ok(()), Err)
    }

    /// When the policy wants to look again, if no ring is full before: the descriptor is readable from then on.
    pub fn due(&self) -> Instant {
        self.turns.due()
    }

    /// Goes on with another policy. A tick is due at once.
    ///
    /// # Errors
    /// [`ReaperError::Timer`], see [`tick`](Self::tick).
    pub fn set_policy(&mut self, policy: impl Pacing + 'static) -> Result<(), ReaperError> {
        self.turns.set_policy(&self.log, policy);
        let now = Instant::now();
        let armed = self.log.inner().alarm.listen(now, now);
        armed.map_err(failed("timerfd_settime"))
    }
}

fn failed(call: &'static str) -> impl FnOnce(io::Error) -> ReaperError {
    move |source| ReaperError::Timer {
        call,
        source: Arc::new(source),
    }
}

impl AsFd for EventReaper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

impl AsRawFd for EventReaper {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Drop for EventReaper {
    fn drop(&mut self) {
        let inner = self.log.inner();
        inner.alarm.set_remote(None);
        inner.reaper_counts.rest();
        trace::reaper(&inner.name, "end");
        // Release: pairs with the acquire of the reaper after it.
        inner.reaped.store(false, Ordering::Release);
    }
}

impl fmt::Debug for EventReaper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventReaper")
            .field("due", &self.due())
            .finish_non_exhaustive()
    }
}
