// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is run: guests, and the arms that migrate each.

use std::time::Duration;

use anyhow::{Result, ensure};
use kvm_integration::cli::options::or;
use kvm_integration::guestperf::{Arm, Cell};
use kvm_integration::migration::{Limits, Places};

use crate::options::Options;

/// vCPUs, memory and stressed memory in MiB, entries of a ring.
const fn cell(vcpus: u32, memory_mib: u64, stress_mib: u64, ring_entries: u32) -> Cell {
    Cell {
        vcpus,
        memory_mib,
        stress_mib,
        ring_entries,
    }
}

/// One whose pages pass through its rings again and again, and one whose pages fit.
const QUICK: [Cell; 2] = [cell(2, 1024, 96, 4096), cell(2, 1024, 256, 65536)];

const DEFAULT: [Cell; 6] = [
    cell(1, 1024, 96, 4096),
    cell(1, 1024, 96, 65536),
    cell(2, 1024, 96, 1024),
    cell(2, 1024, 256, 4096),
    cell(2, 1024, 256, 65536),
    cell(8, 1024, 512, 65536),
];

/// The grid of a full run, and of one where some numbers are asked for and others not.
const VCPUS: [u32; 3] = [1, 2, 8];
const MEMORY_MIB: [u64; 2] = [1024, 4096];
const STRESS_MIB: [u64; 3] = [96, 256, 768];
const RING_ENTRIES: [u32; 3] = [1024, 4096, 65536];

/// QEMU today and ours, each in the crate's shape and in QEMU's, and what there was before rings.
const QUICK_ARMS: [&str; 5] = ["bitmap", "fixed", "adaptive", "qemu-fixed", "qemu-adaptive"];

/// What a link without much of a limit takes, in MiB per second, at least.
const FASTEST_LINK: u64 = 1000;
/// For the guests of a cell to be made.
const SETUP: Duration = Duration::from_secs(5);
/// For a guest to get over a migration, and to be compared with its copy.
const SETTLES: Duration = Duration::from_millis(600);

/// A run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The guests.
    pub cells: Vec<Cell>,
    /// The arms, in the order in which they are shown.
    pub arms: Vec<Arm>,
    /// How often each arm migrates each guest.
    pub repeat: u32,
    /// How long each quiet phase takes.
    pub quiet: Duration,
    /// How far migrations go.
    pub limits: Limits,
}

impl Plan {
    /// What the command line asks for.
    pub fn new(options: &Options) -> Result<Self> {
        let mut cells = list(options);
        let of = |number: fn(&Cell) -> u64| cells.iter().map(number).collect::<Vec<_>>();
        let (memory, stress) = (of(|cell| cell.memory_mib), of(|cell| cell.stress_mib));
        cells.retain(Cell::is_possible);
        ensure!(
            !cells.is_empty(),
            "no guest is left of those with {memory:?} MiB of memory and {stress:?} of it stressed: \
             the stressed memory must not exceed the memory, and must have a page for each vCPU"
        );
        let arms = match options.quick {
            true => QUICK_ARMS
                .iter()
                .filter_map(|name| Arm::named(name))
                .collect(),
            false => Arm::ALL.to_vec(),
        };
        Ok(Self {
            cells,
            arms: distinct(&or(&options.arms, &arms)),
            repeat: options.repeat.unwrap_or(if options.quick { 2 } else { 3 }),
            quiet: Duration::from_millis(options.quiet_ms),
            limits: Limits {
                bandwidth_mib: options.bandwidth_mib,
                max_rounds: options.max_rounds,
                downtime: Duration::from_millis(options.downtime_ms),
                converge: false,
                // For those arms that leave any open.
                places: Places::Auto,
                break_after: None,
            },
        })
    }

