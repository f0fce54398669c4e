// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Slots that go, and others that come in their place.

use std::path::Path;
use std::slice::from_ref;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kvm_dirty_ring::Reaper;
use kvm_dirty_ring::error::SlotError;
use kvm_dirty_ring::pacing::Fixed;
use kvm_integration::refusal::refusing;
use kvm_integration::{Action, Load, Mode, VcpuThread, Workload};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;

use super::harness::{Outcome, remark};
use super::held_call::HeldCalls;
use super::machine::{
    Machine, assert_unsuspicious, page_of, pause, resume, run_passes, slot_id, stop, wait_paused,
};
use super::raw;
use super::scale::{patience, scaled};

tests![
    reused_id_gets_no_stale_entries,
    reuse_beside_a_reaper,
    a_reset_waits_for_changes_of_slots_beforehand,
    slots_come_and_go_beside_a_reaper,
    reuse_after_a_reset_that_was_refused,
    id_is_taken_until_it_is_finished,
    toggling_the_log_keeps_pending_entries,
];

/// Slot 1 stays, slot 2 comes and goes, in two sizes by turns, with a vCPU for each. The vCPU of
/// slot 1 goes on meanwhile; that of slot 2 is paused, with entries of it in its ring.
fn reuse(reaper: bool) -> Result<(), Failed> {
    let rounds = scaled(20, 4) as usize;
    const SIZES: [u64; 2] = [700, 300];
    let mut machine = Machine::new(1024, &[1024])?;
    let stayer = [machine.spawn(0, &machine.load(Workload::Random, 0, 1))?];
    machine.add_slot(2, SIZES[0])?;
    // To a vCPU that is made for the one, the end of the other is no memory at all.
    let loads = SIZES.map(|pages| {
        let list = (0..pages).map(|page| page_of(2, page)).collect();
        Load::new(Mode::Native, list)
    });
    let reaper = match reaper {
        true => Some(Reaper::spawn(
            &machine.log,
            Fixed::new(patience(Duration::from_micros(200))),
        )?),
        false => None,
    };
    let leavers = [machine.spawn(1, &loads[0])?, machine.spawn(2, &loads[1])?];
    pause(&leavers)?;
    let (mut round, mut checked) = (0, 0);
    // On a busy machine many a reset waits for a change of slots, however few rounds are wanted.
    while round < rounds || checked == 0 {
        assert!(
            round < rounds.max(20) * 5,
            "each round had a doubtful reset"
        );
        let doubts = machine.log.stats().doubtful_resets;
        let leaver = &leavers[round % 2..][..1];
        leaver[0].resume();
        run_passes(leaver, 1)?;
        machine.round()?;

        let retired = machine.log.retire_slot(slot_id(2))?;
        // What is written from here on is no longer anybody's business, and goes to the ring.
        run_passes(leaver, 1)?;
        pause(leaver)?;
        machine.delete_slot(2)?;
        machine.log.finish_slot(&retired)?;
        machine.add_slot(2, SIZES[(round + 1) % 2])?;

        machine.round()?;
        let stats = machine.log.stats();
        // A reset that had to wait for a change of slots may have been anything: near the last page
        // that it was for, pages of whatever slot has the id are reported.
        if stats.doubtful_resets == doubts {
            let runs = machine.dirty().runs();
            let stale: Vec<_> = runs.filter(|run| run.slot == slot_id(2)).collect();
            assert_eq!(stale, [], "of the slot before, in round {round}");
            checked += 1;
        }
        assert_unsuspicious(&stats);
        round += 1;
    }
    // And the last slot of that id is logged as the first one was.
    let leaver = &leavers[round % 2];
    leaver.resume();
    run_passes(from_ref(leaver), 2)?;
    pause(&leavers)?;
    machine.finish(&stayer)?;
    assert_unsuspicious(&machine.log.stats());
    drop(reaper);
    stop(stayer.into_iter().chain(leavers))?;
    Ok(())
}

fn reused_id_gets_no_stale_entries() -> Outcome {
    reuse(false)?;
    Ok(Completed)
}

/// A thread that sleeps in a reset looks like one that was stopped at its end. So it waits for KVM's lock on memslots
/// in another call, before the reset.
fn a_reset_waits_for_changes_of_slots_beforehand() -> Outcome {
    const GET_DIRTY_LOG: u32 = 0x4010_ae42;
    let machine = Machine::new(1024, &[128])?;
    let load = Load::new(Mode::Native, vec![page_of(1, 3)]).pass_exits();
    let vcpu = [machine.spawn(0, &load)?];
    wait_paused(&vcpu)?;
    let (listener, held_calls) = mpsc::channel();
    thread::scope(|scope| {
        let reap = scope.spawn(|| {
            listener.send(HeldCalls::of_this_thread(GET_DIRTY_LOG)?)?;
            Ok::<_, Failed>(machine.log.reap()?)
        });
        let calls = held_calls.recv()?;
        let waiting = calls.wait()?;
        assert_eq!(machine.log.stats().entries, 1, "it is harvested");
        let is_over = reap.is_finished();
        // A reset that was made before would have left nothing to recycle.
        assert_eq!(raw::reset(&machine.vm)?, 1, "it waits after the reset");
        drop(waiting);
        // Its own falls short now, and is repeated.
        drop(calls.wait()?);
        // The listener stays until the pass has ended.
        let reaped = reap.join().expect("no panic")?;
        assert_eq!((is_over, reaped), (false, 1));
        drop(calls);
        Ok::<_, Failed>(())
    })?;
    stop(vcpu)?;
    Ok(Completed)
}

