// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One vCPU's ring with its consumer token, and its counts.

use crossbeam_utils::CachePadded;

use crate::limit::account::Limit;
use crate::pacing::RingObservation;
use crate::ring::gauge::Gauge;
use crate::ring::memory::RingMemory;
use crate::ring::view::RingView;
use crate::sync::{AtomicBool, AtomicU64, Counter, Mutex, Ordering, lock};

/// One attached vCPU.
pub(crate) struct Vcpu {
    /// The name of its ring, which no other ring has.
    pub(crate) name: String,
    /// The lock is the consumer's token. No thread waits for anything while it holds it.
    pub(crate) ring: Mutex<RingView>,
    /// The same ring, for other threads.
    memory: RingMemory,
    /// Whether a `VcpuRing` has the right to run it, see [`Vcpu::hold`].
    held: AtomicBool,
    pub(crate) counts: CachePadded<Counts>,
    /// The dirty limit of the vCPU.
    pub(crate) limit: Limit,
}

/// Each is written once per pass or full exit, never per entry.
#[derive(Default)]
pub(crate) struct Counts {
    /// Entries that the consumer has harvested. Only the consumer writes it; other threads find the ring's head by it.
    taken: AtomicU64,
    /// Exits for a full ring.
    pub(crate) full_exits: Counter,
    /// Nanoseconds spent on them.
    pub(crate) stall_ns: Counter,
    /// Entries at which the vCPU stops: an estimate, until a full exit has shown it.
    pub(crate) soft_limit: Counter,
    /// Whether one has shown it.
    limit_is_shown: Counter,
    /// See [`Vcpu::note_look`].
    look: Counter,
}

/// Entries at which the vCPU stops, and whether a full exit has shown that.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct SoftLimit {
    pub(crate) entries: u64,
    is_shown: bool,
}

impl SoftLimit {
    /// The kernel's report, or nearly so.
    pub(crate) fn supposed(entries: u64) -> Self {
        Self {
            entries,
            is_shown: false,
        }
    }
}

/// A ring at one moment.
#[derive(Clone, Copy)]
pub(crate) struct Seen {
    /// Entries taken so far.
    pub(crate) taken: u64,
    /// The kernel's reset index, as far as entries show it.
    pub(crate) reset_index: u32,
    /// Whether all taken entries are recycled.
    pub(crate) all_recycled: bool,
}

impl Vcpu {
    /// For a ring that is assumed to stop its vCPU `reserved` entries before its end.
    pub(crate) fn new(memory: RingMemory, reserved: u32) -> Self {
        let name = memory.name().to_owned();
        let ring = RingView::with_reserve(memory.share(), reserved);
        let counts = Counts::default();
        let prior = ring.entries().saturating_sub(reserved).max(1);
        counts.soft_limit.set(prior.into());
        Self {
            name,
            ring: Mutex::new(ring),
            memory,
            held: AtomicBool::new(false),
            counts: CachePadded::new(counts),
            limit: Limit::default(),
        }
    }

    /// Takes the right to run the vCPU, which has one holder at a time. Returns false if it is taken.
    pub(crate) fn hold(&self) -> bool {
        // Acquire: pairs with the release in `let_go`. The ring itself is under its own lock.
        !self.held.swap(true, Ordering::Acquire)
    }

    /// Returns whether the right is taken at this moment.
    pub(crate) fn is_held(&self) -> bool {
        // Relaxed: nothing is read that it would order.
        self.held.load(Ordering::Relaxed)
    }

    /// Releases the right.
    pub(crate) fn let_go(&self) {
        // Release: pairs with the acquire in `hold`.
        self.held.store(false, Ordering::Release);
    }

    /// Returns the number of entries taken so far.
    pub(crate) fn taken(&self) -> u64 {
        // Acquire: pairs with the release store in `note_taken`, so that the taken entries are seen as taken.
        self.counts.taken.load(Ordering::Acquire)
    }

    /// Notes that the holder of the consumer's token has taken `entries` more. Called before it releases the token, or the right to
    /// harvest. Until then other threads count these entries as waiting.
    pub(crate) fn note_taken(&self, entries: u32) {
        if entries > 0 {
            // Only the token's holder writes it, so nothing is lost between the two.
            let taken = self.taken() + u64::from(entries);
            // Release: pairs with the acquire load in `taken`.
            self.counts.taken.store(taken, Ordering::Release);
        }
    }

    /// Returns the state of its ring.
    pub(crate) fn seen(&self) -> Seen {
        let mut ring = lock(&self.ring);
        Seen {
            taken: self.taken(),
            reset_index: ring.reset_index(),
            all_recycled: ring.all_recycled(),
        }
    }

    /// Returns whether the kernel has overrun its ring.
    pub(crate) fn is_broken(&self) -> bool {
        self.memory.is_broken()
    }

    /// Returns whether at least `count` entries wait in the ring. Any thread may call it at any time, and no thread waits for it.
    pub(crate) fn at_least(&self, count: u32) -> bool {
        let mut taken = self.taken();
        loop {
            let at_least = self.gauge(taken).at_least(count);
            // From a head that has moved on, entries that were taken long ago would count.
            let now = self.taken();
            if now == taken {
                return at_least;
            }
            taken = now;
        }
    }

