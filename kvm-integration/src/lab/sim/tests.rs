// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The simulation against what can be worked out by hand.

use std::time::Duration;

use kvm_dirty_ring::pacing::{Fixed, Observation, Pacing};

use super::*;
use crate::lab::Measured;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A guest that logs 50,000 entries a second: 4,032 in 80.64 ms.
fn constant() -> Load {
    Load::Constant { rate: 1e6 }
}

/// No chance and no cost; watched for 10 s after half a second.
fn plain(vcpus: usize, load: Load) -> Scenario {
    Scenario {
        jitter: 0.0,
        costs: Costs::default(),
        lateness: Lateness::NONE,
        warm_up: ms(500),
        ..Scenario::new(vcpus, load)
    }
}

fn each(period: Duration) -> Option<Box<dyn Pacing>> {
    Some(Box::new(Fixed::new(period)))
}

fn fixed(scenario: &Scenario, period: Duration) -> Outcome {
    run_policy(scenario, Shape::OwnRing, each(period))
}

/// 50,000 entries a second are twelve full rings and a bit, which the reaper takes.
#[test]
fn full_exits_of_a_constant_rate_can_be_counted() {
    for vcpus in [1, 3] {
        let outcome = fixed(&plain(vcpus, constant()), ms(1000));
        let vcpus = vcpus as u64;
        let measured = &outcome.measured;
        assert_eq!(measured.full_exits, 120 * vcpus);
        assert_eq!(measured.reaper_passes, 10);
        assert_eq!(measured.passes, 120 * vcpus + 10);
        assert_eq!(measured.entries, 500_000 * vcpus);
        assert_eq!(measured.minimum, 500_000.0 / 4032.0);
        assert_eq!(measured.stores, 500_000 * vcpus);
        assert_eq!(measured.stall, Duration::ZERO);
        assert_eq!(measured.time, ms(10_000));
    }
}

#[test]
fn a_period_that_is_short_enough_has_none() {
    let scenario = plain(2, constant());
    assert_eq!(fixed(&scenario, ms(80)).measured.full_exits, 0);
    assert!(fixed(&scenario, ms(81)).measured.full_exits > 0);
    // A wake-up that is late by more than is left does.
    let lateness = Lateness {
        mean: ms(1000),
        most: ms(1),
    };
    let late = Scenario {
        lateness,
        ..scenario
    };
    assert_eq!(fixed(&late, ms(79)).measured.full_exits, 0);
    assert!(fixed(&late, ms(80)).measured.full_exits > 0);
}

/// Without a reaper a vCPU runs until its ring is full, and stalls for an exit, a harvest and a
/// reset.
#[test]
fn a_stall_is_an_exit_a_harvest_and_a_reset() {
    let scenario = Scenario {
        costs: Costs::MEASURED,
        warm_up: Duration::ZERO,
        ..plain(1, constant())
    };
    let one = 5_000 + 100 + 3 * 4032 + 15_000 + 300 + 57 * 4032;
    for shape in [Shape::OwnRing, Shape::AllRings] {
        let measured = run_policy(&scenario, shape, None).measured;
        let cycle = 80_640_000 + one;
        assert_eq!(measured.full_exits, 10_000_000_000 / cycle);
        assert_eq!(
            measured.stall,
            Duration::from_nanos(one) * measured.full_exits as u32
        );
        assert_eq!(measured.passes, measured.full_exits);
        assert_eq!(measured.reaper_cpu, Duration::ZERO);
    }
}

/// Two rings that are full at the same moment: ours share a reset, QEMU's have one after the other.
#[test]
fn resets_are_shared_and_qemus_passes_queue() {
    let scenario = Scenario {
        costs: Costs::MEASURED,
        warm_up: Duration::ZERO,
        time: ms(100),
        ..plain(2, constant())
    };
    let stall = |shape| {
        let Measured { stall, stores, .. } = run_policy(&scenario, shape, None).measured;
        // The guest stands still meanwhile, also where others make room in its ring.
        let running = ms(200) - stall;
        assert_eq!(stores, (running.as_secs_f64() * 50_000.0) as u64);
        stall.as_nanos() as u64
    };
    let harvest = 100 + 3 * 4032;
    let reset = 15_000 + 2 * 300 + 2 * 57 * 4032;
    assert_eq!(stall(Shape::OwnRing), 2 * (harvest + reset + 5_000));
    // The first takes both rings, and the second finds nothing to reset.
    let first = 2 * harvest + reset;
    let second = first + 2 * 100;
    assert_eq!(stall(Shape::AllRings), first + second + 2 * 5_000);
}

