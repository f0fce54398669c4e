// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that kicks vCPUs out of the guest when they are ahead of their limits.

use core::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::Instant;

use super::scheduling::{Priority, prepare};
use crate::error::LimiterError;
use crate::log::DirtyLog;
use crate::sync::{Arc, AtomicBool, Ordering, lock, thread, wait, wait_until};

/// A thread that holds vCPUs to their [dirty limits](DirtyLog::set_dirty_limit), a few milliseconds at a time.
///
/// It stops when this is dropped; the limits stay.
///
/// The thread looks each millisecond while a limited vCPU runs, sleeps as long as all of them do, and waits where there are no
/// limits. It blocks every signal but the C library's own, and sleeps without timer slack.
///
/// ```no_run
/// # use kvm_dirty_ring::{DirtyLog, Limiter};
/// # fn example(log: &DirtyLog, vcpu_threads: Vec<usize>)
/// # -> Result<(), Box<dyn std::error::Error>> {
/// use std::num::NonZeroU64;
///
/// // A signal whose handler does nothing: KVM_RUN returns EINTR, and the thread calls `throttle`.
/// // These threads are joined after the limiter has stopped. It dies of a panic here.
/// // `vcpu_threads` has each one's `pthread_self() as usize`: with musl a `pthread_t` is a pointer, which is not `Send`.
/// let limiter = Limiter::spawn(log, move |vcpu| {
///     if let Some(&thread) = vcpu_threads.get(vcpu) {
///         unsafe { libc::pthread_kill(thread as libc::pthread_t, libc::SIGRTMIN()) };
///     }
/// })?;
/// log.set_dirty_limits(NonZeroU64::new(5_000))?; // pages a second, each vCPU
/// # Ok(())
/// # }
/// ```
#[must_use = "it stops when it is dropped"]
pub struct Limiter {
    log: DirtyLog,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<Result<(), LimiterError>>>,
}

impl Limiter {
    /// Starts a thread that calls `kick` for vCPUs that are ahead of their limits, as
    /// [`enforce_dirty_limits`](DirtyLog::enforce_dirty_limits) does.
    ///
    /// `kick` gets the vCPU's number, in the order in which vCPUs were attached.
    ///
    /// # Errors
    /// [`LimiterError::Spawn`].
    pub fn spawn(
        log: &DirtyLog,
        kick: impl FnMut(usize) + Send + 'static,
    ) -> Result<Self, LimiterError> {
        Self::spawn_with(log, Priority::default(), kick)
    }

    /// The same, for a thread with that priority.
    ///
    /// Where vCPUs or other threads keep every core busy, a limiter with a lower priority looks late. The mean rate
    /// still holds, but stops get longer, as vCPUs get further ahead meanwhile.
    ///
    /// # Errors
    /// [`LimiterError::Spawn`]; [`LimiterError::Scheduling`] without the right to that priority.
    pub fn spawn_with(
        log: &DirtyLog,
        priority: Priority,
        mut kick: impl FnMut(usize) + Send + 'static,
    ) -> Result<Self, LimiterError> {
        let (ready, is_ready) = mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::Builder::new().name("dirty-limiter".into());
        let thread = thread.spawn({
            let (log, stop) = (log.clone(), Arc::clone(&stop));
            move || {
                let prepared = prepare(&[], priority);
                let runs = prepared.is_ok();
                // The owner waits for it.
                let _ = ready.send(prepared);
                if !runs {
                    return Ok(());
                }
                let work = || run(&log, &stop, &mut kick);
                catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
                    // Its drop may panic, too.
                    core::mem::forget(panic);
                    LimiterError::Panicked
                })
            }
        });
        let limiter = Self {
            log: log.clone(),
            stop,
            thread: Some(thread.map_err(|error| LimiterError::Spawn(Arc::new(error)))?),
        };
        is_ready.recv().map_err(|_| LimiterError::Panicked)??;
        Ok(limiter)
    }

    /// Returns whether the thread runs. It has ended if a kick panicked.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|t| !t.is_finished())
    }

    /// Stops the thread and waits for it, and so for a kick under way.
    ///
    /// Limits stay: from now on vCPUs stop for them at full rings only.
    ///
    /// # Errors
    /// The failure that had ended the thread before.
    pub fn stop(mut self) -> Result<(), LimiterError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), LimiterError> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        let limits = &self.log.inner().limits;
        let terms = lock(&limits.terms);
        // Relaxed: the lock orders it.
        self.stop.store(true, Ordering::Relaxed);
        limits.change(terms);
        thread.join().unwrap_or(Err(LimiterError::Panicked))
    }
}

impl Drop for Limiter {
    fn drop(&mut self) {
        // The owner did not ask for the result.
        let _ = self.end();
    }
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limiter")
            .field("running", &self.is_running())
            .finish_non_exhaustive()
    }
}

fn run(log: &DirtyLog, stop: &AtomicBool, kick: &mut dyn FnMut(usize)) {
    let limits = &log.inner().limits;
    loop {
        let terms = lock(&limits.terms);
        let seen = terms.changes;
        drop(terms);
        let next = log.enforce_dirty_limits(&mut *kick);
        let next = next.map(|wait| Instant::now().checked_add(wait));
        let mut terms = lock(&limits.terms);
        loop {
            // Relaxed: the lock orders it.
            if stop.load(Ordering::Relaxed) {
                return;
            }
            if terms.changes != seen {
                break;
            }
            match next {
                Some(Some(next)) if Instant::now() >= next => break,
                Some(Some(next)) => terms = wait_until(&limits.changed, terms, next),
                // No limit, or a sleep that is longer than clocks reach.
                _ => terms = wait(&limits.changed, terms),
            }
        }
    }
}
