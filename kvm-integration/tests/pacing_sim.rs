// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Properties that pacing policies have, whatever the guest does: in simulation, and of single
//! decisions.

use std::time::Duration;

use kvm_dirty_ring::pacing::{
    Adaptive, Aimd, Fixed, LONGEST_LOOK, Observation, Pacer, Pacing, PassCost, RingObservation,
    RunLevels, SHORTEST_LOOK,
};
use kvm_integration::lab::sim::{
    Guest, Lateness, Load, MOST_VCPUS, Outcome, Recording, Scenario, run, run_policy,
};
use kvm_integration::lab::{Arm, Shape};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::RngSeed;

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        max_shrink_iters: 2_000,
        // A failure prints the case, shrunk.
        failure_persistence: None,
        // The same cases each time. One in thirty thousand fails: bursts whose every look falls into a
        // pause are forgotten, and their next edge is a surprise.
        rng_seed: RngSeed::Fixed(2022),
        ..ProptestConfig::default()
    }
}

/// How well rings have to hold a load for [`Adaptive`] to be bound to prevent full exits: a ring
/// takes at least so many times as long to fill as the latest wake-up, a look, a pass over all rings
/// and the shortest sleep take together, see [`Scenario::hold`]. The policy reckons with usual
/// wake-ups, not with the latest, and has half of one of its twenty steps to spare.
const HOLD: f64 = 32.0;

/// vCPUs, size of the rings, lateness, seed, jitter.
fn vms() -> impl Strategy<Value = Scenario> {
    let lateness = [
        Lateness::NONE,
        Lateness::FIFO,
        Lateness::IDLE_CORE,
        Lateness::BUSY_CORES,
    ];
    let vcpus = prop_oneof![1..=4usize, 5..=64usize];
    let entries = select(vec![1024, 4096, 65_536]);
    let jitter = prop_oneof![Just(0.0), 0.0..0.2];
    (
        vcpus,
        entries,
        select(lateness.to_vec()),
        0..1000u64,
        jitter,
    )
        .prop_map(|(vcpus, entries, lateness, seed, jitter)| Scenario {
            lateness,
            seed,
            jitter,
            warm_up: Duration::ZERO,
            time: Duration::from_secs(12),
            ..Scenario::new(vcpus, Load::Idle).with_rings(entries)
        })
}

/// That VM under a load whose highest rate is 1 in its own measure, at the rate that its rings hold
/// so well.
fn held(vm: Scenario, hold: f64, load: impl Fn(f64) -> Load) -> Scenario {
    let unlimited = Guest {
        first_store: 1,
        next_store: 1,
    };
    let one = Scenario {
        guest: unlimited,
        load: load(1.0),
        ..vm.clone()
    };
    let load = load(one.hold() / hold);
    let at_rate = Scenario { load, ..one };
    assert!(at_rate.hold() >= 0.999 * hold);
    at_rate
}

/// Each vCPU's rates, as shares of the highest, and the seconds for which each lasts.
fn traces() -> impl Strategy<Value = Vec<Vec<(f64, f64)>>> {
    let seconds = prop_oneof![0.001..0.05, 0.05..0.5, 0.5..4.0];
    let share = prop_oneof![2 => Just(0.0), 2 => Just(1.0), 3 => 0.0..1.0];
    vec(vec((share, seconds), 1..12), 1..6)
}

/// What follows: vCPUs beyond the traces do as those before them.
fn recorded(traces: &[Vec<(f64, f64)>], vcpus: usize, rate: f64) -> Recording {
    let mut text = String::new();
    for (vcpu, trace) in (0..vcpus).zip(traces.iter().cycle()) {
        let mut at = 0.0;
        for (share, seconds) in trace {
            text += &format!("{at},{vcpu},{}\n", share * rate);
            at += seconds;
        }
    }
    text.parse().expect("it is well-formed")
}

fn adaptive(scenario: &Scenario) -> Outcome {
    let policy = Box::new(Adaptive::default());
    run_policy(scenario, Shape::OwnRing, Some(policy))
}

