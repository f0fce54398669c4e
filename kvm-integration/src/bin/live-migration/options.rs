// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line.

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use kvm_dirty_ring::RingEntries;
use kvm_integration::cli::options::ring_entries;
use kvm_integration::cli::output::Teller;
use kvm_integration::guest::stamp::MAX_VCPUS;
use kvm_integration::host::available_mib;
use kvm_integration::machine::{MAX_PAGES, Setup};
use kvm_integration::migration::Places;
use kvm_integration::{Policy, Workload};

/// Pages of 4 KiB in a MiB.
const PAGES_PER_MIB: u64 = 256;

/// Migrates a live guest from one piece of memory to another by means of its dirty log, and
/// compares both in the end, byte for byte.
///
/// The guest writes its memory all the time. Round 0 copies all of it; each further round asks
/// `sync` what was written meanwhile and copies that, until it is so little that the vCPUs can stop
/// for it, or there is no hope that it ever is. Pages that are written again and again stay open: they
/// are logged and copied no more until the guest has stopped. Exit status: 0 if both sides are equal, 1 if not, 2 if it could not be tried, 130 if
/// interrupted.
#[derive(Debug, Clone, Parser)]
#[command(version)]
pub struct Options {
    /// vCPUs of the guest, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 2,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VCPUS)))]
    pub vcpus: u32,

    /// Logged memory of the guest in MiB, 1 to 262144, in two memslots; the copy takes as much
    #[arg(long, value_name = "MIB", default_value_t = 512,
          value_parser = clap::value_parser!(u64).range(1..=MAX_PAGES / PAGES_PER_MIB))]
    pub memory_mib: u64,

    /// Entries of each vCPU's dirty ring, a power of two from 256 to 65536, or as the host allows
    #[arg(long, value_name = "N", default_value = "4096", value_parser = ring_entries)]
    pub ring_entries: RingEntries,

    // Of the three, this one writes the same pages again soon, which is what finds a page that was
    // not protected again.
    /// What the guest writes: walk (all pages in order, each vCPU its share), random (all pages,
    /// without order) or hot-and-cold (nine stores of ten to a tenth of the pages)
    #[arg(long, value_name = "NAME", default_value_t = Workload::HotAndCold)]
    pub workload: Workload,

    /// Page stores per second of the whole guest, up to 1000000000; 0: as many as it can
    #[arg(long, value_name = "PAGES", default_value_t = 30_000,
          value_parser = clap::value_parser!(u64).range(..=1_000_000_000))]
    pub write_rate: u64,

    /// MiB per second that the copy may take, up to 1000000; 0: as many as it can
    #[arg(long, value_name = "MIB", default_value_t = 256,
          value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    pub bandwidth_mib: u64,

    /// The most rounds while the guest runs, 1 to 1000; one more follows with the guest stopped
    #[arg(long, value_name = "N", default_value_t = 12,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub max_rounds: u32,

    /// The guest is stopped once the link would take no longer than this for what is left, in
    /// milliseconds, up to 60000; 0: once nothing is left, or at the most rounds
    #[arg(long, value_name = "MS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(..=60_000))]
    pub downtime_ms: u64,

    /// Pages that stay open until the last round, whatever they are: auto (half of what the link takes
    /// within --downtime-ms; off if that or --bandwidth-mib is 0), off (every page is protected and sent
    /// anew), or a number. With bitmaps, which need none of these places, any number is as good as another
    #[arg(long, value_name = "auto|off|PAGES", default_value_t = Places::Auto, value_parser = places)]
    pub working_set: Places,

    /// Where there is no hope, limits what the vCPUs dirty: to half of what the link takes, then to
    /// half as much each time. Without it the guest is stopped then. Takes rings
    #[arg(long)]
    pub converge: bool,

    /// The link breaks once, after so many pages of the first round after round 0 that has more, while the guest runs: the
    /// last 64 of them do not arrive. What has not arrived is given back to the dirty log, and the next rounds send it
    #[arg(long, value_name = "PAGES", value_parser = clap::value_parser!(u64).range(1..=MAX_PAGES))]
    pub break_after: Option<u64>,

    /// When the reaper empties the rings
    #[arg(long, value_enum, default_value_t = Policy::Adaptive)]
    pub pacing: Policy,

    /// What the order of the guest's stores comes from
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// The backend that runs the guest
    #[arg(long, value_enum, default_value_t = BackendChoice::Auto)]
    pub backend: BackendChoice,

    /// Shows on stderr how things stand while they go on: redrawn in place on a terminal, else a line
    /// now and then
    #[arg(long)]
    pub watch: bool,

    #[command(flatten)]
    pub teller: Teller,
}

/// The backends to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendChoice {
    /// KVM if /dev/kvm works, by dirty rings or, where it has none, by bitmaps; else the simulated
    /// kernel
    Auto,
    /// KVM, by dirty rings
    Kvm,
    /// KVM, by bitmaps
    Bitmap,
    /// The simulated kernel, with threads for vCPUs
    Sim,
}

fn places(text: &str) -> Result<Places, String> {
    let wanted = |_| "auto, off or a number of pages is wanted".to_string();
    text.parse().map_err(wanted)
}

impl Options {
    /// The guest that is asked for.
    pub fn setup(&self) -> Setup {
        Setup {
            vcpus: self.vcpus,
            ring_entries: self.ring_entries,
            pages: self.memory_mib * PAGES_PER_MIB,
            workload: self.workload,
            seed: self.seed,
            write_rate: self.write_rate,
        }
    }

    /// Whether guest and copy fit into memory: mapping them would succeed anyway, and the kernel
    /// would end some process later.
    pub fn check_memory(&self) -> Result<()> {
        self.check_against(available_mib())
    }

    fn check_against(&self, available: Option<u64>) -> Result<()> {
        let (wanted, both) = (self.memory_mib, 2 * self.memory_mib);
        let Some(available) = available.filter(|&available| both > available) else {
            return Ok(());
        };
        let most = available / 2;
        bail!(
            "a guest of {wanted} MiB and its copy take {both} MiB, and {available} MiB are \
             available: choose a --memory-mib of at most {most}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &str) -> Result<Options, clap::Error> {
        Options::try_parse_from(
            ["live-migration"]
                .into_iter()
                .chain(args.split_whitespace()),
        )
    }

    #[test]
    fn a_working_set_is_of_so_many_pages_or_none() {
        let places = |args| parse(args).map(|options| options.working_set);
        assert_eq!(places("").unwrap(), Places::Auto);
        assert_eq!(places("--working-set off").unwrap(), Places::Off);
        assert_eq!(places("--working-set 7").unwrap(), Places::Pages(7));
        assert!(places("--working-set much").is_err());
    }

    #[test]
    fn memory_must_do_for_guest_and_copy() {
        let available = Some(2048);
        let enough = parse("--memory-mib 1024").unwrap();
        enough.check_against(available).unwrap();
        let error = parse("--memory-mib 1025").unwrap().check_against(available);
        let error = error.unwrap_err().to_string();
        assert!(error.ends_with("a --memory-mib of at most 1024"), "{error}");
        let unknown = parse("--memory-mib 262144").unwrap();
        unknown.check_against(None).unwrap();
    }
}
