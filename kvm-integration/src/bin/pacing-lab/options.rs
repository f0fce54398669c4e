// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line.

use std::path::PathBuf;

use clap::Parser;
use kvm_dirty_ring::RingEntries;
use kvm_integration::cli::options::{named, ring_entries};
use kvm_integration::lab::Arm;
use kvm_integration::lab::sim::MOST_VCPUS;

/// Compares pacing policies side by side, on real KVM or simulated.
///
/// For each workload, number of vCPUs and ring size there is one guest, which runs all the time;
/// the policies take turns. What each does is counted from the end of its warm-up on. Tables, and
/// how the figures compare to what is aimed at, go to stdout, everything else to stderr.
///
/// Exit status: 0 if it ran, whatever target was missed; 2 if it could not; 130 if interrupted.
#[derive(Debug, Clone, Parser)]
#[command(version)]
pub struct Options {
    /// Less than two minutes: the guests for which there are targets
    #[arg(long, conflicts_with = "sim")]
    pub quick: bool,

    /// Only this workload: constant, trickle, bursts, ramp, skew, hot-set, idle, fast or
    /// fast-bursts; with --sim also sliced or walk; with --migrations hot-set, hot-and-cold, small-sweeps, sweeps,
    /// zipf, moving, rewritten or stream. May be repeated
    #[arg(long = "workload", value_name = "NAME")]
    pub workloads: Vec<String>,

    /// Only guests with so many vCPUs, up to 32, simulated up to 1024. May be repeated
    #[arg(long, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=MOST_VCPUS as i64))]
    pub vcpus: Vec<u32>,

    /// Only rings of so many entries, a power of two from 256 to 65536. May be repeated
    #[arg(long, value_name = "N", value_parser = ring_entries)]
    pub ring_entries: Vec<RingEntries>,

    /// Only this policy: adaptive, adaptive-fifo, fixed, fixed-10ms, run-levels,
    /// run-levels-as-posted, aimd, poll, qemu or no-reaper. May be repeated
    #[arg(long = "arm", value_name = "NAME", value_parser = arm)]
    pub arms: Vec<Arm>,

    /// How long a turn is measured, in milliseconds; slow workloads take longer. 2000 unless set
    /// otherwise, 1000 with --quick
    #[arg(long, value_name = "MS", conflicts_with = "sim",
          value_parser = clap::value_parser!(u64).range(10..=600_000))]
    pub slice_ms: Option<u64>,

    /// Turns of each policy
    #[arg(long, value_name = "N", default_value_t = 2, conflicts_with = "sim",
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,

    /// Writes all figures to this file, as one JSON object
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Writes a page for a browser to this file, with charts: how full the fullest ring is, how long
    /// the reaper sleeps, and full exits. It takes one more turn of each policy
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,

    /// Simulates guests, of 64, 256 and 1024 vCPUs by default
    #[arg(long)]
    pub sim: bool,

    /// Seconds that are simulated, after 2 of warm-up
    #[arg(long, value_name = "N", default_value_t = 60, requires = "sim",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,

    /// Migrates guests with and without a working set, by rings and by bitmaps, instead: tables of what it
    /// brings. Less than three minutes on real KVM, with --quick less than one; with --sim some seconds, and the same
    /// each time. Exit status 1 if a page was missed
    #[arg(long, conflicts_with_all = ["vcpus", "ring_entries", "arms", "slice_ms", "rounds", "html", "seconds",
                                      "seed", "constants", "trace"])]
    pub migrations: bool,

    /// Where the simulation's random numbers begin
    #[arg(long, value_name = "N", default_value_t = 1, requires = "sim")]
    pub seed: u64,

    /// Simulates adaptive with one of its numbers changed, under loads that tempt it to mistakes,
    /// and says what each of them is good for
    #[arg(long, requires = "sim",
          conflicts_with_all = ["workloads", "vcpus", "ring_entries", "arms", "json", "html", "trace"])]
    pub constants: bool,

    /// Simulates what this file has recorded, a line for each change of a vCPU's page stores per
    /// second: `seconds,vcpu,rate`
    #[arg(long, value_name = "FILE", requires = "sim",
          conflicts_with_all = ["workloads", "vcpus"])]
    pub trace: Option<PathBuf>,
}

fn arm(name: &str) -> Result<Arm, String> {
    named(&Arm::ALL, |arm| arm.name, name)
}

#[cfg(test)]
pub mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    pub fn parse(args: &str) -> Result<Options, clap::Error> {
        Options::try_parse_from(["pacing-lab"].into_iter().chain(args.split_whitespace()))
    }

    #[test]
    fn help_names_every_arm() {
        let help = Options::command().render_long_help().to_string();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for arm in Arm::ALL {
            assert!(help.contains(arm.name), "{}", arm.name);
        }
        assert_eq!(parse("--help").unwrap_err().kind(), ErrorKind::DisplayHelp);
    }
}