    /// Returns the entries that wait in the ring, and those taken so far; the sum is what the vCPU has logged. Any thread may call it at
    /// any time, and no thread waits for it.
    pub(crate) fn occupancy(&self) -> (u32, u64) {
        let mut taken = self.taken();
        loop {
            let waiting = self.gauge(taken).occupancy();
            // Entries that were taken meanwhile may have been recycled, and look like room.
            let now = self.taken();
            if now == taken {
                return (waiting, taken);
            }
            taken = now;
        }
    }

    /// Notes a look at the ring, at which `waiting` entries waited behind `taken`, all of which had been recycled before that was
    /// counted.
    fn note_look(&self, taken: u64, waiting: u32) {
        // In one word, so that the two belong together. Zero stands for no look.
        self.counts.look.set(taken << 32 | u64::from(waiting + 1));
    }

    /// Returns whether the vCPU's exit, which its thread handles, saw nothing in the ring but the last `entries` that were taken. If so many
    /// had not been logged by the last look, the vCPU left the guest after it; and by then all entries before these had been
    /// recycled.
    pub(crate) fn exit_saw_only(&self, entries: u32) -> bool {
        let look = self.counts.look.get();
        let Some(waiting) = (look as u32).checked_sub(1) else {
            return false;
        };
        let since = (self.taken() as u32).wrapping_sub((look >> 32) as u32);
        since == entries && entries > waiting
    }

    /// Returns the number of entries that the vCPU has logged so far.
    pub(crate) fn logged(&self) -> u64 {
        let (waiting, taken) = self.occupancy();
        taken + u64::from(waiting)
    }

    /// Sleeps off the vCPU's debt by its limit, on its thread, out of the guest.
    pub(crate) fn pay(&self) -> core::time::Duration {
        self.limit.pay(|| self.logged())
    }

    fn gauge(&self, taken: u64) -> Gauge<'_> {
        let first = self.memory.first_index();
        Gauge::new(&self.memory, first.wrapping_add(taken as u32))
    }

    /// Returns the state of the ring for a pacing policy.
    pub(crate) fn observe(&self) -> RingObservation {
        let before = self.taken();
        let all_recycled = self.gauge(before).all_recycled();
        let (waiting, taken) = self.occupancy();
        if all_recycled && taken == before {
            self.note_look(taken, waiting);
        }
        RingObservation {
            entries: self.memory.entries().into(),
            soft_limit: self.counts.soft_limit.get(),
            waiting: waiting.into(),
            taken,
            full_exits: self.counts.full_exits.get(),
            logged: 0,
            rate: 0.0,
        }
    }

    /// Learns the soft limit from a full exit that found `present` entries, with no others outstanding. The first such exit replaces the
    /// estimate. From then on the least counts: with page-modification logging an exit finds the limit plus what the flush of the
    /// hardware's buffer has added.
    pub(crate) fn learn_soft_limit(&self, present: u32) {
        let SoftLimit { entries, is_shown } = self.soft_limit();
        let least = if is_shown {
            entries.min(present.into())
        } else {
            present.into()
        };
        self.set_soft_limit(SoftLimit {
            entries: least,
            is_shown: true,
        });
    }

    pub(crate) fn soft_limit(&self) -> SoftLimit {
        SoftLimit {
            entries: self.counts.soft_limit.get(),
            is_shown: self.counts.limit_is_shown.get() > 0,
        }
    }

    pub(crate) fn set_soft_limit(&self, limit: SoftLimit) {
        self.counts.soft_limit.set(limit.entries);
        self.counts.limit_is_shown.set(limit.is_shown.into());
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use super::*;
    use crate::ring::producer::Producer;

    /// Taken entries are counted on for ever, and the ring's indices wrap at 2^32, whatever the first index.
    #[test]
    fn an_onlooker_finds_the_head_after_any_number_of_entries() {
        for first_index in [0, 5, u32::MAX - 5] {
            for laps in 0..3u64 {
                for ahead in 0..20 {
                    let producer = Producer::new(8, first_index);
                    let vcpu = Vcpu::new(producer.memory(), 1);
                    for _ in 0..laps {
                        // 2^32 entries, after which the head is where it was.
                        vcpu.note_taken(u32::MAX);
                        vcpu.note_taken(1);
                    }
                    for page in 0..ahead {
                        producer.push(0, page);
                        vcpu.note_taken(lock(&vcpu.ring).harvest(|_, _| ()));
                        producer.recycle(1, |_, _| ());
                    }
                    let taken = (laps << 32) + ahead;
                    assert_eq!(vcpu.occupancy(), (0, taken));
                    (0..3).for_each(|page| producer.push(0, page));
                    assert_eq!(vcpu.occupancy(), (3, taken));
                    assert!(vcpu.at_least(3) && !vcpu.at_least(4));
                }
            }
        }
    }
}
