// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the guests write.

use std::ops::Range;

use super::PAGES;
use crate::guest::workload::{Region, Workload, address};
use crate::machine::{Writes, regions};
use crate::random::SplitMix64;

/// Stores of a list that goes to pages by chance: some seconds of them.
const STORES: u64 = 1 << 17;
const SEED: u64 = 1;

/// What a guest writes, of 8,192 pages.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    strum::Display,
    strum::EnumString,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[strum(serialize_all = "kebab-case", parse_err_ty = String, parse_err_fn = unknown)]
pub enum Load {
    /// One vCPU sweeps 1,000 pages, which all find a free place, as fast as it can; one writes 5,000 pages a
    /// second anywhere else.
    HotSet,
    /// Two vCPUs write as fast as they can, nine times of ten to a tenth of the pages.
    HotAndCold,
    /// Two vCPUs sweep 1,500 pages, which the last round has time for.
    SmallSweeps,
    /// Two vCPUs sweep all pages.
    Sweeps,
    /// Two vCPUs write to all pages by Zipf's law, with the exponent 0.99.
    Zipf,
    /// One vCPU writes 50,000 times a second to 1,800 pages, to others after each second; one
    /// writes 300 pages a second anywhere.
    Moving,
    /// One vCPU writes 6,000 pages, each again after 2 s.
    Rewritten,
    /// One vCPU writes 3,800 pages a second, one after the other.
    Stream,
}

fn unknown(name: &str) -> String {
    let names: Vec<&str> = <Load as strum::VariantArray>::VARIANTS
        .iter()
        .map(Into::into)
        .collect();
    format!(
        "no workload is called `{name}`: choose one of {}",
        names.join(", ")
    )
}

impl Load {
    /// What each vCPU writes.
    pub fn writes(self) -> Vec<Writes> {
        let regions = regions(PAGES).map(|(_, region)| region);
        let lists: Vec<(Vec<u64>, u64)> = match self {
            Self::HotSet => vec![((0..1_000).collect(), 0), (any_of(1_000..PAGES), 5_000)],
            Self::HotAndCold => return hot_and_cold(&regions),
            Self::SmallSweeps => sweeps(1_500),
            Self::Sweeps => sweeps(PAGES),
            Self::Zipf => zipf(),
            Self::Moving => {
                let second = |first| (first..first + 1_800).cycle().take(50_000);
                let seconds = (0..4).map(|place| place * PAGES / 4);
                let moving = seconds.flat_map(second).collect();
                vec![(moving, 50_000), (any_of(0..PAGES), 300)]
            }
            Self::Rewritten => vec![((0..6_000).collect(), 3_000)],
            Self::Stream => vec![((0..PAGES).collect(), 3_800)],
        };
        let writes = |(pages, per_second): (Vec<u64>, u64)| writes(&regions, &pages, per_second);
        lists.into_iter().map(writes).collect()
    }
}

/// Each page in turn, half of them of each vCPU.
fn sweeps(pages: u64) -> Vec<(Vec<u64>, u64)> {
    let half = pages / 2;
    vec![((0..half).collect(), 0), ((half..pages).collect(), 0)]
}

/// These pages, without order.
fn any_of(pages: Range<u64>) -> Vec<u64> {
    let mut random = SplitMix64::stream(SEED, pages.start);
    let any = |_| pages.start + random.below(pages.end - pages.start);
    (0..STORES).map(any).collect()
}

fn zipf() -> Vec<(Vec<u64>, u64)> {
    let mut sum = 0.0;
    let up_to = |rank: u64| {
        sum += (rank as f64).powf(-0.99);
        sum
    };
    let sums: Vec<f64> = (1..=PAGES).map(up_to).collect();
    let list = |vcpu| {
        let mut random = SplitMix64::stream(SEED, vcpu);
        let page = |_| {
            let wanted = random.share() * sums[sums.len() - 1];
            let rank = sums.partition_point(|&sum| sum <= wanted) as u64;
            // Hot pages don't lie side by side.
            rank * 2_654_435_761 % PAGES
        };
        (0..STORES).map(page).collect()
    };
    vec![(list(0), 0), (list(1), 0)]
}

fn hot_and_cold(regions: &[Region]) -> Vec<Writes> {
    let list = |vcpu| Writes {
        list: Workload::HotAndCold.addresses(SEED, vcpu, 2, regions, STORES as usize),
        per_second: 0.0,
    };
    vec![list(0), list(1)]
}

/// The list is made longer, from its begin, where it is no multiple of what it must be one of.
fn writes(regions: &[Region], pages: &[u64], per_second: u64) -> Writes {
    let mut writes = Writes {
        list: pages.iter().map(|&page| address(regions, page)).collect(),
        per_second: per_second as f64,
    };
    let granule = match writes.chunk() {
        // A guest without exits writes its progress down after 64 stores, if they divide its list.
        0 => 64,
        chunk => chunk as usize,
    };
    let more = writes.list.len().next_multiple_of(granule) - writes.list.len();
    let first: Vec<u64> = writes.list.iter().copied().cycle().take(more).collect();
    writes.list.extend(first);
    writes
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use strum::VariantArray;

    use super::*;
    use crate::guest::memory::PAGE_SIZE;

    #[test]
    fn lists_are_whole_chunks_of_the_guests_own_pages() {
        let regions = regions(PAGES).map(|(_, region)| region);
        let has = |&gpa: &u64| {
            let end = |region: &Region| region.gpa + region.pages * PAGE_SIZE;
            let mut regions = regions.iter();
            regions.any(|region| (region.gpa..end(region)).contains(&gpa))
        };
        for &load in Load::VARIANTS {
            for writes in load.writes() {
                let chunk = writes.chunk().max(1) as usize;
                assert_eq!(writes.list.len() % chunk, 0, "{load}");
                assert!(writes.list.iter().all(has), "{load}");
            }
        }
    }

    fn distinct(writes: &[Writes]) -> usize {
        let all: HashSet<u64> = writes.iter().flat_map(|w| w.list.iter().copied()).collect();
        all.len()
    }

    #[test]
    fn guests_write_as_many_pages_as_they_say() {
        assert_eq!(distinct(&Load::SmallSweeps.writes()), 1_500);
        assert_eq!(distinct(&Load::Sweeps.writes()), 8_192);
        assert_eq!(distinct(&Load::Rewritten.writes()), 6_000);
        assert_eq!(distinct(&Load::HotSet.writes()[..1]), 1_000);
        assert_eq!(distinct(&Load::Moving.writes()[..1]), 4 * 1_800);
    }

    #[test]
    fn a_few_pages_take_half_of_what_goes_by_zipfs_law() {
        let list = &Load::Zipf.writes()[0].list;
        let mut counts = HashMap::new();
        for gpa in list {
            *counts.entry(gpa).or_insert(0_usize) += 1;
        }
        let mut counts: Vec<usize> = counts.into_values().collect();
        counts.sort_unstable();
        let hot: usize = counts.iter().rev().take(100).sum();
        let share = hot as f64 / list.len() as f64;
        assert!((0.45..0.65).contains(&share), "{share}");
    }
}
