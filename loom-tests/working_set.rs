//! Pages that stay open: what a migration copies is whole though it copies members in its last round alone.

use super::kernel::{Copy, Fault, Machine, SLOT, State};
use super::model;
use crate::ring::entry::NO_SLOT;
use crate::sync::{Arc, lock, thread};
use crate::{DirtyLog, DirtyPages, LastPages, Run, VcpuRing, WorkingSet};

/// A machine of so many vCPUs and pages, and its log of two shards, with so many free places.
fn machine<const N: usize>(
    pages: usize,
    places: u64,
    faults: Vec<Option<Fault>>,
) -> (Arc<Machine>, DirtyLog, [VcpuRing; N]) {
    let machine = Machine::with_faults(N, pages, faults);
    let log = machine.log(2);
    let rings = core::array::from_fn(|vcpu| log.attach_ring(machine.ring(vcpu).memory()).unwrap());
    log.set_working_set(Some(WorkingSet::new(places)));
    (machine, log, rings)
}

/// The guest, on one vCPU: each of `writes` is a page and what is written to it.
fn guest<const N: usize>(
    machine: &Arc<Machine>,
    vcpu: usize,
    writes: [(usize, u64); N],
) -> thread::JoinHandle<()> {
    let machine = Arc::clone(machine);
    thread::spawn(move || {
        for (page, value) in writes {
            assert!(machine.write(vcpu, page, value), "the ring is full");
        }
    })
}

/// A reaper that empties the rings once.
fn reaper(log: &DirtyLog) -> thread::JoinHandle<u64> {
    let log = log.clone();
    thread::spawn(move || log.reap().unwrap())
}

/// A VMM that refreshes: it closes the slot's pages, one after the other, in a way that needs no vCPU to stop.
fn refresh(machine: &Machine, log: &DirtyLog) -> usize {
    let close = |slot| {
        machine.switch(slot, State::Armed);
        Ok(())
    };
    log.refresh(close).unwrap()
}

/// A round that is not the last: members are not copied.
fn round(copy: &mut Copy, machine: &Machine, log: &DirtyLog) {
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    copy.take_runs(machine, dirty.others().runs());
}

/// The last round of a guest that has stopped. After it, the copy is whole, and what is no member is protected.
fn last_round(copy: &mut Copy, machine: &Machine, log: &DirtyLog) {
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty).unwrap();
    copy.take(machine, &dirty);
    copy.verify(machine);
    let pages = |run: Run| run.first_page..run.first_page + run.pages;
    for page in dirty.others().runs().flat_map(pages) {
        let state = *lock(&machine.pages[page as usize].state);
        assert!(state == State::Armed, "page {page} is open");
    }
}

/// A pass leaves a page open while a sync is in flight that may or may not see it, and the guest goes on writing to it.
#[test]
fn join_beside_a_sync() {
    model(3, || {
        let (machine, log, _rings) = machine::<1>(1, 1, Vec::new());
        let guest = guest(&machine, 0, [(0, 1), (0, 2)]);
        let reaper = reaper(&log);
        let mut copy = Copy::new(&machine);
        round(&mut copy, &machine, &log);
        guest.join().unwrap();
        last_round(&mut copy, &machine, &log);
        reaper.join().unwrap();
    });
}

/// The same without free places: a page joins that comes again in a round, and its bit in a shard is taken by the sync that finds
/// it to be a member, or by none.
#[test]
fn join_of_what_comes_again_beside_a_sync() {
    model(3, || {
        let (machine, log, _rings) = machine::<1>(1, 0, Vec::new());
        machine.write(0, 0, 1);
        log.reap().unwrap();
        let guest = guest(&machine, 0, [(0, 2), (0, 3)]);
        let reaper = reaper(&log);
        let mut copy = Copy::new(&machine);
        round(&mut copy, &machine, &log);
        guest.join().unwrap();
        last_round(&mut copy, &machine, &log);
        reaper.join().unwrap();
    });
}

/// The guest has stopped, and a reaper is about to leave its page open when the last sync is called: there it is.
#[test]
fn last_round_beside_a_join() {
    model(5, || {
        let (machine, log, _rings) = machine::<1>(1, 1, Vec::new());
        machine.write(0, 0, 1);
        let reaper = reaper(&log);
        last_round(&mut Copy::new(&machine), &machine, &log);
        reaper.join().unwrap();
    });
}

