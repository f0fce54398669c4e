//! A reaper of QEMU's shape: it sleeps, takes the lock, empties every ring, and sleeps again.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use kvm_dirty_ring::DirtyLog;
use kvm_dirty_ring::error::ReaperError;
use kvm_dirty_ring::pacing::{Pacer, Pacing};

use super::full::FullExits;
use crate::cores::confine;

/// The running thread; it stops when this is dropped.
#[derive(Debug)]
pub(crate) struct QemuReaper {
    shared: Arc<Shared>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What a reaper has done so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) wakeups: u64,
    pub(crate) passes: u64,
    pub(crate) pass_ns: u64,
    /// How long it sleeps just now.
    pub(crate) delay_ns: u64,
}

#[derive(Debug, Default)]
struct Shared {
    wakeups: AtomicU64,
    passes: AtomicU64,
    pass_ns: AtomicU64,
    delay_ns: AtomicU64,
    error: Mutex<Option<ReaperError>>,
}

impl QemuReaper {
    pub(crate) fn spawn(
        name: &str,
        log: &DirtyLog,
        full_exits: &Arc<FullExits>,
        policy: Box<dyn Pacing>,
        cpus: &[usize],
    ) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let (stop, stopped) = mpsc::channel::<()>();
        let (ready, is_ready) = mpsc::channel();
        let body = {
            let (shared, log) = (Arc::clone(&shared), log.clone());
            let (full_exits, cpus) = (Arc::clone(full_exits), cpus.to_vec());
            move || {
                let confined = confine(&cpus);
                let runs = confined.is_ok();
                // Whoever started it waits for it.
                let _ = ready.send(confined);
                if runs {
                    run(&shared, &log, &full_exits, Pacer::new(policy), &stopped);
                }
            }
        };
        let this = Self {
            shared,
            stop: Some(stop),
            thread: Some(Builder::new().name(name.into()).spawn(body)?),
        };
        is_ready
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the thread has ended")))?;
        Ok(this)
    }

    pub(crate) fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            wakeups: read(&self.shared.wakeups),
            passes: read(&self.shared.passes),
            pass_ns: read(&self.shared.pass_ns),
            delay_ns: read(&self.shared.delay_ns),
        }
    }

    /// Stops it, after the pass under way.
    ///
    /// # Errors
    /// What went wrong since somebody asked.
    pub(crate) fn stop(mut self) -> Result<(), ReaperError> {
        self.end();
        self.take_error().map_or(Ok(()), Err)
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of its policy is caught inside; it has nothing else to say.
            let _ = thread.join();
        }
    }

    pub(crate) fn take_error(&self) -> Option<ReaperError> {
        let mut error = self.shared.error.lock();
        error
            .as_deref_mut()
            .map_or_else(|poisoned| poisoned.get_mut().take(), Option::take)
    }
}

/// The thread's life.
fn run(
    shared: &Shared,
    log: &DirtyLog,
    full_exits: &FullExits,
    mut pacer: Pacer,
    stopped: &Receiver<()>,
) {
    let start = Instant::now();
    let mut rings = Vec::new();
    loop {
        log.observe(&mut rings);
        let now = start.elapsed();
        if let Err(error) = pacer.look(now, false, &mut rings) {
            shared.report(error);
        }
        if !pacer.reap().is_empty() {
            match full_exits.reap_all() {
                Ok(entries) => pacer.passed(start.elapsed(), entries),
                Err(error) => shared.report(error),
            }
            let took = (start.elapsed() - now).as_nanos() as u64;
            shared.passes.fetch_add(1, Ordering::Relaxed);
            shared.pass_ns.fetch_add(took, Ordering::Relaxed);
        }
        let delay = pacer.due().saturating_sub(start.elapsed());
        let ns = delay.as_nanos() as u64;
        shared.delay_ns.store(ns, Ordering::Relaxed);
        shared.wakeups.fetch_add(1, Ordering::Relaxed);
        if stopped.recv_timeout(delay) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

impl Shared {
    fn report(&self, error: impl Into<ReaperError>) {
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.into());
    }
}

impl Drop for QemuReaper {
    fn drop(&mut self) {
        self.end();
    }
}
