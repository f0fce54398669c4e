// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that empties the rings at the pace of a policy.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;

use super::scheduling::{Priority, prepare};
use super::turns::Turns;
use crate::error::ReaperError;
use crate::log::DirtyLog;
use crate::observe::stats::ReaperStats;
use crate::observe::trace;
use crate::pacing::Pacing;
use crate::pacing::alarm::Heard;
use crate::sync::{Arc, Condvar, Mutex, Ordering, lock, thread as threads, wait};

/// A running reaper: the thread that empties the rings. It stops when this is dropped.
///
/// The thread blocks every signal but the C library's own, and sleeps without timer slack. A vCPU that stops on a full ring wakes
/// it. If more vCPUs stop within the next half millisecond, they wake it once, when the half millisecond is over.
#[derive(Debug)]
pub struct Reaper {
    log: DirtyLog,
    control: Arc<Control>,
    thread: Option<threads::JoinHandle<()>>,
    ended: bool,
}

/// The settings of a [`Reaper`]'s thread.
///
/// ```
/// # let log = kvm_dirty_ring::sim::SimVm::new(Default::default()).dirty_log();
/// use kvm_dirty_ring::{Priority, Reaper, pacing::Adaptive};
///
/// let reaper = Reaper::builder()
///     .name("vm7-reaper")
///     .priority(Priority::Nice(5))
///     .spawn(&log, Adaptive::default())?;
/// reaper.stop()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct ReaperBuilder {
    name: Option<String>,
    cpus: Vec<usize>,
    priority: Priority,
}

#[derive(Debug, Default)]
struct Control {
    orders: Mutex<Orders>,
    /// Rung when the thread has followed an order.
    obeyed: Condvar,
    error: Mutex<Option<ReaperError>>,
}

/// The orders of the owner.
#[derive(Default)]
struct Orders {
    stop: bool,
    paused: bool,
    policy: Option<Box<dyn Pacing>>,
    /// The thread makes no pass, and begins none before it has looked here again.
    idle: bool,
}

impl core::fmt::Debug for Orders {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Orders")
            .field("stop", &self.stop)
            .field("paused", &self.paused)
            .finish_non_exhaustive()
    }
}

impl Control {
    fn report(&self, log: &DirtyLog, error: ReaperError) {
        *lock(&self.error) = Some(error.clone());
        trace::reaper_error(&log.inner().name, &error);
    }

    /// Gives an order.
    fn order(&self, log: &DirtyLog, order: impl FnOnce(&mut Orders)) {
        order(&mut lock(&self.orders));
        log.inner().alarm.command();
    }

    /// Notes that the thread has stopped making passes.
    fn idle(&self) {
        lock(&self.orders).idle = true;
        self.obeyed.notify_all();
    }
}

impl ReaperBuilder {
    /// Sets the thread's name, of which Linux keeps 15 bytes. The default is `dirty-ring-reap`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Sets the CPUs that the thread may run on. The default is those of the thread that starts it.
    pub fn cpus(mut self, cpus: impl IntoIterator<Item = usize>) -> Self {
        self.cpus = cpus.into_iter().collect();
        self
    }

    /// Sets how the thread is scheduled.
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// Starts a thread that empties the rings of `log` when `policy` decides so. A log has one reaper at a time.
    ///
    /// # Errors
    /// The log has a reaper already, or the thread cannot be started, or not with these settings. Then no reaper runs.
    pub fn spawn(
        self,
        log: &DirtyLog,
        policy: impl Pacing + 'static,
    ) -> Result<Reaper, ReaperError> {
        // Acquire: pairs with the release in `end`; the reaper before has made its last pass.
        if log.inner().reaped.swap(true, Ordering::Acquire) {
            return Err(ReaperError::Running);
        }
        let control = Arc::<Control>::default();
        let mut reaper = Reaper {
            log: log.clone(),
            control: Arc::clone(&control),
            thread: None,
            ended: false,
        };
        let log = log.clone();
        let (ready, is_ready) = mpsc::channel();
        let name = self.name.unwrap_or_else(|| "dirty-ring-reap".into());
        if name.contains('\0') {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "a NUL in the thread's name");
            return Err(ReaperError::Spawn(Arc::new(error)));
        }
        let body = move || {
            let prepared = prepare(&self.cpus, self.priority);
            let runs = prepared.is_ok();
            // The owner waits for it.
            let _ = ready.send(prepared);
            if !runs {
                return;
            }
            let work = || run(&log, policy, &control);
            if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
                // Its drop may panic, too.
                core::mem::forget(panic);
                control.report(&log, ReaperError::Panicked);
            }
            log.inner().reaper_counts.rest();
            // No thread may wait for it any longer.
            control.idle();
            trace::reaper(&log.inner().name, "end");
        };
        // If this fails, dropping `reaper` frees the log for another.
        let thread = threads::Builder::new().name(name).spawn(body);
        reaper.thread = Some(thread.map_err(|error| ReaperError::Spawn(Arc::new(error)))?);
        is_ready.recv().map_err(|_| ReaperError::Panicked)??;
        Ok(reaper)
    }
}

