// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Page-modification logging (PML): the processor keeps the pages that a vCPU writes in a buffer of 512, which comes to
//! the ring when it is full and when the vCPU leaves the guest. What has to be so with it, and without it as well.

use std::collections::HashSet;
use std::slice::from_ref;
use std::sync::mpsc;
use std::time::Duration;

use kvm_dirty_ring::error::{EnableError, RingSizeError};
use kvm_dirty_ring::pacing::Fixed;
use kvm_dirty_ring::{DirtyLog, HostSupport, Reaper, RingEntries};
use kvm_integration::{Action, Exit, Host, TinyVm, VcpuThread, Workload, kvm_available};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;

use super::harness::{Outcome, remark, skip};
use super::machine::{
    Machine, assert_unsuspicious, host_page_size, nap, patience, pause, resume, run_passes, stop,
};
use super::raw::{RawMachine, RawRing, enable};
use super::scale::scaled;

tests![
    small_rings_are_refused,
    limits_hold,
    a_kick_brings_all_pages_once,
    pages_wait_for_a_kick,
    final_sync_after_a_kick_is_complete,
];

/// Entries that KVM keeps in reserve: 64, and 512 for the buffer.
fn reserved(pml: bool) -> u64 {
    if pml { 64 + 512 } else { 64 }
}

/// By KVM itself, and by the crate before it asks KVM.
fn small_rings_are_refused() -> Outcome {
    let kvm = kvm_available()?;
    let pml = Host::detect().has_pml();
    assert_eq!(
        HostSupport::query()?.pml,
        pml,
        "/sys/module/kvm_*/parameters/pml"
    );
    let sizes = [256, 512, 1024, 4096].into_iter();
    // A page of 16-byte entries is the least that there is.
    for entries in sizes.filter(|&entries| u64::from(entries) * 16 >= host_page_size()) {
        let refused = pml && entries < 1024;
        let by_kvm = enable(&TinyVm::new(&kvm)?, entries);
        assert_eq!(by_kvm.is_err(), refused, "{entries}: {by_kvm:?}");
        let by_us = DirtyLog::enable(TinyVm::new(&kvm)?.vm_fd(), RingEntries::new(entries)?);
        match by_us {
            Ok(log) => assert!(!refused && log.ring_entries() == entries),
            Err(EnableError::RingSize(RingSizeError::TooSmall { min, .. })) => {
                assert!(refused && min == 1024, "{entries}, {min}");
            }
            Err(other) => return Err(other.into()),
        }
    }
    Ok(Completed)
}

/// Entries, different pages, and recycled entries at each of `exits` exits for a full ring.
fn full_exits(entries: u32, exits: u64) -> Result<Vec<[u64; 3]>, Failed> {
    let (mut ring, vcpu, _memory) = RawRing::new(entries, 4 * u64::from(entries), false)?;
    let (tell, told) = mpsc::channel();
    let mut left = exits;
    let vcpu = VcpuThread::spawn(vcpu, move |exit| {
        if exit != Exit::RingFull {
            return Action::Fail(format!("an exit was not asked for: {exit:?}").into());
        }
        let pages = ring.harvest();
        let different: HashSet<&u64> = pages.iter().collect();
        let counts = match ring.reset() {
            Ok(recycled) => [pages.len(), different.len(), recycled].map(|count| count as u64),
            Err(_) => return Action::Fail("the reset failed".into()),
        };
        left -= 1;
        match tell.send(counts) {
            Ok(()) if left > 0 => Action::Continue,
            _ => Action::Stop,
        }
    })?;
    let next = |_| told.recv_timeout(patience());
    let counts = (0..exits).map(next).collect::<Result<_, _>>();
    let counts = counts.map_err(|_| match vcpu.why_ended() {
        Some(why) => why,
        None => format!("{:?} went by without an exit for a full ring", patience()),
    })?;
    vcpu.join()?;
    Ok(counts)
}

