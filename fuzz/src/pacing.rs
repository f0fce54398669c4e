// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Every policy under arbitrary observations, alone and in the hands of a pacer.

use core::time::Duration;

use arbitrary::{Arbitrary, Result, Unstructured};
use kvm_dirty_ring::error::PolicyError;
use kvm_dirty_ring::pacing::{
    Adaptive, Aimd, Fixed, LONGEST_LOOK, Observation, Pacer, Pacing, PassCost, RingObservation,
    RunLevels, SHORTEST_LOOK, Tuning,
};

const MOST_LOOKS: usize = 64;

/// A policy, and what it is shown one after another.
#[derive(Debug)]
pub struct Script {
    policy: Policy,
    looks: Vec<Look>,
}

#[derive(Debug, Clone)]
enum Policy {
    Fixed(Duration),
    AsMeant,
    AsPosted,
    Aimd,
    Adaptive(Tuning),
    /// One that asks for whatever it likes.
    Wild(Vec<Duration>),
}

#[derive(Debug)]
struct Look {
    /// Since the look before; a pacer is also shown clocks that go backwards.
    elapsed: Duration,
    back: bool,
    lateness: Option<Duration>,
    pass: Option<PassCost>,
    rings: Vec<RingObservation>,
    restart: bool,
}

impl<'a> Arbitrary<'a> for Script {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let policy = match u.arbitrary::<u8>()? % 10 {
            0 => Policy::Fixed(duration(u)?),
            1 => Policy::AsMeant,
            2 => Policy::AsPosted,
            3 => Policy::Aimd,
            4 => Policy::Adaptive(Tuning::DEFAULT),
            5..=8 => Policy::Adaptive(tuning(u)?),
            _ => Policy::Wild((0..8).map(|_| duration(u)).collect::<Result<_>>()?),
        };
        let mut looks = Vec::new();
        while !u.is_empty() && looks.len() < MOST_LOOKS {
            looks.push(look(u)?);
        }
        Ok(Self { policy, looks })
    }
}

/// Anything, most often what a clock may show.
fn duration(u: &mut Unstructured<'_>) -> Result<Duration> {
    let value = u.arbitrary::<u16>()?;
    Ok(match u.arbitrary::<u8>()? % 8 {
        0 => Duration::ZERO,
        1 => Duration::from_nanos(value.into()),
        2 | 3 => Duration::from_micros(value.into()),
        4 | 5 => Duration::from_millis(value.into()),
        6 => Duration::from_secs(u64::from(value) << 40),
        _ => Duration::MAX,
    })
}

/// Any number of entries, most often what fits into a ring.
fn count(u: &mut Unstructured<'_>) -> Result<u64> {
    let value = u64::from(u.arbitrary::<u16>()?);
    Ok(match u.arbitrary::<u8>()? % 8 {
        0..=3 => value,
        4 | 5 => value % 4097,
        6 => value << 48,
        _ => u64::MAX - value,
    })
}

/// Any number, and what is none.
fn float(u: &mut Unstructured<'_>, usual: f64) -> Result<f64> {
    Ok(match u.arbitrary::<u8>()? % 8 {
        0 => f64::NAN,
        1 => f64::INFINITY,
        2 => -1.0,
        3 => 0.0,
        4 => f64::from_bits(u.arbitrary()?),
        _ => usual * f64::from(u.arbitrary::<u16>()?) / 4096.0,
    })
}

fn tuning(u: &mut Unstructured<'_>) -> Result<Tuning> {
    let mut tuning = Tuning::DEFAULT;
    tuning.half_life = duration(u)?;
    tuning.faster = float(u, tuning.faster)?;
    tuning.steps = float(u, tuning.steps)?;
    tuning.deviations = float(u, tuning.deviations)?;
    tuning.least = float(u, tuning.least)?;
    tuning.along = float(u, tuning.along)?;
    tuning.first_sight = float(u, tuning.first_sight)?;
    tuning.shortest = duration(u)?;
    tuning.longest = duration(u)?;
    Ok(tuning)
}

fn ring(u: &mut Unstructured<'_>) -> Result<RingObservation> {
    let mut ring = RingObservation::default();
    ring.entries = count(u)?;
    ring.soft_limit = count(u)?;
    ring.waiting = count(u)?;
    ring.taken = count(u)?;
    ring.full_exits = count(u)?;
    ring.logged = count(u)?;
    ring.rate = float(u, 1e5)?;
    Ok(ring)
}

fn look(u: &mut Unstructured<'_>) -> Result<Look> {
    let kind = u.arbitrary::<u8>()?;
    let elapsed = duration(u)?;
    let lateness = match kind & 1 {
        0 => None,
        _ => Some(duration(u)?),
    };
    let pass = match kind >> 1 & 1 {
        0 => None,
        _ => Some(PassCost {
            took: duration(u)?,
            entries: count(u)?,
        }),
    };
    let rings = (0..kind >> 2 & 3).map(|_| ring(u)).collect::<Result<_>>()?;
    Ok(Look {
        elapsed,
        back: kind >> 4 & 7 == 7,
        lateness,
        pass,
        rings,
        restart: kind >> 4 == 6,
    })
}

