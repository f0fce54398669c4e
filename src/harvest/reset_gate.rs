// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The reset gate: one reset ioctl at a time, shared by every pass that it can serve.

use std::io;

use crate::error::ResetError;
use crate::kernel::{Kernel, Recycled};
use crate::sync::{Arc, Condvar, Counter, Mutex, MutexGuard, lock, wait};

/// Serialises reset ioctls, combines them, and keeps harvests out of them.
///
/// An ioctl protects the pages of the entries that were marked before it *started*. While one is in flight no entry is marked. So the
/// one in flight serves every pass that arrives meanwhile, and the number of entries that it has to recycle is exact. If entries
/// were marked meanwhile, a short count could look complete.
#[derive(Default)]
pub(crate) struct ResetGate {
    state: Mutex<State>,
    turned: Condvar,
    /// Resets that fell short. A pass compares the number before its first mark with the number after its reset, see
    /// [`ResetGate::reset`].
    faults: Counter,
    /// Resets that may have been cut short after the last entry.
    doubts: Counter,
    resets: Counter,
    failures: Counter,
}

/// The rings that are reset, as the gate sees them.
pub(crate) trait Rings {
    /// Returns whether no entry of any ring waits for a reset. No entry is marked meanwhile.
    fn nothing_awaits_reset(&self) -> bool;

    /// Looks for rings that the kernel is about to overrun, or has: a reset that meets a vCPU there may leave a page unprotected,
    /// with a complete count. No entry is marked meanwhile. Returns true if some ring is broken: then all pages are dirty in any
    /// case, and counts mean nothing.
    fn look_for_overruns(&self) -> bool;

    /// Suspects the last batch of every ring: one of them may be recycled with its pages unprotected, and the gate cannot find out
    /// which. Called before any other thread sees that the reset is over.
    fn suspect_last_batches(&self);
}

/// Resets are numbered from 1 in the order in which they start.
#[derive(Default)]
struct State {
    /// Passes that harvest.
    harvests: usize,
    /// A reset runs, or waits for the last harvest to end.
    in_flight: bool,
    /// Threads that wait for a change. A wake-up that wakes no thread costs a system call, too.
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

/// The gate's counts, for [`Stats`](crate::Stats).
pub(crate) struct GateStats {
    pub(crate) resets: u64,
    pub(crate) short: u64,
    pub(crate) doubtful: u64,
    pub(crate) failed: u64,
}

impl ResetGate {
    /// Returns the number of faulty resets so far. A pass reads it before it marks its first entry. A stale value is lower, and only makes
    /// the pass more suspicious.
    pub(crate) fn faults(&self) -> u64 {
        self.faults.get()
    }

    /// Returns the number of marked entries that were recycled so far.
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

    /// Returns once a reset has completed that started after the caller's last harvest, with the number of faulty resets so far.
    ///
    /// A faulty (short) reset leaves up to a batch of recycled entries unprotected, of any pass. So each pass that was under way while the
    /// number of faults changed must treat its pages as unprotected.
    pub(crate) fn reset(&self, kernel: &dyn Kernel, rings: &dyn Rings) -> Result<u64, ResetError> {
        let mut state = lock(&self.state);
        // The reset in flight, if there is one, started after our harvests had ended.
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

    /// Releases the state, and wakes the threads that wait for a change.
    fn wake(&self, state: MutexGuard<'_, State>) {
        let waiting = state.waiting > 0;
        drop(state);
        if waiting {
            self.turned.notify_all();
        }
    }

    /// Makes the ioctl, and repeats it while it falls short of `outstanding` and makes progress. Returns the entries recycled.
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
            // `kvm_dirty_ring_reset` looks for signals once more after the last entry, before it has protected the batch that this entry ends.
            // No count shows it.
            if first.interrupted && recycled > 0 {
                self.doubts.add(1);
                rings.suspect_last_batches();
            }
            return Ok(recycled);
        }
        self.faults.add(1);
        // An error here changes nothing: the entries are suspect already.
        while let Ok((more, _)) = reset() {
            recycled += u64::from(more.entries);
            if more.entries == 0 || recycled >= outstanding {
                break;
            }
        }
        // A reset by another program has left nothing to recycle of what is counted here. Every later reset would look short otherwise. No
        // entry is marked meanwhile.
        if rings.nothing_awaits_reset() {
            recycled = recycled.max(outstanding);
        }
        Ok(recycled)
    }
}

/// The right to mark entries.
pub(crate) struct Harvest<'a> {
    gate: &'a ResetGate,
    /// The number of marked entries.
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

/// One reset in flight. Its end, by unwinding, too, lets the others continue.
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
                // Entries that were left stay outstanding, as a later reset may recycle them. If they were written off, they would make up for as many
                // entries that the later reset leaves. So would entries that another program had marked, if they counted.
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
