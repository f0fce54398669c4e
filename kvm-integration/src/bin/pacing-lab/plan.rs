// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which real guests are run, under which arms, for how long.

use std::time::Duration;

use anyhow::{Error, Result, bail};
use kvm_integration::cli::options::or;
use kvm_integration::guest::stamp::MAX_VCPUS;
use kvm_integration::lab::{Arm, Cell, Pattern, Turn};
use strum::VariantArray;

use crate::options::Options;

use Pattern::{Bursts, Constant, Fast, FastBursts, HotSet, Idle, Ramp, Skew, Trickle};

/// What a run without any filter does.
const FULL: [(Pattern, u32, u32); 19] = [
    (Constant, 1, 4096),
    (Constant, 1, 1024),
    (Constant, 2, 4096),
    (Constant, 2, 65536),
    (Constant, 8, 4096),
    (Skew, 2, 4096),
    (Skew, 8, 4096),
    (Trickle, 1, 4096),
    (Bursts, 1, 4096),
    (Bursts, 8, 4096),
    (Ramp, 2, 4096),
    (HotSet, 2, 4096),
    (HotSet, 2, 65536),
    (HotSet, 8, 4096),
    (Idle, 2, 4096),
    (Fast, 1, 4096),
    (Fast, 1, 1024),
    (Fast, 8, 4096),
    (FastBursts, 2, 4096),
];

/// The guests for which there are targets.
const QUICK: [(Pattern, u32, u32); 10] = [
    (Constant, 1, 4096),
    (Constant, 1, 1024),
    (Constant, 2, 4096),
    (Constant, 8, 4096),
    (Skew, 2, 4096),
    (Trickle, 1, 4096),
    (HotSet, 2, 16384),
    (Idle, 2, 4096),
    (Fast, 1, 4096),
    (Fast, 8, 4096),
];

/// What a guest has that is named by its workload alone.
const VCPUS: u32 = 2;
const RING_ENTRIES: u32 = 4096;

/// All that a run does.
#[derive(Debug)]
pub struct Plan {
    /// The guests, with the arms that take turns under each.
    pub cells: Vec<(Cell, Vec<Arm>)>,
    /// Turns of each arm.
    pub rounds: u32,
    /// How long a turn is measured.
    pub slice: Duration,
    /// Whether there is one more turn of each arm, to be drawn.
    pub drawn: bool,
}

impl Plan {
    /// What is asked for.
    pub fn new(options: &Options) -> Result<Self> {
        if let Some(&vcpus) = options.vcpus.iter().find(|&&vcpus| vcpus > MAX_VCPUS) {
            bail!(
                "a guest of {vcpus} vCPUs is too large for real KVM here: at most {MAX_VCPUS}, or --sim"
            );
        }
        let workloads = options.workloads.iter();
        let patterns = workloads.map(|name| name.parse().map_err(Error::msg));
        let patterns = patterns.collect::<Result<Vec<Pattern>>>()?;
        let arms = |cell: &Cell| match options.quick {
            true => or(&options.arms, &quick_arms(cell.pattern)),
            false => or(&options.arms, &Arm::ALL),
        };
        let cells = cells(options, &patterns);
        let slice_ms = if options.quick { 1000 } else { 2000 };
        Ok(Self {
            cells: cells.into_iter().map(|cell| (cell, arms(&cell))).collect(),
            rounds: options.rounds,
            slice: Duration::from_millis(options.slice_ms.unwrap_or(slice_ms)),
            drawn: options.html.is_some(),
        })
    }

    /// How long it takes, if guests are made within no time and dirty pages as fast as they can.
    pub fn duration(&self) -> Duration {
        let turns = self.rounds + u32::from(self.drawn);
        let cells = self.cells.iter().flat_map(|(cell, arms)| {
            let turn = |arm| Turn::new(cell, arm, self.slice, Duration::ZERO);
            arms.iter().map(move |arm| turn(arm).total())
        });
        cells.sum::<Duration>() * turns
    }
}

