// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The link between a policy and the thread that empties the rings.

use core::fmt;
use core::time::Duration;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::fading::FadingMean;
use super::fixed::Fixed;
use super::{LONGEST_LOOK, Observation, Pacing, PassCost, RingObservation, SHORTEST_LOOK};
use crate::error::PolicyError;

/// So many delays out of bounds in a row show that a policy is wrong.
const PATIENCE: u32 = 64;

/// Seconds after which what a vCPU logged has half its weight in its rate.
const RATE_HALF_LIFE: f64 = 1.0;

/// What the last look recorded of a ring.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    /// Entries that its vCPU had logged.
    logged: u64,
    /// Entries that it logged lately.
    rate: FadingMean,
}

/// Drives a policy: prepares its observations, keeps it within its bounds, and replaces it if it fails.
///
/// It reads no clock: times are durations since a moment of the caller's choice. In each turn of its loop the caller
///
/// 1. calls [`look`](Self::look) at [`due`](Self::due), or earlier when a vCPU has stopped on a full ring;
/// 2. empties the rings that [`reap`](Self::reap) names, if there are any, and reports it by
///    [`passed`](Self::passed).
///
/// ```
/// # use std::time::Instant;
/// use kvm_dirty_ring::{DirtyLog, error::ResetError, pacing::{Adaptive, Pacer}};
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
/// # turn(&log, &mut Pacer::new(Adaptive::default()), Instant::now()).unwrap();
/// ```
pub struct Pacer {
    policy: Box<dyn Pacing>,
    known: Vec<Known>,
    reap: Vec<bool>,
    /// The time of the last look; `None` before the policy's first.
    last_look: Option<Duration>,
    last_pass: Option<PassCost>,
    wait: Duration,
    due: Duration,
    out_of_bounds: u32,
}

impl Pacer {
    /// Creates a pacer whose first look is due at once.
    pub fn new(policy: impl Pacing + 'static) -> Self {
        Self {
            policy: Box::new(policy),
            known: Vec::new(),
            reap: Vec::new(),
            last_look: None,
            last_pass: None,
            wait: Duration::ZERO,
            due: Duration::ZERO,
            out_of_bounds: 0,
        }
    }

    /// Replaces the policy. The new one looks at once.
    pub fn set_policy(&mut self, policy: impl Pacing + 'static) {
        self.replace(Box::new(policy));
        self.restart();
    }

