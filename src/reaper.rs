//! The thread that empties the rings at the pace of a policy.

use core::time::Duration;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use crate::error::{ReaperError, ResetError};
use crate::kvm::block_for_good;
use crate::log::DirtyLog;
use crate::pacing::{Decision, Fixed, Observation, Pacing, RingObservation};
use crate::sync::{Arc, AtomicBool, Mutex, Ordering, lock, thread};

/// Bounds of the time between two looks, whatever the policy says.
const SHORTEST_LOOK: Duration = Duration::from_micros(100);
const LONGEST_LOOK: Duration = Duration::from_secs(10);

/// A running reaper. It stops when this is dropped.
///
/// Its thread blocks every signal. A vCPU that stops on a full ring wakes it.
#[derive(Debug)]
pub struct Reaper {
    log: DirtyLog,
    control: Arc<Control>,
    thread: Option<thread::JoinHandle<()>>,
    ended: bool,
}

#[derive(Debug, Default)]
struct Control {
    stop: AtomicBool,
    error: Mutex<Option<ReaperError>>,
}

impl Control {
    fn report(&self, error: impl Into<ReaperError>) {
        *lock(&self.error) = Some(error.into());
    }
}

impl Reaper {
    /// Starts a thread that empties the rings of `log` when `policy` says so. A log has one at a
    /// time.
    ///
    /// # Errors
    /// The log has one already, or the thread can't be started.
    pub fn spawn(log: &DirtyLog, policy: impl Pacing + 'static) -> Result<Self, ReaperError> {
        // Acquire: pairs with the release in `end`: the reaper before has done its last pass.
        if log.inner().reaped.swap(true, Ordering::Acquire) {
            return Err(ReaperError::Running);
        }
        let control = Arc::<Control>::default();
        let mut reaper = Self {
            log: log.clone(),
            control: Arc::clone(&control),
            thread: None,
            ended: false,
        };
        let log = log.clone();
        let body = move || {
            let work = || run(&log, Box::new(policy), &control);
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                control.report(ReaperError::Panicked);
            }
        };
        // Should this fail, dropping `reaper` gives the log free again.
        let thread = thread::Builder::new().name("dirty-ring-reap".into());
        let thread = thread.spawn(body);
        reaper.thread = Some(thread.map_err(|error| ReaperError::Spawn(Arc::new(error)))?);
        Ok(reaper)
    }

    /// The last thing that went wrong since this was asked before, if anything did.
    pub fn take_error(&self) -> Option<ReaperError> {
        lock(&self.control.error).take()
    }

    /// Whether the thread runs: not if it has panicked.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|t| !t.is_finished())
    }

    /// Stops the thread and waits for it. What is in the rings stays there for the next sync.
    ///
    /// # Errors
    /// What went wrong last and was not asked for yet.
    pub fn stop(mut self) -> Result<(), ReaperError> {
        self.end();
        self.take_error().map_or(Ok(()), Err)
    }

    fn end(&mut self) {
        if core::mem::replace(&mut self.ended, true) {
            return;
        }
        // Release: pairs with the acquire load in `run`.
        self.control.stop.store(true, Ordering::Release);
        self.log.inner().alarm.ring();
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
fn run(log: &DirtyLog, mut policy: Box<dyn Pacing>, control: &Control) {
    if let Err(error) = block_for_good() {
        // Each reset blocks them anyway, and says so if it can't.
        let source = Arc::new(error);
        control.report(ResetError { source });
    }
    let mut rings = Vec::new();
    let mut last_look = Instant::now();
    // Acquire: pairs with the release store in `end`.
    while !control.stop.load(Ordering::Acquire) {
        let now = Instant::now();
        look(log, &mut rings);
        let seen = Observation::new(now - last_look, &rings);
        last_look = now;
        let decision = catch_unwind(AssertUnwindSafe(|| policy.decide(&seen)));
        let decision = decision.unwrap_or_else(|_| {
            control.report(ReaperError::PolicyPanicked);
            policy = Box::new(Fixed::default());
            // Nobody knows how long it has been.
            Decision {
                reap: true,
                look_again: Duration::ZERO,
            }
        });
        if decision.reap {
            if let Err(error) = log.reap() {
                control.report(error);
            }
        }
        let wait = decision.look_again.clamp(SHORTEST_LOOK, LONGEST_LOOK);
        log.inner().alarm.wait(wait);
    }
}

/// Reads what the policy is to be shown.
fn look(log: &DirtyLog, rings: &mut Vec<RingObservation>) {
    rings.clear();
    let layout = log.inner().harvester.layout();
    rings.extend(layout.vcpus.iter().map(|vcpu| RingObservation {
        soft_limit: vcpu.counts.soft_limit.get(),
        taken: vcpu.counts.taken.get(),
        full_exits: vcpu.counts.full_exits.get(),
    }));
}
