// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Rust of README.md and of the pages in docs/, so that it compiles: each paragraph of theirs is to be found
//! in a function here, line by line. That it does what they say is for the other tests.

#![allow(dead_code, reason = "it is compiled, and not run")]

use std::error::Error;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_dirty_ring::convergence::{self, Convergence, Decision, Extent, Terms};
use kvm_dirty_ring::pacing::{Adaptive, Observation, Pacing};
use kvm_dirty_ring::{
    DirtyLog, DirtyPages, DirtyPart, EventReaper, GuestMap, GuestRegion, LastPages, Limiter, Mode,
    Priority, Reaper, RingEntries, SlotId, Stats, VcpuRing, WorkingSet,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

type Outcome = Result<(), Box<dyn Error>>;

// What the VMM has.

struct Thread;

impl Thread {
    fn kick(&self) {}
}

fn set_region(_: &kvm_userspace_memory_region) -> io::Result<()> {
    Ok(())
}

fn set_flags(_: SlotId, _: u32) -> io::Result<()> {
    Ok(())
}

fn stop_vcpus() -> io::Result<()> {
    Ok(())
}

fn resume_vcpus() -> io::Result<()> {
    Ok(())
}

fn stop_devices() -> io::Result<()> {
    Ok(())
}

#[rustfmt::skip]
fn readme_use(vm_fd: File, vcpu_fd: File, pages: u64, mut dirty: DirtyPages) -> Outcome {
    let send = |_: SlotId, _: u64, _: u64| io::Result::Ok(());
    let log = DirtyLog::enable(&vm_fd, RingEntries::new(4096)?)?;   // before the first vCPU
    log.add_slot(SlotId::new(0, 0), pages)?;                        // before KVM has the memslot
    let mut ring = log.attach_vcpu(&vcpu_fd)?;                      // one for each vCPU
    let reaper = Reaper::spawn(&log, Adaptive::default())?;         // a thread that empties the rings
    // On the vCPU's thread, after KVM_EXIT_DIRTY_RING_FULL:
    ring.on_full()?;
    // On the migration's thread, in each round:
    log.sync(&mut dirty)?;                                          // dirty: DirtyPages, reused
    for run in dirty.runs() { send(run.slot, run.first_page, run.pages)?; }

    drop(reaper);
    Ok(())
}

#[rustfmt::skip]
#[expect(clippy::single_match)] // It is one of many arms.
fn full_ring(mut vcpu_fd: VcpuFd, mut ring: VcpuRing) -> Outcome {
    match vcpu_fd.run() {
        // kvm-ioctls 0.25 has no name of its own for this exit.
        Ok(VcpuExit::Unsupported(kvm_bindings::KVM_EXIT_DIRTY_RING_FULL)) => ring.on_full()?,
        _ => {} // ... all others as before
    }

    Ok(())
}

#[rustfmt::skip]
fn device(log: DirtyLog, memory: GuestMemoryMmap, map: GuestMap, address: u64, bytes: [u8; 4]) -> Outcome {
    memory.write_slice(&bytes, GuestAddress(address))?;
    for run in map.runs(address..address + bytes.len() as u64) {
        log.mark_dirty(run.slot, run.first_page, run.pages)?;
    }

    Ok(())
}

/// Looks each millisecond, and empties a ring that is three quarters full.
struct ThreeQuarters;

impl Pacing for ThreeQuarters {
    fn decide(&mut self, seen: &Observation<'_>, reap: &mut [bool]) -> Duration {
        for (ring, reap) in seen.rings.iter().zip(reap) {
            *reap = ring.waiting * 4 >= ring.soft_limit * 3;
        }
        Duration::from_millis(1)
    }
}

#[rustfmt::skip]
fn event_loop(log: DirtyLog) -> Outcome {
    let epoll_add = |_: BorrowedFd<'_>| io::Result::Ok(());
    let mut reaper = EventReaper::new(&log, Adaptive::default())?;
    epoll_add(reaper.as_fd())?;
    // Whenever it is readable:
    if let Err(error) = reaper.tick() { eprintln!("{error}"); } // the reaper goes on

    Ok(())
}

#[rustfmt::skip]
fn reaper(log: DirtyLog) -> Outcome {
    let reaper = Reaper::builder()
        .name("vm7-reaper")               // Linux keeps 15 bytes
        .cpus([0, 1])                     // not those that vCPUs are pinned to
        .priority(Priority::Nice(-5))     // CAP_SYS_NICE, or RLIMIT_NICE
        .spawn(&log, Adaptive::default())?;

    drop(reaper);
    Ok(())
}

#[rustfmt::skip]
fn enabling(vm_fd: File) -> Outcome {
    let log = DirtyLog::enable(&vm_fd, RingEntries::new(65_536)?)?;

    drop(log);
    Ok(())
}

#[rustfmt::skip]
fn adding(log: DirtyLog, slot: SlotId, pages: u64, region: kvm_userspace_memory_region) -> Outcome {
    log.add_slot(slot, pages)?;
    set_region(&region)?; // KVM_SET_USER_MEMORY_REGION

    Ok(())
}

#[rustfmt::skip]
fn removing(
    log: DirtyLog, mut last: DirtyPages, slot: SlotId, mut region: kvm_userspace_memory_region,
) -> Outcome {
    let retired = log.retire_slot(slot)?;  // harvests the slot's last entries
    log.sync_retired(&retired, &mut last)?; // returns its pages a last time
    region.memory_size = 0;
    set_region(&region)?;                  // deleted in KVM
    log.finish_slot(&retired)?;            // the id is free now

    Ok(())
}

#[rustfmt::skip]
fn switching(log: DirtyLog, slot: SlotId, pages: u64, region: kvm_userspace_memory_region) -> Outcome {
    log.add_slot(slot, pages)?;
    log.stop_tracking(slot, || set_region(&region))?;      // creates it, without the flag
    // The migration begins:
    log.start_tracking(slot, || set_flags(slot, KVM_MEM_LOG_DIRTY_PAGES))?;
    // ... and ends:
    log.stop_tracking(slot, || set_flags(slot, 0))?;

    Ok(())
}

#[rustfmt::skip]
fn the_last_sync(log: DirtyLog, mut dirty: DirtyPages) -> Outcome {
    let send = |_: &DirtyPages| io::Result::Ok(());
    let fits_into_the_downtime = 1000;
    loop {
        log.sync(&mut dirty)?;
        if dirty.page_count() <= fits_into_the_downtime { break; }
        send(&dirty)?;
    }

    stop_vcpus()?;
    stop_devices()?;
    send(&dirty)?;         // found by the sync before
    log.sync(&mut dirty)?;
    send(&dirty)?;         // written after it

    Ok(())
}

#[rustfmt::skip]
fn snapshot(log: DirtyLog, mut dirty: DirtyPages) -> Outcome {
    let save = |_: SlotId, _: u64, _: u64| io::Result::Ok(());

    stop_vcpus()?;
    stop_devices()?;       // and save the state of both
    log.sync(&mut dirty)?;
    for run in dirty.runs() { save(run.slot, run.first_page, run.pages)?; }
    resume_vcpus()?;

    Ok(())
}

#[rustfmt::skip]
fn finishing(log: DirtyLog, dirty: DirtyPages, mut last: LastPages) -> Outcome {
    let send = |_: DirtyPart<'_>| io::Result::Ok(());
    stop_vcpus()?;
    stop_devices()?;
    log.put_back(&dirty)?;          // found by the sync before, and not sent
    log.last_sync(&mut last)?;      // that, what was written since, and members
    send(last.part())?;

    Ok(())
}

#[rustfmt::skip]
fn a_reaper(log: DirtyLog) -> Outcome {
    let reaper = Reaper::spawn(&log, Adaptive::default())?;

    drop(reaper);
    Ok(())
}

#[rustfmt::skip]
fn a_map(slot: SlotId, pages: u64) -> Outcome {
    let map = GuestMap::new([GuestRegion { slot, address: 0, pages }])?;

    drop(map);
    Ok(())
}

#[rustfmt::skip]
fn suspects(log: DirtyLog) -> Outcome {
    if log.stats().slots_to_rearm > 0 {
        stop_vcpus()?;
        log.rearm_from(Stats::REARM_PAYS_FROM, |slot| {
            set_flags(slot, 0)?; // KVM_SET_USER_MEMORY_REGION, all else as it was
            set_flags(slot, KVM_MEM_LOG_DIRTY_PAGES)
        })?;
        resume_vcpus()?;
    }

    Ok(())
}

#[rustfmt::skip]
fn limits(log: DirtyLog, threads: Vec<Thread>, mut vcpu_fd: VcpuFd, mut ring: VcpuRing) -> Outcome {
    // A signal whose handler does nothing. KVM_RUN returns EINTR.
    let limiter = Limiter::spawn(&log, move |vcpu| threads[vcpu].kick())?;
    log.set_dirty_limits(NonZeroU64::new(5_000))?; // None lifts it

    match vcpu_fd.run() {

        // In the vCPU's loop; `on_full` as before.
        Err(error) if error.errno() == libc::EINTR => { ring.throttle(); }

        _ => {}
    }

    // Before vCPUs are stopped, also for the last sync:
    let awake = log.keep_awake();
    stop_vcpus()?;
    // ... and when they are to run again:
    drop(awake);

    drop(limiter);
    Ok(())
}

#[rustfmt::skip]
fn working_set(log: DirtyLog, supposed_pause: Duration, downtime: Duration) -> Outcome {
    let send = |_: &mut DirtyPages| io::Result::Ok(false);
    let send_last = |_: DirtyPart<'_>| io::Result::Ok(());
    let protect = |_: SlotId| io::Result::Ok(());
    let throttle_or_give_up = |_: NonZeroU64| io::Result::Ok(());
    let (mut dirty, mut last) = (DirtyPages::new(), LastPages::new());
    let mut terms = Terms::new(0.0, downtime);                      // the link's speed: unknown before round 0
    let mut convergence = Convergence::new();
    loop {
        log.sync(&mut dirty)?;                                      // the first one: all memory
        let extent = |part: DirtyPart| Extent { pages: part.page_count(), runs: part.runs().count() as u64 };
        let mut seen = convergence::Observation::new(terms, extent(dirty.others()), extent(dirty.members()));
        let set = log.stats().working_set;
        let pause = match set.refreshes {
            _ if log.mode() == Mode::Bitmap => Duration::ZERO,          // a refresh stops no vCPU there
            0 => supposed_pause,
            _ => Duration::from_nanos(set.refresh_ns),
        };
        seen.refresh.pause = Some(pause);
        (seen.refresh.closed, seen.refresh.back) = (set.last_closed, set.back);
        seen.refresh.owed = set.refresh_owed;
        match convergence.decide(&seen) {
            Decision::Finish => break,
            Decision::Refresh => {
                log.put_back(&dirty)?;                              // the next sync returns what is not sent
                let awake = log.keep_awake();                       // vCPUs that sleep for a dirty limit stop at once
                stop_vcpus()?;
                log.refresh(protect)?;
                drop(awake);
                resume_vcpus()?;
                continue;
            }
            Decision::Hopeless { pages_per_second } => throttle_or_give_up(pages_per_second)?,
            Decision::GoOn => {}
        }
        let (sent, start) = (extent(dirty.others()), Instant::now());
        let broke = send(&mut dirty)?;                              // others(), but not members(); returns once they have arrived
        if terms.pages_per_second == 0.0 {                          // round 0 has measured the link
            terms.pages_per_second = sent.pages as f64 / start.elapsed().as_secs_f64();
            log.set_working_set(Some(WorkingSet::new(terms.places())));
        } else if !broke {                                          // a break is no cost of messages
            terms.learn_run_cost(sent, start.elapsed());
        }
    }
    let _awake = log.keep_awake();
    stop_vcpus()?;
    stop_devices()?;
    log.put_back(&dirty)?;                                          // found, and not sent: with the rest, each page once
    log.last_sync(&mut last)?;                                      // protects nothing, resets nothing
    send_last(last.part())?;                                        // members are among them
    Ok(())
}

/// Lines as they are compared: however they are indented and their comments aligned.
fn plain(text: &str) -> String {
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    text.lines().map(words).collect::<Vec<_>>().join("\n")
}

/// What blank lines set apart in the Rust of a document, with the line it begins at.
fn paragraphs(document: &str) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let (mut is_rust, mut goes_on) = (false, false);
    for (number, line) in (1..).zip(document.lines()) {
        if line.starts_with("```") {
            is_rust = line == "```rust";
            goes_on = false;
        } else if is_rust && !line.trim().is_empty() {
            match found.last_mut() {
                Some((_, text)) if goes_on => *text += &format!("\n{line}"),
                _ => found.push((number, line.to_owned())),
            }
            goes_on = true;
        } else {
            goes_on = false;
        }
    }
    found
}

