// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VMM with one epoll loop and no thread for the reaper: `EventReaper`'s descriptor is one of those that the loop waits for.
//!
//! ```sh
//! cargo run --example event_loop
//! ```
//!
//! The loop has three sources: the reaper, a timer that begins a round of the migration, and the vCPU's thread, which says that
//! it has stopped. `guest` simulates what is below a VMM; all else a VMM does the same way.

mod guest;

use std::error::Error;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use guest::{Exit, Guest, Load, Vcpu, page_size};
use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::pacing::Adaptive;
use kvm_dirty_ring::{DirtyPages, EventReaper, SlotId, VcpuRing};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

const RAM: SlotId = SlotId::new(0, 0);
const PAGES: u64 = 8192;
const ROUNDS: u32 = 5;
/// Nothing here is silent for so long.
const PATIENCE_MS: i32 = 60_000;

const REAP: u64 = 0;
const ROUND: u64 = 1;
const STOPPED: u64 = 2;

fn main() -> Result<(), Box<dyn Error>> {
    let guest = Guest::new(512, RAM, PAGES);
    let log = guest.dirty_log();
    log.add_slot(RAM, PAGES)?;
    guest.create_slots();
    let vcpu = guest.create_vcpu(Load {
        first_page: 0,
        pages: PAGES,
        burst: 64,
        rest: Duration::from_micros(200),
    });
    let ring = log.attach_ring(vcpu.vcpu.ring_memory())?;
    let stopped = EventFd::new(libc::EFD_NONBLOCK)?;
    let stops = stopped.try_clone()?;
    let thread = thread::spawn(move || {
        let ran = run_vcpu(vcpu, ring);
        stops.write(1).expect("nobody counts that far");
        ran
    });

    let mut reaper = EventReaper::new(&log, Adaptive::default())?;
    let mut timer = TimerFd::new()?;
    let interval = Duration::from_millis(100);
    timer.reset(interval, Some(interval))?;
    let epoll = Epoll::new()?;
    for (fd, source) in [
        (reaper.as_raw_fd(), REAP),
        (timer.as_raw_fd(), ROUND),
        (stopped.as_raw_fd(), STOPPED),
    ] {
        let event = EpollEvent::new(EventSet::IN, source);
        epoll.ctl(ControlOperation::Add, fd, event)?;
    }

    let memory = guest.memory();
    let mut copy = vec![0; PAGES as usize * page_size()];
    let mut dirty = DirtyPages::new();
    let mut send = |dirty: &DirtyPages| {
        for run in dirty.runs() {
            let bytes = memory.read(run.first_page, run.pages);
            copy[run.first_page as usize * page_size()..][..bytes.len()].copy_from_slice(&bytes);
        }
        copy == memory.read(0, PAGES)
    };
    let mut rounds = 0;
    let equal = 'vmm: loop {
        let mut events = [EpollEvent::default(); 3];
        let found = epoll.wait(PATIENCE_MS, &mut events)?;
        if found == 0 {
            return Err("the guest is silent".into());
        }
        for event in &events[..found] {
            match event.data() {
                REAP => {
                    if let Err(error) = reaper.tick() {
                        eprintln!("{error}");
                    }
                }
                ROUND => {
                    timer.wait()?;
                    rounds += 1;
                    log.sync(&mut dirty)?;
                    println!("round {rounds}: {} pages", dirty.page_count());
                    send(&dirty);
                    if rounds == ROUNDS {
                        timer.clear()?;
                        guest.kick();
                    }
                }
                _ => {
                    log.sync(&mut dirty)?;
                    println!("the last: {} pages", dirty.page_count());
                    break 'vmm send(&dirty);
                }
            }
        }
    };
    thread.join().map_err(|_| "the vCPU panicked")??;

    let stats = log.stats();
    let reaped = stats.reaper;
    println!(
        "{} ticks, {} of them for a full ring; {} passes, {} full exits",
        reaped.looks,
        reaped.woken,
        reaped.passes,
        stats.full_exits()
    );
    assert!(equal, "the copy differs");
    assert!(
        reaped.passes > 0,
        "nobody has emptied the rings between two rounds"
    );
    println!("the copy is equal to the guest's memory");
    Ok(())
}

/// A vCPU's thread.
fn run_vcpu(mut vcpu: Vcpu, mut ring: VcpuRing) -> Result<(), FullError> {
    loop {
        // ioctl KVM_RUN
        match vcpu.run() {
            Exit::DirtyRingFull => ring.on_full()?,
            Exit::Kicked => return Ok(()),
        }
    }
}