/// Of two pages one finds a place and the other none. Both are written all the time.
#[test]
fn one_joins_and_one_does_not_beside_a_sync() {
    model(3, || {
        let (machine, log, _rings) = machine::<1>(2, 1, Vec::new());
        machine.write(0, 0, 1);
        machine.write(0, 1, 1);
        let reaper = reaper(&log);
        let mut copy = Copy::new(&machine);
        round(&mut copy, &machine, &log);
        let guest = guest(&machine, 0, [(1, 2), (0, 2)]);
        round(&mut copy, &machine, &log);
        guest.join().unwrap();
        last_round(&mut copy, &machine, &log);
        reaper.join().unwrap();
    });
}

/// What a reset leaves undone is no member's: pages beside void entries are suspect, and are copied in each round.
#[test]
fn short_reset_beside_a_join() {
    model(2, || {
        let (machine, log, _rings) = machine::<1>(2, 1, vec![Some(Fault::Short)]);
        machine.write(0, 0, 1);
        machine.write(0, 1, 1);
        let reaper = reaper(&log);
        let mut copy = Copy::new(&machine);
        round(&mut copy, &machine, &log);
        let guest = guest(&machine, 0, [(1, 2), (0, 2)]);
        round(&mut copy, &machine, &log);
        guest.join().unwrap();
        copy.round(&machine, &log);
        copy.verify(&machine);
        reaper.join().unwrap();
    });
}

/// No vCPU runs during a refresh, but a reaper is under way that may leave the page open before it is closed, or thinks that
/// it does when it is. The guest goes on when the refresh has returned.
#[test]
fn refresh_beside_a_join_and_a_sync() {
    model(3, || {
        let (machine, log, _rings) = machine::<1>(1, 1, Vec::new());
        machine.write(0, 0, 1);
        let reaper = reaper(&log);
        let vmm = thread::spawn({
            let (machine, log) = (Arc::clone(&machine), log.clone());
            move || {
                refresh(&machine, &log);
                assert!(machine.write(0, 0, 2), "the ring is full");
            }
        });
        let mut copy = Copy::new(&machine);
        round(&mut copy, &machine, &log);
        vmm.join().unwrap();
        round(&mut copy, &machine, &log);
        last_round(&mut copy, &machine, &log);
        reaper.join().unwrap();
    });
}

/// The page is a member already, and the guest writes to it while a refresh closes it that needs no vCPU to stop: a sync in
/// between has it as a member still, and what is written after the closing is logged.
#[test]
fn refresh_beside_a_guest_and_a_sync() {
    model(4, || {
        let (machine, log, _rings) = machine::<1>(1, 1, Vec::new());
        machine.write(0, 0, 1);
        log.reap().unwrap();
        let guest = guest(&machine, 0, [(0, 2), (0, 3)]);
        let vmm = thread::spawn({
            let (machine, log) = (Arc::clone(&machine), log.clone());
            move || assert_eq!(refresh(&machine, &log), 1)
        });
        let mut copy = Copy::new(&machine);
        round(&mut copy, &machine, &log);
        guest.join().unwrap();
        round(&mut copy, &machine, &log);
        vmm.join().unwrap();
        last_round(&mut copy, &machine, &log);
    });
}

/// The same, and a reaper has the page join anew as soon as it is logged: while it is on its way out, too.
#[test]
fn refresh_beside_a_guest_a_join_and_a_sync() {
    model(2, || {
        let (machine, log, _rings) = machine::<1>(1, 2, Vec::new());
        machine.write(0, 0, 1);
        log.reap().unwrap();
        let guest = guest(&machine, 0, [(0, 2), (0, 3)]);
        let reaper = reaper(&log);
        let vmm = thread::spawn({
            let (machine, log) = (Arc::clone(&machine), log.clone());
            move || assert_eq!(refresh(&machine, &log), 1)
        });
        guest.join().unwrap();
        let mut copy = Copy::new(&machine);
        round(&mut copy, &machine, &log);
        vmm.join().unwrap();
        last_round(&mut copy, &machine, &log);
        reaper.join().unwrap();
    });
}

/// KVM has logged a member again, though it is open. A reaper finds that beside the refresh that closes it: it is no member any
/// more when the reaper leaves it open, or it is one of those to be closed.
#[test]
fn refresh_beside_a_member_that_is_logged_again() {
    model(2, || {
        let (machine, log, _rings) = machine::<1>(1, 1, Vec::new());
        machine.write(0, 0, 1);
        log.reap().unwrap();
        machine.ring(0).push(SLOT.raw(), 0);
        let guest = guest(&machine, 0, [(0, 2)]);
        let reaper = reaper(&log);
        let vmm = thread::spawn({
            let (machine, log) = (Arc::clone(&machine), log.clone());
            move || assert_eq!(refresh(&machine, &log), 1)
        });
        let mut copy = Copy::new(&machine);
        round(&mut copy, &machine, &log);
        guest.join().unwrap();
        reaper.join().unwrap();
        vmm.join().unwrap();
        round(&mut copy, &machine, &log);
        assert!(machine.write(0, 0, 3), "the ring is full");
        last_round(&mut copy, &machine, &log);
    });
}