/// No full exit but where a vCPU logged at a rate that nobody could have known of, and at most one
/// for each vCPU and each such rise: see `FullExit::is_edge`.
fn assert_edges_only(scenario: &Scenario) -> Result<(), TestCaseError> {
    let outcome = adaptive(scenario);
    prop_assert_eq!(&outcome.failures, &[]);
    let all = outcome.full_exits.len();
    let faults: Vec<_> = outcome.full_exits.iter().filter(|e| !e.is_edge()).collect();
    let first = &faults[..faults.len().min(5)];
    prop_assert!(
        faults.is_empty(),
        "{} of {all} full exits are faults, of them {first:#?}",
        faults.len()
    );
    Ok(())
}

proptest! {
    #![proptest_config(config(2_000))]

    /// A rate that does not change.
    #[test]
    fn no_full_exit_at_a_constant_rate(vm in vms(), skew: bool, hold in HOLD..100.0) {
        let scenario = held(vm, hold, |rate| match skew {
            true => Load::Skew { rate },
            false => Load::Constant { rate },
        });
        assert_edges_only(&scenario)?;
    }

    /// Any trace.
    #[test]
    fn no_full_exit_after_the_first_edge(vm in vms(), traces in traces(), hold in HOLD..100.0) {
        let vcpus = vm.vcpus;
        // One that never stores is no load.
        prop_assume!(traces.iter().take(vcpus).flatten().any(|&(share, _)| share > 0.01));
        let scenario = held(vm, hold, |rate| Load::Recorded(recorded(&traces, vcpus, rate)));
        assert_edges_only(&scenario)?;
    }

    /// Loads that rise and fall by themselves.
    #[test]
    fn no_full_exit_after_the_first_edge_of_a_pattern(
        vm in vms(),
        pattern in 0..4,
        on in 1..400u64,
        off in 1..400u64,
        hold in HOLD..100.0,
    ) {
        let ms = Duration::from_millis;
        let scenario = held(vm, hold, |rate| match pattern {
            0 => Load::Bursts { rate, on: ms(on), off: ms(off) },
            1 => Load::Ramp { from: rate / 10.0, to: rate, over: ms(10 * on) },
            2 => Load::Walk { least: rate / 10.0, most: rate },
            _ => Load::Bursts { rate, on: ms(4), off: ms(12) },
        });
        assert_edges_only(&scenario)?;
    }
}

/// A policy that panics if the one in it asks for a time out of bounds.
struct Strict(Box<dyn Pacing>);

impl Pacing for Strict {
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
        let wait = self.0.decide(seen, reap);
        assert!((SHORTEST_LOOK..=LONGEST_LOOK).contains(&wait), "{wait:?}");
        wait
    }
}

proptest! {
    #![proptest_config(config(60))]

    /// Whatever the load, held or not: the policies stay within bounds, and what is measured is a
    /// number.
    #[test]
    fn every_arm_stays_in_bounds(
        vm in vms(),
        arm in select(Arm::ALL.to_vec()),
        load in select(Load::NAMES.to_vec()),
        fast: bool,
    ) {
        let guest = if fast { Guest::FAST } else { Guest::NATIVE };
        let load = Load::named(load, &guest, vm.soft_limit).unwrap();
        let scenario = Scenario {
            guest,
            load,
            time: Duration::from_secs(3),
            sample_every: Some(Duration::from_millis(50)),
            ..vm
        };
        let policy = arm.policy.map(|policy| Box::new(Strict(policy())) as Box<dyn Pacing>);
        let outcome = run_policy(&scenario, arm.shape, policy);
        prop_assert_eq!(&outcome.failures, &[]);
        let measured = &outcome.measured;
        for number in [
            measured.minimum,
            measured.full_exits_per_second(),
            measured.stall_ms_per_second(),
            measured.passes_by_minimum().unwrap_or(0.0),
            measured.entries_per_pass(),
            measured.stores_per_second(),
            measured.reaper_percent(),
            measured.overhead_percent(),
            measured.wakeups_per_second(),
        ] {
            prop_assert!(number.is_finite() && number >= 0.0, "{measured:?}");
        }
        for sample in &outcome.samples {
            prop_assert!((0.0..=1.0).contains(&sample.fullest), "{sample:?}");
            prop_assert!((0.0..=LONGEST_LOOK.as_secs_f64()).contains(&sample.delay), "{sample:?}");
        }
    }
}

