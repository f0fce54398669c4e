// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pages that stay open: what a migration copies is whole though it copies members in its last round alone.

use super::kernel::{Copy, Fault, Machine, SLOT, State};
use super::model;
use crate::ring::entry::NO_SLOT;
use crate::sync::{Arc, lock, thread};
use crate::{DirtyLog, DirtyPages, LastPages, Run, VcpuRing, WorkingSet};

/// A machine, its log, and a migration of it. Threads of a scene are those of the guest, of a reaper and of a VMM.
struct Scene {
    machine: Arc<Machine>,
    log: DirtyLog,
    copy: Copy,
    _rings: Vec<VcpuRing>,
}

impl Scene {
    /// With so many vCPUs, pages and free places.
    fn new(vcpus: usize, pages: usize, places: u64, faults: Vec<Option<Fault>>) -> Self {
        let machine = Machine::with_faults(vcpus, pages, faults);
        let log = machine.log(2);
        let attach = |vcpu| log.attach_ring(machine.ring(vcpu).memory()).unwrap();
        let rings = (0..vcpus).map(attach).collect();
        Self::over(machine, log, rings, places)
    }

    fn over(machine: Arc<Machine>, log: DirtyLog, rings: Vec<VcpuRing>, places: u64) -> Self {
        log.set_working_set(Some(WorkingSet::new(places)));
        Self {
            copy: Copy::new(&machine),
            machine,
            log,
            _rings: rings,
        }
    }

    /// One vCPU, which has written so many pages, all of them logged.
    fn written(pages: usize, places: u64) -> Self {
        Self::written_by(1, pages, places, Vec::new())
    }

    fn written_by(vcpus: usize, pages: usize, places: u64, faults: Vec<Option<Fault>>) -> Self {
        let scene = Self::new(vcpus, pages, places, faults);
        (0..pages).for_each(|page| assert!(scene.machine.write(0, page, 1)));
        scene
    }

    /// The same of one page, with its entry taken: it is a member if there is a place.
    fn taken(vcpus: usize, places: u64) -> Self {
        let scene = Self::written_by(vcpus, 1, places, Vec::new());
        scene.log.reap().unwrap();
        scene
    }

    /// One page that logs into a bitmap.
    fn bitmap() -> Self {
        let machine = Machine::with_bitmap(1);
        let log = machine.log(1);
        Self::over(machine, log, Vec::new(), 0)
    }

    /// The same, and the page is a member, as it was written in two rounds.
    fn bitmap_with_member() -> Self {
        let mut scene = Self::bitmap();
        for value in [1, 2] {
            scene.machine.write_page(0, value);
            scene.round();
        }
        let members = scene.log.stats().working_set.members;
        assert_eq!(members, 1, "it has not joined");
        scene
    }

    /// A thread that works on the machine and its log.
    fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Machine, &DirtyLog) -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let (machine, log) = (Arc::clone(&self.machine), self.log.clone());
        thread::spawn(move || work(&machine, &log))
    }

    /// The guest, on one vCPU: each of `writes` is a page and what is written to it.
    fn guest<const N: usize>(
        &self,
        vcpu: usize,
        writes: [(usize, u64); N],
    ) -> thread::JoinHandle<()> {
        self.spawn(move |machine, _| {
            for (page, value) in writes {
                assert!(machine.write(vcpu, page, value), "the ring is full");
            }
        })
    }

    /// The guest of a machine with a bitmap writes its page.
    fn bitmap_guest<const N: usize>(&self, values: [u64; N]) -> thread::JoinHandle<()> {
        self.spawn(move |machine, _| {
            for value in values {
                machine.write_page(0, value);
            }
        })
    }

    /// A reaper that empties the rings once.
    fn reaper(&self) -> thread::JoinHandle<u64> {
        self.spawn(|_, log| log.reap().unwrap())
    }

    /// A VMM that refreshes one slot, as [`refresh`].
    fn refresher(&self) -> thread::JoinHandle<()> {
        self.spawn(|machine, log| assert_eq!(refresh(machine, log), 1))
    }

    /// A VMM that refreshes bits: the kernel protects their pages.
    fn bitmap_refresher(&self) -> thread::JoinHandle<()> {
        self.spawn(|_, log| {
            let refreshed = log.refresh(|_| panic!("no slot needs it"));
            assert_eq!(refreshed.unwrap(), 1);
        })
    }

    /// A round that is not the last: members are not copied. Pages that the sync found.
    fn round(&mut self) -> u64 {
        let mut dirty = DirtyPages::new();
        self.log.sync(&mut dirty).unwrap();
        self.copy.take_runs(&self.machine, dirty.others().runs());
        dirty.page_count()
    }

    /// The last round of a guest that has stopped. After it, the copy is whole, and what is no member is protected.
    fn last_round(&mut self) {
        let mut dirty = DirtyPages::new();
        self.log.sync(&mut dirty).unwrap();
        self.copy.take(&self.machine, &dirty);
        self.copy.verify(&self.machine);
        let pages = |run: Run| run.first_page..run.first_page + run.pages;
        for page in dirty.others().runs().flat_map(pages) {
            let state = *lock(&self.machine.pages[page as usize].state);
            assert!(state == State::Armed, "page {page} is open");
        }
    }

    fn last_sync(&self) -> LastPages {
        let mut last = LastPages::new();
        self.log.last_sync(&mut last).unwrap();
        last
    }
}