/// The guests: where numbers are asked for, all of those; else those of the list.
fn cells(options: &Options, patterns: &[Pattern]) -> Vec<Cell> {
    let list = if options.quick { &QUICK[..] } else { &FULL };
    let asked_for = |pattern: Pattern| patterns.is_empty() || patterns.contains(&pattern);
    if options.vcpus.is_empty() && options.ring_entries.is_empty() {
        let listed = list.iter().filter(|&&(pattern, ..)| asked_for(pattern));
        let cell = |&(pattern, vcpus, ring_entries)| Cell {
            pattern,
            vcpus,
            ring_entries,
        };
        return listed.map(cell).collect();
    }
    let ring_entries: Vec<u32> = options.ring_entries.iter().map(|size| size.get()).collect();
    let mut cells = Vec::new();
    for pattern in Pattern::VARIANTS.iter().copied().filter(|&p| asked_for(p)) {
        for &vcpus in &or(&options.vcpus, &[VCPUS]) {
            for &ring_entries in &or(&ring_entries, &[RING_ENTRIES]) {
                cells.push(Cell {
                    pattern,
                    vcpus,
                    ring_entries,
                });
            }
        }
    }
    cells
}

/// The arms that targets speak of.
fn quick_arms(pattern: Pattern) -> Vec<Arm> {
    let names: &[&str] = match pattern {
        Idle => &["adaptive"],
        Trickle => &["adaptive", "adaptive-fifo"],
        HotSet => &["adaptive", "fixed", "no-reaper"],
        Fast => &["adaptive", "adaptive-fifo", "fixed", "qemu"],
        _ => &["adaptive", "adaptive-fifo", "fixed"],
    };
    names.iter().filter_map(|name| Arm::named(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::tests::parse;

    fn plan(args: &str) -> Plan {
        Plan::new(&parse(args).unwrap()).unwrap()
    }

    #[test]
    fn runs_take_as_long_as_promised() {
        // Making a guest takes a second or so.
        assert!(plan("--quick").duration() < Duration::from_secs(110));
        assert!(plan("").duration() < Duration::from_secs(23 * 60));
    }

    #[test]
    fn a_full_run_has_every_workload_and_arm() {
        let plan = plan("");
        for &pattern in Pattern::VARIANTS {
            assert!(plan.cells.iter().any(|(cell, _)| cell.pattern == pattern));
        }
        for (_, arms) in &plan.cells {
            assert_eq!(arms.len(), Arm::ALL.len());
        }
        assert_eq!(plan.slice, Duration::from_secs(2));
    }

    #[test]
    fn quick_names_are_arms() {
        for &pattern in Pattern::VARIANTS {
            let arms = quick_arms(pattern);
            let compared = matches!(pattern, Pattern::Idle | Pattern::Trickle);
            assert!(
                compared || arms.iter().any(|arm| arm.name == "fixed"),
                "{pattern}"
            );
        }
        let fast = quick_arms(Fast)
            .iter()
            .map(|arm| arm.name)
            .collect::<Vec<_>>();
        assert_eq!(fast, ["adaptive", "adaptive-fifo", "fixed", "qemu"]);
    }

    #[test]
    fn filters_choose_or_multiply() {
        let guests = |args| {
            let cells = plan(args).cells.into_iter();
            let cells = cells.map(|(cell, _)| (cell.pattern, cell.vcpus, cell.ring_entries));
            cells.collect::<Vec<_>>()
        };
        assert_eq!(guests("--workload trickle"), [(Trickle, 1, 4096)]);
        let both = guests("--workload skew --workload ramp --vcpus 3 --ring-entries 256");
        assert_eq!(both, [(Ramp, 3, 256), (Skew, 3, 256)]);
        assert_eq!(
            guests("--vcpus 1 --vcpus 4").len(),
            2 * Pattern::VARIANTS.len()
        );
        assert_eq!(plan("--arm poll").cells[0].1.len(), 1);
        assert_eq!(plan("--quick --slice-ms 50").slice.as_millis(), 50);
    }
}
