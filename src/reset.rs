//! The reset gate: one reset ioctl at a time, shared by every pass that it can serve.

use std::io;

use crate::error::ResetError;
use crate::kernel::Kernel;
use crate::sync::{Arc, Condvar, Counter, Mutex, lock, wait};

/// Serialises reset ioctls and combines them.
///
/// An ioctl re-protects the pages of the entries that were marked before it *started*. A pass that
/// arrives while one is in flight therefore waits for the next, and every other pass that arrives
/// meanwhile shares that one.
#[derive(Default)]
pub(crate) struct ResetGate {
    state: Mutex<State>,
    turned: Condvar,
    /// Resets that fell short. A pass compares the number before its first mark with the number
    /// after its reset, see [`ResetGate::reset`].
    faults: Counter,
    resets: Counter,
    failures: Counter,
}

/// Resets are numbered from 1 in the order in which they start.
#[derive(Default)]
struct State {
    in_flight: bool,
    /// Passes that wait for it to end: to wake nobody costs a system call, too.
    waiting: usize,
    started: u64,
    finished: u64,
    /// The last one that did not fail.
    succeeded: u64,
    error: Option<ResetError>,
    /// Entries marked by the passes that have arrived here.
    marked: u64,
    /// Entries recycled. It can be ahead of `marked`: entries may be recycled while the pass that
    /// marks them is still on its way here.
    recycled: u64,
}

/// How often what was done, for [`Stats`](crate::Stats).
pub(crate) struct GateStats {
    pub(crate) resets: u64,
    pub(crate) short: u64,
    pub(crate) failed: u64,
}

impl ResetGate {
    /// Faulty resets so far. Read before a pass marks its first entry: a value that is out of date
    /// is lower, and only makes the pass more suspicious.
    pub(crate) fn faults(&self) -> u64 {
        self.faults.get()
    }

    pub(crate) fn stats(&self) -> GateStats {
        GateStats {
            resets: self.resets.get(),
            short: self.faults.get(),
            failed: self.failures.get(),
        }
    }

    /// Returns once a reset that started after this call has completed, and says how many faulty
    /// ones there have been. The caller has marked `marked` entries that the gate was not told of.
    ///
    /// A faulty (short) reset leaves up to a batch of recycled entries unprotected, whichever pass
    /// had marked them, be it still on its way here. So each pass that was under way while the
    /// number of faults changed must treat its pages as unprotected.
    pub(crate) fn reset(&self, kernel: &dyn Kernel, marked: u64) -> Result<u64, ResetError> {
        let mut state = lock(&self.state);
        state.marked += marked;
        // Not the one in flight, if there is one: it may have passed our entries before they were
        // marked.
        let ticket = state.started + 1;
        loop {
            if state.succeeded >= ticket {
                return Ok(self.faults.get());
            }
            if state.finished >= ticket {
                if let Some(error) = &state.error {
                    return Err(error.clone());
                }
            }
            if state.in_flight {
                state.waiting += 1;
                state = wait(&self.turned, state);
                state.waiting -= 1;
                continue;
            }
            state.in_flight = true;
            state.started += 1;
            let outstanding = state.marked.saturating_sub(state.recycled);
            drop(state);
            let mut turn = Turn {
                gate: self,
                outcome: Err(io::Error::other("the reset panicked")),
            };
            turn.outcome = self.recycle(kernel, outstanding);
            drop(turn);
            state = lock(&self.state);
        }
    }

    /// The ioctl; again while it falls short of `outstanding` and gets on. Entries recycled.
    fn recycle(&self, kernel: &dyn Kernel, outstanding: u64) -> io::Result<u64> {
        self.resets.add(1);
        let mut recycled = u64::from(kernel.reset()?);
        if recycled >= outstanding {
            return Ok(recycled);
        }
        self.faults.add(1);
        while recycled < outstanding {
            self.resets.add(1);
            // An error here adds nothing: the entries are suspect already.
            match kernel.reset() {
                Ok(0) | Err(_) => break,
                Ok(more) => recycled += u64::from(more),
            }
        }
        Ok(recycled)
    }
}

/// One reset in flight. Ending it, by unwinding too, lets the others go on.
struct Turn<'a> {
    gate: &'a ResetGate,
    outcome: io::Result<u64>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.gate.state);
        state.in_flight = false;
        state.finished = state.started;
        match core::mem::replace(&mut self.outcome, Ok(0)) {
            Ok(recycled) => {
                state.succeeded = state.finished;
                // What even the repeated ioctl left stays outstanding. A later one may recycle it;
                // written off, it would then stand in for as many entries that one has left.
                state.recycled += recycled;
            }
            Err(error) => {
                self.gate.failures.add(1);
                let source = Arc::new(error);
                state.error = Some(ResetError { source });
            }
        }
        let waiting = state.waiting > 0;
        drop(state);
        if waiting {
            self.gate.turned.notify_all();
        }
    }
}