    /// What is to be known of it beside the results.
    pub fn facts(&self) -> [(&'static str, String); 4] {
        let (rounds, downtime) = (self.limits.max_rounds, self.limits.downtime.as_millis());
        let link = match self.limits.bandwidth_mib {
            0 => "as fast as it goes".into(),
            limit => format!("{limit} MiB/s"),
        };
        [
            ("link", link),
            ("downtime limit", format!("{downtime} ms")),
            (
                "rounds at most",
                format!("{rounds}, then the guest is stopped"),
            ),
            ("migrations", format!("{} of each arm", self.repeat)),
        ]
    }

    /// How long a migration of `cell` takes at most, if the link takes what it should.
    pub fn longest(&self, cell: &Cell) -> Duration {
        let bandwidth = match self.limits.bandwidth_mib {
            0 => FASTEST_LINK,
            limited => limited.min(FASTEST_LINK),
        };
        // Round 0, the others, and the rest.
        let mib = cell.memory_mib + u64::from(self.limits.max_rounds) * cell.stress_mib;
        let link = Duration::from_secs_f64(mib as f64 / bandwidth as f64);
        2 * self.quiet + SETTLES + link
    }

    /// How long all of it takes at most, on a machine with nothing else to do.
    pub fn duration(&self) -> Duration {
        let turns = self.repeat * self.arms.len() as u32;
        let cells = self.cells.iter();
        cells.map(|cell| SETUP + self.longest(cell) * turns).sum()
    }
}

/// The same without repetitions.
fn distinct<T: Copy + PartialEq>(given: &[T]) -> Vec<T> {
    let mut distinct = Vec::new();
    for one in given {
        if !distinct.contains(one) {
            distinct.push(*one);
        }
    }
    distinct
}

/// The guests: where numbers are asked for, all that have them; else the list's.
fn list(options: &Options) -> Vec<Cell> {
    let Options {
        vcpus,
        memory_mib,
        stress_mib,
        ring_entries,
        ..
    } = options;
    let asked = !(vcpus.is_empty()
        && memory_mib.is_empty()
        && stress_mib.is_empty()
        && ring_entries.is_empty());
    match (asked || options.full, options.quick) {
        (false, true) => QUICK.to_vec(),
        (false, false) => DEFAULT.to_vec(),
        (true, _) => grid(options),
    }
}

fn grid(options: &Options) -> Vec<Cell> {
    /// What is asked for; else what is typical, or everything.
    fn numbers<T: Copy + PartialEq>(given: &[T], grid: &[T], typical: T, full: bool) -> Vec<T> {
        let typical = [typical];
        distinct(&or(given, if full { grid } else { &typical }))
    }
    let full = options.full;
    let ring_entries: Vec<u32> = options.ring_entries.iter().map(|size| size.get()).collect();
    let mut list = Vec::new();
    for &vcpus in &numbers(&options.vcpus, &VCPUS, 2, full) {
        for &memory in &numbers(&options.memory_mib, &MEMORY_MIB, 1024, full) {
            for &stress in &numbers(&options.stress_mib, &STRESS_MIB, 96, full) {
                for &ring in &numbers(&ring_entries, &RING_ENTRIES, 4096, full) {
                    list.push(cell(vcpus, memory, stress, ring));
                }
            }
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::tests::parse;

    fn plan(args: &str) -> Plan {
        Plan::new(&parse(args).unwrap()).unwrap()
    }

    #[test]
    fn runs_take_no_longer_than_promised() {
        assert!(plan("--quick").duration() < Duration::from_secs(3 * 60));
        assert!(plan("").duration() < Duration::from_secs(24 * 60));
    }

    #[test]
    fn a_run_has_every_arm_and_a_quick_one_both_shapes() {
        assert_eq!(plan("").arms, Arm::ALL);
        assert_eq!(plan("--full").arms, Arm::ALL);
        let names: Vec<_> = plan("--quick").arms.iter().map(|arm| arm.name).collect();
        assert_eq!(names, QUICK_ARMS);
        assert_eq!(plan("--quick --arm bitmap").arms.len(), 1);
    }

    #[test]
    fn lists_are_possible_and_the_grid_is_whole() {
        assert_eq!(plan("").cells.len(), DEFAULT.len());
        assert_eq!(plan("--quick").cells.len(), QUICK.len());
        assert_eq!(plan("--full").cells.len(), 3 * 2 * 3 * 3);
    }

    #[test]
    fn filters_choose_or_multiply() {
        let cells = |args| plan(args).cells;
        assert_eq!(cells("--vcpus 3"), [cell(3, 1024, 96, 4096)]);
        assert_eq!(
            cells("--stress-mib 8 --stress-mib 16 --ring-entries 512"),
            [cell(2, 1024, 8, 512), cell(2, 1024, 16, 512)]
        );
        // What can't be stressed is left out.
        assert_eq!(
            cells("--memory-mib 50 --stress-mib 40 --stress-mib 60").len(),
            1
        );
        assert_eq!(cells("--full --vcpus 1").len(), 18);
        let none = parse("--memory-mib 50 --stress-mib 60").unwrap();
        let error = Plan::new(&none).unwrap_err().to_string();
        assert!(
            error.contains("[50] MiB of memory and [60] of it"),
            "{error}"
        );
        assert_eq!(cells("--vcpus 1 --vcpus 3 --vcpus 1").len(), 2);
        assert_eq!(plan("--arm fixed --arm bitmap --arm fixed").arms.len(), 2);
    }

    #[test]
    fn a_migration_is_bounded_by_its_rounds() {
        let plan = plan("--max-rounds 3 --bandwidth-mib 100 --quiet-ms 500");
        let longest = plan.longest(&cell(1, 400, 200, 256));
        assert_eq!(longest, Duration::from_millis(10_000 + 1000 + 600));
    }
}