/// Hardly any reset is doubtful beside that; how many are is printed.
fn slots_come_and_go_beside_a_reaper() -> Outcome {
    let mut machine = Machine::new(1024, &[700])?;
    let pace = Fixed::new(patience(Duration::from_micros(200)));
    let reaper = Reaper::spawn(&machine.log, pace)?;
    let vcpus = machine.spawn_all(Workload::Random, 1)?;
    let before = machine.log.stats();
    let changes = scaled(200, 10);
    for _ in 0..changes {
        machine.add_slot(2, 300)?;
        let retired = machine.log.retire_slot(slot_id(2))?;
        machine.delete_slot(2)?;
        machine.log.finish_slot(&retired)?;
    }
    let now = machine.log.stats();
    let (resets, doubtful) = (
        now.resets - before.resets,
        now.doubtful_resets - before.doubtful_resets,
    );
    remark(&format!(
        "{doubtful} of {resets} resets were doubtful beside {changes} slots that came and went"
    ));
    // A change may begin between the wait and the reset. With PREEMPT_RT each reset may wait for `mmu_lock`, too.
    let is_realtime = Path::new("/sys/kernel/realtime").exists();
    assert!(
        is_realtime || doubtful <= (resets / 10).max(3),
        "{doubtful} of {resets} resets were doubtful"
    );
    machine.finish(&vcpus)?;
    stop(vcpus)?;
    reaper.stop()?;
    assert_unsuspicious(&now);
    Ok(Completed)
}

fn reuse_beside_a_reaper() -> Outcome {
    reuse(true)?;
    Ok(Completed)
}

/// KVM protects pages of one slot in batches, and forgets a whole batch for one page that the slot does not
/// have: an old entry, not recycled before the id is used again, would leave the page of the next one
/// unprotected for good.
fn reuse_after_a_reset_that_was_refused() -> Outcome {
    let mut machine = Machine::new(1024, &[128])?;
    let mut list = vec![page_of(1, 100)];
    list.extend([page_of(1, 60); 4]);
    // It pauses after each store.
    let load = Load::new(Mode::Native, list).chunk(1);
    let (vcpu, _ring) = machine.attach(0, &load)?;
    let vcpu = VcpuThread::spawn(vcpu, |_| Action::Pause)?;
    wait_paused(from_ref(&vcpu))?;
    // Not on the shard that the next pass takes, and so finds what was left there.
    let refused = refusing(libc::EINTR, || machine.log.reap_on_shard(1))?;
    assert!(refused.is_err(), "{refused:?}");
    let retired = machine.log.retire_slot(slot_id(1))?;
    machine.delete_slot(1)?;
    machine.log.finish_slot(&retired)?;
    machine.add_slot(1, 64)?;
    for _ in 0..4 {
        vcpu.resume();
        wait_paused(from_ref(&vcpu))?;
        machine.round()?;
        assert!(machine.dirty().contains(slot_id(1), 60), "a page was lost");
        machine.compare()?;
    }
    vcpu.stop()?;
    Ok(Completed)
}

fn id_is_taken_until_it_is_finished() -> Outcome {
    let mut machine = Machine::new(1024, &[256, 256])?;
    let vcpus = machine.spawn_all(Workload::Walk, 1)?;
    run_passes(&vcpus, 1)?;
    pause(&vcpus)?;
    let id = slot_id(2);
    let taken = machine.log.add_slot(id, 16);
    assert!(
        matches!(taken, Err(SlotError::Exists { slot }) if slot == id),
        "{taken:?}"
    );
    let retired = machine.log.retire_slot(id)?;
    let taken = machine.log.add_slot(id, 16);
    assert!(
        matches!(taken, Err(SlotError::Retired { slot }) if slot == id),
        "{taken:?}"
    );
    assert_eq!(machine.log.retire_slot(id)?.id(), id);
    // Retired, it is still reported: its pages may be copied for the last time.
    machine.round()?;
    assert!(machine.dirty().contains(id, 255));
    machine.compare()?;
    machine.delete_slot(2)?;
    machine.log.finish_slot(&retired)?;
    let again = machine.log.finish_slot(&retired);
    assert!(
        matches!(again, Err(SlotError::Unknown { slot }) if slot == id),
        "{again:?}"
    );
    machine.add_slot(2, 16)?;
    assert_eq!(machine.round()?, 0);
    Ok(Completed)
}

/// Taking the log from a slot and giving it back protects its pages; entries that are in the rings
/// stay there.
fn toggling_the_log_keeps_pending_entries() -> Outcome {
    let mut machine = Machine::new(1024, &[500])?;
    let load = machine.load(Workload::Walk, 0, 1).pass_exits();
    let vcpus = [machine.spawn(0, &load)?];
    for _ in 0..10 {
        wait_paused(&vcpus)?;
        machine.vm.protect(1)?;
        assert_eq!(machine.round()?, 500, "entries got lost");
        machine.compare()?;
        // That every page is protected shows in the next round, by its being dirty again.
        resume(&vcpus);
    }
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}