/// A policy that asks for one time after another, whatever it is shown.
struct Wild {
    waits: Vec<Duration>,
    next: usize,
}

impl Pacing for Wild {
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
        reap.fill(seen.waiting() % 2 == 1);
        self.next += 1;
        self.waits[self.next % self.waits.len()]
    }
}

/// Runs the script.
pub fn run(script: &Script) {
    match &script.policy {
        Policy::Fixed(period) => both(script, || Fixed::new(*period)),
        Policy::AsMeant => both(script, RunLevels::as_meant),
        Policy::AsPosted => both(script, RunLevels::as_posted),
        Policy::Aimd => both(script, Aimd::new),
        Policy::Adaptive(tuning) => both(script, || Adaptive::new(*tuning)),
        Policy::Wild(waits) => paced(
            script,
            Wild {
                waits: waits.clone(),
                next: 0,
            },
        ),
    }
}

fn both<P: Pacing + core::fmt::Debug + 'static>(script: &Script, make: impl Fn() -> P) {
    alone(script, make());
    paced(script, make());
}

/// What a policy may ask for, by its own numbers too.
fn bounds(policy: &Policy) -> (Duration, Duration) {
    match policy {
        Policy::Adaptive(tuning) => {
            let shortest = tuning.shortest.clamp(SHORTEST_LOOK, LONGEST_LOOK);
            (shortest, tuning.longest.clamp(shortest, LONGEST_LOOK))
        }
        _ => (SHORTEST_LOOK, LONGEST_LOOK),
    }
}

/// The policy as such: it stays within bounds, and nothing that it is shown drives it mad.
fn alone<P: Pacing + core::fmt::Debug>(script: &Script, mut policy: P) {
    let (shortest, longest) = bounds(&script.policy);
    let careful = matches!(script.policy, Policy::Adaptive(_));
    for look in &script.looks {
        let mut seen = Observation::new(look.elapsed, &look.rings);
        seen.lateness = look.lateness;
        seen.last_pass = look.pass;
        let mut reap = vec![false; look.rings.len()];
        let wait = policy.decide(&seen, &mut reap);
        assert!((shortest..=longest).contains(&wait), "{wait:?} in {look:?}");
        for (ring, reap) in look.rings.iter().zip(&reap) {
            // Nothing may talk the policy out of this: the vCPU stands still.
            let full = ring.waiting >= ring.soft_limit.max(1);
            assert!(!careful || !full || *reap, "a full ring is left, {look:?}");
        }
    }
    let state = format!("{policy:?}");
    assert!(!state.contains("NaN"), "{state}");
}

/// The policy behind a pacer, whose clock may do what it likes.
fn paced(script: &Script, policy: impl Pacing + 'static) {
    let wild = matches!(script.policy, Policy::Wild(_));
    let (shortest, longest) = bounds(&script.policy);
    let mut pacer = Pacer::new(policy);
    let mut replaced = false;
    let mut now = Duration::ZERO;
    let mut known: Vec<u64> = Vec::new();
    for look in &script.looks {
        if look.restart {
            pacer.restart();
            assert_eq!(pacer.due(), Duration::ZERO);
            known.clear();
        }
        now = match look.back {
            true => now.saturating_sub(look.elapsed),
            false => now.saturating_add(look.elapsed),
        };
        let mut rings = look.rings.clone();
        match pacer.look(now, look.lateness.is_none(), &mut rings) {
            Ok(()) => {}
            Err(PolicyError::OutOfBounds { .. }) => {
                assert!(wild && !replaced, "a policy of ours is out of bounds");
                assert_eq!(
                    pacer.reap(),
                    vec![true; rings.len()],
                    "the time that has passed is unknown"
                );
                replaced = true;
            }
            Err(error) => panic!("{error}"),
        }
        for (index, (ring, shown)) in rings.iter().zip(&look.rings).enumerate() {
            let total = shown.taken.saturating_add(shown.waiting);
            // A ring is known from its second look on.
            let logged = known
                .get(index)
                .map_or(0, |known| total.saturating_sub(*known));
            assert_eq!(ring.logged, logged);
            assert!(ring.rate.is_finite() && ring.rate >= 0.0, "{ring:?}");
        }
        // What it has seen before it does not count again, should there be less in between.
        known.resize(rings.len(), 0);
        for (known, ring) in known.iter_mut().zip(&rings) {
            *known = ring.taken.saturating_add(ring.waiting).max(*known);
        }

        assert!([0, rings.len()].contains(&pacer.reap().len()));
        let (shortest, longest) = match wild {
            true => (SHORTEST_LOOK, LONGEST_LOOK),
            false => (shortest, longest),
        };
        let due = now.saturating_add(shortest)..=now.saturating_add(longest);
        assert!(due.contains(&pacer.due()), "{:?} at {now:?}", pacer.due());
        if let Some(pass) = look.pass {
            // It took a while, in which the clock may have been set back.
            now = match look.back {
                true => now.saturating_sub(pass.took),
                false => now.saturating_add(pass.took),
            };
            pacer.passed(now, pass.entries);
            let due = now.saturating_add(shortest)..=now.saturating_add(longest);
            assert!(due.contains(&pacer.due()), "{:?} at {now:?}", pacer.due());
        }
    }
}
