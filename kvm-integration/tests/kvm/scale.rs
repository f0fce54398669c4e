// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `KVM_SUITE_SCALE`: how much the suite does, and how long it waits, on machines of another speed.

use std::env;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use libtest_mimic::Completion::Completed;

use super::harness::Outcome;

tests![bad_factors_are_refused, a_factor_does_what_it_says];

const VARIABLE: &str = "KVM_SUITE_SCALE";
const ALLOWED: std::ops::RangeInclusive<f64> = 0.001..=1000.0;

#[derive(Clone, Copy)]
struct Scale(f64);

impl Scale {
    fn parse(text: &str) -> Result<Self, String> {
        let factor = text.parse().ok().filter(|factor| ALLOWED.contains(factor));
        let (least, most) = (ALLOWED.start(), ALLOWED.end());
        let refused = || format!("{VARIABLE} is {text:?}: give it a number from {least} to {most}");
        factor.map(Self).ok_or_else(refused)
    }

    fn rounds(self, full: u64, least: u64) -> u64 {
        ((full as f64 * self.0).round() as u64).max(least)
    }

    fn patience(self, full: Duration) -> Duration {
        full.div_f64(self.0.min(1.0))
    }

    fn limit(self, full: Duration) -> Duration {
        full.mul_f64(self.0.max(1.0 / self.0))
    }
}

static SCALE: OnceLock<Scale> = OnceLock::new();

/// Reads the variable. The factor, if there is one.
pub fn read() -> Result<Option<f64>, String> {
    let Some(text) = env::var_os(VARIABLE) else {
        return Ok(None);
    };
    let scale = Scale::parse(&text.to_string_lossy())?;
    Ok(Some(SCALE.get_or_init(|| scale).0))
}

fn scale() -> Scale {
    *SCALE.get().unwrap_or(&Scale(1.0))
}

/// `full` rounds, scaled; no fewer than the `least` that still prove something.
pub fn scaled(full: u64, least: u64) -> u64 {
    scale().rounds(full, least)
}

/// The same for pages and vCPUs, of which there are never more than `full`.
pub fn at_most(full: u64, least: u64) -> u64 {
    scaled(full, least).min(full)
}

/// How long to wait for one thing that may take `full` on a machine of ordinary speed; and how far apart a reaper's looks
/// are, so that it leaves a slow processor to the others.
pub fn patience(full: Duration) -> Duration {
    scale().patience(full)
}

/// The same for a whole test, which takes longer with more rounds, too.
pub fn limit(full: Duration) -> Duration {
    scale().limit(full)
}

/// Whether less is done than by default: what is left to chance may not come to pass then.
pub fn is_reduced() -> bool {
    scale().0 < 1.0
}

/// Before any test runs, with what is allowed.
fn bad_factors_are_refused() -> Outcome {
    for bad in ["", "0", "-1", "nan", "inf", "fast", "0.0009", "1001"] {
        let mut suite = Command::new(env::current_exe()?);
        // No test has this name: only the factor can make it fail.
        suite.args(["--exact", "none"]).env(VARIABLE, bad);
        let output = suite.output()?;
        assert!(!output.status.success(), "{bad:?} was taken");
        let complaint = String::from_utf8(output.stderr)?;
        let wanted = format!("is {bad:?}: give it a number from 0.001 to 1000");
        assert!(complaint.contains(&wanted), "{complaint}");
        assert!(output.stdout.is_empty(), "tests were run");
    }
    Ok(Completed)
}

fn a_factor_does_what_it_says() -> Outcome {
    let (tenth, all, twice) = (Scale(0.1), Scale(1.0), Scale(2.0));
    let rounds = [tenth, all, twice].map(|scale| (scale.rounds(200, 1), scale.rounds(20, 4)));
    assert_eq!(rounds, [(20, 4), (200, 20), (400, 40)]);
    let minute = Duration::from_secs(60);
    let times = [tenth, all, twice].map(|scale| (scale.patience(minute), scale.limit(minute)));
    assert_eq!(
        times,
        [
            (minute * 10, minute * 10),
            (minute, minute),
            (minute, minute * 2)
        ]
    );
    Ok(Completed)
}
