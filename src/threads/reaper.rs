//! The thread that empties the rings at the pace of a policy.

use core::time::Duration;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::Instant;

use super::backoff::Backoff;
use super::scheduling::{Priority, prepare};
use crate::error::ReaperError;
use crate::log::DirtyLog;
use crate::observe::stats::ReaperStats;
use crate::observe::trace;
use crate::pacing::alarm::{DEAF, Heard};
use crate::pacing::{Pacer, Pacing};
use crate::sync::{Arc, Condvar, Mutex, Ordering, lock, thread as threads, wait};

/// A running reaper: the thread that empties the rings. It stops when this is dropped.
///
/// The thread blocks every signal but the C library's own, and sleeps without timer slack. A vCPU that stops on a full ring wakes
/// it. Those that stop within half a millisecond of that wake it once, when that time is over.
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
    fn report(&self, error: impl Into<ReaperError>) {
        let error = error.into();
        *lock(&self.error) = Some(error.clone());
        trace::reaper_error(&error);
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
            let work = || run(&log, Pacer::new(policy), &control);
            if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
                // Its drop may panic, too.
                core::mem::forget(panic);
                control.report(ReaperError::Panicked);
            }
            log.inner().reaper_counts.rest();
            // No thread may wait for it any longer.
            control.idle();
            trace::reaper("end");
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
fn run(log: &DirtyLog, mut pacer: Pacer, control: &Control) {
    let counts = &log.inner().reaper_counts;
    let alarm = &log.inner().alarm;
    let start = Instant::now();
    let mut rings = Vec::new();
    let mut load = Load::default();
    let mut backoff = Backoff::default();
    let mut due = pacer.due();
    let mut deaf = start;
    let mut heard = Heard::Nothing;
    let mut pauses = false;
    trace::reaper("init");
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
            pacer.set_policy(policy);
            trace::reaper("policy");
        }
        if paused {
            control.obeyed.notify_all();
            pacer.restart();
            load = Load::default();
            counts.rest();
            if !core::mem::replace(&mut pauses, true) {
                trace::reaper("pause");
            }
            alarm.wait_for_command();
            heard = Heard::Command;
            continue;
        }
        if core::mem::take(&mut pauses) {
            trace::reaper("resume");
        }

        let now = start.elapsed();
        log.observe(&mut rings);
        counts.looks.add(1);
        match heard {
            Heard::Nothing => {
                let late = now.saturating_sub(due);
                counts.lateness_ns.set(late.as_nanos() as u64);
            }
            Heard::Full => counts.woken.add(1),
            Heard::Command => {}
        }
        if let Err(error) = pacer.look(now, heard != Heard::Nothing, &mut rings) {
            control.report(error);
        }
        let decided = start.elapsed();
        let mut took = Duration::ZERO;
        if !pacer.reap().is_empty() {
            let taken = log.reap_rings(pacer.reap()).map_err(|error| {
                control.report(error);
            });
            backoff.note(taken.ok());
            let entries = taken.unwrap_or(0);
            let end = start.elapsed();
            pacer.passed(end, entries);
            took = end - decided;
            counts.passes.add(1);
            counts.entries.add(entries);
            counts.pass_ns.add(took.as_nanos() as u64);
        }
        let asleep = start.elapsed();
        // A full ring must not wake it sooner either, as it could not empty that.
        let patient = asleep + backoff.delay();
        due = pacer.due().max(patient);
        deaf = deaf.max(start + patient);
        let delay_ns = due.saturating_sub(asleep).as_nanos() as u64;
        counts.delay_ns.set(delay_ns);
        trace::look(heard.kick(), pacer.reap(), delay_ns);
        heard = alarm.wait(deaf, start + due);
        let awake = start.elapsed();
        if heard == Heard::Full {
            deaf = start + awake + DEAF;
        }
        let is_heavy = load.is_heavy(took, awake - asleep);
        counts.saturated.set(is_heavy.into());
    }
}

/// The share of its time that the reaper spends on passes.
#[derive(Default)]
struct Load {
    busy: f64,
    idle: f64,
}

impl Load {
    /// Adds one turn. Returns whether most of the recent time went into passes.
    fn is_heavy(&mut self, busy: Duration, idle: Duration) -> bool {
        /// Seconds after which a turn has half its weight.
        const HALF_LIFE: f64 = 0.25;
        let (busy, idle) = (busy.as_secs_f64(), idle.as_secs_f64());
        let weight = (-(busy + idle) / HALF_LIFE).exp2();
        self.busy = self.busy * weight + busy;
        self.idle = self.idle * weight + idle;
        self.busy > 0.5 * (self.busy + self.idle)
    }
}