/// The reaper's pass makes room when its reset is done, and what was logged meanwhile stays.
#[test]
fn rings_fill_up_while_a_pass_is_under_way() {
    // 40,000 entries in 800 ms; a pass that takes 100 ms, in which 5,000 more come.
    let costs = Costs {
        reset: 100_000_000,
        ..Costs::default()
    };
    let scenario = Scenario {
        costs,
        warm_up: Duration::ZERO,
        time: ms(1_590),
        ..plain(1, constant())
    };
    let full_exits = |soft_limit| {
        let scenario = Scenario {
            soft_limit,
            known_soft_limit: soft_limit,
            ..scenario.clone().with_rings(65_536)
        };
        let measured = fixed(&scenario, ms(800)).measured;
        assert_eq!(measured.reaper_passes, 1);
        assert_eq!(measured.pass_time, ms(100));
        measured.full_exits
    };
    assert_eq!(full_exits(45_002), 0);
    assert_eq!(full_exits(44_998), 1);
}

/// Wake-ups, looks at empty rings and at others, and passes.
#[test]
fn the_reapers_time_adds_up() {
    let load = Load::Recorded("0,0,1000".parse().unwrap());
    let scenario = Scenario {
        costs: Costs::MEASURED,
        warm_up: ms(100),
        time: ms(190),
        ..plain(3, load)
    };
    let Measured {
        wakeups,
        reaper_passes,
        reaper_cpu,
        pass_time,
        entries,
        ..
    } = fixed(&scenario, ms(100)).measured;
    assert_eq!([wakeups, reaper_passes, entries], [2, 2, 200]);
    // The pass of a tenth of a second comes after the end of the warm-up, and finds as many.
    let pass = 3 * 100 + 3 * 100 + 15_000 + 3 * 300 + 57 * 100;
    let look = 5_000 + 2 * 30 + 126;
    assert_eq!(pass_time, Duration::from_nanos(2 * pass));
    assert_eq!(reaper_cpu, Duration::from_nanos(2 * (look + pass)));
}

#[test]
fn a_fifo_reaper_has_a_lateness_of_its_own() {
    let scenario = Scenario::new(2, constant());
    let arm = Arm::named("adaptive-fifo").unwrap();
    let lateness = Lateness::FIFO;
    let in_time = Scenario {
        lateness,
        ..scenario.clone()
    };
    let policy = arm.policy.map(|policy| policy());
    let expected = run_policy(&in_time, Shape::OwnRing, policy);
    assert_eq!(run(&scenario, &arm), expected);
    let other = Arm::named("adaptive").unwrap();
    assert_ne!(run(&scenario, &other), expected);
}

#[test]
fn a_hot_set_logs_once_a_pass_and_is_fast_in_between() {
    let load = Load::HotSet { pages: 1000 };
    let scenario = plain(2, load);
    // 20 ms of first stores, then 50 ns a store.
    let measured = fixed(&scenario, ms(100)).measured;
    assert_eq!(measured.full_exits, 0);
    assert_eq!(measured.entries, 2 * 100 * 1000);
    assert_eq!(measured.stores, 2 * 100 * (1000 + 80_000_000 / 50));
    // Without a pass there is nothing more to log.
    let measured = run_policy(&scenario, Shape::OwnRing, None).measured;
    assert_eq!(measured.full_exits, 0);
    assert_eq!(measured.stores, 2 * 10_000_000_000 / 50);
    // One that doesn't fit is as good as endless.
    let scenario = plain(2, Load::HotSet { pages: 4032 });
    assert_eq!(fixed(&scenario, ms(1000)).measured.full_exits, 2 * 120);
}

#[test]
fn loads_do_what_they_say() {
    let rate = 10_000.0;
    let entries = |load: Load, vcpus| {
        let scenario = Scenario {
            warm_up: Duration::ZERO,
            ..plain(vcpus, load)
        };
        let outcome = fixed(&scenario, ms(10));
        let logged: f64 = outcome.rings.iter().map(|ring| ring.logged).sum();
        (logged / 1e4).round()
    };
    assert_eq!(entries(Load::Idle, 2), 0.0);
    assert_eq!(entries(Load::Constant { rate }, 2), 20.0);
    assert_eq!(entries(Load::Skew { rate }, 7), 10.0);
    assert_eq!(entries(Load::Trickle { rate, chunk: 100 }, 2), 20.0);
    let bursts = |on, off| Load::Bursts {
        rate,
        on: ms(on),
        off: ms(off),
    };
    assert_eq!(entries(bursts(100, 300), 4), 10.0);
    let ramp = Load::Ramp {
        from: 0.0,
        to: 2.0 * rate,
        over: ms(1000),
    };
    assert_eq!(entries(ramp, 1), 10.0);
    let walk = Load::Walk {
        least: rate,
        most: rate,
    };
    assert_eq!(entries(walk, 1), 10.0);
    // Each vCPU that is not there is idle, and 50,000 a second is all the guest can.
    let recording = "0,0,10000\n5,0,0\n2,2,1000000\n3,2,0\n";
    let recorded = Load::Recorded(recording.parse().unwrap());
    assert_eq!(entries(recorded, 3), 5.0 + 5.0);
}

