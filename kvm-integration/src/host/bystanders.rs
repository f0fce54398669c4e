// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether the machine was ours alone: if not, figures suffer.

use std::fs;

/// CPU time so far, in ticks of the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Times {
    all: u64,
    busy: u64,
    own: u64,
}

/// A watch over what other programs, or other guests of the same host, take.
#[derive(Debug)]
pub struct Bystanders {
    before: Times,
}

impl Bystanders {
    /// Begins. `None` if the kernel does not say.
    pub fn watch() -> Option<Self> {
        Times::read().map(|before| Self { before })
    }

    /// The share of all CPUs' time that others took since.
    pub fn share(&self) -> Option<f64> {
        Times::read()?.others_since(&self.before)
    }
}

impl Times {
    fn read() -> Option<Self> {
        let (all, busy) = machine(&fs::read_to_string("/proc/stat").ok()?)?;
        let own = own(&fs::read_to_string("/proc/self/stat").ok()?)?;
        Some(Self { all, busy, own })
    }

    fn others_since(&self, before: &Self) -> Option<f64> {
        let all = self.all.checked_sub(before.all).filter(|&all| all > 0)?;
        let own = self.own.checked_sub(before.own)?;
        // The two are counted in different ways, and need not agree to the tick.
        let others = self.busy.checked_sub(before.busy)?.saturating_sub(own);
        Some(others as f64 / all as f64)
    }
}

/// All time and busy time, of all CPUs together: user, nice, system, idle, iowait, irq, softirq and
/// steal. What follows is part of user and nice.
fn machine(stat: &str) -> Option<(u64, u64)> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let times: Option<Vec<u64>> = line.split_whitespace().map(|t| t.parse().ok()).collect();
    let times = times?;
    let all: u64 = times.get(..8)?.iter().sum();
    Some((all, all - times[3] - times[4]))
}

/// This process's user and system time.
fn own(stat: &str) -> Option<u64> {
    // The program's name may hold blanks and parentheses.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_understood() {
        let stat = "cpu  100 1 20 500 30 4 5 6 90 0\ncpu0 1 2 3 4\nintr 5\n";
        assert_eq!(machine(stat), Some((666, 136)));
        assert_eq!(machine("cpu 1 2 3\n"), None);
        let stat = "42 (a (b) c) R 1 2 3 4 5 6 7 8 9 10 1234 56 7 8 20";
        assert_eq!(own(stat), Some(1290));
        assert!(Times::read().is_some());
    }

    #[test]
    fn others_are_what_is_not_ours() {
        let at = |all, busy, own| Times { all, busy, own };
        let share = |after: Times| after.others_since(&at(1000, 500, 100));
        assert_eq!(share(at(1200, 600, 150)), Some(0.25));
        assert_eq!(share(at(1200, 600, 201)), Some(0.0));
        assert_eq!(share(at(1000, 500, 100)), None);
    }
}
