//! Where the thread of a simulated vCPU waits while it is wanted out of its guest.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// What is wanted of the thread.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// To run.
    #[default]
    Run,
    /// To wait.
    Pause,
    /// To end.
    Stop,
}

/// What the thread and its owner tell each other.
#[derive(Debug, Default)]
pub(crate) struct Parking {
    state: Mutex<State>,
    changed: Condvar,
    /// A hint to look at the state, for a glance before each store.
    out: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    want: Want,
    parked: bool,
    ended: bool,
}

impl Parking {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change of the state is one step, so a panic leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(&self, condition: impl FnMut(&mut State) -> bool) -> MutexGuard<'_, State> {
        let guard = self.changed.wait_while(self.lock(), condition);
        guard.unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what is wanted from now on.
    pub(crate) fn tell(&self, want: Want) {
        let mut state = self.lock();
        state.want = want;
        // Relaxed: the lock orders the state; a thread that sees the hint late looks late.
        self.out.store(want != Want::Run, Ordering::Relaxed);
        drop(state);
        self.changed.notify_all();
    }

    /// Has the thread look up once.
    pub(crate) fn kick(&self) {
        // Relaxed: see `tell`.
        self.out.store(true, Ordering::Relaxed);
    }

    /// Whether the thread should [`park`](Self::park).
    pub(crate) fn is_wanted_out(&self) -> bool {
        // Relaxed: see `tell`.
        self.out.load(Ordering::Relaxed)
    }

    /// On the thread: waits while it is to pause; false if it is to stop.
    pub(crate) fn park(&self) -> bool {
        self.lock().parked = true;
        self.changed.notify_all();
        let mut state = self.wait_while(|state| state.want == Want::Pause);
        state.parked = false;
        // A kick has done its work. Relaxed: see `tell`.
        self.out.store(state.want != Want::Run, Ordering::Relaxed);
        state.want != Want::Stop
    }

    /// Waits until the thread that was told to pause does; false if it has ended instead.
    pub(crate) fn wait_parked(&self) -> bool {
        !self.wait_while(|state| !state.parked && !state.ended).ended
    }

    /// Whether the thread has ended.
    pub(crate) fn ended(&self) -> bool {
        self.lock().ended
    }
}

/// Tells the waiting that the thread has ended, also if it panics.
pub(crate) struct EndGuard(pub(crate) Arc<Parking>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}
