// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest addresses of slots' pages, against a map that has every page.

use std::collections::{BTreeMap, BTreeSet};

use kvm_dirty_ring::error::GuestMapError;
use kvm_dirty_ring::sim::{SimConfig, SimVm};
use kvm_dirty_ring::{DirtyPages, GuestMap, GuestRegion, Run, SlotId};
use proptest::prelude::*;

fn page_size() -> u64 {
    // SAFETY: it takes an integer.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as u64 }
}

fn region(id: u16, page: u64, pages: u64) -> GuestRegion {
    GuestRegion {
        slot: SlotId::new(0, id),
        address: page * page_size(),
        pages,
    }
}

/// Regions one after the other, with gaps of so many pages before them; their ids in disorder.
fn regions() -> impl Strategy<Value = Vec<GuestRegion>> {
    let sizes = prop::collection::vec((0..4u64, 1..6u64), 1..8);
    (sizes, any::<u16>()).prop_map(|(sizes, mix)| {
        let mut next = 0;
        let place = |(n, (gap, pages))| {
            let at = next + gap;
            next = at + pages;
            region(mix.wrapping_add(n).wrapping_mul(0x9e37), at, pages)
        };
        (0..).zip(sizes).map(place).collect()
    })
}

proptest! {
    /// Against each page by itself.
    #[test]
    fn addresses_lead_to_the_pages_that_they_touch(
        regions in regions().prop_shuffle(),
        (first, last) in (0..80u64, 0..80u64),
        // From a page's begin, from behind it, and from its last byte on.
        offsets in prop::array::uniform2(prop_oneof![Just(0), Just(1), Just(page_size() - 1)]),
    ) {
        let map = GuestMap::new(regions).unwrap();
        let range = first * page_size() + offsets[0]..last * page_size() + offsets[1];
        let runs: Vec<_> = map.runs(range.clone()).collect();
        prop_assert!(runs.iter().all(|run| run.pages > 0), "{runs:?}");
        let found = runs.iter().flat_map(|run| {
            (run.first_page..run.first_page + run.pages).map(move |page| (run.slot, page))
        });
        let is_touched = |page: &u64| {
            let begin = page * page_size();
            !range.is_empty() && begin < range.end && range.start < begin + page_size()
        };
        let touched = (0..80).filter(is_touched);
        let expected = touched.filter_map(|page| map.locate(page * page_size()));
        prop_assert_eq!(found.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    }

    #[test]
    fn it_is_as_a_table_of_all_pages(regions in regions().prop_shuffle()) {
        let map = GuestMap::new(regions.iter().copied()).unwrap();
        let mut pages = BTreeMap::new();
        for region in &regions {
            for page in 0..region.pages {
                pages.insert(region.address / page_size() + page, (region.slot, page));
            }
        }
        for page in 0..80 {
            for offset in [0, 1, page_size() - 1] {
                let found = map.locate(page * page_size() + offset);
                prop_assert_eq!(found, pages.get(&page).copied());
            }
        }
        for region in &regions {
            for first_page in 0..8 {
                for count in 1..8 {
                    let run = Run { slot: region.slot, first_page, pages: count };
                    // Page by page.
                    let addresses = (first_page..first_page + count).map(|page| {
                        let is_it = |(_, found): &(_, &_)| *found == &(region.slot, page);
                        pages.iter().find(is_it).map(|(at, _)| at * page_size())
                    });
                    let addresses: Option<Vec<_>> = addresses.collect();
                    let range = map.range(run);
                    let expected = addresses.map(|all| all[0]..all[0] + count * page_size());
                    prop_assert_eq!(range, expected);
                }
            }
        }
    }
}

#[test]
fn regions_that_no_guest_has_are_refused() {
    let page = page_size();
    let last = u64::MAX / page;
    for (address, pages) in [
        (1, 1),
        (page / 2, 1),
        (0, 0),
        (0, 1 << 31),
        (0, u64::MAX),
        (last * page, 1),
        ((last - 1) * page, 2),
    ] {
        let slot = SlotId::new(0, 3);
        let refused = GuestMap::new([GuestRegion {
            slot,
            address,
            pages,
        }]);
        let error = GuestMapError::Region {
            slot,
            address,
            pages,
        };
        assert_eq!(refused.unwrap_err(), error);
    }
    GuestMap::new([region(0, last - 1, 1)]).unwrap();
    GuestMap::new([region(0, 0, (1 << 31) - 1)]).unwrap();
}

#[test]
fn what_two_regions_share_is_refused() {
    let slots = [SlotId::new(0, 1), SlotId::new(0, 0)];
    for (page, pages) in [(9, 2), (8, 3), (0, 11), (0, 100), (10, 1), (14, 1)] {
        let refused = GuestMap::new([region(0, 10, 5), region(1, page, pages)]);
        let mut expected = slots;
        if page >= 10 {
            expected.sort();
        }
        let expected = GuestMapError::Overlap { slots: expected };
        assert_eq!(refused.unwrap_err(), expected, "{page} + {pages}");
    }
    for (page, pages) in [(0, 10), (15, 1)] {
        GuestMap::new([region(0, 10, 5), region(1, page, pages)]).unwrap();
    }
    let twice = GuestMap::new([region(0, 10, 5), region(1, 20, 5), region(0, 30, 5)]);
    let slot = SlotId::new(0, 0);
    assert_eq!(twice.unwrap_err(), GuestMapError::Twice { slot });
}

#[test]
fn runs_of_another_map_have_no_range() {
    let map = GuestMap::new([region(0, 10, 5)]).unwrap();
    let range = |id, first_page, pages| {
        let slot = SlotId::new(0, id);
        map.range(Run {
            slot,
            first_page,
            pages,
        })
    };
    assert_eq!(range(0, 0, 5), Some(10 * page_size()..15 * page_size()));
    assert_eq!(range(0, 0, 6), None);
    assert_eq!(range(0, 5, 1), None);
    assert_eq!(range(0, u64::MAX, 2), None);
    assert_eq!(range(1, 0, 1), None);
}

/// Ranges against pages one by one, in slots that adjoin or not, in parts, of any size.
#[test]
fn ranges_are_what_is_dirty_by_address() {
    let page = page_size();
    let slots = [
        (SlotId::new(0, 5), 100, 130),
        (SlotId::new(0, 1), 230, 64),
        (SlotId::new(0, 9), 300, 70),
    ];
    let log = SimVm::new(SimConfig::default()).dirty_log();
    for (slot, _, pages) in slots {
        log.add_slot(slot, pages).unwrap();
    }
    let region = |(slot, first, pages)| GuestRegion {
        slot,
        address: first * page,
        pages,
    };
    let map = GuestMap::new(slots.map(region)).unwrap();
    let mut dirty = DirtyPages::new();
    for step in [1, 2, 3, 7, 63, 64, 65] {
        for (slot, _, pages) in slots {
            for first in (0..pages).step_by(step) {
                log.mark_dirty(slot, first, (step as u64).div_ceil(2).min(pages - first))
                    .unwrap();
            }
        }
        log.sync(&mut dirty).unwrap();
        let expected: BTreeSet<u64> = dirty
            .runs()
            .flat_map(|run| {
                let range = map.range(run).unwrap();
                range.step_by(page as usize)
            })
            .collect();
        for most in [1, 2, 5, 64, u64::MAX] {
            let mut found = BTreeSet::new();
            let mut last = 0;
            for range in map.ranges(dirty.part(), most).unwrap() {
                assert!(range.start >= last && range.start < range.end);
                let pages = (range.end - range.start) / page;
                assert!(pages <= most);
                let adjoins = range.start == last && last > 0;
                assert!(!adjoins || most < u64::MAX, "two ranges that are one");
                last = range.end;
                found.extend(range.step_by(page as usize));
            }
            assert_eq!(found, expected, "each {step}, at most {most}");
            let (left, right) = dirty.part().split();
            let parts = [Some(left), right].into_iter().flatten();
            let parts: Vec<u64> = parts
                .flat_map(|part| {
                    let ranges = map.ranges(part, most).unwrap();
                    ranges
                        .flat_map(|range| range.step_by(page as usize))
                        .collect::<Vec<_>>()
                })
                .collect();
            assert_eq!(parts.len(), expected.len());
        }
    }
    assert!(matches!(
        map.ranges(dirty.part(), 0).err(),
        Some(GuestMapError::NoPages)
    ));
    let other = GuestMap::new([
        region(slots[0]),
        region((slots[1].0, 230, 63)),
        region(slots[2]),
    ])
    .unwrap();
    log.mark_dirty(slots[1].0, 63, 1).unwrap();
    log.sync(&mut dirty).unwrap();
    let refused = other.ranges(dirty.part(), 1).err();
    assert!(matches!(refused, Some(GuestMapError::Unmapped { slot }) if slot == slots[1].0));
}