/// Closes the slot's pages, one after the other, in a way that needs no vCPU to stop. How many slots.
fn refresh(machine: &Machine, log: &DirtyLog) -> usize {
    let close = |slot| {
        machine.switch(slot, State::Armed);
        Ok(())
    };
    log.refresh(close).unwrap()
}

/// A pass leaves a page open while a sync is in flight that may or may not see it, and the guest goes on writing to it.
#[test]
fn join_beside_a_sync() {
    model(3, || {
        let mut scene = Scene::new(1, 1, 1, Vec::new());
        let guest = scene.guest(0, [(0, 1), (0, 2)]);
        let reaper = scene.reaper();
        scene.round();
        guest.join().unwrap();
        scene.last_round();
        reaper.join().unwrap();
    });
}

/// The same without free places: a page joins that comes again in a round, and its bit in a shard is taken by the sync that finds
/// it to be a member, or by none.
#[test]
fn join_of_what_comes_again_beside_a_sync() {
    model(3, || {
        let mut scene = Scene::taken(1, 0);
        let guest = scene.guest(0, [(0, 2), (0, 3)]);
        let reaper = scene.reaper();
        scene.round();
        guest.join().unwrap();
        scene.last_round();
        reaper.join().unwrap();
    });
}

/// The guest has stopped, and a reaper is about to leave its page open when the last sync is called: there it is.
#[test]
fn last_round_beside_a_join() {
    model(5, || {
        let mut scene = Scene::written(1, 1);
        let reaper = scene.reaper();
        scene.last_round();
        reaper.join().unwrap();
    });
}

/// Of two pages one finds a place and the other none. Both are written all the time.
#[test]
fn one_joins_and_one_does_not_beside_a_sync() {
    model(3, || {
        let mut scene = Scene::written(2, 1);
        let reaper = scene.reaper();
        scene.round();
        let guest = scene.guest(0, [(1, 2), (0, 2)]);
        scene.round();
        guest.join().unwrap();
        scene.last_round();
        reaper.join().unwrap();
    });
}

/// What a reset leaves undone is no member's: pages beside void entries are suspect, and are copied in each round.
#[test]
fn short_reset_beside_a_join() {
    model(2, || {
        let mut scene = Scene::written_by(1, 2, 1, vec![Some(Fault::Short)]);
        let reaper = scene.reaper();
        scene.round();
        let guest = scene.guest(0, [(1, 2), (0, 2)]);
        scene.round();
        guest.join().unwrap();
        scene.copy.round(&scene.machine, &scene.log);
        scene.copy.verify(&scene.machine);
        reaper.join().unwrap();
    });
}

