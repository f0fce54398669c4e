// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One rule at a time.

use core::time::Duration;

use super::Decision::{Finish, GoOn, Refresh};
use super::*;

/// The link takes 100 pages within the downtime.
const TERMS: Terms = Terms::new(1000.0, Duration::from_millis(100));

const HOPELESS: Decision = Decision::Hopeless {
    pages_per_second: NonZeroU64::new(500).unwrap(),
};

fn run(pages: u64) -> Extent {
    Extent { pages, runs: 1 }
}

fn without_refreshes(others: u64, members: u64) -> Observation {
    Observation::new(TERMS, run(others), run(members))
}

/// A refresh can be had, of just the longest pause.
fn seen(others: u64, members: u64) -> Observation {
    let mut seen = without_refreshes(others, members);
    seen.refresh.pause = Some(TERMS.downtime);
    seen
}

fn owed(others: u64, members: u64) -> Observation {
    let mut seen = seen(others, members);
    seen.refresh.owed = true;
    seen
}

fn back(members: u64, closed: u64, back: u64) -> Observation {
    let mut seen = without_refreshes(0, members);
    (seen.refresh.closed, seen.refresh.back) = (closed, back);
    seen
}

/// Returns the decision after the last of these syncs.
fn last(syncs: &[Observation]) -> Decision {
    *all(syncs).last().unwrap()
}

fn all(syncs: &[Observation]) -> Vec<Decision> {
    let mut convergence = Convergence::new();
    let decisions = syncs.iter().map(|seen| convergence.decide(seen));
    decisions.collect()
}

#[test]
fn it_finishes_as_soon_as_the_rest_fits() {
    for (others, members, decision) in [
        (0, 0, Finish),
        (100, 0, Finish),
        (0, 100, Finish),
        (60, 40, Finish),
        (61, 40, GoOn),
        (u64::MAX, u64::MAX, GoOn),
    ] {
        assert_eq!(last(&[seen(others, members)]), decision);
    }
    // Whatever a refresh would do.
    assert_eq!(last(&[owed(60, 40)]), Finish);
    assert_eq!(last(&[seen(100, 101), owed(60, 40)]), Finish);
}

#[test]
fn runs_count_in_the_last_round() {
    for (runs, decision) in [(10, Finish), (11, GoOn)] {
        let mut seen = without_refreshes(50, 30);
        seen.terms.run_cost = Duration::from_millis(1);
        (seen.others.runs, seen.members.runs) = (10, runs);
        assert_eq!(last(&[seen]), decision);
    }
}

#[test]
fn without_a_link_or_a_downtime_only_nothing_fits() {
    for terms in [
        Terms::new(1000.0, Duration::ZERO),
        Terms::new(0.0, TERMS.downtime),
        Terms::new(f64::NAN, TERMS.downtime),
    ] {
        let seen = |pages| Observation::new(terms, run(pages), run(0));
        assert_eq!(last(&[seen(0)]), Finish);
        assert_eq!(last(&[seen(1)]), GoOn);
    }
}

#[test]
fn members_that_do_not_fit_are_refreshed_once_the_others_do() {
    for (others, members, decision) in [
        (100, 101, Refresh),
        (101, 101, GoOn),
        (100, 100, GoOn), // may become fewer by itself
        (0, 101, Refresh),
    ] {
        assert_eq!(last(&[seen(others, members)]), decision);
    }
}

#[test]
fn members_that_fit_are_refreshed_if_rounds_bring_nothing() {
    for (members, decision) in [(91, Refresh), (90, GoOn)] {
        let syncs = [seen(101, 99), seen(100, members)];
        assert_eq!(last(&syncs), decision, "200 pages, then 100 + {members}");
    }
    // Nor does it wait for two rounds.
    assert_eq!(
        last(&[seen(300, 99), seen(101, 99), seen(100, 99)]),
        Refresh
    );
}