fn all_of_it_compiles(name: &str, document: &str, least: usize) {
    let compiled = plain(include_str!("snippets.rs"));
    let paragraphs = paragraphs(document);
    assert!(paragraphs.len() >= least, "{name}: {paragraphs:?}");
    for (line, text) in paragraphs {
        // Whole lines.
        let wanted = format!("\n{}\n", plain(&text));
        let is_there = compiled.contains(&wanted);
        assert!(is_there, "{name}:{line}: not compiled here:\n{text}");
    }
}

#[test]
fn the_pages_compile() {
    let pages = [
        ("README.md", include_str!("../../README.md"), 1),
        ("docs/guide.md", include_str!("../../docs/guide.md"), 9),
        ("docs/slots.md", include_str!("../../docs/slots.md"), 3),
        ("docs/threads.md", include_str!("../../docs/threads.md"), 2),
        (
            "docs/migration.md",
            include_str!("../../docs/migration.md"),
            1,
        ),
        ("docs/limits.md", include_str!("../../docs/limits.md"), 3),
        (
            "docs/operations.md",
            include_str!("../../docs/operations.md"),
            1,
        ),
        (
            "docs/working-set.md",
            include_str!("../../docs/working-set.md"),
            1,
        ),
    ];
    for (name, page, least) in pages {
        all_of_it_compiles(name, page, least);
    }
}
