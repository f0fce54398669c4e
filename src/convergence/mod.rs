// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Convergence of a migration: what to do after each sync of a pre-copy.
//!
//! Pages that the guest writes all the time can be left open: they are neither protected nor sent before the last round. These
//! are the *members* of its working set. The *others* are the rest of what a sync reports. A *refresh* closes the members, so
//! that only those come back that are still written. [`Convergence`] takes what each sync has found, and decides. It is a
//! pure function of that and of the syncs before, without a clock, a thread or an allocation. A migration that leaves no page open
//! has no members, and can use it as well.
//!
//! *Left* stands for others and members together, *takes* for what the link takes within the downtime. A run counts with its
//! [cost](Terms::run_cost), which is 0 until the VMM sets it or [learns it from a round](Terms::learn_run_cost). The first
//! condition that holds is the decision:
//!
//! | | if | then |
//! |---|---|---|
//! | 1 | left fits into takes | [`Finish`](Decision::Finish) |
//! | 2 | a refresh can be had, has not just been had, and is owed or would help | [`Refresh`](Decision::Refresh) |
//! | 3 | more than two thirds of what the last refresh closed are open again, and do not fit | [`Hopeless`](Decision::Hopeless) |
//! | 4 | left is hardly less than two syncs ago, and no refresh draws near | [`Hopeless`](Decision::Hopeless) |
//! | 5 | otherwise | [`GoOn`](Decision::GoOn) |
//!
//! - A value is *hardly less* than an earlier one if it is more than 0.95 times that.
//! - A refresh *would help* where the others fit into takes, and either the members do not, or left is hardly less than at the
//!   last sync. It would not help where rule 3 holds, as it would close the same pages again.
//! - A refresh *can be had* if its pause is no longer than the downtime, there are members to close, and it is not in vain.
//! - A refresh *makes progress* if left, when it is decided, is at most 0.95 times what it was at the last refresh that made progress.
//!   The first refresh counts as one that did. Count the refreshes from that one on, including it. At a count of three, the next refresh
//!   is *in vain* until 8 syncs have passed since the last one; at four until 16 have passed, and so on. It is not in vain if it would
//!   make progress, or if it is owed and the last one was not.
//! - A refresh *has just been had* at the sync right after it, and at the sync after the first round, which sends what the refresh
//!   has closed. Rule 4 waits for one sync more, to have two rounds to compare.
//! - A refresh *draws near* if it can be had and the others, which do not fit yet, are at most 0.7 of what they were two syncs
//!   ago. Members leave only by a refresh. Until then left includes them, and may not shrink although the others do.
//!
//! Ask only after a round that has arrived whole. Make a new [`Convergence`] after memory was plugged in, and after the link was down
//! for long: left is more then, and rule 4 would take that for a guest that outruns the link. Do not learn the cost of a run from a
//! round in which the link broke.
//!
//! # A migration
//!
//! ```
//! use std::time::Duration;
//! use kvm_dirty_ring::convergence::{Convergence, Decision, Extent, Observation, Terms};
//!
//! /// A guest that writes 1,500 pages over and over, and 2,000 others a second.
//! #[derive(Default)]
//! struct Guest { others: u64, members: u64, closed: u64 }
//!
//! impl Guest {
//!     fn run(&mut self, seconds: f64) {
//!         self.members = 1500;
//!         self.others += (seconds * 2000.0) as u64;
//!     }
//! }
//!
//! // 10,000 pages a second, of which the last round may take 300 ms.
//! let terms = Terms::new(10_000.0, Duration::from_millis(300));
//! assert_eq!(terms.places(), 1500); // to be left open, whatever they are
//!
//! let mut guest = Guest { others: 50_000, ..Guest::default() }; // all of it, at first
//! let mut convergence = Convergence::new();
//! let mut rounds = 0;
//! let last = loop {
//!     // DirtyLog::sync
//!     let run = |pages| Extent { pages, runs: 1 };
//!     let mut seen = Observation::new(terms, run(guest.others), run(guest.members));
//!     seen.refresh.pause = Some(Duration::from_millis(5));
//!     seen.refresh.closed = guest.closed;
//!     match convergence.decide(&seen) {
//!         Decision::Finish => break seen.left(), // stops the guest, syncs, and sends the rest
//!         Decision::Refresh => {
//!             // Closes the members, which the next sync, at once, reports among the others.
//!             guest.closed = guest.members;
//!             guest.others += std::mem::take(&mut guest.members);
//!         }
//!         Decision::GoOn => {
//!             // Sends the others, while the guest runs.
//!             let sent = std::mem::take(&mut guest.others);
//!             guest.run(sent as f64 / terms.pages_per_second);
//!             rounds += 1;
//!         }
//!         Decision::Hopeless { pages_per_second } => {
//!             panic!("throttle the guest to {pages_per_second} pages a second, or give up");
//!         }
//!     }
//! };
//! assert_eq!((rounds, last.pages), (3, 1900));
//! ```

// May import: nothing.

#[cfg(all(test, not(feature = "modelled")))]
mod properties;
mod rules;
mod terms;

use core::num::NonZeroU64;
use core::time::Duration;

pub use rules::Convergence;
pub use terms::{Extent, Terms};

/// What a migration has measured after a sync.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Observation {
    /// The terms of the last round. They may change from sync to sync, for example with better estimates of the link's rate.
    pub terms: Terms,
    /// Dirty pages that are no members of the working set, to be sent in the next round.
    pub others: Extent,
    /// All members, which count as dirty and are to be sent in the last round.
    pub members: Extent,
    /// The last refresh, and the next.
    pub refresh: Refreshing,
}

impl Observation {
    /// Creates the observation of a sync where no refresh can be had. If one can, set [`refresh`](Self::refresh).
    pub fn new(terms: Terms, others: Extent, members: Extent) -> Self {
        Self {
            terms,
            others,
            members,
            refresh: Refreshing::default(),
        }
    }

    /// Returns what the last round would send if the guest stopped now.
    pub fn left(&self) -> Extent {
        self.others.and(self.members)
    }
}

/// The state of refreshes. By default none can be had, none is owed, and none was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refreshing {
    /// How long a refresh stops the guest, as measured or supposed: zero in [`Mode::Bitmap`](crate::Mode::Bitmap). `None` if none can
    /// be had.
    pub pause: Option<Duration>,
    /// Whether members should be closed whatever that saves: the guest is throttled by what it writes, or pages must no longer be
    /// left open.
    pub owed: bool,
    /// Pages that the last refresh closed; 0 if there was none.
    pub closed: u64,
    /// How many of these are members again.
    pub back: u64,
}

/// What a migration should do after a sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Decision {
    /// Send the others while the guest runs, then sync and decide again.
    GoOn,
    /// Close the members, sync at once, and decide again. Send nothing in between: the pages of this sync are to be sent with
    /// those of the next one, and count among its others.
    Refresh,
    /// Stop the guest, sync, and send what is left: it fits into the downtime.
    Finish,
    /// The guest writes too fast to finish. This is advice: if the migration continues as after [`GoOn`](Self::GoOn), the decision
    /// is repeated as long as it is true.
    Hopeless {
        /// A dirty rate of the whole guest, in pages a second, at which the migration would converge: while a round is sent, the
        /// guest then dirties half as much.
        pages_per_second: NonZeroU64,
    },
}