#[test]
fn a_refresh_longer_than_the_downtime_is_none() {
    let mut seen = seen(0, 101);
    seen.refresh.owed = true;
    seen.refresh.pause = Some(TERMS.downtime + Duration::from_nanos(1));
    assert_eq!(last(&[seen]), GoOn);
    seen.refresh.pause = None;
    assert_eq!(last(&[seen]), GoOn);
}

#[test]
fn an_owed_refresh_waits_for_nothing_but_members() {
    assert_eq!(last(&[owed(1000, 1)]), Refresh);
    assert_eq!(last(&[owed(1000, 0)]), GoOn);
}

#[test]
fn no_refresh_until_the_round_after_the_last_is_sent() {
    let owed = owed(1000, 1);
    let decisions = [Refresh, GoOn, GoOn, Refresh];
    assert_eq!(all(&[owed; 4]), decisions);
    let others_fit = seen(100, 150);
    assert_eq!(all(&[others_fit; 4]), decisions);
}

#[test]
fn hopeless_is_a_refresh_most_of_which_is_back_and_does_not_fit() {
    for (members, closed, is_back, decision) in [
        (101, 151, 101, HOPELESS),
        (120, 180, 120, GoOn), // two thirds
        (101, 149, 100, GoOn), // fits
        (101, 0, 101, GoOn),   // there was none
        (101, u64::MAX, u64::MAX, HOPELESS),
    ] {
        let seen = back(members, closed, is_back);
        assert_eq!(last(&[seen]), decision, "{is_back} of {closed}");
    }
}

/// Where others are few, as in bitmap mode, another refresh would seem to help.
#[test]
fn what_is_back_is_not_closed_again_unless_that_is_owed() {
    let mut seen = back(101, 151, 101);
    seen.others = Extent::default();
    seen.refresh.pause = Some(Duration::ZERO);
    assert_eq!(last(&[seen]), HOPELESS);
    seen.refresh.owed = true;
    assert_eq!(last(&[seen]), Refresh);
    (seen.refresh.owed, seen.refresh.back) = (false, 100);
    assert_eq!(last(&[seen]), Refresh, "they would fit");
}

#[test]
fn runs_of_members_that_are_back_count() {
    for (runs, decision) in [(20, GoOn), (21, HOPELESS)] {
        let mut seen = back(160, 81, 80);
        seen.terms.run_cost = Duration::from_millis(2);
        seen.members.runs = runs;
        // 160 pages and 20 runs weigh as much as 200 pages, half of them 100.
        let told = match last(&[seen]) {
            Decision::Hopeless { .. } => HOPELESS,
            other => other,
        };
        assert_eq!(told, decision, "{runs} runs");
    }
}

#[test]
fn hopeless_are_two_rounds_that_bring_nothing() {
    let seen = without_refreshes;
    for (pages, decision) in [(950, GoOn), (951, HOPELESS)] {
        assert_eq!(last(&[seen(1000, 0), seen(pages, 0)]), GoOn);
        let syncs = [seen(1000, 0), seen(2000, 0), seen(pages, 0)];
        assert_eq!(last(&syncs), decision);
        let syncs = [seen(600, 400), seen(0, 10), seen(0, pages)];
        assert_eq!(last(&syncs), if pages == 950 { GoOn } else { HOPELESS });
    }
    // The decision is repeated as long as it is true.
    let decisions = [GoOn, GoOn, HOPELESS, HOPELESS, GoOn, HOPELESS];
    let pages = [1000, 1000, 1000, 1000, 900, 1000];
    assert_eq!(all(&pages.map(|pages| seen(pages, 0))), decisions);
}

#[test]
fn a_round_after_a_refresh_is_no_evidence() {
    let mut syncs = vec![seen(100, 200)];
    // Right after it, after the first round, the second, and one that is like any other.
    syncs.extend([without_refreshes(300, 0); 4]);
    assert_eq!(all(&syncs), [Refresh, GoOn, GoOn, GoOn, HOPELESS]);
}

