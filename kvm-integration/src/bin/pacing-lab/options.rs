//! The command line.

use clap::Parser;
use kvm_dirty_ring::RingEntries;
use kvm_integration::lab::{Arm, Pattern};
use kvm_integration::stamp::MAX_VCPUS;

/// Compares pacing policies side by side, on real KVM.
///
/// For each workload, number of vCPUs and ring size there is one guest, which runs all the time;
/// the policies take turns. What each does is counted from the end of its warm-up on.
#[derive(Debug, Clone, Parser)]
#[command(version)]
pub struct Options {
    /// Less than two minutes: the guests for which there are targets
    #[arg(long)]
    pub quick: bool,

    /// Only this workload; may be repeated
    #[arg(long = "workload", value_name = "NAME")]
    pub workloads: Vec<Pattern>,

    /// Only guests with so many vCPUs; may be repeated
    #[arg(long, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VCPUS)))]
    pub vcpus: Vec<u32>,

    /// Only rings of so many entries; may be repeated
    #[arg(long, value_name = "N", value_parser = ring_entries)]
    pub ring_entries: Vec<u32>,

    /// Only this policy; may be repeated
    #[arg(long = "arm", value_name = "NAME", value_parser = arm)]
    pub arms: Vec<&'static str>,

    /// How long a turn is watched, in milliseconds; some workloads take longer
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=600_000))]
    pub slice_ms: Option<u64>,

    /// Turns of each policy
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,
}

fn ring_entries(text: &str) -> Result<u32, String> {
    let entries: u32 = text
        .parse()
        .map_err(|_| "a power of two from 256 to 65536 is wanted".to_string())?;
    let entries = RingEntries::new(entries).map_err(|error| error.to_string())?;
    Ok(entries.get())
}

fn arm(name: &str) -> Result<&'static str, String> {
    match Arm::named(name) {
        Some(arm) => Ok(arm.name),
        None => {
            let names = Arm::ALL.map(|arm| arm.name).join(", ");
            Err(format!("choose one of {names}"))
        }
    }
}
