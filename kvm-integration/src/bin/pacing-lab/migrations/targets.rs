// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is aimed at, and whether it was met.
//!
//! | guest | target | wanted |
//! |---|---|---|
//! | `hot-set`, of three rounds and more | speed of `rings+ws` ÷ `bitmap` | ≥ 1 |
//! | `hot-and-cold` | entries of `rings` ÷ `rings+ws`; time of `rings+ws` ÷ `rings` | ≥ 5; ≤ 1 |
//! | `moving` | ends as `rings` does; time, pages ÷ `rings` | ≤ 1.1 |
//! | `rewritten`, `stream` | entries, time, pages ÷ `rings` | ≤ 1 |
//! | `sweeps`; `zipf` | rounds until it is said to be hopeless | ≤ 3; ≤ 5 |
//! | all | missed pages | 0 |
//! | 8 full rings | time of the last sync ÷ of a sync, an entry | ≤ 1/8 |
//!
//! Quotients are rounded to two digits: an hundredth is no difference.

use kvm_integration::lab::migrations::{Arm, End, Figures, Load};

use super::result::{GuestResult, Results};
use crate::targets::{Bound, Verdict};

const OURS: &str = Arm::RINGS_WS.name;

/// All targets that these results have figures for.
pub fn verdicts(results: &Results) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for result in &results.guests {
        let [rings, bitmap, ours, bitmap_ours] = &result.arms[..] else {
            continue;
        };
        let mut guest = Judge {
            result,
            verdicts: &mut verdicts,
        };
        match result.load {
            Load::HotSet => {
                let rounds = f64::from(ours.rounds.min(bitmap.rounds));
                guest.judge("rounds", Bound::AtLeast(3.0), rounds);
                let speed = ours.speed / bitmap.speed;
                guest.judge("speed ÷ bitmap", Bound::AtLeast(1.0), speed);
            }
            Load::HotAndCold => {
                let entries = quotient(rings.entries, ours.entries);
                guest.judge("entries of rings ÷ entries", Bound::AtLeast(5.0), entries);
                let time = ours.seconds / rings.seconds;
                guest.judge("time ÷ rings", Bound::AtMost(1.0), time);
            }
            Load::Moving => guest.compare(rings, ours, 1.1, false),
            Load::Rewritten | Load::Stream => guest.compare(rings, ours, 1.0, true),
            Load::Sweeps => guest.hopeless(&[ours, bitmap_ours], 3.0),
            Load::Zipf => guest.hopeless(&[ours, bitmap_ours], 5.0),
            Load::SmallSweeps => guest.ends_as(rings, ours),
        }
        let missed = result.missed_pages() as f64;
        guest.judge_of("all", "missed pages", Bound::AtMost(0.0), missed);
    }
    #[cfg(tiny_guest)]
    if let Some(last) = &results.last_sync {
        let measured = last.quotient();
        let wanted = Bound::AtMost(0.125);
        verdicts.push(Verdict {
            target: "last sync ÷ sync",
            guest: format!("{} full rings of {}", last.rings, last.ring_entries),
            arm: Arm::RINGS.name,
            wanted,
            measured: Some(measured),
            met: wanted.holds(measured),
        });
    }
    verdicts
}

fn quotient(over: Option<u64>, under: Option<u64>) -> f64 {
    let [over, under] = [over, under].map(|count| count.unwrap_or(0) as f64);
    over / under
}

struct Judge<'a> {
    result: &'a GuestResult,
    verdicts: &'a mut Vec<Verdict>,
}

impl Judge<'_> {
    fn judge(&mut self, target: &'static str, wanted: Bound, measured: f64) {
        self.judge_of(OURS, target, wanted, measured);
    }

    fn judge_of(&mut self, arm: &'static str, target: &'static str, wanted: Bound, measured: f64) {
        let measured = (measured * 100.0).round() / 100.0;
        self.verdicts.push(Verdict {
            target,
            guest: self.result.load.to_string(),
            arm,
            wanted,
            measured: measured.is_finite().then_some(measured),
            met: wanted.holds(measured),
        });
    }

    /// Whether it ends if today's tracking does.
    fn ends_as(&mut self, rings: &Figures, ours: &Figures) {
        let ends = |figures: &Figures| f64::from(u8::from(figures.end == End::Ends));
        self.judge("ends", Bound::AtLeast(ends(rings)), ends(ours));
    }

    fn compare(&mut self, rings: &Figures, ours: &Figures, most: f64, with_entries: bool) {
        self.ends_as(rings, ours);
        let most = Bound::AtMost(most);
        if with_entries {
            let entries = quotient(ours.entries, rings.entries);
            self.judge("entries ÷ rings", most, entries);
        }
        self.judge("time ÷ rings", most, ours.seconds / rings.seconds);
        let pages = quotient(Some(ours.pages_sent), Some(rings.pages_sent));
        self.judge("pages sent ÷ rings", most, pages);
    }

    /// One that is not seen to be hopeless is beyond all bounds.
    fn hopeless(&mut self, arms: &[&Figures], most: f64) {
        for figures in arms {
            let rounds = match figures.end {
                End::Hopeless => f64::from(figures.rounds),
                End::Ends | End::Bounded => f64::INFINITY,
            };
            self.judge_of(
                figures.arm,
                "rounds until hopeless",
                Bound::AtMost(most),
                rounds,
            );
        }
    }
}