/// A member is written, closed, written and harvested, and all of it while the refresh that closes it has not returned.
#[test]
fn join_before_a_refresh_returns() {
    model(5, || {
        let (machine, log, _rings) = machine::<1>(1, 2, Vec::new());
        machine.write(0, 0, 1);
        log.reap().unwrap();
        let vmm = thread::spawn({
            let (machine, log) = (Arc::clone(&machine), log.clone());
            move || {
                let close = |slot| {
                    machine.switch(slot, State::Armed);
                    assert!(machine.write(0, 0, 2), "the ring is full");
                    log.reap().unwrap();
                    Ok(())
                };
                log.refresh(close).unwrap();
                machine.write(0, 0, 3);
            }
        });
        let mut copy = Copy::new(&machine);
        round(&mut copy, &machine, &log);
        vmm.join().unwrap();
        round(&mut copy, &machine, &log);
        last_round(&mut copy, &machine, &log);
    });
}

/// One page is in two rings. Of two passes, the one that has seen it before leaves it open, and the other has it protected.
#[test]
fn two_passes_over_one_page() {
    model(2, || {
        let (machine, log, _rings) = machine::<2>(1, 0, Vec::new());
        machine.write(0, 0, 1);
        log.reap().unwrap();
        machine.write(0, 0, 2);
        // KVM may log an open page again.
        machine.ring(1).push(SLOT.raw(), 0);
        let reapers = [[true, false], [false, true]].map(|rings| {
            let log = log.clone();
            thread::spawn(move || log.reap_rings(&rings).unwrap())
        });
        let mut copy = Copy::new(&machine);
        round(&mut copy, &machine, &log);
        let guest = guest(&machine, 0, [(0, 3)]);
        round(&mut copy, &machine, &log);
        guest.join().unwrap();
        last_round(&mut copy, &machine, &log);
        for reaper in reapers {
            reaper.join().unwrap();
        }
    });
}

