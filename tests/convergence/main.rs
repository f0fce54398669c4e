// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `Convergence` in whole migrations of simulated guests, at a reduced scale. `--nocapture` shows each
//! of them.

mod guest;
mod guests;
mod migration;
mod tracker;

use std::time::Duration;

use guest::{Guest, Zipf};
use guests::GUESTS;
use migration::{Caller, End, Open, Outcome, Setting, migrate};

/// No migration takes as many unless its caller insists.
const ROUNDS: u32 = 40;

const PAUSE: Duration = Duration::from_millis(2);

/// Links of 64 MiB/s and 512 MiB/s.
const SLOW: u64 = 16_000;
const FAST: u64 = 128_000;

/// With faults that take so long.
fn settings(fault_ns: u64, pages_per_second: u64) -> [Setting; 4] {
    [10, 30, 100, 300].map(|downtime_ms| Setting {
        fault_ns,
        pages_per_second,
        downtime_ms,
        run_us: 0,
    })
}

/// The guest; or, where its hot pages move, one for each of many times at which they may do so first.
fn phases(guest: &Guest) -> Vec<Guest> {
    const PHASES: u64 = 20;
    let Some(each) = guest.moves_each_ms else {
        return vec![*guest];
    };
    let phase = |part| Guest {
        moved_before_ms: each * part / PHASES,
        ..*guest
    };
    (0..PHASES).map(phase).collect()
}

/// Whether it gets there with no page left open; and not by luck, but in all of its phases.
fn ends_without(phases: &[Guest], zipf: &Zipf, setting: &Setting) -> Result<Outcome, Outcome> {
    let caller = Caller::GivesUp(ROUNDS);
    let mut first = None;
    for guest in phases {
        let outcome = migrate(guest, zipf, setting, Open::Nothing, caller);
        if outcome.end != End::Finished {
            return Err(outcome);
        }
        first.get_or_insert(outcome);
    }
    Ok(first.unwrap())
}

/// Every guest, with faults that take so long.
fn sweep(fault_ns: u64) {
    let zipf = Zipf::new();
    let slow = settings(fault_ns, SLOW);
    let (mut refreshed, mut hopeless) = (0, 0);
    for setting in slow.into_iter().chain(settings(fault_ns, FAST)) {
        for guest in GUESTS {
            let phases = phases(guest);
            let without = ends_without(&phases, &zipf, &setting);
            // All of them only where there is something to lose: it takes its time.
            let shown = if without.is_ok() { phases.len() } else { 1 };
            for phase in &phases[..shown] {
                let open = Open::Refreshed(PAUSE);
                let with = migrate(phase, &zipf, &setting, open, Caller::GivesUp(ROUNDS));
                let case = format!("{phase:?}, {setting:?}");
                println!("{case}\n    without {without:?}\n    with {with:?}");

                // Neither for ever, nor for nothing.
                assert!(with.end != End::None, "{case}: for ever");
                assert!(with.refreshes <= 6, "{case}: {with:?}");
                if without.is_ok() {
                    assert_eq!(with.end, End::Finished, "{case}: ends without");
                }
                if with.end == End::Hopeless {
                    let most = guest.hopeless_after;
                    assert!(with.rounds <= most, "{case}: hopeless after {with:?}");
                    hopeless += 1;
                } else if with.refreshes > 0 {
                    refreshed += 1;
                }
                let (Ok(without) | Err(without)) = &without;
                assert!(with.speed > without.speed - 0.01, "{case}: slower");
            }
        }
    }
    assert!(refreshed > 0 && hopeless > 0, "{refreshed}, {hopeless}");
}

#[test]
fn guests_of_nested_paging_get_there_or_are_hopeless() {
    sweep(300);
}

#[test]
fn guests_of_cheap_shadow_paging_get_there_or_are_hopeless() {
    sweep(2400);
}

#[test]
fn guests_of_dear_shadow_paging_get_there_or_are_hopeless() {
    sweep(23_000);
}

/// If runs have a price, it is one of the last round's as well.
#[test]
fn guests_get_there_or_are_hopeless_where_runs_cost_something() {
    let zipf = Zipf::new();
    for mut setting in settings(2400, FAST) {
        setting.run_us = 200;
        for guest in GUESTS {
            let open = Open::Refreshed(PAUSE);
            let with = migrate(guest, &zipf, &setting, open, Caller::GivesUp(ROUNDS));
            let case = format!("{}, {setting:?}: {with:?}", guest.name);
            assert!(with.end != End::None && with.refreshes <= 6, "{case}");
            if ends_without(&phases(guest), &zipf, &setting).is_ok() {
                assert_eq!(with.end, End::Finished, "{case}");
            }
        }
    }
}

#[test]
fn half_of_the_downtime_may_stay_open_where_no_refresh_is_to_be_had() {
    let zipf = Zipf::new();
    for setting in settings(2400, FAST) {
        for guest in GUESTS {
            let open = Open::Limited;
            let with = migrate(guest, &zipf, &setting, open, Caller::GivesUp(ROUNDS));
            let case = format!("{}, {setting:?}: {with:?}", guest.name);
            assert!(with.end != End::None && with.refreshes == 0, "{case}");
            // Members that have fallen silent stay members, so that hot pages which move don't fit.
            let stays = guest.moves_each_ms.is_none();
            if stays && ends_without(&phases(guest), &zipf, &setting).is_ok() {
                assert_eq!(with.end, End::Finished, "{case}");
            }
        }
    }
}

/// Each refresh stops a guest that goes on as before.
#[test]
fn a_guest_whose_caller_insists_is_refreshed_ever_more_rarely() {
    let zipf = Zipf::new();
    let [_, setting, ..] = settings(300, FAST);
    let mut insisted = 0;
    for guest in GUESTS {
        let open = Open::Refreshed(PAUSE);
        let with = migrate(guest, &zipf, &setting, open, Caller::HopesOn(100));
        println!("{} {with:?}", guest.name);
        if with.end == End::None {
            assert!(with.refreshes <= 12, "{}: {with:?}", guest.name);
            assert!(with.hopeless >= 60, "{}: {with:?}", guest.name);
            insisted += 1;
        }
    }
    assert!(insisted > 0);
}

#[test]
fn the_rate_that_would_do_does() {
    let zipf = Zipf::new();
    let mut throttled = 0;
    for setting in settings(2400, FAST) {
        for guest in GUESTS {
            let open = Open::Refreshed(PAUSE);
            let with = migrate(guest, &zipf, &setting, open, Caller::Throttles(ROUNDS));
            let case = format!("{}, {setting:?}: {with:?}", guest.name);
            println!("{case}");
            assert_eq!(with.end, End::Finished, "{case}");
            assert!(with.hopeless <= 1, "{case}");
            throttled += with.hopeless;
        }
    }
    assert!(throttled > 0);
}
