// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The account of each vCPU, and the sleep that pays its debt.

use core::num::NonZeroU64;
use core::time::Duration;
use std::time::Instant;

use super::budget::{Budget, SHORTEST_STOP};
use crate::sync::{Condvar, Counter, Mutex, MutexGuard, lock, wait_until};

/// The longest sleep in one piece: points in time must exist.
const DAY: Duration = Duration::from_secs(86_400);

/// One vCPU's limit. No thread waits for anything while it holds this lock, except the vCPU's own thread, which sleeps on
/// it.
pub(crate) struct Limit {
    start: Instant,
    account: Mutex<Account>,
    /// Rung when the vCPU may have less to sleep, or must stop sleeping.
    changed: Condvar,
    /// Time slept here, in nanoseconds.
    pub(crate) slept_ns: Counter,
}

#[derive(Default)]
struct Account {
    /// `None`: no limit.
    budget: Option<Budget>,
    /// Whether the thread must stay awake for now; debts remain.
    awake: bool,
    asleep: bool,
}

/// The state of a limited vCPU, as seen by another thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Within its limit, or nearly so, or kept awake.
    Free,
    /// Asleep, for this much longer.
    Asleep(Duration),
    /// In the guest, or on the way there, and should be asleep.
    Owes,
}

impl Default for Limit {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            account: Mutex::default(),
            changed: Condvar::default(),
            slept_ns: Counter::default(),
        }
    }
}

impl Limit {
    /// Pages per second that the vCPU may dirty now; `None` for any number.
    pub(crate) fn get(&self) -> Option<NonZeroU64> {
        lock(&self.account).budget.as_ref().map(Budget::limit)
    }

    /// Sets the limit, or lifts it and forgives all debt. `logged` returns how many pages the vCPU has logged so far. A sleeping
    /// thread continues by the new limit.
    pub(crate) fn set(&self, limit: Option<NonZeroU64>, logged: impl Fn() -> u64) {
        let mut account = lock(&self.account);
        match (limit, &mut account.budget) {
            (None, budget) => *budget = None,
            (Some(limit), Some(budget)) => {
                // The limit before pays for the time before.
                budget.count(logged(), self.start.elapsed());
                budget.set_limit(limit);
            }
            (Some(limit), budget) => {
                *budget = Some(Budget::new(limit, logged(), self.start.elapsed()));
            }
        }
        drop(account);
        self.changed.notify_all();
    }

    /// Sets whether the vCPU's thread stays awake, or leaves its sleep at once, whatever it owes.
    pub(crate) fn keep_awake(&self, awake: bool) {
        lock(&self.account).awake = awake;
        self.changed.notify_all();
    }

    /// Sleeps off the debt, on the vCPU's thread, and returns how long that took. Returns early when the limit is lifted, or the
    /// thread is kept awake.
    pub(crate) fn pay(&self, logged: impl Fn() -> u64) -> Duration {
        let mut account = lock(&self.account);
        let debt = self.debt(&mut account, &logged);
        if !debt.is_some_and(|debt| account.is_due(debt)) {
            return Duration::ZERO;
        }
        let start = Instant::now();
        while let Some(debt) = self.debt(&mut account, &logged).filter(|d| !d.is_zero()) {
            if account.awake {
                break;
            }
            account.asleep = true;
            account = wait_until(&self.changed, account, Instant::now() + debt.min(DAY));
        }
        account.asleep = false;
        drop(account);
        let slept = start.elapsed();
        self.slept_ns.add(slept.as_nanos() as u64);
        slept
    }

    /// Returns the vCPU's state; `None` if it has no limit.
    pub(crate) fn look(&self, logged: impl Fn() -> u64) -> Option<Standing> {
        let mut account = lock(&self.account);
        let debt = self.debt(&mut account, &logged)?;
        Some(match account.asleep {
            true => Standing::Asleep(debt),
            false if account.is_due(debt) => Standing::Owes,
            false => Standing::Free,
        })
    }

    /// Returns the debt now, as time; `None` without a limit.
    fn debt(&self, account: &mut Account, logged: &impl Fn() -> u64) -> Option<Duration> {
        let budget = account.budget.as_mut()?;
        Some(budget.count(logged(), self.start.elapsed()))
    }
}

impl Account {
    /// Returns whether the debt is large enough to sleep.
    fn is_due(&self, debt: Duration) -> bool {
        !self.awake && debt >= SHORTEST_STOP
    }
}

/// What the limits of a VM have in common.
#[derive(Default)]
pub(crate) struct Limits {
    pub(crate) terms: Mutex<Terms>,
    /// Rung with each change, for threads that enforce limits.
    pub(crate) changed: Condvar,
}

#[derive(Default)]
pub(crate) struct Terms {
    /// For vCPUs that are attached later.
    pub(crate) all: Option<NonZeroU64>,
    /// How many callers keep all vCPUs awake.
    pub(crate) wakers: usize,
    /// The number of changes.
    pub(crate) changes: u64,
}

impl Limits {
    /// Counts a change, and wakes the threads that wait for one.
    pub(crate) fn change(&self, mut terms: MutexGuard<'_, Terms>) {
        terms.changes = terms.changes.wrapping_add(1);
        drop(terms);
        self.changed.notify_all();
    }
}
