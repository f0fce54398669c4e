//! Guest addresses of slots' pages, against a map that has every page.

use std::collections::BTreeMap;

use kvm_dirty_ring::error::GuestMapError;
use kvm_dirty_ring::{GuestMap, GuestRegion, Run, SlotId};
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
