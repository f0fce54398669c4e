// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whatever it is shown, it keeps to what it promises.

use core::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

use super::{Convergence, Decision, Extent, Observation, Refreshing, Terms};

fn rate() -> impl Strategy<Value = f64> {
    prop_oneof![
        any::<f64>(),
        0.0..1e6,
        Just(f64::NAN),
        Just(0.0),
        Just(1000.0)
    ]
}

fn time() -> impl Strategy<Value = Duration> {
    prop_oneof![
        (0_u64..1000).prop_map(Duration::from_millis),
        any::<u64>().prop_map(Duration::from_micros),
        Just(Duration::ZERO),
        Just(Duration::MAX),
    ]
}

fn terms() -> impl Strategy<Value = Terms> {
    (rate(), time(), time()).prop_map(|(rate, run_cost, downtime)| Terms {
        run_cost,
        ..Terms::new(rate, downtime)
    })
}

fn refresh() -> impl Strategy<Value = Refreshing> {
    let closed = prop_oneof![any::<u64>(), 0_u64..2000];
    (
        proptest::option::of(time()),
        any::<bool>(),
        closed,
        0_u64..2000,
    )
        .prop_map(|(pause, owed, closed, back)| Refreshing {
            pause,
            owed,
            closed,
            back,
        })
}

fn extent() -> impl Strategy<Value = Extent> {
    let count = || prop_oneof![any::<u64>(), 0_u64..2000];
    (count(), count()).prop_map(|(pages, runs)| Extent { pages, runs })
}

fn observation() -> impl Strategy<Value = Observation> {
    (terms(), extent(), extent(), refresh()).prop_map(|(terms, others, members, refresh)| {
        let mut seen = Observation::new(terms, others, members);
        seen.refresh = refresh;
        seen
    })
}

/// About as many pages are left each time, any number of them members. Refreshes can be had.
fn standing_still() -> impl Strategy<Value = Observation> {
    (observation(), 1000_u64..=1040, 0_u64..1000).prop_map(|(mut seen, left, members)| {
        seen.members.pages = members;
        seen.others.pages = left - members;
        seen.refresh.pause = Some(Duration::ZERO);
        seen
    })
}

/// What it takes a link to send so much, in seconds.
fn true_time(pages_per_second: f64, run_cost: f64, sent: Extent) -> f64 {
    sent.pages as f64 / pages_per_second + sent.runs as f64 * run_cost
}

/// A migration that has counted pages alone stopped its guest with this left, and was late.
#[test]
fn many_short_runs_are_not_stopped_for_when_their_pages_alone_would_fit() {
    let (rate, cost, downtime) = (33_500.0, 100e-6, Duration::from_millis(50));
    let left = Extent {
        pages: 1675,
        runs: 327,
    };
    assert!(true_time(rate, 0.0, left) <= 0.05 && true_time(rate, cost, left) > 0.08);
    let mut terms = Terms::new(rate, downtime);
    let decide =
        |terms| Convergence::new().decide(&Observation::new(terms, left, Extent::default()));
    assert_eq!(
        decide(terms),
        Decision::Finish,
        "runs cost nothing unless set"
    );
    let round = Extent {
        pages: 20_000,
        runs: 2_500,
    };
    terms.learn_run_cost(round, Duration::from_secs_f64(true_time(rate, cost, round)));
    assert_eq!(decide(terms), Decision::GoOn);
}

proptest! {
    /// Whatever a link is like, if its rate is known and a round has shown what runs cost.
    #[test]
    fn it_finishes_where_pages_and_runs_fit_together(
        rate in 100.0..1e6,
        cost_us in 0_u64..1000,
        downtime_ms in 1_u64..500,
        round in (1_u64..10_000, 1_u64..10_000),
        left in (0_u64..10_000, 0_u64..10_000),
    ) {
        // No run is empty.
        let [round, left] = [round, left].map(|(pages, runs)| Extent { pages, runs: runs.min(pages) });
        let cost = cost_us as f64 * 1e-6;
        let mut terms = Terms::new(rate, Duration::from_millis(downtime_ms));
        terms.learn_run_cost(round, Duration::from_secs_f64(true_time(rate, cost, round)));
        let decision = Convergence::new().decide(&Observation::new(terms, left, Extent::default()));
        let late = true_time(rate, cost, left) - terms.downtime.as_secs_f64();
        // What is learnt is off by some nanoseconds a run.
        let off = 1e-8 * (left.runs + 1) as f64;
        match decision {
            Decision::Finish => prop_assert!(late <= off, "{late} s late"),
            _ => prop_assert!(late >= -off, "{late} s: it would have fitted"),
        }
    }

    #[test]
    fn it_never_does_what_it_must_not(syncs in vec(observation(), 1..60)) {
        let mut convergence = Convergence::new();
        let mut since_refresh = usize::MAX;
        for seen in &syncs {
            let left = seen.left();
            since_refresh = since_refresh.saturating_add(1);
            match convergence.decide(seen) {
                Decision::Finish => {
                    prop_assert!(seen.terms.weight(left) <= seen.terms.budget());
                }
                Decision::Refresh => {
                    prop_assert!(seen.refresh.pause.unwrap() <= seen.terms.downtime);
                    prop_assert!(seen.members.pages > 0);
                    prop_assert!(since_refresh > 2, "{since_refresh} syncs after the last");
                    since_refresh = 0;
                }
                _ => prop_assert!(left != Extent::default(), "nothing is left"),
            }
        }
    }

    /// Three, and one more each time that a migration is twice as long; before each of them and after the
    /// last there may be one that is owed anew.
    #[test]
    fn refreshes_that_bring_nothing_are_few(syncs in vec(standing_still(), 1..400)) {
        let mut convergence = Convergence::new();
        let decisions = syncs.iter().map(|seen| convergence.decide(seen));
        let refreshes = decisions.filter(|decision| *decision == Decision::Refresh).count();
        let most = 3 + (syncs.len() / 8).checked_ilog2().map_or(0, |twice| 1 + twice as usize);
        prop_assert!(refreshes <= 2 * most + 1, "{refreshes} refreshes in {} syncs", syncs.len());
    }

    /// However fast its pages join, and whatever it sees of refreshes. Three of these, and the
    /// rounds until the others fit, of which two leave at most 0.7 of them, are the longest that it
    /// can take to say so.
    #[test]
    fn a_guest_that_stands_still_is_called_hopeless_again_and_again(
        takes in 0_u64..1000,
        syncs in vec((0_u64..500, refresh()), 400),
    ) {
        let terms = Terms::new(takes as f64, Duration::from_secs(1));
        let left = takes + 1000;
        let until_others_fit = 2 * (left as f64).log(1.0 / 0.7) as usize + 2;
        let mut convergence = Convergence::new();
        let mut members = 0;
        let mut silent = 0;
        for (joining, refresh) in syncs {
            // They never become fewer but by a refresh.
            members = left.min(members + joining);
            let run = |pages| Extent { pages, runs: 1 };
            let mut seen = Observation::new(terms, run(left - members), run(members));
            seen.refresh = refresh;
            silent += 1;
            match convergence.decide(&seen) {
                Decision::Finish => prop_assert!(false, "what does not fit is said to"),
                Decision::Refresh => members = 0,
                Decision::Hopeless { .. } => silent = 0,
                Decision::GoOn => {}
            }
            prop_assert!(silent <= 4 * (until_others_fit + 4), "{silent} syncs without a word");
        }
    }
}
