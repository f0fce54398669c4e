// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which pages a vCPU stores to, in what order.

use crate::guest::memory::PAGE_SIZE;
use crate::random::SplitMix64;

/// A run of guest pages that is there to be dirtied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The guest-physical address of the first page, in bytes.
    pub gpa: u64,
    /// How many pages of 4 KiB follow.
    pub pages: u64,
}

/// A pattern of page stores.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, strum::Display, strum::EnumString, strum::IntoStaticStr,
)]
#[strum(serialize_all = "kebab-case", parse_err_ty = String, parse_err_fn = unknown)]
pub enum Workload {
    /// Each vCPU walks its own contiguous share of the pages, in order.
    Walk,
    /// All vCPUs store to all pages, in an order without order.
    Random,
    /// Nine stores of ten go to one contiguous tenth of the pages, the tenth one to the rest, in
    /// an order without order; all vCPUs share both.
    HotAndCold,
}

fn unknown(name: &str) -> String {
    format!("no workload is called `{name}`: choose walk, random or hot-and-cold")
}

impl Workload {
    /// Every workload.
    pub const ALL: [Self; 3] = [Self::Walk, Self::Random, Self::HotAndCold];

    /// The shortest list, in entries, with which `vcpus` vCPUs together store to every one of
    /// `pages` pages at each pass; rounded up to a multiple of `chunk` (0 counts as 1).
    pub fn covering_length(self, pages: u64, vcpus: u32, chunk: u32) -> usize {
        let share = |pages: u64| pages.div_ceil(u64::from(vcpus.max(1)));
        let length = match self {
            Self::Walk | Self::Random => share(pages),
            Self::HotAndCold => {
                let hot = hot_pages(pages);
                (share(hot) * 10).div_ceil(9).max(share(pages - hot) * 10)
            }
        };
        length.max(1).next_multiple_of(u64::from(chunk.max(1))) as usize
    }

    /// The guest-physical addresses of the pages that vCPU `vcpu` of `vcpus` stores to in one
    /// pass, `length` of them; a function of the arguments alone.
    ///
    /// The lists of all vCPUs together hold every page of `regions` if `length` is at least
    /// [`covering_length`](Self::covering_length). A longer list repeats pages, a shorter one
    /// leaves some out. Without any page the list is empty.
    pub fn addresses(
        self,
        seed: u64,
        vcpu: u32,
        vcpus: u32,
        regions: &[Region],
        length: usize,
    ) -> Vec<u64> {
        let pages: u64 = regions.iter().map(|region| region.pages).sum();
        if pages == 0 {
            return Vec::new();
        }
        let vcpus = vcpus.max(1);
        let mut rng = SplitMix64(SplitMix64(seed).next() ^ (u64::from(vcpu) << 32 | 1));
        let indices = match self {
            Self::Walk => {
                let bound = |vcpu: u32| pages * u64::from(vcpu) / u64::from(vcpus);
                let first = bound(vcpu).min(pages - 1);
                let end = bound(vcpu + 1).clamp(first + 1, pages);
                (first..end).cycle().take(length).collect()
            }
            Self::Random => draw(&mut rng, pages, vcpu, vcpus, length),
            Self::HotAndCold => {
                let hot = hot_pages(pages);
                let hot_length = if hot == pages {
                    length
                } else {
                    length - length / 10
                };
                let mut list = draw(&mut rng, hot, vcpu, vcpus, hot_length);
                let cold = draw(&mut rng, pages - hot, vcpu, vcpus, length - hot_length);
                list.extend(cold.into_iter().map(|page| hot + page));
                rng.shuffle(&mut list);
                // Where the hot tenth starts is the same for all vCPUs.
                let start = SplitMix64(!seed).below(pages);
                list.iter_mut()
                    .for_each(|page| *page = (*page + start) % pages);
                list
            }
        };
        indices
            .into_iter()
            .map(|index| address(regions, index))
            .collect()
    }
}

fn hot_pages(pages: u64) -> u64 {
    pages.div_ceil(10)
}

/// `length` of `pages` pages, in random order: this vCPU's share of them as far as it fits, so
/// that all vCPUs cover them all, and any of them beyond that.
fn draw(rng: &mut SplitMix64, pages: u64, vcpu: u32, vcpus: u32, length: usize) -> Vec<u64> {
    let share = (u64::from(vcpu)..pages).step_by(vcpus as usize);
    let mut list: Vec<u64> = share.collect();
    rng.shuffle(&mut list);
    list.truncate(length);
    while list.len() < length {
        list.push(rng.below(pages));
    }
    rng.shuffle(&mut list);
    list
}

/// The guest-physical address of page `index` of all regions.
pub(crate) fn address(regions: &[Region], mut index: u64) -> u64 {
    for region in regions {
        if index < region.pages {
            return region.gpa + index * PAGE_SIZE;
        }
        index -= region.pages;
    }
    unreachable!("an index is below the number of pages of all regions");
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const REGIONS: [Region; 2] = [
        Region {
            gpa: 1 << 30,
            pages: 700,
        },
        Region {
            gpa: 4 << 30,
            pages: 301,
        },
    ];

    #[test]
    fn lists_cover_every_page_and_nothing_else() {
        for workload in Workload::ALL {
            for vcpus in [1, 2, 3, 8, 32] {
                let length = workload.covering_length(1001, vcpus, 16);
                let list = |vcpu| workload.addresses(9, vcpu, vcpus, &REGIONS, length);
                let mut seen = HashSet::new();
                for vcpu in 0..vcpus {
                    assert_eq!(list(vcpu).len(), length);
                    assert_eq!(
                        list(vcpu),
                        list(vcpu),
                        "{workload} is not a function of its seed"
                    );
                    seen.extend(list(vcpu));
                }
                let wanted = (0..1001).map(|index| address(&REGIONS, index));
                assert_eq!(seen, wanted.collect(), "{workload} with {vcpus} vCPUs");
            }
        }
    }

    #[test]
    fn more_vcpus_than_pages_still_have_lists() {
        let regions = [Region { gpa: 0, pages: 3 }];
        for workload in Workload::ALL {
            for vcpu in 0..8 {
                assert_eq!(workload.addresses(1, vcpu, 8, &regions, 16).len(), 16);
            }
        }
        assert!(Workload::Walk.addresses(1, 0, 1, &[], 16).is_empty());
    }

    #[test]
    fn nine_stores_of_ten_are_hot() {
        let regions = [Region {
            gpa: 0,
            pages: 1000,
        }];
        let list = Workload::HotAndCold.addresses(3, 0, 1, &regions, 20_000);
        let start = SplitMix64(!3).below(1000);
        let hot = list
            .iter()
            .filter(|&&gpa| (gpa / PAGE_SIZE + 1000 - start) % 1000 < 100);
        assert_eq!(hot.count(), 18_000);
    }
}