/// Numbers from everywhere, extremes above all.
fn any_count() -> impl Strategy<Value = u64> {
    let usual = [0, 1, 64, 4032, 4096, 65_536, u64::MAX - 1, u64::MAX];
    prop_oneof![3 => select(usual.to_vec()), 1 => any::<u64>(), 2 => 0..5000u64]
}

fn any_time() -> impl Strategy<Value = Duration> {
    let extremes = [Duration::ZERO, Duration::from_nanos(1), Duration::MAX];
    prop_oneof![
        select(extremes.to_vec()),
        (0..3_000_000_000u64).prop_map(Duration::from_nanos),
        any::<u64>().prop_map(Duration::from_nanos),
    ]
}

fn ring_of(counts: [u64; 6]) -> RingObservation {
    let mut ring = RingObservation::default();
    [
        ring.entries,
        ring.soft_limit,
        ring.waiting,
        ring.taken,
        ring.full_exits,
        ring.logged,
    ] = counts;
    ring
}

#[derive(Debug, Clone)]
struct Seen {
    elapsed: Duration,
    lateness: Option<Duration>,
    last_pass: Option<PassCost>,
    rings: Vec<RingObservation>,
}

impl Seen {
    fn show(&self, policy: &mut dyn Pacing) -> (Duration, bool) {
        let mut seen = Observation::new(self.elapsed, &self.rings);
        seen.lateness = self.lateness;
        seen.last_pass = self.last_pass;
        let mut reap = vec![false; self.rings.len()];
        let wait = policy.decide(&seen, &mut reap);
        (wait, reap.contains(&true))
    }
}

fn seen(
    time: impl Strategy<Value = Duration> + Clone,
    count: impl Strategy<Value = u64>,
    ring: impl Strategy<Value = RingObservation>,
) -> impl Strategy<Value = Seen> {
    let pass = (time.clone(), count).prop_map(|(took, entries)| PassCost { took, entries });
    let lateness = proptest::option::of(time.clone());
    (time, lateness, proptest::option::of(pass), vec(ring, 0..6)).prop_map(
        |(elapsed, lateness, last_pass, rings)| Seen {
            elapsed,
            lateness,
            last_pass,
            rings,
        },
    )
}

fn anything() -> impl Strategy<Value = Vec<Seen>> {
    let ring = [(); 6].map(|()| any_count().boxed()).prop_map(ring_of);
    vec(seen(any_time().boxed(), any_count(), ring), 1..20)
}

/// A ring of 4,096 that stops its vCPU at 4,032 entries, as it may look.
fn plausible_ring() -> impl Strategy<Value = RingObservation> {
    let logged = prop_oneof![Just(0), 0..100u64, 0..40_000u64];
    (0..=4032u64, logged, 0..3u64)
        .prop_map(|(waiting, logged, full)| ring_of([4096, 4032, waiting, 1 << 40, full, logged]))
}

fn plausible() -> impl Strategy<Value = Vec<Seen>> {
    let time = prop_oneof![
        (0..2_000_000u64).prop_map(Duration::from_nanos),
        (0..2_000u64).prop_map(Duration::from_millis)
    ];
    vec(seen(time.boxed(), 0..10_000u64, plausible_ring()), 1..20)
}

fn policies() -> Vec<(&'static str, Box<dyn Pacing>)> {
    vec![
        ("Adaptive", Box::new(Adaptive::default())),
        ("RunLevels as meant", Box::new(RunLevels::as_meant())),
        ("RunLevels as posted", Box::new(RunLevels::as_posted())),
        ("Aimd", Box::new(Aimd::new())),
        ("Fixed", Box::new(Fixed::default())),
        ("Fixed, no time", Box::new(Fixed::new(Duration::ZERO))),
        ("Fixed, all time", Box::new(Fixed::new(Duration::MAX))),
    ]
}

