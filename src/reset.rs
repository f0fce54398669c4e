//! The reset gate: one reset ioctl at a time, shared by every pass that it can serve.

use std::io;

use crate::error::ResetError;
use crate::kernel::Kernel;
use crate::sync::{Arc, Condvar, Counter, Mutex, MutexGuard, lock, wait};

/// Serialises reset ioctls, combines them, and keeps harvests out of them.
///
/// An ioctl re-protects the pages of the entries that were marked before it *started*. While one is
/// in flight no entry is marked. So the one in flight serves every pass that arrives meanwhile, and
/// how many entries it has to recycle is known exactly: with entries being marked under it, a count
/// that fell short could look whole.
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
    /// Passes that harvest.
    harvests: usize,
    /// A reset runs, or waits for the last harvest to end.
    in_flight: bool,
    /// Threads that wait for any of this to change: to wake nobody costs a system call, too.
    waiting: usize,
    started: u64,
    finished: u64,
    /// The last one that did not fail.
    succeeded: u64,
    error: Option<ResetError>,
    /// Entries marked, and entries recycled, since the beginning.
    marked: u64,
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

    /// Lets the caller mark entries, once no reset is in flight and until the result is dropped.
    pub(crate) fn harvest(&self) -> Harvest<'_> {
        let mut state = lock(&self.state);
        while state.in_flight {
            state = self.wait(state);
        }
        state.harvests += 1;
        Harvest {
            gate: self,
            marked: 0,
        }
    }

    /// Returns once a reset has completed that started after the caller's last harvest, and says
    /// how many faulty ones there have been.
    ///
    /// A faulty (short) reset leaves up to a batch of recycled entries unprotected, whichever pass
    /// had marked them. So each pass that was under way while the number of faults changed must
    /// treat its pages as unprotected.
    ///
    /// `nothing_left` looks whether no entry of any ring waits for a reset.
    pub(crate) fn reset(
        &self,
        kernel: &dyn Kernel,
        nothing_left: &dyn Fn() -> bool,
    ) -> Result<u64, ResetError> {
        let mut state = lock(&self.state);
        // The one in flight, if there is one, started when our harvests had ended.
        let ticket = state.started + u64::from(!state.in_flight);
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
                state = self.wait(state);
                continue;
            }
            state.in_flight = true;
            state.started += 1;
            while state.harvests > 0 {
                state = self.wait(state);
            }
            let outstanding = state.marked.saturating_sub(state.recycled);
            drop(state);
            let mut turn = Turn {
                gate: self,
                outcome: Err(io::Error::other("the reset panicked")),
            };
            turn.outcome = self.recycle(kernel, nothing_left, outstanding);
            drop(turn);
            state = lock(&self.state);
        }
    }

    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiting += 1;
        state = wait(&self.turned, state);
        state.waiting -= 1;
        state
    }

    /// Gives the state back, and wakes those that wait for a change.
    fn wake(&self, state: MutexGuard<'_, State>) {
        let waiting = state.waiting > 0;
        drop(state);
        if waiting {
            self.turned.notify_all();
        }
    }

    /// The ioctl; again while it falls short of `outstanding` and gets on. Entries recycled.
    fn recycle(
        &self,
        kernel: &dyn Kernel,
        nothing_left: &dyn Fn() -> bool,
        outstanding: u64,
    ) -> io::Result<u64> {
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
        // An overrun, or somebody else's reset, has left nothing to recycle of what we count: it
        // would make every later reset look short. No entry is marked meanwhile.
        if nothing_left() {
            recycled = recycled.max(outstanding);
        }
        Ok(recycled)
    }
}

/// The right to mark entries.
pub(crate) struct Harvest<'a> {
    gate: &'a ResetGate,
    /// How many were.
    pub(crate) marked: u64,
}

impl Drop for Harvest<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.gate.state);
        state.marked += self.marked;
        state.harvests -= 1;
        self.gate.wake(state);
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
                // What is left stays outstanding. A later reset may recycle it; written off, it
                // would then stand in for as many entries that one has left. So would what
                // somebody else had marked, if it counted.
                state.recycled = (state.recycled + recycled).min(state.marked);
            }
            Err(error) => {
                self.gate.failures.add(1);
                let source = Arc::new(error);
                state.error = Some(ResetError { source });
            }
        }
        self.gate.wake(state);
    }
}