#[test]
fn syncs_before_the_last_two_are_no_evidence() {
    let mut syncs = vec![seen(100, 200)];
    syncs.extend([seen(300, 0), seen(400, 0), seen(390, 0)]);
    // Less than two syncs ago, and not less than at the refresh.
    syncs.push(seen(350, 0));
    assert_eq!(all(&syncs), [Refresh, GoOn, GoOn, GoOn, GoOn]);
}

#[test]
fn rounds_go_on_while_a_refresh_draws_near() {
    for (others, decision) in [(700, GoOn), (701, HOPELESS)] {
        let syncs = [seen(1000, 9000), seen(1000, 9000), seen(others, 9300)];
        assert_eq!(last(&syncs), decision, "{others} others");
        // None is to be had.
        let syncs = syncs.map(|seen| Observation::new(TERMS, seen.others, seen.members));
        assert_eq!(last(&syncs), HOPELESS);
    }
    // Others that fit need not become fewer, and gain nothing if they do.
    let [near, fit] = [seen(300, 9000), seen(90, 9200)];
    assert_eq!(last(&[near, near, fit]), Refresh);
    let syncs = [seen(100, 50), seen(130, 60), seen(60, 85)];
    assert_eq!(last(&syncs), HOPELESS);
}

#[test]
fn refreshes_in_vain_become_rare() {
    let mut convergence = Convergence::new();
    let mut refreshed = |pages: u64, syncs: usize| {
        let decide = |_| convergence.decide(&seen(50, pages - 50));
        let decisions: Vec<_> = (0..syncs).map(decide).collect();
        let is_refresh = |at: &usize| decisions[*at] == Refresh;
        (0..syncs).filter(is_refresh).collect::<Vec<_>>()
    };
    // Three at once; then after 8 syncs in between, after 16, and so on.
    assert_eq!(refreshed(1000, 64), [0, 3, 6, 15, 32]);
    // One refresh with progress makes up for it.
    assert!(refreshed(951, 1).is_empty());
    assert_eq!(refreshed(950, 20), [0, 3, 6, 15]);
}

#[test]
fn a_refresh_that_is_owed_anew_does_not_wait() {
    let mut syncs = vec![seen(50, 950); 11];
    assert_eq!(last(&syncs), HOPELESS);
    syncs.push(owed(50, 950));
    assert_eq!(last(&syncs), Refresh);
    // As one that is owed for ever: by now the sixteenth sync is waited for.
    syncs.extend([owed(50, 950); 16]);
    assert_eq!(last(&syncs), HOPELESS);
    syncs.push(owed(50, 950));
    assert_eq!(last(&syncs), Refresh);
}

#[test]
fn half_of_what_the_link_sends_would_do() {
    for (rate, run_us, pages_per_second) in [
        (1000.0, 0, 500),
        (1001.0, 0, 500),
        (1000.0, 1000, 333), // each second page begins a run
        (1.0, 0, 1),
        (0.0, 0, 1),
        (f64::NAN, 0, 1),
    ] {
        let mut seen = without_refreshes(1000, 1000);
        seen.terms.pages_per_second = rate;
        seen.terms.run_cost = Duration::from_micros(run_us);
        (seen.others.runs, seen.members.runs) = (400, 600);
        let pages_per_second = NonZeroU64::new(pages_per_second).unwrap();
        let hopeless = Decision::Hopeless { pages_per_second };
        assert_eq!(last(&[seen; 3]), hopeless, "{rate}");
    }
}

#[test]
fn a_link_that_has_become_slower_is_no_guest_that_has_become_faster() {
    let mut syncs = [without_refreshes(1000, 0); 3];
    for (sync, (pages, rate)) in syncs
        .iter_mut()
        .zip([(1000, 1000.0), (900, 500.0), (800, 1.0)])
    {
        sync.others.pages = pages;
        sync.others.runs = 1000;
        sync.terms.pages_per_second = rate;
        sync.terms.run_cost = Duration::from_micros(1);
    }
    assert_eq!(last(&syncs), GoOn);
}
