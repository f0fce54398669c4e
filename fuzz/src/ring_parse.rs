// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Anything at all as ring memory, and a kernel that changes it under the reader.
//!
//! What is in the rings, what resets do to them and what they say is all up to the script. The
//! [`World`] looks on: it knows the rings as the kernel's side left them, so it sees what the log
//! has marked, and holds the log to it.

mod script;
mod view;
mod world;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_dirty_ring::error::{FullError, SlotError};
use kvm_dirty_ring::{DirtyLog, DirtyPages, Kernel, Recycled, RetiredSlot, SlotId, VcpuRing};

use crate::common::shape::pages_of;
pub use script::Script;
use script::{Answer, Op};
use world::World;

/// The kernel's side of the world.
#[derive(Clone)]
struct Wild(Arc<Mutex<World>>);

impl Wild {
    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }
}

impl Kernel for Wild {
    fn reset(&self) -> io::Result<Recycled> {
        let mut world = self.world();
        world.note_marks();
        let reaction = world.reactions.pop_front().unwrap_or_default();
        let answer = match reaction.answer {
            Answer::Error(number) => {
                world.failures += 1;
                Err(io::Error::from_raw_os_error(number))
            }
            Answer::Recycle(limit) => Ok(world.recycle(limit)),
            Answer::Lie(count) => {
                world.recycle(u32::MAX);
                Ok(count)
            }
        };
        if let Ok(count) = answer {
            world.note_reset(count);
        }
        for change in &reaction.changes {
            world.change(change);
        }
        world.write_off();
        answer.map(Recycled::from)
    }

    fn reserved_entries(&self) -> u32 {
        1
    }
}

struct Machine {
    wild: Wild,
    log: DirtyLog,
    rings: Vec<VcpuRing>,
    retired: Vec<RetiredSlot>,
    dirty: DirtyPages,
}

/// Runs the script.
pub fn run(script: &Script) {
    if script.view {
        view::run(script);
        return;
    }
    let wild = Wild(Arc::new(Mutex::new(World::new(script.entries))));
    let log = DirtyLog::with_kernel(Box::new(wild.clone()), script.entries);
    let mut machine = Machine {
        wild,
        log,
        rings: Vec::new(),
        retired: Vec::new(),
        dirty: DirtyPages::new(),
    };
    machine.apply(&Op::Attach(script.memory.clone()));
    for op in &script.ops {
        machine.apply(op);
        machine.assert_occupancy();
    }
    // From here on the kernel does what it says.
    machine.wild.world().reactions.clear();
    machine.sync();
    machine.sync();
}

impl Machine {
    fn apply(&mut self, op: &Op) {
        match op {
            Op::Change(change) => self.wild.world().change(change),
            Op::React(reaction) => {
                let mut world = self.wild.world();
                world.reactions.push_back(reaction.clone());
            }
            Op::Attach(memory) => {
                if self.rings.len() < 3 {
                    let memory = self.wild.world().attach(memory);
                    self.rings.push(self.log.attach_ring(memory).unwrap());
                }
            }
            Op::Reap => self.harvest(|_| true, |machine| machine.log.reap().is_ok()),
            Op::ReapRings(bits) => {
                let wanted = [0, 1, 2].map(|ring| bits >> ring & 1 == 1);
                let reap = |machine: &mut Self| machine.log.reap_rings(&wanted).is_ok();
                self.harvest(|ring| wanted[ring], reap);
            }
            Op::ReapOnShard(shard) => {
                let reap = |machine: &mut Self| machine.log.reap_on_shard(*shard).is_ok();
                self.harvest(|_| true, reap);
            }
            Op::OnFull(ring) => {
                let own = ring % self.rings.len();
                // A script's ring need not hold what its vCPU would stop at, nor a kernel recycle it.
                let full = |machine: &mut Self| {
                    let result = machine.rings[own].on_full();
                    !matches!(result, Err(FullError::Reset(_)))
                };
                self.harvest(|ring| ring == own, full);
            }
            Op::HarvestAndStop(ring) => {
                let own = ring % self.rings.len();
                let stop = |machine: &mut Self| {
                    machine.rings[own].harvest_and_stop();
                    true
                };
                self.harvest(|ring| ring == own, stop);
            }
            Op::Sync => self.sync(),
            Op::Add(slot, pages) => self.add(*slot, *pages),
            Op::Retire(slot) => self.retire(*slot),
            Op::Finish(which) => self.finish(*which),
            Op::Mark(slot, first, pages) => {
                let marked = self.log.mark_dirty(*slot, *first, *pages).is_ok();
                let expected = self.wild.world().device_write(*slot, *first, *pages);
                assert_eq!(marked, expected, "{slot} {first} {pages}");
            }
            Op::Rearmed(slot) => {
                let result = self.log.rearmed(*slot);
                let is_refused = matches!(result, Err(SlotError::BrokenRing { .. }));
                assert_eq!(is_refused, self.is_broken());
                if !is_refused {
                    assert_eq!(result.is_ok(), self.wild.world().rearmed(*slot));
                }
            }
        }
    }

