//! The reset gate: one reset ioctl at a time, shared by every pass that it can serve.

use std::io;

use crate::error::ResetError;
use crate::kernel::{Kernel, Recycled};
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
    /// Resets that may have been cut short after the last entry.
    doubts: Counter,
    resets: Counter,
    failures: Counter,
}

/// The rings that are reset, as far as the gate needs to know them.
pub(crate) trait Rings {
    /// Whether no entry of any ring waits for a reset. No entry is marked meanwhile.
    fn nothing_awaits_reset(&self) -> bool;

    /// Looks for rings that the kernel is about to overrun, or has: a reset that meets a vCPU there may leave
    /// a page unprotected, and its count is whole. No entry is marked meanwhile. True if some ring is broken:
    /// then all pages are dirty in any case, and counts mean nothing.
    fn look_for_overruns(&self) -> bool;

    /// The last batch of some ring may be recycled and its pages not protected: which ring, the gate
    /// cannot know. Called before anybody learns that the reset is over.
    fn suspect_last_batches(&self);
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
    pub(crate) doubtful: u64,
    pub(crate) failed: u64,
}

impl ResetGate {
    /// Faulty resets so far. Read before a pass marks its first entry: a value that is out of date
    /// is lower, and only makes the pass more suspicious.
    pub(crate) fn faults(&self) -> u64 {
        self.faults.get()
    }

    /// Entries recycled so far, of those that were marked.
    pub(crate) fn recycled(&self) -> u64 {
        lock(&self.state).recycled
    }

    pub(crate) fn stats(&self) -> GateStats {
        GateStats {
            resets: self.resets.get(),
            short: self.faults.get(),
            doubtful: self.doubts.get(),
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
    pub(crate) fn reset(&self, kernel: &dyn Kernel, rings: &dyn Rings) -> Result<u64, ResetError> {
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
            turn.outcome = self.recycle(kernel, rings, outstanding);
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
    fn recycle(&self, kernel: &dyn Kernel, rings: &dyn Rings, outstanding: u64) -> io::Result<u64> {
        let reset = || -> io::Result<(Recycled, bool)> {
            let is_broken = rings.look_for_overruns();
            self.resets.add(1);
            Ok((kernel.reset()?, is_broken))
        };
        let (first, is_broken) = reset()?;
        let mut recycled = u64::from(first.entries);
        if is_broken {
            // In a broken ring the count may be short for good. One repetition makes up for a reset that was cut short.
            if recycled < outstanding {
                reset()?;
            }
            return Ok(outstanding);
        }
        if recycled >= outstanding {
            // `kvm_dirty_ring_reset` looks for signals once more after the last entry, and before it
            // has protected the batch that this one ends: no count shows it.
            if first.interrupted && recycled > 0 {
                self.doubts.add(1);
                rings.suspect_last_batches();
            }
            return Ok(recycled);
        }
        self.faults.add(1);
        // An error here adds nothing: the entries are suspect already.
        while let Ok((more, _)) = reset() {
            recycled += u64::from(more.entries);
            if more.entries == 0 || recycled >= outstanding {
                break;
            }
        }
        // Somebody else's reset has left nothing to recycle of what we count: it
        // would make every later reset look short. No entry is marked meanwhile.
        if rings.nothing_awaits_reset() {
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