/// Whether `policy`, after `before`, obeys: with one ring fuller it reaps now, or waits no longer.
fn heeds_a_fuller_ring(
    mut policy: impl Pacing + Clone + 'static,
    before: &[Seen],
    now: &Seen,
    fuller: &Seen,
) -> Result<(), TestCaseError> {
    for seen in before {
        seen.show(&mut policy);
    }
    let mut other = policy.clone();
    let (wait, _) = now.show(&mut policy);
    let (wait_when_fuller, reaps) = fuller.show(&mut other);
    prop_assert!(
        reaps || wait_when_fuller <= wait,
        "{wait_when_fuller:?} instead of {wait:?}"
    );
    Ok(())
}

proptest! {
    #![proptest_config(config(2_000))]

    /// Nothing that a policy is shown makes it panic or ask for a time out of bounds.
    #[test]
    fn policies_survive_anything(sights in anything()) {
        for (name, mut policy) in policies() {
            for sight in &sights {
                let (wait, _) = sight.show(&mut policy);
                prop_assert!((SHORTEST_LOOK..=LONGEST_LOOK).contains(&wait), "{name}: {wait:?}");
            }
        }
    }

    /// Nor does what a pacer receives.
    #[test]
    fn pacers_stay_in_bounds(sights in anything()) {
        for (name, policy) in policies() {
            let mut pacer = Pacer::new(policy);
            let mut now = Duration::ZERO;
            for sight in &sights {
                now = now.saturating_add(sight.elapsed);
                let woken = sight.lateness.is_none();
                let looked = pacer.look(now, woken, &mut sight.rings.clone());
                prop_assert_eq!(looked, Ok(()), "{}", name);
                let after = |due: Duration| due.saturating_sub(now);
                let bounds = now.saturating_add(SHORTEST_LOOK)..=now.saturating_add(LONGEST_LOOK);
                prop_assert!(bounds.contains(&pacer.due()), "{name}: {:?}", after(pacer.due()));
                prop_assert!([0, sight.rings.len()].contains(&pacer.reap().len()));
                if let Some(pass) = sight.last_pass {
                    now = now.saturating_add(pass.took);
                    pacer.passed(now, pass.entries);
                    prop_assert!(pacer.due() >= now);
                }
            }
        }
    }

    /// A policy that is shown a fuller ring empties some ring, or looks again no later.
    #[test]
    fn a_fuller_ring_never_lengthens_the_wait(
        sights in plausible(),
        place: prop::sample::Index,
        more in 1..4032u64,
        it_was_logged_since: bool,
    ) {
        let Some((now, before)) = sights.split_last() else { unreachable!() };
        prop_assume!(!now.rings.is_empty());
        let mut fuller = now.clone();
        let ring = place.get(&now.rings);
        let place = place.index(now.rings.len());
        let more = more.min(ring.soft_limit - ring.waiting);
        fuller.rings[place].waiting += more;
        if it_was_logged_since {
            fuller.rings[place].logged += more;
        }
        heeds_a_fuller_ring(Adaptive::default(), before, now, &fuller)?;
        heeds_a_fuller_ring(RunLevels::as_meant(), before, now, &fuller)?;
        heeds_a_fuller_ring(RunLevels::as_posted(), before, now, &fuller)?;
        heeds_a_fuller_ring(Aimd::new(), before, now, &fuller)?;
        heeds_a_fuller_ring(Fixed::default(), before, now, &fuller)?;
    }
}

/// A VM as large as there are, for a moment, under every arm.
#[test]
fn the_largest_vm_runs() {
    let scenario = Scenario {
        time: Duration::from_millis(300),
        warm_up: Duration::from_millis(100),
        ..Scenario::new(
            MOST_VCPUS,
            Load::named("trickle", &Guest::NATIVE, 4032).unwrap(),
        )
    };
    for arm in Arm::ALL {
        let outcome = run(&scenario, &arm);
        assert_eq!(outcome.rings.len(), MOST_VCPUS, "{}", arm.name);
        assert!(outcome.measured.stores > 0, "{}", arm.name);
    }
}
