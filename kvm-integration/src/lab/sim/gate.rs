// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The order of passes, harvests and resets.

use std::collections::VecDeque;

use super::queue::Actor;

/// As many passes as may be made at a time, for those who ask in the order in which they come: the
/// crate's shards, or QEMU's one lock.
#[derive(Debug)]
pub(super) struct Permits {
    free: usize,
    waiting: VecDeque<Actor>,
}

impl Permits {
    pub(super) fn new(free: usize) -> Self {
        Self {
            free,
            waiting: VecDeque::new(),
        }
    }

    /// Whether `actor` has one now, or must wait until [`release`](Self::release) names it.
    pub(super) fn acquire(&mut self, actor: Actor) -> bool {
        let free = self.free > 0;
        match free {
            true => self.free -= 1,
            false => self.waiting.push_back(actor),
        }
        free
    }

    /// A pass is over. The actor that has its permit now.
    pub(super) fn release(&mut self) -> Option<Actor> {
        let next = self.waiting.pop_front();
        self.free += usize::from(next.is_none());
        next
    }
}

/// What keeps the crate's harvests and resets apart, and combines resets: see its `reset.rs`.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// Passes that harvest.
    harvests: usize,
    /// Somebody resets, or waits for the last harvest to end to do so.
    in_flight: Option<Actor>,
    /// The actors that wait for its end to harvest.
    harvest: Vec<Actor>,
    /// The actors that it serves.
    served: Vec<Actor>,
    /// Rings with entries that are harvested and not reset, and how many entries.
    marked: Vec<usize>,
    entries: u64,
}

/// A reset to be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reset {
    /// Whose thread is in the ioctl.
    pub(super) by: Actor,
    pub(super) entries: u64,
}

impl Gate {
    /// Whether `actor` may harvest its rings now, or must wait until [`open`](Self::open) names it.
    pub(super) fn harvest(&mut self, actor: Actor) -> bool {
        let open = self.in_flight.is_none();
        match open {
            true => self.harvests += 1,
            false => self.harvest.push(actor),
        }
        open
    }

    /// So many entries of this ring are harvested.
    pub(super) fn mark(&mut self, ring: usize, entries: u64) {
        if entries > 0 {
            self.marked.push(ring);
            self.entries += entries;
        }
    }

    /// A harvest is over. The reset that waited for it alone.
    pub(super) fn harvested(&mut self) -> Option<Reset> {
        self.harvests -= 1;
        self.in_flight.and_then(|by| self.start(by))
    }

    /// `actor` wants what it harvested to be reset. The reset that starts now.
    pub(super) fn reset(&mut self, actor: Actor) -> Option<Reset> {
        // What is in flight has started, or will start, after this one's harvests.
        self.served.push(actor);
        match self.in_flight {
            Some(_) => None,
            None => {
                self.in_flight = Some(actor);
                self.start(actor)
            }
        }
    }

    fn start(&mut self, by: Actor) -> Option<Reset> {
        let entries = self.entries;
        (self.harvests == 0).then_some(Reset { by, entries })
    }

    /// The reset is over.
    pub(super) fn open(&mut self) -> Opened {
        self.in_flight = None;
        self.entries = 0;
        Opened {
            recycled: std::mem::take(&mut self.marked),
            served: std::mem::take(&mut self.served),
            harvest: std::mem::take(&mut self.harvest),
        }
    }
}

/// What the end of a reset brings.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Opened {
    /// Rings that have room again.
    pub(super) recycled: Vec<usize>,
    /// Whose passes are over.
    pub(super) served: Vec<Actor>,
    /// The actors that have waited to harvest.
    pub(super) harvest: Vec<Actor>,
}

#[cfg(test)]
mod tests {
    use super::super::queue::Actor::{Reaper, Vcpu};
    use super::*;

    #[test]
    fn a_fifth_pass_waits_for_the_first_to_end() {
        let mut permits = Permits::new(4);
        assert!((0..4).all(|vcpu| permits.acquire(Vcpu(vcpu))));
        assert!(!permits.acquire(Vcpu(4)) && !permits.acquire(Reaper));
        assert_eq!(permits.release(), Some(Vcpu(4)));
        assert_eq!(permits.release(), Some(Reaper));
        assert_eq!(permits.release(), None);
        assert!(permits.acquire(Vcpu(6)));
        assert!(!permits.acquire(Vcpu(7)));
    }

    #[test]
    fn a_reset_waits_for_harvests_and_serves_who_came_meanwhile() {
        let mut gate = Gate::default();
        assert!(gate.harvest(Vcpu(0)) && gate.harvest(Reaper));
        gate.mark(0, 10);
        gate.mark(1, 5);
        assert_eq!(gate.harvested(), None);
        assert_eq!(gate.reset(Vcpu(0)), None, "the reaper harvests still");
        assert!(!gate.harvest(Vcpu(2)), "a reset is about to start");
        let reset = Reset {
            by: Vcpu(0),
            entries: 15,
        };
        assert_eq!(gate.harvested(), Some(reset));
        assert_eq!(gate.reset(Reaper), None, "served by that of vCPU 0");
        let opened = gate.open();
        assert_eq!(opened.recycled, [0, 1]);
        assert_eq!(opened.served, [Vcpu(0), Reaper]);
        assert_eq!(opened.harvest, [Vcpu(2)]);
        assert!(gate.harvest(Vcpu(2)));
        assert_eq!(gate.harvested(), None);
        let reset = Reset {
            by: Vcpu(2),
            entries: 0,
        };
        assert_eq!(gate.reset(Vcpu(2)), Some(reset));
    }
}
