//! The account of each vCPU, and the sleep that pays its debt.

use core::num::NonZeroU64;
use core::time::Duration;
use std::time::Instant;

use super::budget::{Budget, SHORTEST_STOP};
use crate::sync::{Condvar, Counter, Mutex, MutexGuard, lock, wait_until};

/// The longest sleep in one piece: points in time must exist.
const DAY: Duration = Duration::from_secs(86_400);

/// One vCPU's limit. Nobody waits for anything while holding its lock, but for the vCPU's own
/// thread, which sleeps on it.
pub(crate) struct Limit {
    start: Instant,
    account: Mutex<Account>,
    /// Rung when the vCPU may have less to sleep, or is to sleep no more.
    changed: Condvar,
    /// Time slept here, in nanoseconds.
    pub(crate) slept_ns: Counter,
}

#[derive(Default)]
struct Account {
    /// None: no limit.
    budget: Option<Budget>,
    /// Nobody is to sleep now; debts remain.
    awake: bool,
    asleep: bool,
}

/// What an onlooker sees of a vCPU that has a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Within its limit, or nearly so, or not to sleep now.
    Free,
    /// It sleeps, for so long yet.
    Asleep(Duration),
    /// It is in the guest, or may be, and should be asleep.
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
    /// Pages per second that the vCPU may dirty now; none: any number.
    pub(crate) fn get(&self) -> Option<NonZeroU64> {
        lock(&self.account).budget.as_ref().map(Budget::limit)
    }

    /// Sets the limit, or lifts it and forgives all debt. `logged` returns how many pages the vCPU has
    /// logged so far. Whoever sleeps goes on by the new one.
    pub(crate) fn set(&self, limit: Option<NonZeroU64>, logged: impl Fn() -> u64) {
        let mut account = lock(&self.account);
        match (limit, &mut account.budget) {
            (None, budget) => *budget = None,
            (Some(limit), Some(budget)) => {
                // The time before is paid by the limit before.
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

    /// Whether the vCPU's thread is to stay awake, or leave its sleep at once, whatever it owes.
    pub(crate) fn keep_awake(&self, awake: bool) {
        lock(&self.account).awake = awake;
        self.changed.notify_all();
    }

    /// On the vCPU's thread: sleeps off what is owed, and returns how long that took. Returns early
    /// when the limit is lifted, or the thread is to stay awake.
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

    /// How the vCPU stands; `None` if it has no limit.
    pub(crate) fn look(&self, logged: impl Fn() -> u64) -> Option<Standing> {
        let mut account = lock(&self.account);
        let debt = self.debt(&mut account, &logged)?;
        Some(match account.asleep {
            true => Standing::Asleep(debt),
            false if account.is_due(debt) => Standing::Owes,
            false => Standing::Free,
        })
    }

    /// What is owed now, in time; `None` without a limit.
    fn debt(&self, account: &mut Account, logged: &impl Fn() -> u64) -> Option<Duration> {
        let budget = account.budget.as_mut()?;
        Some(budget.count(logged(), self.start.elapsed()))
    }
}

impl Account {
    /// Whether the vCPU's thread is to sleep for so large a debt.
    fn is_due(&self, debt: Duration) -> bool {
        !self.awake && debt >= SHORTEST_STOP
    }
}

/// What is common to the limits of a VM.
#[derive(Default)]
pub(crate) struct Limits {
    pub(crate) terms: Mutex<Terms>,
    /// Rung with each change, for those that look after limits.
    pub(crate) changed: Condvar,
}

#[derive(Default)]
pub(crate) struct Terms {
    /// For vCPUs that are attached later.
    pub(crate) all: Option<NonZeroU64>,
    /// How many want everybody awake.
    pub(crate) wakers: usize,
    /// How often something has changed.
    pub(crate) changes: u64,
}

impl Limits {
    /// Says that something has changed, and so wakes who waits for it.
    pub(crate) fn change(&self, mut terms: MutexGuard<'_, Terms>) {
        terms.changes = terms.changes.wrapping_add(1);
        drop(terms);
        self.changed.notify_all();
    }
}
