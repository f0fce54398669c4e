// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A reaper of QEMU's shape: it sleeps, takes the lock, empties every ring, and sleeps again.

use std::io;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvm_dirty_ring::error::ReaperError;
use kvm_dirty_ring::pacing::{Pacer, Pacing};

use super::full_exit::FullExits;
use crate::host::background::{Background, Ended};
use crate::host::cores::confine;

/// The running thread; it stops when this is dropped.
#[derive(Debug)]
pub(super) struct QemuReaper {
    thread: Background,
    state: Arc<Mutex<State>>,
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
        let (ready, is_ready) = mpsc::channel();
        let thread = {
            let (state, full_exits) = (Arc::clone(&state), Arc::clone(full_exits));
            let cpus = cpus.to_vec();
            Background::spawn(name, move |ended| {
                let confined = confine(&cpus);
                let runs = confined.is_ok();
                // The thread that started it waits for this.
                let _ = ready.send(confined);
                if runs {
                    run(&state, &full_exits, Pacer::new(policy), ended);
                }
            })?
        };
        let ready = is_ready.recv();
        ready.unwrap_or_else(|_| Err(io::Error::other("the thread has ended")))?;
        Ok(Self { thread, state })
    }

    pub(super) fn counts(&self) -> Counts {
        lock(&self.state).counts
    }

    /// Stops it, after the pass under way.
    pub(super) fn stop(self) -> Result<(), ReaperError> {
        drop(self.thread);
        lock(&self.state).error.take().map_or(Ok(()), Err)
    }

    pub(super) fn take_error(&self) -> Option<ReaperError> {
        lock(&self.state).error.take()
    }
}

/// The thread's life.
fn run(state: &Mutex<State>, full_exits: &FullExits, mut pacer: Pacer, ended: &Ended) {
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
        if ended.within(delay) {
            return;
        }
    }
}