    fn replace(&mut self, policy: Box<dyn Pacing>) {
        let old = core::mem::replace(&mut self.policy, policy);
        // It may panic once more when it is dropped.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(old))) {
            // So may its payload, which is leaked.
            core::mem::forget(panic);
        }
    }

    /// Continues after a pause. What happened meanwhile is no measure of the guest's pace.
    pub fn restart(&mut self) {
        self.last_look = None;
        self.last_pass = None;
        self.out_of_bounds = 0;
        self.due = Duration::ZERO;
    }

    /// Passes the state of the rings at `now` to the policy, and takes its decision.
    ///
    /// It fills in what the rings have logged since the look before. `woken` means that the look was not due: a
    /// vCPU has stopped on a full ring.
    ///
    /// # Errors
    /// The policy has panicked, or has returned delays out of bounds too often. [`Fixed`] replaces it, with a pass each second,
    /// from this look on.
    pub fn look(
        &mut self,
        now: Duration,
        woken: bool,
        rings: &mut [RingObservation],
    ) -> Result<(), PolicyError> {
        let first = self.last_look.is_none();
        let elapsed = self
            .last_look
            .map_or(Duration::ZERO, |last| now.saturating_sub(last));
        self.learn(rings, elapsed, first);
        let seen = Observation {
            elapsed,
            lateness: (!woken && !first).then(|| now.saturating_sub(self.due)),
            last_pass: self.last_pass.take(),
            rings,
        };
        self.last_look = Some(now);
        let asked = self.ask(&seen);
        if asked.is_err() {
            self.replace(Box::new(Fixed::default()));
            // It is unknown how long the policy has been wrong.
            self.reap.fill(true);
        }
        let wait = *asked.as_ref().unwrap_or(&Duration::from_secs(1));
        self.wait = wait.clamp(SHORTEST_LOOK, LONGEST_LOOK);
        self.due = now.saturating_add(self.wait);
        asked.map(drop)
    }

    /// Returns which rings to empty now, in the order of the observation; empty if none.
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
        self.due = now.saturating_add(self.wait);
    }

    /// Returns when the next look is due.
    pub fn due(&self) -> Duration {
        self.due
    }

    /// Compares the rings with the last look, and fills in what has changed.
    fn learn(&mut self, rings: &mut [RingObservation], elapsed: Duration, first: bool) {
        if first {
            self.known.clear();
        }
        let old = self.known.len();
        // Allocates only where vCPUs were attached.
        self.known.resize(rings.len(), Known::default());
        for (index, (ring, known)) in rings.iter_mut().zip(&mut self.known).enumerate() {
            // A harvest of a broken ring can make the count go back. Do not count those entries twice.
            let logged = ring.taken.saturating_add(ring.waiting).max(known.logged);
            // Entries from before a ring's first look belong to no interval.
            ring.logged = match index < old {
                true => logged - known.logged,
                false => 0,
            };
            known.logged = logged;
            if index < old {
                let seconds = elapsed.as_secs_f64();
                known.rate.add(ring.logged as f64, seconds, RATE_HALF_LIFE);
            }
            ring.rate = known.rate.per_second();
        }
        self.reap.clear();
        self.reap.resize(rings.len(), false);
    }

    /// Returns the policy's decision, within bounds or not.
    fn ask(&mut self, seen: &Observation<'_>) -> Result<Duration, PolicyError> {
        let (policy, reap) = (&mut self.policy, &mut self.reap[..]);
        let decide = AssertUnwindSafe(|| policy.decide(seen, reap));
        let asked = catch_unwind(decide);
        let asked = asked.map_err(|panic| {
            core::mem::forget(panic);
            PolicyError::Panicked
        })?;
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

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Records its observations, and follows a script.
    struct Spy {
        seen: Arc<Mutex<Vec<Seen>>>,
        wait: Duration,
        reap: Vec<bool>,
    }

    #[derive(Debug, Clone, PartialEq, Default)]
    struct Seen {
        elapsed: Duration,
        lateness: Option<Duration>,
        last_pass: Option<PassCost>,
        logged: Vec<u64>,
    }

    impl Pacing for Spy {
        fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
            self.seen.lock().unwrap().push(Seen {
                elapsed: seen.elapsed,
                lateness: seen.lateness,
                last_pass: seen.last_pass,
                logged: seen.rings.iter().map(|ring| ring.logged).collect(),
            });
            assert!(reap.iter().all(|reap| !reap), "left from the look before");
            reap[..self.reap.len()].copy_from_slice(&self.reap);
            self.wait
        }
    }

    fn spy(wait: Duration, reap: &[bool]) -> (Pacer, impl Fn() -> Seen + use<>) {
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        let spy = Spy {
            seen: Arc::clone(&seen),
            wait,
            reap: reap.into(),
        };
        let last = move || seen.lock().unwrap().last().unwrap().clone();
        (Pacer::new(spy), last)
    }

    fn ring(taken: u64, waiting: u64) -> RingObservation {
        RingObservation {
            taken,
            waiting,
            ..RingObservation::default()
        }
    }

    #[test]
    fn a_policy_sees_what_has_changed() {
        let (mut pacer, seen) = spy(10 * MS, &[false, true]);
        assert_eq!(pacer.due(), Duration::ZERO);
        // Nothing from before its time is in its observation.
        pacer
            .look(100 * MS, false, &mut [ring(500, 40), ring(0, 7)])
            .unwrap();
        let nothing = Seen {
            logged: vec![0, 0],
            ..Seen::default()
        };
        assert_eq!(seen(), nothing);
        assert_eq!(pacer.due(), 110 * MS);

        // A pass: the delay counts from its end.
        assert_eq!(pacer.reap(), [false, true]);
        pacer.passed(103 * MS, 7);
        assert_eq!(pacer.due(), 113 * MS);
        pacer
            .look(115 * MS, false, &mut [ring(540, 5), ring(7, 0)])
            .unwrap();
        let after = Seen {
            elapsed: 15 * MS,
            lateness: Some(2 * MS),
            last_pass: Some(PassCost {
                took: 3 * MS,
                entries: 7,
            }),
            logged: vec![5, 0],
        };
        assert_eq!(seen(), after);

        // A third ring is attached, and the caller has not reported the last pass.
        pacer
            .look(118 * MS, true, &mut [ring(540, 6), ring(7, 1), ring(9, 9)])
            .unwrap();
        let woken = Seen {
            elapsed: 3 * MS,
            lateness: None,
            last_pass: None,
            logged: vec![1, 1, 0],
        };
        assert_eq!(seen(), woken);
        assert_eq!(pacer.reap(), [false, true, false]);
    }

    #[test]
    fn a_policy_sees_nothing_twice() {
        let (mut pacer, seen) = spy(10 * MS, &[]);
        let looks = [(500, 40, 0), (500, 0, 0), (540, 0, 0), (540, 3, 3)];
        for (now, (taken, waiting, logged)) in (1..).zip(looks) {
            pacer
                .look(now * MS, true, &mut [ring(taken, waiting)])
                .unwrap();
            assert_eq!(seen().logged, [logged]);
        }
    }

    #[test]
    fn a_rate_is_a_mean_in_which_a_second_is_half() {
        struct Rates(Arc<Mutex<Vec<f64>>>);
        impl Pacing for Rates {
            fn decide(&mut self, seen: &Observation<'_>, _: &mut [bool]) -> Duration {
                let rates = seen.rings.iter().map(|ring| ring.rate);
                *self.0.lock().unwrap() = rates.collect();
                MS
            }
        }
        let rates = Arc::<Mutex<Vec<f64>>>::default();
        let mut pacer = Pacer::new(Rates(Arc::clone(&rates)));
        let mut look = |seconds, rings: &mut [RingObservation]| {
            pacer
                .look(Duration::from_secs(seconds), false, rings)
                .unwrap();
            rates.lock().unwrap().clone()
        };
        assert_eq!(look(9, &mut [ring(500, 0)]), [0.0]);
        // At first it is the mean of all samples.
        assert_eq!(look(10, &mut [ring(500, 1000)]), [1000.0]);
        // Half of the first second's 1,000, and 4,000; by half a second and one.
        let rate = (500.0 + 4000.0) / 1.5;
        assert_eq!(look(11, &mut [ring(4500, 1000), ring(0, 70)]), [rate, 0.0]);
        assert_eq!(look(11, &mut [ring(4500, 1000), ring(0, 70)]), [rate, 0.0]);
        let rate = (125.0 + 1000.0) / (0.375 + 2.0);
        assert_eq!(
            look(13, &mut [ring(4500, 1000), ring(70, 80)]),
            [rate, 40.0]
        );
        // Entries that come in no time must not make the rate endless.
        let rates = look(13, &mut [ring(4600, 1000), ring(70, 80), ring(0, 0)]);
        assert!(rates[0].is_finite() && rates[0] > rate, "{rates:?}");
        let rates = look(13, &mut [ring(4600, 1000), ring(70, 80), ring(0, 9)]);
        assert!(rates[2].is_finite(), "{rates:?}");
    }

    #[test]
    fn nothing_to_reap_is_an_empty_list() {
        let (mut pacer, _) = spy(MS, &[]);
        assert!(pacer.reap().is_empty());
        pacer.look(MS, false, &mut [ring(0, 0); 3]).unwrap();
        assert!(pacer.reap().is_empty());
    }

    #[test]
    fn another_policy_starts_afresh_and_at_once() {
        let (mut pacer, _) = spy(10 * MS, &[true]);
        pacer.look(5 * MS, false, &mut [ring(1, 1)]).unwrap();
        pacer.passed(6 * MS, 1);
        let (other, seen) = spy(MS, &[]);
        pacer.set_policy(other.policy);
        assert_eq!(pacer.due(), Duration::ZERO);
        pacer.look(8 * MS, false, &mut [ring(100, 1)]).unwrap();
        let fresh = Seen {
            logged: vec![0],
            ..Seen::default()
        };
        assert_eq!(seen(), fresh);
    }

    #[test]
    fn times_out_of_bounds_are_moved_into_them() {
        for (asked, due) in [
            (Duration::ZERO, SHORTEST_LOOK),
            (Duration::MAX, LONGEST_LOOK),
        ] {
            let (mut pacer, _) = spy(asked, &[]);
            pacer.look(MS, false, &mut []).unwrap();
            assert_eq!(pacer.due(), MS + due);
        }
    }

    #[test]
    fn a_policy_that_stays_out_of_bounds_is_replaced() {
        for asked in [
            Duration::ZERO,
            SHORTEST_LOOK - Duration::from_nanos(1),
            Duration::MAX,
        ] {
            let (mut pacer, _) = spy(asked, &[]);
            for _ in 1..PATIENCE {
                pacer.look(MS, false, &mut [ring(0, 0)]).unwrap();
                assert!(pacer.reap().is_empty());
            }
            let error = pacer.look(MS, false, &mut [ring(0, 0)]);
            assert_eq!(error, Err(PolicyError::OutOfBounds { asked }));
            // A pass at once, and then one each second.
            assert_eq!(pacer.reap(), [true]);
            pacer.passed(2 * MS, 0);
            assert_eq!(pacer.due(), 1002 * MS);
            pacer.look(900 * MS, true, &mut [ring(0, 0)]).unwrap();
            assert!(pacer.reap().is_empty());
            pacer.look(1002 * MS, false, &mut [ring(0, 0)]).unwrap();
            assert_eq!(pacer.reap(), [true]);
        }
    }

    #[test]
    fn one_time_within_bounds_makes_up_for_many_outside() {
        struct Mostly(u32);
        impl Pacing for Mostly {
            fn decide(&mut self, _: &Observation<'_>, _: &mut [bool]) -> Duration {
                self.0 += 1;
                if self.0 % PATIENCE == 0 {
                    MS
                } else {
                    Duration::ZERO
                }
            }
        }
        let mut pacer = Pacer::new(Mostly(0));
        for _ in 0..10 * PATIENCE {
            pacer.look(MS, false, &mut []).unwrap();
        }
    }

    #[test]
    fn a_policy_that_panics_is_replaced() {
        struct Panics;
        impl Pacing for Panics {
            fn decide(&mut self, _: &Observation<'_>, _: &mut [bool]) -> Duration {
                panic!("a policy's panic, which the test is about");
            }
        }
        let mut pacer = Pacer::new(Panics);
        let error = pacer.look(MS, false, &mut [ring(0, 0); 2]);
        assert_eq!(error, Err(PolicyError::Panicked));
        assert_eq!(pacer.reap(), [true; 2]);
        assert_eq!(pacer.due(), 1001 * MS);
    }

    /// A clock that goes back, counts that shrink: nothing a caller does makes it panic.
    #[test]
    fn nonsense_is_survived() {
        let (mut pacer, seen) = spy(MS, &[]);
        pacer
            .look(
                Duration::from_secs(9),
                false,
                &mut [ring(u64::MAX, u64::MAX)],
            )
            .unwrap();
        pacer.passed(MS, u64::MAX);
        pacer.look(MS, false, &mut [ring(0, 0)]).unwrap();
        assert_eq!(seen().elapsed, Duration::ZERO);
        assert_eq!(seen().logged, [0]);
        pacer.look(Duration::MAX, false, &mut []).unwrap();
        assert_eq!(pacer.due(), Duration::MAX);
        pacer.passed(Duration::MAX, 0);
    }
}
