//! One producer, one consumer.

use super::model;
use crate::ring::producer::Producer;
use crate::ring::view::RingView;
use crate::sync::{Arc, thread};

/// The kernel pushes four pages through a ring of two and recycles between; whatever the consumer
/// sees, it sees in order and whole. Payloads are race-checked: a missing ordering is a data race.
fn pages_arrive_in_order(first_index: u32) {
    model(3, move || {
        const PAGES: u64 = 4;
        let ring = Arc::new(Producer::new(2, first_index));
        let mut view = RingView::new(ring.memory());
        let kernel = thread::spawn({
            let ring = Arc::clone(&ring);
            move || {
                let mut pushed = 0;
                for _ in 0..2 * PAGES {
                    if pushed < PAGES && ring.used() < 2 {
                        ring.push(pushed as u32, 10 + pushed);
                        pushed += 1;
                    } else {
                        ring.recycle(1, |slot, page| assert_eq!(page, u64::from(slot) + 10));
                    }
                }
                pushed
            }
        });
        let mut seen = 0;
        let mut harvest = |view: &mut RingView| {
            view.harvest(|slot, page| {
                assert_eq!((slot, page), (seen as u32, 10 + seen));
                seen += 1;
            })
        };
        harvest(&mut view);
        harvest(&mut view);
        let pushed = kernel.join().unwrap();
        harvest(&mut view);
        assert_eq!(seen, pushed, "an entry was lost");
    });
}

#[test]
fn ring_spsc() {
    pages_arrive_in_order(0);
}

#[test]
fn ring_spsc_where_the_index_wraps() {
    pages_arrive_in_order(u32::MAX - 1);
}

/// A kernel that needs no help, as it only seems to find nothing, fills an entry that is marked to help it. Under
/// shuttle alone: loom has a compare-exchange miss a store that came before it.
#[cfg(not(feature = "loom"))]
#[test]
fn reach_back_beside_a_producer() {
    model(3, || {
        let ring = Arc::new(Producer::new(4, 0));
        let mut view = RingView::new(ring.memory());
        (0..2).for_each(|page| ring.push(0, page));
        assert_eq!(view.harvest(|_, _| ()), 2);
        let vcpu = thread::spawn({
            let ring = Arc::clone(&ring);
            move || (2..4).for_each(|page| ring.push(0, page))
        });
        let mut lies = 2;
        view.reach_back(true, || {
            lies -= 1;
            lies > 0 || ring.recycle(4, |_, page| assert!(page < 2)) == 0
        });
        vcpu.join().unwrap();
        let mut seen = Vec::new();
        view.harvest(|_, page| seen.push(page));
        assert_eq!(seen, [2, 3], "an entry was lost");
        // None was left marked, or the next reset would recycle more.
        ring.recycle(4, |_, _| ());
        assert_eq!(ring.used(), 0);
    });
}

/// Entries are marked to help a kernel that only seems to stay behind, the head's among them, and freed again.
/// An onlooker takes none for logged. Under shuttle alone, as above.
#[cfg(not(feature = "loom"))]
#[test]
fn reach_back_beside_an_onlooker() {
    model(3, || {
        let ring = Arc::new(Producer::new(4, 0));
        let mut view = RingView::new(ring.memory());
        ring.push(0, 0);
        assert_eq!(view.harvest(|_, _| ()), 1);
        let memory = ring.memory();
        let helper = thread::spawn(move || view.reach_back(true, || true));
        for _ in 0..10 {
            let waiting = crate::ring::gauge::Gauge::new(&memory, 1).occupancy();
            assert_eq!(waiting, 0, "entries were seen that nobody logged");
        }
        assert!(!helper.join().unwrap());
    });
}

/// A consumer that scans for a gap beside a running producer finds none, for there is none.
#[test]
fn rejoin_beside_a_producer() {
    model(3, || {
        let ring = Arc::new(Producer::new(4, 0));
        let mut view = RingView::new(ring.memory());
        let kernel = thread::spawn({
            let ring = Arc::clone(&ring);
            move || (0..3).for_each(|page| ring.push(0, page))
        });
        let gap = view.rejoin(|_, _| ());
        assert_eq!(gap, 0, "a page was passed over");
        let before = view.harvest(|_, _| ());
        kernel.join().unwrap();
        assert_eq!(before + view.harvest(|_, _| ()), 3);
    });
}
