// SPDX-License-Identifier: Apache-2.0 OR MIT
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

/// A consumer that scans for a gap beside a running producer finds none, for there is none.
#[test]
fn a_look_for_a_gap_beside_a_producer() {
    model(3, || {
        let ring = Arc::new(Producer::new(4, 0));
        let mut view = RingView::new(ring.memory());
        let kernel = thread::spawn({
            let ring = Arc::clone(&ring);
            move || (0..3).for_each(|page| ring.push(0, page))
        });
        assert!(!view.breaks_at_a_gap(), "the ring was taken for broken");
        let before = view.harvest(|_, _| ());
        kernel.join().unwrap();
        assert_eq!(before + view.harvest(|_, _| ()), 3);
    });
}
