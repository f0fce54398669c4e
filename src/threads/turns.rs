// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a reaper does each time it wakes up, in whatever thread it does.

use core::time::Duration;
use std::time::Instant;

use super::backoff::Backoff;
use crate::error::ReaperError;
use crate::log::DirtyLog;
use crate::observe::trace;
use crate::pacing::alarm::{DEAF, Heard};
use crate::pacing::{Pacer, Pacing, RingObservation};

/// Looks and passes, at a policy's pace.
pub(super) struct Turns {
    pacer: Pacer,
    rings: Vec<RingObservation>,
    load: Load,
    backoff: Backoff,
    /// Times are durations since then.
    start: Instant,
    due: Duration,
    deaf: Instant,
    /// How long the last turn's pass took, and when the turn was over.
    last: Option<(Duration, Duration)>,
}

impl Turns {
    /// The first is due at once.
    pub(super) fn new(policy: impl Pacing + 'static) -> Self {
        let start = Instant::now();
        Self {
            pacer: Pacer::new(policy),
            rings: Vec::new(),
            load: Load::default(),
            backoff: Backoff::default(),
            start,
            due: Duration::ZERO,
            deaf: start,
            last: None,
        }
    }

    /// Goes on with another policy, which is to look at once.
    pub(super) fn set_policy(&mut self, log: &DirtyLog, policy: impl Pacing + 'static) {
        self.pacer.set_policy(policy);
        self.due = self.start.elapsed();
        trace::reaper(&log.inner().name, "policy");
    }

    /// Goes on after a pause.
    pub(super) fn restart(&mut self) {
        self.pacer.restart();
        self.load = Load::default();
        self.last = None;
    }

    /// When the next turn is due.
    pub(super) fn due(&self) -> Instant {
        self.start + self.due
    }

    /// Until when full exits are no reason for a turn.
    pub(super) fn deaf(&self) -> Instant {
        self.deaf
    }

    /// Looks at the rings, and empties those that the policy chooses. What goes wrong is reported, and got over.
    pub(super) fn turn(
        &mut self,
        log: &DirtyLog,
        heard: Heard,
        mut report: impl FnMut(ReaperError),
    ) {
        let counts = &log.inner().reaper_counts;
        let now = self.start.elapsed();
        if heard == Heard::Full {
            self.deaf = self.start + now + DEAF;
        }
        if let Some((took, asleep)) = self.last.take() {
            let is_heavy = self.load.is_heavy(took, now.saturating_sub(asleep));
            counts.saturated.set(is_heavy.into());
        }
        log.observe(&mut self.rings);
        counts.looks.add(1);
        match heard {
            Heard::Nothing => {
                let late = now.saturating_sub(self.due);
                counts.lateness_ns.set(late.as_nanos() as u64);
            }
            Heard::Full => counts.woken.add(1),
            Heard::Command => {}
        }
        let (pacer, woken) = (&mut self.pacer, heard != Heard::Nothing);
        if let Err(error) = pacer.look(now, woken, &mut self.rings) {
            report(error.into());
        }
        let decided = self.start.elapsed();
        let mut took = Duration::ZERO;
        if !pacer.reap().is_empty() {
            let taken = log.reap_rings(pacer.reap());
            let taken = taken.map_err(|error| report(error.into()));
            self.backoff.note(taken.ok());
            let entries = taken.unwrap_or(0);
            let end = self.start.elapsed();
            pacer.passed(end, entries);
            took = end - decided;
            counts.passes.add(1);
            counts.entries.add(entries);
            counts.pass_ns.add(took.as_nanos() as u64);
        }
        let asleep = self.start.elapsed();
        // A full ring must not wake it sooner either, as it could not empty that.
        let patient = asleep + self.backoff.delay();
        self.due = pacer.due().max(patient);
        self.deaf = self.deaf.max(self.start + patient);
        self.last = Some((took, asleep));
        let delay_ns = self.due.saturating_sub(asleep).as_nanos() as u64;
        counts.delay_ns.set(delay_ns);
        trace::look(&log.inner().name, heard.kick(), pacer.reap(), delay_ns);
    }
}

/// The share of its time that the reaper spends on passes.
#[derive(Default)]
struct Load {
    busy: f64,
    idle: f64,
}

impl Load {
    /// Adds one turn. Returns whether most of the recent time went into passes.
    fn is_heavy(&mut self, busy: Duration, idle: Duration) -> bool {
        /// Seconds after which a turn has half its weight.
        const HALF_LIFE: f64 = 0.25;
        let (busy, idle) = (busy.as_secs_f64(), idle.as_secs_f64());
        let weight = (-(busy + idle) / HALF_LIFE).exp2();
        self.busy = self.busy * weight + busy;
        self.idle = self.idle * weight + idle;
        self.busy > 0.5 * (self.busy + self.idle)
    }
}