    /// Calls what harvests the rings that `wanted` wants and resets them; it may only fail if the
    /// kernel did.
    fn harvest(&mut self, wanted: impl Fn(usize) -> bool, call: impl FnOnce(&mut Self) -> bool) {
        self.wild.world().begin_call(wanted);
        let done = call(self);
        let mut heads = Vec::new();
        self.log.observe(&mut heads);
        let mut world = self.wild.world();
        world.end_call(heads.iter().map(|ring| ring.taken));
        assert!(done || world.failures > 0, "failed for no reason");
        world.assert_counts(&self.log.stats());
    }

    fn is_broken(&self) -> bool {
        self.log.stats().overruns > 0
    }

    fn sync(&mut self) {
        let was_broken = self.is_broken();
        let mut synced = false;
        self.harvest(
            |_| true,
            |machine| {
                synced = machine.log.sync(&mut machine.dirty).is_ok();
                synced
            },
        );
        if !synced {
            assert!(self.dirty.is_empty(), "pages of a sync that failed");
            return;
        }
        let mut world = self.wild.world();
        let reported = pages_of(&self.dirty, &world.slots);
        world.judge(&reported, &self.log.stats());
        let all: u64 = world.slots.values().sum();
        assert!(
            !was_broken || self.dirty.page_count() == all,
            "a ring is broken, and not all is reported"
        );
    }

    fn add(&mut self, slot: SlotId, pages: u64) {
        let is_late = self.log.stats().unknown_slot_entries > 0;
        let mut world = self.wild.world();
        let possible = slot.address_space() < 2 && (1..1 << 31).contains(&pages);
        let expected = possible && !world.slots.contains_key(&slot);
        if expected {
            world.add(slot, pages, is_late);
        }
        drop(world);
        // It harvests if there were entries of unknown slots, for these may be of this one.
        let mut added = false;
        self.harvest(
            |_| expected && is_late,
            |machine| {
                let result = machine.log.add_slot(slot, pages);
                added = result.is_ok();
                let is_left = || machine.wild.world().awaits_reset_of(slot, 0);
                match result {
                    Err(SlotError::Reset(_)) => {
                        expected && is_left() || machine.wild.world().failures > 0
                    }
                    result => result.is_ok() == expected,
                }
            },
        );
        if expected && !added {
            self.wild.world().forget(slot);
        }
    }

    fn retire(&mut self, slot: SlotId) {
        let tracked = self.wild.world().slots.contains_key(&slot);
        let mut result = None;
        self.harvest(
            |_| tracked,
            |machine| {
                let retired = result.insert(machine.log.retire_slot(slot));
                !matches!(retired, Err(SlotError::Reset(_)))
            },
        );
        match result.unwrap() {
            Ok(again) if self.retired.iter().any(|retired| retired.id() == slot) => {
                assert_eq!(again.id(), slot);
            }
            Ok(retired) => self.retired.push(retired),
            Err(SlotError::Reset(_)) => {}
            Err(SlotError::Unknown { .. }) => assert!(!tracked),
            Err(error) => panic!("{error}"),
        }
    }

    fn finish(&mut self, which: usize) {
        if self.retired.is_empty() {
            return;
        }
        let retired = self.retired.swap_remove(which % self.retired.len());
        let mut result = None;
        self.harvest(
            |_| true,
            |machine| {
                let finished = result.insert(machine.log.finish_slot(&retired));
                // A kernel that never recycles the slot's entries keeps its id from being used again.
                finished.is_ok() || machine.wild.world().awaits_reset_of(retired.id(), 0)
            },
        );
        if result.unwrap().is_err() {
            self.retired.push(retired);
            return;
        }
        self.wild.world().forget(retired.id());
        let again = self.log.finish_slot(&retired);
        assert!(matches!(again, Err(SlotError::Unknown { .. })));
    }

    /// Onlookers see no nonsense, and the truth where there is one.
    fn assert_occupancy(&self) {
        let mut seen = Vec::new();
        self.log.observe(&mut seen);
        let world = self.wild.world();
        for ((seen, ring), truth) in seen.iter().zip(&self.rings).zip(world.occupancy()) {
            assert!(seen.waiting <= world.entries.into(), "{seen:?}");
            assert_eq!(u64::from(ring.occupancy()), seen.waiting);
            for count in [0, 1, world.entries, world.entries + 1, u32::MAX] {
                let at_least = ring.at_least(count);
                assert!(count > 0 || at_least);
                assert!(count <= world.entries || !at_least);
            }
            if let Some(truth) = truth {
                assert_eq!(seen.waiting, u64::from(truth));
                assert!(ring.at_least(truth) && !ring.at_least(truth + 1));
            }
        }
    }
}