/// The buffer comes to the ring as a whole: a full ring holds up to 511 entries more than its limit. Without it, the
/// limit is exact.
fn limits_hold() -> Outcome {
    let pml = Host::detect().has_pml();
    for entries in [1024, 4096] {
        let limit = u64::from(entries) - reserved(pml);
        let counts = full_exits(entries, scaled(20, 4))?;
        for &[found, different, recycled] in &counts {
            let more = if pml { 511 } else { 0 };
            assert!(
                (limit..=limit + more).contains(&found),
                "{limit}: {counts:?}"
            );
            assert_eq!(different, found, "a page appeared twice: {counts:?}");
            assert_eq!(recycled, found, "{counts:?}");
        }
    }
    Ok(Completed)
}

/// Fewer than the buffer holds.
const PAGES: u64 = 300;

/// In each round, a vCPU that stays in the guest writes every page, and then is thrown out. In how many some pages were
/// not in the ring before. Afterwards each must have been there, once.
fn kicks(rounds: u64) -> Result<u64, Failed> {
    let mut machine = RawMachine::new(4096, PAGES, false)?;
    pause(from_ref(&machine.vcpu))?;
    machine.harvest();
    machine.reset()?;
    let mut waited = 0;
    for round in 0..rounds {
        machine.vcpu.resume();
        // One of them whole, in which all pages were protected.
        run_passes(from_ref(&machine.vcpu), 2)?;
        let early = machine.harvest();
        pause(from_ref(&machine.vcpu))?;
        let late = machine.harvest();
        let different: HashSet<&u64> = early.iter().chain(&late).collect();
        let (early, late, different) = (early.len(), late.len(), different.len());
        let counts = format!("round {round}: {early} early, {late} late, {different} different");
        assert_eq!(different as u64, PAGES, "pages are missing: {counts}");
        assert_eq!(early + late, different, "a page appeared twice: {counts}");
        assert_eq!(machine.reset()?, different, "{counts}");
        waited += u64::from(late > 0);
    }
    Ok(waited)
}

fn a_kick_brings_all_pages_once() -> Outcome {
    kicks(scaled(20, 3))?;
    Ok(Completed)
}

/// Without a kick a round of a live migration would lack them; with one CPU alone, the thread that looks has made the vCPU leave.
fn pages_wait_for_a_kick() -> Outcome {
    let host = Host::detect();
    if !host.has_pml() {
        let waited = kicks(scaled(20, 3))?;
        assert_eq!(
            waited, 0,
            "pages waited for a kick, on a host that is said to have no PML"
        );
        return skip(
            "this host has no page-modification logging (or KVM's parameter `pml` is off)",
        );
    }
    if host.cores < 2 {
        return skip("with one CPU, nobody can look at the ring of a vCPU that is in the guest");
    }
    let rounds = scaled(20, 10);
    let waited = kicks(rounds)?;
    assert!(
        waited > 0,
        "in none of {rounds} rounds did pages wait for a kick"
    );
    remark(&format!(
        "in {waited} of {rounds} rounds pages waited for a kick, by PML"
    ));
    Ok(Completed)
}

/// Two vCPUs that write too few pages to ever fill a ring: only their being stopped brings what they have written last.
fn final_sync_after_a_kick_is_complete() -> Outcome {
    for reaps in [false, true] {
        let mut machine = Machine::new(1024, &[2 * PAGES])?;
        let vcpus = machine.spawn_all(Workload::Walk, 2)?;
        let reaper = Reaper::spawn(&machine.log, Fixed::new(Duration::from_millis(1)))?;
        if !reaps {
            reaper.pause();
        }
        for round in 0..scaled(50, 5) {
            run_passes(&vcpus, 1)?;
            nap(Duration::from_micros(round * 377 % 3000));
            machine.round()?;
            machine.finish(&vcpus)?;
            assert_eq!(machine.round()?, 0, "nobody has written");
            resume(&vcpus);
        }
        reaper.stop()?;
        stop(vcpus)?;
        assert_unsuspicious(&machine.log.stats());
    }
    Ok(Completed)
}
