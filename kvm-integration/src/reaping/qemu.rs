//! A reaper of QEMU's shape: it sleeps, takes the lock, empties every ring, and sleeps again.

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use kvm_dirty_ring::error::ReaperError;
use kvm_dirty_ring::pacing::{Pacer, Pacing};

use super::full::FullExits;
use crate::host::cores::confine;

/// The running thread; it stops when this is dropped.
#[derive(Debug)]
pub(super) struct QemuReaper {
    state: Arc<Mutex<State>>,
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
struct State {
    counts: Counts,
    error: Option<ReaperError>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // Each change is one step, so a panic leaves it whole.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl QemuReaper {
    pub(super) fn spawn(
        name: &str,
        full_exits: &Arc<FullExits>,
        policy: Box<dyn Pacing>,
        cpus: &[usize],
    ) -> io::Result<Self> {
        let state = Arc::<Mutex<State>>::default();
        let (stop, stopped) = mpsc::channel::<()>();
        let (ready, is_ready) = mpsc::channel();
        let thread = Builder::new().name(name.into()).spawn({
            let (state, full_exits) = (Arc::clone(&state), Arc::clone(full_exits));
            let cpus = cpus.to_vec();
            move || {
                let confined = confine(&cpus);
                let runs = confined.is_ok();
                // Whoever started it waits for it.
                let _ = ready.send(confined);
                if runs {
                    run(&state, &full_exits, Pacer::new(policy), &stopped);
                }
            }
        })?;
        let this = Self {
            state,
            stop: Some(stop),
            thread: Some(thread),
        };
        let ready = is_ready.recv();
        ready.unwrap_or_else(|_| Err(io::Error::other("the thread has ended")))?;
        Ok(this)
    }

    pub(super) fn counts(&self) -> Counts {
        lock(&self.state).counts
    }

    /// Stops it, after the pass under way.
    ///
    /// # Errors
    /// What went wrong since somebody asked.
    pub(super) fn stop(mut self) -> Result<(), ReaperError> {
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

    pub(super) fn take_error(&self) -> Option<ReaperError> {
        lock(&self.state).error.take()
    }
}

/// The thread's life.
fn run(state: &Mutex<State>, full_exits: &FullExits, mut pacer: Pacer, stopped: &Receiver<()>) {
    let report = |error: ReaperError| lock(state).error = Some(error);
    let start = Instant::now();
    let mut rings = Vec::new();
    loop {
        full_exits.log().observe(&mut rings);
        let now = start.elapsed();
        if let Err(error) = pacer.look(now, false, &mut rings) {
            report(error.into());
        }
        if !pacer.reap().is_empty() {
            match full_exits.reap_all() {
                Ok(entries) => pacer.passed(start.elapsed(), entries),
                Err(error) => report(error.into()),
            }
            let counts = &mut lock(state).counts;
            counts.passes += 1;
            counts.pass_ns += (start.elapsed() - now).as_nanos() as u64;
        }
        let delay = pacer.due().saturating_sub(start.elapsed());
        {
            let counts = &mut lock(state).counts;
            counts.delay_ns = delay.as_nanos() as u64;
            counts.wakeups += 1;
        }
        if stopped.recv_timeout(delay) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

impl Drop for QemuReaper {
    fn drop(&mut self) {
        self.end();
    }
}