#[test]
fn loads_stay_within_the_peak_they_state() {
    for guest in [Guest::NATIVE, Guest::FAST] {
        for name in Load::NAMES {
            let load = Load::named(name, &guest, 4032).unwrap();
            let scenario = Scenario {
                guest,
                jitter: 0.2,
                ..Scenario::new(5, load)
            };
            let outcome = run_policy(&scenario, Shape::OwnRing, None);
            let peak = scenario.peak();
            let at_full_exits = outcome.full_exits.iter().map(|exit| exit.rate);
            assert!(at_full_exits.fold(0.0, f64::max) <= peak, "{name}");
            let fastest = outcome.rings.iter().map(|ring| ring.logged / 12.0);
            assert!(fastest.fold(0.0, f64::max) <= peak, "{name}");
        }
    }
    assert_eq!(Load::named("storm", &Guest::NATIVE, 4032), None);
}

/// Every arm, under every load, in a small VM that is as unruly as can be.
fn every_run() -> impl Iterator<Item = (Scenario, Arm)> {
    let loads = Load::NAMES.into_iter();
    let scenarios = loads.map(|name| Scenario {
        guest: Guest::FAST,
        jitter: 0.3,
        lateness: Lateness::BUSY_CORES,
        time: ms(3_000),
        sample_every: Some(ms(10)),
        ..Scenario::new(7, Load::named(name, &Guest::FAST, 960).unwrap()).with_rings(1024)
    });
    scenarios.flat_map(|scenario| Arm::ALL.map(|arm| (scenario.clone(), arm)))
}

#[test]
fn entries_are_neither_lost_nor_made() {
    for (scenario, arm) in every_run() {
        let outcome = run(&scenario, &arm);
        assert_eq!(outcome.failures, [], "{}", arm.name);
        for ring in &outcome.rings {
            let left = ring.logged - (ring.taken + ring.waiting) as f64;
            assert!((-1e-3..1.0).contains(&left), "{}: {ring:?}", arm.name);
            assert!(ring.waiting <= 960, "{}: {ring:?}", arm.name);
        }
        let Measured { time, stall, .. } = outcome.measured;
        assert_eq!(time, scenario.time);
        assert!(stall <= time * 7, "{}: {stall:?}", arm.name);
        assert_eq!(outcome.samples.len(), 500, "one each 10 ms, at 0 too");
        let fullest = outcome.samples.iter().map(|sample| sample.fullest);
        assert!((0.0..=1.0).contains(&fullest.fold(0.0, f64::max)));
    }
}

#[test]
fn the_seed_decides() {
    for (scenario, arm) in every_run() {
        let other = Scenario {
            seed: 2,
            ..scenario.clone()
        };
        let outcome = run(&scenario, &arm);
        assert_eq!(outcome, run(&scenario, &arm), "{}", arm.name);
        if scenario.load != Load::Idle {
            assert_ne!(outcome, run(&other, &arm), "{}", arm.name);
        }
    }
}

#[test]
fn qemus_shape_stalls_more_than_ours() {
    for vcpus in [8, 64, 256] {
        let guest = if vcpus > 8 {
            Guest::NATIVE
        } else {
            Guest::FAST
        };
        let scenario = Scenario {
            guest,
            ..Scenario::new(vcpus, Load::Constant { rate: 1e6 })
        };
        let stall = |name| run(&scenario, &Arm::named(name).unwrap()).measured.stall;
        assert!(stall("qemu") > 3 * stall("fixed"), "{vcpus} vCPUs");
    }
}

#[test]
fn the_warm_up_is_not_measured() {
    // One burst, which is over by then.
    let load = Load::Recorded("0,0,50000\n0.4,0,0".parse().unwrap());
    let outcome = fixed(&plain(1, load.clone()), ms(1000));
    let nothing = Measured {
        time: ms(10_000),
        wakeups: 10,
        reaper_passes: 10,
        passes: 10,
        // The first of them finds what the burst has left.
        entries: 20_000 - 4 * 4032,
        minimum: (20_000.0 - 4.0 * 4032.0) / 4032.0,
        ..Measured::default()
    };
    assert_eq!(outcome.measured, nothing);
    assert_eq!(outcome.full_exits.len(), 4, "but seen");
}

