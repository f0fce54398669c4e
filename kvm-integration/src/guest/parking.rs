// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where the thread of a vCPU waits while it is wanted out of its guest.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// What is wanted of the thread.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// To run.
    #[default]
    Run,
    /// To wait.
    Pause,
    /// To end.
    Stop,
}

/// Keeps the thread out of its guest while it is set.
pub trait Barrier {
    /// Closes or opens it.
    fn set(&self, closed: bool);
}

/// For threads that look at it before each store.
impl Barrier for AtomicBool {
    fn set(&self, closed: bool) {
        // Relaxed: the lock orders the state; a thread that sees it late looks late.
        self.store(closed, Ordering::Relaxed);
    }
}

/// What the thread and its owner exchange.
#[derive(Debug, Default)]
pub struct Parking<B = AtomicBool> {
    state: Mutex<State>,
    changed: Condvar,
    barrier: B,
}

#[derive(Debug, Default)]
struct State {
    want: Want,
    /// The thread waits, and will go on waiting while `want` is `Pause`.
    parked: bool,
    /// The thread is through with its guest for good.
    ended: bool,
}

impl<B: Barrier> Parking<B> {
    /// For a thread that heeds `barrier`.
    pub fn new(barrier: B) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            barrier,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change of the state is one step, so a panic leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(&self, condition: impl FnMut(&mut State) -> bool) -> MutexGuard<'_, State> {
        let guard = self.changed.wait_while(self.lock(), condition);
        guard.unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the thread is parked now, as it was asked to; one that has ended is not.
    pub fn is_parked(&self) -> bool {
        let state = self.lock();
        state.parked && state.want == Want::Pause && !state.ended
    }

    /// Says what is wanted from now on. Nothing takes back a `Stop`. It is for the thread to open the
    /// barrier again.
    pub fn tell(&self, want: Want) {
        let mut state = self.lock();
        if state.want != Want::Stop {
            state.want = want;
        }
        if want != Want::Run {
            self.barrier.set(true);
        }
        self.changed.notify_all();
    }

    /// On the thread, out of its guest: waits while it is to pause; false if it is to stop.
    pub fn may_run(&self) -> bool {
        let mut state = self.lock();
        if state.want == Want::Pause {
            state.parked = true;
            self.changed.notify_all();
            drop(state);
            state = self.wait_while(|state| state.want == Want::Pause);
            state.parked = false;
        }
        if state.want == Want::Stop {
            return false;
        }
        self.barrier.set(false);
        true
    }

    /// Waits until the thread that was asked to pause does; false if it has ended instead.
    pub fn wait_parked(&self) -> bool {
        let quiet = |state: &State| state.parked && state.want == Want::Pause || state.ended;
        !self.wait_while(|state| !quiet(state)).ended
    }

    /// Whether the thread has ended.
    pub fn ended(&self) -> bool {
        self.lock().ended
    }

    /// Does it unless the thread has ended, which then can't end before it is done.
    pub fn unless_ended(&self, act: impl FnOnce()) {
        let state = self.lock();
        if !state.ended {
            act();
        }
    }
}

impl Parking {
    /// Has the thread look up once.
    pub fn kick(&self) {
        self.barrier.set(true);
    }

    /// Whether the thread should ask if it [may run](Self::may_run).
    pub fn is_wanted_out(&self) -> bool {
        // Relaxed: see `Barrier`.
        self.barrier.load(Ordering::Relaxed)
    }
}

/// Wakes waiting threads when the thread has ended, also if it panics.
#[derive(Debug)]
pub struct EndGuard<B: Barrier = AtomicBool>(pub Arc<Parking<B>>);

impl<B: Barrier> Drop for EndGuard<B> {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}