impl Reaper {
    /// Starts a thread that empties the rings of `log` when `policy` decides so. A log has one reaper at a time.
    ///
    /// # Errors
    /// The log has a reaper already, or the thread cannot be started.
    pub fn spawn(log: &DirtyLog, policy: impl Pacing + 'static) -> Result<Self, ReaperError> {
        ReaperBuilder::default().spawn(log, policy)
    }

    /// Returns a builder, for a reaper with a name, CPUs or a priority of its own.
    pub fn builder() -> ReaperBuilder {
        ReaperBuilder::default()
    }

    /// Returns the last error since the previous call, if there was one.
    pub fn take_error(&self) -> Option<ReaperError> {
        lock(&self.control.error).take()
    }

    /// Returns whether the thread runs. It has ended if it panicked.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|t| !t.is_finished())
    }

    /// Returns the counts of all reapers of the log so far, as in [`Stats::reaper`](crate::Stats::reaper).
    pub fn stats(&self) -> ReaperStats {
        self.log.inner().reaper_counts.read()
    }

    /// Replaces the policy. The new one looks at the rings soon after this returns.
    pub fn set_policy(&self, policy: impl Pacing + 'static) {
        let mut policy: Option<Box<dyn Pacing>> = Some(Box::new(policy));
        let ours = &mut policy;
        // A policy that was never used is dropped while no thread waits for it.
        self.control.order(&self.log, |orders| {
            core::mem::swap(&mut orders.policy, ours)
        });
    }

    /// Makes no more passes until [`resume`](Self::resume).
    ///
    /// It waits for a pass under way. Full exits and syncs still empty the rings.
    pub fn pause(&self) {
        self.control.order(&self.log, |orders| orders.paused = true);
        let mut orders = lock(&self.control.orders);
        while orders.paused && !orders.idle {
            orders = wait(&self.control.obeyed, orders);
        }
    }

    /// Ends a pause. The policy looks at the rings at once.
    pub fn resume(&self) {
        self.control
            .order(&self.log, |orders| orders.paused = false);
        // A caller may still wait for the pause, if the thread has not noticed it.
        self.control.obeyed.notify_all();
    }

    /// Stops the thread and waits for it. The entries in the rings stay there for the next sync.
    ///
    /// Errors that the reaper has survived are not returned here: call [`take_error`](Self::take_error) before.
    ///
    /// # Errors
    /// [`ReaperError::Panicked`]: the thread had ended before.
    pub fn stop(mut self) -> Result<(), ReaperError> {
        self.end();
        match self.take_error() {
            Some(error @ ReaperError::Panicked) => Err(error),
            _ => Ok(()),
        }
    }

    fn end(&mut self) {
        if core::mem::replace(&mut self.ended, true) {
            return;
        }
        self.control.order(&self.log, |orders| orders.stop = true);
        if let Some(thread) = self.thread.take() {
            // Its panics are caught inside.
            let _ = thread.join();
        }
        // Release: pairs with the acquire in `spawn`.
        self.log.inner().reaped.store(false, Ordering::Release);
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.end();
    }
}

/// The reaper's life.
fn run(log: &DirtyLog, policy: impl Pacing + 'static, control: &Control) {
    let alarm = &log.inner().alarm;
    let mut turns = Turns::new(policy);
    let mut heard = Heard::Nothing;
    let mut pauses = false;
    trace::reaper(&log.inner().name, "init");
    loop {
        let mut orders = lock(&control.orders);
        if orders.stop {
            return;
        }
        let policy = orders.policy.take();
        orders.idle = orders.paused;
        let paused = orders.paused;
        // The policy before may do anything when it is dropped.
        drop(orders);
        if let Some(policy) = policy {
            turns.set_policy(log, policy);
        }
        if paused {
            control.obeyed.notify_all();
            turns.restart();
            log.inner().reaper_counts.rest();
            if !core::mem::replace(&mut pauses, true) {
                trace::reaper(&log.inner().name, "pause");
            }
            alarm.wait_for_command();
            heard = Heard::Command;
            continue;
        }
        if core::mem::take(&mut pauses) {
            trace::reaper(&log.inner().name, "resume");
        }
        turns.turn(log, heard, |error| control.report(log, error));
        heard = alarm.wait(turns.deaf(), turns.due());
    }
}