/// A vCPU that stops wakes the reaper; those that stop within the next half millisecond wake it when
/// that is over, once.
#[test]
fn full_exits_wake_the_reaper_when_it_is_not_deaf() {
    // All are full after 80 ms, and all but the first begin late.
    let text = "0,0,50400\n0.0001,1,50400\n0.0002,2,50400\n0.0004,3,50400";
    let scenario = Scenario {
        guest: Guest::FAST,
        warm_up: Duration::ZERO,
        ..plain(4, Load::Recorded(text.parse().unwrap()))
    };
    let at_most = |us| Scenario {
        time: Duration::from_micros(us),
        ..scenario.clone()
    };
    let wakeups = |us| fixed(&at_most(us), ms(1000)).measured.wakeups;
    assert_eq!(wakeups(79_990), 1, "the first look of all");
    assert_eq!(wakeups(80_050), 2);
    assert_eq!(wakeups(80_450), 2, "deaf");
    assert_eq!(wakeups(80_550), 3);
    assert_eq!(wakeups(90_000), 3);
    let qemu = run_policy(&at_most(90_000), Shape::AllRings, each(ms(1000)));
    assert_eq!(qemu.measured.full_exits, 1, "which empties all rings");
    assert_eq!(qemu.measured.wakeups, 1);
}

/// The policy receives the soft limit that a full exit has shown.
#[test]
fn the_soft_limit_is_learnt() {
    #[derive(Debug, Default)]
    struct Sees(Vec<u64>);
    impl Pacing for Sees {
        fn decide(&mut self, seen: &Observation<'_>, _: &mut [bool]) -> Duration {
            let now = seen.rings[0].soft_limit;
            // It stays as it is, or becomes what it is in truth, when that is known.
            assert!(now == 4032 || now == 3584 && seen.rings[0].taken > 0);
            self.0.push(now);
            assert!(self.0.len() < 20 || now == 3584);
            ms(10)
        }
    }
    let scenario = Scenario {
        soft_limit: 3584,
        ..plain(1, constant())
    };
    let policy: Box<dyn Pacing> = Box::new(Sees::default());
    let outcome = run_policy(&scenario, Shape::OwnRing, Some(policy));
    assert_eq!(outcome.failures, []);
    assert!(outcome.measured.full_exits > 0);
}

/// A rise that no look has shown is an edge, once a vCPU; what comes at a rate that is known is not.
#[test]
fn the_first_full_exits_after_a_rise_are_edges() {
    let load = Load::Recorded(
        "1,0,50000\n1,1,40000\n3,0,0\n3,1,0\n20,0,50000"
            .parse()
            .unwrap(),
    );
    let scenario = Scenario {
        time: ms(22_000),
        ..plain(2, load)
    };
    let outcome = fixed(&scenario, ms(1000));
    let edges: Vec<_> = outcome.full_exits.iter().map(FullExit::is_edge).collect();
    let of = |vcpu| {
        let exits = outcome
            .full_exits
            .iter()
            .filter(move |exit| exit.vcpu == vcpu);
        exits.map(|exit| (exit.at.floor(), exit.is_edge()))
    };
    assert_eq!(edges.iter().filter(|&&edge| edge).count(), 2, "{edges:?}");
    // Faded to a tenth by then.
    let expected = [(1.0, true), (20.0, true)];
    assert_eq!(
        of(0).filter(|&(_, edge)| edge).collect::<Vec<_>>(),
        expected
    );
    // The look that its neighbour's full exit has caused has shown a rate like its own.
    assert!(of(1).all(|(_, edge)| !edge));
    assert!(of(1).count() > 10);
}

#[test]
fn what_rings_can_hold() {
    let scenario = Scenario {
        jitter: 0.0,
        ..Scenario::new(10, constant())
    };
    // 80.64 ms to fill; late by 1 ms at most, sleeping for at least 0.1 ms, and ten full rings.
    let host = 1e-3 + 1e-4 + 5e-6 + 10.0 * 126e-9;
    let pass = 15e-6 + 10.0 * (300e-9 + 100e-9 + 4032.0 * 60e-9);
    let expected = 80.64e-3 / (host + pass);
    assert!((scenario.hold() / expected - 1.0).abs() < 1e-9);
    let skew = Scenario {
        load: Load::Skew { rate: 1e6 },
        ..scenario.clone()
    };
    assert!(skew.hold() > 2.0 * expected);
    let idle = Scenario {
        load: Load::Idle,
        ..scenario
    };
    assert_eq!(idle.hold(), f64::INFINITY);
}