/// No vCPU runs during a refresh, but a reaper is under way that may leave the page open before it is closed, or thinks that
/// it does when it is. The guest goes on when the refresh has returned.
#[test]
fn refresh_beside_a_join_and_a_sync() {
    model(3, || {
        let mut scene = Scene::written(1, 1);
        let reaper = scene.reaper();
        let vmm = scene.spawn(|machine, log| {
            refresh(machine, log);
            assert!(machine.write(0, 0, 2), "the ring is full");
        });
        scene.round();
        vmm.join().unwrap();
        scene.round();
        scene.last_round();
        reaper.join().unwrap();
    });
}

/// The page is a member already, and the guest writes to it while a refresh closes it that needs no vCPU to stop: a sync in
/// between has it as a member still, and what is written after the closing is logged.
#[test]
fn refresh_beside_a_guest_and_a_sync() {
    model(4, || {
        let mut scene = Scene::taken(1, 1);
        let guest = scene.guest(0, [(0, 2), (0, 3)]);
        let vmm = scene.refresher();
        scene.round();
        guest.join().unwrap();
        scene.round();
        vmm.join().unwrap();
        scene.last_round();
    });
}

/// The same, and a reaper has the page join anew as soon as it is logged: while it is on its way out, too.
#[test]
fn refresh_beside_a_guest_a_join_and_a_sync() {
    model(2, || {
        let mut scene = Scene::taken(1, 2);
        let guest = scene.guest(0, [(0, 2), (0, 3)]);
        let reaper = scene.reaper();
        let vmm = scene.refresher();
        guest.join().unwrap();
        scene.round();
        vmm.join().unwrap();
        scene.last_round();
        reaper.join().unwrap();
    });
}

/// KVM has logged a member again, though it is open. A reaper finds that beside the refresh that closes it: it is no member any
/// more when the reaper leaves it open, or it is one of those to be closed.
#[test]
fn refresh_beside_a_member_that_is_logged_again() {
    model(2, || {
        let mut scene = Scene::taken(1, 1);
        scene.machine.ring(0).push(SLOT.raw(), 0);
        let guest = scene.guest(0, [(0, 2)]);
        let reaper = scene.reaper();
        let vmm = scene.refresher();
        scene.round();
        guest.join().unwrap();
        reaper.join().unwrap();
        vmm.join().unwrap();
        scene.round();
        assert!(scene.machine.write(0, 0, 3), "the ring is full");
        scene.last_round();
    });
}

/// A member is written, closed, written and harvested, and all of it while the refresh that closes it has not returned.
#[test]
fn join_before_a_refresh_returns() {
    model(5, || {
        let mut scene = Scene::taken(1, 2);
        let vmm = scene.spawn(|machine, log| {
            let close = |slot| {
                machine.switch(slot, State::Armed);
                assert!(machine.write(0, 0, 2), "the ring is full");
                log.reap().unwrap();
                Ok(())
            };
            log.refresh(close).unwrap();
            machine.write(0, 0, 3);
        });
        scene.round();
        vmm.join().unwrap();
        scene.round();
        scene.last_round();
    });
}

/// One page is in two rings. Of two passes, the one that has seen it before leaves it open, and the other has it protected.
#[test]
fn two_passes_over_one_page() {
    model(2, || {
        let mut scene = Scene::taken(2, 0);
        scene.machine.write(0, 0, 2);
        // KVM may log an open page again.
        scene.machine.ring(1).push(SLOT.raw(), 0);
        let reapers = [[true, false], [false, true]];
        let reapers =
            reapers.map(|rings| scene.spawn(move |_, log| log.reap_rings(&rings).unwrap()));
        scene.round();
        let guest = scene.guest(0, [(0, 3)]);
        scene.round();
        guest.join().unwrap();
        scene.last_round();
        for reaper in reapers {
            reaper.join().unwrap();
        }
    });
}

/// A page is a member before any thread has its void entry reset.
#[test]
fn void_entries_are_of_members() {
    model(6, || {
        let scene = Scene::written(1, 1);
        let pass = scene.reaper();
        let layout = scene.log.inner().harvester.layout();
        let members = layout.slots.get(SLOT.raw()).unwrap().members();
        scene.machine.reset_seeing(|slot, page| {
            assert!(slot != NO_SLOT || members.has(page), "a page was let go");
        });
        pass.join().unwrap();
        assert!(members.has(0), "nothing joined");
    });
}