/// A page is a member before any thread has its void entry reset.
#[test]
fn void_entries_are_of_members() {
    model(6, || {
        let (machine, log, _rings) = machine::<1>(1, 1, Vec::new());
        machine.write(0, 0, 1);
        let pass = reaper(&log);
        let layout = log.inner().harvester.layout();
        let members = layout.slots.get(SLOT.raw()).unwrap().members();
        machine.reset_seeing(|slot, page| {
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
        let (machine, log, _rings) = machine::<2>(2, 1, Vec::new());
        machine.write(0, 0, 1);
        machine.write(0, 1, 1);
        let reaper = reaper(&log);
        let mut last = LastPages::new();
        log.last_sync(&mut last).unwrap();
        let mut copy = Copy::new(&machine);
        copy.take_runs(&machine, last.runs());
        copy.verify(&machine);

        let guest = guest(&machine, 1, [(0, 2), (1, 2)]);
        let mut dirty = DirtyPages::new();
        log.sync(&mut dirty).unwrap();
        assert_eq!(dirty.page_count(), 2, "some were taken");
        let mut copy = Copy::new(&machine);
        copy.take_runs(&machine, dirty.others().runs());
        guest.join().unwrap();
        last_round(&mut copy, &machine, &log);
        reaper.join().unwrap();
    });
}

/// The same where everything is protected: only what is to be reset may still be open.
#[test]
fn last_sync_called_off_without_members() {
    model(3, || {
        let (machine, log, _rings) = machine::<1>(1, 0, Vec::new());
        machine.write(0, 0, 1);
        let reaper = reaper(&log);
        let mut last = LastPages::new();
        log.last_sync(&mut last).unwrap();
        assert!(last.contains(SLOT, 0), "page 0 was lost");
        let guest = guest(&machine, 0, [(0, 2)]);
        let mut copy = Copy::new(&machine);
        round(&mut copy, &machine, &log);
        guest.join().unwrap();
        last_round(&mut copy, &machine, &log);
        reaper.join().unwrap();
    });
}

/// Tracking begins anew, for a slot whose log is on already: nothing is protected by that, so members stay what they are.
#[test]
fn start_of_what_is_tracked_beside_a_join() {
    model(3, || {
        let (machine, log, _rings) = machine::<1>(1, 1, Vec::new());
        machine.write(0, 0, 1);
        let reaper = reaper(&log);
        let vmm = thread::spawn({
            let log = log.clone();
            move || log.start_tracking(SLOT, || Ok(())).unwrap()
        });
        let mut copy = Copy::new(&machine);
        round(&mut copy, &machine, &log);
        vmm.join().unwrap();
        let guest = guest(&machine, 0, [(0, 2)]);
        round(&mut copy, &machine, &log);
        guest.join().unwrap();
        last_round(&mut copy, &machine, &log);
        reaper.join().unwrap();
    });
}

/// Tracking stops beside a reaper that has the page join, and begins again: what is written at any time is in the copy.
#[test]
fn stop_and_start_beside_a_join() {
    model(3, || {
        let (machine, log, _rings) = machine::<1>(1, 1, Vec::new());
        machine.write(0, 0, 1);
        let reaper = reaper(&log);
        let vmm = thread::spawn({
            let (machine, log) = (Arc::clone(&machine), log.clone());
            move || {
                let switch = |state| {
                    machine.switch(SLOT, state);
                    Ok(())
                };
                log.stop_tracking(SLOT, || switch(State::Unlogged)).unwrap();
                assert!(machine.write(0, 0, 2));
                log.start_tracking(SLOT, || switch(State::Armed)).unwrap();
                assert!(machine.write(0, 0, 3));
            }
        });
        let mut copy = Copy::new(&machine);
        round(&mut copy, &machine, &log);
        vmm.join().unwrap();
        round(&mut copy, &machine, &log);
        last_round(&mut copy, &machine, &log);
        reaper.join().unwrap();
    });
}

/// A machine of one page that logs into a bitmap, and its log.
fn bitmap() -> (Arc<Machine>, DirtyLog) {
    let machine = Machine::with_bitmap(1);
    let log = machine.log(1);
    log.set_working_set(Some(WorkingSet::new(0)));
    (machine, log)
}

/// The guest writes so many times, on whatever vCPU.
fn bitmap_guest<const N: usize>(
    machine: &Arc<Machine>,
    values: [u64; N],
) -> thread::JoinHandle<()> {
    let machine = Arc::clone(machine);
    thread::spawn(move || {
        for value in values {
            machine.write_page(0, value);
        }
    })
}

/// A guest writes a page in each round, which so joins, or not: its bit is left, or cleared.
#[test]
fn bits_are_kept_beside_a_guest() {
    model(6, || {
        let (machine, log) = bitmap();
        machine.write_page(0, 1);
        let mut copy = Copy::new(&machine);
        round(&mut copy, &machine, &log);
        let guest = bitmap_guest(&machine, [2, 3]);
        round(&mut copy, &machine, &log);
        round(&mut copy, &machine, &log);
        guest.join().unwrap();
        last_round(&mut copy, &machine, &log);
    });
}

/// A refresh clears the bit of a member, beside a guest that writes to it and a sync.
#[test]
fn bits_are_cleared_beside_a_guest_and_a_sync() {
    model(5, || {
        let (machine, log) = bitmap();
        let mut copy = Copy::new(&machine);
        for value in [1, 2] {
            machine.write_page(0, value);
            round(&mut copy, &machine, &log);
        }
        assert_eq!(log.stats().working_set.members, 1, "it has not joined");
        let guest = bitmap_guest(&machine, [3, 4]);
        let vmm = thread::spawn({
            let log = log.clone();
            move || log.refresh(|_| panic!("no slot needs it")).unwrap()
        });
        round(&mut copy, &machine, &log);
        guest.join().unwrap();
        round(&mut copy, &machine, &log);
        assert_eq!(vmm.join().unwrap(), 1);
        last_round(&mut copy, &machine, &log);
    });
}

/// A last sync reads the bits and leaves them, beside a refresh that clears those of members.
#[test]
fn last_sync_of_bits_called_off() {
    model(5, || {
        let (machine, log) = bitmap();
        let mut copy = Copy::new(&machine);
        for value in [1, 2] {
            machine.write_page(0, value);
            round(&mut copy, &machine, &log);
        }
        let vmm = thread::spawn({
            let log = log.clone();
            move || log.refresh(|_| panic!("no slot needs it")).unwrap()
        });
        let mut last = LastPages::new();
        log.last_sync(&mut last).unwrap();
        assert!(last.contains(SLOT, 0), "page 0 was lost");
        let guest = bitmap_guest(&machine, [3]);
        round(&mut copy, &machine, &log);
        guest.join().unwrap();
        vmm.join().unwrap();
        last_round(&mut copy, &machine, &log);
    });
}
