// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line.

use std::path::PathBuf;

use clap::Parser;
use kvm_dirty_ring::RingEntries;
use kvm_integration::cli::options::{named, ring_entries};
use kvm_integration::guest::stamp::MAX_VCPUS;
use kvm_integration::guestperf::Arm;

/// The most memory a guest may have, in MiB.
const MOST_MIB: i64 = 256 << 10;

/// What a guest feels of its migration, and for how long: policies and bitmap mode side by side, on
/// real KVM.
///
/// Each guest's vCPUs XOR their share of the stressed memory with random bytes, page by page, over
/// and over. A guest runs quietly for a while, is migrated from one piece of memory to another,
/// which is then compared with it byte for byte, and runs quietly again. Arms take turns. Tables go
/// to stdout, everything else to stderr.
///
/// Exit status: 0 if no page was missed, 1 if any was, 2 if it could not run, 130 if interrupted.
#[derive(Debug, Clone, Parser)]
#[command(version)]
pub struct Options {
    /// Less than three minutes: the arms that matter most, in both shapes, and bitmap mode
    #[arg(long, conflicts_with = "full")]
    pub quick: bool,

    /// All of the grid, which takes hours
    #[arg(long)]
    pub full: bool,

    /// Only guests with so many vCPUs, 1 to 32. May be repeated
    #[arg(long, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VCPUS)))]
    pub vcpus: Vec<u32>,

    /// Only guests with so much memory, in MiB, 1 to 262144. The copy takes as much again. May be
    /// repeated
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=MOST_MIB as u64))]
    pub memory_mib: Vec<u64>,

    /// Only guests that stress so much of it, in MiB. May be repeated
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=MOST_MIB as u64))]
    pub stress_mib: Vec<u64>,

    /// Only rings of so many entries, a power of two from 256 to 65536. May be repeated
    #[arg(long, value_name = "N", value_parser = ring_entries)]
    pub ring_entries: Vec<RingEntries>,

    /// Only this arm: bitmap, fixed, run-levels-as-posted, run-levels, aimd or
    /// adaptive; or one of the last five with `qemu-` before it: in QEMU's shape, where a full exit
    /// empties all rings under one lock; or adaptive+ws or bitmap+ws, which leave pages open that are written
    /// again and again, until the last round. May be repeated
    #[arg(long = "arm", value_name = "NAME", value_parser = arm)]
    pub arms: Vec<Arm>,

    /// Migrations of each arm. 3 by default, 2 with --quick
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub repeat: Option<u32>,

    /// MiB per second that the link takes, up to 1000000; 0: as many as it can
    #[arg(long, value_name = "MIB", default_value_t = 500,
          value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    pub bandwidth_mib: u64,

    /// The guest is stopped once the link would take no longer than this for what is left, in
    /// milliseconds, up to 60000
    #[arg(long, value_name = "MS", default_value_t = 300,
          value_parser = clap::value_parser!(u64).range(..=60_000))]
    pub downtime_ms: u64,

    /// The most rounds while the guest runs, 1 to 1000; then it is stopped whatever is left, and the
    /// migration has not converged
    #[arg(long, value_name = "N", default_value_t = 2,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub max_rounds: u32,

    /// How long each quiet phase takes, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 800,
          value_parser = clap::value_parser!(u64).range(200..=600_000))]
    pub quiet_ms: u64,

    /// Writes all figures to this file, as one JSON object
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Writes a report with pictures to this file, as one HTML page that needs no other
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
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
        Options::try_parse_from(["guestperf"].into_iter().chain(args.split_whitespace()))
    }

    #[test]
    fn help_names_every_arm() {
        let help = Options::command().render_long_help().to_string();
        for arm in Arm::ALL {
            let name = arm.name.strip_prefix("qemu-").unwrap_or(arm.name);
            assert!(help.contains(name), "{name}");
        }
        assert_eq!(parse("--help").unwrap_err().kind(), ErrorKind::DisplayHelp);
    }
}
