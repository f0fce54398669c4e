// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is to happen, in order of time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::clock::{NEVER, Nanos};

/// Somebody who makes passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Actor {
    /// A vCPU with a full ring.
    Vcpu(usize),
    /// The reaper.
    Reaper,
}

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    /// A vCPU's ring may be full, or its rate change.
    Guest(usize),
    /// A vCPU is back in the guest.
    Entered(usize),
    /// A ring is harvested.
    Harvested(Actor),
    /// The reset in flight is done.
    Reset,
    /// A pass under the one lock is done.
    Unlocked(Actor),
    /// The reaper wakes up, if this is still the wake-up it sleeps towards.
    Wake(u64),
    /// The reaper has looked.
    Looked,
    /// The rings are to be sampled.
    Sample,
    /// The warm-up is over.
    Warm,
    /// All is over.
    End,
}

/// Events by time; those of the same time in the order in which they were added.
#[derive(Debug, Default)]
pub(super) struct Queue {
    heap: BinaryHeap<Reverse<(Nanos, u64, Event)>>,
    added: u64,
}

impl Queue {
    pub(super) fn add(&mut self, at: Nanos, event: Event) {
        if at < NEVER {
            self.added += 1;
            self.heap.push(Reverse((at, self.added, event)));
        }
    }

    pub(super) fn next(&mut self) -> Option<(Nanos, Event)> {
        self.heap.pop().map(|Reverse((at, _, event))| (at, event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_by_time_then_by_age() {
        let mut queue = Queue::default();
        queue.add(5, Event::Reset);
        queue.add(3, Event::Warm);
        queue.add(5, Event::Guest(0));
        queue.add(NEVER, Event::End);
        let order: Vec<_> = std::iter::from_fn(|| queue.next()).collect();
        let expected = [(3, Event::Warm), (5, Event::Reset), (5, Event::Guest(0))];
        assert_eq!(order, expected);
    }
}