/// A last sync beside a reaper has all that was written. It is called off, and nothing has been taken: the guest goes on, and
/// the migration that follows, which begins with the next sync, is whole.
#[test]
fn last_sync_called_off() {
    model(2, || {
        let mut scene = Scene::written_by(2, 2, 1, Vec::new());
        let reaper = scene.reaper();
        let last = scene.last_sync();
        scene.copy.take_runs(&scene.machine, last.runs());
        scene.copy.verify(&scene.machine);

        let guest = scene.guest(1, [(0, 2), (1, 2)]);
        scene.copy = Copy::new(&scene.machine);
        assert_eq!(scene.round(), 2, "some were taken");
        guest.join().unwrap();
        scene.last_round();
        reaper.join().unwrap();
    });
}

/// The same where everything is protected: only what is to be reset may still be open.
#[test]
fn last_sync_called_off_without_members() {
    model(3, || {
        let mut scene = Scene::written(1, 0);
        let reaper = scene.reaper();
        assert!(scene.last_sync().contains(SLOT, 0), "page 0 was lost");
        let guest = scene.guest(0, [(0, 2)]);
        scene.round();
        guest.join().unwrap();
        scene.last_round();
        reaper.join().unwrap();
    });
}

/// Tracking begins anew, for a slot whose log is on already: nothing is protected by that, so members stay what they are.
#[test]
fn start_of_what_is_tracked_beside_a_join() {
    model(3, || {
        let mut scene = Scene::written(1, 1);
        let reaper = scene.reaper();
        let vmm = scene.spawn(|_, log| log.start_tracking(SLOT, || Ok(())).unwrap());
        scene.round();
        vmm.join().unwrap();
        let guest = scene.guest(0, [(0, 2)]);
        scene.round();
        guest.join().unwrap();
        scene.last_round();
        reaper.join().unwrap();
    });
}

/// Tracking stops beside a reaper that has the page join, and begins again: what is written at any time is in the copy.
#[test]
fn stop_and_start_beside_a_join() {
    model(3, || {
        let mut scene = Scene::written(1, 1);
        let reaper = scene.reaper();
        let vmm = scene.spawn(|machine, log| {
            let switch = |state| {
                machine.switch(SLOT, state);
                Ok(())
            };
            log.stop_tracking(SLOT, || switch(State::Unlogged)).unwrap();
            assert!(machine.write(0, 0, 2));
            log.start_tracking(SLOT, || switch(State::Armed)).unwrap();
            assert!(machine.write(0, 0, 3));
        });
        scene.round();
        vmm.join().unwrap();
        scene.round();
        scene.last_round();
        reaper.join().unwrap();
    });
}

/// A guest writes a page in each round, which so joins, or not: its bit is left, or cleared.
#[test]
fn bits_are_kept_beside_a_guest() {
    model(6, || {
        let mut scene = Scene::bitmap();
        scene.machine.write_page(0, 1);
        scene.round();
        let guest = scene.bitmap_guest([2, 3]);
        scene.round();
        scene.round();
        guest.join().unwrap();
        scene.last_round();
    });
}

/// A refresh clears the bit of a member, beside a guest that writes to it and a sync.
#[test]
fn bits_are_cleared_beside_a_guest_and_a_sync() {
    model(5, || {
        let mut scene = Scene::bitmap_with_member();
        let guest = scene.bitmap_guest([3, 4]);
        let vmm = scene.bitmap_refresher();
        scene.round();
        guest.join().unwrap();
        scene.round();
        vmm.join().unwrap();
        scene.last_round();
    });
}

/// A last sync reads the bits and leaves them, beside a refresh that clears those of members.
#[test]
fn last_sync_of_bits_called_off() {
    model(5, || {
        let mut scene = Scene::bitmap_with_member();
        let vmm = scene.bitmap_refresher();
        assert!(scene.last_sync().contains(SLOT, 0), "page 0 was lost");
        let guest = scene.bitmap_guest([3]);
        scene.round();
        guest.join().unwrap();
        vmm.join().unwrap();
        scene.last_round();
    });
}
