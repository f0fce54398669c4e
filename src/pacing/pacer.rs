//! What stands between a policy and whoever empties the rings.

use core::fmt;
use core::time::Duration;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Fixed, LONGEST_LOOK, Observation, Pacing, PassCost, RingObservation, SHORTEST_LOOK};
use crate::error::PolicyError;

/// A policy that asks for times out of bounds so many times in a row does not know what it does.
const PATIENCE: u32 = 64;

/// Shows a policy what it needs to see, holds it to its bounds, and replaces it if it fails.
///
/// It reads no clock: times are durations since a moment of the caller's choice. A turn of the
/// caller's loop is
///
/// 1. [`look`](Self::look) at [`due`](Self::due), or earlier when a vCPU has stopped on a full ring;
/// 2. empty the rings that [`reap`](Self::reap) names, if there are any, and report it by
///    [`passed`](Self::passed).
///
/// ```
/// # use std::time::Instant;
/// use kvm_dirty_ring::{DirtyLog, error::ResetError, pacing::{LookFirst, Pacer}};
///
/// /// A turn of a VMM's own event loop, in place of a reaper thread.
/// fn turn(log: &DirtyLog, pacer: &mut Pacer, start: Instant) -> Result<(), ResetError> {
///     let mut rings = Vec::new(); // to be kept from turn to turn
///     log.observe(&mut rings);
///     if let Err(error) = pacer.look(start.elapsed(), false, &mut rings) {
///         eprintln!("{error}: once a second from now on");
///     }
///     if !pacer.reap().is_empty() {
///         let entries = log.reap_rings(pacer.reap())?;
///         pacer.passed(start.elapsed(), entries);
///     }
///     // Arm a timer for `pacer.due()`.
///     Ok(())
/// }
/// # let vm = kvm_dirty_ring::sim::SimVm::new(Default::default());
/// # let log = vm.dirty_log();
/// # turn(&log, &mut Pacer::new(LookFirst::default()), Instant::now()).unwrap();
/// ```
pub struct Pacer {
    policy: Box<dyn Pacing>,
    /// What each ring's vCPU had logged at the last look.
    logged: Vec<u64>,
    reap: Vec<bool>,
    /// When the last look was; none by this policy yet.
    last_look: Option<Duration>,
    last_pass: Option<PassCost>,
    wait: Duration,
    due: Duration,
    out_of_bounds: u32,
}

impl Pacer {
    /// A pacer whose first look is due at once.
    pub fn new(policy: impl Pacing + 'static) -> Self {
        Self {
            policy: Box::new(policy),
            logged: Vec::new(),
            reap: Vec::new(),
            last_look: None,
            last_pass: None,
            wait: Duration::ZERO,
            due: Duration::ZERO,
            out_of_bounds: 0,
        }
    }

    /// Goes on with another policy, which is to look at once.
    pub fn set_policy(&mut self, policy: impl Pacing + 'static) {
        self.policy = Box::new(policy);
        self.restart();
    }

    /// Goes on after a pause: what happened meanwhile says nothing about the guest's pace.
    pub fn restart(&mut self) {
        self.last_look = None;
        self.last_pass = None;
        self.out_of_bounds = 0;
        self.due = Duration::ZERO;
    }

    /// Shows the policy the rings as they are at `now`, and takes its decision. `woken` says that
    /// the look was not due but that a vCPU has stopped on a full ring. What the rings have logged
    /// since the look before is filled in.
    ///
    /// # Errors
    /// The policy has panicked, or has asked for times out of bounds too often. It is replaced by
    /// [`Fixed`] at a pass each second, from this very look on.
    pub fn look(
        &mut self,
        now: Duration,
        woken: bool,
        rings: &mut [RingObservation],
    ) -> Result<(), PolicyError> {
        let first = self.last_look.is_none();
        self.note_logged(rings, first);
        let seen = Observation {
            elapsed: self
                .last_look
                .map_or(Duration::ZERO, |last| now.saturating_sub(last)),
            lateness: (!woken && !first).then(|| now.saturating_sub(self.due)),
            last_pass: self.last_pass.take(),
            rings,
        };
        self.last_look = Some(now);
        let asked = self.ask(&seen);
        let asked = asked.inspect_err(|_| {
            self.policy = Box::new(Fixed::default());
            // Nobody knows how long it has been.
            self.reap.fill(true);
        });
        let wait = *asked.as_ref().unwrap_or(&Duration::from_secs(1));
        self.wait = wait.clamp(SHORTEST_LOOK, LONGEST_LOOK);
        self.due = now + self.wait;
        asked.map(drop)
    }

    /// The rings that are to be emptied now, in the order in which they were shown; empty if none
    /// is.
    pub fn reap(&self) -> &[bool] {
        match self.reap.contains(&true) {
            true => &self.reap,
            false => &[],
        }
    }

    /// Notes that these rings were emptied by `now`, and that they held `entries` entries.
    pub fn passed(&mut self, now: Duration, entries: u64) {
        let took = now.saturating_sub(self.last_look.unwrap_or(now));
        self.last_pass = Some(PassCost { took, entries });
        self.due = now + self.wait;
    }

    /// When the next look is due.
    pub fn due(&self) -> Duration {
        self.due
    }

    fn note_logged(&mut self, rings: &mut [RingObservation], first: bool) {
        // Allocates only where vCPUs were attached.
        let known = if first {
            0
        } else {
            self.logged.len().min(rings.len())
        };
        self.logged.resize(rings.len(), 0);
        for (index, (ring, before)) in rings.iter_mut().zip(&mut self.logged).enumerate() {
            let logged = ring.taken.saturating_add(ring.waiting);
            // A ring seen for the first time has a past that nobody measured.
            ring.logged = match index < known {
                true => logged.saturating_sub(*before),
                false => 0,
            };
            *before = logged;
        }
        self.reap.clear();
        self.reap.resize(rings.len(), false);
    }

    /// The policy's decision, within bounds or not.
    fn ask(&mut self, seen: &Observation<'_>) -> Result<Duration, PolicyError> {
        let (policy, reap) = (&mut self.policy, &mut self.reap[..]);
        let decide = AssertUnwindSafe(|| policy.decide(seen, reap));
        let asked = catch_unwind(decide).map_err(|_| PolicyError::Panicked)?;
        if (SHORTEST_LOOK..=LONGEST_LOOK).contains(&asked) {
            self.out_of_bounds = 0;
        } else {
            self.out_of_bounds += 1;
        }
        match self.out_of_bounds < PATIENCE {
            true => Ok(asked),
            false => Err(PolicyError::OutOfBounds { asked }),
        }
    }
}

impl fmt::Debug for Pacer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pacer")
            .field("due", &self.due)
            .finish_non_exhaustive()
    }
}
